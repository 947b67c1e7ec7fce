"""Refinement, live: losses, distance and one token's entries move; it can be paused and cancelled."""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from ipywidgets import BoundedIntText, Checkbox, Dropdown, IntProgress, SelectionSlider, Text
from matplotlib.figure import Figure
from torch import Tensor
from traitlets import Bool, Enum, Float, HasTraits, Int, Unicode

from dfrot_lab.disk import rotation_files
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.refinement import numbers, plots
from dfrot_lab.explore.refinement.plots import EntriesPlot, HistoryPlot
from dfrot_lab.explore.shell.explorer import Explorer, beside, control
from dfrot_lab.explore.shell.job import Cancelled, Job
from dfrot_lab.explore.shell.offers import KINDS
from dfrot_lab.maths import rotations
from dfrot_lab.observe import capture as recording
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.specs import (
    DEFAULT_RULE,
    MASSIVE_RULES,
    REFINE_VARIANTS,
    CaptureSpec,
    QuantSpec,
    RefineSpec,
    RotationSpec,
)
from dfrot_lab.rotate import dfrot, steps

REDRAW_S = 0.1
"""Least time between two redraws."""
GAMMAS = [(f"{gamma:g}", gamma) for gamma in (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, math.inf)]
ROWS = [("4,096 rows", 4096), ("16,384 rows", 16384), ("all rows", 0)]
COLUMNS = ["step", "ordinary", "massive", "distance", "on"]


class State(HasTraits):
    """What a RefineSpec says, how many rows (0: all), whose entries are shown, and the file for R1."""

    gamma = control(Float(100.0), SelectionSlider, "Gamma", options=GAMMAS)
    rule = control(Enum(MASSIVE_RULES, DEFAULT_RULE), Dropdown, "Massive rule")
    kind = control(Enum(KINDS[::-1], "RH"), Dropdown, "Start from", 190)
    seed = control(Int(0, min=0), BoundedIntText, "Seed", 190, max=10**6)
    steps = control(Int(100, min=1), BoundedIntText, "Steps", 190, min=1, max=1000)
    variant = control(Enum(REFINE_VARIANTS, "accelerated"), Dropdown, "Variant")
    symmetric = control(Bool(False), Checkbox, "Symmetric grid", 190, indent=False)
    rows = control(Int(16384, min=0), Dropdown, "Refine on", options=ROWS)
    site = control(Unicode(), Dropdown, "Site", 420)
    token = control(Int(0, min=0), Dropdown, "Token", 420)
    path = control(Unicode(), Text, "File for R1", 420)


class Refinement(Explorer):
    """The widget of `refinement`; `history` is live, a dict a step; `result` is there at the end."""

    ONE = "refinement"
    state: State

    def __init__(self, acts: Capture | CaptureSpec | None, store: Store | None, path: str) -> None:
        nothing = {"value": None}
        super().__init__(State(path=path), site=nothing, token=nothing)
        self.acts, self.store = acts, store
        self.recorded: Capture | None = None
        self.history: list[dict[str, Any]] = []
        self.result: steps.Refined | None = None
        self.spec: RefineSpec | None = None
        self._ends: tuple[Tensor, Tensor] | None = None
        self._drawn = 0.0
        for act in (self.start, self.pause, self.resume, self.cancel):
            self.button(act.__name__, act.__name__.capitalize(), act)
        self.button("save", "Save R1", self.save)
        self.progress = IntProgress(description="Steps", layout={"width": "300px"})
        self.plot, self.entries = HistoryPlot(), EntriesPlot()
        self.children = [
            self.row("gamma", "rule", "kind", "seed", "steps", "variant", "rows", "symmetric"),
            self.row("start", "pause", "resume", "cancel", self.progress),
            self.status.widget,
            beside(self.plot, self.entries),
            self.row("site", "token"),
            self.row("path", "save"),
        ]
        self.on("site", self._list_tokens)
        self.on("token", self._draw)
        self.work("opening the activations", self._open)

    def make_spec(self) -> RefineSpec:
        """The controls as a RefineSpec; ValueError while the activations are not open."""
        if self.recorded is None:
            raise ValueError("the activations are not open yet: wait for the line above the plots")
        state, total = self.state, self.recorded.tokens * len(self.recorded.sites)
        same = {name: getattr(state, name) for name in ("gamma", "rule", "steps", "variant")}
        rows = state.rows if 0 < state.rows < total else None
        return RefineSpec(
            capture=self.recorded.spec, init=self._first(), quantizer=self._quantizer(), rows=rows, **same
        )

    def _first(self) -> RotationSpec:
        return RotationSpec(kind=self.state.kind, seed=self.state.seed)

    def _quantizer(self) -> QuantSpec:
        return QuantSpec(scheme="symmetric" if self.state.symmetric else "asymmetric")

    def start(self) -> None:
        """Begin a refinement with the controls as they are."""
        spec = None
        with self.status.doing("reading the controls"):
            spec = self.make_spec()
        if spec is not None and self.free():
            self.spec, self.result, self.history = spec, None, []
            self.progress.max, self.progress.value = spec.steps, 0
            self.work("reading the rows", lambda job: self._refine(job, spec))

    def pause(self) -> None:
        """Wait after the step that runs."""
        self.job.pause()
        self.status.say(f"paused after step {self._step()}")
        self.enable()

    def resume(self) -> None:
        """Go on."""
        self.job.resume()
        self.status.busy("refining")
        self.enable()

    def cancel(self) -> None:
        """End after the step that runs; nothing is kept but what is drawn."""
        self.job.cancel()

    def save(self) -> None:
        """Write the finished R1 with its spec to the path in the box; nothing is overwritten."""
        path = Path(self.state.path).expanduser()
        with self.status.doing("saving", then=f"R1 saved as {path}"):
            if self.result is None:
                raise ValueError("there is no finished refinement to save: press Start, and wait for its end")
            if path.exists():
                raise ValueError(f"{path.name} is there already: choose another name")
            rotation_files.save(self.result.R, path, self.spec, made_with="explore.refinement")

    def enabled(self) -> dict[str, bool]:
        """Pause and cancel while it runs, save once it is finished."""
        running, paused = self.job.running, self.job.paused
        going = {"start": not running, "pause": running and not paused, "resume": paused, "cancel": running}
        return {**going, "save": self.result is not None}

    def _open(self, _job: Job) -> None:
        """The capture, recorded first where the store has none."""
        acts = self.acts
        self.recorded = acts if isinstance(acts, Capture) else recording.capture(acts, self.store)
        self.controls["site"].options = self.recorded.sites
        self.state.site = self.recorded.sites[len(self.recorded.sites) // 2]

    @functools.cached_property
    def _all_rows(self) -> Tensor:
        assert self.recorded is not None
        return self.recorded.all_rows()

    def _refine(self, job: Job, spec: RefineSpec) -> None:
        """The refinement, paused and cancelled at its steps; rows are chosen as `dfrot.refined` does."""
        assert self.recorded is not None
        heavy_rows = massive.find(self.recorded, spec.rule).flatten()
        rows, mask = dfrot.sample_rows(self._all_rows, heavy_rows, spec)
        start = rotations.make(spec.init, rows.shape[1])
        some, heavy = numbers.watched(rows, mask)
        weights = steps.row_weights(heavy, spec.gamma)

        def note(step: int, R: Tensor) -> None:
            losses = steps.losses_of(some, R, weights, heavy, spec.quantizer)
            place = {"step": step, "distance": rotations.distance(R, start), "on": f"{len(some)} rows"}
            self.history.append({**place, "ordinary": losses["ordinary"], "massive": losses["massive"]})
            self._ends, self.progress.value = (start, R), step
            if time.monotonic() - self._drawn >= REDRAW_S:
                self._draw()

        def on_step(step: int, R: Callable[[], Tensor]) -> None:
            job.step()
            if step:
                note(step, R())

        note(0, start)
        if not job.paused:
            self.status.busy(f"refining on {len(rows):,} rows, {int(mask.sum())} of them massive")
        self.result = steps.refine(rows, spec, mask, on_step=on_step)
        self._ends = start, self.result.R

    def at_end(self, error: BaseException | None) -> str:
        """How far it came."""
        self._draw()
        if isinstance(error, Cancelled):
            return f"cancelled after step {self._step()}"
        if self.result is None:
            return "ready: press Start"
        last = self.result.history.iloc[-1]
        losses = f"ordinary {last['ordinary']:.2f}, massive {last['massive']:.2f}"
        return f"done: on all its rows {losses}, distance {last['distance']:.3f}"

    def _step(self) -> int:
        """The last step that was noted."""
        return self.history[-1]["step"] if self.history else 0

    def _list_tokens(self) -> None:
        assert self.recorded is not None
        token = self.controls["token"]
        token.options = numbers.choices(self.recorded, self.state.site)
        token.index = None  # the page shows the first only if it is chosen after the list has come
        token.index = 0
        self._draw()

    def _draw(self) -> None:
        """Both plots."""
        with self._lock:
            self.plot.draw(self.table())
            if self.recorded is not None and self.state.site:
                x = self.recorded.rows(self.state.site)[self.state.token].double()
                start, now = self._ends or (rotations.make(self._first(), len(x)),) * 2
                self.entries.draw(x @ start, x @ now, self._quantizer())
            self._drawn = time.monotonic()

    def table(self) -> pd.DataFrame:
        """Step, normal and massive (mean squared error of those rows), distance from the start, on what."""
        return pd.DataFrame(self.history, columns=COLUMNS)

    def static(self) -> Figure:
        """Losses and distance as a matplotlib figure."""
        return plots.static(self.table())


def refinement(
    acts: Capture | CaptureSpec | None = None, *, store: Store | None = None, path: str = "R1.safetensors"
) -> Refinement:
    """Refine R1 live on a capture (the default model's, where none is given): losses, distance and one
    token's entries at every step; save R1.

    `path` is what the box for the file says at first. A cancelled refinement keeps nothing."""
    return Refinement(acts, store, path)
