"""Any text's residual stream, layer by layer, as a heat map or in space, its massive tokens marked."""

from collections.abc import Callable

import pandas as pd
import torch
from ipywidgets import BoundedIntText, Dropdown, HBox, IntSlider, Play, Textarea, ToggleButtons, jslink
from matplotlib.figure import Figure
from torch import Tensor
from traitlets import Enum, HasTraits, Int, Unicode

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.massive import numbers, plots
from dfrot_lab.explore.massive.numbers import Look
from dfrot_lab.explore.massive.plots import Heat, Profile, Space
from dfrot_lab.explore.shell.explorer import Explorer, beside, control
from dfrot_lab.explore.shell.job import Job
from dfrot_lab.explore.shell.plot import GREY, Stage
from dfrot_lab.explore.shell.words import html_table, panel
from dfrot_lab.model import loading
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.specs import MASSIVE_RULES, CaptureSpec, CorpusSpec, ModelSpec

TOKENS = 256
"""Tokens shown of a longer text, unless more are asked for."""
SIZES = (64, 128, 256, 512, 1024, 2048)
ROWS = 12
"""Rows of the tables of tokens and channels."""
HEAT, SPACE = "heat map", "3-D"
TYPE = "type or paste a text, then look"


class State(HasTraits):
    """The layer, the view and the rule; the text typed, the corpus block, how many tokens are looked at."""

    layer = control(Int(), IntSlider, "layer", 420)
    view = control(Enum((HEAT, SPACE), HEAT), ToggleButtons, "view", 90)
    rule = control(Enum(MASSIVE_RULES, "sun"), Dropdown, "massive by rule", 230)
    text = control(Unicode(), Textarea, "your text", 620, placeholder=TYPE, layout={"height": "72px"})
    block = control(Int(0), BoundedIntText, "corpus block", 190, max=1_000_000)
    tokens = control(Int(), Dropdown, "at most tokens", 190)


class Massive(Explorer):
    """The widget of `massive`."""

    ONE, CANCELLED = "text", "cancelled; the view is as it was"
    state: State

    def __init__(self, loaded: LoadedModel, acts: Capture | None, corpus: CorpusSpec, tokens: int) -> None:
        self.loaded, self.corpus = loaded, corpus
        last, middle = len(loaded.layers) - 1, len(loaded.layers) // 2
        sizes = {"options": sorted({*SIZES, tokens})}
        super().__init__(State(layer=middle, tokens=tokens), layer={"max": last}, tokens=sizes)
        box, number = "look at the text in the box", "look at the corpus block with this number"
        self.button("look", "look", self.look_at_text, tooltip=box, button_style="primary")
        self.button("open", "open block", self.look_at_block, tooltip=number)
        self.button("cancel", "cancel", self.job.cancel, tooltip="stop looking; the view stays as it is")
        self.controls["play"] = Play(description="play", value=middle, max=last, interval=700)
        jslink((self.controls["play"], "value"), (self.controls["layer"], "value"))
        self.plot, self.space = Heat(), Space()
        self.profile = Profile(lambda layer: self.state.set_trait("layer", layer))
        self.sentence, self.words = panel(58), panel(30)
        self.text = panel(150, border=f"1px solid {GREY}", padding="4px")
        self.tokens, self.channels = panel(290), panel(290)
        self.stage = Stage(self.plot)
        first = numbers.block_ids(loaded, corpus, 0, tokens) if acts is None else _ids(acts, loaded, tokens)
        self._show(numbers.look(loaded, *first))
        self.enable()
        self.on("layer rule view", self.redraw)
        apart = {"width": "100%", "justify_content": "space-between"}
        self.children = [
            self.row("text", ["look", "cancel"], [self.row("block", "open"), "tokens"]),
            self.row("play", "layer", "view", "rule"),
            self.words,
            self.status.widget,
            self.sentence,
            beside(self.stage, self.profile, shares=(66, 34)),
            self.text,
            HBox([self.tokens, self.channels], layout=apart),
        ]

    def look_at_text(self) -> None:
        """Look at the text in the text area, off the kernel's thread."""
        text, most = self.state.text, self.state.tokens
        self._start(lambda: numbers.typed_ids(self.loaded, text, most))

    def look_at_block(self) -> None:
        """Look at the corpus block with the chosen number, off the kernel's thread."""
        block, most = self.state.block, self.state.tokens
        self._start(lambda: numbers.block_ids(self.loaded, self.corpus, block, most))

    def _start(self, ids_of: Callable[[], tuple[Tensor, int]]) -> None:
        def work(job: Job) -> None:
            def step(layer: int) -> None:
                job.step()
                self.status.busy(f"looking: layer {layer + 1} of {len(self.loaded.layers)}")

            ids, whole = ids_of()
            job.step()
            self._show(numbers.look(self.loaded, ids, whole, step))

        self.work("reading the text", work)

    def _show(self, seen: Look) -> None:
        """A new text in all views."""
        with self._lock:
            self.seen = seen
            self.redraw()

    def redraw(self) -> None:
        """The views of layer, rule and text; the plot that is out of sight follows when it is turned to."""
        with self._lock:
            layer, rule, seen = self.state.layer, self.state.rule, self.seen
            self.shown = numbers.token_table(seen, layer, rule)
            view = self.plot if self.state.view == HEAT else self.space
            view.draw(seen, layer, self._marked())
            self.stage.turn(view)
            self.profile.draw(seen.profile, layer)
            said = numbers.sentence(self.shown, layer, rule)
            self.sentence.value = f'<span class="dfrot-sentence" style="font-size:15px">{said}</span>'
            meaning = f"{rule}: {numbers.rule_words(rule, self.loaded.channels)}"
            self.words.value = f'<span style="color:{GREY}">{meaning}</span>'
            self.text.value = numbers.text_spans(self.shown)
            tokens = self.shown.head(ROWS).drop(columns="massive")
            channels = numbers.channel_table(seen, layer).head(ROWS)
            self.tokens.value = html_table(tokens, f"Largest tokens at layer {layer}")
            self.channels.value = html_table(channels, f"Largest channels at layer {layer}")
            shown = f"{len(seen.texts):,}"
            part = f"the first {shown} of {seen.whole:,}" if seen.whole > len(seen.texts) else shown
            self.status.say(f"{part} tokens, layer {layer}, median |x| {seen.median(layer):.3g}")

    def table(self) -> pd.DataFrame:
        """Every token at the layer shown, largest first: token, text, channel, value, ratio, massive."""
        return self.shown.copy()

    def _marked(self) -> pd.DataFrame:
        """The rows of massive tokens, in the text's order."""
        return self.shown[self.shown["massive"]].sort_values("token")

    def static(self) -> Figure:
        """The heat map and the profile as a matplotlib figure."""
        return plots.static(self.seen, self.state.layer, self._marked(), self.state.rule)


def _ids(acts: Capture, loaded: LoadedModel, tokens: int) -> tuple[Tensor, int]:
    """The first token ids of a capture, and how many it has."""
    return torch.tensor(acts.ids[: min(tokens, loaded.context)]), acts.tokens


def massive(
    acts: Capture | None = None,
    model: ModelSpec | None = None,
    corpus: CorpusSpec | None = None,
    *,
    store: Store | None = None,
    tokens: int = TOKENS,
) -> Massive:
    """A widget that shows the residual stream |x| (tokens, channels) before each layer of `model`, for any
    text, and its massive tokens.

    It opens on the first `tokens` tokens of `acts`, or of the calibration text (`corpus`); model and corpus
    are those of `acts` unless given. The widget has `table()` (one row a token at the layer shown),
    `static()` (a matplotlib figure), `state`, `controls`, `status`, `plot` and `space`. Raises ValueError for
    a model or a corpus that cannot be used."""
    made_by = CaptureSpec() if acts is None else acts.spec
    loaded = loading.load_model(model or made_by.model, store)
    return Massive(loaded, acts, corpus or made_by.corpus, tokens)
