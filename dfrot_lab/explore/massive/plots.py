"""The massive explorer's plots: a heat map, a surface in space and the profile by layer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure

from dfrot_lab.explore.massive.numbers import Look, cells, starts
from dfrot_lab.explore.shell.plot import EDGE_TO_EDGE, GREY, Plot, drawing, packed, scene
from dfrot_lab.explore.shell.words import contexts, label
from dfrot_lab.show.theme import MASSIVE_COLOUR

FLOOR = 0.01
"""Values below this have one colour: the scale is logarithmic."""
LINES = (
    ("top 1", MASSIVE_COLOUR, "solid", "-"),
    ("top 2", "#E69F00", "dash", "--"),
    ("top 3", "#56B4E9", "dashdot", "-."),
    ("median", "#009E73", "dot", ":"),
)
"""Column of a profile, its colour and its dash, in plotly's word and matplotlib's."""
POINT = ["value", "channel", "ratio"]
RATIO = "%{customdata[2]:,.3g} \u00d7 the median<extra></extra>"
ABOUT = f"channel %{{customdata[1]:.0f}}: %{{customdata[0]:,.5g}}<br>{RATIO}"
"""What every point says of itself: POINT is its customdata."""


def logarithm(value: np.ndarray) -> np.ndarray:
    """log10 |value|, nothing below FLOOR, float32."""
    return np.log10(np.maximum(np.abs(value), FLOOR)).astype(np.float32)


class Heat(Plot):
    """The heat map: a column a token, a row a few channels; the marked tokens are diamonds over it."""

    def __init__(self) -> None:
        look: dict[str, Any] = {"hovertemplate": f"%{{x}}<br>{ABOUT}"}
        bar = {"title": {"text": "|x|"}, "thickness": 14}
        marker = {"symbol": "diamond-open", "size": 13, "color": MASSIVE_COLOUR, "line": {"width": 2.5}}
        heat = go.Heatmap(colorscale="Cividis", colorbar=bar, **look)
        marks = go.Scatter(mode="markers", marker=marker, showlegend=False, **look)
        x = {"type": "category", "nticks": 24, "tickangle": -40, "showgrid": False, "title": "token"}
        super().__init__([heat, marks], xaxis=x, yaxis_title="channel")
        self._seen: Look | None = None

    def draw(self, seen: Look, layer: int, marked: pd.DataFrame) -> None:
        """A layer and its marked tokens, at once: plotly cannot draw values over another text's axes."""
        drawn, about = cells(seen, layer), marked[POINT].to_numpy(np.float32)
        with self.batch_update():
            if seen is not self._seen:
                self._new_text(seen)
            self.data[0].update(z=packed(logarithm(drawn[..., 0])), customdata=packed(drawn))
            labels = [self._labels[i] for i in marked["token"]]
            self.data[1].update(x=labels, y=about[:, 1], customdata=about)

    def _new_text(self, seen: Look) -> None:
        """Axes and colours, which change with the text alone."""
        self._seen, self._labels = seen, [f"{i} {label(text)}" for i, text in enumerate(seen.texts)]
        top = np.log10(seen.profile["top 1"].max())
        powers = list(range(int(np.log10(FLOOR)), int(np.ceil(top)) + 1))
        ticks = {"tickvals": powers, "ticktext": [f"{10.0**power:,g}" for power in powers]}
        rows = starts(*seen.streams[0].shape)
        self.data[0].update(x=self._labels, y=rows, zmin=powers[0], zmax=powers[-1], colorbar=ticks)
        ends = [-0.5, len(self._labels) - 0.5]
        self.update_xaxes(categoryorder="array", categoryarray=self._labels, range=ends)


class Space(Plot):
    """The same in space, heights not logarithmic: a surface, the marked tokens on it as points."""

    def __init__(self) -> None:
        look: dict[str, Any] = {"hovertemplate": f"%{{text}}<br>token %{{x}}<br>{ABOUT}"}
        marker = {"symbol": "diamond", "size": 5, "color": MASSIVE_COLOUR}
        surface = go.Surface(colorscale="Cividis", showscale=False, **look)
        marks = go.Scatter3d(mode="markers", marker=marker, showlegend=False, **look)
        shape = {"aspectmode": "manual", "aspectratio": {"x": 2, "y": 1, "z": 0.8}}
        view = scene("token", "channel", "|x|", camera={"eye": {"x": 1.0, "y": -2.5, "z": 0.9}}, **shape)
        super().__init__([surface, marks], scene=view, margin=EDGE_TO_EDGE)
        self._seen: Look | None = None

    def draw(self, seen: Look, layer: int, marked: pd.DataFrame) -> None:
        """As the heat map's."""
        drawn, about = cells(seen, layer), marked[POINT].to_numpy(np.float32)
        height, top = np.abs(drawn[..., 0]), np.abs(about[:, 0])
        down = {"type": "data", "symmetric": False, "array": np.zeros_like(top), "arrayminus": top}
        stems = {**down, "width": 0, "thickness": 4, "color": MASSIVE_COLOUR}
        with self.batch_update():
            if seen is not self._seen:
                self._new_text(seen)
            colour = packed(logarithm(height))
            self.data[0].update(z=packed(height), surfacecolor=colour, customdata=packed(drawn))
            names = [self._contexts[i] for i in marked["token"]]
            place = {"x": marked["token"].tolist(), "y": about[:, 1], "z": top}
            self.data[1].update(**place, customdata=about, text=names, error_z=stems)

    def _new_text(self, seen: Look) -> None:
        """Axes and token names, which change with the text alone."""
        self._seen, self._contexts = seen, contexts(seen.texts)
        rows, count = starts(*seen.streams[0].shape), np.arange(len(seen.texts))
        ticks, names = count[:: max(1, len(count) // 12)], [label(text) for text in seen.texts]
        self.data[0].update(x=count.astype(np.float32), y=rows, text=[names] * len(rows))
        axis = {"tickvals": ticks, "ticktext": [f"{i} {names[i]}" for i in ticks]}
        self.update_layout(scene_xaxis=axis)


class Profile(Plot):
    """The largest three |x| and the median by layer, and the layer shown; a click calls `go_to(layer)`."""

    def __init__(self, go_to: Callable[[int], None]) -> None:
        here = {
            "mode": "lines",
            "line": {"color": GREY, "width": 1},
            "hoverinfo": "skip",
            "showlegend": False,
        }
        traces = [go.Scatter(here)]
        for name, colour, dash, _ in LINES:
            hover = "layer %{x}<br>%{y:,.5g}<extra>" + name + "</extra>"
            style = {"line": {"color": colour, "dash": dash}, "marker": {"size": 5}, "mode": "lines+markers"}
            traces.append(go.Scatter(name=name, hovertemplate=hover, **style))
        y = {"type": "log", "exponentformat": "power", "title": "|x|"}
        super().__init__(traces, xaxis_title="layer", yaxis=y)
        for line in self.data[1:]:
            line.on_click(lambda _trace, points, _state: go_to(int(points.xs[0])) if points.xs else None)

    def draw(self, lines: pd.DataFrame, layer: int) -> None:
        """The lines of a look's profile, and where the reader stands."""
        ends = [max(float(lines["median"].min()) / 2, FLOOR), float(lines["top 1"].max()) * 2]
        with self.batch_update():
            self.data[0].update(x=[layer, layer], y=ends)
            for trace in self.data[1:]:
                trace.update(x=lines["layer"].to_numpy(), y=lines[trace.name].to_numpy())


def static(seen: Look, layer: int, marked: pd.DataFrame, rule: str) -> Figure:
    """The same as a matplotlib figure: log10 |x| with the marked tokens, and the profile by layer."""
    size: dict[str, Any] = {"size": (11, 4), "layout": "constrained", "width_ratios": (2, 1)}
    with drawing(2, **size) as (drawn, (left, right)):
        tokens, channels = seen.streams[layer].shape
        edges = (-0.5, tokens - 0.5, channels - 0.5, -0.5)
        heights = logarithm(cells(seen, layer)[..., 0])
        image = left.imshow(heights, aspect="auto", cmap="cividis", extent=edges)
        left.grid(visible=False)
        left.set(xlabel="token", ylabel="channel", title=f"log10 |residual stream| before layer {layer}")
        hollow = {"marker": "D", "facecolors": "none", "edgecolors": MASSIVE_COLOUR}
        left.scatter(marked["token"], marked["channel"], label=f"massive by {rule}", **hollow)
        left.legend(loc="upper right", fontsize=8)
        drawn.colorbar(image, ax=left)
        for name, colour, _, dash in LINES:
            right.plot(seen.profile["layer"], seen.profile[name], c=colour, ls=dash, label=name)
        right.axvline(layer, c=GREY, lw=1)
        right.set(yscale="log", xlabel="layer", ylabel="|residual stream|")
        right.legend(fontsize=8)
    return drawn
