"""QEP (Arai and Ichikawa, arXiv 2504.09629): before it is rounded, a weight is corrected for the drift of
what it reads, so that its outputs are nearer the full-precision model's; then GPTQ."""

import torch
from torch import Tensor

from dfrot_lab.maths.quantizers import Quantized
from dfrot_lab.recipe.specs import WeightSpec
from dfrot_lab.weights import gptq
from dfrot_lab.weights.gptq import Seen

CALIBRATED = True
DRIFT = True  # it needs what the full-precision model has in place of a layer's inputs
VERSION = 1
CORRECTION = 0.5  # the part made good: of all of it the calibration text's own noise would be a part
DAMPING = 1.0  # of the correction's Hessian: the released code's


def quantize(weight: Tensor, seen: Seen | None, spec: WeightSpec) -> Quantized:
    """GPTQ of W + c W D (H + damping)^-1 for `weight` W (out, in), with what was `seen` of its inputs, the
    Hessian H and the drift D: at c = 1 and no damping the least-squares fit of W x0 by W' x. ValueError."""
    hessian, drift = gptq.with_drift(seen, "qep")
    part = CORRECTION if spec.correction is None else spec.correction
    held = gptq.damped(hessian, DAMPING)
    pull = torch.linalg.solve(held, drift.double(), left=False).to(weight.device, torch.float32)
    return gptq.quantize(torch.addmm(weight.float(), weight.float(), pull, alpha=part), seen, spec)
