"""The report's HTML: one page, its style, figures as data, and the one interactive plot. All text is escaped
here.
"""

import base64
import hashlib
import html
import io
import re
from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import plotly.graph_objects as go
import plotly.io
from matplotlib.figure import Figure

from dfrot_lab.show.figures import MASSIVE_COLOUR, ORDINARY_COLOUR
from dfrot_lab.show.markup import safe

PAIRS = (("RO", "RH"), ("NR", "RO"), ("NR", "RH"), ("RH", "DFRot"))
"""Rotations compared in the interactive plot, the first pair at the start."""
GREY = "#808080"

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #ffffff; --soft: #5a6675; --line: #d5dae1; --tint: #f3f5f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --paper: #15191f; --soft: #a2adba; --line: #39424e; --tint: #1e242c; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.86rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th, td { white-space: nowrap; } td { unicode-bidi: isolate; } thead th { background: var(--tint); } .abstract { font-size: 1.08rem; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 6px; padding: 6px; box-sizing: border-box; }
code { background: var(--tint); padding: 0.1rem 0.3rem; border-radius: 3px; overflow-wrap: anywhere; }
.note { border-left: 4px solid #D55E00; padding: 0.4rem 0.8rem; background: var(--tint); } footer { color: var(--soft); margin-top: 3rem; }
@media print { body { max-width: none; margin: 0; } .plot { display: none; } section, img, tr { break-inside: avoid; } }
"""


def document(title: str, abstract: str, sections: Sequence[str]) -> str:
    """A whole page that may load nothing and run only the scripts it was written with: its
    Content-Security-Policy names each by its hash.
    """
    body = f"<h1>{html.escape(title)}</h1>\n<p class='abstract'>{html.escape(abstract)}</p>\n" + "\n".join(
        sections
    )
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", body, re.DOTALL)
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts) or "'none'"
    policy = f"default-src 'none'; img-src data: blob:; font-src data:; style-src 'unsafe-inline'; script-src {hashes}"
    head = f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n<style>{STYLE}</style>'
    footer = "<footer>Made by dfrot-lab report. One file: nothing is loaded when it is opened.</footer>"
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n{footer}\n</body>\n</html>\n'


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def section(title: str, *parts: str) -> str:
    """A section of HTML parts under a plain-text title."""
    return f"<section>\n<h2>{html.escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def note(text: str, command: str) -> str:
    """A sentence and the command it speaks of, set off from the rest."""
    return f'<p class="note">{html.escape(text)} <code>{html.escape(command)}</code></p>'


def table_html(table: pd.DataFrame, *, index: bool = True) -> str:
    """A table, its cells escaped, scrolled sideways where the page is narrow."""
    return f'<div class="scroll">{table.to_html(index=index, escape=True, border=0, index_names=False, na_rep="")}</div>'


def figure_html(figure: Figure, alt: str) -> str:
    """A matplotlib figure as an SVG image inside the page; the figure is closed."""
    data = io.BytesIO()
    figure.savefig(data, format="svg", metadata={"Date": None})
    plt.close(figure)
    return f'<p><img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{base64.b64encode(data.getvalue()).decode()}"></p>'


def error_scatter(wide: pd.DataFrame) -> str:
    """Every token's error under one rotation against another's, to hover over: a menu picks the pair. plotly
    itself is in the page.
    """
    plot = scatter_figure(wide)
    config = {"displaylogo": False, "responsive": True}
    return f'<div class="plot">{plotly.io.to_html(plot, config=config, include_plotlyjs=True, full_html=False, div_id="token-errors")}</div>'


def scatter_figure(wide: pd.DataFrame) -> go.Figure:
    """The interactive plot of a table of errors (token, text, massive, a column a rotation)."""
    pairs = [pair for pair in PAIRS if set(pair) <= set(wide.columns)]
    heavy = wide["massive"]
    parts = [
        ("ordinary tokens", wide[~heavy], ORDINARY_COLOUR, "circle", 6),
        ("massive tokens", wide[heavy], MASSIVE_COLOUR, "diamond", 11),
    ]
    plot, (x, y) = go.Figure(), pairs[0]
    for name, part, colour, symbol, size in parts:
        marker = {"color": colour, "symbol": symbol, "size": size, "line": {"width": 0}, "opacity": 0.75}
        hover = [
            f"token {token}: {safe(text)}" for token, text in zip(part["token"], part["text"], strict=True)
        ]
        template = "%{text}<br>%{x:.3g} and %{y:.3g}<extra>%{fullData.name}</extra>"
        plot.add_scatter(
            x=part[x], y=part[y], mode="markers", name=name, marker=marker, text=hover, hovertemplate=template
        )
    top = float(wide[[x, y]].to_numpy().max()) * 1.05
    plot.add_scatter(
        x=[0, top],
        y=[0, top],
        mode="lines",
        name="equal",
        line={"dash": "dash", "color": GREY},
        hoverinfo="skip",
    )
    axis = {"gridcolor": "rgba(128,128,128,0.25)", "zerolinecolor": GREY, "rangemode": "tozero"}
    plot.update_layout(
        height=480,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY},
        legend={"orientation": "h", "y": -0.2},
        xaxis={**axis, "title": {"text": f"E({x})"}},
        yaxis={**axis, "title": {"text": f"E({y})"}},
        updatemenus=[
            {
                "buttons": [_button(wide, heavy, *pair) for pair in pairs],
                "x": 0,
                "y": 1.14,
                "xanchor": "left",
                "font": {"color": "#555555"},
            }
        ],
        margin={"t": 60, "r": 10},
    )
    return plot


def _button(wide: pd.DataFrame, heavy: "pd.Series[bool]", x: str, y: str) -> dict[str, object]:
    top = float(wide[[x, y]].to_numpy().max()) * 1.05
    columns = [[wide.loc[~heavy, name].tolist(), wide.loc[heavy, name].tolist(), [0, top]] for name in (x, y)]
    titles = {"xaxis.title.text": f"E({x})", "yaxis.title.text": f"E({y})"}
    return {
        "label": f"{y} against {x}",
        "method": "update",
        "args": [{"x": columns[0], "y": columns[1]}, titles],
    }
