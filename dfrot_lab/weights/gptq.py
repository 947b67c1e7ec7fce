"""GPTQ (Frantar et al., arXiv 2210.17323): columns rounded in order, each error spread over the rest."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfrot_lab.maths.quantizers import Quantized, code_range
from dfrot_lab.recipe.specs import WeightSpec
from dfrot_lab.weights.rtn import packed, scale_of, steps

CALIBRATED = True  # it needs the Hessian of a layer's inputs
VERSION = 2  # clips of 2 and 3 bits are searched down to 0.02, not 0.4
COLUMNS = 128  # columns quantized before the rest hears of their error in one product: GPTQ's lazy batch
FEW = 16  # columns of a block whose errors reach the rest of it in one product
HESSIAN_BLOCK = 192  # columns of a Hessian at once: half is known by symmetry, narrower is slower


class Seen(NamedTuple):
    """What linears were seen to read, rows x (tokens, in): `hessian` = sum x x^T (in, in); where a quantizer
    asks for it `drift` = sum (x0 - x) x^T, x0 being what the full-precision model has in x's place, and what
    its own `Look` made of their layer's `attention`."""

    hessian: Tensor
    drift: Tensor | None = None
    attention: Any = None


def with_drift(seen: Seen | None, method: str) -> tuple[Tensor, Tensor]:
    """The Hessian and the drift that a method was told of; ValueError: it was not."""
    if seen is None or seen.drift is None:
        got = "None" if seen is None else "the Hessian alone"
        raise ValueError(f"{method}.seen must have the drift of the layer's inputs; got {got}")
    return seen.hessian, seen.drift


def hessian_seen(seen: Seen | None, method: str) -> Tensor:
    """The Hessian that a method was told of; ValueError: it was not."""
    if seen is None:
        raise ValueError(f"{method}.seen must have the Hessian of the layer's inputs; got None")
    return seen.hessian


def quantize(weight: Tensor, seen: Seen | None, spec: WeightSpec) -> Quantized:
    """GPTQ of `weight` (out, in) for what was `seen` of its inputs, as `rtn.packed` has it. Each column's
    error is spread over those not yet rounded by the inverse Hessian's Cholesky factor; an input that is
    always zero has weight 0. ValueError: a damped Hessian that is not positive definite."""
    hessian = hessian_seen(seen, "gptq")
    return in_order(weight, hessian, spec, inverse_factor(hessian, spec.damping))


def in_order(
    weight: Tensor, hessian: Tensor, spec: WeightSpec, factor: Tensor, drag: Tensor | None = None
) -> Quantized:
    """The columns of `weight` (out, in) rounded in order: each one's error goes to those after it by `factor`
    (`inverse_factor`) and, with `drag` (in, in; 0 on and below its diagonal), so do its value times that."""
    weight = weight.float().clone()
    weight[:, hessian.diagonal() == 0] = 0
    scale = scale_of(weight, spec)  # of the weights before any is rounded, also where groups have their own
    every = steps(scale, weight.shape[1]).expand_as(weight)
    low, high = code_range(spec.quantizer)
    codes = torch.empty_like(weight)
    for start in range(0, weight.shape[1], COLUMNS):
        block = slice(start, min(start + COLUMNS, weight.shape[1]))
        own = factor[block, block], None if drag is None else drag[block, block]
        codes[:, block], errors, values = _block(weight[:, block], *own, every[:, block], low, high)
        weight[:, block.stop :] -= errors @ factor[block, block.stop :]
        if drag is not None:
            weight[:, block.stop :] += values @ drag[block, block.stop :]
    return packed(codes, scale, spec)


def _block(
    weight: Tensor, factor: Tensor, drag: Tensor | None, scale: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scaled errors and values before rounding of one block of columns (out, columns): on the
    transpose, where a column is contiguous, and on the CPU: a GPU would take longer to start these many small
    steps than to do them."""
    columns, factor, step = weight.T.contiguous().cpu(), factor.cpu(), scale.T.cpu()
    drag = None if drag is None else drag.cpu()
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    for i, diagonal in enumerate(factor.diagonal().tolist()):
        end = i - i % FEW + FEW  # columns up to here hear of the error now, the block's others with FEW more
        torch.div(columns[i], step[i], out=codes[i]).round_().clamp_(low, high)
        torch.addcmul(columns[i], codes[i], step[i], value=-1, out=errors[i]).div_(diagonal)
        columns[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i], alpha=-1)
        if drag is not None:
            columns[i + 1 : end].addr_(drag[i, i + 1 : end], columns[i])
        if i + 1 == end:
            columns[end:].addmm_(factor[end - FEW : end, end:].T, errors[end - FEW : end], alpha=-1)
            if drag is not None:
                columns[end:].addmm_(drag[end - FEW : end, end:].T, columns[end - FEW : end])
    return codes.T.to(weight.device), errors.T.to(weight.device), columns.T.to(weight.device)


def hessian_of(x: Tensor) -> Tensor:
    """sum over rows of x x^T (in, in) for `x` (tokens, in): the lower blocks are mirrored upper ones."""
    n = x.shape[1]
    hessian = x.new_empty(n, n)
    for start in range(0, n, HESSIAN_BLOCK):
        block, rest = slice(start, start + HESSIAN_BLOCK), slice(start + HESSIAN_BLOCK, n)
        hessian[block, start:] = x[:, block].T @ x[:, start:]
        hessian[rest, block] = hessian[block, rest].T
    return hessian


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian (1 for inputs that are always 0), in float64
    and in one matrix's place, for it is the largest thing there is; returned as float32. ValueError."""
    held = damped(hessian, damping)
    try:
        torch.linalg.cholesky(held, out=held)
        torch.cholesky_inverse(held, out=held)
        return torch.linalg.cholesky(held, upper=True, out=held).float()
    except torch.linalg.LinAlgError as error:
        said = f"it is not ({error}). Look for NaN or Inf in the activations."
        raise ValueError(f"the calibration Hessian must be positive definite; {said}") from error


def damped(hessian: Tensor, damping: float) -> Tensor:
    """A copy of `hessian` in float64 with `damping` times its mean diagonal, after a 1 for each 0, on it."""
    held = hessian.double()
    held = held.clone() if held is hessian else held
    held.diagonal()[held.diagonal() == 0] = 1
    held.diagonal().add_(damping * float(held.diagonal().mean()))
    return held
