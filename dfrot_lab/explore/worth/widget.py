"""What is a rotation worth: stored perplexities are shown at once, the rest is computed on a button."""

import html
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from ipywidgets import BoundedIntText, Dropdown, FloatProgress, SelectMultiple, ToggleButtons
from matplotlib.figure import Figure
from traitlets import Enum, HasTraits, Int, Tuple, Unicode

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.page import CLEAR, GREY, PICKED, Plot, beside, panel
from dfrot_lab.explore.shell import Explorer, control
from dfrot_lab.explore.worth import numbers
from dfrot_lab.explore.worth.board import Board
from dfrot_lab.explore.worth.numbers import BITS, DIFFERENCE, FULL, KEPT, Tally, interval
from dfrot_lab.maths import tables
from dfrot_lab.model import corpus
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.specs import WINDOWS, Recipe
from dfrot_lab.score import perplexity, rows
from dfrot_lab.show import figures, ranks, theme
from dfrot_lab.study import cost, main
from dfrot_lab.study.setting import Setting

LLAMA = {"LLaMA": ("7B", "13B", "30B"), "LLaMA2": ("7B", "13B", "70B"), "LLaMA3": ("8B", "70B")}
LLAMAS = [f"{name}-{size}" for name, sizes in LLAMA.items() for size in sizes]
PAPER_MODELS = (*LLAMAS, "Mistral-7B-v0.3", "QWen2-7B")
SEVERAL = {"rows": 5, "tooltip": "several: hold Ctrl or Shift"}
BEYOND = (
    "<b>Every method under one pipeline</b>, as far as it is computed: a column's name sorts, a rotation's "
    "shows its recipe."
)
NO_BOARD = (
    "No row of the leaderboard is stored for this text and so many windows: "
    "<code>dfrot-lab leaderboard</code> computes them."
)
DOTTED = {"dash": "dot", "color": GREY, "width": 1.5}


class Bars(Plot):
    """A trace for each rotation, filled, and hollow with massive tokens kept out."""

    def __init__(self) -> None:
        error: dict[str, Any] = {"type": "data", "symmetric": False, "color": GREY}
        text = {"textposition": "inside", "textangle": -90, "insidetextanchor": "start"}
        look = {**text, "error_y": error, "visible": False, "hovertemplate": "%{customdata}<extra></extra>"}
        bars, colours = [], theme.looks(registry.rows())["palette"]
        for name, colour in colours.items():
            line, white = {"color": colour, "width": 2}, {"color": "#ffffff"}
            bars.append(go.Bar(look, name=name, marker={"color": colour, "line": line}, insidetextfont=white))
            hollow = {"marker": {"color": CLEAR, "line": line}, "insidetextfont": {"color": GREY}}
            bars.append(go.Bar(look, name=f"{name}, kept out", **hollow))
        gaps: dict[str, Any] = {"barmode": "group", "bargap": 0.2, "bargroupgap": 0.08, "margin": {"t": 64}}
        title, x = {"y": 0.96, "font": {"size": 13}}, {"type": "category"}
        under = {"y": -0.12, "yanchor": "top"}
        super().__init__(bars, title=title, xaxis=x, yaxis_title="perplexity", legend=under, **gaps)

    def draw(self, table: pd.DataFrame, title: str) -> None:
        """The stored rows of `rows_table`; a value far above the best is cut off at the top and written."""
        rows = table[(table["bits"] != FULL) & table["stored"]]
        exact = table.loc[(table["bits"] == FULL) & table["stored"], "perplexity"].tolist()
        near = rows[rows["perplexity"] <= figures.FAR * rows["perplexity"].min()]
        highest = float(max([*near["perplexity"], *exact, 1.0]))
        top = 1.08 * max(highest, min(1.5 * highest, float(near["high"].max())))  # one build's reach far
        across = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "line": DOTTED}
        with self.batch_update():
            for trace in self.data:
                own = rows[rows["row"] == trace.name]
                value = own["perplexity"].to_numpy()
                ends = np.where(value > top, 0, np.nan_to_num([own["high"] - value, value - own["low"]]))
                trace.x, trace.y = own["bits"].tolist(), np.minimum(value, top).tolist()
                trace.error_y.array, trace.error_y.arrayminus = ends.tolist()
                trace.text = [f"{v:,.0f}, off the scale" if v > top else f"{v:.2f}" for v in value]
                trace.customdata = [_hover(row) for row in own.to_dict("records")]
                trace.visible = bool(len(own))
            self.layout.xaxis.categoryarray = [b for b in BITS if b in set(rows["bits"])]
            self.layout.yaxis.range = [0, top]
            self.layout.shapes = [{**across, "y0": y, "y1": y} for y in exact]
            self.layout.title.text = title + "".join(f"<br>dotted: full precision, {y:.2f}" for y in exact)


def _hover(row: Mapping[Any, Any]) -> str:
    found = interval(row["perplexity"], row["low"], row["high"])
    lines = [f"{theme.plain(row['row'])} at {row['bits']}: {found}"]
    if difference := interval(*(row[name] for name in DIFFERENCE)):
        lines.append(f"against RH, %: {difference}")
    return "<br>".join([*lines, f"{row['windows']} windows"] if row["windows"] else lines)


class _State(HasTraits):
    rotations = control(Tuple(), SelectMultiple, "Rotations", 210, **SEVERAL)
    bits = control(Tuple((FULL, *main.BITS)), SelectMultiple, "Bits W-A-KV", 210, options=BITS, **SEVERAL)
    keep_out = control(Tuple(("none",)), SelectMultiple, "Kept out", 210, options=list(KEPT), **SEVERAL)
    weights = control(Unicode("rtn"), ToggleButtons, "Weights", 70)
    corpus = control(Unicode("auto"), Dropdown, "Text")
    windows = control(Int(WINDOWS), BoundedIntText, "Windows", 180, min=1, max=200)
    paper_model = control(Enum(PAPER_MODELS, "LLaMA2-7B"), Dropdown, "Paper's")


class Worth(Explorer):
    """What the rotations are worth end to end: stored rows at once, the `missing` computed on a button."""

    ONE, STOPPING = "computation", "stopping at the end of this window"
    CANCELLED = "Stopped. What is finished is kept: the button goes on from there"

    def __init__(self, setting: Setting | None = None, store: Store | None = None) -> None:
        self.setting = setting = (setting or Setting.of_profile()).resolved()
        self.store = store or Store()
        names, same = tuple(registry.rows()), setting.model_dump(include={"weights", "corpus", "windows"})
        texts = dict.fromkeys([setting.corpus, corpus.WIKITEXT2, corpus.SAMPLE])
        late = {"rotations": names, "weights": [*registry.WEIGHTS]}
        super().__init__(
            _State(rotations=(*PICKED, "Offset+"), **same), **late, corpus=[(Path(t).name, t) for t in texts]
        )
        self.found, self.missing = dict[str, perplexity.EvalResult](), list[Recipe]()
        self.plot, self.paper_plot = Bars(), Bars()
        self.note, self.rows, self.paper = panel(60), panel(250, width="100%"), panel(220, width="100%")
        self.bar = FloatProgress(max=1, description="Done", layout={"width": "300px"})
        self.button("compute", "Compute missing rows", self.compute, icon="play", layout={"width": "220px"})
        self.button("cancel", "Cancel", self.cancel, icon="stop")
        picked = self.row("rotations", "bits", "keep_out", ["weights", "corpus", "windows", "paper_model"])
        above = [picked, self.note, self.row("compute", "cancel", self.bar), self.status.line]
        self.board, self.beyond = Board(), panel(48, width="100%")
        below = [self.rows, self.paper, self.beyond, self.board]
        self.children = [*above, beside(self.plot, self.paper_plot, shares=(60, 40)), *below]
        self.on(" ".join(self.state.trait_names()), self.refresh)
        self.on("corpus windows", self.rank)
        self.refresh()
        self.rank()

    def rank(self) -> None:
        """Show the rows of the leaderboard that are stored for the text and windows that are picked."""
        found = ranks.NOTHING
        with self._lock, suppress(ValueError):  # what is wrong with the text stands in the status line
            found = ranks.listed(self.chosen, self.store)
        self.board.data, self.beyond.value = found, BEYOND if found["rows"] else NO_BOARD

    @property
    def chosen(self) -> Setting:
        """The setting with the text and windows that are picked."""
        return self.setting.with_(corpus=self.state.corpus, windows=self.state.windows)

    def specs(self) -> list[Recipe]:
        """The rows that are picked, rows that share a built model side by side."""
        state, kept = self.state, [KEPT[name] for name in self.state.keep_out]
        return numbers.specs_of(self.chosen, state.rotations, state.bits, state.weights, kept)

    def lookup(self, spec: Recipe) -> perplexity.EvalResult | None:
        """The row's result from the store, looked up once."""
        if spec.key not in self.found and (result := perplexity.stored(spec, self.store)):
            self.found[spec.key] = result
        return self.found.get(spec.key)

    def table(self) -> pd.DataFrame:
        """The rows that are picked: perplexity, change against RH, intervals, stored or not."""
        row, rh, weights = self.chosen.row, self.chosen.method("RH"), self.state.weights
        reference = {b: self.lookup(row(b, rh, weights=weights)) for b in self.state.bits}
        return numbers.rows_table(self.specs(), self.lookup, reference)

    def static(self) -> Figure:
        """The stored rows as the main job draws them."""
        found = [result for spec in self.specs() if (result := self.lookup(spec))]
        if all(result.spec.bits == FULL for result in found):
            raise ValueError("nothing to draw: none of the rows that are picked is stored yet")
        with figures.theme():
            drawn = figures.figure_perplexity(tables.table(rows.rows([result])[0] for result in found))
        figures.plt.close(drawn)  # whoever asked for it shows it, once
        return drawn

    def refresh(self) -> None:
        """Show what is stored of the rows picked, and name the rest."""
        with self._lock, self.status.doing("looking in the store"):
            specs, model = self.specs(), self.state.paper_model
            self.missing = [spec for spec in specs if self.lookup(spec) is None]
            table, beside = self.table(), numbers.paper_table(specs, self.lookup)
            self.plot.draw(table, "Perplexity and its 95% interval")
            self.paper_plot.draw(numbers.paper_rows(beside, model), f"The paper's {model}")
            self.rows.value = numbers.shown(table)
            self.paper.value = numbers.shown_paper(beside, self.state.corpus)
            self.note.value = f"<span>{html.escape(numbers.said(self.missing, self.store))}</span>"
            self.enable()
            self.status.say(f"{len(specs) - len(self.missing)} of {len(specs)} rows are stored")

    def compute(self) -> None:
        """Compute the missing rows in the background, one window after the other."""
        if self.job.running or not self.missing:
            return
        specs, scoring = list(self.missing), cost.scoring(self.missing[0]).seconds(cost.TWO_CORES)
        tally = Tally(cost.seconds(specs, self.store), scoring)
        self.bar.value = 0.0

        def on_part(part: str, done: int, total: int) -> None:
            tally.at(part, done, total)
            self._tell(specs, tally, f"{part} {done} of {total}")
            self.job.step()

        def on_result(_result: perplexity.EvalResult) -> None:
            tally.next()
            self.refresh()
            self._tell(specs, tally, "")

        first = f"computing {main.row_name(specs[0])}, row 1 of {len(specs)}"
        self.work(first, lambda _job: perplexity.evaluate_all(specs, self.store, on_result, on_part))

    def _tell(self, specs: Sequence[Recipe], tally: Tally, what: str) -> None:
        self.bar.value = tally.share
        if tally.done < len(specs):
            row, left = f"row {tally.done + 1} of {len(specs)}", f"about {cost.duration(tally.left)} left"
            parts = [main.row_name(specs[tally.done]), what, row, left]
            self.status.busy("computing " + ", ".join(filter(None, parts)))

    def _enabled(self) -> dict[str, bool]:
        able = super()._enabled()
        return {**able, "compute": able["compute"] and bool(self.missing)}

    def _at_end(self, error: BaseException | None) -> str:
        self.refresh()
        self.rank()
        return super()._at_end(error)
