"""A dial from no rotation to a whole one: one token's values over the levels of its grid, its error live."""

from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure
from torch import Tensor
from traitlets import Bool, HasTraits, Int, Unicode

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.page import GREY, LOG, SCHEMES, TAKEN, Plot, beside, drawing, lines_at
from dfrot_lab.explore.shell import Explorer, control
from dfrot_lab.maths import dial
from dfrot_lab.maths.offsets import offset_share
from dfrot_lab.maths.quantizers import levels, scale_zero, squared_error
from dfrot_lab.model import door
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.rotate import transforms
from dfrot_lab.show.theme import MASSIVE_COLOUR, ORDINARY_COLOUR, span
from dfrot_lab.study.setting import Setting, figure_site

NAMES = ("RO", "RH", "DFRot", "Offset", "Offset+")
BINS = 96  # of the histogram
FILM = {"interval": 80, "min": 0, "max": 100, "step": 2, "show_repeat": False}
LINE = {"color": "rgba(128,128,128,0.7)", "width": 1}
READING = """Token {token} \u2018{text}\u2019: step <b>{step:.3f}</b>, squared error <b>{error:.3f}</b> \
({start:.3f} not turned, {end:.3f} under the whole of {to})<br>\
the same in every channel: <b>{offset:.0%}</b> of its energy, {taken}"""


class Values(Plot):
    """How many of a token's channels have which value, and the levels its grid offers."""

    def __init__(self) -> None:
        bars = go.Bar(marker={"color": MASSIVE_COLOUR, "line": {"width": 0}}, name="channels")
        grid = go.Scatter(mode="lines", line=LINE, hoverinfo="skip", name="levels of the grid")
        x, y = {"title": "value", "showgrid": False}, {"title": "channels (logarithmic)", **LOG}
        super().__init__([grid, bars], bargap=0, xaxis=x, yaxis=y)

    def draw(self, y: Tensor, grid: Tensor) -> None:
        """A token's values (channels,) and its levels."""
        counts, edges = dial.histogram(y, grid, BINS)
        across, along = lines_at(grid, 0.7, 1.3 * len(y))
        middle, seen = (edges[1:] + edges[:-1]) / 2, np.where(counts, counts, np.nan)
        top = {"yaxis.range": [np.log10(0.7), np.log10(1.3 * len(y))]}
        self.put({"x": across, "y": along}, {"x": middle, "y": seen, "width": edges[1] - edges[0]}, **top)


def errors() -> Plot:
    """The plot of the error along the dial, of the token and of ordinary ones, and of where the dial is."""
    kinds = (("token", MASSIVE_COLOUR), ("mean of ordinary tokens", ORDINARY_COLOUR))
    lines = [
        go.Scatter(mode="lines", line={"color": colour, "width": 2}, name=name) for name, colour in kinds
    ]
    now = go.Scatter(mode="markers", marker={"size": 12, "color": MASSIVE_COLOUR}, showlegend=False)
    x = {"title": "how far the dial is turned (%)", "range": [-2, 102]}
    return Plot([*lines, now], xaxis=x, yaxis={"title": "squared error", "rangemode": "tozero"})


class _State(HasTraits):
    site = control(Unicode(), widgets.SelectionSlider, "site", 560, continuous_update=False)
    token = control(Int(0), widgets.BoundedIntText, "token", 140)
    to = control(Unicode("RH"), widgets.ToggleButtons, "Turn to", 80)
    turned = control(Int(0), widgets.IntSlider, "dial (%)", 480, min=0, max=100)
    bits = control(Int(4), widgets.IntSlider, "bits", 220, min=2, max=8)
    symmetric = control(Bool(False), widgets.Checkbox, "symmetric", 110, indent=False)

    @property
    def quantizer(self) -> QuantSpec:
        return QuantSpec(bits=self.bits, scheme=SCHEMES[self.symmetric])


class Dial(Explorer):
    """One token of the model on a dial from no rotation to the whole of one."""

    ONE = "search for a rotation"

    def __init__(self, setting: Setting | None = None, store: Store | None = None) -> None:
        self.setting, self.store = (setting or Setting.of_profile()).resolved(), store or Store()
        self.acts, self.ways = capture(self.setting.capture, self.store), dict[str, dial.Way]()
        self.texts, site = self.acts.texts, figure_site(self.acts.sites)
        own = {"site": self.acts.sites, "to": NAMES, "token": {"max": len(self.acts.texts) - 1}}
        super().__init__(_State(site=site, token=self.acts.largest(site)), **own)
        self.plot, self.errors, self.read = Values(), errors(), widgets.HTML(layout={"min_height": "48px"})
        self.film = widgets.Play(**FILM)
        widgets.jslink((self.film, "value"), (self.controls["turned"], "value"))
        rows = (("site", "token"), ("to", "bits", "symmetric"), ("turned", self.film))
        self.children = [
            *(self.row(*row) for row in rows),
            self.read,
            beside(self.plot, self.errors),
            self.status.line,
        ]
        self.on("site token bits symmetric", self._look)
        self.on("turned", self._turn)
        self.on("to", self._choose)
        self._choose()

    def values(self) -> Tensor:
        """The token's values (channels,), as far as the dial is turned."""
        return dial.turned(self._x[None], self._way, [self.state.turned / 100])[0, 0]

    def table(self) -> pd.DataFrame:
        """Along the dial: `share`, the errors of the `token` and of `ordinary` ones, the token's `offset`."""
        return self._curve.copy()

    def static(self) -> Figure:
        """Both plots as a matplotlib figure."""
        y, line = self.values(), self._curve
        with drawing(2) as (figure, (left, right)):
            left.hist(y.numpy(), BINS, color=MASSIVE_COLOUR)
            for level in levels(y, self.state.quantizer):
                left.axvline(float(level), c=GREY, lw=0.5, zorder=0)
            left.set(yscale="log", xlabel="value", ylabel="channels")
            left.set_title(f"token {self.state.token}, {self.state.turned}% of the way to {self.state.to}")
            for name, colour in (("token", MASSIVE_COLOUR), ("ordinary", ORDINARY_COLOUR)):
                right.plot(100 * line["share"], line[name], c=colour, label=name)
            right.axvline(self.state.turned, ls="--", c=GREY, lw=1)
            right.set(xlabel="dial (%)", ylabel="squared error", ylim=(0, None))
            right.legend()
        return figure

    def _choose(self) -> None:
        """A rotation that was not found yet is found in the background; the view stays as it was."""
        name = self.state.to
        if name in self.ways:
            self._way = self.ways[name]
            self._look()
        elif name in ("RO", "RH"):
            self._find(name)
            self._choose()
        else:
            self.status.busy(f"opening {name}, or finding it where the store has none")
            self.job.instead(lambda _job: self._find(name))  # last: it may have ended by the next line

    def _find(self, name: str) -> None:
        recipe = door.resolved(self.setting.row("16-4-16", self.setting.method(name))).canonical()
        R = transforms.fit(recipe, transforms.Context(recipe, self.store)).R1
        assert R is not None
        self.ways[name] = dial.way(R.cpu())

    def _look(self) -> None:
        """Another token, site or grid: the whole curve, and the dial on it."""
        state = self.state
        with self.status.doing("turning", f"{state.site}, {state.quantizer.name}, from none to {state.to}"):
            rows = self.acts.rows(state.site)
            heavy = massive.find(self.acts, self.setting.rule, [state.site])[0]
            self._x, others = rows[state.token].double(), dial.ordinary(rows, heavy)
            self._curve = line = dial.curve(self._x, others, self._way, state.quantizer)
            shown = [{"x": 100 * line["share"], "y": line[name]} for name in ("token", "ordinary")]
            self.errors.put(*shown, {})
            self._turn()

    def _turn(self) -> None:
        """The dial has moved."""
        state, y = self.state, self.values()
        self.plot.draw(y, levels(y, state.quantizer))
        error = float(squared_error(y[None], state.quantizer))
        self.errors.put({}, {}, {"x": [state.turned], "y": [error]})
        about: dict[str, Any] = {"token": state.token, "text": span(self.acts.texts[state.token])}
        about |= {"step": float(scale_zero(y[None], state.quantizer)[0]), "offset": float(offset_share(y))}
        ends = self._curve["token"]
        about |= {"error": error, "start": ends.iloc[0], "end": ends.iloc[-1], "to": state.to}
        self.read.value = READING.format(**about, taken=TAKEN[state.symmetric])

    def _at_end(self, error: BaseException | None) -> str:
        if error is None and self.state.to in self.ways:
            self._choose()
            return self.status.text
        return ""
