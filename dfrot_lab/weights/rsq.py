"""RSQ (Sung et al., arXiv 2503.01820): GPTQ whose Hessian weighs tokens by the attention that they are given,
the paper's attention concentration; H = sum r^2 x x^T. The rotation that is its R is the recipe's own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dfrot_lab.maths.quantizers import Quantized
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe.specs import WeightSpec
from dfrot_lab.weights import gptq, look
from dfrot_lab.weights.gptq import Seen, hessian_seen

CALIBRATED = True
VERSION = 1
LEAST = 0.005  # the weight of a window's least attended token, the most attended one's being 1: the paper's


def quantize(weight: Tensor, seen: Seen | None, spec: WeightSpec) -> Quantized:
    """GPTQ of `weight` (out, in) for the Hessian of inputs weighed by `Look`. ValueError."""
    return gptq.quantize(weight, Seen(hessian_seen(seen, "rsq")), spec)


def scaled(given: Tensor) -> Tensor:
    """The weights r of tokens that are `given` so much attention (windows, tokens), from LEAST to 1 in each
    window, in equal steps; where all are given the same they are all 1."""
    low, high = given.amin(-1, keepdim=True), given.amax(-1, keepdim=True)
    share = torch.where(high > low, (given - low) / (high - low), 1)
    return LEAST + (1 - LEAST) * share


class Look(look.Look):
    """The weights of each chunk's tokens; they hold for all linears of the layer."""

    def __init__(self, loaded: LoadedModel, number: int, skip: int) -> None:
        super().__init__(loaded, number, skip)
        self.weights = list[Tensor]()

    @staticmethod
    def why_not(loaded: LoadedModel, /) -> str | None:
        """Experts are sent tokens whose places in the text are not told."""
        return "the tokens that an expert reads are not told apart" if loaded.roles.experts else None

    def see(self, x: Tensor, qkv: Sequence[Tensor], mask: Tensor | None, how: Mapping[str, Any]) -> None:
        """Sums what each token is given by all heads and queries of its window."""
        given = x.new_zeros(x.shape[:2])
        for window, part in self.parts(qkv, mask, how):
            given[window, : part.shape[-1]] += part.sum((0, 1))
        self.weights.append(scaled(given).reshape(-1, 1))

    def weighed(self, chunk: int, rows: Tensor, /) -> Tensor:
        """r x of the rows x (tokens, in) of a chunk."""
        return rows * self.weights[chunk]
