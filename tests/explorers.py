"""What the explorers' tests share: awkward tokens, a browser's own messages, and a look at everything a
widget would put on the page.
"""

import html.parser
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go

import dfrot_lab
from dfrot_lab import explore
from dfrot_lab.show.theme import visible
from dfrot_lab.study.setting import Setting

MALICIOUS = [
    "<img src=x onerror=alert(1)>",
    "<b>",
    "<0x0A>",
    "'\"&quot;",
    "\U0001f600",
    "\u05e9\u05dc\u05d5\u05dd",
    "\n",
    " \t",
    "\u202e",
    "%{x}",
]
"""Markup, a byte token, quotes, an emoji, right-to-left text, white space, a control that turns the writing
direction, a plotly template.
"""
ALLOWED = {"span", "bdi", "br", "wbr", "b", "div", "table", "caption", "thead", "tbody", "tr", "th", "td"}


def walk(widget: Any) -> list[Any]:
    """The widget and all it holds."""
    return [widget, *(found for child in getattr(widget, "children", ()) for found in walk(child))]


class Page(html.parser.HTMLParser):
    """The tags, attributes and visible text of a piece of HTML, as a browser would take them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def pieces(top: Any) -> list[str]:
    """Every piece of HTML the widget shows, and every text of its plots, hidden ones too."""
    plots = [
        w
        for w in [*walk(top), *(getattr(top, name, None) for name in ("plot", "space", "profile", "fig4"))]
        if isinstance(w, go.FigureWidget)
    ]
    shown = [w.value for w in walk(top) if isinstance(w, widgets.HTML)]
    return shown + [text for plot in plots for text in strings(plot.to_dict())]


def strings(value: Any) -> list[str]:
    """All texts in a figure's dictionary."""
    if isinstance(value, str):
        return [value]
    parts = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else getattr(value, "tolist", list)()
    )
    return [
        text
        for part in (parts if isinstance(parts, list | tuple) or isinstance(value, dict) else [])
        for text in strings(part)
    ]


def assert_safe(top: Any) -> None:
    """No tag of a token is a tag of the page, and no attribute one of a script's."""
    found = [Page(piece) for piece in pieces(top)]
    assert len(found) > 5
    for page in found:
        assert page.tags <= ALLOWED | {"extra"}, page.tags
        assert page.attributes <= {"class", "style", "title", "role", "scope"}, page.attributes


def remade(explorer: Any, **names: Any) -> Any:
    """What the explorer's line makes, where the reader has imported what the package names."""
    public: dict[str, Any] = {name: getattr(dfrot_lab, name) for name in dir(dfrot_lab)}
    return eval(explorer.line(), {**public, "explore": explore, "Setting": Setting, **names})


def event(plot: Any, kind: str, points: list[int], trace: int = 0) -> None:
    """What plotly in a browser sends to a FigureWidget: `plotly_click`, `plotly_selected` or
    `plotly_deselect` at the points of a trace.
    """
    x, y = (list(plot.data[trace][axis]) for axis in "xy")
    at = {
        "xs": [x[i] for i in points],
        "ys": [y[i] for i in points],
        "point_indexes": points,
        "trace_indexes": [trace] * len(points),
    }
    selector = (
        {"type": "box", "selector_state": {"xrange": [0, 1], "yrange": [0, 1]}}
        if kind == "plotly_selected"
        else None
    )
    plot._js2py_pointsCallback = {
        "event_type": kind,
        "points": at,
        "device_state": None,
        "selector": selector,
    }


def shown_text(text: str) -> str:
    """A token as a reader sees it."""
    return visible(text)
