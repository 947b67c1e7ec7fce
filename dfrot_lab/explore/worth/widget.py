"""What is a rotation worth: stored perplexities are shown at once, the rest is computed on a button."""

import html
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from ipywidgets import BoundedIntText, Dropdown, FloatProgress, SelectMultiple, ToggleButtons
from matplotlib.figure import Figure
from traitlets import Enum, HasTraits, Int, Tuple, Unicode

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.shell import offers
from dfrot_lab.explore.shell.explorer import Explorer, beside, control
from dfrot_lab.explore.shell.job import Job
from dfrot_lab.explore.shell.offers import BITS, FULL
from dfrot_lab.explore.shell.words import duration, panel
from dfrot_lab.explore.worth import numbers
from dfrot_lab.explore.worth.numbers import KEPT, Tally
from dfrot_lab.explore.worth.plots import Bars
from dfrot_lab.maths import tables
from dfrot_lab.model import corpus
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score import perplexity, rows
from dfrot_lab.score.perplexity import EvalResult
from dfrot_lab.show import figures
from dfrot_lab.study import main
from dfrot_lab.study.setting import Setting

LLAMA = {"LLaMA": ("7B", "13B", "30B"), "LLaMA2": ("7B", "13B", "70B"), "LLaMA3": ("8B", "70B")}
LLAMAS = [f"{name}-{size}" for name, sizes in LLAMA.items() for size in sizes]
PAPER_MODELS = (*LLAMAS, "Mistral-7B-v0.3", "QWen2-7B")
SEVERAL = {"rows": 5, "tooltip": "several: hold Ctrl or Shift"}


class State(HasTraits):
    """Rotations, bits, weights, whether massive tokens are kept out, the text and its windows."""

    rotations = control(Tuple(), SelectMultiple, "Rotations", 210, **SEVERAL)
    bits = control(Tuple((FULL, *main.BITS)), SelectMultiple, "Bits W-A-KV", 210, options=BITS, **SEVERAL)
    keep_out = control(Tuple(("none",)), SelectMultiple, "Kept out", 210, options=list(KEPT), **SEVERAL)
    weights = control(Unicode("gptq"), ToggleButtons, "Weights", 70)
    corpus = control(Unicode("auto"), Dropdown, "Text")
    windows = control(Int(6), BoundedIntText, "Windows", 180, min=1, max=200)
    paper_model = control(Enum(PAPER_MODELS, "LLaMA2-7B"), Dropdown, "Paper's")


class Worth(Explorer):
    """The widget of `worth`; `missing` are the rows that are picked and not stored."""

    ONE, CANCELLED = "computation", "Stopped. What is finished is kept: the button goes on from there"
    state: State

    def __init__(self, setting: Setting, store: Store) -> None:
        self.setting, self.store = setting, store
        texts = dict.fromkeys([setting.corpus, corpus.WIKITEXT2, corpus.SAMPLE])
        names = offers.methods()
        picked = State(
            rotations=names, weights=setting.weights, corpus=setting.corpus, windows=setting.windows
        )
        super().__init__(
            picked,
            corpus={"options": [(Path(text).name, text) for text in texts]},
            rotations={"options": names},
            weights={"options": offers.weights()},
        )
        self.found: dict[str, EvalResult] = {}
        self.missing: list[Recipe] = []
        self.plot, self.paper_plot = Bars(), Bars()
        self.note, self.rows, self.paper = panel(60), panel(250, width="100%"), panel(220, width="100%")
        self.bar = FloatProgress(max=1, description="Done", layout={"width": "300px"})
        wide = {"width": "220px"}
        self.button("compute", "Compute missing rows", self.compute, icon="play", layout=wide)
        self.button("cancel", "Cancel", self.cancel, icon="stop")
        self.children = [
            self.row("rotations", "bits", "keep_out", ["weights", "corpus", "windows", "paper_model"]),
            self.note,
            self.row("compute", "cancel", self.bar),
            self.status.widget,
            beside(self.plot, self.paper_plot, shares=(60, 40)),
            self.rows,
            self.paper,
        ]
        self.on(" ".join(self.state.trait_names()), self.refresh)
        self.refresh()

    @property
    def chosen(self) -> Setting:
        """The setting with the text and windows that are picked."""
        return self.setting.with_(corpus=self.state.corpus, windows=self.state.windows)

    def specs(self) -> list[Recipe]:
        """The rows that are picked, rows that share a built model side by side."""
        state, kept = self.state, [KEPT[name] for name in self.state.keep_out]
        return numbers.specs_of(self.chosen, state.rotations, state.bits, state.weights, kept)

    def lookup(self, spec: Recipe) -> EvalResult | None:
        """The row's result from the store, looked up once."""
        if spec.key not in self.found and (result := perplexity.stored(spec, self.store)):
            self.found[spec.key] = result
        return self.found.get(spec.key)

    def table(self) -> pd.DataFrame:
        """The rows that are picked: perplexity, 95% interval, paired difference to RH, stored or not."""
        setting, weights = self.chosen, self.state.weights
        reference = {b: self.lookup(offers.row(setting, "RH", b, weights=weights)) for b in self.state.bits}
        return numbers.rows_table(self.specs(), self.lookup, reference)

    def static(self) -> Figure:
        """The stored rows as the main job draws them."""
        found = [result for spec in self.specs() if (result := self.lookup(spec))]
        if all(result.spec.bits == FULL for result in found):
            raise ValueError("nothing to draw: none of the rows that are picked is stored yet")
        with figures.theme():
            drawn = figures.figure_perplexity(tables.table(map(rows.row, found)))
        figures.plt.close(drawn)  # whoever asked for it shows it, once
        return drawn

    def refresh(self) -> None:
        """Show what is stored of the rows picked, and name the rest."""
        with self._lock, self.status.doing("looking in the store", self._count):
            specs, model = self.specs(), self.state.paper_model
            self.missing = [spec for spec in specs if self.lookup(spec) is None]
            table, beside = self.table(), numbers.paper_table(specs, self.lookup)
            self.plot.draw(table, "Perplexity and its 95% interval")
            self.paper_plot.draw(numbers.paper_rows(beside, model), f"The paper's {model}")
            self.rows.value = numbers.shown(table)
            self.paper.value = numbers.shown_paper(beside, self.state.corpus)
            self.note.value = f"<span>{html.escape(numbers.said(self.missing, self.store))}</span>"
            self.enable()

    def _count(self) -> str:
        rows = len(self.specs())
        return f"{rows - len(self.missing)} of {rows} rows are stored"

    def compute(self) -> None:
        """Compute the missing rows in the background, one window after the other."""
        if self.job.running or not self.missing:
            return
        specs, tally = list(self.missing), Tally.of(self.missing, self.store)
        self.bar.value = 0.0
        first = f"computing {main.row_name(specs[0])}, row 1 of {len(specs)}"
        self.work(first, lambda job: self._work(job, specs, tally))

    def cancel(self) -> None:
        """Stop at the end of the window or layer that is being computed; what is finished is kept."""
        if self.job.running:
            self.status.busy("stopping at the end of this window")
            self.job.cancel()

    def _work(self, job: Job, specs: Sequence[Recipe], tally: Tally) -> None:
        def on_part(part: str, done: int, total: int) -> None:
            tally.at(part, done, total)
            self._tell(specs, tally, f"{part} {done} of {total}")
            job.step()

        def on_result(_result: EvalResult) -> None:
            tally.next()
            self.refresh()
            self._tell(specs, tally, "")

        perplexity.evaluate_all(specs, self.store, on_result, on_part)

    def _tell(self, specs: Sequence[Recipe], tally: Tally, what: str) -> None:
        self.bar.value = tally.share
        if tally.done < len(specs):
            row, left = f"row {tally.done + 1} of {len(specs)}", f"about {duration(tally.left)} left"
            parts = [main.row_name(specs[tally.done]), what, row, left]
            self.status.busy("computing " + ", ".join(filter(None, parts)))

    def enabled(self) -> dict[str, bool]:
        """There must be something to compute."""
        running = self.job.running
        return {"compute": bool(self.missing) and not running, "cancel": running}

    def at_end(self, error: BaseException | None) -> str:
        """What is stored now."""
        self.refresh()
        return super().at_end(error)


def worth(setting: Setting | None = None, store: Store | None = None) -> Worth:
    """What the rotations are worth end to end: stored rows at once, the missing timed and computed."""
    return Worth((setting or Setting.of_profile()).resolved(), store or Store())
