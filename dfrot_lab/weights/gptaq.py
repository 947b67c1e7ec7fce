"""GPTAQ (Li et al., arXiv 2504.02692): GPTQ whose outputs aim at the full-precision model's. What a layer
reads has drifted from full precision's by the roundings before it; as a column is rounded, a part of what the
drift does to it is made good by the columns after it."""

from torch import Tensor

from dfrot_lab.maths.quantizers import Quantized
from dfrot_lab.recipe.specs import WeightSpec
from dfrot_lab.weights.gptq import Seen, in_order, inverse_factor, with_drift

CALIBRATED = True
DRIFT = True  # it needs what the full-precision model has in place of a layer's inputs
VERSION = 1
CORRECTION = 0.25  # the part made good: the paper's alpha


def quantize(weight: Tensor, seen: Seen | None, spec: WeightSpec) -> Quantized:
    """`weight` (out, in) by GPTQ, each column w_j also adding w_j P_j to those after it, P = alpha
    triu(D U^T, 1) U, D the `seen` drift, U the inverse Hessian's factor (section 4). ValueError."""
    hessian, drift = with_drift(seen, "gptaq")
    factor = inverse_factor(hessian, spec.damping)
    alpha = CORRECTION if spec.correction is None else spec.correction
    drag = (drift.float() @ factor.T).triu(1) @ factor
    return in_order(weight, hessian, spec, factor, drag.mul_(alpha))
