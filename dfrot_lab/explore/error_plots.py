"""The errors explorer's plots: tokens in the plane or in space, and one token's values over the quantization
grid; data change in place.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from . import base
from .error_rows import is_massive
from .parts import contexts

PANELS = 6
"""Panels of Fig. 4 at most."""
TWO_COLOURS = [[0, base.ORDINARY_COLOUR], [1, base.MASSIVE_COLOUR]]
PANEL_HEIGHT = 320


class Scatter:
    """A point a token. `on_click(token)` and `on_brush(tokens)` are called when a reader does so (brushing in
    the plane alone).
    """

    def __init__(
        self, texts: Sequence[str], on_click: Callable[[int], None], on_brush: Callable[[list[int]], None]
    ) -> None:
        self.contexts = contexts(texts)
        self.plane, self.space = base.figure(dragmode="select"), base.figure()
        marker = {"colorscale": TWO_COLOURS, "cmin": 0, "cmax": 1, "line": {"width": 0}}
        self.plane.add_trace(
            go.Scattergl(mode="markers", text=self.contexts, marker=marker, showlegend=False)
        )
        self.plane.add_trace(
            go.Scatter(
                mode="lines",
                line={"color": base.GREY, "dash": "dash", "width": 1},
                hoverinfo="skip",
                name="equal errors",
            )
        )
        self.space.add_trace(
            go.Scatter3d(mode="markers", text=self.contexts, marker=marker, showlegend=False)
        )
        axis = {"backgroundcolor": "rgba(0,0,0,0)", "gridcolor": "rgba(128,128,128,0.35)", "color": base.GREY}
        self.space.update_layout(
            scene={name: axis for name in ("xaxis", "yaxis", "zaxis")},
            margin={"l": 0, "r": 0, "t": 0, "b": 0},
        )
        for plot in (self.plane, self.space):
            plot.data[0].on_click(
                lambda _trace, points, _state: on_click(points.point_inds[0]) if points.point_inds else None
            )
        self.plane.data[0].on_selection(lambda _trace, points, _region: on_brush(sorted(points.point_inds)))
        self.plane.data[0].on_deselect(lambda _trace, _points: on_brush([]))

    def draw(self, table: pd.DataFrame, axes: Sequence[str], names: Sequence[str]) -> None:
        """The errors of a table (token, massive, a column each of `names`) under two rotations or three."""
        heavy = is_massive(table)
        found = {letter: table[name].to_numpy(np.float32) for letter, name in zip("xyz", axes, strict=False)}
        plot = self.plane if len(axes) == 2 else self.space
        lines = [f"E({name}) %{{customdata[{i}]:,.4g}}" for i, name in enumerate(map(_in_template, names))]
        hover = "%{text}<br>token %{pointNumber}<br>" + "<br>".join(lines) + "<extra></extra>"
        marker = {"color": heavy.astype(np.float32), "opacity": 0.75}
        sizes = np.where(heavy, 11, 5) if len(axes) == 2 else np.where(heavy, 6, 2.5)
        with plot.batch_update():
            plot.data[0].update(
                **found, customdata=table[list(names)].to_numpy(np.float32), hovertemplate=hover
            )
            plot.data[0].marker.update(size=sizes.astype(np.float32), **marker)
            titles = {
                f"{letter}axis": {"title": {"text": f"E({_in_title(name)})"}}
                for letter, name in zip("xyz", axes, strict=False)
            }
            plot.update_layout(**(titles if len(axes) == 2 else {"scene": titles}))
            if len(axes) == 2:
                end = float(min(found["x"].max(), found["y"].max()))
                plot.data[1].update(x=[0, end], y=[0, end])


class Panels:
    """Fig. 4: one token's values before (across) and after quantization (up) under each rotation, over the
    levels of the grid.
    """

    def __init__(self) -> None:
        self.plot = base.figure(PANEL_HEIGHT, showlegend=False)
        self.names: list[str] = []
        axes = {f"{letter}axis": self.plot.layout[f"{letter}axis"].to_plotly_json() for letter in "xy"}
        marks = []
        for n in map(_suffix, range(PANELS)):
            grid = {"showgrid": False, "zeroline": False, "visible": False}
            self.plot.update_layout(
                {
                    f"xaxis{n}": {**axes["xaxis"], **grid, "anchor": f"y{n}"},
                    f"yaxis{n}": {**axes["yaxis"], **grid, "anchor": f"x{n}"},
                }
            )
            where = {"xaxis": f"x{n}", "yaxis": f"y{n}"}
            self.plot.add_trace(
                go.Scatter(
                    mode="lines",
                    line={"color": "rgba(128,128,128,0.6)", "width": 1},
                    hoverinfo="skip",
                    **where,
                )
            )
            hover = "channel %{pointNumber}<br>value %{x:.4g}<br>quantized %{y:.4g}<extra></extra>"
            self.plot.add_trace(
                go.Scatter(mode="markers", marker={"size": 5, "opacity": 0.7}, hovertemplate=hover, **where)
            )
            marks.append(
                {
                    "text": "",
                    "showarrow": False,
                    "xref": f"x{n} domain",
                    "yref": f"y{n} domain",
                    "x": 0.5,
                    "y": 1.02,
                    "yanchor": "bottom",
                }
            )
        self.plot.update_layout(annotations=marks, margin={"t": 64})

    def draw(self, values: pd.DataFrame, levels: Mapping[str, np.ndarray]) -> None:
        """One token's `errors.massive_values`, and each rotation's levels; at most PANELS rotations."""
        names = list(levels)[:PANELS]
        with self.plot.batch_update():
            if names != self.names:
                self._arrange(names)
            for i, name in enumerate(names):
                part = values[values["rotation"] == name]
                value, quantized = part["value"].to_numpy(), part["quantized"].to_numpy()
                self.plot.data[2 * i].update(_rungs(levels[name], value))
                self.plot.data[2 * i + 1].update(x=value, y=quantized)
                self.plot.layout.annotations[
                    i
                ].text = f"{_in_title(name)}: E = {float(((value - quantized) ** 2).sum()):.3g}"

    def _arrange(self, names: list[str]) -> None:
        """As many panels side by side as there are names; the rest empty and out of sight."""
        self.names, wide, axes = names, 1 / max(1, len(names)), {}
        for i in range(PANELS):
            used = i < len(names)
            domain = [i * wide + 0.03, (i + 1) * wide - 0.02] if used else [0, 1]
            axes[f"xaxis{_suffix(i)}"] = {"domain": domain, "visible": used, "title": {"text": "value"}}
            axes[f"yaxis{_suffix(i)}"] = {"visible": used, "title": {"text": "" if i else "quantized value"}}
            self.plot.data[2 * i + 1].update(
                marker={"color": base.COLOURS.get(names[i] if used else "", "#CC79A7")}
            )
            if not used:
                self.plot.layout.annotations[i].text = ""
                for trace in self.plot.data[2 * i : 2 * i + 2]:
                    trace.update(x=[], y=[])
        self.plot.update_layout(axes)


def _suffix(i: int) -> str:
    """How plotly numbers its axes: x, x2, x3, ..."""
    return "" if i == 0 else str(i + 1)


def _rungs(levels: np.ndarray, value: np.ndarray) -> dict[str, np.ndarray]:
    """A line at each level over the width of the values, as one trace with gaps."""
    ends = np.array([value.min(), value.max(), np.nan]) if len(value) else np.empty(0)
    return {"x": np.tile(ends, len(levels)), "y": np.repeat(levels, 3)}


def _in_title(name: str) -> str:
    """A rotation's name, which may be a file's, in a title."""
    return base.safe(name).replace("&quot;", "&#34;")


def _in_template(name: str) -> str:
    """The same in a hover template, where %{ would begin a value."""
    return _in_title(name).replace("%", "&#37;")
