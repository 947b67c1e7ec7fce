"""The report's one interactive plot: every token's error, to hover over."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from dfrot_lab.show.markup import safe
from dfrot_lab.show.theme import MASSIVE_COLOUR, ORDINARY_COLOUR
from dfrot_lab.show.tokens import is_massive

PAIRS = (("RO", "RH"), ("NR", "RO"), ("NR", "RH"), ("RH", "DFRot"))
"""Rotations compared, the first pair at the start."""
GREY, CLEAR = "#808080", "rgba(0,0,0,0)"
AXIS = {"gridcolor": "rgba(128,128,128,0.25)", "zerolinecolor": GREY, "rangemode": "tozero"}
HOVER = "%{text}<br>%{x:.3g} and %{y:.3g}<extra>%{fullData.name}</extra>"


def scatter_figure(wide: pd.DataFrame) -> go.Figure:
    """Every token's error under one rotation against another's; a menu picks the pair.

    Columns: token, text, massive and one of errors a rotation."""
    pairs = [pair for pair in PAIRS if set(pair) <= set(wide.columns)]
    buttons = [_button(wide, *pair) for pair in pairs]
    start, titles = buttons[0]["args"]
    heavy, plot = is_massive(wide), go.Figure()
    kinds = (
        ("ordinary tokens", wide[~heavy], {"color": ORDINARY_COLOUR, "symbol": "circle", "size": 6}),
        ("massive tokens", wide[heavy], {"color": MASSIVE_COLOUR, "symbol": "diamond", "size": 11}),
    )
    for place, (name, part, marker) in enumerate(kinds):
        text = [f"token {token}: {safe(text)}" for token, text in part[["token", "text"]].to_numpy()]
        look = {"marker": marker | {"opacity": 0.75}, "text": text, "hovertemplate": HOVER, "name": name}
        plot.add_scatter(x=start["x"][place], y=start["y"][place], mode="markers", **look)
    line = {"dash": "dash", "color": GREY}
    plot.add_scatter(
        x=start["x"][2], y=start["y"][2], mode="lines", name="equal", line=line, hoverinfo="skip"
    )
    plot.update_layout(
        height=480,
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        font={"color": GREY},
        legend={"orientation": "h", "y": -0.2},
        xaxis=AXIS,
        yaxis=AXIS,
        updatemenus=[
            {"buttons": buttons, "x": 0, "y": 1.14, "xanchor": "left", "font": {"color": "#555555"}}
        ],
        margin={"t": 60, "r": 10},
    )
    return plot.update_layout(titles)


def _button(wide: pd.DataFrame, x: str, y: str) -> dict[str, Any]:
    """The menu's entry of a pair: the values of ordinary and massive tokens, the line, the axes' titles."""
    heavy, top = is_massive(wide), float(wide[[x, y]].to_numpy().max()) * 1.05
    columns = [[wide.loc[~heavy, name].tolist(), wide.loc[heavy, name].tolist(), [0, top]] for name in (x, y)]
    titles = {"xaxis.title.text": f"E({x})", "yaxis.title.text": f"E({y})"}
    values = {"x": columns[0], "y": columns[1]}
    return {"label": f"{y} against {x}", "method": "update", "args": [values, titles]}
