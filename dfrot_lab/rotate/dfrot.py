"""DFRot: refine R1 by alternating per-token quantization and orthogonal Procrustes, massive rows weighted
(arXiv 2412.00648, Sec. 3.3, Alg. 1). Here what is kept of it; the steps themselves are in `steps`."""

import logging
import math
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Artefact, Store, Writer
from dfrot_lab.model import door
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import capture as captured
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.specs import CaptureSpec, Recipe, RefineSpec, RotationSpec
from dfrot_lab.rotate.steps import HISTORY, Refined, State, Watch, refine
from dfrot_lab.rotate.transforms import Context, Transforms

log = logging.getLogger(__name__)
SPEC = RefineSpec
KIND = "refine"
VERSION = 2  # as_released: the QR is the turn's, not the whole R's
NEEDS = "activations"


def spec(_row: str, *, seed: int = 0, capture: CaptureSpec | None = None) -> RefineSpec:
    """The refinement of the row DFRot: from RH of `seed`, on the rows of `capture`."""
    return RefineSpec(capture=capture or CaptureSpec(), init=RotationSpec(seed=seed))


def fit(recipe: Recipe, context: Context) -> Transforms:
    """R1 refined, R2 to R4 Hadamard."""
    assert isinstance(recipe.rotation, RefineSpec)
    found = refined(recipe.rotation, context.store)
    return Transforms(R1=found.R, seconds=found.seconds)


def stored(spec: RefineSpec, store: Store) -> Refined | None:
    """The refinement `spec` describes if the store has it, else None; computes nothing."""
    artefact = store.open(KIND, keys.identity(door.resolved(spec), door.prints))
    return None if artefact is None else kept(artefact)


def refined(spec: RefineSpec, store: Store | None = None, checkpoint: Watch | None = None) -> Refined:
    """The refinement `spec` describes, from the store or computed now on the rows of its capture; a stopped
    run goes on at its last checkpoint. `checkpoint` sees each state once saved; it may raise to stop."""
    spec, store = door.resolved(spec), store or Store()
    recorded = captured(spec.capture, store)

    def make(writer: Writer) -> None:
        massive.warn(recorded, spec.rule)
        rows, mask = sample_rows(recorded.all_rows, massive.find(recorded, spec.rule).flatten(), spec)
        log.info("refining on %d rows, %d of them massive (%s)", len(rows), int(mask.sum()), spec.rule)
        started = time.perf_counter()

        def save(state: State) -> None:
            _save_state(writer, state)
            if checkpoint is not None:
                checkpoint(state)

        where = spec.capture.model.device
        result = refine(rows.to(where), spec, mask.to(where), state=_resume(writer, spec), checkpoint=save)
        keep(writer, result, time.perf_counter() - started)

    return kept(store.get_or_make(KIND, lambda: keys.identity(spec, door.prints), make))


def keep(writer: Writer, result: Refined, seconds: float) -> None:
    """Write a finished descent, R1 and history, in place of its last state."""
    writer.save_tensors("R1", {"R1": result.R})
    writer.save_json("history", result.history.to_dict("records"))
    writer.note.update(seconds=seconds)
    writer.drop("state")


def kept(artefact: Artefact) -> Refined:
    """What `keep` wrote."""
    history = pd.DataFrame(artefact.json("history"), columns=list(HISTORY))
    seconds = float(artefact.manifest["note"].get("seconds", math.nan))
    return Refined(artefact.tensors("R1")["R1"], history, seconds)


def sample_rows(
    rows: Callable[[Tensor | None], Tensor], mask: Tensor, spec: RefineSpec
) -> tuple[Tensor, Tensor]:
    """The rows to refine on and their mask: all, or as many as the spec says, drawn with its start's seed.
    `rows` gives those at some places in rising order, or with None all, as `Capture.all_rows`."""
    if spec.rows is None:
        return rows(None), mask
    most = f"at most the {len(mask)} rows of the capture"
    require("RefineSpec.rows", spec.rows, spec.rows <= len(mask), most)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(spec.init.seed))
    chosen = order[: spec.rows].sort().values
    return rows(chosen), mask[chosen]


def as_tensor(history: list[dict[str, float]]) -> Tensor:
    """The lines of a history (looks, columns of HISTORY) float64."""
    return torch.tensor([[line[name] for name in HISTORY] for line in history], dtype=torch.float64)


def as_lines(history: Tensor) -> list[dict[str, float]]:
    """The reverse of `as_tensor`."""
    return [dict(zip(HISTORY, [int(line[0]), *line[1:]], strict=True)) for line in history.tolist()]


def _save_state(writer: Writer, state: State) -> None:
    """One file: a kill cannot leave a rotation and a history that do not belong together."""
    length = torch.tensor(state.length, dtype=torch.float64)
    tensors = {"R": state.R, "best": state.best, "history": as_tensor(state.history), "length": length}
    writer.save_tensors("state", tensors | ({} if state.momentum is None else {"momentum": state.momentum}))


def _resume(writer: Writer, spec: RefineSpec) -> State | None:
    """The last checkpoint; the released variant, which stops early by itself, starts over."""
    if spec.variant == "as_released" or not writer.has("state"):
        return None
    saved = writer.load_tensors("state")
    history = as_lines(saved["history"])
    log.info("going on with refinement at step %d of %d", history[-1]["step"], spec.steps)
    return State(saved["R"], saved["best"], history, saved.get("momentum"), float(saved["length"]))
