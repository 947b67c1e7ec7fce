"""What makes plots as wide as their place in the page."""

import anywidget


class Fit(anywidget.AnyWidget):
    """An element of no height that has the plots of its explorer fill their place when they are first drawn and when the page's width changes.

    Plotly draws a figure before it is on the page, 700 pixels wide, and then listens to the window alone. So this tells the window. A plot's height
    stays what its layout says, whatever is in it.
    """

    _esm = """
export default { render({ el }) {
  let timer = 0;
  const tell = () => { clearTimeout(timer); timer = setTimeout(() => window.dispatchEvent(new Event("resize")), 50); };
  const drawn = ({ detail: { element } }) => {
    if (!el.closest(".widget-vbox")?.contains(element)) return;
    Object.assign(element.style, { width: "100%", minWidth: 0, height: `${element._fullLayout.height}px` });
    tell();
  };
  const widths = new ResizeObserver(tell);
  el.style.cssText = "width:100%;height:0";
  widths.observe(el);
  document.addEventListener("plotlywidget-after-render", drawn);
  return () => { widths.disconnect(); document.removeEventListener("plotlywidget-after-render", drawn); };
} };
"""
