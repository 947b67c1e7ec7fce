"""Steps that refine R1: DFRot's alternation as printed and as released, and accelerated ones. Each quantizes
eta_x = Q(x R) for every row (Eq. 7) and solves min_R sum of w_x^2 ||x R - eta_x||^2 (Eq. 8): R = U V^T of the
SVD of sum w_x^2 x^T eta_x (Eq. 6). w_x, gamma for massive rows, else 1 (Eq. 2), scales the row (Eq. 3)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dfrot_lab.maths import quantizers, rotations
from dfrot_lab.observe import massive
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import RefineSpec
from dfrot_lab.rotate import descent, random
from dfrot_lab.rotate.descent import ROWS_AT_ONCE

RELEASED_SLACK, RELEASED_GAIN = 100.0, 0.1  # accepted: weighted Frobenius error 0.1 below the last + 100
CHECKPOINT_EVERY = 10
LENGTH, MOMENTUM = 0.5, 0.8  # an accelerated step: half a Procrustes step, and 0.8 of the move before it
CHECK_EVERY = 20  # accelerated steps between two looks at all rows
HISTORY = ("step", "objective", "ordinary", "massive", "best", "distance")
Losses = dict[str, float]
Watch = Callable[["State"], None]
OnStep = Callable[[int, Callable[[], Tensor]], None]  # told of each step: its number, what makes its R


@dataclass(frozen=True)
class Refined:
    """The refined rotation R (channels, channels) float64; its history, one row a step: step, objective (the
    weighted loss a row), ordinary, massive (their mean squared errors), best (objective so far), distance
    (||R - R0||_F / sqrt(C)). `seconds`: of a refinement that was stopped its last part, of another descent
    all of it; NaN: not measured."""

    R: Tensor
    history: pd.DataFrame
    seconds: float = math.nan


@dataclass
class State:
    """Where a refinement is: R of the next step, the best so far, history; accelerated: momentum, length."""

    R: Tensor
    best: Tensor
    history: list[Losses]
    momentum: Tensor | None = None
    length: float = LENGTH

    @property
    def lowest(self) -> float:
        """The lowest objective so far."""
        return min((line["objective"] for line in self.history), default=math.inf)


@dataclass
class _Run:
    """A refinement under way: on what, from where, and who watches."""

    rows: Tensor
    spec: RefineSpec
    mask: Tensor
    weights: Tensor
    start: Tensor
    state: State
    checkpoint: Watch
    on_step: OnStep | None

    def bar(self, steps: Iterable[int] | None = None, **options: Any) -> Any:
        """A progress bar over steps; who watches shows one of its own."""
        options |= {"unit": "step", "leave": False, "disable": self.on_step is not None}
        return tqdm(steps, desc=f"refine (gamma {self.spec.gamma:g})", **options)

    def note(self, step: int, losses: Losses) -> None:
        """A line of history about the state's R."""
        best = min(losses["objective"], self.state.lowest)
        distance = rotations.distance(self.state.R, self.start)
        self.state.history.append({"step": step, **losses, "best": best, "distance": distance})


def polar(product: Tensor) -> Tensor:
    """U V^T of a square matrix's SVD, float64: of a^T b for rows a, b the R of least ||a R - b|| (Eq. 6)."""
    u, _, vt = torch.linalg.svd(product.double())
    return u @ vt


def row_weights(mask: Tensor, gamma: float) -> Tensor:
    """Squared-loss weight of each row (tokens,): gamma^2 where massive, 1 elsewhere; at inf 1 and 0."""
    return mask.float() if gamma == math.inf else torch.where(mask, gamma**2, 1.0)


def half_step(
    rows: Tensor, R: Tensor, weights: Tensor, mask: Tensor, quantizer: QuantSpec
) -> tuple[Tensor, Losses]:
    """One pass over rows (tokens, channels), Eq. 7: the sum of w^2 x^T Q(x R) float64; the losses of R."""
    product, R, errors = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64), R.to(rows), []
    size = quantizers.rows_at_once(rows, quantizer, ROWS_AT_ONCE)
    for x, weight in zip(rows.split(size), weights.split(size), strict=True):
        rotated = x @ R
        eta = quantizers.fake_quantize(rotated, quantizer)
        errors.append(rotated.sub_(eta).square_().sum(1))
        heavy = (weight != 1).nonzero().flatten()
        eta[heavy] *= weight[heavy, None].to(eta)
        product += x.T @ eta
    return product, _losses(torch.cat(errors).double(), weights, mask)


def losses_of(rows: Tensor, R: Tensor, weights: Tensor, mask: Tensor, quantizer: QuantSpec) -> Losses:
    """The losses of R over all rows (tokens, channels): objective, ordinary, massive."""
    R = R.to(rows)
    parts = rows.split(quantizers.rows_at_once(rows, quantizer, ROWS_AT_ONCE))
    errors = [quantizers.squared_error(part @ R, quantizer) for part in parts]
    return _losses(torch.cat(errors).double(), weights, mask)


def _losses(error: Tensor, weights: Tensor, mask: Tensor) -> Losses:
    return {
        "objective": float((error * weights).mean()),
        "ordinary": float(error[~mask].mean()) if (~mask).any() else math.nan,
        "massive": float(error[mask].mean()) if mask.any() else math.nan,
    }


def refine(
    rows: Tensor, spec: RefineSpec, mask: Tensor | None = None, *, state: State | None = None,
    checkpoint: Watch | None = None, on_step: OnStep | None = None,
) -> Refined:  # fmt: skip
    """Refine R1 on normalised, unrotated `rows` (tokens, channels) float32 as `spec` says, its `capture`
    aside. `mask` (tokens,) marks massive rows; without it the spec's rule finds them, by rows alone.
    ValueError: rows not finite, gamma = inf with no massive row."""
    broken = torch.cat([~part.isfinite().all(1) for part in rows.split(ROWS_AT_ONCE)]).nonzero()
    if len(broken):
        raise ValueError(f"rows must be finite to be refined on; row {int(broken[0])} has NaN or Inf")
    mask = massive.rows_rule(rows, spec.rule) if mask is None else mask
    rule = f"finite where rule {spec.rule} finds no massive row"
    require("RefineSpec.gamma", "inf", spec.gamma < math.inf or mask.any(), rule)
    start = random.matrix(spec.init, rows.shape[1])
    state = state or State(R=start, best=start, history=[])
    state.momentum = None if state.momentum is None else state.momentum.to(rows)
    weights, watch = row_weights(mask, spec.gamma), checkpoint or (lambda _state: None)
    steps = {"accelerated": _accelerate, "as_released": _as_released}.get(spec.variant, _alternate)
    steps(_Run(rows, spec, mask, weights, start, state, watch, on_step))
    R = state.best if spec.variant in ("accelerated", "guarded") else state.R
    return Refined(rotations.check(R), pd.DataFrame(state.history))


def _alternate(run: _Run) -> None:
    """The paper's steps (Eq. 4-8). The history's row t holds the losses of the R that t steps made."""
    state, last, done = run.state, run.spec.steps, len(run.state.history)
    for step in run.bar(range(done, last + 1), initial=done, total=last + 1):
        product, losses = half_step(run.rows, state.R, run.weights, run.mask, run.spec.quantizer)
        if losses["objective"] < state.lowest:
            state.best = state.R
        run.note(step, losses)
        if run.on_step is not None:
            run.on_step(step, lambda: state.R)
        if step < last:
            state.R = polar(product)
        if step % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1:
            run.checkpoint(state)


def _accelerate(run: _Run) -> None:
    """The paper's objective, minimised sooner by `descent`'s steps with momentum, checked on all rows, one
    row of history a check. Without gain it goes back to the best R without momentum and halves the step."""
    rows, spec, state = run.rows, run.spec, run.state
    metric, parts = descent.metric(rows, run.weights), descent.parts(run.mask, run.weights)
    bar = run.bar(total=spec.steps)
    while not state.history or state.history[-1]["step"] < spec.steps:
        done = int(state.history[-1]["step"]) if state.history else 0
        bar.update(done - bar.n)
        if state.history:
            R = metric.into(state.R)
            for step in range(done, done := min(done + CHECK_EVERY, spec.steps)):
                move = descent.move(rows, *parts[step % len(parts)], metric, R, spec.quantizer)
                state.momentum = move if state.momentum is None else state.momentum.mul_(MOMENTUM).add_(move)
                R = descent.turn(R, state.momentum, state.length)
                bar.update()
                if run.on_step is not None:
                    run.on_step(step + 1, partial(metric.out_of, R))
            state.R = metric.out_of(R)
        losses = losses_of(rows, state.R, run.weights, run.mask, spec.quantizer)
        if losses["objective"] < state.lowest:
            state.best = state.R
        else:  # also where it is not a number
            state.R, state.momentum, state.length = state.best, None, state.length / 2
        run.note(done, losses)
        run.checkpoint(state)
    bar.close()
    state.best = descent.orthonormal(state.best)


def _as_released(run: _Run) -> None:
    """The released optimiser: SVD, then the QR of the turn since the start (which flips columns, of a small
    turn all of them), and its accept test on the weighted Frobenius error. A rejected step would be tried
    again with the same outcome: the loop ends there."""
    state, R, bound = run.state, run.state.R, math.inf
    for step in run.bar(range(run.spec.steps + 1)):
        product, losses = half_step(run.rows, R, run.weights, run.mask, run.spec.quantizer)
        frobenius = math.sqrt(losses["objective"] * len(run.rows))
        if step and not bound - frobenius > RELEASED_GAIN:
            break
        bound, state.R = frobenius + RELEASED_SLACK, R
        run.note(step, losses)
        if run.on_step is not None:
            run.on_step(step, lambda: state.R)
        R = run.start @ torch.linalg.qr(run.start.T @ polar(product))[0]
        run.checkpoint(state)
