"""Losses and distance step by step, the histogram of one token's entries, and which rows are watched."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from dfrot_lab.explore.page import AXIS, Plot, levels, lines_at
from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.specs import QuantSpec
from dfrot_lab.show.markup import visible
from dfrot_lab.show.theme import COLOURS, MASSIVE_COLOUR, ORDINARY_COLOUR

WATCHED = 4096
"""Rows the losses are drawn of at every step; the refinement's own checks are on all its rows."""
MASSIVE_ONES, OTHERS = 8, 4
"""Tokens offered: those with the largest value in the residual stream, and some ordinary ones."""
BINS = 60


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


def choices(recorded: Capture, site: str) -> list[tuple[str, int]]:
    """Tokens of a site worth a look, as (label, position), the most massive first."""
    largest, texts = recorded.residual_max[recorded.place(site)], recorded.texts
    top = largest.argsort(descending=True)[:MASSIVE_ONES].tolist()
    even = torch.linspace(0, recorded.tokens - 1, OTHERS + 2).long().tolist()[1:-1]
    places = dict.fromkeys([*top, *even])
    return [(f"{i}: {visible(texts[i])}  (residual |max| {float(largest[i]):.0f})", i) for i in places]


class HistoryPlot(Plot):
    """Mean squared error of massive and ordinary rows (log axis); below it, how far R is from its start."""

    def __init__(self) -> None:
        solid, dots = {"width": 2, "dash": "solid"}, {"mode": "lines+markers", "marker": {"size": 4}}
        ordinary, massive = (
            {"color": ORDINARY_COLOUR, "width": 2, "dash": "dot"},
            {"color": MASSIVE_COLOUR, **solid},
        )
        below = {"line": {"color": COLOURS["DFRot"], **solid}, "yaxis": "y2", "showlegend": False}
        traces = [
            go.Scatter(dots, line=ordinary, name="ordinary rows"),
            go.Scatter(dots, line=massive, name="massive rows"),
            go.Scatter(mode="lines", name="distance", **below),
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
            title = f"entry of the token (error {first:.2f} at the start, {last:.2f} now)"
            self.layout.xaxis.update(range=[-reach, reach], title={"text": title})
