"""What plotly's figures lack to be at home in a notebook's page: a width that fits, and updates that arrive
whole.
"""

from typing import Any

import anywidget
import ipywidgets as widgets
import plotly.graph_objects as go
from plotly.basedatatypes import Undefined


class Plot(go.FigureWidget):
    """A FigureWidget that follows the page's width and may be updated in batches before it is shown.

    In a batch that sets other properties of one trace than of the next, plotly marks those not set as
    undefined, and a figure that is not on the page yet takes that for their value. So they are sent as they
    are.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_trait("_config", {"responsive": True, "displaylogo": False})

    def _send_update_msg(
        self,
        restyle_data: dict[str, Any],
        relayout_data: Any,
        trace_indexes: Any = None,
        source_view_id: Any = None,
    ) -> None:
        traces = self._normalize_trace_indexes(trace_indexes)
        whole = {name: self._whole(name, values, traces) for name, values in (restyle_data or {}).items()}
        super()._send_update_msg(whole, relayout_data, trace_indexes, source_view_id)

    def _whole(self, name: str, values: Any, traces: list[int]) -> Any:
        """A batch's values of one property, where undefined what the trace has now: None, which removes
        nothing, for a property that is not set.
        """
        if not isinstance(values, list) or not any(value is Undefined for value in values):
            return values
        present = [self.data[trace] for trace in traces]
        return [
            (now[name] if name in now else None) if value is Undefined else value  # noqa: SIM401
            for value, now in zip(values, present, strict=True)
        ]


class Stage(widgets.Box):
    """One place for several plots, of which `shown` is on view.

    A plot that was on view stays in the page, hidden: one that is taken off the page still gets its updates
    there, and fails at them.
    """

    def __init__(self, plot: Plot, **layout: Any) -> None:
        super().__init__(layout=layout)
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
    lets clicks through to the points in it.
    """

    _css = """
.js-plotly-plot .selectionlayer path { pointer-events: none !important; }
.dfrot-table :is(td, th) { padding: 1px 8px; line-height: 1.4; white-space: nowrap; }
"""

    _esm = """
export default { render({ el }) {
  let timer = 0;
  const tell = () => { clearTimeout(timer); timer = setTimeout(() => window.dispatchEvent(new Event("resize")), 50); };
  const fill = (element, looks) => {
    if (!element.isConnected && looks > 0) return setTimeout(fill, 50, element, looks - 1);  // drawn before it is put in its place
    if (!el.closest(".widget-vbox")?.contains(element)) return;
    Object.assign(element.style, { width: "100%", minWidth: 0, height: `${element._fullLayout.height}px` });
    widths.observe(element);  // which tells at once, and again when a plot that was hidden is shown
  };
  const drawn = ({ detail: { element } }) => fill(element, 40);
  const widths = new ResizeObserver(tell);
  el.style.cssText = "width:100%;height:0";
  widths.observe(el);
  document.addEventListener("plotlywidget-after-render", drawn);
  return () => { widths.disconnect(); document.removeEventListener("plotlywidget-after-render", drawn); };
} };
"""
