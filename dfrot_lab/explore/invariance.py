"""An invariance bench: switch surgery steps on and off, and see what the logits and the generated text make
of it.
"""

from typing import Any

import ipywidgets as widgets
import pandas as pd
import plotly.graph_objects as go
import traitlets
from matplotlib.figure import Figure

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import loading
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe.specs import ModelSpec, RotationSpec
from dfrot_lab.show import figures

from . import base
from .latest import Latest
from .surgeries import PROMPT, STEPS, TOLERANCE, Bench, Outcome, Steps

SHOWN = 8
"""Trials in the plot, the newest below."""
LEAST = 1e-8
"""Where an error of 0 is drawn on the log axis."""
KEPT, BROKEN = base.COLOURS["RH"], base.MASSIVE_COLOUR
COLUMNS = ["steps", "error", "broken", "why", "refused", "text"]


class Switches(traitlets.HasTraits):
    """What is switched on: one Bool a step, the kind and seed of R1, the prompt."""

    untie, centre, fuse, drop = traitlets.Bool(), traitlets.Bool(), traitlets.Bool(), traitlets.Bool()
    r1, r2, r3, r4_fused, r4_online = (
        traitlets.Bool(),
        traitlets.Bool(),
        traitlets.Bool(),
        traitlets.Bool(),
        traitlets.Bool(),
    )
    kind = traitlets.Enum(("RH", "RO"), "RH")
    seed = traitlets.Int(0, min=0)
    prompt = traitlets.Unicode(PROMPT)

    def steps(self) -> Steps:
        """The switches as the steps to take."""
        return Steps(
            **{name: getattr(self, name) for name in STEPS},
            rotation=RotationSpec(kind=self.kind, seed=self.seed),
        )


def table(outcomes: list[Outcome]) -> pd.DataFrame:
    """One row a trial, oldest first: steps, error (relative, of the logits), broken, why, refused (the
    package's words), text.
    """
    rows = [
        (o.steps.name, o.error, o.broken, " ".join(o.faults), " ".join(o.refusals), "".join(o.tokens))
        for o in outcomes
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def verdict_html(outcome: Outcome) -> str:
    """The verdict in colour, with a sign that does not need one."""
    sign, colour = (
        ("\u2718 Broken:", BROKEN) if outcome.broken else ("\u2714 Unchanged:", base.COLOURS["DFRot"])
    )
    text = base.html.escape(outcome.verdict)
    return f'<p class="dfrot-verdict" style="margin:4px 0;line-height:1.4"><b style="color:{colour}">{sign}</b> {text}</p>'


def text_html(outcome: Outcome, truth: Outcome) -> str:
    """Both continuations, token by token; what differs from the untouched model's is marked."""
    pairs = zip(outcome.tokens, truth.tokens, strict=False)
    own = "".join(
        base.span(token, None if token == wanted else BROKEN, f"untouched: {wanted}")
        for token, wanted in pairs
    )
    wanted = "".join(base.span(token) for token in truth.tokens)
    same = "the same text" if outcome.tokens == truth.tokens else "marked: not what the untouched model says"
    return f'<p style="margin:4px 0;line-height:1.7">untouched: {wanted}<br>with these steps: {own} <i>({same})</i></p>'


class Invariance(widgets.VBox):
    """The widget of `invariance`. Parts: state, controls (by name), plot, status, latest (the background
    work), outcomes, table(), static().
    """

    def __init__(self, spec: ModelSpec, store: Store | None, loaded: LoadedModel | None) -> None:
        self.spec, self.store, self.loaded = spec, store, loaded
        self.bench: Bench | None = None
        self.outcomes: list[Outcome] = []
        self.truth: dict[str, Outcome] = {}
        self.state, self.status = Switches(), base.Status()
        self.controls = self._controls()
        self.plot = self._plot()
        self.verdict, self.text = (
            widgets.HTML(layout=widgets.Layout(min_height=height)) for height in ("66px", "60px")
        )
        self.latest = Latest(self._compute, self.status.error)
        switches = widgets.VBox([self.controls[name] for name in STEPS], layout=widgets.Layout(width="330px"))
        right = widgets.VBox(
            [self.plot, self.verdict, self.text], layout=widgets.Layout(flex="1 1 600px", min_width="0")
        )
        first = base.row(
            *(self.controls[name] for name in ("prompt", "kind", "seed", "correct", "clear", "cancel"))
        )
        super().__init__(
            [first, widgets.HBox([switches, right]), self.status.widget], layout=base.column().layout
        )
        self.add_class("dfrot-invariance")
        self.state.observe(lambda _change: self.ask(), names=[*STEPS, "kind", "seed", "prompt"])
        self.ask()

    def set(self, **changes: Any) -> None:
        """Change several switches at once, as a person would one after the other; all that are not named
        stay.
        """
        with self.state.hold_trait_notifications():
            for name, value in changes.items():
                setattr(self.state, name, value)

    def ask(self) -> None:
        """Try what is switched on now, in the background."""
        self.status.busy("loading the model" if self.bench is None else f"trying {self.state.steps().name}")
        self.latest.ask((self.state.steps(), self.state.prompt))

    def wait(self, seconds: float | None = 120) -> Outcome:
        """The newest trial, once nothing is left to compute; TimeoutError after `seconds`."""
        self.latest.wait(seconds)
        if self.latest.busy or not self.outcomes:
            raise TimeoutError(f"no trial ended within {seconds} s: {self.status.text}")
        return self.outcomes[-1]

    def table(self) -> pd.DataFrame:
        """All trials so far, one row each."""
        return table(self.outcomes)

    def static(self) -> Figure:
        """The plotted trials as a matplotlib figure."""
        with figures.theme():
            drawn, ax = figures.plt.subplots(figsize=(8, 3.8))
            shown = self.table().tail(SHOWN).rename(columns={"steps": "step"})
            figures.plot_logit_errors(shown, TOLERANCE, ax=ax)
        figures.plt.close(drawn)
        return drawn

    def _controls(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            name: widgets.Checkbox(description=text, indent=False, layout=widgets.Layout(width="320px"))
            for name, text in STEPS.items()
        }
        made["prompt"] = widgets.Text(
            description="Prompt", continuous_update=False, layout=widgets.Layout(width="470px")
        )
        made["kind"] = widgets.Dropdown(
            options=["RH", "RO"], description="R1 is", layout=widgets.Layout(width="170px")
        )
        made["seed"] = widgets.BoundedIntText(
            description="Seed of R1", min=0, max=10**6, layout=widgets.Layout(width="180px")
        )
        for name, control in made.items():
            traitlets.link((self.state, name), (control, "value"))
        for name, text, act in (
            ("correct", "All steps, correctly", self._correct),
            ("clear", "No step", self._clear),
            ("cancel", "Cancel", None),
        ):
            made[name] = widgets.Button(description=text)
            made[name].on_click(lambda _button, act=act: act() if act else self.latest.cancel())
        return made

    def _correct(self) -> None:
        self.set(**{name: name not in ("centre", "drop") for name in STEPS})

    def _clear(self) -> None:
        self.set(**dict.fromkeys(STEPS, False))

    def _plot(self) -> go.FigureWidget:
        plot = base.figure(height=330, bargap=0.3, showlegend=False)
        hover = "%{customdata}<br>%{x:.2e}<extra></extra>"
        plot.add_bar(
            orientation="h",
            x=[],
            y=[],
            text=[],
            textposition="outside",
            cliponaxis=False,
            hovertemplate=hover,
        )
        plot.add_vline(x=TOLERANCE, line_dash="dash", line_color=base.GREY)
        about = "relative error of the logits (dashed: the tolerance)"
        plot.update_xaxes(type="log", range=[-8.3, 1.6], title=about, exponentformat="power", dtick=2)
        plot.update_yaxes(
            zeroline=False,
            showgrid=False,
            tickfont_size=10,
            range=[SHOWN - 0.5, -0.5],
            tickmode="array",
            automargin=True,
        )
        return plot

    def _compute(self, wish: tuple[Steps, str]) -> None:
        """In the background: load the model once, try the steps, show the outcome."""
        steps, prompt = wish
        if self.bench is None:
            self.bench = Bench(self.loaded or loading.load_model(self.spec, self.store))
        self.status.busy(f"trying {steps.name}")
        if prompt not in self.truth:
            self.truth[prompt] = self.bench.measure(Steps(), prompt, step=self.latest.step)
        outcome = (
            self.truth[prompt]
            if steps == Steps(rotation=steps.rotation)
            else self.bench.measure(steps, prompt, step=self.latest.step)
        )
        self.outcomes.append(outcome)
        self._show(outcome, self.truth[prompt])

    def _show(self, outcome: Outcome, truth: Outcome) -> None:
        shown = self.outcomes[-SHOWN:]
        bar, places = self.plot.data[0], list(range(len(shown)))
        with self.plot.batch_update():
            bar.x, bar.y = (
                [min(max(o.error, LEAST), 30.0) if o.error == o.error else 30.0 for o in shown],
                places,
            )
            bar.text = [f"{o.error:.1e}" if o.error else "0" for o in shown]
            bar.marker.color = [BROKEN if o.broken else KEPT for o in shown]
            bar.customdata = [o.steps.name for o in shown]
            self.plot.layout.yaxis.tickvals, self.plot.layout.yaxis.ticktext = (
                places,
                [_wrapped(o.steps.name) for o in shown],
            )
        self.verdict.value, self.text.value = verdict_html(outcome), text_html(outcome, truth)
        self.status.say(f"{outcome.steps.name}: {'broken' if outcome.broken else 'unchanged'}")


def _wrapped(name: str, width: int = 34) -> str:
    """A long list of steps on two lines, for an axis."""
    if len(name) <= width:
        return name
    middle = name.rfind(" + ", 0, width)
    return f"{name[:middle]}<br>{name[middle:]}"


def invariance(
    model: ModelSpec | None = None, *, store: Store | None = None, loaded: LoadedModel | None = None
) -> Invariance:
    """Switch each surgery step on and off and see the logits' error against the untouched model, and a short
    text it generates.

    `loaded`, where given, is used (and changed) instead of a fresh load of `model`. The model is loaded once,
    in the background.
    """
    return Invariance(model or ModelSpec(), store, loaded)
