"""The leaderboard in an explorer: the table of the report, a group at a time."""

from typing import Any

import anywidget
from traitlets import Dict

from dfrot_lab.show import ranks

STARTS = """
export default { render({ model, el }) {
  el.classList.add("dfrot-board");
  const draw = () => { el.replaceChildren(); ranks(el, model.get("data")); };
  draw();
  model.on("change:data", draw);
  return () => model.off("change:data", draw);
} };
"""


class Board(anywidget.AnyWidget):
    """`data` is that of `ranks.listed`; with no rows nothing is shown."""

    _esm = ranks.SCRIPT.read_text(encoding="utf-8") + STARTS
    data: Any = Dict(ranks.NOTHING).tag(sync=True)
