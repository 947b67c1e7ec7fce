// The foot of an explorer: its view as a line of Python, its data and a picture of its plots to take away.
const save = (name, blob) => {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};

// All plots on view as they stand, on the page's own background.
const picture = async (explorer) => {
  const shown = [...explorer.querySelectorAll(".js-plotly-plot, canvas.dfrot-film")].filter((each) => each.offsetParent);
  const places = shown.map((each) => each.getBoundingClientRect()), edge = (side, of) => of(...places.map((place) => place[side]));
  const left = edge("left", Math.min), top = edge("top", Math.min), canvas = document.createElement("canvas"), scale = 2;
  Object.assign(canvas, { width: scale * (edge("right", Math.max) - left), height: scale * (edge("bottom", Math.max) - top) });
  const pen = canvas.getContext("2d");
  pen.fillStyle = getComputedStyle(document.body).getPropertyValue("--jp-layout-color0") || "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.scale(scale, scale);
  for (const [i, each] of shown.entries()) {
    const { x, y, width, height } = places[i], image = new Image();
    if (each.matches("canvas")) { pen.drawImage(each, x - left, y - top, width, height); continue; }
    image.src = await window.Plotly.toImage(each, { format: "png", width, height, scale });
    await image.decode();
    pen.drawImage(image, x - left, y - top, width, height);
  }
  return new Promise((done) => canvas.toBlob(done));
};

export default { render({ model, el }) {
  el.classList.add("dfrot-take");
  const add = (name, textContent, title, onclick) =>
    el.appendChild(Object.assign(document.createElement(name), { textContent, title, onclick, className: name === "button" ? "jupyter-button" : "dfrot-line" }));
  const line = add("code", "", "this view, as a line of Python"), name = model.get("name");
  const write = () => { line.textContent = model.get("line"); };
  const copy = () => { getSelection().selectAllChildren(line); document.execCommand("copy"); };
  add("button", "copy this view", "copy the line that makes this view again", copy);
  add("button", "data (CSV)", "save what is shown as a table", () => model.send("csv"));
  add("button", "picture (PNG)", "save the plots as they stand", async () => save(`${name}.png`, await picture(el.closest(`.dfrot-${name}`))));
  const got = (csv) => save(`${name}.csv`, new Blob([csv], { type: "text/csv" }));
  write();
  model.on("change:line", write);
  model.on("msg:custom", got);
  return () => { model.off("change:line", write); model.off("msg:custom", got); };
} };
