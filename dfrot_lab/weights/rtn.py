"""Round weights to nearest, per output channel, symmetric, each channel's clip searched for."""

import torch
from torch import Tensor

from dfrot_lab.maths.quantizers import Quantized, clip_search, code_range, scale_zero
from dfrot_lab.recipe.specs import WeightSpec

CALIBRATED = False  # it looks at the weight alone
VERSION = 2  # clips of 2 and 3 bits are searched down to 0.02, not 0.4


def quantize(weight: Tensor, _seen: object, spec: WeightSpec) -> Quantized:
    """`weight` (out, in) rounded to nearest: codes int8, scale (out, 1), zero 0."""
    weight = weight.float()
    scale = scale_of(weight, spec)
    codes = torch.div(weight, scale).round_().clamp_(*code_range(spec.quantizer))
    return packed(codes, scale, spec)


def scale_of(weight: Tensor, spec: WeightSpec) -> Tensor:
    """Each output channel's scale (out, 1) for `weight` (out, in) float32."""
    return clip_search(weight, spec.quantizer) if spec.clip_search else scale_zero(weight, spec.quantizer)[0]


def packed(codes: Tensor, scale: Tensor, spec: WeightSpec) -> Quantized:
    """Codes as small integers with their scale and a zero point of 0."""
    small = torch.int8 if spec.quantizer.bits <= 8 else torch.int32
    return Quantized(codes.to(small), scale, torch.zeros_like(scale))
