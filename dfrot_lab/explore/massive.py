"""Massive activations: any text's residual stream, layer by layer, as a heat map or in space, with the tokens
a rule calls massive marked.
"""

import threading
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
import traitlets
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import loading
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.specs import MASSIVE_RULES, CaptureSpec, CorpusSpec, ModelSpec

from . import base, residual
from .parts import html_table, panel, spec_of
from .residual import Look
from .residual_plots import Heat, Profile, Space, cells

TOKENS = 256
"""Tokens shown of a longer text, unless more are asked for."""
SIZES = (64, 128, 256, 512, 1024, 2048)
ROWS = 12
"""Rows of the tables of tokens and channels."""
HEAT, SPACE = "heat map", "3-D"


class MassiveState(traitlets.HasTraits):
    """Where a reader stands: the layer, the view (heat map or 3-D) and the rule."""

    layer = traitlets.Int(0)
    view = traitlets.Unicode(HEAT)
    rule = traitlets.Unicode("sun")


class MassiveView:
    """The widget's parts and what moves them; `top` is what the notebook shows."""

    def __init__(self, loaded: LoadedModel, acts: Capture | None, corpus: CorpusSpec, tokens: int) -> None:
        self.loaded, self.acts, self.corpus = loaded, acts, corpus
        self.state, self.status, self.job = (
            MassiveState(layer=len(loaded.layers) // 2),
            base.Status(),
            base.Job(self._ended),
        )
        self.views: dict[str, Heat | Space] = {HEAT: Heat(), SPACE: Space()}
        self.profile = Profile(lambda layer: self.state.set_trait("layer", layer))
        self.sentence, self.words = panel(58), panel(30)
        self.text, self.tokens, self.channels = (
            panel(150, border=f"1px solid {base.GREY}", padding="4px"),
            panel(290),
            panel(290),
        )
        self._lock = threading.RLock()
        self.controls = self._controls(tokens)
        ids, whole = self._opening(tokens)
        self._show(residual.look(loaded, ids, whole))
        self._connect()
        self.top = self._layout()

    # ---- what is looked at
    # --------------------------------------------------------------------------------------------------------------

    def _opening(self, tokens: int) -> tuple[Tensor, int]:
        """The first text: the capture's, or the corpus's first block."""
        if self.acts is None:
            return residual.block_ids(self.loaded, self.corpus, 0, tokens)
        return torch.tensor(self.acts.ids[: min(tokens, self.loaded.context)]), self.acts.tokens

    def look_at_text(self) -> None:
        """Look at the text in the text area, off the kernel's thread."""
        text, most = self.controls["text"].value, self.controls["tokens"].value
        self._start(lambda: residual.typed_ids(self.loaded, text, most))

    def look_at_block(self) -> None:
        """Look at the corpus block with the chosen number, off the kernel's thread."""
        block, most = self.controls["block"].value, self.controls["tokens"].value
        self._start(lambda: residual.block_ids(self.loaded, self.corpus, block, most))

    def _start(self, ids_of: Callable[[], tuple[Tensor, int]]) -> None:
        def work(job: base.Job) -> None:
            def step(layer: int) -> None:
                job.step()
                self.status.busy(f"looking: layer {layer + 1} of {len(self.loaded.layers)}")

            ids, whole = ids_of()
            job.step()
            self._show(residual.look(self.loaded, ids, whole, step))

        self.job.wait(0.2)  # one that has just ended may still be on its last line
        if self.job.running:
            return self.status.error("a text is being looked at: cancel it, or wait for it")
        self._buttons(running=True)
        self.status.busy("reading the text")
        return self.job.start(work)

    def _ended(self, error: BaseException | None) -> None:
        if isinstance(error, base.Cancelled):
            self.status.say("cancelled; the view is as it was")
        elif error is not None:
            self.status.error(error)
        self._buttons(running=False)

    def _buttons(self, running: bool) -> None:
        for name in ("look", "open"):
            self.controls[name].disabled = running
        self.controls["cancel"].disabled = not running

    # ---- what is shown
    # ------------------------------------------------------------------------------------------------------------------

    def _show(self, seen: Look) -> None:
        """A new text in all views."""
        with self._lock:
            self.seen = seen
            self._known: set[str] = set()
            self.profile.new_text(residual.profile(seen))
            self.redraw()

    def redraw(self, *_: Any) -> None:
        """The views of the layer, rule and text there are now: data in place."""
        with self._lock:
            layer, rule, seen = self.state.layer, self.state.rule, self.seen
            self.shown = residual.token_table(seen, layer, rule)
            self._draw(cells(seen, layer), self.shown[self.shown["massive"]].sort_values("token"))
            self.profile.draw(layer)
            self.sentence.value = f'<span class="dfrot-sentence" style="font-size:15px">{residual.sentence(self.shown, layer, rule)}</span>'
            self.words.value = f'<span style="color:{base.GREY}">{rule}: {residual.rule_words(rule, self.loaded.channels)}</span>'
            self.text.value = residual.text_spans(seen, layer, rule)
            rows = self.shown.head(ROWS).drop(columns="massive")
            self.tokens.value = html_table(rows, f"Largest tokens at layer {layer}")
            self.channels.value = html_table(
                residual.channel_table(seen, layer).head(ROWS), f"Largest channels at layer {layer}"
            )
            part = (
                f"the first {len(seen.texts):,} of {seen.whole:,} tokens"
                if seen.whole > len(seen.texts)
                else f"{len(seen.texts):,} tokens"
            )
            self.status.say(f"{part}, layer {layer}, median |x| {seen.layers[layer].median:.3g}")

    def _draw(self, drawn: np.ndarray, marked: pd.DataFrame) -> None:
        """The plot that is on screen; the other one follows when it is turned to."""
        view = self.views[self.state.view]
        with (
            view.plot.batch_update()
        ):  # at once, for plotly cannot draw one text's values over another's axes
            if self.state.view not in self._known:
                view.new_text(self.seen, self.loaded.channels)
                self._known.add(self.state.view)
            view.draw(drawn, marked)

    # ---- controls
    # -----------------------------------------------------------------------------------------------------------------------

    def _controls(self, tokens: int) -> dict[str, Any]:
        last, layer = len(self.loaded.layers) - 1, self.state.layer
        wide = {"layout": widgets.Layout(width="620px", height="72px")}
        made = {
            "text": widgets.Textarea(
                description="your text", placeholder="type or paste a text, then look", **wide
            ),
            "look": widgets.Button(
                description="look", button_style="primary", tooltip="look at the text in the box"
            ),
            "block": widgets.BoundedIntText(
                description="corpus block", value=0, min=0, max=1_000_000, layout={"width": "190px"}
            ),
            "open": widgets.Button(
                description="open block", tooltip="look at the corpus block with this number"
            ),
            "cancel": widgets.Button(
                description="cancel", disabled=True, tooltip="stop looking; the view stays as it is"
            ),
            "tokens": widgets.Dropdown(
                description="at most tokens",
                options=sorted({*SIZES, tokens}),
                value=tokens,
                layout={"width": "190px"},
            ),
            "play": widgets.Play(description="play", value=layer, max=last, interval=700),
            "layer": widgets.IntSlider(description="layer", value=layer, max=last, layout={"width": "420px"}),
            "view": widgets.ToggleButtons(
                description="view", options=[HEAT, SPACE], style={"button_width": "90px"}
            ),
            "rule": widgets.Dropdown(
                description="massive by rule",
                options=MASSIVE_RULES,
                value=self.state.rule,
                layout={"width": "230px"},
            ),
        }
        return {
            name: made[name] if name in ("look", "open", "cancel", "play") else base.wide_label(made[name])
            for name in made
        }

    def _connect(self) -> None:
        widgets.jslink((self.controls["play"], "value"), (self.controls["layer"], "value"))
        for name in ("layer", "view", "rule"):
            traitlets.link((self.state, name), (self.controls[name], "value"))
        self.state.observe(self.redraw, ["layer", "rule"])
        self.state.observe(self._turn, "view")
        self.controls["look"].on_click(lambda _button: self.look_at_text())
        self.controls["open"].on_click(lambda _button: self.look_at_block())
        self.controls["cancel"].on_click(lambda _button: self.job.cancel())

    def _turn(self, _change: Any) -> None:
        self.redraw()
        self.stage.turn(self.views[self.state.view].plot)

    def _layout(self) -> Any:
        c = self.controls
        self.stage = base.Stage(
            self.views[HEAT].plot, width="66%", height=f"{base.HEIGHT}px", overflow="hidden"
        )
        beside = widgets.Box(
            [self.profile.plot], layout={"width": "34%", "height": f"{base.HEIGHT}px", "overflow": "hidden"}
        )
        look = base.row(
            c["text"],
            widgets.VBox([c["look"], c["cancel"]]),
            widgets.VBox([base.row(c["block"], c["open"]), c["tokens"]]),
        )
        moves = base.row(c["play"], c["layer"], c["view"], c["rule"])
        tables = widgets.HBox(
            [self.tokens, self.channels], layout={"width": "100%", "justify_content": "space-between"}
        )
        top = base.column(
            look,
            moves,
            self.words,
            self.status.widget,
            self.sentence,
            widgets.HBox([self.stage, beside]),
            self.text,
            tables,
        )
        top.add_class("dfrot-massive")
        for name in ("state", "controls", "status", "job"):
            setattr(top, name, getattr(self, name))
        top.view, top.plot, top.space, top.profile = (
            self,
            self.views[HEAT].plot,
            self.views[SPACE].plot,
            self.profile.plot,
        )
        top.table = lambda: self.shown.copy()
        top.static = lambda: residual.static(self.seen, self.state.layer, self.state.rule)
        return top


def massive(
    acts: Capture | None = None,
    model: ModelSpec | None = None,
    corpus: CorpusSpec | None = None,
    *,
    store: Store | None = None,
    tokens: int = TOKENS,
) -> Any:
    """A widget that shows the residual stream |x| (tokens, channels) before each layer of `model`, for any
    text, and its massive tokens.

    It opens on the first `tokens` tokens of `acts`, or of the calibration text (`corpus`); model and corpus
    are those of `acts` unless given. The widget has `table()` (one row a token at the layer shown),
    `static()` (a matplotlib figure), `state`, `controls`, `status`, `plot` and `space`. Raises ValueError for
    a model or a corpus that cannot be used.
    """
    made_by = (spec_of(acts) if acts is not None else None) or CaptureSpec()
    loaded = loading.load_model(model or made_by.model, store)
    return MassiveView(loaded, acts, corpus or made_by.corpus, tokens).top
