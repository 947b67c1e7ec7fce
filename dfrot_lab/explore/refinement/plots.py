"""Losses and distance step by step, and the histogram of one token's entries."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure
from torch import Tensor

from dfrot_lab.explore.shell.offers import levels
from dfrot_lab.explore.shell.plot import AXIS, Plot, drawing, lines_at
from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.recipe.specs import QuantSpec
from dfrot_lab.show import figures
from dfrot_lab.show.theme import COLOURS, MASSIVE_COLOUR, ORDINARY_COLOUR

BINS = 60
DISTANCE = "distance from the start, ||R - R0|| / sqrt(C)"


class HistoryPlot(Plot):
    """Mean squared error of massive and ordinary rows (log axis); below it, how far R is from its start."""

    def __init__(self) -> None:
        normal, massive, distance = (
            {"color": colour, "width": 2, "dash": dash}
            for colour, dash in (
                (ORDINARY_COLOUR, "dot"),
                (MASSIVE_COLOUR, "solid"),
                (COLOURS["DFRot"], "solid"),
            )
        )
        dots = {"mode": "lines+markers", "marker": {"size": 4}}
        traces = [
            go.Scatter(dots, line=normal, name="ordinary rows"),
            go.Scatter(dots, line=massive, name="massive rows"),
            go.Scatter(mode="lines", line=distance, name="distance", yaxis="y2", showlegend=False),
        ]
        y = {"domain": [0.42, 1], "type": "log", "title": "mean squared error"}
        y2 = {**AXIS, "domain": [0, 0.32], "title": "distance", "rangemode": "tozero"}
        x = {"title": "step", "anchor": "y2", "rangemode": "tozero"}
        super().__init__(traces, xaxis=x, yaxis=y, yaxis2=y2)

    def draw(self, table: pd.DataFrame) -> None:
        """The explorer's table: step, normal, massive, distance."""
        with self.batch_update():
            for trace, name in zip(self.data, ("ordinary", "massive", "distance"), strict=True):
                trace.update(x=table["step"].to_numpy(), y=table[name].to_numpy(dtype=float))


class EntriesPlot(Plot):
    """How the entries of one token lie, at the start and now, and the levels of its grid."""

    def __init__(self) -> None:
        grid = {"color": "rgba(128,128,128,0.5)", "width": 1}
        start = {"color": COLOURS["RO"], "shape": "hvh", "width": 2}
        traces = [
            go.Scatter(mode="lines", line=grid, name="levels now", hoverinfo="skip"),
            go.Bar(marker={"color": COLOURS["DFRot"], "line": {"width": 0}}, name="x R now"),
            go.Scatter(mode="lines", line=start, name="x R at the start"),
        ]
        y = {"title": "channels", "rangemode": "tozero"}
        super().__init__(traces, bargap=0, xaxis_title="entry of the token", yaxis=y)

    def draw(self, start: Tensor, now: Tensor, quantizer: QuantSpec) -> None:
        """The token's entries (channels,) at the start and now, and the quantizer whose grid is drawn."""
        reach = 1.2 * float(start.abs().max())
        edges = np.linspace(-reach, reach, BINS + 1)
        before, after = (np.histogram(y.clamp(-reach, reach).numpy(), edges)[0] for y in (start, now))
        across, along = lines_at(levels(now, quantizer), 0, 1.05 * float(max(before.max(), after.max())))
        first, last = (float(squared_error(y[None], quantizer)) for y in (start, now))
        with self.batch_update():
            self.data[0].update(x=across, y=along)
            for trace, counts in zip(self.data[1:], (after, before), strict=True):
                trace.update(x=(edges[1:] + edges[:-1]) / 2, y=counts)
            self.layout.xaxis.range = [-reach, reach]
            self.layout.xaxis.title.text = (
                f"entry of the token (error {first:.2f} at the start, {last:.2f} now)"
            )


def static(table: pd.DataFrame) -> Figure:
    """Losses and distance as a matplotlib figure."""
    with drawing(2) as (drawn, (left, right)):
        figures.plot_history(table, ax=left)
        right.plot(table["step"], table["distance"], c=COLOURS["DFRot"])
        right.set(xlabel="step", ylabel=DISTANCE)
    return drawn
