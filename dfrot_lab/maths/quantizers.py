"""Quantizers: a tensor to integer codes and back, per token, channel, group or tensor.

Symmetric, b bits:  s = c max|x| / (2^(b-1) - 1),  q = clamp(round(x / s), -2^(b-1), 2^(b-1) - 1),  x^ = s q.
Asymmetric, b bits: s = c (max x - min x) / (2^b - 1),  z = -round(c min x / s),
                    q = clamp(round(x / s) + z, 0, 2^b - 1),  x^ = s (q - z)  (DFRot, Eq. 5).
As in QuaRot's code, the asymmetric range includes 0, so that z is a code; in the free scheme it need not, as
Eq. 5 says. c is the clip ratio; max and min run over what shares one scale."""

from typing import NamedTuple

import torch
from torch import Tensor

from dfrot_lab.maths import block_floats
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.grids import BLOCK_FLOATS, QuantSpec

_CHUNK = 1 << 19  # elements worked on at once: 2 MiB of float32 stays in a core's cache


class Quantized(NamedTuple):
    """Integer `codes` (groups, n) with `scale` and `zero` (groups, 1): each is scale * (code - zero)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


class Fixed(NamedTuple):
    """The scale and the zero point of a static quantizer, found before what it quantizes is seen."""

    scale: float
    zero: float

    def of(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Both for rows (groups, n), as `scale_zero` has them: (1, 1), in their dtype, on their device."""
        return groups.new_full((1, 1), self.scale), groups.new_full((1, 1), self.zero)


def code_range(spec: QuantSpec) -> tuple[int, int]:
    """Smallest and largest code: (-8, 7) for symmetric, (0, 15) for asymmetric 4 bits."""
    half = 1 << (spec.bits - 1)
    return (-half, half - 1) if spec.symmetric else (0, 2 * half - 1)


def grouped(x: Tensor, spec: QuantSpec) -> Tensor:
    """`x` as (groups, n), each row with one scale. ValueError: a group size that does not divide channels, a
    spec of another quantizer than a grid."""
    require(
        "QuantSpec.method", repr(spec.method), spec.method is None, "None where tensors are rounded to grids"
    )
    if spec.granularity == "per_tensor":
        return x.reshape(1, -1)
    size = spec.group_size or x.shape[-1]
    if x.shape[-1] % size:
        raise ValueError(f"QuantSpec.group_size must divide the last dimension {x.shape[-1]}; got {size}")
    return x.reshape(-1, size)


def scale_zero(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point (groups, 1) of rows (groups, n); a row of zeros gets scale 1 and stays zeros.
    ValueError: a static quantizer, whose are not the rows' own."""
    is_grid = spec.scheme not in BLOCK_FLOATS
    require("QuantSpec.scheme", spec.scheme, is_grid, "a grid's where codes are asked for")
    rule = "another than static, whose scale is found before (observe.static), to quantize by its own range"
    require("QuantSpec.granularity", spec.granularity, spec.granularity != "static", rule)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)  # a CPU's aminmax is 6x slower
    top, still = code_range(spec)[1], torch.ones_like(low)
    if spec.symmetric:
        scale = torch.maximum(-low, high).mul_(spec.clip_ratio / top)
        return torch.where(scale == 0, still, scale), torch.zeros_like(scale)
    if spec.scheme == "free":
        cut = (high / 2 - low / 2).mul_(1 - spec.clip_ratio)  # the range shrinks about its middle
        low, high = low + cut, high - cut
        still = torch.where(low == 0, 1, low.abs())
    else:
        low, high = low.clamp_(max=0).mul_(spec.clip_ratio), high.clamp_(min=0).mul_(spec.clip_ratio)
    wide = high / top - low / top  # not (high - low) / top, which overflows at the dtype's largest values
    scale = torch.where(wide == 0, still, wide)
    return scale, low.div_(scale).round_().neg_()


def levels(x: Tensor, spec: QuantSpec) -> Tensor:
    """All values a quantizer can give one row x (channels,), lowest first, in x's dtype."""
    scale, zero = scale_zero(x[None], spec)
    low, high = code_range(spec)
    return (scale * (torch.arange(low, high + 1, dtype=x.dtype) - zero))[0]


def _rounded(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, out: Tensor | None = None) -> Tensor:
    """round(x / scale) limited to the codes' range less the zero point: the codes minus zero, as floats."""
    low, high = code_range(spec)
    out = torch.div(x, scale, out=out).round_()
    if spec.symmetric:
        return out.clamp_(low, high)
    torch.maximum(out, low - zero, out=out)  # these two are twice as fast as clamp_ with tensor limits
    return torch.minimum(out, high - zero, out=out)


def quantize(x: Tensor, spec: QuantSpec) -> Quantized:
    """Codes (int8, uint8 where not symmetric, int32 above 8 bits), scales, zeros. ValueError: 16 bits."""
    require("QuantSpec.bits", "16: leave the tensor alone", spec.bits < 16, "below 16 to have codes")
    groups = grouped(x, spec)
    scale, zero = scale_zero(groups, spec)
    kind = torch.int32 if spec.bits > 8 else torch.int8 if spec.symmetric else torch.uint8
    return Quantized(_rounded(groups, scale, zero, spec).add_(zero).to(kind), scale, zero)


def centred(x: Tensor, spec: QuantSpec, out: Tensor, fixed: Fixed | None = None) -> Tensor:
    """Codes of `x` (rows, n) less their zero points, written into `out` (int8); the scales (rows, 1). By a
    `fixed` scale and zero point, or each row's own."""
    groups = grouped(x, spec)
    scale, zero = scale_zero(groups, spec) if fixed is None else fixed.of(groups)
    out.copy_(_rounded(groups, scale, zero, spec))
    return scale.expand(len(groups), 1)


def dequantize(quantized: Quantized, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The values the codes stand for, as `shape`, in the scale's dtype."""
    codes, scale, zero = quantized
    return (codes.to(scale.dtype) - zero).mul_(scale).reshape(shape)


def fake_quantize(x: Tensor, spec: QuantSpec, fixed: Fixed | None = None) -> Tensor:
    """`x` rounded to its codes' values, same shape, dtype; itself at 16 bits. Q(a x) = a Q(x), a > 0; but for
    a `fixed` scale and zero point, the same whatever is in x."""
    if spec.bits == 16:
        return x
    groups = grouped(x, spec)
    if spec.scheme in BLOCK_FLOATS:
        return block_floats.fake_quantize(groups, spec.scheme).reshape(x.shape)
    out = torch.empty_like(groups)
    rows = len(groups) if x.is_cuda else max(1, _CHUNK // max(1, groups.shape[-1]))
    for part, result in zip(groups.split(rows), out.split(rows), strict=True):
        scale, zero = scale_zero(part, spec) if fixed is None else fixed.of(part)
        _rounded(part, scale, zero, spec, out=result).mul_(scale)
    return out.reshape(x.shape)


def rows_at_once(rows: Tensor, spec: QuantSpec, most: int) -> int:
    """How many `rows` (tokens, channels) to quantize together: `most`, but all where they share one scale."""
    return max(1, len(rows)) if spec.granularity == "per_tensor" else most


def squared_error(x: Tensor, spec: QuantSpec) -> Tensor:
    """E(x) = sum over channels of (x - Q(x))^2, one a token: (..., channels) to (...) (DFRot, Eq. 1)."""
    if spec.bits == 16 or not x.numel():
        return x.new_zeros(x.shape[:-1])
    rows = x.reshape(-1, x.shape[-1])
    parts = rows.split(rows_at_once(rows, spec, max(1, _CHUNK // x.shape[-1])))
    errors = [(part - fake_quantize(part, spec)).square_().sum(-1) for part in parts]
    return torch.cat(errors).reshape(x.shape[:-1])


def clip_ratios(bits: int) -> list[float]:
    """The clip ratios to search, from 1 down: 30 to 0.4; of coarse grids, whose best is lower, 50 to 0.02."""
    return torch.linspace(1, 0.4, 30).tolist() if bits > 3 else torch.linspace(1, 0.02, 50).tolist()


def clip_search(weight: Tensor, spec: QuantSpec) -> Tensor:
    """The scale (rows, 1) of each row of a symmetric per-channel `weight` (rows, n) with least squared error
    over the `clip_ratios` of its bits: the search of GPTQ's and QuaRot's code, which take |error|^2.4."""
    widest, step = scale_zero(weight, spec)[0], max(1, _CHUNK // weight.shape[-1])
    found = widest.clone()
    for part, wide, best in zip(weight.split(step), widest.split(step), found.split(step), strict=True):
        least = torch.full_like(wide, torch.inf)
        for ratio in clip_ratios(spec.bits):
            scale = wide * ratio
            rounded = _rounded(part, scale, torch.zeros_like(scale), spec).mul_(scale)
            error = rounded.sub_(part).square_().sum(-1, keepdim=True)
            better = error < least
            best.copy_(torch.where(better, scale, best))
            least.copy_(torch.where(better, error, least))
    return found
