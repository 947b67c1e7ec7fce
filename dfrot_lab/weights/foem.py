"""FOEM (Zheng et al., arXiv 2507.11017): GPTQ that minds the first-order term of the loss. As errors are
spread over the columns not yet rounded, these leave the weights whose gradient was 0; just before it is
rounded, each column is drawn a part of the way back."""

from torch import Tensor

from dfrot_lab.maths.quantizers import Quantized
from dfrot_lab.recipe.specs import WeightSpec
from dfrot_lab.weights.gptq import Seen, hessian_seen, in_order, inverse_factor

CALIBRATED = True
VERSION = 1
CORRECTION = 0.1  # the part of the way: the paper's beta


def quantize(weight: Tensor, seen: Seen | None, spec: WeightSpec) -> Quantized:
    """`weight` (out, in) by GPTQ, each column w_j rounded as w_j - beta (w_j - w0_j), w0_j being what it was
    at first. What has reached it by then is w_j - w0_j = -sum over i < j of e_i U_ij, so this is GPTQ with
    all that is right of the diagonal of its factor U times 1 - beta; rounding to nearest at 1. ValueError."""
    hessian = hessian_seen(seen, "foem")
    beta = CORRECTION if spec.correction is None else spec.correction
    factor = inverse_factor(hessian, spec.damping)
    return in_order(weight, hessian, spec, factor - beta * factor.triu(1))
