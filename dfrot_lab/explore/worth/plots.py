"""The worth explorer's plot: perplexities as bars, ours and the paper's alike."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dfrot_lab.explore.shell.offers import BITS, FULL, methods
from dfrot_lab.explore.shell.plot import CLEAR, GREY, Plot
from dfrot_lab.explore.shell.words import plain
from dfrot_lab.explore.worth.numbers import DIFFERENCE, interval
from dfrot_lab.show.figures import FAR
from dfrot_lab.show.theme import COLOURS

DOTTED = {"dash": "dot", "color": GREY, "width": 1.5}


class Bars(Plot):
    """A trace for each rotation, filled, and hollow with massive tokens kept out."""

    def __init__(self) -> None:
        error: dict[str, Any] = {"type": "data", "symmetric": False, "color": GREY}
        text = {"textposition": "inside", "textangle": -90, "insidetextanchor": "start"}
        look = {**text, "error_y": error, "visible": False, "hovertemplate": "%{customdata}<extra></extra>"}
        bars = []
        for name in methods():
            colour = COLOURS.get(name, GREY)
            line, white = {"color": colour, "width": 2}, {"color": "#ffffff"}
            bars.append(go.Bar(look, name=name, marker={"color": colour, "line": line}, insidetextfont=white))
            hollow = {"marker": {"color": CLEAR, "line": line}, "insidetextfont": {"color": GREY}}
            bars.append(go.Bar(look, name=f"{name}, kept out", **hollow))
        gaps: dict[str, Any] = {"barmode": "group", "bargap": 0.2, "bargroupgap": 0.08, "margin": {"t": 96}}
        title, x = {"y": 0.96, "font": {"size": 13}}, {"type": "category"}
        super().__init__(bars, title=title, xaxis=x, yaxis_title="perplexity", **gaps)

    def draw(self, table: pd.DataFrame, title: str) -> None:
        """The stored rows of `rows_table`; a value far above the best is cut off at the top and written."""
        rows = table[(table["bits"] != FULL) & table["stored"]]
        exact = table.loc[(table["bits"] == FULL) & table["stored"], "perplexity"].tolist()
        near = rows[rows["perplexity"] <= FAR * rows["perplexity"].min()]
        top = 1.08 * float(max([*near["high"].fillna(near["perplexity"]), *exact, 1.0]))
        across = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "line": DOTTED}
        with self.batch_update():
            for trace in self.data:
                _draw_bar(trace, rows[rows["row"] == trace.name], top)
            self.layout.xaxis.categoryarray = [b for b in BITS if b in set(rows["bits"])]
            self.layout.yaxis.range = [0, top]
            self.layout.shapes = [{**across, "y0": y, "y1": y} for y in exact]
            self.layout.title.text = title + "".join(f"<br>dotted: full precision, {y:.2f}" for y in exact)


def _draw_bar(trace: Any, rows: pd.DataFrame, top: float) -> None:
    value, far = rows["perplexity"].to_numpy(), (rows["perplexity"] > top).to_numpy()
    trace.x, trace.y = rows["bits"].tolist(), np.minimum(value, top).tolist()
    trace.error_y.array = np.where(far, 0, np.nan_to_num(rows["high"] - value)).tolist()
    trace.error_y.arrayminus = np.where(far, 0, np.nan_to_num(value - rows["low"])).tolist()
    words = zip(value, far, strict=True)
    trace.text = [f"{v:,.0f}, off the scale" if out else f"{v:.2f}" for v, out in words]
    trace.customdata = [_hover(row) for row in rows.to_dict("records")]
    trace.visible = bool(len(rows))


def _hover(row: Mapping[Any, Any]) -> str:
    found = interval(row["perplexity"], row["low"], row["high"])
    lines = [f"{plain(row['row'])} at {row['bits']}: {found}"]
    if difference := interval(*(row[name] for name in DIFFERENCE)):
        lines.append(f"minus RH: {difference}")
    if row["windows"]:
        lines.append(f"{row['windows']} windows")
    return "<br>".join(lines)
