"""The refinement explorer's two plots: losses and distance step by step, and the histogram of one token's
entries.
"""

import numpy as np
import pandas as pd
from torch import Tensor

from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.recipe.specs import QuantSpec

from . import base
from .shell.offers import levels

BINS = 60


class HistoryPlot:
    """Mean squared error of massive and of normal rows (log axis), and below it how far R is from its start."""

    def __init__(self) -> None:
        self.plot = base.figure()
        dash = {"normal": "dot", "massive": "solid"}
        for name, colour in (("normal", base.ORDINARY_COLOUR), ("massive", base.MASSIVE_COLOUR)):
            line = {"color": colour, "width": 2, "dash": dash[name]}
            self.plot.add_scatter(mode="lines+markers", marker={"size": 4}, line=line, name=f"{name} rows")
        self.plot.add_scatter(
            mode="lines",
            line={"color": base.COLOURS["DFRot"], "width": 2},
            name="distance",
            yaxis="y2",
            showlegend=False,
        )
        look = {"gridcolor": "rgba(128,128,128,0.25)", "automargin": True}
        self.plot.update_layout(
            yaxis={**look, "domain": [0.42, 1], "type": "log", "title": "mean squared error"},
            yaxis2={**look, "domain": [0, 0.32], "title": "distance", "rangemode": "tozero"},
        )
        self.plot.update_xaxes(title="step", anchor="y2", rangemode="tozero")

    def draw(self, table: pd.DataFrame) -> None:
        """The explorer's table: step, normal, massive, distance."""
        with self.plot.batch_update():
            for trace, name in zip(self.plot.data, ("normal", "massive", "distance"), strict=True):
                trace.x, trace.y = table["step"].to_numpy(), table[name].to_numpy(dtype=float)


class EntriesPlot:
    """How the entries of one token lie, at the start and now, and the levels of its grid."""

    def __init__(self) -> None:
        self.plot = base.figure(bargap=0)
        self.plot.add_scatter(
            mode="lines",
            line={"color": "rgba(128,128,128,0.5)", "width": 1},
            name="levels now",
            hoverinfo="skip",
        )
        self.plot.add_bar(marker={"color": base.COLOURS["DFRot"], "line": {"width": 0}}, name="x R now")
        self.plot.add_scatter(
            mode="lines",
            line={"color": base.COLOURS["RO"], "shape": "hvh", "width": 2},
            name="x R at the start",
        )
        self.plot.update_xaxes(title="entry of the token")
        self.plot.update_yaxes(title="channels", rangemode="tozero")

    def draw(self, start: Tensor, now: Tensor, quantizer: QuantSpec) -> None:
        """The token's entries (channels,) at the start and now, and the quantizer whose grid is drawn."""
        reach = 1.2 * float(start.abs().max())
        edges = np.linspace(-reach, reach, BINS + 1)
        centres = (edges[1:] + edges[:-1]) / 2
        counts = [np.histogram(np.clip(y.numpy(), -reach, reach), edges)[0] for y in (start, now)]
        grid = levels(now, quantizer).tolist()
        top = 1.05 * float(max(map(max, counts)))
        before, after = (float(squared_error(y[None], quantizer)) for y in (start, now))
        with self.plot.batch_update():
            lines, bars, steps = self.plot.data
            lines.x, lines.y = [v for level in grid for v in (level, level, None)], [0, top, None] * len(grid)
            bars.x, bars.y = centres, counts[1]
            steps.x, steps.y = centres, counts[0]
            self.plot.layout.xaxis.range = [-reach, reach]
            self.plot.layout.xaxis.title.text = (
                f"entry of the token (error {before:.2f} at the start, {after:.2f} now)"
            )
