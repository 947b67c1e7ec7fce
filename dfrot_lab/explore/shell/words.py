"""What an explorer writes: labels for plotly, tables as HTML, numbers and tokens as a reader takes them."""

from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd

from dfrot_lab.show.markup import VISIBLE, safe, span
from dfrot_lab.study import cost


def label(text: str) -> str:
    """A token for a plotly label, isolated from its neighbours' writing direction."""
    return f"\u2068{title(text)}\u2069"


def title(text: str) -> str:
    """Any text, such as a file's name, for a plotly title."""
    return safe(text).replace("&quot;", "&#34;")


def plain(text: str) -> str:
    """Words that are no token, for HTML and hover labels: escaped, their spaces left as they are."""
    return safe(text).replace(VISIBLE[" "], " ")


def number(value: float) -> str:
    """`24,816`, `118`, `2.15`, `0.00312`: three digits or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds in words, as the estimates say them; nothing under a second is told apart."""
    return cost.duration(seconds) if seconds >= 1 else "1 s"


def contexts(texts: Sequence[str], around: int = 4, longest: int = 24) -> list[str]:
    """Each token in its text as a plotly label: `around` tokens on either side, itself between arrows."""
    labels = [label(text if len(text) <= longest else f"{text[:longest]}\u2026") for text in texts]
    return [
        f"{''.join(labels[max(0, i - around) : i])} \u25b8<b>{text}</b>\u25c2 "
        f"{''.join(labels[i + 1 : i + 1 + around])}"
        for i, text in enumerate(labels)
    ]


def html_table(table: pd.DataFrame, caption: str) -> str:
    """A table of numbers and token texts as HTML, every text through `span`; `caption` is plain text."""
    head = "".join(f'<th scope="col">{plain(str(name))}</th>' for name in table.columns)
    rows = ["".join(f"<td>{_cell(value)}</td>" for value in row) for row in table.itertuples(index=False)]
    body = "".join(f"<tr>{row}</tr>" for row in [head, *rows])
    return f'<table class="dfrot-table"><caption>{plain(caption)}</caption>{body}</table>'


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return span(value)
    return number(float(value)) if isinstance(value, float | np.floating) else str(value)


def panel(height: int, value: str = "", **layout: Any) -> Any:
    """An HTML box of fixed height that scrolls, so that what is under it stays where it is."""
    return widgets.HTML(value, layout={"height": f"{height}px", "overflow": "auto", **layout})
