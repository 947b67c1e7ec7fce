"""What stands on an explorer's page: plotly figures that follow it, words and tables as HTML."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.basedatatypes import Undefined
from plotly.serializers import custom_serializers
from traitlets import Instance, Unicode, default

from dfrot_lab.show import figures, theme

HEIGHT = 420  # pixels of one plot: fixed, so that nothing moves while a new one is computed
GREY = "#808080"  # text and axes: readable on a white and on a dark page (contrast 3.9 and 5.3)
FAINT, CLEAR = "rgba(128,128,128,0.25)", "rgba(0,0,0,0)"
AXIS = {"gridcolor": FAINT, "zerolinecolor": "rgba(128,128,128,0.5)", "linecolor": GREY, "automargin": True}
LOOK: dict[str, Any] = {"paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR, "xaxis": AXIS, "yaxis": AXIS}
LOOK |= {"font": {"color": GREY, "size": 12}, "margin": {"l": 60, "r": 16, "t": 56, "b": 48}}
LOOK |= {"hovermode": "closest", "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}}
LOOK["hoverlabel"] = {"namelength": -1, "align": "left", "bgcolor": "#303030", "font": {"color": "#ffffff"}}
LOOK["modebar"] = {"bgcolor": CLEAR, "color": GREY, "activecolor": "#0072B2"}
UNUSED = ["sendChartToCloud", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"]  # would cover the legend
PICKED = ("NR", "RO", "RH", "DFRot", "Offset")  # rotations to start with: found in seconds
STEPS = [digit * 10.0**power for power in range(-6, 7) for digit in (1, 2, 5)]
LOG: Any = {"type": "log", "tickvals": STEPS, "ticktext": [f"{step:g}" for step in STEPS]}  # else 0.5 reads 5
EDGE_TO_EDGE = dict.fromkeys("lrtb", 0)
TABLE: Any = {"index": False, "border": 0, "classes": "dfrot-table"}  # pandas' table without token texts
TAKEN = {True: "which a symmetric grid pays for", False: "which the zero point takes for nothing"}
SCHEMES: Any = {True: "symmetric", False: "asymmetric"}  # by the box that says whether a grid is symmetric


class Library(anywidget.AnyWidget):
    """Plotly's own script (5 MB), sent to a page once: a FigureWidget would bring it along for each plot."""

    _esm = "export default {};"
    text = Unicode(str(go.FigureWidget._esm)).tag(sync=True)


library = cache(Library)


class Plot(go.FigureWidget):
    """A plotly figure in the explorers' look, as wide as its place. Traces are given at once and
    their data change in place; `layout` is plotly's. A subclass's own attributes begin with an underscore:
    plotly refuses others."""

    _esm = Path(__file__).with_name("plot.js")
    _library = Instance(Library).tag(sync=True, **widgets.widget_serialization)

    @default("_library")
    def _shared(self) -> Library:
        return library()

    def __init__(self, traces: Iterable[Any] = (), height: int = HEIGHT, **layout: Any) -> None:
        super().__init__(list(traces), go.Layout(height=height, **LOOK).update(layout))
        self.set_trait(
            "_config", {"responsive": True, "displaylogo": False, "modeBarButtonsToRemove": UNUSED}
        )

    def put(self, *data: dict[str, Any], **layout: Any) -> None:
        """New data of the traces in their order, and of the layout, in one message to the page."""
        with self.batch_update():
            for trace, new in zip(self.data, data, strict=True):
                trace.update(new)
            self.update_layout(layout)

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
        """What a reloaded page asks for, with the data of now: plotly gives those of the figure's making."""
        state, to_json = super().get_state(key, drop_defaults), custom_serializers["to_json"]
        for name, own in {"_widget_data": "_data", "_widget_layout": "_layout"}.items():
            if name in state and own in self.__dict__:
                state[name] = to_json(self.__dict__[own], self)
        return state

    def _send_update_msg(
        self, restyle_data: Any, relayout_data: Any, trace_indexes: Any = None, source_view_id: Any = None
    ) -> None:
        """A batch, whole: where it sets other properties of one trace than of the next, plotly marks those
        not set as undefined, and a figure that is not on the page yet takes that for their value."""
        whole, traces = dict(restyle_data or {}), self._normalize_trace_indexes(trace_indexes)
        for name, values in whole.items():
            if isinstance(values, list):  # None, which removes nothing, for a property that is not set
                present = [self.data[trace] for trace in traces]
                now = [trace[name] if name in trace else None for trace in present]  # noqa: SIM401
                whole[name] = [b if a is Undefined else a for a, b in zip(values, now, strict=True)]
        super()._send_update_msg(whole, relayout_data, trace_indexes, source_view_id)


def scene(x: str = "", y: str = "", z: str = "", **more: Any) -> dict[str, Any]:
    """Three axes in space, transparent, with their titles; `more` is the scene's own layout."""
    look = {"backgroundcolor": CLEAR, "gridcolor": "rgba(128,128,128,0.35)", "color": GREY}
    titles = {"xaxis": x, "yaxis": y, "zaxis": z}
    return {**{axis: {**look, "title": {"text": title}} for axis, title in titles.items()}, **more}


def lines_at(places: Any, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates, across and along, of separate lines at `places`, each from low to high: for one trace."""
    return np.repeat(np.asarray(places, dtype=float), 3), np.tile([low, high, np.nan], len(places))


def frame(at: float) -> dict[str, Any]:
    """The shape about the column of a token that is picked."""
    line = {"color": theme.PICKED_COLOUR, "width": 1.5}
    return {"yref": "paper", "y0": 0, "y1": 1, "x0": at - 0.5, "x1": at + 0.5, "line": line}


def packed(array: np.ndarray) -> np.ndarray:
    """An array of two or three dimensions as a FigureWidget takes it fastest: decimals, five digits. (Of
    plotly's smaller base64 form plotly.js sends each row back with the whole array's buffer: gigabytes.)"""
    scale = 10.0 ** (4 - np.floor(np.log10(np.maximum(np.abs(array.astype(np.float64)), 1e-30))))
    return np.round(array * scale) / scale


@contextmanager
def drawing(columns: int = 1, size: tuple[float, float] = (10, 3.8), **options: Any) -> Iterator[Any]:
    """A matplotlib figure in the lab's look and its axes, closed at the end: whoever asked shows it, once."""
    with figures.theme():
        drawn, axes = figures.plt.subplots(1, columns, figsize=size, squeeze=False, **options)
        try:
            yield drawn, axes[0].tolist()
        finally:
            figures.plt.close(drawn)


def number(value: float) -> str:
    """`24,816`, `118`, `2.15`, `0.00312`: three digits or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def contexts(texts: Sequence[str], around: int = 4) -> list[str]:
    """Each token in its text as a plotly label: `around` tokens on either side, itself between arrows."""
    labels = [theme.label(text if len(text) <= 24 else f"{text[:24]}\u2026") for text in texts]
    before = ["".join(labels[max(0, i - around) : i]) for i in range(len(labels))]
    after = ["".join(labels[i + 1 : i + 1 + around]) for i in range(len(labels))]
    return [f"{a} \u25b8<b>{b}</b>\u25c2 {c}" for a, b, c in zip(before, labels, after, strict=True)]


def html_table(table: pd.DataFrame, caption: str, picked: int = -1) -> str:
    """A table of numbers and token texts as HTML, every text through `span`; `caption` is plain text. The row
    of the token that is picked has a frame."""

    def cell(value: Any) -> Any:
        shown = number(value) if isinstance(value, float) else value
        return theme.span(value) if isinstance(value, str) else shown

    head = "".join(f'<th scope="col">{theme.plain(str(name))}</th>' for name in table.columns)
    rows = ["".join(f"<td>{cell(value)}</td>" for value in row) for row in table.itertuples(index=False)]
    outline = f' style="outline:2px solid {theme.PICKED_COLOUR}"'
    frames = [outline if token == picked else "" for token in table.get("token", [None] * len(rows))]
    body = "".join(f"<tr{own}>{row}</tr>" for own, row in zip(["", *frames], [head, *rows], strict=True))
    return f'<table class="dfrot-table"><caption>{theme.plain(caption)}</caption>{body}</table>'


def panel(height: int, **layout: Any) -> Any:
    """An HTML box of fixed height that scrolls, so that what is under it stays where it is."""
    return widgets.HTML(layout={"height": f"{height}px", "overflow": "auto", **layout})


def beside(*parts: Any, shares: tuple[int, ...] = (), height: int = HEIGHT) -> widgets.HBox:
    """Plots or panels beside one another, of fixed height, each a share (percent) of the page's width."""
    fixed = {"height": f"{height}px", "overflow": "hidden"}
    shared = zip(parts, shares or (100 / len(parts),) * len(parts), strict=True)
    boxes = [widgets.Box([part], layout={"width": f"{share:g}%", **fixed}) for part, share in shared]
    return widgets.HBox(boxes, layout={"width": "100%"})


class Stage(widgets.Box):
    """One place for several plots, of which `shown` is on view. One that was on view stays in the page,
    hidden: taken off the page, it would still get its updates there, and fail at them."""

    children: Any

    def __init__(self, plot: Plot) -> None:
        super().__init__(layout={"width": "100%"})
        self.turn(plot)

    def turn(self, plot: Plot) -> None:
        """Show this plot and hide the others."""
        self.shown = plot
        if all(box.children[0] is not plot for box in self.children):
            self.children = [*self.children, widgets.Box([plot], layout={"width": "100%"})]
        for box in self.children:
            box.layout.display = None if box.children[0] is plot else "none"
