"""Round weights to nearest, symmetric, a scale an output channel or a group of inputs, each scale's clip
searched for."""

import torch
from torch import Tensor

from dfrot_lab.maths.quantizers import Quantized, clip_search, code_range, grouped, scale_zero
from dfrot_lab.recipe.specs import WeightSpec

CALIBRATED = False  # it looks at the weight alone
VERSION = 2  # clips of 2 and 3 bits are searched down to 0.02, not 0.4


def quantize(weight: Tensor, _seen: object, spec: WeightSpec) -> Quantized:
    """`weight` (out, in) rounded to nearest, as `packed` has it."""
    weight = weight.float()
    scale = scale_of(weight, spec)
    codes = torch.div(weight, steps(scale, weight.shape[1])).round_().clamp_(*code_range(spec.quantizer))
    return packed(codes, scale, spec)


def scale_of(weight: Tensor, spec: WeightSpec) -> Tensor:
    """The scales (out, groups) for `weight` (out, in) float32: one an output channel, or one a group."""
    rows = grouped(weight, spec.quantizer)
    found = clip_search(rows, spec.quantizer) if spec.clip_search else scale_zero(rows, spec.quantizer)[0]
    return found.reshape(len(weight), -1)


def steps(scale: Tensor, columns: int) -> Tensor:
    """The scales (out, groups) for every column (out, columns), or (out, 1) where all share one."""
    return scale if scale.shape[1] == 1 else scale.repeat_interleave(columns // scale.shape[1], 1)


def packed(codes: Tensor, scale: Tensor, spec: WeightSpec) -> Quantized:
    """Codes (out, in) as small integers, a row for each of the scales (out, groups), zero points of 0."""
    small, each = torch.int8 if spec.quantizer.bits <= 8 else torch.int32, scale.reshape(-1, 1)
    return Quantized(codes.to(small).reshape(len(each), -1), each, torch.zeros_like(each))
