"""How pictures look: one theme, a colour and marker a rotation, panels; and tokens: made visible, escaped."""

import html
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unicodedata import category

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {
    "NR": "#555555", "RO": "#D55E00", "RH": "#0072B2", "DFRot": "#009E73",
    "Offset": "#56B4E9", "Offset+": "#CC79A7",
}  # fmt: skip
"""One colour a rotation everywhere: of Okabe and Ito's colour-blind-safe set, and apart in grey too."""
MARKERS = {"NR": "s", "RO": "^", "RH": "o", "DFRot": "D", "Offset": "v", "Offset+": "P"}
OTHERS = tuple(zip(("#E69F00", "#332288", "#882255", "#117733", "#999933", "#44AA99"), "Xp<h>d", strict=True))
MASSIVE_COLOUR, ORDINARY_COLOUR, PICKED_COLOUR, INK = "#CC2936", "#9AA5B1", "#0072B2", "#333333"
VISIBLE = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d", "\u00a0": "\u237d"}

THEME: dict[str, Any] = {
    "figure.dpi": 110, "savefig.dpi": 160, "figure.constrained_layout.use": True,
    "font.size": 10, "axes.titlesize": 10, "legend.frameon": False, "legend.fontsize": 8,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#E3E6EA", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "svg.fonttype": "none", "svg.hashsalt": "dfrot-lab",  # same figure, same bytes
}  # fmt: skip


@contextmanager
def theme() -> Iterator[None]:
    """While the block runs, the project's matplotlib settings. Only they are put back: mpl.rc_context would
    also undo `interactive`, which a notebook's backend turns on with the first figure."""
    settings: Any = mpl.rcParams  # typed by a list of literal names
    before = {name: settings[name] for name in THEME}
    settings.update(THEME)
    try:
        yield
    finally:
        settings.update(before)


def looks(names: Iterable[Any]) -> dict[str, Any]:
    """seaborn's `palette` and `markers` for these names: a rotation's own, else the next of the others."""
    others = itertools.cycle(OTHERS)
    own = {n: (COLOURS[n], MARKERS[n]) if n in COLOURS else next(others) for n in dict.fromkeys(names)}
    return {name: {n: look[i] for n, look in own.items()} for i, name in enumerate(("palette", "markers"))}


def draw_lines(table: pd.DataFrame, x: str, y: str, by: str, *, ax: Axes | None = None, **more: Any) -> Axes:
    """A line for each value of column `by`, the mean where an `x` has several rows; `more` is seaborn's."""
    options = {"errorbar": None, "markersize": 7, "markeredgewidth": 0.4, **looks(table[by]), **more}
    ax = sns.lineplot(table, x=x, y=y, hue=by, style=by, ax=ax, **options)
    if ax.get_legend():
        ax.legend(title=None)
    return ax


def panels(
    table: pd.DataFrame, by: str, draw: Callable[..., object], *, size: tuple[float, float] = (4.2, 3.6),
    axes: Mapping[str, Any] | None = None, legend: bool = False, across: int = 99, **more: Any,
) -> Figure:  # fmt: skip
    """Panels of `size` inches, at most so many `across`, for each value of `by` titled with it, drawn by
    `draw(part, ax=ax)` and given what `axes` sets; with `legend` one for all is below. `more` is
    plt.subplots'."""
    groups = list(table.groupby(by, sort=False, observed=True))
    across = max(1, min(across, len(groups)))
    down = max(1, math.ceil(len(groups) / across))
    room = (size[0] * across, size[1] * down)
    fig, places = plt.subplots(down, across, figsize=room, squeeze=False, **more)
    for ax in places.flat[len(groups) :]:
        ax.remove()
    for ax, (name, part) in zip(places.flat, groups, strict=False):
        ax.set_title(str(name))
        draw(part, ax=ax)
        ax.set(**axes or {})
    if legend:
        legend_below(fig)
    return fig


def legend_below(fig: Figure) -> None:
    """One legend for all panels, under them, where it covers no value: that of the last panel."""
    handles, labels = fig.axes[-1].get_legend_handles_labels()
    for ax in fig.axes:
        if legend := ax.get_legend():
            legend.remove()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)


def visible(text: str) -> str:
    """`text` with white space and control characters made visible, as plain text: not yet safe for HTML."""
    hidden = ("Cc", "Cf", "Co", "Cs")
    return "".join(VISIBLE.get(c) or (f"<0x{ord(c):02X}>" if category(c) in hidden else c) for c in text)


def safe(text: str) -> str:
    """A token's text for HTML and plotly's hover labels: white space visible, markup escaped."""
    return html.escape(visible(text))


def span(text: str, colour: str | None = None, title: str = "") -> str:
    """One token as HTML, apart from its neighbours' writing direction; marked by `colour`, with a tooltip."""
    mark = f"background:{colour};color:#fff;" if colour else ""
    style = f"{mark}border-radius:3px;padding:0 1px"
    return f'<bdi class="dfrot-token" title="{html.escape(title)}" style="{style}">{safe(text)}</bdi>'


def label(text: str) -> str:
    """A token for a plotly label, isolated from its neighbours' writing direction."""
    return f"\u2068{title(text)}\u2069"


def title(text: str) -> str:
    """Any text, such as a file's name, for a plotly title."""
    return safe(text).replace("&quot;", "&#34;")


def plain(text: str) -> str:
    """Words that are no token, for HTML and hover labels: escaped, their spaces left as they are."""
    return safe(text).replace(VISIBLE[" "], " ")
