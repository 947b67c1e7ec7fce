"""DuQuant's greedy rotation (arXiv 2406.01721), here once over all channels: one R1, which is fused. There it
is one before every linear, in blocks of 128 with a permutation between two, and takes time. A step takes the
channel that has the entry of largest magnitude and multiplies by E B E: E exchanges that channel with the
first one, B = diag(1, Q) H with H orthogonal, its first row constant, and Q random orthogonal as in the
paper, one for all steps (its release has no Q, and exchanges the channel of the row's number). No gradient:
of all prefixes of the steps the one is kept after which the entries span the smallest range, max - min over
all rows and channels as in its release. Steps see all massive rows and a sample of the others."""

import logging
from typing import ClassVar

import scipy.linalg
import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import rotations
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.base import MethodSpec, one_of, ruled
from dfrot_lab.recipe.specs import DEFAULT_RULE, MASSIVE_RULES, CaptureSpec, Recipe, RotationSpec
from dfrot_lab.rotate import offset
from dfrot_lab.rotate.transforms import Context, Transforms, of_rows

log = logging.getLogger(__name__)
KIND = "duquant"
VERSION = 2  # the first row of B is constant: a step spreads its channel evenly
NEEDS = "activations"


class DuQuantSpec(MethodSpec):
    """The rows whose largest entries are spread, those all seen that `rule` calls massive; `updates`, the
    steps tried; the `seed` of Q and of the sample of the other rows."""

    method: ClassVar[str] = "duquant"
    capture: CaptureSpec = CaptureSpec()
    seed: int = ruled(0, "a whole number in 0..2^63", ge=0, lt=1 << 63)
    rule: str = one_of(DEFAULT_RULE, MASSIVE_RULES)
    updates: int = ruled(256, "a whole number >= 1", ge=1)

    @property
    def name(self) -> str:
        """Name for tables and figures."""
        return "DuQuant R1"


SPEC = DuQuantSpec


def spec(_row: str, *, seed: int = 0, capture: CaptureSpec | None = None) -> DuQuantSpec:
    """The row DuQuant R1."""
    return DuQuantSpec(capture=capture or CaptureSpec(), seed=seed)


def fit(recipe: Recipe, context: Context) -> Transforms:
    """R1 of the greedy steps, R2 to R4 Hadamard."""
    assert isinstance(recipe.rotation, DuQuantSpec)
    R, seconds = spread(recipe.rotation, context.store)
    return Transforms(R1=R, seconds=seconds)


def spread(spec: DuQuantSpec, store: Store | None = None) -> tuple[Tensor, float]:
    """R1 (channels, channels) float64 of `spec`, from the store or made now from the rows of its capture; the
    seconds that took."""

    def make(recorded: Capture) -> Tensor:
        massive.warn(recorded, spec.rule)
        places = offset.sample(massive.find(recorded, spec.rule).flatten(), offset.ROWS, spec.seed)
        rows = recorded.all_rows(places).to(recorded.spec.model.device)
        B = base(recorded.channels, spec.seed)
        steps = greedy(rows, B, spec.updates)
        if not steps:
            log.warning("no step makes the range of entries smaller: DuQuant R1 turns nothing")
        return product(B, steps)

    return of_rows(KIND, spec, store or Store(), make)


def base(channels: int, seed: int) -> Tensor:
    """B (channels, channels) float64: Helmert's matrix, whose first row is constant, its other rows turned by
    a random orthogonal matrix of `seed`."""
    H = torch.from_numpy(scipy.linalg.helmert(channels, full=True))
    if channels == 1:
        return H
    return torch.cat([H[:1], rotations.make(RotationSpec(kind="RO", seed=seed), channels - 1) @ H[1:]])


def greedy(rows: Tensor, B: Tensor, updates: int) -> list[int]:
    """The channels exchanged with the first in the steps after which `rows` (tokens, channels) span the
    smallest range; none where no step makes it smaller."""
    own, channels = B.to(rows), list[int]()
    channel, least = extremes(rows)
    best = 0
    for step in range(1, updates + 1):
        channels.append(channel)
        rows = turned(rows, own, channel)
        channel, span = extremes(rows)
        if span < least:
            least, best = span, step
    return channels[:best]


def extremes(rows: Tensor) -> tuple[int, float]:
    """Of rows (tokens, channels) the channel of the entry of largest magnitude, and max - min of all."""
    low, high = rows.amin(0), rows.amax(0)
    return int(torch.maximum(-low, high).argmax()), float(high.max() - low.min())


def turned(rows: Tensor, B: Tensor, channel: int) -> Tensor:
    """rows (tokens, channels) times E B E, E the exchange of `channel` with the first."""
    order = torch.arange(rows.shape[1], device=rows.device)
    order[0], order[channel] = channel, 0
    return rows @ B[order][:, order]


def product(B: Tensor, channels: list[int]) -> Tensor:
    """The product of the steps E B E (channels, channels) that exchange these channels, in B's dtype."""
    R = torch.eye(len(B)).to(B)
    for channel in channels:
        R = turned(R, B, channel)
    return R
