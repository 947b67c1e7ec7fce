"""Refinement, live: losses, distance and one token's entries move; it can be paused and cancelled."""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from ipywidgets import BoundedIntText, Checkbox, Dropdown, IntProgress, SelectionSlider, Text
from matplotlib.figure import Figure
from torch import Tensor
from traitlets import Bool, Enum, Float, HasTraits, Int, Unicode

from dfrot_lab.disk import rotation_files
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.page import AXIS, LOG, SCHEMES, Plot, beside, drawing, lines_at
from dfrot_lab.explore.shell import Cancelled, Explorer, Job, control
from dfrot_lab.maths import quantizers, rotations
from dfrot_lab.model.public import public
from dfrot_lab.observe import capture, massive
from dfrot_lab.recipe import specs
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.rotate import dfrot, steps
from dfrot_lab.show import figures, theme

Acts = capture.Capture | specs.CaptureSpec | None
GAMMAS = [(f"{gamma:g}", gamma) for gamma in (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, math.inf)]
ROWS = [("4,096 rows", 4096), ("16,384 rows", 16384), ("all rows", 0)]
KINDS = [kind for kind in specs.ROTATION_KINDS[::-1] if kind != "file"]
DRAWN = ["ordinary", "massive", "distance"]
COLUMNS = ["step", *DRAWN, "on"]
WATCHED = 4096  # rows the losses are drawn of at every step; the refinement's own checks are on all its rows
MASSIVE_ONES, OTHERS = 8, 4  # tokens offered: those of the largest values, and some ordinary ones


def watched(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """At most WATCHED of the rows (tokens, channels) and their mask, up to a quarter of them massive."""
    if len(rows) <= WATCHED:
        return rows, mask
    generator = torch.Generator().manual_seed(0)
    parts = (part.nonzero().flatten() for part in (mask, ~mask))
    heavy, light = (part[torch.randperm(len(part), generator=generator)] for part in parts)
    heavy = heavy[: WATCHED // 4]
    chosen = torch.cat([heavy, light[: WATCHED - len(heavy)]])
    return rows[chosen], mask[chosen]


def choices(recorded: capture.Capture, site: str) -> list[tuple[str, int]]:
    """Tokens of a site worth a look, as (label, position), the most massive first."""
    largest, texts = recorded.residual_max[recorded.place(site)], recorded.texts
    even = torch.linspace(0, recorded.tokens - 1, OTHERS + 2).long().tolist()[1:-1]
    places = dict.fromkeys([*largest.argsort(descending=True)[:MASSIVE_ONES].tolist(), *even])
    return [(f"{i}: {theme.visible(texts[i])}  (residual |max| {float(largest[i]):.0f})", i) for i in places]


def history_plot() -> Plot:
    """Mean squared error of ordinary and massive rows (log axis); below it, how far R is from its start."""
    solid, dots = {"width": 2, "dash": "solid"}, {"mode": "lines+markers", "marker": {"size": 4}}
    below = {"line": {**solid, "color": theme.COLOURS["DFRot"]}, "yaxis": "y2", "showlegend": False}
    traces = [
        go.Scatter(dots, line={**solid, "color": theme.ORDINARY_COLOUR, "dash": "dot"}, name="ordinary rows"),
        go.Scatter(dots, line={**solid, "color": theme.MASSIVE_COLOUR}, name="massive rows"),
        go.Scatter(mode="lines", name="distance", **below),
    ]
    y = {"domain": [0.42, 1], **LOG, "title": "mean squared error"}
    y2 = {**AXIS, "domain": [0, 0.32], "title": "distance", "rangemode": "tozero"}
    return Plot(traces, xaxis={"title": "step", "anchor": "y2", "rangemode": "tozero"}, yaxis=y, yaxis2=y2)


def entries_plot() -> Plot:
    """How the entries of one token lie, at the start and now, and the levels of its grid."""
    grid = {"color": "rgba(128,128,128,0.5)", "width": 1}
    start = {"color": theme.COLOURS["RO"], "shape": "hvh", "width": 2}
    traces = [
        go.Scatter(mode="lines", line=grid, name="levels now", hoverinfo="skip"),
        go.Bar(marker={"color": theme.COLOURS["DFRot"], "line": {"width": 0}}, name="x R now"),
        go.Scatter(mode="lines", line=start, name="x R at the start"),
    ]
    y = {"title": "channels", "rangemode": "tozero"}
    return Plot(traces, bargap=0, xaxis_title="entry of the token", yaxis=y)


class _State(HasTraits):
    gamma = control(Float(100.0), SelectionSlider, "Gamma", options=GAMMAS)
    rule = control(Enum(specs.MASSIVE_RULES, specs.DEFAULT_RULE), Dropdown, "Massive rule")
    kind = control(Enum(KINDS, "RH"), Dropdown, "Start from", 190)
    seed = control(Int(0, min=0), BoundedIntText, "Seed", 190, max=10**6)
    steps = control(Int(100, min=1), BoundedIntText, "Steps", 190, min=1, max=1000)
    variant = control(Enum(specs.REFINE_VARIANTS, "accelerated"), Dropdown, "Variant")
    symmetric = control(Bool(False), Checkbox, "Symmetric grid", 190, indent=False)
    rows = control(Int(16384, min=0), Dropdown, "Refine on", options=ROWS)
    site = control(Unicode(), Dropdown, "Site", 420)
    token = control(Int(0, min=0), Dropdown, "Token", 420)
    path = control(Unicode(), Text, "File for R1", 420)


class Refinement(Explorer):
    """Refine R1 live on a capture (default: the default model's); `history` is by step, `result` the end."""

    ONE = "refinement"

    def __init__(self, acts: Acts = None, store: Store | None = None, path: str = "R1.safetensors") -> None:
        super().__init__(_State(path=path), site={"value": None}, token={"value": None})
        self.history, self._drawn = list[dict[str, Any]](), 0.0
        self.recorded: Any = None
        self.result: steps.Refined | None = None
        self.spec: specs.RefineSpec | None = None
        self._ends: tuple[Tensor, Tensor] | None = None
        for act in (self.start, self.pause, self.resume, self.cancel):
            self.button(act.__name__, act.__name__.capitalize(), act)
        self.button("save", "Save R1", self.save)
        self.progress = IntProgress(description="Steps", layout={"width": "300px"})
        self.plot, self.entries = history_plot(), entries_plot()
        what = self.row("gamma", "rule", "kind", "seed", "steps", "variant", "rows", "symmetric")
        above = [what, self.row("start", "pause", "resume", "cancel", self.progress), self.status.line]
        below = [self.row("site", "token"), self.row("path", "save")]
        self.children = [*above, beside(self.plot, self.entries), *below]
        self.on("site", self._list_tokens)
        self.on("token", self._draw)
        self.work("opening the activations", lambda _job: self._open(acts, store))

    def make_spec(self) -> specs.RefineSpec:
        """The controls as a RefineSpec; ValueError while the activations are not open."""
        if self.recorded is None:
            raise ValueError("the activations are not open yet: wait for the line above the plots")
        state, total = self.state, self.recorded.tokens * len(self.recorded.sites)
        fields = {name: getattr(state, name) for name in ("gamma", "rule", "steps", "variant")}
        fields["rows"] = state.rows if 0 < state.rows < total else None
        init, quantizer = self._parts()
        return specs.RefineSpec(capture=self.recorded.spec, init=init, quantizer=quantizer, **fields)

    def _parts(self) -> tuple[specs.RotationSpec, QuantSpec]:
        quantizer = QuantSpec(scheme=SCHEMES[self.state.symmetric])
        return specs.RotationSpec(kind=self.state.kind, seed=self.state.seed), quantizer

    def start(self) -> None:
        """Begin a refinement with the controls as they are."""
        with self.status.doing("reading the controls"):
            spec = self.make_spec()
            if self.free():
                self.spec, self.result, self.history = spec, None, []
                self.progress.max, self.progress.value = spec.steps, 0
                self.work("reading the rows", lambda job: self._refine(job, spec))

    def pause(self) -> None:
        """Wait after the step that runs."""
        self.job.pause()
        self.status.say(f"paused after step {self.progress.value}")
        self.enable()

    def resume(self) -> None:
        """Go on."""
        self.job.resume()
        self.status.busy("refining")
        self.enable()

    def save(self) -> None:
        """Write the finished R1 with its spec to the path in the box; nothing is overwritten."""
        path = Path(self.state.path).expanduser()
        with self.status.doing("saving", then=f"R1 saved as {path}"):
            if self.result is None:
                raise ValueError("there is no finished refinement to save: press Start, and wait for its end")
            if path.exists():
                raise ValueError(f"{path.name} is there already: choose another name")
            rotation_files.save(
                self.result.R, path, self.spec and public(self.spec), made_with="explore.refinement"
            )

    def _enabled(self) -> dict[str, bool]:
        running, paused = self.job.running, self.job.paused
        going = {"start": not running, "pause": running and not paused, "resume": paused, "cancel": running}
        return {**going, "save": self.result is not None}

    def _open(self, acts: Acts, store: Store | None) -> None:
        """The capture, recorded first where the store has none."""
        self.recorded = acts if isinstance(acts, capture.Capture) else capture.capture(acts, store)
        self._rows = functools.cache(self.recorded.all_rows)
        self.controls["site"].options = self.recorded.sites
        self.state.site = self.recorded.sites[len(self.recorded.sites) // 2]

    def _chosen(self, places: Tensor | None) -> Tensor:
        return self._rows() if places is None else self._rows()[places]

    def _refine(self, job: Job, spec: specs.RefineSpec) -> None:
        """The refinement, paused and cancelled at its steps; rows are chosen as `dfrot.refined` does."""
        rows, mask = dfrot.sample_rows(self._chosen, massive.find(self.recorded, spec.rule).flatten(), spec)
        start = rotations.make(spec.init, rows.shape[1])
        some, heavy = watched(rows, mask)
        weights = steps.row_weights(heavy, spec.gamma)

        def note(step: int, R: Tensor) -> None:
            place = {"step": step, "distance": rotations.distance(R, start), "on": f"{len(some)} rows"}
            self.history.append(place | steps.losses_of(some, R, weights, heavy, spec.quantizer))
            self._ends, self.progress.value = (start, R), step
            if time.monotonic() - self._drawn >= 0.1:  # seconds
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

    def _at_end(self, error: BaseException | None) -> str:
        self._draw()
        if isinstance(error, Cancelled):
            return f"cancelled after step {self.progress.value}"
        if self.result is None:
            return "ready: press Start"
        last = self.result.history.iloc[-1]
        massive_said = "none massive" if math.isnan(last["massive"]) else f"massive {last['massive']:.2f}"
        losses = f"ordinary {last['ordinary']:.2f}, {massive_said}"
        return f"done: on all its rows {losses}, distance {last['distance']:.3f}"

    def _list_tokens(self) -> None:
        token = self.controls["token"]
        token.options = choices(self.recorded, self.state.site)
        token.index = None  # the page shows the first only if it is chosen after the list has come
        token.index = 0
        self._draw()

    def _draw(self) -> None:
        with self._lock:
            table = self.table().astype(dict.fromkeys(DRAWN, float))
            self.plot.put(*({"x": table["step"].to_numpy(), "y": table[n].to_numpy()} for n in DRAWN))
            if self.recorded is not None and self.state.site:
                x = self.recorded.rows(self.state.site)[self.state.token].double()
                init, quantizer = self._parts()
                start, now = self._ends or (rotations.make(init, len(x)),) * 2
                self._draw_entries(x @ start, x @ now, quantizer)
            self._drawn = time.monotonic()

    def _draw_entries(self, start: Tensor, now: Tensor, quantizer: QuantSpec) -> None:
        reach = 1.2 * float(start.abs().max())
        edges = np.linspace(-reach, reach, 61)
        before, after = (np.histogram(y.clamp(-reach, reach).numpy(), edges)[0] for y in (start, now))
        tall, grid = 1.05 * float(max(before.max(), after.max())), quantizers.levels(now, quantizer)
        across, along = lines_at(grid, 0, tall)
        first, last = (float(quantizers.squared_error(y[None], quantizer)) for y in (start, now))
        title = {"text": f"entry of the token (error {first:.2f} at the start, {last:.2f} now)"}
        counts = [{"x": (edges[1:] + edges[:-1]) / 2, "y": count} for count in (after, before)]
        self.entries.put({"x": across, "y": along}, *counts, xaxis={"range": [-reach, reach], "title": title})

    def table(self) -> pd.DataFrame:
        """Step, ordinary and massive (mean squared error of those rows), distance from the start, on what."""
        return pd.DataFrame(self.history, columns=COLUMNS)

    def static(self) -> Figure:
        """Losses and distance as a matplotlib figure."""
        table = self.table()
        with drawing(2) as (drawn, (left, right)):
            figures.plot_history(table, ax=left)
            right.plot(table["step"], table["distance"], c=theme.COLOURS["DFRot"])
            right.set(xlabel="step", ylabel="distance from the start, ||R - R0|| / sqrt(C)")
        return drawn
