"""What the explorers of tokens share: labels for plotly, tables of tokens as HTML, arrays as compact
messages, numbers in words.
"""

from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd

from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec

from . import base

CELL = "padding:1px 10px;text-align:left;white-space:nowrap"


def label(text: str) -> str:
    """A token for a plotly label: `safe`, quotes as numbers (plotly does not know &quot;), isolated from its
    neighbours' writing direction.
    """
    return f"\u2068{base.safe(text).replace('&quot;', '&#34;')}\u2069"


def number(value: float) -> str:
    """`24,816`, `118`, `2.15`, `0.00312`: three digits or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def html_table(table: pd.DataFrame, caption: str) -> str:
    """A table of whole numbers, floats and token texts as HTML, every text through `base.span`; `caption` is
    plain text.
    """
    heads = "".join(f'<th scope="col" style="{CELL}">{plain(str(name))}</th>' for name in table.columns)
    rows = (
        "".join(f'<td style="{CELL}">{_cell(value)}</td>' for value in row)
        for row in table.itertuples(index=False, name=None)
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    title = (
        f'<caption style="text-align:left;color:{base.GREY};white-space:nowrap">{plain(caption)}</caption>'
    )
    return f'<table class="dfrot-table" style="font-size:12px;line-height:1.35">{title}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def plain(text: str) -> str:
    """Words that are no token, for HTML and hover labels: escaped, their spaces left as they are."""
    return base.safe(text).replace(base.VISIBLE[" "], " ")


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return base.span(value)
    return number(float(value)) if isinstance(value, float | np.floating) else str(value)


def packed(array: np.ndarray) -> np.ndarray:
    """An array of two or three dimensions as a FigureWidget takes it fastest: five significant digits, since
    it is written out as decimals.

    Plotly's base64 form is smaller on its way out, but plotly.js then sends each row back with the buffer of
    the whole array behind it: gigabytes.
    """
    data = np.asarray(array, dtype=np.float64)
    scale = 10.0 ** (4 - np.floor(np.log10(np.maximum(np.abs(data), 1e-30))))
    return np.round(data * scale) / scale


def unpacked(array: np.ndarray) -> np.ndarray:
    """The array that `packed` made, for whoever reads a figure's data back."""
    return np.asarray(array, dtype=np.float32)


def panel(height: int, value: str = "", **layout: Any) -> Any:
    """An HTML box of fixed height that scrolls, so that what is under it stays where it is."""
    return widgets.HTML(value, layout=widgets.Layout(height=f"{height}px", overflow="auto", **layout))


def spec_of(acts: Capture) -> CaptureSpec | None:
    """The CaptureSpec an opened capture was made by; None if its store does not say."""
    said = acts.artefact.manifest.get("inputs", {}).get("spec")
    if not isinstance(said, dict) or said.get("spec") != "CaptureSpec":
        return None
    fields = {name: value for name, value in said.items() if name != "spec"}
    for name, kind in (("model", ModelSpec), ("corpus", CorpusSpec)):
        fields[name] = kind(**{key: value for key, value in fields[name].items() if key != "spec"})
    return CaptureSpec(**fields)


def contexts(texts: Sequence[str], around: int = 4, longest: int = 24) -> list[str]:
    """Each token in its text as a plotly label: `around` tokens before and after it, itself in bold between
    arrows.
    """
    labels = [label(text if len(text) <= longest else f"{text[:longest]}\u2026") for text in texts]
    return [
        "".join(
            [*labels[max(0, i - around) : i], f" \u25b8<b>{text}</b>\u25c2 ", *labels[i + 1 : i + 1 + around]]
        )
        for i, text in enumerate(labels)
    ]
