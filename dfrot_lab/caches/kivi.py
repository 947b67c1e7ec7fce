"""KIVI (arXiv 2402.02750, Sec. 3): keys share a grid by channel, over groups of tokens, since some channels
of keys are large in all tokens; values by token, over groups of channels; the last tokens stay float.

Of a group  m = min x,  s = (max x - m) / (2^b - 1),  x^ = s round((x - m) / s) + m:  its zero point is m
itself, a float, where a grid's is a code. Groups are counted from the window's first token, so what is held
of a token hangs on its own group alone, and on none after it. Keys that fill no group stay float with the
`residual`: of 2048 tokens 128 and of 2047 159, where the paper's keys have as many as 128 does not divide."""

import torch
from torch import Tensor

from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.grids import QuantSpec

VERSION = 1


def keys(x: Tensor, spec: QuantSpec) -> Tensor:
    """Keys x (batch, heads, tokens, head size), each channel rounded over groups of `group_size` tokens."""
    size = int(spec.group_size or 1)
    count = max(0, x.shape[-2] - int(spec.residual or 0)) // size * size
    groups = x[..., :count, :].unflatten(-2, (count // size, size))
    return torch.cat([_rounded(groups, -2, spec.bits).flatten(-3, -2), x[..., count:, :]], -2)


def values(x: Tensor, spec: QuantSpec) -> Tensor:
    """Values x (batch, heads, tokens, head size), each token rounded over groups of `group_size` channels.
    ValueError: groups that do not divide a head."""
    size, head = int(spec.group_size or 1), x.shape[-1]
    require("QuantSpec.group_size", size, head % size == 0, f"a divisor of the head size {head}, with kivi")
    count = max(0, x.shape[-2] - int(spec.residual or 0))
    groups = x[..., :count, :].unflatten(-1, (head // size, size))
    return torch.cat([_rounded(groups, -1, spec.bits).flatten(-2), x[..., count:, :]], -2)


def _rounded(x: Tensor, along: int, bits: int) -> Tensor:
    """x rounded to 2^bits levels from its least to its greatest value `along` a dimension."""
    if not x.numel():
        return x
    low, high = x.amin(along, keepdim=True), x.amax(along, keepdim=True)
    step = (high - low) / ((1 << bits) - 1)
    step = torch.where(step == 0, 1, step)  # of equal values each is the least
    return ((x - low) / step).round_().mul_(step).add_(low)
