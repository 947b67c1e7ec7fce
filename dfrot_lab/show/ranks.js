// The leaderboard: one group at a time, sorted by a column's name, filtered by what is typed; a row's recipe to copy.
function ranks(place, data) {
  const make = (parent, tag, more = {}) => parent.appendChild(Object.assign(document.createElement(tag), more));
  const column = Object.fromEntries(data.columns.map((name, n) => [name, n])), HIDDEN = ["group", "recipe"];
  const TELLING = ["option", "weights", "bits", "online, %"];  // shown where they differ
  const bar = make(place, "p", { className: "dfrot-ranks" });
  const group = make(make(bar, "label", { textContent: "group " }), "select");
  const typed = make(make(bar, "label", { textContent: " containing " }), "input", { type: "search", placeholder: "Offset, better, backward \u2026" });
  const count = make(bar, "output");
  const table = make(make(place, "div", { className: "scroll" }), "table"), head = make(make(table, "thead"), "tr"), body = make(table, "tbody");
  const recipe = make(place, "div", { className: "dfrot-recipe", hidden: true });
  const copy = make(make(recipe, "p"), "button", { className: "jupyter-button", textContent: "copy this recipe" }), yaml = make(recipe, "pre");
  let by = "KL divergence", down = false;

  const text = (value) => value === null ? "" : typeof value !== "number" ? value
    : Number.isInteger(value) ? String(value) : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));
  const rank = (a, b) => {  // what is not there comes last, whichever way
    if (a === null || b === null) return (a === null) - (b === null);
    return (down ? -1 : 1) * (typeof a === "number" ? a - b : String(a).localeCompare(String(b)));
  };

  function draw() {
    const own = data.rows.filter((row) => row[column.group] === group.value);
    const shown = data.columns.filter((name) => {
      const values = new Set(own.map((row) => row[column[name]]));
      return !HIDDEN.includes(name) && (TELLING.includes(name) ? values.size > 1 : values.size > 1 || !values.has(null));
    });
    if (!shown.includes(by)) by = shown[0];
    const words = typed.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kept = own.filter((row) => words.every((word) => shown.some((name) => text(row[column[name]]).toLowerCase().includes(word))));
    kept.sort((a, b) => rank(a[column[by]], b[column[by]]));
    const same = ["bits"].filter((name) => !shown.includes(name)).map((name) => own[0][column[name]]);
    count.textContent = ` ${kept.length} of ${own.length} rows${same.length ? ", " + same : ""}`;
    head.replaceChildren();
    for (const name of shown) {
      const cell = make(head, "th", { scope: "col", ariaSort: name !== by ? "none" : down ? "descending" : "ascending" });
      make(cell, "button", { textContent: name + (name !== by ? "" : down ? " \u2193" : " \u2191"), title: "sort by this", onclick: () => {
        [down, by] = [name === by && !down, name];
        draw();
        head.querySelectorAll("button")[shown.indexOf(name)].focus();
      } });
    }
    body.replaceChildren();
    for (const row of kept) {
      const line = make(body, "tr");
      for (const name of shown) {
        if (name !== "rotation") { make(line, "td", { textContent: text(row[column[name]]) }); continue; }
        make(make(line, "td"), "button", { textContent: row[column.rotation], title: "show its recipe", onclick: () => {
          yaml.textContent = data.recipes[row[column.recipe]] ?? "";
          recipe.hidden = false;
          recipe.scrollIntoView({ block: "nearest" });
        } });
      }
    }
  }

  copy.onclick = () => { getSelection().selectAllChildren(yaml); document.execCommand("copy"); };
  for (const name of new Set(data.rows.map((row) => row[column.group]))) make(group, "option", { textContent: name });
  group.onchange = () => { recipe.hidden = true; draw(); };
  typed.oninput = draw;
  if (data.rows.length) draw(); else place.replaceChildren();
}
