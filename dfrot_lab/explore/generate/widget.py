"""What quantization does to the words: one prompt through each rotation and without, token by token."""

import html
from collections.abc import Callable
from functools import partial
from typing import Any

import ipywidgets as widgets
import pandas as pd
import plotly.graph_objects as go
import psutil
import seaborn
import torch
from matplotlib.figure import Figure
from traitlets import Enum, Float, HasTraits, Int, Tuple, Unicode

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.generate import numbers
from dfrot_lab.explore.page import GREY, PICKED, Plot, drawing, frame, panel
from dfrot_lab.explore.shell import Explorer, Job, control
from dfrot_lab.explore.worth.numbers import BITS, FULL
from dfrot_lab.model import door
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.rotate import dfrot
from dfrot_lab.score import build
from dfrot_lab.show import theme
from dfrot_lab.study import cost
from dfrot_lab.study.setting import Setting
from dfrot_lab.weights.run import OnPart

ROOM = 4  # built models are kept for the next prompt while the free memory is this many times one's weights
LABELLED = 70  # tokens up to which the strip names each one below it
ABOUT = ["position", "text", "prompt"]  # the columns of a table of losses that are no models
TITLE, WRITTEN = "Loss of each token", "the prompt, then (right of the line) what full precision wrote"
EXACT = "full precision"
BOX = {"width": "420px", "height": "96px"}
COLUMN = {"flex": "0 0 236px", "border": f"1px solid {GREY}", "padding": "4px"}
UNSTORED = "its GPTQ weights are not stored: choose rtn, or compute its row with `dfrot-lab evaluate`"
LIKELIEST = "Temperature (0: the likeliest)"


class _Strip(Plot):
    """Each model's loss of each token of one text; a line where the prompt ends. A click calls `pick`."""

    def __init__(self, pick: Callable[[int], object]) -> None:
        hover = "token %{customdata}<br>%{y}: %{z:.2f} nats<extra></extra>"
        bar = {"title": {"text": "loss (nats)"}}
        look = {"colorscale": "Cividis", "zmin": 0, "colorbar": bar, "xgap": 1, "ygap": 2}
        title = {"text": f"{TITLE} of one text", "font": {"size": 13}}
        y = {"autorange": "reversed", "type": "category"}
        super().__init__([go.Heatmap(hovertemplate=hover, **look)], height=300, title=title, yaxis=y)
        self.data[0].on_click(lambda _trace, at, _keys: pick(int(at.xs[0])) if at.xs else None)

    def draw(self, losses: pd.DataFrame, picked: int) -> None:
        values = losses.drop(columns=ABOUT)
        x, texts = losses["position"].tolist(), [theme.label(text) for text in losses["text"]]
        about = [f"{place}: {text}" for place, text in zip(x, texts, strict=True)]
        ticks = {"tickmode": "array", "tickvals": x, "ticktext": texts}
        edge = x[0] - 0.5 + int(losses["prompt"].sum())
        line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": GREY, "width": 2}}
        strip = {"x": x, "y": list(values), "z": values.to_numpy().T, "zmax": float(values.to_numpy().max())}
        across = {**(ticks if len(x) <= LABELLED else dict.fromkeys(ticks)), "tickangle": -60}
        shapes = [{**line, "x0": edge, "x1": edge}, {**frame(picked), "visible": picked > 0}]
        edges = {"shapes": shapes, "title_text": f"{TITLE}: {WRITTEN}"}
        self.put({**strip, "customdata": [about] * values.shape[1]}, xaxis=across, **edges)


class _State(HasTraits):
    prompt = control(Unicode("The Eiffel Tower is in"), widgets.Textarea, "Prompt", layout=BOX)
    rotations = control(Tuple(), widgets.SelectMultiple, "Rotations", 220, rows=4)
    bits = control(Enum(BITS, "4-4-16"), widgets.Dropdown, "Bits W-A-KV")
    weights = control(Unicode("rtn"), widgets.ToggleButtons, "Weights", 70)
    tokens = control(Int(24), widgets.IntSlider, "Tokens", min=1, max=128)
    temperature = control(Float(0.0), widgets.FloatSlider, LIKELIEST, 340, min=0, max=2, step=0.1)
    top_k = control(Int(50), widgets.IntSlider, "Top-k", 260, min=1, max=200)
    seed = control(Int(0), widgets.BoundedIntText, "Seed", 150, min=0, max=10**6)
    token = control(Int(0), widgets.BoundedIntText, "Look at token", 190, min=0, max=10**6)


class Generate(Explorer):
    """What each rotation makes a quantized model write, where it departs, and its loss of every token."""

    STOPPING, CANCELLED, DONE = "stopping", "Stopped: what is written stays", "Done"

    def __init__(self, setting: Setting | None = None, store: Store | None = None) -> None:
        names = tuple(registry.rows())
        super().__init__(_State(rotations=PICKED), rotations=names, weights=[*registry.WEIGHTS])
        self.setting, self.store = (setting or Setting.of_profile()).resolved(), store or Store()
        self.tokenizer: Any = None
        self.kept, self.prompt_ids = dict[str, build.Built](), list[int]()
        self.written = dict[str, numbers.Written]()
        self.columns = {name: panel(250, **COLUMN) for name in (EXACT, *names)}
        for name in self.columns:
            self._fill(name)
        self.plot = _Strip(lambda position: self.state.set_trait("token", position))
        self.bar = widgets.FloatProgress(min=0, max=1, description="Done", layout={"width": "300px"})
        self.button("write", "Write", self.write, icon="pencil")
        self.button("cancel", "Cancel", self.cancel, icon="stop")
        self.button("refine", "Refine DFRot", self.refine, icon="magic")
        how = self.row("prompt", "rotations", ["bits", "weights", "tokens"], ["temperature", "top_k", "seed"])
        above = [how, self.row("write", "cancel", "refine", "token", self.bar), self.status.line]
        side = widgets.HBox([*self.columns.values()], layout={"grid_gap": "6px", "overflow": "auto"})
        self.children = [*above, side, self.plot]
        self.enable()
        self.on("rotations token", self._arrange)
        self._arrange()

    def _arrange(self) -> None:
        """The columns of the models that would write; the token that is looked at, in texts and strip."""
        for name, column in self.columns.items():
            column.layout.display = None if name in (EXACT, *self.state.rotations) else "none"
        for result in self.written.values():
            self._show(result)
        if len(losses := self.losses()):
            self.plot.draw(losses, self.state.token)

    def specs(self) -> dict[str, Recipe]:
        """The models that write, by name; first the one that is not quantized."""
        state, method, row = self.state, self.setting.method, self.setting.row
        rows = {EXACT: row(FULL, method("NR"))}
        rows |= {name: row(state.bits, method(name), weights=state.weights) for name in state.rotations}
        return {name: door.resolved(spec.with_(windows=1)).canonical() for name, spec in rows.items()}

    def refined(self) -> bool:
        """Whether DFRot's rotation is in the store."""
        return dfrot.stored(self.setting.refine, self.store) is not None

    def unready(self, specs: dict[str, Recipe]) -> dict[str, str]:
        """Which models are left out, and why: nothing that takes minutes is started unasked."""
        why = {}
        for name, spec in specs.items():
            weights = registry.load(registry.WEIGHTS, spec.weights.method)
            if name == "DFRot" and not self.refined():
                why[name] = "its rotation is not refined yet: press Refine DFRot"
            elif weights.CALIBRATED and not build.weights_stored(spec, self.store):
                why[name] = UNSTORED
        return why

    def write(self) -> None:
        """Write in the background, model after model."""
        state = self.state
        drawn = {"temperature": state.temperature, "top_k": state.top_k, "seed": state.seed}
        work = partial(self._write, prompt=state.prompt, tokens=state.tokens, drawn=drawn)
        self.work("looking in the store", work)

    def refine(self) -> None:
        """Refine DFRot's rotation in the background and keep it."""
        takes = cost.duration(sum(cost.preparation(self.setting, self.store)))
        text = f"refining DFRot's rotation, about {takes} on 2 cores"
        self.work(text, lambda job: dfrot.refined(self.setting.refine, self.store, lambda _state: job.step()))

    def _enabled(self) -> dict[str, bool]:
        return {**super()._enabled(), "refine": not self.job.running and not self.refined()}

    def _write(self, job: Job, prompt: str, tokens: int, drawn: dict[str, Any]) -> None:
        specs = self.specs()
        why = self.unready(specs)
        self.written, self.bar.value = {}, 0.0
        for name in self.columns:
            self._fill(name, text=html.escape(why.get(name, "")))
        ready = {name: spec for name, spec in specs.items() if name not in why}
        keys = {name: build.build_key(spec) for name, spec in ready.items()}
        self.kept = {key: built for key, built in self.kept.items() if key in keys.values()}

        def on_part(part: str, done: int, total: int) -> None:
            self.status.busy(f"quantizing weights, {part} {done} of {total}")
            job.step()

        def on_token(token: int) -> None:
            *done, result = self.written.values()
            result.ids.append(token)
            self.bar.value = (len(done) + len(result.ids) / tokens) / len(ready)
            self._show(result)
            of = f"of {tokens}, model {len(done) + 1} of {len(ready)}"
            self.status.busy(f"{result.name} writes token {len(result.ids)} {of}")
            job.step()

        for name, spec in ready.items():
            self.status.busy(f"building {name}, model {len(self.written) + 1} of {len(ready)}")
            job.step()
            built = self._built(keys[name], spec, on_part)
            if name == EXACT:
                self.tokenizer = built.loaded.tokenizer
                self.prompt_ids = numbers.prompt_ids(built.loaded, prompt, tokens).tolist()
            result = self.written[name] = numbers.Written(name)
            with build.quantized(built, spec):
                ids = torch.tensor(self.prompt_ids)
                numbers.continuation(built.loaded, ids, tokens, on_token, **drawn)
                ids = torch.tensor(self.prompt_ids + self.written[EXACT].ids)
                result.losses = numbers.token_losses(built.loaded, ids)
            self._show(result)
            self.plot.draw(self.losses(), self.state.token)

    def _built(self, key: str, spec: Recipe, on_part: OnPart) -> build.Built:
        if key not in self.kept:
            sizes = [sum(p.nbytes for p in each.loaded.model.parameters()) for each in self.kept.values()]
            if psutil.virtual_memory().available < ROOM * max(sizes, default=0):
                self.kept.clear()
            self.kept[key] = build.build(spec, self.store, on_part, whole=True)
        return self.kept[key]

    def _show(self, result: numbers.Written) -> None:
        exact, different = self.written[EXACT].ids, self._different(result)
        head = "as full precision" if different is None else f"departs at token {different + 1}"
        parts = []
        for place, token in enumerate(result.ids):
            title, text, departs = f"token {place + 1}, id {token}", self.text(token), place == different
            if departs and place < len(exact):
                title += f"; full precision wrote {theme.visible(self.text(exact[place]))}"
            marked = theme.span(text, theme.MASSIVE_COLOUR if departs else None, title)
            if len(self.prompt_ids) + place + 1 == self.state.token:
                marked = f'<b style="outline:2px solid {theme.PICKED_COLOUR}">{marked}</b>'
            parts.append(marked + ("<br>" if "\n" in text else ""))
        prompt = html.escape(self.tokenizer.decode(self.prompt_ids))
        words = f'<span style="color:{GREY}">{prompt}</span><wbr>{"<wbr>".join(parts)}'
        self._fill(result.name, "" if result.name == EXACT else head, words)

    def _fill(self, name: str, head: str = "", text: str = "") -> None:
        mark = f"border-left:6px solid {theme.COLOURS.get(name, GREY)};padding-left:6px"
        title = f'<b style="{mark}">{html.escape(name)}</b> <i style="color:{GREY}">{head}</i>'
        self.columns[name].value = title + f'<div style="line-height:1.5;overflow-wrap:anywhere">{text}</div>'

    def _different(self, result: numbers.Written) -> int | None:
        """Where a text departs from full precision's; while it is being written its end is no difference."""
        exact = self.written[EXACT].ids
        return numbers.first_difference(result.ids, exact if result.losses else exact[: len(result.ids)])

    def text(self, token: int) -> str:
        """A token's text as the tokenizer decodes it alone."""
        return str(self.tokenizer.decode([token]))

    def table(self) -> pd.DataFrame:
        """What was written: model, position (from 1), id, text, departs (at the first that differs)."""
        lines = [
            (name, place + 1, token, self.text(token), place == self._different(result))
            for name, result in self.written.items()
            for place, token in enumerate(result.ids)
        ]
        return pd.DataFrame(lines, columns=["model", "position", "id", "text", "departs"])

    def losses(self) -> pd.DataFrame:
        """Every scored token: position (from 2), text, prompt (or not), its loss in nats by each model."""
        scored = {name: result.losses for name, result in self.written.items() if result.losses}
        ids = self.prompt_ids + self.written[EXACT].ids if scored else []
        losses = pd.DataFrame({"position": range(1, len(ids) + 1), "text": [self.text(i) for i in ids]})
        losses["prompt"] = losses["position"] <= len(self.prompt_ids)
        return losses.iloc[1:].reset_index(drop=True).assign(**scored)

    def static(self) -> Figure:
        """The loss strip as a matplotlib figure."""
        values = self.losses().set_index("position").drop(columns=["text", "prompt"])
        if values.empty:
            raise ValueError("nothing to draw: nothing is written yet")
        with drawing(size=(10, 0.5 * values.shape[1] + 1.4)) as (figure, (ax,)):
            seaborn.heatmap(values.T, cmap="cividis", vmin=0, cbar_kws={"label": "loss (nats)"}, ax=ax)
            ax.axvline(self.losses()["prompt"].sum(), c="#ffffff", lw=2)
            ax.set(xlabel="token (white line: the prompt's end)", ylabel="")
        return figure
