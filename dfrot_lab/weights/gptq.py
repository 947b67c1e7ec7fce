"""GPTQ (Frantar et al., arXiv 2210.17323): columns rounded in order, each error spread over the rest."""

import torch
from torch import Tensor

from dfrot_lab.maths.quantizers import Quantized, code_range
from dfrot_lab.recipe.specs import WeightSpec
from dfrot_lab.weights.rtn import packed, scale_of

CALIBRATED = True  # it needs the Hessian of a layer's inputs
VERSION = 2  # clips of 2 and 3 bits are searched down to 0.02, not 0.4
COLUMNS = 128  # columns quantized before the rest hears of their error in one product: GPTQ's lazy batch
FEW = 16  # columns of a block whose errors reach the rest of it in one product
HESSIAN_BLOCK = 192  # columns of a Hessian at once: half is known by symmetry, narrower is slower


def quantize(weight: Tensor, hessian: Tensor | None, spec: WeightSpec) -> Quantized:
    """GPTQ of `weight` (out, in) for inputs with `hessian` = sum x x^T (in, in): codes, scale (out, 1), zero
    0. Each column's error is spread over those not yet rounded by the inverse Hessian's Cholesky factor; an
    input that is always zero has weight 0. ValueError: a damped Hessian that is not positive definite."""
    if hessian is None:
        raise ValueError("gptq.hessian must be the sum of x x^T of the layer's inputs; got None")
    weight, dead = weight.float().clone(), hessian.diagonal() == 0
    weight[:, dead] = 0
    scale = scale_of(weight, spec)
    factor = _inverse_factor(hessian, dead, spec.damping)
    low, high = code_range(spec.quantizer)
    codes = torch.empty_like(weight)
    for start in range(0, weight.shape[1], COLUMNS):
        block = slice(start, min(start + COLUMNS, weight.shape[1]))
        codes[:, block], errors = _block(weight[:, block], factor[block, block], scale, low, high)
        weight[:, block.stop :] -= errors @ factor[block, block.stop :]
    return packed(codes, scale, spec)


def _block(weight: Tensor, factor: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Codes and scaled errors of one block of columns (out, columns): on the transpose, where a column is
    contiguous, and on the CPU: a GPU would take longer to start these many small steps than to do them."""
    columns, factor, step = weight.T.contiguous().cpu(), factor.cpu(), scale.flatten().cpu()
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    for i, diagonal in enumerate(factor.diagonal().tolist()):
        end = i - i % FEW + FEW  # columns up to here hear of the error now, the block's others with FEW more
        torch.div(columns[i], step, out=codes[i]).round_().clamp_(low, high)
        torch.addcmul(columns[i], codes[i], step, value=-1, out=errors[i]).div_(diagonal)
        columns[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i], alpha=-1)
        if i + 1 == end:
            columns[end:].addmm_(factor[end - FEW : end, end:].T, errors[end - FEW : end], alpha=-1)
    return codes.T.to(weight.device), errors.T.to(weight.device)


def hessian_of(x: Tensor) -> Tensor:
    """sum over rows of x x^T (in, in) for `x` (tokens, in): the lower blocks are mirrored upper ones."""
    n = x.shape[1]
    hessian = x.new_empty(n, n)
    for start in range(0, n, HESSIAN_BLOCK):
        block, rest = slice(start, start + HESSIAN_BLOCK), slice(start + HESSIAN_BLOCK, n)
        hessian[block, start:] = x[:, block].T @ x[:, start:]
        hessian[rest, block] = hessian[block, rest].T
    return hessian


def _inverse_factor(hessian: Tensor, dead: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian (1 for `dead` inputs), in float64 and in one
    matrix's place, for it is the largest thing there is; returned as float32."""
    held = hessian.double()
    held.diagonal()[dead] = 1
    held.diagonal().add_(damping * float(held.diagonal().mean()))
    try:
        torch.linalg.cholesky(held, out=held)
        torch.cholesky_inverse(held, out=held)
        return torch.linalg.cholesky(held, upper=True, out=held).float()
    except torch.linalg.LinAlgError as error:
        said = f"it is not ({error}). Look for NaN or Inf in the activations."
        raise ValueError(f"the calibration Hessian must be positive definite; {said}") from error
