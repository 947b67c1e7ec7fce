"""Offset: point what all rows share where an asymmetric grid takes it for nothing (here; nearest in print:
OffQ, arXiv 2606.07116, by group, and InfoQuant, 2605.26175, online). After RMSNorm the rows of a model share
a mean, and their massive values lie along one direction. The plane map (`maths.offsets`) sends a mixture u of
the two to the all-ones direction, where the zero point takes it, and what is left of the massive one to a
second row of +-1; all else is the random Hadamard's. The mixture is the only choice: the one of least 4-bit
error of captured rows."""

import logging
import math
import time
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Artefact, Store, Writer
from dfrot_lab.maths import offsets, rotations
from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.model import door
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import Capture, capture as captured
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.base import MethodSpec, one_of, ruled
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import DEFAULT_RULE, MASSIVE_RULES, CaptureSpec, Recipe
from dfrot_lab.rotate import random
from dfrot_lab.rotate.transforms import Context, Transforms

log = logging.getLogger(__name__)
KIND = "offset"
VERSION = 1
NEEDS = "activations"
MIXTURES = tuple(step / 20 for step in range(20))  # the error is flat about its least: 0.05 apart is enough
ROWS = 8192  # ordinary rows that a mixture is judged by: their mean error is known to 1%
TRIED = ("mixture", "objective", "ordinary", "massive")
NO_MEAN = 1e-6  # of a row's length: a shorter mean is rounding, not a direction


class OffsetSpec(MethodSpec):
    """Where to look for the shared direction: the rows of `capture`, massive ones by `rule`; the quantizer
    that mixtures are judged by; `seed` of the Hadamard that does the rest and of the rows judged by."""

    method: ClassVar[str] = "offset"
    capture: CaptureSpec = CaptureSpec()
    seed: int = ruled(0, "a whole number in 0..2^63", ge=0, lt=1 << 63)
    rule: str = one_of(DEFAULT_RULE, MASSIVE_RULES)
    quantizer: QuantSpec = QuantSpec(scheme="asymmetric")

    def _check(self) -> None:
        fits = self.quantizer.bits < 16 and self.quantizer.granularity == "per_token"
        self._require("quantizer", fits, "per_token, of fewer than 16 bits")

    @property
    def name(self) -> str:
        """Name for tables and figures."""
        return "Offset"


SPEC = OffsetSpec


@dataclass(frozen=True)
class Pointed:
    """R1 (channels, channels) float64 and the mixtures tried, a row each: mixture (NaN: the random Hadamard),
    ordinary and massive (mean squared errors), objective (their sum); `seconds`, NaN if not measured."""

    R: Tensor
    tried: pd.DataFrame
    seconds: float = math.nan


def spec(_row: str, *, seed: int = 0, capture: CaptureSpec | None = None) -> OffsetSpec:
    """The row Offset: directions from `capture`, the rest by RH of `seed`."""
    return OffsetSpec(capture=capture or CaptureSpec(), seed=seed)


def fit(recipe: Recipe, context: Context) -> Transforms:
    """R1 by the plane map, R2 to R4 Hadamard."""
    assert isinstance(recipe.rotation, OffsetSpec)
    found = pointed(recipe.rotation, context.store)
    return Transforms(R1=found.R, seconds=found.seconds)


def pointed(spec: OffsetSpec, store: Store | None = None) -> Pointed:
    """The rotation `spec` describes, from the store or made now from the rows of its capture."""
    spec, store = door.resolved(spec), store or Store()

    def make(writer: Writer) -> None:
        recorded = captured(spec.capture, store)
        massive.warn(recorded, spec.rule)
        started = time.perf_counter()
        mask = massive.find(recorded, spec.rule).flatten()
        places = sample(mask, ROWS, spec.seed)
        found = point(recorded.all_rows(places), mask[places], mean_row(recorded), spec)
        writer.save_tensors("R1", {"R1": found.R})
        writer.save_json("tried", found.tried.to_dict("records"))
        writer.note.update(seconds=time.perf_counter() - started)

    return _result(store.get_or_make(KIND, lambda: keys.identity(spec, door.prints), make))


def _result(artefact: Artefact) -> Pointed:
    seconds = float(artefact.manifest["note"].get("seconds", math.nan))
    return Pointed(
        artefact.tensors("R1")["R1"], pd.DataFrame(artefact.json("tried"), columns=list(TRIED)), seconds
    )


def mean_row(recorded: Capture) -> Tensor:
    """The mean of all rows of a capture (channels,) float64, site by site."""
    return torch.stack([recorded.rows(site).double().mean(0) for site in recorded.sites]).mean(0)


def sample(mask: Tensor, rows: int, seed: int) -> Tensor:
    """Places, rising, of all massive rows and of at most so many others, drawn with `seed`."""
    others = (~mask).nonzero().flatten()
    drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:rows]
    return torch.cat([mask.nonzero().flatten(), others[drawn]]).sort().values


def spike(rows: Tensor) -> Tensor:
    """The direction (channels,) float64 of most energy of massive rows (tokens, channels), whatever their
    signs: of one massive channel nearly that channel; zeros where there is no row."""
    if not len(rows):
        return torch.zeros(rows.shape[1], dtype=torch.float64)
    return torch.linalg.svd(rows.double(), full_matrices=False).Vh[0]


def point(rows: Tensor, mask: Tensor, mean: Tensor, spec: OffsetSpec) -> Pointed:
    """The plane map of least error of `rows` (tokens, channels), massive where `mask` (tokens,) is, that
    share the `mean` (channels,); or the random Hadamard, where no map loses less. Ordinary and massive rows
    count the same, each kind by its mean error: nothing to weigh by hand."""
    start = random.start(spec.seed, rows.shape[1])
    length = float(rows.double().square().sum(1).mean().sqrt())
    mean = mean.double() if float(mean.norm()) > NO_MEAN * length else torch.zeros_like(mean)
    heavy = spike(rows[mask])
    rotated, flat = rows @ start.to(rows), offsets.flat_rows(len(start))
    tried = [{"mixture": math.nan, **losses(rotated, mask, spec.quantizer)}]
    found = int(mean.any()) + int(heavy.any())  # directions there are: both can be mixed
    for mixture in MIXTURES[: (0, 1, len(MIXTURES))[found]]:
        before = offsets.plane(mean, heavy, mixture)
        moved = offsets.carried(rotated, before @ start, flat[: len(before)])
        tried.append({"mixture": mixture, **losses(moved, mask, spec.quantizer)})
    best = min(tried, key=lambda line: line["objective"])["mixture"]
    if math.isnan(best):
        grid = spec.quantizer.name
        why = (
            f"no offset lowers the error on the grid {grid}" if len(tried) > 1 else "rows share no direction"
        )
        log.warning("%s: Offset is RH here", why)
        return Pointed(start, pd.DataFrame(tried))
    before = offsets.plane(mean, heavy, best)
    R = offsets.carried(start, before @ start, flat[: len(before)])
    return Pointed(rotations.check(R), pd.DataFrame(tried))


def losses(rotated: Tensor, mask: Tensor, quantizer: QuantSpec) -> dict[str, float]:
    """Mean squared errors of rotated rows (tokens, channels): objective (the sum), ordinary, massive; 0 where
    there is no such row."""
    error = squared_error(rotated, quantizer).double()
    means = [float(error[part].mean()) if part.any() else 0.0 for part in (~mask, mask)]
    return {"objective": sum(means), "ordinary": means[0], "massive": means[1]}
