"""Any text's residual stream, layer by layer, as a heat map or in space, its massive tokens marked."""

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from ipywidgets import BoundedIntText, Dropdown, IntText, Textarea, ToggleButtons, VBox
from matplotlib.figure import Figure
from torch import Tensor
from traitlets import Any as Any_, Enum, HasTraits, Int, Unicode

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore import page
from dfrot_lab.explore.massive import numbers
from dfrot_lab.explore.massive.film import Film
from dfrot_lab.explore.page import GREY, Plot, beside, packed, panel
from dfrot_lab.explore.shell import Explorer, Job, control
from dfrot_lab.model import loading
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.specs import MASSIVE_RULES, CaptureSpec, CorpusSpec, ModelSpec
from dfrot_lab.show.theme import MASSIVE_COLOUR, PICKED_COLOUR, label

TOKENS = 256  # tokens shown of a longer text, unless more are asked for
ROWS = 12  # rows of the tables of tokens and channels
WORDS, HEAT, SPACE = "words", "heat map", "3-D"
BOX: dict[str, Any] = {"placeholder": "type or paste a text, then look", "layout": {"height": "72px"}}
LINES = {"top 1": MASSIVE_COLOUR, "top 2": "#E69F00", "top 3": "#56B4E9", "median": "#009E73"}
DASHES = {"solid": "-", "dash": "--", "dashdot": "-.", "dot": ":"}  # plotly's word: matplotlib's
POINT = ["value", "channel", "ratio"]
ABOUT = "channel %{customdata[1]:.0f}: %{customdata[0]:,.5g}<br>"  # what every point says of itself
ABOUT += "%{customdata[2]:,.3g} \u00d7 the median<extra></extra>"


def logarithm(value: np.ndarray) -> np.ndarray:
    """log10 |value|, nothing below numbers.FLOOR, float32."""
    return np.log10(np.maximum(np.abs(value), numbers.FLOOR)).astype(np.float32)


class Heat(Plot):
    """The heat map: a column a token, a row a few channels; marked tokens are diamonds over it, the one that
    is picked has a frame. A click calls `pick(token)`."""

    def __init__(self, pick: Callable[[int], object]) -> None:
        look: dict[str, Any] = {"hovertemplate": f"%{{x}}<br>{ABOUT}"}
        marker = {"symbol": "diamond-open", "size": 13, "color": MASSIVE_COLOUR, "line": {"width": 2.5}}
        heat = go.Heatmap(colorscale="Cividis", colorbar={"title": {"text": "|x|"}, "thickness": 14}, **look)
        marks = go.Scatter(mode="markers", marker=marker, showlegend=False, **look)
        x = {"type": "category", "nticks": 14, "tickangle": -40, "showgrid": False, "title": "token"}
        super().__init__([heat, marks], xaxis=x, yaxis_title="channel")
        self._seen: numbers.Look | None = None
        for trace in self.data:
            trace.on_click(lambda _trace, at, _keys: at.xs and pick(int(at.xs[0].split()[0])))

    def draw(self, seen: numbers.Look, layer: int, marked: pd.DataFrame, picked: int) -> None:
        """A layer and its marked tokens, at once: plotly cannot draw values over another text's axes."""
        drawn, about = numbers.cells(seen, layer), marked[POINT].to_numpy(np.float32)
        with self.batch_update():
            if seen is not self._seen:  # axes and colours change with the text alone
                names = self._names = [f"{i} {label(text)}" for i, text in enumerate(seen.texts)]
                self._seen, (low, high) = seen, numbers.ends(seen)
                powers = list(range(low, high + 1))
                ticks = {"tickvals": powers, "ticktext": [f"{10.0**power:,g}" for power in powers]}
                look = {"y": numbers.starts(*seen.streams[0].shape), "zmin": powers[0], "zmax": powers[-1]}
                self.data[0].update(x=names, colorbar=ticks, **look)
                self.update_xaxes(categoryorder="array", categoryarray=names, range=[-0.5, len(names) - 0.5])
            self.data[0].update(z=packed(logarithm(drawn[..., 0])), customdata=packed(drawn))
            self.data[1].update(x=[self._names[i] for i in marked["token"]], y=about[:, 1], customdata=about)
            self.layout.shapes = [page.frame(picked)]


def profile_plot(go_to: Callable[[int], None]) -> Plot:
    """The layer shown; by layer the largest three |x|, the median, the largest of the token that is picked. A
    click on one calls `go_to(layer)`."""
    look = {"line": {"color": GREY, "width": 1}, "hoverinfo": "skip", "showlegend": False}
    traces = [go.Scatter(mode="lines", **look)]
    for (name, colour), dash in zip(LINES.items(), DASHES, strict=True):
        hover = "layer %{x}<br>%{y:,.5g}<extra>" + name + "</extra>"
        style = {"line": {"color": colour, "dash": dash}, "marker": {"size": 5}, "mode": "lines+markers"}
        traces.append(go.Scatter(name=name, hovertemplate=hover, **style))
    wide = {"color": PICKED_COLOUR, "width": 7}
    traces.append(go.Scatter(mode="lines", line=wide, opacity=0.35, name="picked", hoverinfo="skip"))
    plot = Plot(traces, xaxis_title="layer", yaxis={"type": "log", "exponentformat": "power", "title": "|x|"})
    for line in plot.data[1:]:
        line.on_click(lambda _trace, points, _state: go_to(int(points.xs[0])) if points.xs else None)
    return plot


class _State(HasTraits):
    layer = control(Int(), Film, "layer")
    view = control(Enum((WORDS, HEAT, SPACE), WORDS), ToggleButtons, "view", 90)
    rule = control(Enum(MASSIVE_RULES, "sun"), Dropdown, "massive by rule", 230)
    text = control(Unicode(), Textarea, "your text", 620, **BOX)
    block = control(Int(0), BoundedIntText, "corpus block", 190, max=1_000_000)
    tokens = control(Int(), Dropdown, "at most tokens", 190)
    token = control(Int(-1), IntText, "token (-1: the largest)", 220)
    shown = Any_(None)  # what was looked at last: a text, a block's number, None for the first


class Massive(Explorer):
    """The residual stream |x| (tokens, channels) before each layer, for any text, and its massive tokens; at
    first of `acts` or `corpus`, `tokens` tokens of it. Model and corpus are those of `acts` unless given."""

    ONE, CANCELLED = "text", "cancelled; the view is as it was"

    def __init__(
        self, acts: Capture | None = None, model: ModelSpec | None = None, corpus: CorpusSpec | None = None,
        *, store: Store | None = None, tokens: int = TOKENS,
    ) -> None:  # fmt: skip
        made_by = CaptureSpec() if acts is None else acts.spec
        self.loaded = loaded = loading.load_model(model or made_by.model, store)
        self.corpus = corpus or made_by.corpus
        last, middle = len(loaded.layers) - 1, len(loaded.layers) // 2
        sizes = sorted({64, 128, 256, 512, 1024, 2048, tokens})
        super().__init__(_State(layer=middle, tokens=tokens), layer={"max": last}, tokens=sizes)
        self.button("look", "look", lambda: self.look(self.state.text), button_style="primary")
        self.button("open", "open block", lambda: self.look(self.state.block))
        self.button("cancel", "cancel", self.cancel, tooltip="stop looking; the view stays as it is")
        self.film, self.plot = self.controls["layer"], Heat(self.pick)
        self.film.on_msg(lambda _film, said, _buffers: self.pick(said["token"]))
        self.profile = profile_plot(lambda layer: self.state.set_trait("layer", layer))
        self.sentence, self.words, self.tokens, self.channels = map(panel, (108, 56, 290, 290))
        self.stage = page.Stage(self.plot)
        if acts is None:
            first = numbers.block_ids(loaded, self.corpus, 0, tokens)
        else:
            first = torch.tensor(acts.ids[: min(tokens, loaded.context)]), acts.tokens
        self._show(numbers.look(loaded, *first))
        self.enable()
        self.on("layer rule view token", self.redraw)
        opened = self.row("text", ["look", "cancel"], [self.row("block", "open"), "tokens"])
        left, right = VBox([self.film, self.stage]), VBox([self.sentence, self.words, self.profile])
        seen = beside(left, right, shares=(66, 34), height=page.HEIGHT + 172)
        tables = beside(self.tokens, self.channels, height=290)
        self.children = [opened, self.row("view", "rule", "token"), self.status.line, seen, tables]

    def at(self, **view: Any) -> Self:
        """As `Explorer.at`; the text is looked at in the background."""
        super().at(**view)
        if view.get("shown") is not None:
            self.look(view["shown"], self.state.token)
        return self

    def look(self, what: str | int, token: int = -1) -> None:
        """Look at a text, or a corpus block by its number, and a token in it, off the kernel's thread."""
        where = [self.loaded, *([] if isinstance(what, str) else [self.corpus]), what, self.state.tokens]
        ids_of = numbers.typed_ids if isinstance(what, str) else numbers.block_ids
        self.work("reading the text", partial(self._look, partial(ids_of, *where), what, token))

    def _look(self, ids_of: Callable[[], tuple[Tensor, int]], what: str | int, token: int, job: Job) -> None:
        def step(layer: int) -> None:
            job.step()
            self.status.busy(f"looking: layer {layer + 1} of {len(self.loaded.layers)}")

        ids, whole = ids_of()
        job.step()
        self._show(numbers.look(self.loaded, ids, whole, step), what, token)

    def _show(self, seen: numbers.Look, what: str | int | None = None, token: int = -1) -> None:
        with self._lock:
            self.seen, self.texts = seen, seen.texts
            self.state.shown, self.state.token = what, token
            self.redraw()

    def pick(self, token: int) -> None:
        """Look at a token in all views; at the largest one if it is picked already."""
        self.state.token = -1 if token == self.state.token else token

    def redraw(self) -> None:
        """The views of layer, rule and text; the plot that is out of sight follows when it is turned to."""
        with self._lock:
            layer, rule, seen = self.state.layer, self.state.rule, self.seen
            self.shown = table = numbers.token_table(seen, layer, rule)
            self.marked = table[table["massive"]].sort_values("token")
            own, largest = self.state.token, int(self.shown["token"].iloc[0])
            picked = own if 0 <= own < len(seen.texts) else largest
            self.film.show(seen, rule, self.state.view, picked)
            self.stage.layout.display = None if self.state.view == HEAT else "none"
            if self.state.view == HEAT:
                self.plot.draw(seen, layer, self.marked, picked)
            lines = seen.profile
            ends = [max(float(lines["median"].min()) / 2, numbers.FLOOR), float(lines["top 1"].max()) * 2]
            drawn: list[Any] = [
                {"x": lines["layer"].to_numpy(), "y": lines[name].to_numpy()} for name in LINES
            ]
            drawn.append({"x": drawn[0]["x"], "y": [float(x[picked].abs().max()) for x in seen.streams]})
            self.profile.put({"x": [layer, layer], "y": ends}, *drawn)
            said = numbers.sentence(self.shown, layer, rule, picked)
            meaning = numbers.rule_words(rule, self.loaded.channels)
            self.sentence.value = (
                f'<div class="dfrot-sentence" style="font-size:15px;line-height:1.35">{said}</div>'
            )
            self.words.value = f'<div style="color:{GREY};line-height:1.35">{rule}: {meaning}</div>'
            tokens, channels = self.shown.drop(columns="massive"), numbers.channel_table(seen, layer)
            self.tokens.value = page.html_table(tokens.head(ROWS), f"Largest tokens at layer {layer}", picked)
            self.channels.value = page.html_table(channels.head(ROWS), f"Largest channels at layer {layer}")
            shown = f"{len(seen.texts):,}"
            part = f"the first {shown} of {seen.whole:,}" if seen.whole > len(seen.texts) else shown
            self.status.say(f"{part} tokens, layer {layer}, median |x| {seen.median(layer):.3g}")

    def table(self) -> pd.DataFrame:
        """Every token at the layer shown, largest first: token, text, channel, value, ratio, massive."""
        return self.shown.copy()

    def static(self) -> Figure:
        """The heat map and the profile as a matplotlib figure."""
        seen, layer, marked, rule = self.seen, self.state.layer, self.marked, self.state.rule
        size: dict[str, Any] = {"size": (11, 4), "layout": "constrained", "width_ratios": (2, 1)}
        with page.drawing(2, **size) as (drawn, (left, right)):
            tokens, channels = seen.streams[layer].shape
            edges = (-0.5, tokens - 0.5, channels - 0.5, -0.5)
            heights = logarithm(numbers.cells(seen, layer)[..., 0])
            image = left.imshow(heights, aspect="auto", cmap="cividis", extent=edges)
            left.grid(visible=False)
            left.set(xlabel="token", ylabel="channel", title=f"log10 |residual stream| before layer {layer}")
            hollow = {"marker": "D", "facecolors": "none", "edgecolors": MASSIVE_COLOUR}
            left.scatter(marked["token"], marked["channel"], label=f"massive by {rule}", **hollow)
            left.legend(loc="upper right", fontsize=8)
            drawn.colorbar(image, ax=left)
            for (name, colour), dash in zip(LINES.items(), DASHES.values(), strict=True):
                right.plot(seen.profile["layer"], seen.profile[name], c=colour, ls=dash, label=name)
            right.axvline(layer, c=GREY, lw=1)
            right.set(yscale="log", xlabel="layer", ylabel="|residual stream|")
            right.legend(fontsize=8)
        return drawn
