"""Switch surgery steps on and off, and see what the logits and the generated text make of it."""

import html
from functools import partial
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from ipywidgets import HTML, BoundedIntText, Checkbox, Dropdown, HBox, Text, VBox
from matplotlib.figure import Figure
from traitlets import Bool, Enum, HasTraits, Int, Unicode

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.invariance.numbers import PROMPT, STEPS, TOLERANCE, Bench, Outcome, Steps
from dfrot_lab.explore.page import GREY, Plot, drawing
from dfrot_lab.explore.shell import Explorer, Job, control
from dfrot_lab.model import loading, shapes
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe.specs import ModelSpec, RotationSpec
from dfrot_lab.show import figures, theme
from dfrot_lab.show.block import block_svg

SHOWN = 8  # trials in the plot, the newest below
LEAST, MOST = 1e-8, 30.0  # where an error of 0, and one that is not a number, are drawn on the log axis
KEPT, BROKEN = theme.COLOURS["RH"], theme.MASSIVE_COLOUR


class _Trials(Plot):
    """The logits' error of the last trials, those that broke the model in red."""

    def __init__(self) -> None:
        look = {"orientation": "h", "textposition": "outside", "cliponaxis": False}
        bars = go.Bar(x=[], y=[], hovertemplate="%{customdata}<br>%{x:.2e}<extra></extra>", **look)
        super().__init__([bars], height=330, bargap=0.3, showlegend=False)
        self.add_vline(x=TOLERANCE, line_dash="dash", line_color=GREY)
        about = "relative error of the logits (dashed: the tolerance)"
        self.update_xaxes(type="log", range=[-8.3, 1.6], title=about, exponentformat="power", dtick=2)
        self.update_yaxes(zeroline=False, showgrid=False, tickfont_size=10, range=[SHOWN - 0.5, -0.5])

    def draw(self, outcomes: list[Outcome]) -> None:
        shown = outcomes[-SHOWN:]
        places, names = list(range(len(shown))), [o.steps.name for o in shown]
        x = [min(max(o.error, LEAST), MOST) if o.error == o.error else MOST for o in shown]
        bars = {"x": x, "y": places, "customdata": names}
        bars["text"] = [f"{o.error:.1e}" if o.error else "0" for o in shown]
        bars["marker"] = {"color": [BROKEN if o.broken else KEPT for o in shown]}
        middles = [name.rfind(" + ", 0, 34) if len(name) > 34 else 0 for name in names]
        ticks = [f"{n[:i]}<br>{n[i:]}" if i else n for n, i in zip(names, middles, strict=True)]
        self.put(bars, yaxis={"tickmode": "array", "tickvals": places, "ticktext": ticks})


class _State(HasTraits):
    untie, centre, fuse, drop, r1, r2, r3, r4_fused, r4_online = (
        control(Bool(), Checkbox, label, 320, indent=False) for label in STEPS.values()
    )
    kind = control(Enum(("RH", "RO"), "RH"), Dropdown, "R1 is", 170)
    seed = control(Int(0, min=0), BoundedIntText, "Seed of R1", 180, min=0, max=10**6)
    prompt = control(Unicode(PROMPT), Text, "Prompt", 470, continuous_update=False)

    def steps(self) -> Steps:
        on = {name: getattr(self, name) for name in STEPS}
        return Steps(**on, rotation=RotationSpec(kind=self.kind, seed=self.seed))


def verdict_html(outcome: Outcome) -> str:
    """The verdict in colour, with a sign that does not need one."""
    unchanged = ("\u2714 Unchanged:", theme.COLOURS["DFRot"])
    sign, colour = ("\u2718 Broken:", BROKEN) if outcome.broken else unchanged
    words = f'<b style="color:{colour}">{sign}</b> {html.escape(outcome.verdict)}'
    return f'<p class="dfrot-verdict" style="margin:4px 0;line-height:1.4">{words}</p>'


def text_html(outcome: Outcome, truth: Outcome) -> str:
    """Both continuations, token by token; what differs from the untouched model's is marked."""
    pairs = zip(outcome.tokens, truth.tokens, strict=False)
    own = "".join(theme.span(a, None if a == b else BROKEN, f"untouched: {b}") for a, b in pairs)
    wanted = "".join(map(theme.span, truth.tokens))
    same = "the same text" if outcome.tokens == truth.tokens else "marked: not what the untouched model says"
    words = f"untouched: {wanted}<br>with these steps: {own} <i>({same})</i>"
    return f'<p style="margin:4px 0;line-height:1.7">{words}</p>'


class Invariance(Explorer):
    """Switch each surgery step on and off and see the logits' error against the untouched model, and a text;
    `outcomes` are the trials. `loaded`, where given, is used (and changed), not a fresh load of `model`."""

    CANCELLED = "cancelled; the trials are as they were"

    def __init__(
        self, model: ModelSpec | None = None, store: Store | None = None, loaded: LoadedModel | None = None
    ) -> None:
        super().__init__(_State())
        self._load = lambda: loaded or loading.load_model(model or ModelSpec(), store, whole=True)
        self.bench: Bench | None = None
        self.outcomes, self.truth = list[Outcome](), dict[str, Outcome]()
        self.plot = _Trials()
        heights = ("0", "66px", "60px")
        self.block, self.verdict, self.text = (HTML(layout={"min_height": high}) for high in heights)
        right = {name: name not in ("centre", "drop") for name in STEPS}
        self.button("correct", "All steps, correctly", lambda: self.set(**right))
        self.button("clear", "No step", lambda: self.set(**dict.fromkeys(STEPS, False)))
        self.button("cancel", "Cancel", self.cancel)
        switches = VBox([self.controls[name] for name in STEPS], layout={"width": "350px"})
        shown = [self.block, self.plot, self.verdict, self.text]
        found = VBox(shown, layout={"flex": "1 1 600px", "min_width": "0"})
        above = self.row("prompt", "kind", "seed", "correct", "clear", "cancel")
        self.children = [above, HBox([switches, found]), self.status.line]
        self.on(" ".join([*STEPS, "kind seed prompt"]), self.ask)
        self.ask()

    def set(self, **changes: Any) -> None:
        """Change several switches at once; all that are not named stay."""
        with self.state.hold_trait_notifications():
            for name, value in changes.items():
                setattr(self.state, name, value)

    def ask(self) -> None:
        """Try what is switched on now, in the background."""
        self.status.busy("loading the model" if self.bench is None else f"trying {self.state.steps().name}")
        self.job.instead(partial(self._compute, steps=self.state.steps(), prompt=self.state.prompt))
        self.enable()

    def _enabled(self) -> dict[str, bool]:
        return {"cancel": self.job.running}  # a newer trial takes the place of the one that runs

    def wait(self, seconds: float | None = 120) -> Outcome:
        """The newest trial, once nothing is left to compute; TimeoutError after `seconds`."""
        self.job.wait(seconds)
        if self.job.running or not self.outcomes:
            raise TimeoutError(f"no trial ended within {seconds} s: {self.status.text}")
        return self.outcomes[-1]

    def table(self) -> pd.DataFrame:
        """One row a trial, oldest first: steps, error (relative), broken, why, refused (so why), text."""
        rows = [
            (o.steps.name, o.error, o.broken, " ".join(o.reasons), " ".join(o.refusals), "".join(o.tokens))
            for o in self.outcomes
        ]
        return pd.DataFrame(rows, columns=["steps", "error", "broken", "why", "refused", "text"])

    def static(self) -> Figure:
        """The plotted trials as a matplotlib figure."""
        with drawing(size=(8, 3.8)) as (figure, (ax,)):
            shown = self.table().tail(SHOWN).rename(columns={"steps": "step"})
            figures.plot_logit_errors(shown, TOLERANCE, ax=ax)
        return figure

    def _compute(self, job: Job, steps: Steps, prompt: str) -> None:
        if self.bench is None:
            self.bench = Bench(self._load())
        self.status.busy(f"trying {steps.name}")
        if prompt not in self.truth:
            self.truth[prompt] = self.bench.measure(Steps(), prompt, step=job.step)
        outcome = truth = self.truth[prompt]
        if steps != Steps(rotation=steps.rotation):
            outcome = self.bench.measure(steps, prompt, step=job.step)
        self.outcomes.append(outcome)
        self.plot.draw(self.outcomes)
        self.verdict.value, self.text.value = verdict_html(outcome), text_html(outcome, truth)
        roles, shape = self.bench.loaded.roles, shapes.shape_of(self.bench.loaded.model.config)
        self.block.value = block_svg(
            roles, shape, on=outcome.steps.acting, broken=outcome.wires, rounded=False
        )
        self.status.say(f"{outcome.steps.name}: {'broken' if outcome.broken else 'unchanged'}")
