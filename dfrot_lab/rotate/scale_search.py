"""Scales of channels found by trying, no rotation anywhere: AWQ (arXiv 2306.00978), s = mean|x|^a, for the
weights' sake, and Outlier Suppression+ (2304.09145), s = max(1, max|x| / t), for both. Each site gets the one
of a few with which what its linears compute, on a part of its tokens, has the least squared error: the
weights times s rounded, and in OS+ the inputs over s too. The norms' gains hold 1 / s, as SmoothQuant's. OS+
also shifts each channel to the middle of its range, which takes a bias in the norm and in what reads it: most
families have none, its release leaves the shift out for LLaMA, and so does this."""

import time
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from dfrot_lab.disk.artefacts import Writer
from dfrot_lab.maths.quantizers import fake_quantize
from dfrot_lab.model import door
from dfrot_lab.model.parts import rounded
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.base import MethodSpec, one_of
from dfrot_lab.recipe.grids import ACTIVATIONS, QuantSpec
from dfrot_lab.recipe.specs import CaptureSpec, Recipe
from dfrot_lab.rotate import smoothquant
from dfrot_lab.rotate.transforms import Context, Transforms

KIND = "scale-search"
VERSION = 1
NEEDS = "activations, weights"
NAMES = {"powers": "AWQ", "thresholds": "OS+"}
POWERS = tuple(step / 20 for step in range(20))  # AWQ's release: 0 to 0.95
THRESHOLDS = 40  # from the largest entry down to LEAST in equal ratios; OS+'s release has 100, equally apart
LEAST = 0.1  # its smallest threshold
NO_CHANNEL = 1e-4  # AWQ's release: no s is smaller before they are centred
EVERY = 4  # of a site's tokens every so many are looked at


class ScaleSearchSpec(MethodSpec):
    """The scales tried, on the rows of `capture`, and the grids on which their errors are taken: of the
    `weights`, and of the inputs (`activations` of 16 bits: not rounded)."""

    method: ClassVar[str] = "scale_search"
    scales: str = one_of("powers", tuple(NAMES))
    capture: CaptureSpec = CaptureSpec()
    weights: QuantSpec = QuantSpec(granularity="per_channel")
    activations: QuantSpec = ACTIVATIONS.with_(bits=16)

    def _check(self) -> None:
        fits = self.weights.bits < 16 and self.weights.granularity == "per_channel"
        self._require("weights", fits, "per_channel, of fewer than 16 bits")
        self._require("activations", self.activations.granularity == "per_token", "per_token")

    @property
    def name(self) -> str:
        """Name for tables and figures."""
        return NAMES[self.scales]


SPEC = ScaleSearchSpec


def spec(row: str, *, capture: CaptureSpec | None = None, **_seed: object) -> ScaleSearchSpec:
    """The row of AWQ, which rounds weights alone, or of OS+, which rounds their inputs too."""
    own = {"scales": "powers"} if row == "AWQ" else {"scales": "thresholds", "activations": ACTIVATIONS}
    return ScaleSearchSpec(capture=capture or CaptureSpec(), **own)


def fit(recipe: Recipe, context: Context) -> Transforms:
    """Gains 1 / s at every norm that has one, from the store or found now, and no rotation."""
    spec = door.resolved(recipe.rotation)
    assert isinstance(spec, ScaleSearchSpec)

    def scale(number: int, rows: Tensor, readers: list[nn.Linear]) -> Tensor:
        weight = torch.cat([one.weight for one in rounded(context.model, number, readers)])
        return searched(rows[::EVERY].to(weight), weight, spec)

    def make(writer: Writer) -> None:
        context.rows(spec.capture)
        started = time.perf_counter()
        writer.save_tensors("gains", smoothquant.gains(context, spec.capture, scale))
        writer.note.update(seconds=time.perf_counter() - started)

    made = context.store.get_or_make(KIND, lambda: keys.identity(spec, door.prints), make)
    return smoothquant.unrotated(made.tensors("gains"), float(made.manifest["note"]["seconds"]))


def searched(rows: Tensor, weight: Tensor, spec: ScaleSearchSpec) -> Tensor:
    """Of the scales to try those (channels,) float64 with the least squared error of rows (tokens, channels)
    times `weight` (out, channels)^T."""
    wanted, least, best = rows @ weight.T, float("inf"), torch.ones(rows.shape[1], dtype=torch.float64)
    for s in tried(rows, spec.scales):
        own = s.to(rows)
        found = fake_quantize(rows / own, spec.activations) @ fake_quantize(weight * own, spec.weights).T
        lost = float((found - wanted).square_().sum(dtype=torch.float64))
        if lost < least:
            least, best = lost, s
    return best.cpu()


def tried(rows: Tensor, scales: str) -> Iterable[Tensor]:
    """The scales (channels,) float64 to try for rows (tokens, channels), first none. AWQ's powers of the mean
    magnitude are centred: their largest times their smallest is 1 (its release)."""
    if scales == "powers":
        mean = rows.abs().mean(0).double()
        for power in POWERS:
            s = (mean**power).clamp(min=NO_CHANNEL)
            yield s / (s.max() * s.min()).sqrt()
        return
    largest = rows.abs().amax(0).double()
    for step in range(THRESHOLDS):
        threshold = largest.max() * (LEAST / largest.max()) ** (step / (THRESHOLDS - 1))
        yield (largest / threshold).clamp(min=1)
