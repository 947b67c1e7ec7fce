"""Plotly figures that follow a page's width and outlive a reload; matplotlib figures to keep."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import anywidget
import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
from plotly.basedatatypes import Undefined
from plotly.serializers import custom_serializers

from dfrot_lab.show import figures

HEIGHT = 420
"""Pixels of one plot: fixed, so that nothing moves while a new one is computed."""
GREY = "#808080"
"""Text and axes: readable on a white and on a dark page (contrast 3.9 and 5.3)."""
FAINT = "rgba(128,128,128,0.25)"
CLEAR = "rgba(0,0,0,0)"
AXIS = {"gridcolor": FAINT, "zerolinecolor": "rgba(128,128,128,0.5)", "linecolor": GREY, "automargin": True}
"""The look of an axis, for those that a plot adds to its first two."""
LOOK: Mapping[str, Any] = {
    "margin": {"l": 60, "r": 16, "t": 36, "b": 48},
    "paper_bgcolor": CLEAR,
    "plot_bgcolor": CLEAR,
    "font": {"color": GREY, "size": 12},
    "hovermode": "closest",
    "hoverlabel": {"namelength": -1, "align": "left", "bgcolor": "#303030", "font": {"color": "#ffffff"}},
    "modebar": {"bgcolor": CLEAR, "color": GREY, "activecolor": "#0072B2"},
    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    "xaxis": AXIS,
    "yaxis": AXIS,
}
EDGE_TO_EDGE = {"l": 0, "r": 0, "t": 0, "b": 0}


class Plot(go.FigureWidget):
    """A plotly figure in the explorers' look: transparent, grey, of fixed height. Traces are given at once
    and their data change in place; `layout` is plotly's, `xaxis_title` and nested dictionaries alike.

    Private attributes of a subclass begin with an underscore: plotly refuses others."""

    def __init__(self, traces: Iterable[Any] = (), height: int = HEIGHT, **layout: Any) -> None:
        super().__init__(list(traces), go.Layout(height=height, **LOOK).update(layout))
        self.set_trait("_config", {"responsive": True, "displaylogo": False})

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
        """What a reloaded page asks for, with the data of now: plotly gives those of the figure's making."""
        state = super().get_state(key, drop_defaults)
        now = {"_widget_data": "_data", "_widget_layout": "_layout"}
        to_json = custom_serializers["to_json"]
        known = {
            name: self.__dict__[own] for name, own in now.items() if name in state and own in self.__dict__
        }
        return state | {name: to_json(value, self) for name, value in known.items()}

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
    axes = {
        f"{name}axis": {**look, "title": {"text": title}}
        for name, title in zip("xyz", (x, y, z), strict=True)
    }
    return {**axes, **more}


def lines_at(places: Any, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates, across and along, of separate lines at `places`, each from low to high: for one trace."""
    return np.repeat(np.asarray(places, dtype=float), 3), np.tile([low, high, np.nan], len(places))


def packed(array: np.ndarray) -> np.ndarray:
    """An array of two or three dimensions as a FigureWidget takes it fastest: five significant digits, since
    it is written out as decimals.

    Plotly's base64 form is smaller on its way out, but plotly.js then sends each row back with the buffer of
    the whole array behind it: gigabytes."""
    data = np.asarray(array, dtype=np.float64)
    scale = 10.0 ** (4 - np.floor(np.log10(np.maximum(np.abs(data), 1e-30))))
    return np.round(data * scale) / scale


@contextmanager
def drawing(columns: int = 1, size: tuple[float, float] = (10, 3.8), **options: Any) -> Iterator[Any]:
    """A matplotlib figure in the lab's look and its axes, closed at the end: whoever asked shows it, once."""
    with figures.theme():
        drawn, axes = figures.plt.subplots(1, columns, figsize=size, squeeze=False, **options)
        try:
            yield drawn, axes[0].tolist()
        finally:
            figures.plt.close(drawn)


class Stage(widgets.Box):
    """One place for several plots, of which `shown` is on view.

    A plot that was on view stays in the page, hidden: one that is taken off the page still gets its updates
    there, and fails at them."""

    def __init__(self, plot: Plot, **layout: Any) -> None:
        super().__init__(layout={"width": "100%", **layout})
        self._boxes: list[tuple[Plot, widgets.Box]] = []
        self.turn(plot)

    def turn(self, plot: Plot) -> None:
        """Show this plot and hide the others."""
        self.shown = plot
        if all(known is not plot for known, _ in self._boxes):
            self._boxes.append((plot, widgets.Box([plot], layout={"width": "100%"})))
            self.children = [box for _, box in self._boxes]
        for known, box in self._boxes:
            box.layout.display = None if known is plot else "none"


class Fit(anywidget.AnyWidget):
    """An element of no height that has the plots of its explorer fill their place when they are first drawn
    and when the page's width changes.

    Plotly draws a figure before it is on the page, 700 pixels wide, and then listens to the window alone. So
    this tells the window. A plot's height stays what its layout says, whatever is in it. A brushed region
    lets clicks through to the points in it."""

    _css = """
.js-plotly-plot .selectionlayer path { pointer-events: none !important; }
.dfrot-table { font-size: 12px; }
.dfrot-table caption { text-align: left; color: #808080; white-space: nowrap; }
.dfrot-table :is(td, th) { padding: 1px 8px; line-height: 1.4; text-align: left; white-space: nowrap; }
"""

    _esm = """
export default { render({ el }) {
  let timer = 0;
  const resized = () => window.dispatchEvent(new Event("resize"));
  const tell = () => { clearTimeout(timer); timer = setTimeout(resized, 50); };
  const fill = (element, looks) => {  // a figure is drawn before it is put in its place: look again
    if (!element.isConnected && looks > 0) return setTimeout(fill, 50, element, looks - 1);
    if (!el.closest(".widget-vbox")?.contains(element)) return;
    Object.assign(element.style, { width: "100%", minWidth: 0, height: `${element._fullLayout.height}px` });
    widths.observe(element);  // which tells at once, and again when a plot that was hidden is shown
  };
  const drawn = ({ detail: { element } }) => fill(element, 40);
  const widths = new ResizeObserver(tell);
  el.style.cssText = "width:100%;height:0";
  widths.observe(el);
  document.addEventListener("plotlywidget-after-render", drawn);
  const plots = () => [...document.querySelectorAll(".js-plotly-plot")].filter((plot) => plot._fullLayout);
  setTimeout(() => plots().forEach((plot) => fill(plot, 0)), 1000);  // after a reload some plots are drawn before this is
  return () => { widths.disconnect(); document.removeEventListener("plotlywidget-after-render", drawn); };
} };
"""
