"""Offset+: from Offset downhill. The loss is a smooth stand-in for the error on an asymmetric grid, the
squared centred 8-norm of rows (`maths.offsets.spread`; InfoQuant, arXiv 2605.26175, also takes out the mean),
each weighted by the squared gradient of the full-precision model's loss there: how much an error there
matters, so there is no gamma. Ordinary rows weigh as much together as their squares, and among each other by
the gradient itself: a few have so many of the squares that the descent would fit these and lose on other
text. Steps are Adam's on the rotations, R <- R Cayley(-A) with A made of the skew part of y^T g (y the
rotated rows, g the loss's slope there), on a part of the rows each. The best R of looks at all rows is
kept."""

import logging
import math
from typing import ClassVar

import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Writer
from dfrot_lab.maths import offsets
from dfrot_lab.model import door
from dfrot_lab.observe import massive
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.base import MethodSpec, one_of, require, ruled
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import DEFAULT_RULE, MASSIVE_RULES, WINDOW, CaptureSpec, Recipe
from dfrot_lab.rotate import dfrot, downhill, offset
from dfrot_lab.rotate.downhill import Sample, State, Way
from dfrot_lab.rotate.steps import Refined
from dfrot_lab.rotate.transforms import Context, Transforms

log = logging.getLogger(__name__)
KIND = "offset-plus"
VERSION = offset.VERSION  # of its start: raise it with any change of either
NEEDS = "activations, gradients"
WINDOWS = 4  # of calibration text: on one it fits rows that another window does not have
LENGTH = 0.06  # of the first step: about the angle it turns by, falling to 0 in a line; from 0.5 on it climbs


class OffsetPlusSpec(MethodSpec):
    """As OffsetSpec, with `updates`, the steps of the descent, on at most `rows` of the ordinary rows."""

    method: ClassVar[str] = "offset_plus"
    capture: CaptureSpec = CaptureSpec(tokens=WINDOWS * WINDOW)
    seed: int = ruled(0, "a whole number in 0..2^63", ge=0, lt=1 << 63)
    rule: str = one_of(DEFAULT_RULE, MASSIVE_RULES)
    quantizer: QuantSpec = QuantSpec(scheme="asymmetric")
    updates: int = ruled(200, "a whole number >= 1", ge=1)
    rows: int = ruled(1 << 17, "a whole number >= 1", ge=1)

    def _check(self) -> None:
        fits = self.quantizer.bits < 16 and self.quantizer.granularity == "per_token"
        self._require("quantizer", fits, "per_token, of fewer than 16 bits")
        self._require("capture", self.capture.tokens > 1, "of 2 tokens or more: one alone has no loss")

    @property
    def name(self) -> str:
        """Name for tables and figures."""
        return "Offset+"

    @property
    def start(self) -> offset.OffsetSpec:
        """Where the descent starts: Offset of the same rows."""
        same = {name: getattr(self, name) for name in offset.OffsetSpec.model_fields}
        return offset.OffsetSpec(**same)


SPEC = OffsetPlusSpec


def spec(_row: str, *, seed: int = 0, capture: CaptureSpec | None = None) -> OffsetPlusSpec:
    """The row Offset+: of a capture of one whole window, four."""
    capture = capture or CaptureSpec()
    tokens = WINDOWS * WINDOW if capture.tokens == WINDOW else capture.tokens
    return OffsetPlusSpec(capture=capture.with_(tokens=tokens), seed=seed)


def fit(recipe: Recipe, context: Context) -> Transforms:
    """R1 by the descent, R2 to R4 Hadamard."""
    assert isinstance(recipe.rotation, OffsetPlusSpec)
    found = descended(recipe.rotation, context)
    return Transforms(R1=found.R, seconds=found.seconds)


def descended(
    spec: OffsetPlusSpec, context: Context, checkpoint: downhill.Checkpoint = lambda _state: None
) -> Refined:
    """The rotation `spec` describes, from the store or made now on the model of `context`; a stopped run goes
    on at its last look. `checkpoint` sees each state once saved; it may raise to stop."""
    spec = door.resolved(spec)

    def make(writer: Writer) -> None:
        sample = _sample(spec, context)
        begin = offset.pointed(spec.start, context.store).R

        def save(state: State) -> None:
            downhill.save(writer, state)
            checkpoint(state)

        result = descend(sample, begin, spec, downhill.resume(writer), save)
        dfrot.keep(writer, result, result.seconds)

    return dfrot.kept(context.store.get_or_make(KIND, lambda: keys.identity(spec, door.prints), make))


def _sample(spec: OffsetPlusSpec, context: Context) -> Sample:
    """The rows of a descent, all massive ones and some others that stand for all, and what each weighs."""
    recorded = context.rows(spec.capture)
    massive.warn(recorded, spec.rule)
    squares = context.row_sensitivities(spec.capture)
    weights = torch.cat([squares[site].double() for site in recorded.sites])
    mask = massive.find(recorded, spec.rule).flatten()
    places = offset.sample(mask, spec.rows, spec.seed)
    drawn, is_massive = weights[places], mask[places]
    drawn[~is_massive] = drawn[~is_massive].sqrt()
    drawn[~is_massive] *= weights[~mask].sum() / drawn[~is_massive].sum()
    total = drawn.sum()
    require("the loss's gradient at the rows", f"{total:g} in all", 0 < total < math.inf, "finite and not 0")
    log.info("%d rows, %d of them massive (%s)", len(drawn), int(is_massive.sum()), spec.rule)
    where = context.model.device
    parts = recorded.all_rows(places), drawn / total, is_massive
    return Sample(*(part.to(where) for part in parts))


def descend(
    sample: Sample, start: Tensor, spec: OffsetPlusSpec, state: State | None = None,
    checkpoint: downhill.Checkpoint = lambda _state: None,
) -> Refined:  # fmt: skip
    """Go downhill from `start` (channels, channels) for `spec.updates` steps; history has a line a look."""

    def step(state: State, rows: Tensor, weights: Tensor, number: int) -> None:
        length = LENGTH * (1 - number / spec.updates)
        downhill.adam(state, rows, weights, number, offsets.spread, length)

    way = Way(offsets.spread, step, spec.updates, spec.quantizer, spec.seed)
    return downhill.descend(sample, start, way, state, checkpoint)
