"""The rotation playground: turn a spike by hand in two or three channels, then with matrices in up to 576,
and see why the error is what it is.
"""

import math
from typing import Any

import ipywidgets as widgets
import pandas as pd
import traitlets
from matplotlib.figure import Figure
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.specs import CaptureSpec, QuantSpec
from dfrot_lab.show import figures

from . import base, toy
from .plots import ErrorPlot, HandPlot, SpacePlot, SweepPlot, ValuesPlot, beside

ANGLES = ("angle", "angle_02", "angle_12")
SIZES = (4, 16, 64, 576)


class Hand(traitlets.HasTraits):
    """The state: dims, the three angles in degrees, the token (snr, seed), the quantizer, channels, and whose
    spike is shown.
    """

    dims = traitlets.Enum((2, 3), 2)
    angle, angle_02, angle_12 = traitlets.Float(0.0), traitlets.Float(0.0), traitlets.Float(0.0)
    snr = traitlets.Float(8.0, min=0.1)
    seed = traitlets.Int(0, min=0)
    bits = traitlets.Int(4, min=2, max=8)
    symmetric = traitlets.Bool(True)
    channels = traitlets.Int(576)
    source = traitlets.Enum(("planted", "model"), "planted")

    @property
    def quantizer(self) -> QuantSpec:
        """The grid's spec."""
        return QuantSpec(bits=self.bits, scheme="symmetric" if self.symmetric else "asymmetric")

    @property
    def degrees(self) -> list[float]:
        """The angles that count: one in two channels, three in three."""
        return [self.angle] if self.dims == 2 else [self.angle, self.angle_02, self.angle_12]

    @property
    def token(self) -> Tensor:
        """The token turned by hand (dims,)."""
        return toy.hand_token(self.snr, self.dims, self.seed)


def reading_html(found: dict[str, float]) -> str:
    """Range, step and errors as one line."""
    parts = [
        f"range <b>{found['range']:.3f}</b>",
        f"step <b>{found['step']:.3f}</b>",
        f"error <b>{found['error']:.4f}</b>",
    ]
    change = found["error"] / found["unrotated"] if found["unrotated"] else math.nan
    return " &nbsp; ".join([*parts, f"not rotated: {found['unrotated']:.4f} (ratio {change:.2f})"])


def _number(value: float, digits: int) -> str:
    return "none" if math.isnan(value) else f"{value:.{digits}f}"


def why_html(table: pd.DataFrame, what: str) -> str:
    """The closed form beside the measured errors, and its reason in words."""
    cells = [
        f"<tr><td>{row['rotation']}</td><td>{row['measured']:.3f}</td><td>{row['low']:.3f} to {row['high']:.3f}</td>"
        f"<td>{_number(row['predicted'], 3)}</td><td>{_number(row['ratio'], 2)}</td></tr>"
        for row in table.to_dict("records")
    ]
    head = "<tr><th>rotation</th><th>measured</th><th>over seeds</th><th>closed form</th><th>ratio</th></tr>"
    reasons = [
        "<b>NR</b>: the spike sets the step; noise below half a step is lost, C\u03c3\u00b2 in all.",
        "<b>RO</b>: the entries become Gaussian, whatever the token was; the largest of C sets the step, and the error is C step\u00b2/12.",
        "<b>RH</b>: the spike becomes \u00b1m/\u221aC everywhere; only the noise about these two levels is rounded.",
    ]
    small = (
        f"Below {toy.FEWEST} channels there is no closed form: each entry then moves the step itself."
        if table["predicted"].isna().any()
        else ""
    )
    lines = "<br>".join([f"Why ({base.html.escape(what)}):", *reasons, small])
    return f'<div style="display:flex;gap:24px;flex-wrap:wrap"><table class="dfrot-why">{head}{"".join(cells)}</table><div>{lines}</div></div>'


class Playground(widgets.VBox):
    """The widget of `playground`. Parts: state, controls, hand, space, sweep, values, errors (plots), status,
    job, reading(), table(), static().
    """

    def __init__(self, spec: CaptureSpec, store: Store | None) -> None:
        self.spec, self.store = spec, store
        self.model_token: Tensor | None = None
        self.model_name = ""
        self.state, self.status = Hand(), base.Status()
        self.job = base.Job(on_done=self._opened)
        self.controls = self._controls()
        self.hand, self.space, self.sweep, self.values, self.errors = (
            HandPlot(),
            SpacePlot(),
            SweepPlot(),
            ValuesPlot(),
            ErrorPlot(),
        )
        first, second = beside(self.hand.plot, self.sweep.plot), beside(self.values.plot, self.errors.plot)
        self.stage = first.children[0]
        self.read = widgets.HTML(layout=widgets.Layout(min_height="28px"))
        self.why = widgets.HTML(layout=widgets.Layout(min_height="130px"))
        c = self.controls
        super().__init__(
            [
                base.row(*(c[name] for name in ("snr", "seed", "bits", "symmetric"))),
                widgets.HTML("<b>1. By hand:</b> turn the token, watch its grid"),
                base.row(*(c[name] for name in ("dims", *ANGLES))),
                first,
                self.read,
                widgets.HTML("<b>2. Many channels:</b> the same spike, turned by matrices"),
                base.row(c["source"], c["channels"]),
                second,
                self.why,
                self.status.widget,
            ],
            layout=base.column().layout,
        )
        self.add_class("dfrot-playground")
        token, grid = ["snr", "seed"], ["bits", "symmetric"]
        self.state.observe(lambda _change: self._turn(), names=["dims", *ANGLES, *token, *grid])
        self.state.observe(lambda _change: self._spread(), names=["channels", *token, *grid])
        self.state.observe(lambda _change: self._choose(), names=["source"])
        self._turn()
        self._spread()

    def reading(self) -> dict[str, float]:
        """Range, step, error and the unrotated error of the token turned by hand."""
        return toy.reading(self.state.token, toy.by_angles(self.state.degrees), self.state.quantizer)

    def token(self) -> Tensor:
        """The token of the second part (channels,): planted, or the model's own."""
        if self.state.source == "model" and self.model_token is not None:
            return self.model_token
        return toy.planted_token(self.state.snr, self.state.channels, self.state.seed)

    def table(self) -> pd.DataFrame:
        """The second part: one row a rotation, measured beside the closed form (`toy.why`)."""
        x, quantizer = self.token(), self.state.quantizer
        real = x is self.model_token
        predicted = (
            toy.expected_real(x, quantizer) if real else toy.expected(self.state.snr, len(x), quantizer)
        )
        return toy.why(toy.measured(x, quantizer), predicted)

    def static(self) -> Figure:
        """Both parts as a matplotlib figure: error against the angle, errors by rotation."""
        table, line = self.table(), toy.sweep(self.state.token, self.state.degrees, self.state.quantizer)
        with figures.theme():
            drawn, (left, right) = figures.plt.subplots(1, 2, figsize=(10, 3.8))
            left.plot(line["angle"], line["error"], c=base.COLOURS["DFRot"])
            left.axvline(self.state.angle % 180, ls="--", c="#333333", lw=1)
            left.set(xlabel="angle (degrees)", ylabel="squared error", title=f"{self.state.dims} channels")
            right.bar(
                table["rotation"], table["measured"], color=[base.COLOURS[kind] for kind in table["rotation"]]
            )
            right.plot(
                table["rotation"],
                table["predicted"],
                ls="",
                marker="_",
                ms=28,
                mew=2,
                c="k",
                label="closed form",
            )
            right.set(ylabel="squared error", title=f"{len(self.token())} channels")
            right.legend()
        figures.plt.close(drawn)
        return drawn

    def _controls(self) -> dict[str, Any]:
        wide = widgets.Layout(width="340px")
        made: dict[str, Any] = {
            "dims": widgets.ToggleButtons(
                options=[("2 channels", 2), ("3 channels", 3)], description="Turn in"
            ),
            "snr": widgets.FloatLogSlider(
                min=-0.5, max=2, step=0.05, readout_format=".2f", description="Spike / noise", layout=wide
            ),
            "seed": widgets.BoundedIntText(
                min=0, max=10**6, description="Noise seed", layout=widgets.Layout(width="180px")
            ),
            "bits": widgets.IntSlider(min=2, max=8, description="Bits", layout=widgets.Layout(width="260px")),
            "symmetric": widgets.Checkbox(description="Symmetric grid", indent=False),
            "channels": widgets.Dropdown(options=SIZES, description="Channels"),
            "source": widgets.ToggleButtons(
                options=[("planted", "planted"), ("token 0 of the model", "model")],
                description="Spike",
                style={"button_width": "160px"},
            ),
        }
        for name, text in zip(ANGLES, ("Angle 0-1", "Angle 0-2", "Angle 1-2"), strict=True):
            made[name] = widgets.FloatSlider(
                min=0, max=180, step=1, readout_format=".0f", description=text, layout=wide
            )
        for name, control in made.items():
            base.wide_label(control)
            traitlets.link((self.state, name), (control, "value"))
        return made

    def _turn(self) -> None:
        """Redraw the first part."""
        state = self.state
        flat = state.dims == 2
        for name in ANGLES[1:]:
            self.controls[name].disabled = flat
        shown = self.hand if flat else self.space
        x, quantizer = state.token, state.quantizer
        y, point = toy.rounded(x, toy.by_angles(state.degrees), quantizer)
        shown.draw(x, y, point, toy.levels(y, quantizer))
        if self.stage.children != (shown.plot,):
            self.stage.children = (shown.plot,)
        found = self.reading()
        self.sweep.draw(toy.sweep(x, state.degrees, quantizer), state.angle, found["error"])
        self.read.value = reading_html(found)

    def _spread(self) -> None:
        """Redraw the second part."""
        x, quantizer, table = self.token(), self.state.quantizer, self.table()
        self.controls["channels"].disabled = x is self.model_token
        turned = {kind: x @ toy.matrix(kind, 0, len(x)) for kind in toy.KINDS}
        self.values.draw(turned, {kind: toy.levels(y, quantizer) for kind, y in turned.items()})
        self.errors.draw(toy.measured(x, quantizer), table)
        self.why.value = why_html(
            table, self.model_name if x is self.model_token else f"a planted spike in {len(x)} channels"
        )

    def _choose(self) -> None:
        """The model's spike is opened in the background at the first look."""
        if self.state.source == "model" and self.model_token is None:
            if not self.job.running:
                self.status.busy("opening the model's activations (recorded first where the store has none)")
                self.job.start(self._open)
            return
        self._spread()

    def _open(self, _job: base.Job) -> None:
        recorded = capture(self.spec, self.store)
        site = recorded.sites[len(recorded.sites) // 2]
        self.model_name = f"token 0, {base.visible(recorded.texts[0])}, at {site}"
        self.model_token = recorded.rows(site)[0].double()

    def _opened(self, error: BaseException | None) -> None:
        if error is not None:
            self.status.error(error)
            self.state.source = "planted"
            return
        self.status.say(f"The model's spike: {self.model_name}")
        self._spread()


def playground(spec: CaptureSpec | None = None, store: Store | None = None) -> Playground:
    """Rotate a spike by hand in 2 or 3 channels and watch grid, range and error; then RO and RH in 4 to 576
    channels beside the closed form.

    `spec` says which model's token 0 is shown on demand (at its middle site), from the store or recorded in
    the background.
    """
    return Playground(spec or CaptureSpec(), store)
