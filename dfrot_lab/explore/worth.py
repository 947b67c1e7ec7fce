"""What is a rotation worth: the perplexity of the rows one picks. What is stored is shown at once, the rest
is computed in the background.
"""

import html
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
import traitlets
from matplotlib.figure import Figure

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import corpus
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score import perplexity
from dfrot_lab.score.perplexity import EvalResult
from dfrot_lab.show import figures
from dfrot_lab.study import mainjob
from dfrot_lab.study.setting import MAIN_BITS, Setting

from . import base, worth_rows
from .worth_rows import BITS, KEPT, PAPER_MODELS, ROTATIONS

WIDTHS = ("60%", "40%")
"""Of our rows, and of the paper's beside them."""


class Choice(traitlets.HasTraits):
    """What is looked at: rotations, bits, how weights are quantized, whether massive tokens are kept out, the
    text and its windows.
    """

    rotations = traitlets.Tuple(default_value=ROTATIONS)
    bits = traitlets.Tuple(default_value=("16-16-16", *MAIN_BITS))
    weights = traitlets.Unicode("gptq")
    keep_out = traitlets.Tuple(default_value=("none",))
    corpus = traitlets.Unicode("auto")
    windows = traitlets.Int(6)
    paper_model = traitlets.Unicode("LLaMA2-7B")


@dataclass
class Tally:
    """How far the background work is: nominal seconds of every row and of scoring one; the rows done, and
    what is done of the one being made.
    """

    costs: list[float]
    scoring: float
    done: int = 0
    part: float = 0.0

    def __post_init__(self) -> None:
        self.started = time.perf_counter()

    def at(self, part: str, done: int, total: int) -> None:
        """`done` of `total` layers of weights, or windows, of the row being made."""
        building = self.costs[self.done] - self.scoring
        self.part = building + self.scoring * done / total if part == "window" else building * done / total

    def next(self) -> None:
        """The row being made is finished."""
        self.done, self.part = self.done + 1, 0.0

    @property
    def share(self) -> float:
        """What is done, 0 to 1."""
        return min(1.0, (sum(self.costs[: self.done]) + self.part) / max(sum(self.costs), 1e-9))

    @property
    def left(self) -> float:
        """Seconds left, at the pace so far."""
        spent = time.perf_counter() - self.started
        return spent * (1 - self.share) / self.share if self.share > 0.02 else sum(self.costs)


def worth(setting: Setting | None = None, store: Store | None = None) -> "Worth":
    """A widget that shows what the rotations are worth end to end: stored rows at once, missing ones named,
    timed, and computed on a button.
    """
    return Worth((setting or Setting.of_profile()).resolved(), store or Store())


class Worth(widgets.VBox):
    """The explorer: `state` (Choice), `controls`, `plot`, `paper_plot`, `status`, `bar`, `job`; `table()`,
    `static()`, `missing`.
    """

    def __init__(self, setting: Setting, store: Store) -> None:
        self.setting, self.store = setting, store
        self.state = Choice(weights=setting.weights, corpus=setting.corpus, windows=setting.windows)
        self.found: dict[str, EvalResult] = {}
        self.text_key: perplexity.TextKey = cache(corpus.fingerprint)
        self.missing: list[Recipe] = []
        self.status, self.job = base.Status(), base.Job(self._ended)
        self.plot, self.paper_plot = worth_rows.empty_bars(), worth_rows.empty_bars()
        self.rows, self.paper = (
            widgets.HTML(layout=widgets.Layout(height=height, overflow="auto", width="100%"))
            for height in ("250px", "220px")
        )
        self.bar = widgets.FloatProgress(
            min=0, max=1, description="Done", layout=widgets.Layout(width="300px")
        )
        self.note = widgets.HTML(layout=widgets.Layout(height="60px", overflow="auto"))
        self.controls = _controls(setting)
        self._lock = threading.RLock()
        for name in ("rotations", "bits", "weights", "keep_out", "corpus", "windows", "paper_model"):
            traitlets.link((self.controls[name], "value"), (self.state, name))
        self.controls["compute"].on_click(lambda _button: self.compute())
        self.controls["cancel"].on_click(lambda _button: self.cancel())
        pick, texts = (("rotations", "bits", "keep_out"), ("weights", "corpus", "windows", "paper_model"))
        frame = base.column()
        super().__init__(
            [
                base.row(
                    *(self.controls[name] for name in pick),
                    widgets.VBox([self.controls[name] for name in texts]),
                ),
                self.note,
                base.row(self.controls["compute"], self.controls["cancel"], self.bar),
                self.status.widget,
                widgets.HBox(
                    [
                        widgets.Box([plot], layout={"width": width})
                        for plot, width in zip((self.plot, self.paper_plot), WIDTHS, strict=True)
                    ]
                ),
                self.rows,
                self.paper,
            ],
            layout=frame.layout,
        )
        self.add_class("dfrot-worth")
        self.state.observe(lambda _change: self.refresh(), traitlets.All)
        self.refresh()

    @property
    def chosen(self) -> Setting:
        """The setting with the text and windows that are picked."""
        return replace(self.setting, corpus=self.state.corpus, windows=self.state.windows)

    def specs(self) -> list[Recipe]:
        """The rows that are picked, rows that share a built model side by side."""
        kept = [KEPT[name] for name in self.state.keep_out]
        return worth_rows.specs_of(
            self.chosen, self.state.rotations, self.state.bits, self.state.weights, kept
        )

    def lookup(self, spec: Recipe) -> EvalResult | None:
        """The row's result from the store, looked up once."""
        if spec.key not in self.found and (result := perplexity.stored(spec, self.store, self.text_key)):
            self.found[spec.key] = result
        return self.found.get(spec.key)

    def table(self) -> pd.DataFrame:
        """The rows that are picked: perplexity, its 95% interval, the paired difference to RH at the same
        bits, and whether it is there.
        """
        references = {
            bits: self.lookup(self.chosen.row(bits, self.chosen.rotation("RH"), weights=self.state.weights))
            for bits in self.state.bits
        }
        return worth_rows.rows_table(self.specs(), self.lookup, references)

    def paper_table(self) -> pd.DataFrame:
        """The paper's numbers for the same rotations, bits and weights, a column a model, ours last; empty
        where the paper has none.
        """
        return worth_rows.paper_table(self.specs(), self.lookup)

    def static(self) -> Figure:
        """The stored rows as the main job draws them."""
        found = [result for spec in self.specs() if (result := self.lookup(spec))]
        if all(result.spec.bits == "16-16-16" for result in found):
            raise ValueError("nothing to draw: none of the rows that are picked is stored yet")
        with figures.theme():
            drawn = figures.figure_perplexity(mainjob.main_table(found))
        figures.plt.close(drawn)  # whoever asked for it shows it, once
        return drawn

    def refresh(self) -> None:
        """Show what is stored of the rows picked, and name the rest."""
        with self._lock, self.status.doing("looking in the store", ""):
            specs, self.text_key = (
                self.specs(),
                cache(corpus.fingerprint),
            )  # a text file may have changed since
            self.missing = [spec for spec in specs if self.lookup(spec) is None]
            table, beside = self.table(), self.paper_table()
            worth_rows.draw_bars(self.plot, table, "Perplexity and its 95% interval")
            worth_rows.draw_bars(
                self.paper_plot,
                worth_rows.paper_rows(beside, self.state.paper_model),
                f"The paper's {self.state.paper_model}",
            )
            self.rows.value = worth_rows.shown(table)
            self.paper.value = worth_rows.shown_paper(beside, self.state.corpus)
            self.note.value = f"<span>{html.escape(worth_rows.said(self.missing, self.store))}</span>"
            self.controls["compute"].disabled = self.job.running or not self.missing
        if self.status.state == "ready":
            self.status.say(f"{len(specs) - len(self.missing)} of {len(specs)} rows are stored")

    def compute(self) -> None:
        """Compute the missing rows in the background, one window after the other."""
        if self.job.running or not self.missing:
            return
        specs = list(self.missing)
        tally = Tally(worth_rows.costs(specs, self.store), worth_rows.scoring_seconds(specs[0]))
        self.controls["compute"].disabled, self.controls["cancel"].disabled = True, False
        self.bar.value = 0.0
        self.status.busy(f"computing {mainjob.row_name(specs[0])}, row 1 of {len(specs)}")
        self.job.start(lambda job: self._work(job, specs, tally))

    def cancel(self) -> None:
        """Stop at the end of the window or layer that is being computed; what is finished is kept."""
        if self.job.running:
            self.status.busy("stopping at the end of this window")
            self.job.cancel()

    def _work(self, job: base.Job, specs: Sequence[Recipe], tally: Tally) -> None:
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
            row = f"row {tally.done + 1} of {len(specs)}"
            parts = [
                mainjob.row_name(specs[tally.done]),
                what,
                row,
                f"about {worth_rows.duration(tally.left)} left",
            ]
            self.status.busy("computing " + ", ".join(filter(None, parts)))

    def _ended(self, error: BaseException | None) -> None:
        """In the job's thread, which is about to end."""
        self.controls["cancel"].disabled = True
        self.refresh()
        self.controls["compute"].disabled = not self.missing
        if isinstance(error, base.Cancelled):
            self.status.say("Stopped. What is finished is kept: the button goes on from there")
        elif error is not None:
            self.status.error(error)


def _controls(setting: Setting) -> dict[str, Any]:
    several = {"rows": 5, "layout": widgets.Layout(width="210px")}
    texts = list(dict.fromkeys([setting.corpus, corpus.WIKITEXT2, corpus.SAMPLE]))
    made: dict[str, Any] = {
        "rotations": widgets.SelectMultiple(options=ROTATIONS, description="Rotations", **several),
        "bits": widgets.SelectMultiple(options=BITS, description="Bits W-A-KV", **several),
        "keep_out": widgets.SelectMultiple(options=list(KEPT), description="Kept out", **several),
        "weights": widgets.ToggleButtons(
            options=["rtn", "gptq"], description="Weights", style={"button_width": "70px"}
        ),
        "corpus": widgets.Dropdown(options=[(Path(text).name, text) for text in texts], description="Text"),
        "paper_model": widgets.Dropdown(options=PAPER_MODELS, value="LLaMA2-7B", description="Paper's"),
        "windows": widgets.BoundedIntText(
            min=1, max=200, description="Windows", layout=widgets.Layout(width="180px")
        ),
        "compute": widgets.Button(
            description="Compute missing rows", icon="play", layout=widgets.Layout(width="220px")
        ),
        "cancel": widgets.Button(description="Cancel", icon="stop", disabled=True),
    }
    made["rotations"].tooltip = made["bits"].tooltip = made["keep_out"].tooltip = (
        "several: hold Ctrl or Shift"
    )
    defaults = Choice()
    made["rotations"].value, made["bits"].value, made["keep_out"].value = (
        defaults.rotations,
        defaults.bits,
        defaults.keep_out,
    )
    made["weights"].value, made["corpus"].value, made["windows"].value = (
        setting.weights,
        setting.corpus,
        setting.windows,
    )
    return made
