"""The massive explorer's plots: a heat map, a surface in space and the profile by layer; each changes its
data in place.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from . import base, residual
from .parts import contexts, label, packed
from .residual import FLOOR, Look

ABOUT = "channel %{customdata[1]:.0f}: %{customdata[0]:,.5g}<br>%{customdata[2]:,.3g} \u00d7 the median<extra></extra>"
"""What every point says of itself: value, channel and ratio are its customdata."""
MARKED = ["value", "channel", "ratio"]


def cells(seen: Look, layer: int) -> np.ndarray:
    """What is drawn of a layer, (columns, tokens, 3) float32: value (signed), its channel, its ratio to the
    median.
    """
    value, channel = residual.pooled(seen.layers[layer].x)
    ratio = value.abs() / max(seen.layers[layer].median, residual.TINY)
    return np.stack([x.T.float().numpy() for x in (value, channel, ratio)], axis=-1)


def logarithm(value: np.ndarray) -> np.ndarray:
    """log10 |value|, nothing below FLOOR, float32."""
    return np.log10(np.maximum(np.abs(value), FLOOR)).astype(np.float32)


class Heat:
    """The heat map: a column a token, a row a few channels; the marked tokens are diamonds over it."""

    def __init__(self) -> None:
        self.plot = base.figure(xaxis_title="token", yaxis_title="channel")
        hover = f"%{{x}}<br>{ABOUT}"
        self.plot.add_trace(
            go.Heatmap(
                colorscale="Cividis",
                hovertemplate=hover,
                colorbar={"title": {"text": "|x|"}, "thickness": 14},
            )
        )
        marker = {"symbol": "diamond-open", "size": 13, "color": base.MASSIVE_COLOUR, "line": {"width": 2.5}}
        self.plot.add_trace(go.Scatter(mode="markers", marker=marker, hovertemplate=hover, showlegend=False))
        self.plot.update_xaxes(type="category", nticks=24, tickangle=-40, showgrid=False)
        self.labels: list[str] = []

    def new_text(self, seen: Look, channels: int) -> None:
        """Axes and colours, which change with the text alone."""
        self.labels = [f"{i} {label(text)}" for i, text in enumerate(seen.texts)]
        powers = list(
            range(
                int(np.log10(FLOOR)), int(np.ceil(np.log10(max(max(here.top) for here in seen.layers)))) + 1
            )
        )
        ticks = {"tickvals": powers, "ticktext": [f"{10.0**power:,g}" for power in powers]}
        starts = residual.starts(len(seen.texts), channels)
        with self.plot.batch_update():
            self.plot.data[0].update(x=self.labels, y=starts, zmin=powers[0], zmax=powers[-1], colorbar=ticks)
            self.plot.update_xaxes(
                categoryorder="array", categoryarray=self.labels, range=[-0.5, len(self.labels) - 0.5]
            )

    def draw(self, drawn: np.ndarray, marked: pd.DataFrame) -> None:
        """A layer's `cells`, and its marked tokens (token, value, channel, ratio)."""
        about = marked[MARKED].to_numpy(np.float32)
        with self.plot.batch_update():
            self.plot.data[0].update(z=packed(logarithm(drawn[..., 0])), customdata=packed(drawn))
            self.plot.data[1].update(
                x=[self.labels[i] for i in marked["token"]], y=about[:, 1], customdata=about
            )


class Space:
    """The same in space, heights not logarithmic: a surface, the marked tokens on it as points."""

    def __init__(self) -> None:
        self.plot = base.figure()
        hover = f"%{{text}}<br>token %{{x}}<br>{ABOUT}"
        self.plot.add_trace(go.Surface(colorscale="Cividis", hovertemplate=hover, showscale=False))
        marker = {"symbol": "diamond", "size": 5, "color": base.MASSIVE_COLOUR}
        self.plot.add_trace(
            go.Scatter3d(mode="markers", marker=marker, hovertemplate=hover, showlegend=False)
        )
        axis = {"backgroundcolor": "rgba(0,0,0,0)", "gridcolor": "rgba(128,128,128,0.35)", "color": base.GREY}
        titles = {"xaxis": "token", "yaxis": "channel", "zaxis": "|x|"}
        scene = {name: {**axis, "title": {"text": title}} for name, title in titles.items()}
        view = {
            "camera": {"eye": {"x": 1.0, "y": -2.5, "z": 0.9}},
            "aspectmode": "manual",
            "aspectratio": {"x": 2, "y": 1, "z": 0.8},
        }
        self.plot.update_layout(scene={**scene, **view}, margin={"l": 0, "r": 0, "t": 0, "b": 0})
        self.contexts: list[str] = []

    def new_text(self, seen: Look, channels: int) -> None:
        """Axes and token names, which change with the text alone."""
        self.contexts = contexts(seen.texts)
        starts = residual.starts(len(seen.texts), channels)
        count = np.arange(len(seen.texts))
        ticks = count[:: max(1, len(count) // 12)]
        names = [label(text) for text in seen.texts]
        with self.plot.batch_update():
            self.plot.data[0].update(x=count.astype(np.float32), y=starts, text=[names] * len(starts))
            self.plot.update_layout(
                scene_xaxis={"tickvals": ticks, "ticktext": [f"{i} {names[i]}" for i in ticks]}
            )

    def draw(self, drawn: np.ndarray, marked: pd.DataFrame) -> None:
        """A layer's `cells`, and its marked tokens (token, value, channel, ratio)."""
        about, tokens = marked[MARKED].to_numpy(np.float32), marked["token"].tolist()
        height = np.abs(drawn[..., 0])
        with self.plot.batch_update():
            self.plot.data[0].update(
                z=packed(height), surfacecolor=packed(logarithm(height)), customdata=packed(drawn)
            )
            top, names = np.abs(about[:, 0]), [self.contexts[i] for i in tokens]
            stems = {
                "type": "data",
                "symmetric": False,
                "array": np.zeros_like(top),
                "arrayminus": top,
                "width": 0,
                "thickness": 4,
                "color": base.MASSIVE_COLOUR,
            }
            self.plot.data[1].update(
                x=tokens, y=about[:, 1], z=top, customdata=about, text=names, error_z=stems
            )


class Profile:
    """The largest three |x| and the median by layer, and a line at the layer shown; a click on it calls
    `go_to(layer)`.
    """

    def __init__(self, go_to: Callable[[int], None]) -> None:
        self.plot = base.figure(xaxis_title="layer", yaxis_title="|x|")
        self.plot.update_yaxes(type="log", exponentformat="power")
        self.plot.add_trace(
            go.Scatter(
                mode="lines", line={"color": base.GREY, "width": 1}, hoverinfo="skip", showlegend=False
            )
        )
        for name, colour, dash in residual.LINES:
            hover = "layer %{x}<br>%{y:,.5g}<extra>" + name + "</extra>"
            style = {"line": {"color": colour, "dash": dash}, "marker": {"size": 5}, "mode": "lines+markers"}
            self.plot.add_trace(go.Scatter(name=name, hovertemplate=hover, **style))
        for line in self.plot.data[1:]:
            line.on_click(lambda _trace, points, _state: go_to(int(points.xs[0])) if points.xs else None)
        self.ends = [FLOOR, 1.0]

    def new_text(self, lines: pd.DataFrame) -> None:
        """The lines of a `residual.profile`."""
        self.ends = [max(float(lines["median"].min()) / 2, FLOOR), float(lines["top 1"].max()) * 2]
        with self.plot.batch_update():
            for trace in self.plot.data[1:]:
                trace.update(x=lines["layer"].to_numpy(), y=lines[trace.name].to_numpy())

    def draw(self, layer: int) -> None:
        """Where the reader stands."""
        with self.plot.batch_update():
            self.plot.data[0].update(x=[layer, layer], y=self.ends)
