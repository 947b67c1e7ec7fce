"""The strip of losses: a line a model, a column a token."""

import pandas as pd
import plotly.graph_objects as go
import seaborn
from matplotlib.figure import Figure

from dfrot_lab.explore.shell.plot import GREY, Plot, drawing
from dfrot_lab.explore.shell.words import label

LABELLED = 70
"""Tokens up to which the strip names each one below it."""
ABOUT = ["position", "text", "prompt"]
"""The columns of a table of losses that are no models."""


class Strip(Plot):
    """Each model's loss of each token of one text; the line is where the prompt ends."""

    def __init__(self) -> None:
        hover = "token %{customdata}<br>%{y}: %{z:.2f} nats<extra></extra>"
        bar = {"title": {"text": "loss (nats)"}}
        look = {"colorscale": "Cividis", "zmin": 0, "colorbar": bar, "xgap": 1, "ygap": 2}
        super().__init__([go.Heatmap(hovertemplate=hover, **look)], height=300)
        self.update_yaxes(autorange="reversed", type="category")
        self.update_layout(title={"text": "Loss of each token of one text", "font": {"size": 13}})

    def draw(self, losses: pd.DataFrame) -> None:
        """The table of `Generate.losses`."""
        values = losses.drop(columns=ABOUT)
        x, texts = losses["position"].tolist(), [label(text) for text in losses["text"]]
        about = [f"{place}: {text}" for place, text in zip(x, texts, strict=True)]
        ticks = {"tickmode": "array", "tickvals": x, "ticktext": texts}
        few = len(x) <= LABELLED
        edge = x[0] - 0.5 + int(losses["prompt"].sum())
        line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": GREY, "width": 2}}
        with self.batch_update():
            strip = self.data[0]
            strip.x, strip.y, strip.z = x, list(values), values.to_numpy().T
            strip.zmax, strip.customdata = float(values.to_numpy().max()), [about] * values.shape[1]
            self.layout.xaxis.update(ticks if few else dict.fromkeys(ticks), tickangle=-60)
            self.layout.shapes = [{**line, "x0": edge, "x1": edge}]
            self.layout.title.text = (
                "Loss of each token: the prompt, then (right of the line) what full precision wrote"
            )


def figure_strip(losses: pd.DataFrame) -> Figure:
    """The loss strip in matplotlib."""
    values = losses.set_index("position").drop(columns=["text", "prompt"])
    if values.empty:
        raise ValueError("nothing to draw: nothing is written yet")
    with drawing(size=(10, 0.5 * values.shape[1] + 1.4)) as (figure, (ax,)):
        seaborn.heatmap(values.T, cmap="cividis", vmin=0, cbar_kws={"label": "loss (nats)"}, ax=ax)
        ax.axvline(losses["prompt"].sum(), c="#ffffff", lw=2)
        ax.set(xlabel="token (white line: the prompt's end)", ylabel="")
    return figure
