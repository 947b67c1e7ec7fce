"""A weight quantizer in one file: rounds down, and looks at the Hessian only to see that it is given one."""

import torch
from torch import Tensor

from dfrot_lab.maths.quantizers import Quantized, code_range, scale_zero
from dfrot_lab.recipe.specs import WeightSpec
from dfrot_lab.weights.gptq import Seen

CALIBRATED = True


def quantize(weight: Tensor, seen: Seen | None, spec: WeightSpec) -> Quantized:
    """`weight` (out, in) rounded down, one scale an output channel."""
    assert seen is not None and seen.hessian.shape == (weight.shape[1], weight.shape[1])
    scale, zero = scale_zero(weight.float(), spec.quantizer)
    codes = torch.floor(weight.float() / scale).clamp(*code_range(spec.quantizer))
    return Quantized(codes.to(torch.int8), scale, zero)
