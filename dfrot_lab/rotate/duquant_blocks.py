"""DuQuant as it is (arXiv 2406.01721, Sec. 3): before every linear, while the model runs, x / s, one rotation
for each block of channels, a permutation, one more rotation. s = max|x|^alpha / max|w|^(1 - alpha)
(SmoothQuant's); a rotation, one for all blocks as in its release, is the product of greedy steps as in
`rotate.duquant`, each of which spreads the channel of the largest entry over its block, here evenly: the
first row of B is constant, as in its release, and the random orthogonal Q of the paper turns the others. The
permutation deals channels, the largest first, to the blocks up and down in turn, so that all have about the
same share of large ones. R2 and R4 have no part in it, and keys and values stay as they are."""

import logging
from typing import ClassVar

import torch
from torch import Tensor, nn

from dfrot_lab.model import turns
from dfrot_lab.recipe.base import MethodSpec, ruled
from dfrot_lab.recipe.specs import CaptureSpec, Recipe
from dfrot_lab.rotate import inputs
from dfrot_lab.rotate.duquant import base, greedy, product
from dfrot_lab.rotate.smoothquant import smoothing
from dfrot_lab.rotate.transforms import Context, Transforms

log = logging.getLogger(__name__)
KIND = "duquant-online"
VERSION = 1
NEEDS = "activations at every linear, weights"
ROWS = 1024  # blocks of rows that steps see, those of largest norm: no other can reach as far in one channel


class DuQuantBlocksSpec(MethodSpec):
    """The text whose rows are spread; the most channels of a `block`; the power `alpha` of the smoothing; the
    steps tried for each rotation (`updates`); the `seed` of their Q."""

    method: ClassVar[str] = "duquant_online"
    acts_online: ClassVar[bool] = True
    capture: CaptureSpec = CaptureSpec()
    seed: int = ruled(0, "a whole number in 0..2^63", ge=0, lt=1 << 63)
    block: int = ruled(128, "a whole number >= 1", ge=1)
    alpha: float = ruled(0.6, "in [0, 1]", ge=0, le=1)
    updates: int = ruled(256, "a whole number >= 1", ge=1)

    @property
    def name(self) -> str:
        """Name for tables and figures."""
        return "DuQuant"


SPEC = DuQuantBlocksSpec


def spec(_row: str, *, seed: int = 0, capture: CaptureSpec | None = None) -> DuQuantBlocksSpec:
    """The row DuQuant."""
    return DuQuantBlocksSpec(capture=capture or CaptureSpec(), seed=seed)


def fit(recipe: Recipe, context: Context) -> Transforms:
    """A turn before every linear, from the store or made now, and nothing else."""
    spec = recipe.rotation
    assert isinstance(spec, DuQuantBlocksSpec)

    def find(_site: str, rows: Tensor, readers: list[nn.Linear]) -> list[Tensor]:
        s = smoothing(rows.abs().amax(0).double().cpu(), readers, spec.alpha)
        return [1 / s, *spread(rows / s.to(rows), spec)]

    found = inputs.found(KIND, spec, context, find, r3=False)
    rotations = [step for turn in found.turns.values() for step in turn if step.ndim == 2]
    if still := sum(torch.equal(step, torch.eye(len(step)).to(step)) for step in rotations):
        said = "%d of %d rotations turn nothing: no step makes the range of their entries smaller"
        log.warning(said, still, len(rotations))
    return found


def spread(rows: Tensor, spec: DuQuantBlocksSpec) -> list[Tensor]:
    """The first rotation (block, block) float64, the order (channels,) and the second rotation, for what a
    site has (tokens, channels)."""
    block = size_of(rows.shape[1], spec.block)
    B = base(block, spec.seed)

    def rotation(x: Tensor) -> Tensor:
        return product(B, greedy(farthest(x, block), B, spec.updates))

    first = rotation(rows)
    rows = turns.apply([first], rows)
    order = zigzag(rows.abs().amax(0), block).cpu()
    return [first, order, rotation(turns.apply([order], rows))]


def products(spec: DuQuantBlocksSpec, channels: int) -> int:
    """What a turn of some channels multiplies for one token."""
    return channels * (1 + 2 * size_of(channels, spec.block))


def size_of(channels: int, most: int) -> int:
    """The largest divisor of a number of channels that is at most `most`."""
    return next(size for size in range(min(channels, most), 0, -1) if channels % size == 0)


def farthest(rows: Tensor, block: int) -> Tensor:
    """Of the blocks of all rows (tokens, channels) the ROWS of largest norm (ROWS, block), or all."""
    parts = rows.reshape(-1, block)
    return parts[parts.norm(dim=1).topk(min(ROWS, len(parts))).indices]


def zigzag(largest: Tensor, block: int) -> Tensor:
    """The order (channels,) in which channels come to lie, block by block, by their `largest` magnitude
    (channels,): the largest first they are dealt to blocks 0, 1, ..., K - 1, K - 1, ..., 1, 0, 0, 1, ..."""
    dealt = largest.argsort(descending=True, stable=True).view(block, -1)  # a deal a line
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.T.flatten()
