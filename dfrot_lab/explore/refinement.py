"""Refinement, live: start, pause, resume and cancel it, and watch losses, distance and one token's entries
move.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
import traitlets
from matplotlib.figure import Figure
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import rotations
from dfrot_lab.observe import capture as recording
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.specs import (
    MASSIVE_RULES,
    REFINE_VARIANTS,
    CaptureSpec,
    QuantSpec,
    RefineSpec,
    RotationSpec,
)
from dfrot_lab.rotate import dfrot
from dfrot_lab.show import figures

from . import base
from .parts import spec_of
from .shell.explorer import beside
from .refineplots import EntriesPlot, HistoryPlot
from .refinerows import choices, watched

REDRAW_S = 0.1
"""Least time between two redraws."""
GAMMAS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, float("inf"))
ROWS = {"4,096 rows": 4096, "16,384 rows": 16384, "all rows": 0}
COLUMNS = ["step", "normal", "massive", "distance", "on"]
BUTTONS = {"start": "Start", "pause": "Pause", "resume": "Resume", "cancel": "Cancel", "save": "Save R1"}


class Settings(traitlets.HasTraits):
    """The state: what a RefineSpec says, how many rows (0: all), and whose entries are shown (site, token)."""

    gamma = traitlets.Float(100.0)
    rule = traitlets.Enum(MASSIVE_RULES, "nr_error")
    kind = traitlets.Enum(("RH", "RO", "NR"), "RH")
    seed = traitlets.Int(0, min=0)
    steps = traitlets.Int(100, min=1)
    variant = traitlets.Enum(REFINE_VARIANTS, "accelerated")
    symmetric = traitlets.Bool(False)
    rows = traitlets.Int(16384, min=0)
    site = traitlets.Unicode("")
    token = traitlets.Int(0, min=0)


class Refinement(widgets.VBox):
    """The widget of `refinement`. Parts: state, controls, history (live, a dict a step), plot, entries,
    status, job, result, table(), static().
    """

    def __init__(self, acts: Capture | CaptureSpec | None, store: Store | None, path: str) -> None:
        self.acts, self.store = acts, store
        self.recorded: Capture | None = None
        self.history: list[dict[str, Any]] = []
        self.result: dfrot.RefineResult | None = None
        self.spec: RefineSpec | None = None
        self._all_rows: Tensor | None = None
        self._start_R: Tensor | None = None
        self._now_R: Tensor | None = None
        self._lock, self._drawn = threading.Lock(), 0.0
        self.state, self.status = Settings(), base.Status()
        self.job = base.Job(on_done=self._ended)
        self.controls = self._controls(path)
        self.progress = widgets.IntProgress(description="Steps", layout=widgets.Layout(width="300px"))
        self.losses, self.entries = HistoryPlot(), EntriesPlot()
        self.plot = self.losses.plot
        c = self.controls
        super().__init__(
            [
                base.row(
                    *(
                        c[name]
                        for name in ("gamma", "rule", "kind", "seed", "steps", "variant", "rows", "symmetric")
                    )
                ),
                base.row(*(c[name] for name in ("start", "pause", "resume", "cancel")), self.progress),
                self.status.widget,
                beside(self.losses.plot, self.entries.plot),
                base.row(c["site"], c["token"]),
                base.row(c["path"], c["save"]),
            ],
            layout=base.column().layout,
        )
        self.add_class("dfrot-refinement")
        self.state.observe(lambda _change: self._list_tokens(), names=["site"])
        self.state.observe(lambda _change: self._draw(always=True), names=["token"])
        self._buttons()
        self.status.busy("opening the activations")
        self.job.start(self._open)

    def make_spec(self) -> RefineSpec:
        """The controls as a RefineSpec; ValueError for what it refuses, and while the activations are not
        open.
        """
        if self.recorded is None:
            raise ValueError("the activations are not open yet: wait for the line above the plots")
        made_by = spec_of(self.recorded)
        if made_by is None:
            raise ValueError(
                "the activations must say what they were recorded from; these do not. Record them with dfrot_lab.observe.capture"
            )
        state, total = self.state, self.recorded.tokens * len(self.recorded.sites)
        return RefineSpec(
            capture=made_by,
            init=RotationSpec(kind=state.kind, seed=state.seed),
            gamma=state.gamma,
            rule=state.rule,
            steps=state.steps,
            variant=state.variant,
            quantizer=QuantSpec(symmetric=state.symmetric),
            rows=state.rows if 0 < state.rows < total else None,
        )

    def start(self) -> None:
        """Begin a refinement with the controls as they are."""
        try:
            if self.job.running and self.recorded is not None:
                raise RuntimeError("one refinement at a time: cancel the one that runs, or wait for it")
            spec = self.make_spec()
        except base.EXPECTED as error:
            self.status.error(error)
            return
        self.spec, self.result, self.history = spec, None, []
        self.progress.max, self.progress.value = spec.steps, 0
        self.status.busy("reading the rows")
        self.job.start(self._refine)
        self._buttons()

    def pause(self) -> None:
        """Wait after the step that runs."""
        self.job.pause()
        self.status.say(f"paused after step {self.history[-1]['step'] if self.history else 0}")
        self._buttons()

    def resume(self) -> None:
        """Go on."""
        self.job.resume()
        self.status.busy("refining")
        self._buttons()

    def cancel(self) -> None:
        """End after the step that runs; nothing is kept but what is drawn."""
        self.job.cancel()

    def save(self) -> None:
        """Write the finished R1 with its spec to the path in the box; a file that is there is not
        overwritten.
        """
        path = Path(self.controls["path"].value).expanduser()
        with self.status.doing("saving", then=f"R1 saved as {path}"):
            if self.result is None:
                raise ValueError("there is no finished refinement to save: press Start, and wait for its end")
            if path.exists():
                raise ValueError(f"{path.name} is there already: choose another name")
            rotations.save(self.result.R, path, self.spec, made_with="explore.refinement")

    def table(self) -> pd.DataFrame:
        """The losses so far: step, normal, massive (mean squared error of those rows), distance from the
        start, and on which rows.
        """
        return pd.DataFrame(self.history, columns=COLUMNS)

    def static(self) -> Figure:
        """Losses and distance as a matplotlib figure."""
        table = self.table()
        with figures.theme():
            drawn, (left, right) = figures.plt.subplots(1, 2, figsize=(10, 3.8))
            figures.plot_history(table, ax=left)
            right.plot(table["step"], table["distance"], c=base.COLOURS["DFRot"])
            right.set(xlabel="step", ylabel="distance from the start, ||R - R0|| / sqrt(C)")
        figures.plt.close(drawn)
        return drawn

    def _controls(self, path: str) -> dict[str, Any]:
        narrow, wide = widgets.Layout(width="190px"), widgets.Layout(width="420px")
        made: dict[str, Any] = {
            "gamma": widgets.SelectionSlider(
                options=[(f"{g:g}", g) for g in GAMMAS], value=100.0, description="Gamma"
            ),
            "rule": widgets.Dropdown(options=MASSIVE_RULES, description="Massive rule"),
            "kind": widgets.Dropdown(options=["RH", "RO", "NR"], description="Start from", layout=narrow),
            "seed": widgets.BoundedIntText(min=0, max=10**6, description="Seed", layout=narrow),
            "steps": widgets.BoundedIntText(min=1, max=1000, description="Steps", layout=narrow),
            "variant": widgets.Dropdown(options=REFINE_VARIANTS, description="Variant"),
            "rows": widgets.Dropdown(options=list(ROWS.items()), description="Refine on"),
            "symmetric": widgets.Checkbox(description="Symmetric grid", indent=False, layout=narrow),
        }
        for name, control in made.items():
            traitlets.link((self.state, name), (base.wide_label(control), "value"))
        made["site"] = base.wide_label(widgets.Dropdown(description="Site", layout=wide))
        made["token"] = base.wide_label(widgets.Dropdown(description="Token", layout=wide))
        for name in ("site", "token"):
            made[name].observe(lambda change, name=name: self._pick(name, change["new"]), "value")
        made["path"] = base.wide_label(widgets.Text(value=path, description="File for R1", layout=wide))
        for name, text in BUTTONS.items():
            made[name] = widgets.Button(description=text)
            made[name].on_click(lambda _button, act=name: getattr(self, act)())
        return made

    def _pick(self, name: str, value: Any) -> None:
        """A choice in a list; while its options are replaced there is none."""
        if value is not None:
            setattr(self.state, name, value)

    def _buttons(self, ended: bool = False) -> None:
        running, paused = self.job.running and not ended, self.job.paused and not ended
        enabled = {
            "start": not running,
            "pause": running and not paused,
            "resume": paused,
            "cancel": running,
            "save": self.result is not None,
        }
        for name, on in enabled.items():
            self.controls[name].disabled = not on

    def _open(self, _job: base.Job) -> None:
        """In the background: the capture, recorded first where the store has none."""
        self.recorded = (
            self.acts if isinstance(self.acts, Capture) else recording.capture(self.acts, self.store)
        )
        self.controls["site"].options = self.recorded.sites
        self.controls["site"].value = self.recorded.sites[len(self.recorded.sites) // 2]

    def _list_tokens(self) -> None:
        if self.recorded is not None and self.state.site:
            token = self.controls["token"]
            token.options = choices(self.recorded, self.state.site)
            token.index = None  # the page shows the first only if it is chosen after the list has come
            token.index = 0
            self._draw(always=True)

    def _rows(self, spec: RefineSpec) -> tuple[Tensor, Tensor]:
        """The rows to refine on and their massive mask, as `refine.refined` takes them."""
        assert self.recorded is not None
        if self._all_rows is None:
            self._all_rows = self.recorded.all_rows()
        return dfrot.sample_rows(self._all_rows, massive.find(self.recorded, spec.rule).flatten(), spec)

    def _refine(self, job: base.Job) -> None:
        """In the background: the refinement, paused and cancelled at its steps."""
        assert self.spec is not None
        spec = self.spec
        rows, mask = self._rows(spec)
        start = self._start_R = self._now_R = rotations.make(spec.init, rows.shape[1])
        some, heavy = watched(rows, mask)
        weights = dfrot.row_weights(heavy, spec.gamma)

        def note(step: int, R: Tensor) -> None:
            losses = dfrot.losses_of(some, R, weights, heavy, spec.quantizer)
            place = {"step": step, "distance": rotations.distance(R, start), "on": f"{len(some)} rows"}
            self.history.append({**place, "normal": losses["normal"], "massive": losses["massive"]})
            self._now_R, self.progress.value = R, step
            self._draw()

        def on_step(step: int, R: Callable[[], Tensor]) -> None:
            job.step()
            if step:
                note(step, R())

        note(0, start)
        if not job.paused:
            self.status.busy(f"refining on {len(rows):,} rows, {int(mask.sum())} of them massive")
        self._buttons()
        self.result = dfrot.refine(rows, spec, mask, on_step=on_step)
        self._now_R = self.result.R

    def _ended(self, error: BaseException | None) -> None:
        self._draw(always=True)
        if isinstance(error, base.Cancelled):
            self.status.say(f"cancelled after step {self.history[-1]['step'] if self.history else 0}")
        elif error is not None:
            self.status.error(error)
        elif self.result is not None:
            last = self.result.history.iloc[-1]
            self.status.say(
                f"done: on all its rows normal {last['normal']:.2f}, massive {last['massive']:.2f}, distance {last['distance']:.3f}"
            )
        else:
            self.status.say("ready: press Start")
        self._buttons(ended=True)

    def _draw(self, always: bool = False) -> None:
        """Both plots, at most every REDRAW_S while steps come."""
        with self._lock:
            if not always and time.monotonic() - self._drawn < REDRAW_S:
                return
            self.losses.draw(self.table())
            if self.recorded is not None and self.state.site:
                x = self.recorded.rows(self.state.site)[self.state.token].double()
                start = (
                    self._start_R
                    if self._start_R is not None
                    else rotations.make(RotationSpec(kind=self.state.kind, seed=self.state.seed), len(x))
                )
                now = self._now_R if self._now_R is not None else start
                self.entries.draw(x @ start, x @ now, QuantSpec(symmetric=self.state.symmetric))
            self._drawn = time.monotonic()


def refinement(
    acts: Capture | CaptureSpec | None = None, *, store: Store | None = None, path: str = "R1.safetensors"
) -> Refinement:
    """Refine R1 live on a capture (the default model's, where none is given): losses, distance and one
    token's entries at every step; save R1.

    `path` is what the box for the file says at first. A cancelled refinement keeps nothing.
    """
    return Refinement(acts, store, path)
