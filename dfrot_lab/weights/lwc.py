"""Clips of weights by what a linear computes, as OmniQuant's learned weight clipping (Shao et al., arXiv
2308.13137) has them; there they are learned by gradient over a whole block, here searched for linear by
linear. Nothing else is done: each weight is rounded to nearest."""

import torch
from torch import Tensor

from dfrot_lab.maths.quantizers import Quantized, clip_ratios, code_range, grouped, scale_zero
from dfrot_lab.recipe.specs import WeightSpec
from dfrot_lab.weights.gptq import Seen, hessian_seen
from dfrot_lab.weights.rtn import packed

CALIBRATED = True
VERSION = 1
CHUNK = 1 << 24  # weights at once


def quantize(weight: Tensor, seen: Seen | None, spec: WeightSpec) -> Quantized:
    """`weight` (out, in) rounded to nearest, each output channel's (or group's) scale that of the clip ratio,
    of those `maths.quantizers.clip_ratios` has for its bits, with the least error of what is computed of the
    inputs seen: d H d^T, d (1, in) a channel's errors, H the sum of x x^T; of a group H's own block."""
    hessian = hessian_seen(seen, "lwc")
    rows = grouped(weight.float(), spec.quantizer)
    size = rows.shape[-1]
    blocks = torch.stack([hessian[n : n + size, n : n + size] for n in range(0, weight.shape[1], size)])
    each = rows.reshape(len(weight), -1, size)
    parts = [_codes(part, blocks, spec) for part in each.split(max(1, CHUNK // weight.shape[1]))]
    codes, scale = (torch.cat(both) for both in zip(*parts, strict=True))
    return packed(codes, scale, spec)


def _codes(weight: Tensor, hessian: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and scales (out, groups) of `weight` (out, groups, size), `hessian` (groups, size,
    size)."""
    widest, (low, high) = scale_zero(weight, spec.quantizer)[0], code_range(spec.quantizer)
    scale, codes = widest.clone(), torch.empty_like(weight)
    least = torch.full_like(widest, torch.inf)
    for ratio in clip_ratios(spec.quantizer.bits) if spec.clip_search else [1.0]:
        own = widest * ratio
        rounded = torch.div(weight, own).round_().clamp_(low, high)
        wrong = (rounded * own).sub_(weight)
        error = torch.einsum("ogi,gij,ogj->og", wrong, hessian, wrong).unsqueeze(-1)
        better = error < least
        for best, now in ((scale, own), (codes, rounded), (least, error)):
            best.copy_(torch.where(better, now, best))
    return codes.flatten(1), scale.squeeze(-1)
