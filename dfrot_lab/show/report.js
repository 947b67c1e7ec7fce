"use strict";
// The report's pictures that answer: tokens beside their text, and a token on a dial. What they show lies in the page as JSON.
const $ = name => document.getElementById(name);
const data = JSON.parse($("data").textContent), { tokens, turning } = data;
const number = x => x === null ? "-" : x >= 100 ? Math.round(x).toLocaleString("en") : String(+x.toPrecision(3));

function put(parent, tag, attributes = {}, text = "") {
  const made = document.createElementNS(parent.namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return parent.appendChild(made);
}

function ticks(low, high, about) {
  const rough = (high - low) / about, ten = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(n => n * ten).find(n => n >= rough);
  const first = Math.ceil(low / step), last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, n) => +((first + n) * step).toPrecision(12));
}

// An emptied picture with its axes, as wide as its place; where on it a pair of values lies.
function axes(svg, x, y, names, up = ticks(...y, 5).map(value => [value, number(value)])) {
  const width = svg.clientWidth || 600, height = svg.clientHeight || 360, [left, top, right, bottom] = [52, 12, width - 12, height - 42];
  svg.replaceChildren();
  const at = (a, b) => [left + (a - x[0]) / (x[1] - x[0]) * (right - left), bottom - (b - y[0]) / (y[1] - y[0]) * (bottom - top)];
  for (const value of ticks(...x, width / 90)) {
    const [place] = at(value, y[0]);
    put(svg, "path", { class: "grid x", d: `M${place} ${top}V${bottom}` });
    put(svg, "text", { x: place, y: bottom + 16, "text-anchor": "middle" }, value < 0 ? "\u2212" + number(-value) : number(value));
  }
  for (const [value, label] of up) {
    const place = at(x[0], value)[1];
    put(svg, "path", { class: "grid", d: `M${left} ${place}H${right}` });
    put(svg, "text", { x: left - 6, y: place + 4, "text-anchor": "end" }, label);
  }
  put(svg, "text", { x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, names[0]);
  put(svg, "text", { transform: `translate(13 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, names[1]);
  return at;
}

// ---- tokens: a dot is a token of the text

const [plot, text, pair] = [$("tokens"), $("text"), $("pair")], FAR = 18;
const words = tokens.texts.map((word, n) => put(text, "bdi", tokens.massive[n] ? { class: "massive" } : {}, word));
let dots = [], marked = Math.max(0, tokens.massive.indexOf(true)), held = false;

function scatter() {
  const [across, up] = tokens.pairs[pair.value], [x, y] = [across, up].map(name => tokens.errors[name]);
  const top = values => 1.05 * Math.max(...values.filter(value => value !== null), 1e-9), ends = [[0, top(x)], [0, top(y)]];
  const at = axes(plot, ...ends, [`error under ${across}`, `error under ${up}`]), equal = Math.min(ends[0][1], ends[1][1]);
  put(plot, "path", { class: "equal", d: `M${at(0, 0)}L${at(equal, equal)}` });
  dots = x.map((value, n) => value === null || y[n] === null ? null : at(value, y[n]));
  for (const heavy of [false, true]) dots.forEach((dot, n) => dot && tokens.massive[n] === heavy &&
    put(plot, "circle", { cx: dot[0].toFixed(1), cy: dot[1].toFixed(1), r: heavy ? 6 : 3, class: heavy ? "massive" : "ordinary" }));
  mark(marked, false);
}

function mark(n, scroll) {
  words[marked].classList.remove("marked");
  words[marked = n].classList.add("marked");
  plot.querySelector(".ring")?.remove();
  if (dots[n]) put(plot, "circle", { class: "ring", cx: dots[n][0], cy: dots[n][1], r: 10 });
  if (scroll) text.scrollTop = words[n].offsetTop - text.clientHeight / 2;
  const said = Object.entries(tokens.errors).map(([name, values]) => `${name} ${number(values[n])}`).join(", ");
  $("token").textContent = `token ${n}, \u2068\u2018${tokens.texts[n]}\u2019\u2069${tokens.massive[n] ? ", massive" : ""}: error ${said}`;
}

function nearest(event) {
  const box = plot.getBoundingClientRect(), far = dot => dot ? Math.hypot(dot[0] - event.clientX + box.x, dot[1] - event.clientY + box.y) : Infinity;
  const best = dots.reduce((best, dot, n) => far(dot) < far(dots[best]) ? n : best, 0);
  return far(dots[best]) < FAR ? best : -1;
}

function follow(place, find, scroll) {
  for (const kind of ["pointermove", "click"]) place.addEventListener(kind, event => {
    const n = find(event);
    if (kind === "click") held = n >= 0 && !(held && n === marked);
    if (n >= 0 && (kind === "click" || !held)) mark(n, scroll);
  });
}

tokens.pairs.forEach(([across, up], n) => put(pair, "option", { value: n }, `${up} against ${across}`));
pair.addEventListener("change", scatter);
follow(plot, nearest, true);
follow(text, event => words.indexOf(event.target), false);
text.addEventListener("keydown", event => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step && words[marked + step]) { event.preventDefault(); mark(marked + step, true); }
});
new ResizeObserver(scatter).observe(plot);
mark(marked, true);

// ---- the dial

function turn() {
  const way = turning.ways[$("to").value], n = +$("turn").value, frame = way.frames[n], bins = frame.counts.length;
  const [low, step, count] = frame.levels, log = value => Math.log10(value / 0.7), most = log(1.3 * turning.channels);
  const tens = [1, 10, 100, 1000].filter(value => log(value) < most).map(value => [log(value), value]);
  let at = axes($("values"), [frame.low, frame.low + bins * frame.width], [0, most], ["value", "channels (logarithmic)"], tens);
  for (let level = 0; level < count; level++) put($("values"), "path", { class: "level", d: `M${at(low + level * step, 0)}L${at(low + level * step, most)}` });
  frame.counts.forEach((value, bin) => {
    if (!value) return;
    const [left, top] = at(frame.low + bin * frame.width, log(value)), [right, bottom] = at(frame.low + (bin + 1) * frame.width, 0);
    put($("values"), "rect", { class: "massive", x: left, y: top, width: Math.max(right - left - 0.5, 1.5), height: bottom - top });
  });
  const steps = way.token.length - 1, high = 1.05 * Math.max(...way.token, ...way.ordinary, 1e-9);
  at = axes($("errors"), [0, 100], [0, high], ["how far it is turned (%)", "error"]);
  for (const kind of ["ordinary", "token"])
    put($("errors"), "path", { class: `line ${kind}`, d: "M" + way[kind].map((value, at_) => at(100 * at_ / steps, value)).join("L") });
  const [x, y] = at(100 * n / steps, way.token[n]);
  put($("errors"), "circle", { class: "massive", cx: x, cy: y, r: 6 });
  $("turned").textContent = `${Math.round(100 * n / steps)}% of the way to ${$("to").value}: the grid's step is ${number(step)}, ` +
    `the token's error ${number(way.token[n])}, that of ordinary tokens ${number(way.ordinary[n])} on average`;
}

if ($("turn")) {
  for (const name of Object.keys(turning.ways)) put($("to"), "option", { value: name }, name);
  for (const name of ["turn", "to"]) $(name).addEventListener("input", turn);
  new ResizeObserver(turn).observe($("values"));
}

// ---- the leaderboard, where some of it is computed

if ($("board")) ranks($("board"), data.board);
