// One text through all layers, drawn from `frames`. While the hand moves nothing is sent; `value` is, once it rests.
const STOPS = ["00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838"]
  .map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));  // Cividis, as the heat map has it
const PALETTE = Array.from({ length: 256 }, (_, i) => {
  const at = (i / 255) * (STOPS.length - 1), low = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[low].map((c, k) => Math.round(c + (STOPS[low + 1][k] - c) * (at - low)));
});
const PACKED = Uint32Array.from(PALETTE, ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0);
const RED = [204, 41, 54], BLUE = [0, 114, 178], GREY = "#808080", FEW = 14, ROWS = 48, FLOOR = 0.72, REST_MS = 150, LAYERS_A_S = 6;
const make = (parent, name, more = {}) => parent.appendChild(Object.assign(document.createElement(name), more));
const rgb = (colour, light = 1, alpha = 1) => `rgba(${colour.map((c) => Math.min(255, c * light))},${alpha})`;
const short = (x) => (x >= 100 ? Number(x.toPrecision(3)).toLocaleString("en") : x.toPrecision(3));

export default { render({ model, el }) {
  const get = (name) => model.get(name), bar = make(el, "div", { className: "dfrot-bar" });
  const play = make(bar, "button", { className: "jupyter-button", title: "all layers as a film" });
  const slider = make(make(bar, "label", { textContent: "layer " }), "input", { type: "range", min: 0, step: 1 });
  const number = make(bar, "output"), about = make(bar, "span", { className: "dfrot-about" });
  const text = make(el, "div", { className: "dfrot-text" });
  const canvas = make(el, "canvas", { className: "dfrot-film" }), over = document.createElement("canvas");
  const floor = document.createElement("canvas");
  let frames, layers, columns, tokens, size, codes, largest, top, spans, at = get("value"), hot = -1, turn = -0.5;
  let drag = null, view = null, last = 0, playing = false, resting = 0, asked = 0, drawn = 0, shades = "", style = "";

  const value = (code) => { const [low, high] = get("ends"); return 10 ** (low + (high - low) * code / 65535); };
  const lit = () => (hot >= 0 ? hot : get("token"));
  const marked = () => get("marked")[Math.round(at)] ?? [];
  const ask = () => { asked ||= requestAnimationFrame(draw); };

  const load = () => {  // another text
    const bytes = get("frames");
    frames = new Uint16Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
    [layers, columns, tokens, size] = get("shape");
    [codes, largest, top] = [new Float32Array(columns * tokens), new Int32Array(tokens), frames.reduce((a, b) => (a > b ? a : b), 1)];
    slider.max = layers - 1;
    text.replaceChildren();
    spans = get("words").map((textContent, i) => {
      const span = make(text, "bdi", { className: "dfrot-token", title: `token ${i}`, textContent });
      make(text, textContent.includes("\u21b5") ? "br" : "wbr");
      return span;
    });
    [hot, shades] = [-1, ""];
    ask();
  };

  const mix = () => {  // the cells at `at`, which may lie between two layers, and where each token is largest
    const low = Math.min(Math.floor(at), layers - 1), share = at - low, n = columns * tokens;
    const a = frames.subarray(low * n, (low + 1) * n), b = share ? frames.subarray((low + 1) * n, (low + 2) * n) : a;
    for (let i = 0; i < tokens; i++) largest[i] = i;
    for (let j = 0, k = 0; j < columns; j++) for (let i = 0; i < tokens; i++, k++) {
      codes[k] = a[k] + (b[k] - a[k]) * share;
      if (codes[k] > codes[largest[i]]) largest[i] = k;
    }
  };

  const picture = (first, n, rows) => {  // the cells of n tokens, a pixel each, those of one row pooled
    Object.assign(floor, { width: n, height: rows });
    const cells = new Float32Array(n * rows), image = new ImageData(n, rows), pixels = new Uint32Array(image.data.buffer);
    for (let j = 0; j < columns; j++) for (let i = 0, k = Math.floor(j * rows / columns) * n; i < n; i++, k++)
      cells[k] = Math.max(cells[k], codes[j * tokens + first + i]);
    for (let k = 0; k < cells.length; k++) pixels[k] = PACKED[cells[k] >> 8];
    floor.getContext("2d").putImageData(image, 0, 0);
    return cells;
  };

  const pen = (target, width, height) => {  // a canvas of so many pixels of the page, wiped
    const scale = window.devicePixelRatio || 1, found = target.getContext("2d");
    const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
    if (target.width !== w || target.height !== h) Object.assign(target, { width: w, height: h });
    found.setTransform(scale, 0, 0, scale, 0, 0);
    found.clearRect(0, 0, width, height);
    found.imageSmoothingEnabled = false;
    return found;
  };

  const label = (ink, words, x, y, colour, align = "center", angle = 0) => {
    ink.save();
    ink.translate(x, y);
    ink.rotate(angle);
    Object.assign(ink, { fillStyle: colour, textAlign: align });
    ink.strokeText(words, 0, 0);  // readable over the floor, too
    ink.fillText(words, 0, 0);
    ink.restore();
  };

  const space = () => {  // heights are |x|, the floor's colours its logarithm
    const wide = canvas.clientWidth, high = canvas.clientHeight;
    if (!wide) return;
    const few = get("view") === "words" || tokens <= FEW, n = few ? Math.min(FEW, tokens) : tokens;
    const first = Math.max(0, Math.min(tokens - n, get("token") - (FEW >> 1))), rows = few ? Math.min(ROWS, columns) : columns;
    const ink = pen(canvas, wide, high), unit = Math.min(wide / 2.6, high / 1.6), c = Math.cos(turn), s = Math.sin(turn);
    const tall = Math.min(1, (high * FLOOR - 30) / unit - 0.4);
    const spot = (i, j, z = 0) => {
      const x = 2 * i / n - 1, y = j / rows - 0.5;
      return [wide / 2 + unit * (x * c - y * s), high * FLOOR + unit * ((x * s + y * c) * 0.36 - z * tall)];
    };
    const face = (colour, ...corners) => {
      ink.beginPath();
      corners.forEach((corner) => ink.lineTo(...corner));
      ink.fillStyle = colour;
      ink.fill();
    };
    const cells = picture(first, n, rows), heavy = new Set(marked()), own = lit() - first, limit = value(top), words = get("words");
    const [[x, y], [x1, y1], [x2, y2]] = [spot(0, 0), spot(n, 0), spot(0, rows)];
    ink.save();
    ink.transform((x1 - x) / n, (y1 - y) / n, (x2 - x) / rows, (y2 - y) / rows, x, y);
    ink.drawImage(floor, 0, 0);
    ink.restore();
    if (own >= 0 && own < n) face(rgb(BLUE, 1, 0.6), spot(own, 0), spot(own + 1, 0), spot(own + 1, rows), spot(own, rows));
    const bars = [], half = (few ? 0.03 : 0.008) * rows, wing = few ? 0.4 : Math.max(0.4, 2.5 * n / unit / 2), side = s < 0 ? wing : -wing;
    cells.forEach((code, k) => {
      const z = value(code) / limit;
      if (z * unit > 1.5) bars.push({ i: k % n + 0.5, j: Math.floor(k / n) + 0.5, z });
    });
    bars.sort((a, b) => (a.i - b.i) * 2 * s / n + (a.j - b.j) * c / rows);  // the far ones first
    for (const bar of bars) {
      const { i, j, z } = bar, of = Math.floor(i), colour = heavy.has(first + of) ? RED : of === own ? BLUE : PALETTE[cells[Math.floor(j) * n + of] >> 8];
      const [a, b, d, e, q] = [i - wing, i + wing, j - half, j + half, i + side];
      bar.front = [spot(a, e, z), spot(b, e)];
      face(rgb(colour, 0.65), spot(q, d), spot(q, e), spot(q, e, z), spot(q, d, z));
      face(rgb(colour, 0.85), spot(a, e), spot(b, e), spot(b, e, z), spot(a, e, z));
      face(rgb(colour, 1.15), spot(a, d, z), spot(b, d, z), spot(b, e, z), spot(a, e, z));
    }
    const page = getComputedStyle(document.body).getPropertyValue("--jp-layout-color0") || "#fff";
    Object.assign(ink, { font: "13px sans-serif", strokeStyle: page, lineWidth: 4, lineJoin: "round" });
    for (let i = 0; i < n; i++) {
      const colour = i === own ? rgb(BLUE) : heavy.has(first + i) ? rgb(RED) : GREY, name = words[first + i].slice(0, 16);
      if (few || i === own) label(ink, name, ...spot(i + 0.5, rows * 1.04), colour, "left", 0.5);
      const height = value(codes[largest[first + i]]);
      if (i === own || (few && heavy.has(first + i))) label(ink, short(height), ...spot(i + 0.5, Math.floor(largest[first + i] / tokens) * rows / columns, height / limit + 0.06), colour);
    }
    view = { first, n, rows, bars, wide, high, unit, c, s };
  };

  const heat = () => {  // over the heat map, until the kernel's own is there
    const plot = el.closest(".dfrot-massive")?.querySelector(".js-plotly-plot"), place = plot?.querySelector(".svg-container");
    if (!place) return;
    const { xaxis, yaxis } = plot._fullLayout, ink = pen(over, xaxis._length, yaxis._length), column = xaxis.l2p(1) - xaxis.l2p(0);
    const at = `position:absolute;pointer-events:none;left:${xaxis._offset}px;top:${yaxis._offset}px;`
      + `width:${xaxis._length}px;height:${yaxis._length}px`;
    if (style !== at) over.style.cssText = style = at;
    if (over.parentNode !== place) place.append(over);
    picture(0, tokens, columns);
    const low = yaxis.l2p(-size / 2), high = yaxis.l2p((columns - 0.5) * size);
    ink.save();
    ink.translate(xaxis.l2p(-0.5), low);
    ink.scale(column, (high - low) / columns);
    ink.drawImage(floor, 0, 0);
    ink.restore();
    Object.assign(ink, { strokeStyle: rgb(RED), lineWidth: 2.5 });
    for (const i of marked()) {
      const x = xaxis.l2p(i), y = yaxis.l2p(Math.floor(largest[i] / tokens) * size);
      ink.stroke(new Path2D(`M${x - 7},${y}l7,-7l7,7l-7,7Z`));
    }
  };

  const shade = () => {
    const i = lit(), heavy = new Set(marked()), column = Math.floor(largest[i] / tokens) * size;
    spans.forEach((span, k) => {
      const alpha = heavy.has(k) ? 1 : (codes[largest[k]] / 65535) ** 2 / 2, line = k === i ? `outline:2px solid ${rgb(BLUE)}` : "";
      span.style.cssText = `background:${rgb(RED, 1, alpha)};${alpha === 1 ? "color:#fff;" : ""}${line}`;
    });
    const where = size > 1 ? `channels ${column}\u2013${column + size - 1}` : `channel ${column}`;
    about.textContent = spans[i] ? `\u2018${get("words")[i]}\u2019 ${short(value(codes[largest[i]]))}, ${where}` : "";
  };

  const draw = (now) => {
    asked = 0;
    if (playing) {
      at = Math.min(layers - 1, at + Math.max(0, now - last) / 1000 * LAYERS_A_S);
      last = now;
      if (at >= layers - 1) rest(); else ask();
    }
    mix();
    if (get("view") !== "heat map") space(); else if (playing || resting) heat();
    canvas.hidden = get("view") === "heat map";
    slider.value = number.textContent = Math.round(at);
    play.textContent = playing ? "\u275a\u275a" : "\u25b6";
    if (shades !== (shades = [Math.round(at), playing, lit(), marked()].join())) shade();
    el.dataset.frames = ++drawn;
  };

  const rest = () => {  // the hand has let go: the kernel is told, once
    clearTimeout(resting);
    [playing, resting, at] = [false, 0, Math.round(at)];
    ask();
    if (get("value") === at) return over.remove();
    el.closest(".dfrot-massive")?.querySelector(".js-plotly-plot")?.once("plotly_afterplot", () => playing || resting || over.remove());
    model.set("value", at);
    model.save_changes();
  };
  const under = ({ offsetX: x, offsetY: y }) => {  // the token at a place of the canvas, or -1
    const { first, n, bars, wide, high, unit, c, s } = view, u = (x - wide / 2) / unit, v = (y - high * FLOOR) / unit / 0.36;
    const bar = bars.findLast(({ front: [[ax, ay], [bx, by]] }) => x > ax && x < bx && y > ay && y < by);
    const i = bar ? Math.floor(bar.i) : Math.floor((u * c + v * s + 1) / 2 * n), j = v * c - u * s;
    return bar || (i >= 0 && i < n && j > -0.5 && j < 0.7) ? first + i : -1;
  };
  const light = (i) => { if (hot !== i) { hot = i; ask(); } };
  const pick = (i) => { if (i >= 0) model.send({ token: i }); };
  const events = { "change:frames": load, "change:words": load, "change:marked": ask, "change:token": ask, "change:view": ask,
    "change:value": () => { if (!playing && !resting) { at = get("value"); ask(); } } };
  const wide = new ResizeObserver(ask);
  slider.oninput = () => { clearTimeout(resting); [playing, resting, at] = [false, -1, Number(slider.value)]; ask(); };
  slider.onkeydown = (event) => event.stopPropagation();  // the notebook would take the arrows
  slider.onchange = () => { clearTimeout(resting); resting = setTimeout(rest, REST_MS); };
  play.onclick = () => {
    if (playing) return rest();
    [playing, last, at] = [true, performance.now(), at >= layers - 1 ? 0 : at];
    ask();
  };
  text.onmouseover = ({ target }) => light(spans.indexOf(target));
  text.onmouseleave = canvas.onpointerleave = () => light(-1);
  text.onclick = ({ target }) => pick(spans.indexOf(target));
  canvas.onpointerdown = (event) => { drag = { x: event.clientX, turn, still: true }; canvas.setPointerCapture(event.pointerId); };
  canvas.onpointermove = (event) => {
    if (!drag) return light(under(event));
    if (Math.abs(event.clientX - drag.x) > 3) drag.still = false;
    turn = Math.max(-1, Math.min(1, drag.turn - (event.clientX - drag.x) / 200));
    ask();
  };
  canvas.onpointerup = (event) => { if (drag?.still) pick(under(event)); drag = null; };
  Object.entries(events).forEach(([event, act]) => model.on(event, act));
  wide.observe(el);
  load();
  return () => { wide.disconnect(); cancelAnimationFrame(asked); Object.entries(events).forEach(([event, act]) => model.off(event, act)); };
} };
