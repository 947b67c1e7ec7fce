"""Downhill on rotations, a part of captured rows a step, a look at all of them every so many steps: whatever
the loss of rotated rows, and whatever makes a step of its slope. The best R of all looks is kept."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dfrot_lab.disk.artefacts import Writer
from dfrot_lab.maths import rotations
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.rotate import descent, dfrot, offset
from dfrot_lab.rotate.steps import ROWS_AT_ONCE, Refined

log = logging.getLogger(__name__)
PARTS = 32  # a step sees all massive rows and one of so many parts of the others, in turn
CHECK_EVERY = 25  # steps between two looks at all rows
BETAS = (0.9, 0.999)  # Adam's, arXiv 1412.6980

Loss = Callable[[Tensor, Tensor], tuple[float, Tensor]]
"""Of rotated rows y (rows, channels) and weights (rows,): the weighted loss and its slope at y."""
Step = Callable[["State", Tensor, Tensor, int], None]
"""Of a state, some rows, their weights, and how many steps there were: moves the state's R."""
Checkpoint = Callable[["State"], None]
"""Sees each state at a look; it may raise to stop."""


@dataclass
class State:
    """Where a descent is: R of the next step, the best so far, `first` and `second` (channels, channels), of
    which its steps make what they need (Adam's moments; QR-Orth's momentum and Z), history (columns of
    steps.HISTORY); the `seconds` of runs that were stopped, and when this one began."""

    R: Tensor
    best: Tensor
    first: Tensor
    second: Tensor
    history: list[dict[str, float]]
    seconds: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    @property
    def elapsed(self) -> float:
        """Seconds so far, those of runs that were stopped included."""
        return self.seconds + time.perf_counter() - self.began

    @property
    def lowest(self) -> float:
        """The lowest objective so far."""
        return min((line["objective"] for line in self.history), default=math.inf)


@dataclass(frozen=True)
class Way:
    """How to go down: a loss, a step, how many `updates`; the `quantizer` whose errors the history says, of
    rows drawn with `seed`; `back`: whether a look that gained nothing goes back to the best."""

    loss: Loss
    step: Step
    updates: int
    quantizer: QuantSpec
    seed: int = 0
    back: bool = True


@dataclass(frozen=True)
class Sample:
    """What a descent is on: `rows` (tokens, channels), their weights (tokens,), which are massive (tokens,);
    which are seen at every step, `often` (tokens,), by default the massive ones."""

    rows: Tensor
    weights: Tensor
    mask: Tensor
    often: Tensor | None = None


def descend(
    sample: Sample, start: Tensor, way: Way, state: State | None = None,
    checkpoint: Checkpoint = lambda _state: None,
) -> Refined:  # fmt: skip
    """Go downhill from `start` (channels, channels) for `way.updates` steps; history has a line a look."""
    still = torch.zeros_like(start.to(sample.rows))
    state = state or State(start.to(still), start.to(still), still, still.clone(), [])
    moved = (part.to(still) for part in (state.R, state.best, state.first, state.second))
    state.R, state.best, state.first, state.second = moved
    often = sample.mask if sample.often is None else sample.often
    parts = descent.parts(often, sample.weights, PARTS)
    bar = tqdm(total=way.updates, desc="descend", unit="step", leave=False)
    while not state.history or state.history[-1]["step"] < way.updates:
        done = int(state.history[-1]["step"]) if state.history else 0
        bar.update(done - bar.n)
        if state.history:
            for step in range(done, done := min(done + CHECK_EVERY, way.updates)):
                at, weights = parts[step % len(parts)]
                way.step(state, sample.rows[at], weights.flatten(), step)
                bar.update()
            state.R = descent.orthonormal(state.R)
        _look(state, sample, start, done, way)
        checkpoint(state)
    bar.close()
    best = descent.orthonormal(state.best.double())
    if not state.lowest < state.history[0]["objective"]:
        log.warning("no step lowered the objective: R1 is the rotation it started from")
        best = start
    return Refined(rotations.check(best).cpu(), pd.DataFrame(state.history), state.elapsed)


def adam(state: State, rows: Tensor, weights: Tensor, step: int, loss: Loss, length: float) -> None:
    """One step of Adam on the rotations, of an angle of about `length`: R <- R Cayley(-A), with A made of the
    skew part of y^T g, y the rotated rows and g the loss's slope there."""
    rotated = rows @ state.R
    skew = rotated.T @ loss(rotated, weights)[1]
    adam_turn(state, skew - skew.T, step, length)


def adam_turn(state: State, skew: Tensor, step: int, length: float) -> None:
    """Turn R by Adam's step for the gradient `skew` (channels, channels) in R's own frame."""
    state.first.lerp_(skew, 1 - BETAS[0])
    state.second.lerp_(skew.square(), 1 - BETAS[1])
    first, second = (
        m / (1 - b ** (step + 1)) for m, b in zip((state.first, state.second), BETAS, strict=True)
    )
    least = 1e-8 * second.max().sqrt() + torch.finfo(skew.dtype).tiny
    half = first.div_(second.sqrt_().add_(least)).mul_(length / (2 * math.sqrt(len(skew))))
    turned = torch.linalg.solve(torch.eye(len(half)).to(half) - half, state.R.T + half @ state.R.T)
    state.R = turned.T.contiguous()


def _look(state: State, sample: Sample, start: Tensor, step: int, way: Way) -> None:
    """A line of history about the state's R; where nothing was gained, back to the best one, at rest, if the
    way goes `back`."""
    pairs = zip(sample.rows.split(ROWS_AT_ONCE), sample.weights.split(ROWS_AT_ONCE), strict=True)
    objective = sum(way.loss(rows @ state.R, weights)[0] for rows, weights in pairs)
    places = offset.sample(sample.mask.cpu(), offset.ROWS, way.seed).to(sample.mask.device)
    found: dict[str, Any] = offset.losses(sample.rows[places] @ state.R, sample.mask[places], way.quantizer)
    if objective < state.lowest:
        state.best = state.R
    elif way.back:  # also where it is not a number
        state.R, state.first = state.best, torch.zeros_like(state.first)
    best = min(objective, state.lowest)
    line = {**found, "step": step, "objective": objective, "best": best}
    state.history.append({**line, "distance": rotations.distance(state.R.cpu(), start)})


def save(writer: Writer, state: State) -> None:
    """One file: a kill cannot leave a rotation and a history that do not belong together."""
    history = dfrot.as_tensor(state.history)
    moments = {"first": state.first, "second": state.second}
    moments["seconds"] = torch.tensor(state.elapsed, dtype=torch.float64)
    writer.save_tensors("state", {"R": state.R, "best": state.best, **moments, "history": history})


def resume(writer: Writer) -> State | None:
    """What `save` wrote last, if anything."""
    if not writer.has("state"):
        return None
    saved = writer.load_tensors("state")
    history, seconds = dfrot.as_lines(saved.pop("history")), float(saved.pop("seconds", 0.0))
    log.info("going on with the descent at step %d", history[-1]["step"])
    R, best, first, second = (saved[name] for name in ("R", "best", "first", "second"))
    return State(R, best, first, second, history, seconds)
