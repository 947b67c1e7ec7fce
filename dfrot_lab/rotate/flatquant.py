"""FlatQuant (arXiv 2410.09426): before every linear, while the model runs, x / s times the Kronecker product
of two small invertible matrices, learned site by site for what the site's linears compute once weights and
inputs are rounded. Each factor is U diag(e^d) V^T, U and V a start times the Cayley transform of a skew
matrix, so its inverse needs no solving; s starts as SmoothQuant's. A rounding passes the gradient as if it
were not there, but for the scale, which moves with the range: without that, larger inputs would seem to be
rounded no worse. Here linears are matched site by site on full precision's inputs, there blocks as a whole,
with learned clips and a transform of keys and of values, too."""

import math
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from dfrot_lab.maths import hadamard, rotations
from dfrot_lab.maths.quantizers import fake_quantize
from dfrot_lab.model import turns
from dfrot_lab.recipe.base import MethodSpec, ruled
from dfrot_lab.recipe.grids import ACTIVATIONS, QuantSpec
from dfrot_lab.recipe.specs import CaptureSpec, Recipe, RotationSpec
from dfrot_lab.rotate import inputs
from dfrot_lab.rotate.smoothquant import smoothing
from dfrot_lab.rotate.transforms import Context, Transforms

KIND = "flatquant"
VERSION = 1
NEEDS = "activations at every linear, weights, their gradients"
RATE, LAST_RATE = 0.02, 1e-3  # Adam's, falling along a cosine to this part of it; its release: 0.005
LOOK_EVERY = 20  # steps between two looks at all rows
TINY = 1e-12


class FlatQuantSpec(MethodSpec):
    """The text whose rows are seen, so many of them (`rows`) at each of a site's `updates`; the grids of
    weights and inputs; the power `alpha` of the first scales; the `seed` of the start and of the rows."""

    method: ClassVar[str] = "flatquant"
    acts_online: ClassVar[bool] = True
    capture: CaptureSpec = CaptureSpec()
    seed: int = ruled(0, "a whole number in 0..2^63", ge=0, lt=1 << 63)
    alpha: float = ruled(0.3, "in [0, 1]", ge=0, le=1)
    weights: QuantSpec = QuantSpec(granularity="per_channel")
    activations: QuantSpec = ACTIVATIONS
    rows: int = ruled(256, "a whole number >= 1", ge=1)
    updates: int = ruled(60, "a whole number >= 1", ge=1)

    def _check(self) -> None:
        self._require("weights", self.weights.granularity == "per_channel", "per_channel")
        self._require("activations", self.activations.granularity == "per_token", "per_token")

    @property
    def name(self) -> str:
        """Name for tables and figures."""
        return "FlatQuant"


SPEC = FlatQuantSpec


def spec(_row: str, *, seed: int = 0, capture: CaptureSpec | None = None) -> FlatQuantSpec:
    """The row FlatQuant."""
    return FlatQuantSpec(capture=capture or CaptureSpec(), seed=seed)


def fit(recipe: Recipe, context: Context) -> Transforms:
    """A turn before every linear, from the store or learned now; R3 where keys are rounded, nothing else."""
    spec = recipe.rotation
    assert isinstance(spec, FlatQuantSpec)

    def find(_site: str, rows: Tensor, readers: list[nn.Linear]) -> list[Tensor]:
        weight = torch.cat([one.weight.detach() for one in readers]).to(rows)
        s = smoothing(rows.abs().amax(0).double().cpu(), readers, spec.alpha)
        return learned(rows, weight, s, spec)

    return inputs.found(KIND, spec, context, find, r3=True)


class Affine(nn.Module):
    """One site's matrix, learned: `logs` (channels,), whose powers of e multiply the channels, and of both
    factors U and V by their skew matrices and d."""

    def __init__(self, s: Tensor, seed: int) -> None:
        super().__init__()
        self.logs = nn.Parameter(-s.log())
        self.sizes = sizes(len(s))
        kinds = ("RH" if hadamard.factors(n) else "RO" for n in self.sizes)
        made = (RotationSpec(kind=kind, seed=seed) for kind in kinds)
        self.starts = [rotations.make(one, n) for one, n in zip(made, self.sizes, strict=True)]
        square, line = [(n, n) for n in self.sizes], [(n,) for n in self.sizes]
        self.skew_u, self.skew_v, self.d = (_zeros(shapes) for shapes in (square, square, line))

    def steps(self, sign: int = 1) -> list[Tensor]:
        """The steps of A (`model.turns`), or with `sign` -1 of A^-T; float64, with their gradients."""
        found = list[Tensor]()
        for n, start in enumerate(self.starts):
            U, V = start @ cayley(self.skew_u[n]), cayley(self.skew_v[n])
            found.append((U * (sign * self.d[n]).exp()) @ V.T)
        return [(sign * self.logs).exp(), *turns.kronecker(*found)]


def _zeros(shapes: Iterable[tuple[int, ...]]) -> nn.ParameterList:
    return nn.ParameterList(torch.zeros(shape, dtype=torch.float64) for shape in shapes)


def sizes(channels: int) -> tuple[int, int]:
    """The two factors of a number of channels that are nearest to each other, the smaller first."""
    first = next(n for n in range(math.isqrt(channels), 0, -1) if channels % n == 0)
    return first, channels // first


def products(_spec: FlatQuantSpec, channels: int) -> int:
    """What a turn of some channels multiplies for one token."""
    return channels * (1 + sum(sizes(channels)))


def cayley(x: Tensor) -> Tensor:
    """The orthogonal (I + S)^-1 (I - S), S = x - x^T."""
    S, eye = x - x.T, torch.eye(len(x)).to(x)
    return torch.linalg.solve(eye + S, eye - S)


def rounded(x: Tensor, grid: QuantSpec) -> Tensor:
    """`x` (..., n) rounded, a scale a row. Its gradient is that of x + scale (codes - x / scale) with the
    difference in brackets held still."""
    if grid.bits == 16:
        return x
    error = fake_quantize(x.detach(), grid) - x.detach()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if grid.symmetric:
        span = torch.maximum(-low, high)
    else:
        span = high - low if grid.scheme == "free" else high.clamp(min=0) - low.clamp(max=0)
    return x + error * (span / span.detach().clamp(min=TINY))


def loss(rows: Tensor, weight: Tensor, affine: Affine, spec: FlatQuantSpec) -> Tensor:
    """The squared error of what linears (`weight`, (out, channels)) make of `rows` (tokens, channels), both
    rounded after the affine, as a part of what they make of them."""
    x, w = (turns.apply(affine.steps(sign), each) for sign, each in ((1, rows), (-1, weight)))
    wanted = rows @ weight.T
    found = rounded(x, spec.activations) @ rounded(w, spec.weights).T
    return (found - wanted).square().sum() / wanted.square().sum().clamp(min=TINY)


def learned(rows: Tensor, weight: Tensor, s: Tensor, spec: FlatQuantSpec) -> list[Tensor]:
    """The steps of A for a site of `rows` (tokens, channels) that `weight` (out, channels) reads, from scales
    `s` (channels,): of a look now and then the best by all rows, the start among them."""
    affine, source = Affine(s, spec.seed), torch.Generator().manual_seed(spec.seed)
    optimizer = torch.optim.Adam(affine.parameters(), lr=RATE)
    falls = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, spec.updates, RATE * LAST_RATE)
    least, best = math.inf, affine.steps()
    for step in range(spec.updates + 1):
        if step % LOOK_EVERY == 0 or step == spec.updates:
            with torch.no_grad():
                lost = float(loss(rows, weight, affine, spec))
                least, best = min((least, best), (lost, affine.steps()), key=lambda look: look[0])
        if step < spec.updates:
            chosen = torch.randperm(len(rows), generator=source)[: spec.rows].to(rows.device)
            with torch.enable_grad():
                optimizer.zero_grad()
                loss(rows[chosen], weight, affine, spec).backward()
            optimizer.step()
            falls.step()
    return [step.detach() for step in best]
