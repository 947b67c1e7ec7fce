"""The playground's five plots."""

from collections.abc import Mapping
from itertools import product

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from torch import Tensor

from dfrot_lab.explore.playground.numbers import KINDS
from dfrot_lab.explore.shell.plot import GREY, Plot, lines_at, scene
from dfrot_lab.show.theme import COLOURS, MASSIVE_COLOUR

COLOUR = {**COLOURS, "NR": GREY}
"""NR's dark grey would be lost on a dark page."""
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
            scatter(name="error", mode="lines", line={"color": MASSIVE_COLOUR, "width": width}),
        ]
        if flat:
            super().__init__(traces)
            self.update_xaxes(title="channel 0", showgrid=False)
            self.update_yaxes(title="channel 1", showgrid=False, scaleanchor="x")
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


class Swept(Plot):
    """The error at every first angle, and where the hand is."""

    def __init__(self) -> None:
        line = {"line": {"color": COLOUR["DFRot"], "width": 2}, "name": "error at each angle"}
        now = {"marker": {"size": 12, "color": MASSIVE_COLOUR}, "name": "now"}
        super().__init__([go.Scatter(mode="lines", **line), go.Scatter(**now, **SPOT)])
        self.add_vline(x=45, line_dash="dot", line_color=GREY, annotation_text="45\u00b0: Hadamard")
        self.update_xaxes(title="angle 0-1 (degrees)", range=[0, 180], dtick=45)
        self.update_yaxes(title="squared error", rangemode="tozero")

    def draw(self, table: pd.DataFrame, angle: float, error: float) -> None:
        """The table of `numbers.sweep`, and the angle and error of now."""
        line, now = self.data
        with self.batch_update():
            line.x, line.y = table["angle"], table["error"]
            now.x, now.y = [angle], [error]


class Values(Plot):
    """A token's values under NR, RO and RH, one below the other, each on its own grid."""

    def __init__(self) -> None:
        traces, axes = [], {}
        for i, kind in enumerate(KINDS):
            axis = {"yaxis": f"y{i + 1}"}
            bars = {"color": COLOUR[kind], "line": {"width": 0}}
            traces.append(go.Scatter(mode="lines", line=LINE, hoverinfo="skip", **axis))
            traces.append(go.Bar(marker=bars, name=kind, **axis))
            place = {"domain": [0.69 - 0.345 * i, 0.98 - 0.335 * i], "title": {"text": kind}}
            axes[f"yaxis{i + 1}"] = {**place, "showgrid": False, "zerolinecolor": GRID, "automargin": True}
        super().__init__(traces, bargap=0, showlegend=False)
        self.update_layout(axes)
        self.update_xaxes(title="channel (lines: the grid; seed 0)", anchor="y3")

    def draw(self, turned: Mapping[str, Tensor], levels: Mapping[str, Tensor]) -> None:
        """The token (channels,) and the grid's levels under each kind."""
        with self.batch_update():
            for grid, bars, kind in zip(self.data[::2], self.data[1::2], KINDS, strict=True):
                channels = len(turned[kind])
                grid.y, grid.x = lines_at(levels[kind], -0.5, channels - 0.5)
                bars.x, bars.y = np.arange(channels), turned[kind].numpy()
            self.layout.xaxis.range = [-0.5, channels - 0.5]


class Errors(Plot):
    """The error of each matrix, and the closed form's."""

    def __init__(self) -> None:
        dash = {"symbol": "line-ew", "size": 44, "line": {"width": 3, "color": MASSIVE_COLOUR}}
        found = {"marker": {"size": 10, "opacity": 0.75}, "name": "measured, a point a seed"}
        super().__init__([go.Scatter(**found, **SPOT), go.Scatter(marker=dash, name="closed form", **SPOT)])
        self.update_xaxes(title="rotation", type="category", range=[-0.6, 2.6])
        self.update_yaxes(title="squared error of the token", rangemode="tozero")

    def draw(self, found: pd.DataFrame, table: pd.DataFrame) -> None:
        """The tables of `numbers.measured` and `numbers.why`."""
        measured, predicted = self.data
        seeds = [f"seed {seed}" for seed in found["seed"]]
        with self.batch_update():
            measured.update(x=found["rotation"], y=found["error"], text=seeds)
            measured.marker.color = found["rotation"].map(COLOUR).tolist()
            predicted.update(x=table["rotation"], y=table["predicted"])
