"""Tokens in the plane or in space, and one token's values over the quantization grid."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from dfrot_lab.explore import page
from dfrot_lab.maths.quantizers import levels
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.show import theme

AXES = ("", "2", "3", "4", "5", "6")  # of the panels of Fig. 4, as plotly numbers them
PANEL_HEIGHT = 320
SCALE = [[0, theme.ORDINARY_COLOUR], [1, theme.MASSIVE_COLOUR]]
MARKER: dict[str, Any] = {"colorscale": SCALE, "cmin": 0, "cmax": 1, "opacity": 0.75, "line": {"width": 0}}


def grids(values: pd.DataFrame, quantizer: QuantSpec) -> dict[str, np.ndarray]:
    """The levels of each rotation's grid for one token's `errors.massive_values`."""
    parts = values.groupby("rotation", sort=False)["value"]
    return {str(n): levels(torch.tensor(part.to_numpy()), quantizer).numpy() for n, part in parts}


class Tokens(page.Plot):
    """A point a token: its errors under two rotations, or three in space, one in a ring. A click tells
    `("token", it)`; a brushed region `("brushed", tokens)`, none when it is taken away."""

    def __init__(self, texts: Sequence[str], tell: Callable[..., object], *, space: bool = False) -> None:
        look = {"mode": "markers", "text": page.contexts(texts), "marker": MARKER, "showlegend": False}
        line = {"color": page.GREY, "dash": "dash", "width": 1}
        equal = go.Scatter(mode="lines", line=line, hoverinfo="skip", name="equal errors")
        ring: dict[str, Any] = {"mode": "markers", "hoverinfo": "skip", "showlegend": False}
        ring["marker"] = {
            "symbol": "circle-open",
            "size": 18,
            "line": {"width": 3},
            "color": theme.PICKED_COLOUR,
        }
        if space:
            traces = [go.Scatter3d(look), go.Scatter3d(ring)]
            super().__init__(traces, scene=page.scene(), margin=page.EDGE_TO_EDGE)
        else:
            super().__init__([go.Scattergl(look), equal, go.Scatter(ring)], dragmode="select")
        self._sizes, dots = (2.5, 6) if space else (5, 11), self.data[0]
        dots.on_click(lambda _trace, at, _keys: at.point_inds and tell("token", at.point_inds[0]))
        dots.on_selection(lambda _trace, at, _region: tell("brushed", sorted(at.point_inds)))
        dots.on_deselect(lambda _trace, _at: tell("brushed", []))

    def pick(self, token: int) -> None:
        """Put the ring about a token."""
        dots = self.data[0]
        self.data[-1].update({axis: [float(dots[axis][token])] for axis in "xyz" if axis in dots})

    def draw(self, table: pd.DataFrame, axes: Sequence[str], names: Sequence[str], token: int) -> None:
        """The errors of a table (token, massive, a column each of `names`), an axis a rotation; the ring."""
        heavy = table["massive"].to_numpy()
        found = dict(zip("xyz", table[list(axes)].to_numpy(np.float32).T, strict=False))
        plain = [theme.title(name).replace("%", "&#37;") for name in names]  # %{ would begin a value
        lines = [f"E({name}) %{{customdata[{i}]:,.4g}}" for i, name in enumerate(plain)]
        hover = "%{text}<br>token %{pointNumber}<br>" + "<br>".join(lines) + "<extra></extra>"
        named = zip(found, axes, strict=True)
        titles = {f"{letter}axis": {"title": {"text": f"E({theme.title(axis)})"}} for letter, axis in named}
        with self.batch_update():
            about = table[list(names)].to_numpy(np.float32)
            self.data[0].update(**found, customdata=about, hovertemplate=hover)
            sizes = np.where(heavy, self._sizes[1], self._sizes[0]).astype(np.float32)
            self.data[0].marker.update(size=sizes, color=heavy.astype(np.float32))
            self.update_layout(titles if len(axes) == 2 else {"scene": titles})
            self.data[-1].update({axis: [float(value[token])] for axis, value in found.items()})
            if len(axes) == 2:
                end = float(min(found["x"].max(), found["y"].max()))
                self.data[1].update(x=[0, end], y=[0, end])


class Panels(page.Plot):
    """Fig. 4: one token before (across) and after quantization (up) under each rotation, over its grid."""

    def __init__(self) -> None:
        line, dots = {"color": "rgba(128,128,128,0.6)", "width": 1}, {"size": 5, "opacity": 0.7}
        hover = "channel %{pointNumber}<br>value %{x:.4g}<br>quantized %{y:.4g}<extra></extra>"
        bare = {**page.AXIS, "showgrid": False, "zeroline": False, "visible": False}
        above = {"text": "", "showarrow": False, "x": 0.5, "y": 1.02, "yanchor": "bottom"}
        traces, titles, layout = [], [], dict[str, Any]()
        for n in AXES:
            x, y = f"x{n}", f"y{n}"
            traces.append(go.Scatter(mode="lines", line=line, hoverinfo="skip", xaxis=x, yaxis=y))
            traces.append(go.Scatter(mode="markers", marker=dots, hovertemplate=hover, xaxis=x, yaxis=y))
            layout |= {f"xaxis{n}": {**bare, "anchor": y}, f"yaxis{n}": {**bare, "anchor": x}}
            titles.append({**above, "xref": f"{x} domain", "yref": f"{y} domain"})
        margin = {"t": 64}
        super().__init__(traces, PANEL_HEIGHT, showlegend=False, annotations=titles, margin=margin, **layout)
        self._names: list[str] = []

    def draw(self, values: pd.DataFrame, quantizer: QuantSpec) -> None:
        """One token's `errors.massive_values` of as many rotations as AXES at most."""
        levels = grids(values, quantizer)
        with self.batch_update():
            if list(levels) != self._names:
                self._arrange(list(levels))
            for i, name in enumerate(levels):
                part = values[values["rotation"] == name]
                value, quantized = part["value"].to_numpy(), part["quantized"].to_numpy()
                up, across = page.lines_at(levels[name], value.min(), value.max())
                self.data[2 * i].update(x=across, y=up)
                self.data[2 * i + 1].update(x=value, y=quantized)
                error = float(((value - quantized) ** 2).sum())
                self.layout.annotations[i].text = f"{theme.title(name)}: E = {error:.3g}"

    def _arrange(self, names: list[str]) -> None:
        """As many panels side by side as there are names; the rest empty and out of sight."""
        self._names, wide, colours = names, 1 / len(names), theme.looks(names)["palette"]
        for i, number in enumerate(AXES):
            used = i < len(names)
            domain = [i * wide + 0.03, (i + 1) * wide - 0.02] if used else [0, 1]
            self.layout[f"xaxis{number}"].update(domain=domain, visible=used, title={"text": "value"})
            self.layout[f"yaxis{number}"].update(visible=used, title={"text": "" if i else "quantized value"})
            if used:
                self.data[2 * i + 1].marker.color = colours[names[i]]
                continue
            self.layout.annotations[i].text = ""
            for trace in self.data[2 * i : 2 * i + 2]:
                trace.update(x=[], y=[])
