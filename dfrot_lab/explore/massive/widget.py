"""Any text's residual stream, layer by layer, as a heat map or in space, its massive tokens marked."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from ipywidgets import BoundedIntText, Dropdown, HBox, IntSlider, Play, Textarea, ToggleButtons, jslink
from matplotlib.figure import Figure
from torch import Tensor
from traitlets import Enum, HasTraits, Int, Unicode

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore import page
from dfrot_lab.explore.massive import numbers
from dfrot_lab.explore.page import GREY, Plot, label, packed, panel
from dfrot_lab.explore.shell import Explorer, Job, beside, control
from dfrot_lab.model import loading
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.specs import MASSIVE_RULES, CaptureSpec, CorpusSpec, ModelSpec
from dfrot_lab.show.theme import MASSIVE_COLOUR

TOKENS = 256  # tokens shown of a longer text, unless more are asked for
ROWS = 12  # rows of the tables of tokens and channels
HEAT, SPACE = "heat map", "3-D"
BOX: dict[str, Any] = {"placeholder": "type or paste a text, then look", "layout": {"height": "72px"}}
FLOOR = 0.01  # values below this have one colour: the scale is logarithmic
LINES = {"top 1": MASSIVE_COLOUR, "top 2": "#E69F00", "top 3": "#56B4E9", "median": "#009E73"}
DASHES = {"solid": "-", "dash": "--", "dashdot": "-.", "dot": ":"}  # plotly's word: matplotlib's
POINT = ["value", "channel", "ratio"]
ABOUT = "channel %{customdata[1]:.0f}: %{customdata[0]:,.5g}<br>"  # what every point says of itself
ABOUT += "%{customdata[2]:,.3g} \u00d7 the median<extra></extra>"


def logarithm(value: np.ndarray) -> np.ndarray:
    """log10 |value|, nothing below FLOOR, float32."""
    return np.log10(np.maximum(np.abs(value), FLOOR)).astype(np.float32)


class Heat(Plot):
    """The heat map: a column a token, a row a few channels; the marked tokens are diamonds over it."""

    def __init__(self) -> None:
        look: dict[str, Any] = {"hovertemplate": f"%{{x}}<br>{ABOUT}"}
        marker = {"symbol": "diamond-open", "size": 13, "color": MASSIVE_COLOUR, "line": {"width": 2.5}}
        heat = go.Heatmap(colorscale="Cividis", colorbar={"title": {"text": "|x|"}, "thickness": 14}, **look)
        marks = go.Scatter(mode="markers", marker=marker, showlegend=False, **look)
        x = {"type": "category", "nticks": 24, "tickangle": -40, "showgrid": False, "title": "token"}
        super().__init__([heat, marks], xaxis=x, yaxis_title="channel")
        self._seen: numbers.Look | None = None

    def draw(self, seen: numbers.Look, layer: int, marked: pd.DataFrame) -> None:
        """A layer and its marked tokens, at once: plotly cannot draw values over another text's axes."""
        drawn, about = numbers.cells(seen, layer), marked[POINT].to_numpy(np.float32)
        with self.batch_update():
            if seen is not self._seen:  # axes and colours change with the text alone
                names = self._names = [f"{i} {label(text)}" for i, text in enumerate(seen.texts)]
                self._seen, top = seen, np.log10(seen.profile["top 1"].max())
                powers = list(range(int(np.log10(FLOOR)), int(np.ceil(top)) + 1))
                ticks = {"tickvals": powers, "ticktext": [f"{10.0**power:,g}" for power in powers]}
                look = {"y": numbers.starts(*seen.streams[0].shape), "zmin": powers[0], "zmax": powers[-1]}
                self.data[0].update(x=names, colorbar=ticks, **look)
                self.update_xaxes(categoryorder="array", categoryarray=names, range=[-0.5, len(names) - 0.5])
            self.data[0].update(z=packed(logarithm(drawn[..., 0])), customdata=packed(drawn))
            self.data[1].update(x=[self._names[i] for i in marked["token"]], y=about[:, 1], customdata=about)


class _Space(Plot):
    """The same in space, heights not logarithmic: a surface, the marked tokens on it as points."""

    def __init__(self) -> None:
        look: dict[str, Any] = {"hovertemplate": f"%{{text}}<br>token %{{x}}<br>{ABOUT}"}
        marker = {"symbol": "diamond", "size": 5, "color": MASSIVE_COLOUR}
        surface = go.Surface(colorscale="Cividis", showscale=False, **look)
        marks = go.Scatter3d(mode="markers", marker=marker, showlegend=False, **look)
        shape = {"aspectmode": "manual", "aspectratio": {"x": 2, "y": 1, "z": 0.8}}
        view = page.scene("token", "channel", "|x|", camera={"eye": {"x": 1.0, "y": -2.5, "z": 0.9}}, **shape)
        super().__init__([surface, marks], scene=view, margin=page.EDGE_TO_EDGE)
        self._seen: numbers.Look | None = None

    def draw(self, seen: numbers.Look, layer: int, marked: pd.DataFrame) -> None:
        drawn, about = numbers.cells(seen, layer), marked[POINT].to_numpy(np.float32)
        height, top = np.abs(drawn[..., 0]), np.abs(about[:, 0])
        down = {"type": "data", "symmetric": False, "array": np.zeros_like(top), "arrayminus": top}
        stems = {**down, "width": 0, "thickness": 4, "color": MASSIVE_COLOUR}
        with self.batch_update():
            if seen is not self._seen:  # axes and token names change with the text alone
                self._seen, self._names = seen, page.contexts(seen.texts)
                rows, count = numbers.starts(*seen.streams[0].shape), np.arange(len(seen.texts))
                ticks, names = count[:: max(1, len(count) // 12)], [label(text) for text in seen.texts]
                self.data[0].update(x=count.astype(np.float32), y=rows, text=[names] * len(rows))
                self.layout.scene.xaxis.update(tickvals=ticks, ticktext=[f"{i} {names[i]}" for i in ticks])
            colour = packed(logarithm(height))
            self.data[0].update(z=packed(height), surfacecolor=colour, customdata=packed(drawn))
            place = {"x": marked["token"].tolist(), "y": about[:, 1], "z": top}
            about_each = {"customdata": about, "text": [self._names[i] for i in marked["token"]]}
            self.data[1].update(**place, **about_each, error_z=stems)


def profile_plot(go_to: Callable[[int], None]) -> Plot:
    """The layer shown, the largest three |x| and the median by layer; a click on one calls `go_to(layer)`."""
    look = {"line": {"color": GREY, "width": 1}, "hoverinfo": "skip", "showlegend": False}
    traces = [go.Scatter(mode="lines", **look)]
    for (name, colour), dash in zip(LINES.items(), DASHES, strict=True):
        hover = "layer %{x}<br>%{y:,.5g}<extra>" + name + "</extra>"
        style = {"line": {"color": colour, "dash": dash}, "marker": {"size": 5}, "mode": "lines+markers"}
        traces.append(go.Scatter(name=name, hovertemplate=hover, **style))
    plot = Plot(traces, xaxis_title="layer", yaxis={"type": "log", "exponentformat": "power", "title": "|x|"})
    for line in plot.data[1:]:
        line.on_click(lambda _trace, points, _state: go_to(int(points.xs[0])) if points.xs else None)
    return plot


class _State(HasTraits):
    layer = control(Int(), IntSlider, "layer", 420)
    view = control(Enum((HEAT, SPACE), HEAT), ToggleButtons, "view", 90)
    rule = control(Enum(MASSIVE_RULES, "sun"), Dropdown, "massive by rule", 230)
    text = control(Unicode(), Textarea, "your text", 620, **BOX)
    block = control(Int(0), BoundedIntText, "corpus block", 190, max=1_000_000)
    tokens = control(Int(), Dropdown, "at most tokens", 190)


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
        box, number = "look at the text in the box", "look at the corpus block with this number"
        self.button("look", "look", self.look_at_text, tooltip=box, button_style="primary")
        self.button("open", "open block", self.look_at_block, tooltip=number)
        self.button("cancel", "cancel", self.cancel, tooltip="stop looking; the view stays as it is")
        self.controls["play"] = Play(description="play", value=middle, max=last, interval=700)
        jslink((self.controls["play"], "value"), (self.controls["layer"], "value"))
        self.plot, self.space = Heat(), _Space()
        self.profile = profile_plot(lambda layer: self.state.set_trait("layer", layer))
        self.sentence, self.words, self.tokens, self.channels = map(panel, (58, 30, 290, 290))
        self.text = panel(150, border=f"1px solid {GREY}", padding="4px")
        self.stage = page.Stage(self.plot)
        if acts is None:
            first = numbers.block_ids(loaded, self.corpus, 0, tokens)
        else:
            first = torch.tensor(acts.ids[: min(tokens, loaded.context)]), acts.tokens
        self._show(numbers.look(loaded, *first))
        self.enable()
        self.on("layer rule view", self.redraw)
        opened = self.row("text", ["look", "cancel"], [self.row("block", "open"), "tokens"])
        shown = self.row("play", "layer", "view", "rule")
        above = [opened, shown, self.words, self.status.widget, self.sentence]
        seen = [beside(self.stage, self.profile, shares=(66, 34)), self.text]
        apart = {"width": "100%", "justify_content": "space-between"}
        self.children = [*above, *seen, HBox([self.tokens, self.channels], layout=apart)]

    def look_at_text(self) -> None:
        """Look at the text in the text area, off the kernel's thread."""
        ids_of = partial(numbers.typed_ids, self.loaded, self.state.text, self.state.tokens)
        self.work("reading the text", partial(self._look, ids_of))

    def look_at_block(self) -> None:
        """Look at the corpus block with the chosen number, off the kernel's thread."""
        block, most = self.state.block, self.state.tokens
        ids_of = partial(numbers.block_ids, self.loaded, self.corpus, block, most)
        self.work("reading the text", partial(self._look, ids_of))

    def _look(self, ids_of: Callable[[], tuple[Tensor, int]], job: Job) -> None:
        def step(layer: int) -> None:
            job.step()
            self.status.busy(f"looking: layer {layer + 1} of {len(self.loaded.layers)}")

        ids, whole = ids_of()
        job.step()
        self._show(numbers.look(self.loaded, ids, whole, step))

    def _show(self, seen: numbers.Look) -> None:
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
            lines = seen.profile
            ends = [max(float(lines["median"].min()) / 2, FLOOR), float(lines["top 1"].max()) * 2]
            drawn = [{"x": lines["layer"].to_numpy(), "y": lines[name].to_numpy()} for name in LINES]
            self.profile.put({"x": [layer, layer], "y": ends}, *drawn)
            said = numbers.sentence(self.shown, layer, rule)
            meaning = numbers.rule_words(rule, self.loaded.channels)
            self.sentence.value = f'<span class="dfrot-sentence" style="font-size:15px">{said}</span>'
            self.words.value = f'<span style="color:{GREY}">{rule}: {meaning}</span>'
            self.text.value = numbers.text_spans(self.shown)
            tokens, channels = self.shown.drop(columns="massive"), numbers.channel_table(seen, layer)
            self.tokens.value = page.html_table(tokens.head(ROWS), f"Largest tokens at layer {layer}")
            self.channels.value = page.html_table(channels.head(ROWS), f"Largest channels at layer {layer}")
            shown = f"{len(seen.texts):,}"
            part = f"the first {shown} of {seen.whole:,}" if seen.whole > len(seen.texts) else shown
            self.status.say(f"{part} tokens, layer {layer}, median |x| {seen.median(layer):.3g}")

    def table(self) -> pd.DataFrame:
        """Every token at the layer shown, largest first: token, text, channel, value, ratio, massive."""
        return self.shown.copy()

    def _marked(self) -> pd.DataFrame:
        return self.shown[self.shown["massive"]].sort_values("token")

    def static(self) -> Figure:
        """The heat map and the profile as a matplotlib figure."""
        seen, layer, marked, rule = self.seen, self.state.layer, self._marked(), self.state.rule
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
