// Plotly's own widget, its script (5 MB) read once a page however many plots there are, and after the widget is
// ready: anywidget gives a widget 2 s to be ready and loses what is sent to one that is not.
const MESSAGES = ["addTraces", "deleteTraces", "moveTraces", "restyle", "relayout", "update", "animate", "removeLayoutProps", "removeTraceProps"]
  .map((name) => `_py2js_${name}`);

const read = async (model) => {
  const library = await model.widget_manager.get_model(model.get("_library").slice("IPY_MODEL_".length));
  return import(URL.createObjectURL(new Blob([library.get("text")], { type: "text/javascript" })));
};

// The figure, drawn from the data of now: what was sent while the script was read is done again, in order.
const made = async (model, sent) => {
  const { default: figure } = await (globalThis.dfrotPlotly ??= read(model).catch((error) => {
    globalThis.dfrotPlotly = null;  // the next plot tries again
    throw error;
  }));
  const own = figure(), acts = {};
  let now = {};
  const get = (name) => (name in now ? now[name] : model.get(name));
  const on = (event, act) => { (acts[event] ??= []).push(act); model.on(event, act); };
  own.initialize({ model: { ...model, get, on } });
  for (const [name, value] of sent.splice(0)) {
    now = { [name]: value };
    acts[`change:${name}`].forEach((act) => act());
  }
  now = {};
  return own;
};

// Plotly draws a figure 700 pixels wide before it is on the page, and then listens to the window alone: tell it
// whenever its place has another width, also when it is put there or shown again. A plot keeps its height.
const tell = () => {
  clearTimeout(globalThis.dfrotResized);
  globalThis.dfrotResized = setTimeout(() => window.dispatchEvent(new Event("resize")), 50);
};
const fit = (element, height) => {
  const widths = new ResizeObserver(tell), drawn = ({ detail }) => detail.element === element && tell();
  Object.assign(element.style, { width: "100%", minWidth: 0, height: `${height}px` });
  widths.observe(element);
  document.addEventListener("plotlywidget-after-render", drawn);
  return () => { widths.disconnect(); document.removeEventListener("plotlywidget-after-render", drawn); };
};

export default () => {
  let figure;
  return {
    initialize({ model }) {
      const sent = [], waits = MESSAGES.map((name) => [`change:${name}`, () => sent.push([name, model.get(name)])]);
      waits.forEach(([event, keep]) => model.on(event, keep));
      figure = made(model, sent).finally(() => waits.forEach(([event, keep]) => model.off(event, keep)));
    },
    async render(view) {
      const own = await figure, unfit = fit(view.el, view.model.get("_widget_layout").height), remove = own.render(view);
      return () => { unfit(); remove(); };
    },
  };
};
