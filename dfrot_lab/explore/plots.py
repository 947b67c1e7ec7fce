"""The playground's five plots: each makes its plotly figure once and changes the data in place."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from torch import Tensor

from . import base

COLOUR = {**base.COLOURS, "NR": base.GREY}
"""NR's dark grey would be lost on a dark page."""
POINT, GRID = base.COLOURS["RH"], "rgba(128,128,128,0.45)"
TURNED, ROUNDED = "turned", "rounded"


def beside(*plots: Any) -> widgets.HBox:
    """Plots beside one another, each an equal part of the page's width, whatever that is, and of fixed
    height.
    """
    share = {"width": f"{100 / len(plots):g}%", "height": f"{base.HEIGHT}px", "overflow": "hidden"}
    return widgets.HBox(
        [widgets.Box([plot], layout=widgets.Layout(**share)) for plot in plots],
        layout=widgets.Layout(width="100%"),
    )


def _lines(places: np.ndarray, low: float, high: float) -> tuple[list[float | None], list[float | None]]:
    """Coordinates of separate lines at `places`, each from low to high: for one trace."""
    at: list[float | None] = []
    along: list[float | None] = []
    for place in places.tolist():
        at += [place, place, None]
        along += [low, high, None]
    return at, along


class HandPlot:
    """Two channels: the token, the lines of its grid, the point it is rounded to, and the error between them."""

    def __init__(self) -> None:
        self.plot = base.figure()
        self.plot.add_scatter(mode="lines", line={"color": GRID, "width": 1}, name="grid", hoverinfo="skip")
        self.plot.add_scatter(
            mode="markers",
            marker={"symbol": "circle-open", "size": 11, "color": base.GREY},
            name="not turned",
        )
        self.plot.add_scatter(
            mode="lines+markers", marker={"size": [0, 12], "color": POINT}, line={"color": POINT}, name=TURNED
        )
        self.plot.add_scatter(
            mode="markers", marker={"symbol": "x", "size": 11, "color": base.COLOURS["RO"]}, name=ROUNDED
        )
        self.plot.add_scatter(mode="lines", line={"color": base.MASSIVE_COLOUR, "width": 3}, name="error")
        self.plot.update_xaxes(title="channel 0", showgrid=False)
        self.plot.update_yaxes(title="channel 1", showgrid=False, scaleanchor="x")

    def draw(self, x: Tensor, y: Tensor, point: Tensor, levels: Tensor) -> None:
        """The token x (2,), turned to y and rounded to `point`, on the grid of `levels`."""
        reach = 1.25 * float(x.norm())
        at, along = _lines(levels.numpy(), -reach, reach)
        (x0, x1), (y0, y1), (p0, p1) = x.tolist(), y.tolist(), point.tolist()
        data = (
            (at + along, along + at),
            ([x0], [x1]),
            ([0, y0], [0, y1]),
            ([p0], [p1]),
            ([y0, p0], [y1, p1]),
        )
        with self.plot.batch_update():
            for trace, (first, second) in zip(self.plot.data, data, strict=True):
                trace.x, trace.y = first, second
            self.plot.layout.xaxis.range = self.plot.layout.yaxis.range = [-reach, reach]


class SpacePlot:
    """Three channels: the same, with the grid's levels on the three axes and the eight grid points about the
    token.
    """

    def __init__(self) -> None:
        self.plot = base.figure()
        self.plot.add_scatter3d(
            mode="markers", marker={"size": 1.5, "color": base.GREY}, name="grid", hoverinfo="skip"
        )
        self.plot.add_scatter3d(
            mode="markers", marker={"symbol": "circle-open", "size": 6, "color": base.GREY}, name="not turned"
        )
        self.plot.add_scatter3d(
            mode="lines+markers",
            marker={"size": [0, 7], "color": POINT},
            line={"color": POINT, "width": 4},
            name=TURNED,
        )
        self.plot.add_scatter3d(
            mode="markers", marker={"symbol": "x", "size": 5, "color": base.COLOURS["RO"]}, name=ROUNDED
        )
        self.plot.add_scatter3d(mode="lines", line={"color": base.MASSIVE_COLOUR, "width": 7}, name="error")
        axis = {"gridcolor": GRID, "zerolinecolor": base.GREY, "showbackground": False, "color": base.GREY}
        scene = {f"{name}axis": {**axis, "title": f"channel {i}"} for i, name in enumerate("xyz")}
        self.plot.update_layout(
            scene={**scene, "aspectmode": "cube", "uirevision": "kept"}, margin={"l": 0, "r": 0, "b": 0}
        )

    def draw(self, x: Tensor, y: Tensor, point: Tensor, levels: Tensor) -> None:
        """The token x (3,), turned to y and rounded to `point`, on the grid of `levels`."""
        reach = 1.25 * float(x.norm())
        grid = np.concatenate([_on_axes(levels), _about(y, levels)])
        parts = [grid, x[None].numpy(), np.stack([0 * y, y]), point[None].numpy(), np.stack([y, point])]
        with self.plot.batch_update():
            for trace, part in zip(self.plot.data, parts, strict=True):
                trace.x, trace.y, trace.z = part[:, 0], part[:, 1], part[:, 2]
            for name in ("xaxis", "yaxis", "zaxis"):
                self.plot.layout.scene[name].range = [-reach, reach]


def _on_axes(levels: Tensor) -> np.ndarray:
    """The levels on each of three axes (3 * levels, 3)."""
    return np.concatenate([np.outer(levels.numpy(), axis) for axis in np.eye(3)])


def _about(y: Tensor, levels: Tensor) -> np.ndarray:
    """The eight grid points about y (3,)."""
    above = np.clip(np.searchsorted(levels.numpy(), y.numpy()), 1, len(levels) - 1)
    return np.array(list(product(*((levels[i - 1].item(), levels[i].item()) for i in above))))


class SweepPlot:
    """The error at every first angle, and where the hand is."""

    def __init__(self) -> None:
        self.plot = base.figure()
        self.plot.add_scatter(
            mode="lines", line={"color": base.COLOURS["DFRot"], "width": 2}, name="error at each angle"
        )
        self.plot.add_scatter(mode="markers", marker={"size": 12, "color": base.MASSIVE_COLOUR}, name="now")
        self.plot.add_vline(x=45, line_dash="dot", line_color=base.GREY, annotation_text="45\u00b0: Hadamard")
        self.plot.update_xaxes(title="angle 0-1 (degrees)", range=[0, 180], dtick=45)
        self.plot.update_yaxes(title="squared error", rangemode="tozero")

    def draw(self, table: pd.DataFrame, angle: float, error: float) -> None:
        """`toy.sweep`'s table, and the angle and error of now."""
        with self.plot.batch_update():
            self.plot.data[0].x, self.plot.data[0].y = table["angle"], table["error"]
            self.plot.data[1].x, self.plot.data[1].y = [angle], [error]


class ValuesPlot:
    """The token's values under NR, RO and RH, one below the other, each on its own grid."""

    KINDS = ("NR", "RO", "RH")

    def __init__(self) -> None:
        self.plot = base.figure(bargap=0, showlegend=False)
        for i, kind in enumerate(self.KINDS):
            axis = "y" if i == 0 else f"y{i + 1}"
            self.plot.add_scatter(
                mode="lines", line={"color": GRID, "width": 1}, hoverinfo="skip", yaxis=axis
            )
            self.plot.add_bar(marker={"color": COLOUR[kind], "line": {"width": 0}}, yaxis=axis, name=kind)
        look = {"gridcolor": "rgba(0,0,0,0)", "zerolinecolor": GRID, "automargin": True}
        places = {
            f"yaxis{i + 1 if i else ''}": {**look, "domain": [0.69 - 0.345 * i, 0.98 - 0.335 * i], "title": k}
            for i, k in enumerate(self.KINDS)
        }
        self.plot.update_layout(**places)
        self.plot.update_xaxes(title="channel (lines: the grid; seed 0)", anchor="y3")

    def draw(self, values: Mapping[str, Tensor], levels: Mapping[str, Tensor]) -> None:
        """Values (channels,) and grid levels of each kind."""
        with self.plot.batch_update():
            for i, kind in enumerate(self.KINDS):
                y = values[kind].numpy()
                grid, bars = self.plot.data[2 * i], self.plot.data[2 * i + 1]
                grid.y, grid.x = _lines(levels[kind].numpy(), -0.5, len(y) - 0.5)
                bars.x, bars.y = np.arange(len(y)), y
            self.plot.layout.xaxis.range = [-0.5, len(y) - 0.5]


class ErrorPlot:
    """The error of each matrix, and the closed form's."""

    def __init__(self) -> None:
        self.plot = base.figure()
        self.plot.add_scatter(
            mode="markers", marker={"size": 10, "opacity": 0.75}, name="measured, a point a seed"
        )
        self.plot.add_scatter(
            mode="markers",
            marker={"symbol": "line-ew", "size": 44, "line": {"width": 3, "color": base.MASSIVE_COLOUR}},
            name="closed form",
        )
        self.plot.update_xaxes(title="rotation", type="category", range=[-0.6, 2.6])
        self.plot.update_yaxes(title="squared error of the token", rangemode="tozero")

    def draw(self, found: pd.DataFrame, table: pd.DataFrame) -> None:
        """`toy.measured`'s table and `toy.why`'s."""
        with self.plot.batch_update():
            self.plot.data[0].x, self.plot.data[0].y = found["rotation"], found["error"]
            self.plot.data[0].marker.color = [COLOUR[kind] for kind in found["rotation"]]
            self.plot.data[0].text = [f"seed {seed}" for seed in found["seed"]]
            self.plot.data[1].x, self.plot.data[1].y = table["rotation"], table["predicted"]
