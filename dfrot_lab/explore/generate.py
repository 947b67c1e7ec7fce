"""What quantization does to the words: one prompt through NR, RO, RH and DFRot beside the model that is not
quantized, token by token.
"""

import html
from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import traitlets
from matplotlib.figure import Figure

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import loading
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.rotate import dfrot
from dfrot_lab.score import perplexity
from dfrot_lab.show import figures
from dfrot_lab.study.mainjob import NOMINAL_SECONDS
from dfrot_lab.study.setting import Setting

from . import base, writing
from .parts import label
from .worth_rows import BITS, FULL, ROTATIONS, duration
from .writing import Written

EXACT = "full precision"
PROMPT = "The Eiffel Tower is in"
LABELLED = 70
"""Tokens up to which the loss strip names each one below it."""


class Draft(traitlets.HasTraits):
    """What is written: the prompt, through which rotations, at which bits, how weights are quantized, how
    many tokens.
    """

    prompt = traitlets.Unicode(PROMPT)
    rotations = traitlets.Tuple(default_value=ROTATIONS)
    bits = traitlets.Unicode("4-4-16")
    weights = traitlets.Unicode("rtn")
    tokens = traitlets.Int(24)


def generate(setting: Setting | None = None, store: Store | None = None) -> "Generate":
    """A widget that shows what each rotation makes a quantized model write, where it first departs, and what
    it makes of every token.
    """
    return Generate((setting or Setting.of_profile()).resolved(), store or Store())


class Generate(widgets.VBox):
    """The explorer: `state` (Draft), `controls`, `columns`, `plot` (loss strip), `status`, `bar`, `job`;
    `table()`, `losses()`, `static()`.
    """

    def __init__(self, setting: Setting, store: Store) -> None:
        self.setting, self.store = setting, store
        self.state, self.workshop = Draft(), writing.Workshop(store)
        self.written: dict[str, Written] = {}
        self.prompt_ids: list[int] = []
        self.tokenizer: Any = None
        self.status, self.job, self.plot = base.Status(), base.Job(self._ended), empty_strip()
        layout = {
            "height": "250px",
            "overflow": "auto",
            "width": "236px",
            "border": f"1px solid {base.GREY}",
            "padding": "4px",
        }
        self.columns = {
            name: widgets.HTML(_column(name, "", ""), layout=widgets.Layout(**layout))
            for name in (EXACT, *ROTATIONS)
        }
        self.bar = widgets.FloatProgress(
            min=0, max=1, description="Done", layout=widgets.Layout(width="300px")
        )
        self.controls = _controls()
        for name in ("prompt", "rotations", "bits", "weights", "tokens"):
            traitlets.link((self.state, name), (self.controls[name], "value"))
        for name, act in {"write": self.write, "cancel": self.cancel, "refine": self.refine}.items():
            self.controls[name].on_click(lambda _button, act=act: act())
        c = self.controls
        super().__init__(
            [
                base.row(c["prompt"], c["rotations"], widgets.VBox([c["bits"], c["weights"], c["tokens"]])),
                base.row(c["write"], c["cancel"], c["refine"], self.bar),
                self.status.widget,
                widgets.HBox(
                    list(self.columns.values()), layout=widgets.Layout(grid_gap="6px", overflow="auto")
                ),
                self.plot,
            ],
            layout=base.column().layout,
        )
        self.add_class("dfrot-generate")
        self._free()

    def specs(self) -> dict[str, Recipe]:
        """The models that write, by name; first the one that is not quantized."""
        setting, state = self.setting, self.state
        rows = {EXACT: setting.row(FULL, setting.rotation("NR"))}
        for name in state.rotations:
            rows[name] = setting.row(
                state.bits,
                setting.refine if name == "DFRot" else setting.rotation(name),
                weights=state.weights,
            )
        return {name: perplexity.canonical(spec.with_(windows=1)) for name, spec in rows.items()}

    def unready(self, specs: dict[str, Recipe]) -> dict[str, str]:
        """Which of the models are left out, and why: nothing that takes minutes is started from here without
        being asked for.
        """
        why = {}
        for name, spec in specs.items():
            if name == "DFRot" and dfrot.stored(self.setting.refine, self.store) is None:
                why[name] = "its rotation is not refined yet: press Refine DFRot"
            elif spec.weights.method == "gptq" and not perplexity.weights_stored(spec, self.store):
                why[name] = (
                    "its GPTQ weights are not stored: choose rtn, or compute its row with `dfrot-lab evaluate`"
                )
        return why

    def write(self) -> None:
        """Write in the background, model after model."""
        if self.job.running:
            return
        with self.status.doing("looking in the store", ""):
            specs = self.specs()
            why = self.unready(specs)
            self.written = {}
            for name, column in self.columns.items():
                column.value = _column(name, "", html.escape(why.get(name, "")))
            ready = {name: spec for name, spec in specs.items() if name not in why}
            self._start(
                "loading the model", lambda job: self._work(job, ready, self.state.prompt, self.state.tokens)
            )

    def refine(self) -> None:
        """Refine DFRot's rotation in the background and keep it."""
        if not self.job.running:
            seconds = NOMINAL_SECONDS["capture"] + NOMINAL_SECONDS["refine"]
            work = lambda job: dfrot.refined(self.setting.refine, self.store, lambda _state: job.step())  # noqa: E731
            self._start(f"refining DFRot's rotation, about {duration(seconds)} on 2 cores", work)

    def cancel(self) -> None:
        """Stop at the next token, layer or checkpoint."""
        if self.job.running:
            self.status.busy("stopping")
            self.job.cancel()

    def _start(self, text: str, work: Any) -> None:
        self.bar.value = 0.0
        for name in ("write", "refine"):
            self.controls[name].disabled = True
        self.controls["cancel"].disabled = False
        self.job.start(work)
        self.status.busy(text)

    def _work(self, job: base.Job, specs: dict[str, Recipe], prompt: str, tokens: int) -> None:
        self.workshop.keep_only(list(specs.values()))

        def on_part(part: str, done: int, total: int) -> None:
            self.status.busy(f"quantizing weights, {part} {done} of {total}")
            job.step()

        for place, (name, spec) in enumerate(specs.items()):
            self.status.busy(f"building {name}, model {place + 1} of {len(specs)}")
            job.step()
            built = self.workshop.built(spec, on_part)
            if name == EXACT:
                self._take_prompt(built.loaded, prompt, tokens)
            result = self.written[name] = Written(name, [])

            def on_token(token: int, result: Written = result, place: int = place) -> None:
                result.ids.append(token)
                self.bar.value = (place + len(result.ids) / tokens) / len(specs)
                self._show(result)
                self.status.busy(
                    f"{result.name} writes token {len(result.ids)} of {tokens}, model {place + 1} of {len(specs)}"
                )
                job.step()

            with perplexity.quantized(built, spec):
                writing.write(built, torch.tensor(self.prompt_ids), tokens, on_token)
                result.losses = writing.token_losses(
                    built, torch.tensor(self.prompt_ids + self.written[EXACT].ids)
                )
            self._show(result)
            draw_strip(self.plot, self.losses(), len(self.prompt_ids))

    def _take_prompt(self, loaded: loading.LoadedModel, prompt: str, tokens: int) -> None:
        self.tokenizer = loaded.tokenizer
        self.prompt_ids = list(loaded.tokenizer(prompt).input_ids)
        if not self.prompt_ids:
            raise ValueError("the prompt is empty: type some words")
        loading.check_tokens(loaded, len(self.prompt_ids) + tokens)

    def _show(self, result: Written) -> None:
        different = self._different(result)
        head = (
            ""
            if result.name == EXACT
            else "as full precision"
            if different is None
            else f"departs at token {different + 1}"
        )
        exact = self.written[EXACT].ids
        parts = []
        for place, token in enumerate(result.ids):
            marked = place == different
            other = (
                f"; full precision wrote {base.visible(self.text(exact[place]))}"
                if marked and place < len(exact)
                else ""
            )
            title = f"token {place + 1}, id {token}{other}"
            parts.append(
                base.span(self.text(token), base.MASSIVE_COLOUR if marked else None, title)
                + ("<br>" if "\n" in self.text(token) else "")
            )
        prompt = html.escape(self.tokenizer.decode(self.prompt_ids))
        self.columns[result.name].value = _column(
            result.name, head, f'<span style="color:{base.GREY}">{prompt}</span><wbr>{"<wbr>".join(parts)}'
        )

    def _different(self, result: Written) -> int | None:
        """Where a text departs from full precision's; while it is being written its end is no difference."""
        exact = self.written[EXACT].ids
        finished = bool(result.losses)
        return writing.first_difference(result.ids, exact if finished else exact[: len(result.ids)])

    def text(self, token: int) -> str:
        """A token's text as the tokenizer decodes it alone."""
        return str(self.tokenizer.decode([token]))

    def _free(self) -> None:
        stored = dfrot.stored(self.setting.refine, self.store) is not None
        (
            self.controls["write"].disabled,
            self.controls["cancel"].disabled,
            self.controls["refine"].disabled,
        ) = False, True, stored

    def _ended(self, error: BaseException | None) -> None:
        with self.status.doing("finishing", "Done" if error is None else "Stopped: what is written stays"):
            self._free()
        if error is not None and not isinstance(error, base.Cancelled):
            self.status.error(error)

    def table(self) -> pd.DataFrame:
        """What was written: model, position (from 1), id, text, and whether it is the first token that is not
        full precision's.
        """
        lines = [
            {
                "model": name,
                "position": place + 1,
                "id": token,
                "text": self.text(token),
                "departs": place == self._different(result),
            }
            for name, result in self.written.items()
            for place, token in enumerate(result.ids)
        ]
        return pd.DataFrame(lines, columns=["model", "position", "id", "text", "departs"])

    def losses(self) -> pd.DataFrame:
        """Each token of the prompt and of what full precision wrote: position (from 2: the first has no
        loss), text, prompt, a column a model.
        """
        scored = {name: result.losses for name, result in self.written.items() if result.losses}
        ids = (self.prompt_ids + self.written[EXACT].ids if scored else [])[1:]
        places = range(2, len(ids) + 2)
        columns = {
            "position": list(places),
            "text": [self.text(i) for i in ids],
            "prompt": [place <= len(self.prompt_ids) for place in places],
        }
        return pd.DataFrame({**columns, **scored})

    def static(self) -> Figure:
        """The loss strip as a matplotlib figure."""
        return figure_strip(self.losses())


def _column(name: str, head: str, text: str) -> str:
    colour = base.COLOURS.get(name, base.GREY)
    title = f'<b style="border-left:6px solid {colour};padding-left:6px">{html.escape(name)}</b>'
    return f'{title} <i style="color:{base.GREY}">{html.escape(head)}</i><div style="line-height:1.5;overflow-wrap:anywhere">{text}</div>'


def empty_strip() -> go.FigureWidget:
    """The loss strip with nothing in it: a line a model, a column a token."""
    plot = base.figure(height=300)
    plot.add_heatmap(
        colorscale="Cividis", zmin=0, colorbar={"title": {"text": "loss (nats)"}}, xgap=1, ygap=2
    )
    plot.update_layout(
        yaxis={"autorange": "reversed", "type": "category"},
        title={"text": "Loss of each token of one text", "font": {"size": 13}},
    )
    return plot


def draw_strip(plot: go.FigureWidget, losses: pd.DataFrame, prompt: int) -> None:
    """Put `losses` into the strip; the line is where the prompt of `prompt` tokens ends."""
    names, texts = models_of(losses), [label(text) for text in losses["text"]]
    values = losses[names].to_numpy().T
    x = losses["position"].tolist()
    with plot.batch_update():
        strip = plot.data[0]
        strip.x, strip.y, strip.z, strip.zmax = x, names, values, float(values.max())
        strip.customdata = [[f"{place}: {text}" for place, text in zip(x, texts, strict=True)]] * len(names)
        strip.hovertemplate = "token %{customdata}<br>%{y}: %{z:.2f} nats<extra></extra>"
        few = len(x) <= LABELLED
        plot.layout.xaxis.update(
            tickmode="array" if few else "auto",
            tickvals=x if few else None,
            ticktext=texts if few else None,
            tickangle=-60,
        )
        edge = prompt + 0.5
        plot.layout.shapes = [
            {
                "type": "line",
                "x0": edge,
                "x1": edge,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"color": base.GREY, "width": 2},
            }
        ]
        plot.layout.title.text = (
            "Loss of each token: the prompt, then (right of the line) what full precision wrote"
        )


def models_of(losses: pd.DataFrame) -> list[str]:
    """The columns of a table of losses that are models."""
    return [name for name in losses.columns if name not in ("position", "text", "prompt")]


def figure_strip(losses: pd.DataFrame) -> Figure:
    """The loss strip: a line a model, a column a token."""
    names = models_of(losses)
    if not names:
        raise ValueError("nothing to draw: nothing is written yet")
    with figures.theme():
        fig, ax = figures.plt.subplots(figsize=(10, 0.5 * len(names) + 1.4))
        image = ax.imshow(
            losses[names].to_numpy().T,
            aspect="auto",
            cmap="cividis",
            vmin=0,
            extent=_extent(losses["position"], names),
        )
        ax.set_yticks(np.arange(len(names)), names[::-1])
        ax.axvline(float(losses["prompt"].sum()) + 1.5, c="#ffffff", lw=2)
        ax.set(xlabel="token (white line: the prompt's end)")
        ax.grid(visible=False)
        fig.colorbar(image, label="loss (nats)")
    figures.plt.close(fig)  # whoever asked for it shows it, once
    return fig


def _extent(position: pd.Series, names: Sequence[str]) -> tuple[float, float, float, float]:
    return float(position.iloc[0]) - 0.5, float(position.iloc[-1]) + 0.5, -0.5, len(names) - 0.5


def _controls() -> dict[str, Any]:
    return {
        "prompt": widgets.Textarea(description="Prompt", layout=widgets.Layout(width="420px", height="96px")),
        "rotations": widgets.SelectMultiple(
            options=ROTATIONS, description="Rotations", rows=4, layout=widgets.Layout(width="220px")
        ),
        "bits": widgets.Dropdown(options=BITS, description="Bits W-A-KV"),
        "weights": widgets.ToggleButtons(
            options=["rtn", "gptq"], description="Weights", style={"button_width": "70px"}
        ),
        "tokens": widgets.IntSlider(min=1, max=128, description="Tokens"),
        "write": widgets.Button(description="Write", icon="pencil"),
        "cancel": widgets.Button(description="Cancel", icon="stop", disabled=True),
        "refine": widgets.Button(description="Refine DFRot", icon="magic"),
    }
