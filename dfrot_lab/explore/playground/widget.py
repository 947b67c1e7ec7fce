"""Turn a spike by hand in two or three channels, then with matrices in up to 576, and see why the error is
what it is."""

import html
import math

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor
from traitlets import Bool, Enum, Float, HasTraits, Int

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.playground import numbers, plots
from dfrot_lab.explore.shell.explorer import Explorer, beside, control
from dfrot_lab.explore.shell.job import Job
from dfrot_lab.explore.shell.offers import levels
from dfrot_lab.explore.shell.plot import Stage, drawing
from dfrot_lab.maths.quantizers import fake_quantize
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.specs import CaptureSpec, QuantSpec
from dfrot_lab.show.markup import visible
from dfrot_lab.show.theme import COLOURS

ANGLE = {"min": 0, "max": 180, "step": 1, "readout_format": ".0f"}
SPIKE = {"min": -0.5, "max": 2, "step": 0.05, "readout_format": ".2f"}
DIMS = [("2 channels", 2), ("3 channels", 3)]
WHOSE = [("planted", "planted"), ("token 0 of the model", "model")]
SIZES = (4, 16, 64, 576)
FINE = 0.1
"""Degrees between points of the error's curve: at whole degrees its zeros are missed."""
REASONS = """<b>NR</b>: the spike sets the step; noise below half a step is lost, C\u03c3\u00b2 in all.<br>
<b>RO</b>: the entries become Gaussian, whatever the token was; the largest of C sets the step, and the error
is C step\u00b2/12.<br>
<b>RH</b>: the spike becomes \u00b1m/\u221aC everywhere; only the noise about these two levels is rounded."""


class State(HasTraits):
    """The token (snr, seed), its grid, the angles in degrees, and whose spike is shown in many channels."""

    snr = control(Float(8.0, min=0.1), widgets.FloatLogSlider, "Spike / noise", 340, **SPIKE)
    seed = control(Int(0, min=0), widgets.BoundedIntText, "Noise seed", 180, min=0, max=10**6)
    bits = control(Int(4, min=2, max=8), widgets.IntSlider, "Bits", 260, min=2, max=8)
    symmetric = control(Bool(True), widgets.Checkbox, "Symmetric grid", indent=False)
    dims = control(Enum((2, 3), 2), widgets.ToggleButtons, "Turn in", options=DIMS)
    angle = control(Float(0.0), widgets.FloatSlider, "Angle 0-1", 340, **ANGLE)
    angle_02 = control(Float(0.0), widgets.FloatSlider, "Angle 0-2", 340, **ANGLE)
    angle_12 = control(Float(0.0), widgets.FloatSlider, "Angle 1-2", 340, **ANGLE)
    source = control(
        Enum(("planted", "model"), "planted"), widgets.ToggleButtons, "Spike", 160, options=WHOSE
    )
    channels = control(Enum(SIZES, 576), widgets.Dropdown, "Channels")

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
        return numbers.hand_token(self.snr, self.dims, self.seed)


def reading_html(found: dict[str, float]) -> str:
    """Range, step and errors as one line."""
    change = found["error"] / found["unrotated"] if found["unrotated"] else math.nan
    return (
        f"range <b>{found['range']:.3f}</b> &nbsp; step <b>{found['step']:.3f}</b> &nbsp; error "
        f"<b>{found['error']:.4f}</b> &nbsp; not rotated: {found['unrotated']:.4f} (ratio {change:.2f})"
    )


def why_html(table: pd.DataFrame, what: str) -> str:
    """The closed form beside the measured errors, and its reason in words."""
    heads = {"low": "least of the seeds", "high": "most", "predicted": "closed form"}
    shown = table.rename(columns=heads).to_html(
        index=False, border=0, na_rep="none", classes=["dfrot-table"], float_format=lambda x: f"{x:.3f}"
    )
    few = f"Below {numbers.FEWEST} channels there is no closed form: each entry then moves the step itself."
    more = few if table["predicted"].isna().any() else ""
    words = f"<div>Why ({html.escape(what)}):<br>{REASONS}<br>{more}</div>"
    return f'<div style="display:flex;gap:24px;flex-wrap:wrap">{shown}{words}</div>'


class Playground(Explorer):
    """The widget of `playground`: by hand (hand, space, sweep), and in many channels (values, errors)."""

    state: State

    def __init__(self, spec: CaptureSpec, store: Store | None) -> None:
        super().__init__(State())
        self.spec, self.store = spec, store
        self.model_token: Tensor | None = None
        self.model_name = ""
        self.hand, self.space, self.sweep = plots.Turned(2), plots.Turned(3), plots.Swept()
        self.values, self.errors = plots.Values(), plots.Errors()
        self.stage = Stage(self.hand)
        self.read, self.why = (widgets.HTML(layout={"min_height": high}) for high in ("28px", "130px"))
        self.children = [
            self.row("snr", "seed", "bits", "symmetric"),
            widgets.HTML("<b>1. By hand:</b> turn the token, watch its grid"),
            self.row("dims", "angle", "angle_02", "angle_12"),
            beside(self.stage, self.sweep),
            self.read,
            widgets.HTML("<b>2. Many channels:</b> the same spike, turned by matrices"),
            self.row("source", "channels"),
            beside(self.values, self.errors),
            self.why,
            self.status.widget,
        ]
        self.on("dims angle angle_02 angle_12 snr seed bits symmetric", self._turn)
        self.on("channels snr seed bits symmetric", self._spread)
        self.on("source", self._choose)
        self._turn()
        self._spread()

    def reading(self) -> dict[str, float]:
        """Range, step, error and the unrotated error of the token turned by hand."""
        state = self.state
        return numbers.reading(state.token, numbers.by_angles(state.degrees), state.quantizer)

    def token(self) -> Tensor:
        """The token of the second part (channels,): planted, or the model's own."""
        if self.state.source == "model" and self.model_token is not None:
            return self.model_token
        return numbers.planted_token(self.state.snr, self.state.channels, self.state.seed)

    def table(self) -> pd.DataFrame:
        """The second part: one row a rotation, measured beside the closed form (`numbers.why`)."""
        x, quantizer = self.token(), self.state.quantizer
        planted = numbers.expected(self.state.snr, len(x), quantizer)
        predicted = numbers.expected_real(x, quantizer) if x is self.model_token else planted
        return numbers.why(numbers.measured(x, quantizer), predicted)

    def static(self) -> Figure:
        """Both parts as a matplotlib figure: error against the angle, errors by rotation."""
        state, table = self.state, self.table()
        line = numbers.sweep(state.token, state.degrees, state.quantizer, FINE)
        kinds = table["rotation"]
        with drawing(2) as (figure, (left, right)):
            left.plot(line["angle"], line["error"], c=COLOURS["DFRot"])
            left.axvline(state.angle % 180, ls="--", c="#333333", lw=1)
            left.set(xlabel="angle (degrees)", ylabel="squared error", title=f"{state.dims} channels")
            right.bar(kinds, table["measured"], color=kinds.map(COLOURS))
            right.plot(kinds, table["predicted"], ls="", marker="_", ms=28, mew=2, c="k", label="closed form")
            right.set(ylabel="squared error", title=f"{len(self.token())} channels")
            right.legend()
        return figure

    def _turn(self) -> None:
        """Redraw the first part."""
        state, x = self.state, self.state.token
        flat = state.dims == 2
        for name in ("angle_02", "angle_12"):
            self.controls[name].disabled = flat
        shown = self.hand if flat else self.space
        y = x @ numbers.by_angles(state.degrees)
        point, found = fake_quantize(y[None], state.quantizer)[0], self.reading()
        shown.draw(x, y, point, levels(y, state.quantizer))
        self.stage.turn(shown)
        line = numbers.sweep(x, state.degrees, state.quantizer, FINE)
        self.sweep.draw(line, state.angle, found["error"])
        self.read.value = reading_html(found)

    def _spread(self) -> None:
        """Redraw the second part."""
        x, quantizer, table = self.token(), self.state.quantizer, self.table()
        own = x is self.model_token
        self.controls["channels"].disabled = own
        turned = {kind: x @ numbers.matrix(kind, 0, len(x)) for kind in numbers.KINDS}
        self.values.draw(turned, {kind: levels(y, quantizer) for kind, y in turned.items()})
        self.errors.draw(numbers.measured(x, quantizer), table)
        self.why.value = why_html(table, self.model_name if own else f"a planted spike in {len(x)} channels")

    def _choose(self) -> None:
        """The model's spike is opened in the background at the first look."""
        if self.state.source == "planted" or self.model_token is not None:
            self._spread()
        elif not self.job.running:
            self.work("opening the model's activations (recorded first where the store has none)", self._open)

    def _open(self, _job: Job) -> None:
        recorded = capture(self.spec, self.store)
        site = recorded.sites[len(recorded.sites) // 2]
        self.model_name = f"token 0, {visible(recorded.texts[0])}, at {site}"
        self.model_token = recorded.rows(site)[0].double()

    def at_end(self, error: BaseException | None) -> str:
        """Show the model's spike, or the planted one where it could not be opened."""
        if error is not None:
            self.state.source = "planted"
            return ""
        self._spread()
        return f"The model's spike: {self.model_name}"


def playground(spec: CaptureSpec | None = None, store: Store | None = None) -> Playground:
    """Rotate a spike by hand in 2 or 3 channels and watch grid, range and error; then RO and RH in 4 to 576
    channels beside the closed form. `spec` says which model's token 0 is shown on demand, at its middle site,
    from the store or recorded in the background."""
    return Playground(spec or CaptureSpec(), store)
