"""The bench's trials as bars."""

import plotly.graph_objects as go

from dfrot_lab.explore.invariance.numbers import TOLERANCE, Outcome
from dfrot_lab.explore.shell.plot import GREY, Plot
from dfrot_lab.show.theme import COLOURS, MASSIVE_COLOUR

SHOWN = 8
"""Trials in the plot, the newest below."""
LEAST, MOST = 1e-8, 30.0
"""Where an error of 0, and one that is not a number, are drawn on the log axis."""
KEPT, BROKEN = COLOURS["RH"], MASSIVE_COLOUR


class Trials(Plot):
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
        """The last of all trials so far."""
        shown = outcomes[-SHOWN:]
        places, names = list(range(len(shown))), [o.steps.name for o in shown]
        with self.batch_update():
            bars = self.data[0]
            bars.x = [min(max(o.error, LEAST), MOST) if o.error == o.error else MOST for o in shown]
            bars.y, bars.customdata = places, names
            bars.text = [f"{o.error:.1e}" if o.error else "0" for o in shown]
            bars.marker.color = [BROKEN if o.broken else KEPT for o in shown]
            ticks = [_wrapped(name) for name in names]
            self.layout.yaxis.update(tickmode="array", tickvals=places, ticktext=ticks)


def _wrapped(name: str, width: int = 34) -> str:
    """A long list of steps on two lines, for an axis."""
    middle = name.rfind(" + ", 0, width)
    return name if len(name) <= width else f"{name[:middle]}<br>{name[middle:]}"
