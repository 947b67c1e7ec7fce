"""Turn a spike by hand in two or three channels, then with matrices in up to 576, and see the error."""

import html
import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure
from torch import Tensor
from traitlets import Bool, Enum, Float, HasTraits, Int

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.page import GREY, SCHEMES, TABLE, TAKEN, Plot, Stage, beside, drawing, lines_at, scene
from dfrot_lab.explore.playground import numbers
from dfrot_lab.explore.shell import Explorer, Job, control
from dfrot_lab.maths import quantizers, theory
from dfrot_lab.maths.quantizers import levels
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import CaptureSpec
from dfrot_lab.show import theme

ANGLE = {"min": 0, "max": 180, "step": 1, "readout_format": ".0f"}
SPIKE = {"min": -0.5, "max": 2, "step": 0.05, "readout_format": ".2f"}
DIMS = [("2 channels", 2), ("3 channels", 3)]
WHOSE = {"options": [("planted", "planted"), ("token 0 of the model", "model")]}
FINE = 0.1  # degrees between points of the error's curve: at whole degrees its zeros are missed
READING = """range <b>{range:.3f}</b> &nbsp; step <b>{step:.3f}</b> &nbsp; error <b>{error:.4f}</b> &nbsp; \
not rotated: {unrotated:.4f} (ratio {change:.2f})<br>the same in every channel: <b>{offset:.0%}</b> of its \
energy, {taken}"""
REASONS = """<b>NR</b>: the spike sets the step; noise below half a step is lost, C\u03c3\u00b2 in all.<br>
<b>RO</b>: the entries become Gaussian, whatever the token was; the largest of C sets the step, and the error
is C step\u00b2/12.<br>
<b>RH</b>: the spike becomes \u00b1m/\u221aC everywhere; only the noise about these two levels is rounded."""
FEW = f"Below {numbers.FEWEST} channels there is no closed form: each entry then moves the step itself."
HEADS = {"low": "least of the seeds", "high": "most", "predicted": "closed form"}
COLOUR = {**theme.COLOURS, "NR": GREY}  # NR's dark grey would be lost on a dark page
GRID = "rgba(128,128,128,0.45)"
LINE = {"color": GRID, "width": 1}
SPOT = {"mode": "markers"}


class Turned(Plot):
    """A token in 2 or 3 channels, its grid (in 3: on the axes and about the token) and its error."""

    def __init__(self, dims: int) -> None:
        flat = dims == 2
        scatter, size, width = (go.Scatter, 11, 3) if flat else (go.Scatter3d, 6, 7)
        blue = {"color": COLOUR["RH"]}
        grid = {"mode": "lines", "line": LINE} if flat else {**SPOT, "marker": {"size": 1.5, "color": GREY}}
        hand = {"mode": "lines+markers", "line": {**blue, "width": width - 1}}
        traces = [
            scatter(name="grid", hoverinfo="skip", **grid),
            scatter(name="not turned", marker={"symbol": "circle-open", "size": size, "color": GREY}, **SPOT),
            scatter(name="turned", marker={"size": [0, size + 1], **blue}, **hand),
            scatter(name="rounded", marker={"symbol": "x", "size": size, "color": COLOUR["RO"]}, **SPOT),
            scatter(name="error", mode="lines", line={"color": theme.MASSIVE_COLOUR, "width": width}),
        ]
        if flat:
            x, y = {"title": "channel 0", "showgrid": False}, {"title": "channel 1", "showgrid": False}
            super().__init__(traces, xaxis=x, yaxis={**y, "scaleanchor": "x"})
        else:
            space = scene("channel 0", "channel 1", "channel 2", aspectmode="cube", uirevision="kept")
            super().__init__(traces, scene=space, margin={"l": 0, "r": 0, "b": 0})

    def draw(self, x: Tensor, y: Tensor, point: Tensor, levels: Tensor) -> None:
        """The token x (2 or 3,), turned to y and rounded to `point`, on the grid of `levels`."""
        reach, flat = 1.25 * float(x.norm()), len(x) == 2
        if flat:
            at, along = lines_at(levels, -reach, reach)
            grid = np.concatenate([np.stack([at, along], 1), np.stack([along, at], 1)])
        else:
            above = np.searchsorted(levels.numpy(), y.numpy()).clip(1, len(levels) - 1)
            about = list(product(*(levels[i - 1 : i + 1].tolist() for i in above)))
            grid = np.concatenate([*(np.outer(levels, axis) for axis in np.eye(3)), about])
        parts = [grid, x[None], np.stack([0 * y, y]), point[None], np.stack([y, point])]
        holder = self.layout if flat else self.layout.scene
        with self.batch_update():
            for trace, part in zip(self.data, parts, strict=True):
                trace.update(dict(zip("xyz", np.asarray(part).T, strict=False)))
            for name in "xyz"[: len(x)]:
                holder[f"{name}axis"].range = [-reach, reach]


def swept() -> Plot:
    """The plot of the error at every first angle, and of where the hand is."""
    line = {"line": {"color": COLOUR["DFRot"], "width": 2}, "name": "error at each angle"}
    now = {"marker": {"size": 12, "color": theme.MASSIVE_COLOUR}, "name": "now"}
    x = {"title": "angle 0-1 (degrees)", "range": [0, 180], "dtick": 45}
    y = {"title": "squared error", "rangemode": "tozero"}
    plot = Plot([go.Scatter(mode="lines", **line), go.Scatter(**now, **SPOT)], xaxis=x, yaxis=y)
    plot.add_vline(x=45, line_dash="dot", line_color=GREY, annotation_text="45\u00b0: Hadamard")
    return plot


class Values(Plot):
    """A token's values under NR, RO and RH, one below the other, each on its own grid."""

    def __init__(self) -> None:
        traces, axes = [], dict[str, Any]()
        for i, kind in enumerate(numbers.KINDS):
            axis = {"yaxis": f"y{i + 1}"}
            traces.append(go.Scatter(mode="lines", line=LINE, hoverinfo="skip", **axis))
            traces.append(go.Bar(marker={"color": COLOUR[kind], "line": {"width": 0}}, name=kind, **axis))
            place = {"domain": [0.69 - 0.345 * i, 0.98 - 0.335 * i], "title": {"text": kind}}
            axes[f"yaxis{i + 1}"] = {**place, "showgrid": False, "zerolinecolor": GRID, "automargin": True}
        x = {"title": "channel (lines: the grid; seed 0)", "anchor": "y3"}
        super().__init__(traces, bargap=0, showlegend=False, xaxis=x, **axes)

    def draw(self, turned: Mapping[str, Tensor], levels: Mapping[str, Tensor]) -> None:
        """The token (channels,) and the grid's levels under each kind."""
        with self.batch_update():
            for grid, bars, kind in zip(self.data[::2], self.data[1::2], numbers.KINDS, strict=True):
                channels = len(turned[kind])
                grid.y, grid.x = lines_at(levels[kind], -0.5, channels - 0.5)
                bars.x, bars.y = np.arange(channels), turned[kind].numpy()
            self.layout.xaxis.range = [-0.5, channels - 0.5]


def compared() -> Plot:
    """The plot of the error of each matrix, and of the closed form's."""
    dash = {"symbol": "line-ew", "size": 44, "line": {"width": 3, "color": theme.MASSIVE_COLOUR}}
    found = {"marker": {"size": 10, "opacity": 0.75}, "name": "measured, a point a seed"}
    y = {"title": "squared error of the token", "rangemode": "tozero"}
    traces = [go.Scatter(**found, **SPOT), go.Scatter(marker=dash, name="closed form", **SPOT)]
    return Plot(traces, xaxis={"title": "rotation", "type": "category", "range": [-0.6, 2.6]}, yaxis=y)


class _State(HasTraits):
    snr = control(Float(8.0, min=0.1), widgets.FloatLogSlider, "Spike / noise", 340, **SPIKE)
    seed = control(Int(0, min=0), widgets.BoundedIntText, "Noise seed", 180, min=0, max=10**6)
    bits = control(Int(4, min=2, max=8), widgets.IntSlider, "Bits", 260, min=2, max=8)
    symmetric = control(Bool(True), widgets.Checkbox, "Symmetric grid", indent=False)
    dims = control(Enum((2, 3), 2), widgets.ToggleButtons, "Turn in", options=DIMS)
    angle = control(Float(0.0), widgets.FloatSlider, "Angle 0-1", 340, **ANGLE)
    angle_02 = control(Float(0.0), widgets.FloatSlider, "Angle 0-2", 340, **ANGLE)
    angle_12 = control(Float(0.0), widgets.FloatSlider, "Angle 1-2", 340, **ANGLE)
    source = control(Enum(("planted", "model"), "planted"), widgets.ToggleButtons, "Spike", 160, **WHOSE)
    channels = control(Enum((4, 16, 64, 576), 576), widgets.Dropdown, "Channels")

    @property
    def quantizer(self) -> QuantSpec:
        return QuantSpec(bits=self.bits, scheme=SCHEMES[self.symmetric])

    @property
    def degrees(self) -> list[float]:
        return [self.angle] if self.dims == 2 else [self.angle, self.angle_02, self.angle_12]

    @property
    def token(self) -> Tensor:
        return numbers.hand_token(self.snr, self.dims, self.seed)


class Playground(Explorer):
    """A spike turned by hand in 2 or 3 channels; then by RO and RH, as is token 0 of the capture `spec`."""

    def __init__(self, spec: CaptureSpec | None = None, store: Store | None = None) -> None:
        super().__init__(_State())
        self.spec, self.store, self.model_name = spec or CaptureSpec(), store, ""
        self.model_token: Tensor | None = None
        self.hand, self.space, self.sweep = Turned(2), Turned(3), swept()
        self.values, self.errors, self.stage = Values(), compared(), Stage(self.hand)
        self.read, self.why = (widgets.HTML(layout={"min_height": high}) for high in ("56px", "130px"))
        first = widgets.HTML("<b>1. By hand:</b> turn the token, watch its grid")
        second = widgets.HTML("<b>2. Many channels:</b> the same spike, turned by matrices")
        angles = self.row("dims", "angle", "angle_02", "angle_12")
        hand = [first, angles, beside(self.stage, self.sweep), self.read]
        many = [second, self.row("source", "channels"), beside(self.values, self.errors), self.why]
        self.children = [self.row("snr", "seed", "bits", "symmetric"), *hand, *many, self.status.line]
        self.on("dims angle angle_02 angle_12 snr seed bits symmetric", self._turn)
        self.on("channels snr seed bits symmetric", self._spread)
        self.on("source", self._choose)
        self._turn()
        self._spread()

    def reading(self) -> dict[str, float]:
        """Range, step, error and the unrotated error of the token turned by hand."""
        state = self.state
        return numbers.reading(state.token, numbers.by_angles(state.degrees), state.quantizer)

    def token(self) -> Tensor:
        """The token of the second part (channels,): planted, or the model's own."""
        if self.state.source == "model" and self.model_token is not None:
            return self.model_token
        return numbers.planted_token(self.state.snr, self.state.channels, self.state.seed)

    def table(self) -> pd.DataFrame:
        """The second part: one row a rotation, measured beside the closed form (`numbers.why`)."""
        x, quantizer = self.token(), self.state.quantizer
        predicted: Any = numbers.expected(self.state.snr, len(x), quantizer)
        if x is self.model_token:  # its largest entries are the spikes, the rest is the noise
            predicted = theory.predict(x[None], quantizer, spikes=numbers.SPIKES).iloc[0].to_dict()
        return numbers.why(numbers.measured(x, quantizer), predicted)

    def static(self) -> Figure:
        """Both parts as a matplotlib figure: error against the angle, errors by rotation."""
        state, table = self.state, self.table()
        line = numbers.sweep(state.token, state.degrees, state.quantizer, FINE)
        kinds = table["rotation"]
        with drawing(2) as (figure, (left, right)):
            left.plot(line["angle"], line["error"], c=theme.COLOURS["DFRot"])
            left.axvline(state.angle % 180, ls="--", c="#333333", lw=1)
            left.set(xlabel="angle (degrees)", ylabel="squared error", title=f"{state.dims} channels")
            right.bar(kinds, table["measured"], color=kinds.map(theme.COLOURS))
            right.plot(kinds, table["predicted"], ls="", marker="_", ms=28, mew=2, c="k", label="closed form")
            right.set(ylabel="squared error", title=f"{len(self.token())} channels")
            right.legend()
        return figure

    def _turn(self) -> None:
        state, x, found = self.state, self.state.token, self.reading()
        flat = state.dims == 2
        for name in ("angle_02", "angle_12"):
            self.controls[name].disabled = flat
        shown = self.hand if flat else self.space
        y = x @ numbers.by_angles(state.degrees)
        shown.draw(x, y, quantizers.fake_quantize(y[None], state.quantizer)[0], levels(y, state.quantizer))
        self.stage.turn(shown)
        line = numbers.sweep(x, state.degrees, state.quantizer, FINE)
        self.sweep.put({"x": line["angle"], "y": line["error"]}, {"x": [state.angle], "y": [found["error"]]})
        change = found["error"] / found["unrotated"] if found["unrotated"] else math.nan
        self.read.value = READING.format(**found, change=change, taken=TAKEN[state.symmetric])

    def _spread(self) -> None:
        x, quantizer, table = self.token(), self.state.quantizer, self.table()
        own = x is self.model_token
        self.controls["channels"].disabled = own
        turned = {kind: x @ numbers.matrix(kind, 0, len(x)) for kind in numbers.KINDS}
        self.values.draw(turned, {kind: levels(y, quantizer) for kind, y in turned.items()})
        found = numbers.measured(x, quantizer)
        points = {"x": found["rotation"], "y": found["error"], "text": [f"seed {n}" for n in found["seed"]]}
        points["marker"] = {"color": found["rotation"].map(COLOUR).tolist()}
        self.errors.put(points, {"x": table["rotation"], "y": table["predicted"]})
        shown = table.rename(columns=HEADS).to_html(na_rep="none", float_format="{:.3f}".format, **TABLE)
        about = html.escape(self.model_name if own else f"a planted spike in {len(x)} channels")
        words = f"<div>Why ({about}):<br>{REASONS}<br>{FEW if table['predicted'].isna().any() else ''}</div>"
        self.why.value = f'<div style="display:flex;gap:24px;flex-wrap:wrap">{shown}{words}</div>'

    def _choose(self) -> None:
        """The model's spike is opened in the background at the first look."""
        if self.state.source == "planted" or self.model_token is not None:
            self._spread()
        elif not self.job.running:
            self.work("opening the model's activations (recorded first where the store has none)", self._open)

    def _open(self, _job: Job) -> None:
        recorded = capture(self.spec, self.store)
        site = recorded.sites[len(recorded.sites) // 2]
        self.model_name = f"token 0, {theme.visible(recorded.texts[0])}, at {site}"
        self.model_token = recorded.rows(site)[0].double()

    def _at_end(self, error: BaseException | None) -> str:
        if error is not None:
            self.state.source = "planted"
            return ""
        self._spread()
        return f"The model's spike: {self.model_name}"
