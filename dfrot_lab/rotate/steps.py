"""Steps that refine R1: DFRot's alternation as printed and as released, and accelerated ones.

Each step quantizes eta_x = Q(x R) for every row (Eq. 7) and then solves min_R sum over rows of w_x^2 ||x R -
eta_x||^2 (Eq. 8) exactly: R = U V^T of the SVD of sum w_x^2 x^T eta_x (Eq. 6). w_x is gamma for massive rows
and 1 for the rest (Eq. 2); scaling a row by gamma and weighting it by gamma^2 are the same thing because Q is
scale-equivariant (Eq. 3)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import fake_quantize, squared_error
from dfrot_lab.observe import massive
from dfrot_lab.recipe.specs import QuantSpec, RefineSpec
from dfrot_lab.rotate import descent, random
from dfrot_lab.rotate.descent import ROWS_AT_ONCE

RELEASED_SLACK, RELEASED_GAIN = 100.0, 0.1
"""The released code's accept test on the weighted Frobenius error: a step must end at least 0.1 below the
error before it + 100, so it may rise."""


CHECKPOINT_EVERY = 10


LENGTH, MOMENTUM = 0.5, 0.8
"""An accelerated step: half a Procrustes step, and 0.8 of the move before it."""


CHECK_EVERY = 20
"""Accelerated steps between two looks at all rows."""


HISTORY = ("step", "objective", "ordinary", "massive", "best", "distance")


@dataclass(frozen=True)
class RefineResult:
    """The refined rotation R (channels, channels) float64, and its history, one row a step.

    History columns: step, objective (the weighted loss a row), ordinary, massive (mean squared error of those
    rows), best (lowest objective so far), distance (||R - R0||_F / sqrt(C)). `seconds` it took (of a run that
    was stopped, its last part); NaN where not measured."""

    R: Tensor
    history: pd.DataFrame
    seconds: float = math.nan


@dataclass
class State:
    """Where a refinement is: R of the next step, best R so far, the history; and, of an accelerated one, its
    momentum and step length."""

    R: Tensor
    best: Tensor
    history: list[dict[str, float]]
    momentum: Tensor | None = None
    length: float = LENGTH


Checkpoint = Callable[[State], None]


OnStep = Callable[[int, Callable[[], Tensor]], None]
"""Called after every step with its number and what gives that step's R (channels, channels) float64, made
only if it is called."""


def procrustes(a: Tensor, b: Tensor) -> Tensor:
    """The orthogonal R (channels, channels) that minimises ||a R - b||_F for rows `a`, `b` (tokens, channels)
    (Eq. 6)."""
    return polar(a.double().T @ b.double())


def polar(product: Tensor) -> Tensor:
    """U V^T of the SVD of a square matrix: the orthogonal matrix nearest to it, float64."""
    u, _, vt = torch.linalg.svd(product.double())
    return u @ vt


def row_weights(mask: Tensor, gamma: float) -> Tensor:
    """Squared-loss weight of each row (tokens,): gamma^2 where `mask` (massive), 1 elsewhere; gamma = inf
    leaves the massive rows alone."""
    if gamma == math.inf:
        return mask.float()
    return torch.where(mask, gamma**2, 1.0)


def half_step(
    rows: Tensor, R: Tensor, weights: Tensor, mask: Tensor, quantizer: QuantSpec
) -> tuple[Tensor, dict[str, float]]:
    """One pass over all rows (tokens, channels) with the rotation R: Eq. 7, and all that Eq. 8 needs.

    Returns sum of w^2 x^T Q(x R) (channels, channels) float64, and the losses of R itself, which cost nothing
    more: objective, ordinary, massive."""
    product = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    R = R.to(rows)
    error = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        rotated = rows[part] @ R
        eta = fake_quantize(rotated, quantizer)
        error[part] = rotated.sub_(eta).square_().sum(1)
        heavy = (weights[part] != 1).nonzero().flatten()
        eta[heavy] *= weights[part][heavy, None].to(eta)
        product += rows[part].T @ eta
    return product, _losses(error, weights, mask)


def losses_of(
    rows: Tensor, R: Tensor, weights: Tensor, mask: Tensor, quantizer: QuantSpec
) -> dict[str, float]:
    """The losses of R over all rows (tokens, channels): objective, ordinary, massive. One product and one
    quantize pass."""
    R = R.to(rows)
    return _losses(
        torch.cat([squared_error(part @ R, quantizer) for part in rows.split(ROWS_AT_ONCE)]).double(),
        weights,
        mask,
    )


def _losses(error: Tensor, weights: Tensor, mask: Tensor) -> dict[str, float]:
    return {
        "objective": float((error * weights).mean()),
        "ordinary": float(error[~mask].mean()) if (~mask).any() else math.nan,
        "massive": float(error[mask].mean()) if mask.any() else math.nan,
    }


def refine(
    rows: Tensor,
    spec: RefineSpec,
    mask: Tensor | None = None,
    *,
    state: State | None = None,
    checkpoint: Checkpoint | None = None,
    on_step: OnStep | None = None,
) -> RefineResult:
    """Refine R1 on normalised, unrotated `rows` (tokens, channels) float32 as `spec` says (its `capture`
    field is not looked at).

    `mask` (tokens,) marks massive rows; without it the spec's rule finds them (nr_error and ro_vs_nr need the
    rows alone). R stays orthogonal to 1e-5. With `on_step` there is no progress bar: who watches shows one.
    Raises ValueError for rows that are not finite, and for gamma = inf with no massive row."""
    finite = torch.cat([part.isfinite().all(1) for part in rows.split(ROWS_AT_ONCE)])
    if not finite.all():
        token = int((~finite).nonzero()[0])
        raise ValueError(f"rows must be finite to be refined on; row {token} has NaN or Inf")
    mask = massive.rows_rule(rows, spec.rule) if mask is None else mask
    if spec.gamma == math.inf and not mask.any():
        raise ValueError(
            f"RefineSpec.gamma must be finite where rule {spec.rule} finds no massive row; got inf"
        )
    start = random.matrix(spec.init, rows.shape[1])
    state = state or State(R=start, best=start, history=[])
    state.momentum = None if state.momentum is None else state.momentum.to(rows)
    weights = row_weights(mask, spec.gamma)
    run = {"accelerated": _accelerate, "as_released": _as_released}.get(spec.variant, _alternate)
    run(rows, spec, mask, weights, start, state, checkpoint or (lambda _state: None), on_step)
    R = state.best if spec.variant in ("accelerated", "guarded") else state.R
    return RefineResult(rotations.check(R), pd.DataFrame(state.history))


def _alternate(
    rows: Tensor,
    spec: RefineSpec,
    mask: Tensor,
    weights: Tensor,
    start: Tensor,
    state: State,
    checkpoint: Checkpoint,
    on_step: OnStep | None,
) -> None:
    """The paper's steps (Eq. 4-8). The history's row t holds the losses of the R that t steps made, so it has
    steps + 1 rows."""
    steps = range(len(state.history), spec.steps + 1)
    bar: Any = {
        "unit": "step",
        "initial": len(state.history),
        "total": spec.steps + 1,
        "leave": False,
        "disable": on_step is not None,
    }
    for step in tqdm(steps, desc=f"refine (gamma {spec.gamma:g})", **bar):
        product, losses = half_step(rows, state.R, weights, mask, spec.quantizer)
        if losses["objective"] < min((h["objective"] for h in state.history), default=math.inf):
            state.best = state.R
        _note(state, step, losses, start)
        if on_step is not None:
            on_step(step, partial(_current, state))
        if step < spec.steps:
            state.R = polar(product)
        if step % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1:
            checkpoint(state)


def _accelerate(
    rows: Tensor,
    spec: RefineSpec,
    mask: Tensor,
    weights: Tensor,
    start: Tensor,
    state: State,
    checkpoint: Checkpoint,
    on_step: OnStep | None,
) -> None:
    """The paper's objective, minimised sooner: `descent`'s steps with momentum, each on a part of the rows,
    checked on all of them.

    The history has one row a check. A check that finds no gain goes back to the best R without momentum and
    halves the step."""
    metric, parts = descent.metric(rows, weights), descent.parts(mask, weights)
    bar = tqdm(
        desc=f"refine (gamma {spec.gamma:g})",
        unit="step",
        total=spec.steps,
        leave=False,
        disable=on_step is not None,
    )
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
                if on_step is not None:
                    on_step(step + 1, partial(metric.out_of, R))
            state.R = metric.out_of(R)
        losses = losses_of(rows, state.R, weights, mask, spec.quantizer)
        if losses["objective"] < min((h["objective"] for h in state.history), default=math.inf):
            state.best = state.R
        else:  # also where it is not a number
            state.R, state.momentum, state.length = state.best, None, state.length / 2
        _note(state, done, losses, start)
        checkpoint(state)
    bar.close()
    state.best = descent.orthonormal(state.best)


def _as_released(
    rows: Tensor,
    spec: RefineSpec,
    mask: Tensor,
    weights: Tensor,
    start: Tensor,
    state: State,
    checkpoint: Checkpoint,
    on_step: OnStep | None,
) -> None:
    """The released optimiser: SVD then QR (which flips column signs), and its accept test on the weighted
    Frobenius error.

    A rejected step would be tried again with the same outcome for ever, so the loop ends there."""
    R, bound = state.R, math.inf
    for step in tqdm(
        range(spec.steps + 1),
        desc="refine (as released)",
        unit="step",
        leave=False,
        disable=on_step is not None,
    ):
        product, losses = half_step(rows, R, weights, mask, spec.quantizer)
        frobenius = math.sqrt(losses["objective"] * len(rows))
        if step and not bound - frobenius > RELEASED_GAIN:
            break
        bound = frobenius + RELEASED_SLACK
        state.R = R
        _note(state, step, losses, start)
        if on_step is not None:
            on_step(step, partial(_current, state))
        R = torch.linalg.qr(polar(product))[0]
        checkpoint(state)


def _current(state: State) -> Tensor:
    return state.R


def _note(state: State, step: int, losses: dict[str, float], start: Tensor) -> None:
    best = min([losses["objective"], *(h["objective"] for h in state.history)])
    state.history.append(
        {"step": step, **losses, "best": best, "distance": rotations.distance(state.R, start)}
    )
