export default { render({ el }) {
  let timer = 0;
  const resized = () => window.dispatchEvent(new Event("resize"));
  const tell = () => { clearTimeout(timer); timer = setTimeout(resized, 50); };
  const fill = (element, looks) => {  // a figure is drawn before it is put in its place: look again
    if (!(element.isConnected && el.isConnected) && looks > 0) return setTimeout(fill, 50, element, looks - 1);
    if (!el.closest(".widget-vbox")?.contains(element)) return;
    Object.assign(element.style, { width: "100%", minWidth: 0, height: `${element._fullLayout.height}px` });
    widths.observe(element);  // which tells at once, and again when a plot that was hidden is shown
  };
  const drawn = ({ detail: { element } }) => fill(element, 40);
  const widths = new ResizeObserver(tell);
  el.style.cssText = "width:100%;height:0";
  widths.observe(el);
  document.addEventListener("plotlywidget-after-render", drawn);
  const already = [...document.querySelectorAll(".js-plotly-plot")].filter((plot) => plot._fullLayout);
  already.forEach((plot) => fill(plot, 40));  // after a reload some plots are drawn before this is
  return () => { widths.disconnect(); document.removeEventListener("plotlywidget-after-render", drawn); };
} };
