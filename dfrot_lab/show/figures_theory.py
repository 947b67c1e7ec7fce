"""Draw what `theory` predicts over what was measured: lines are predictions, markers measurements. Nothing
here computes a result.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from dfrot_lab.show.figures import COLOURS, MARKERS, _axes

_LABELS = {
    "snr": r"signal to noise, $m\,/\,(\sigma\sqrt{C})$",
    "channels": "channels $C$",
    "bits": "bits",
    "ratio": "second spike / first spike",
}


def plot_prediction(table: pd.DataFrame, x: str, *, ax: Axes | None = None) -> Axes:
    """Share of ||x||^2 lost against `x` (snr, channels, bits or ratio), a colour a rotation: lines predicted,
    markers measured (mean over seeds).

    Columns: `x`, channels, rotation, predicted, measured (NaN where only predicted). Rows of mean square 1,
    so ||x||^2 is channels.
    """
    ax = _axes(ax)
    share = table.assign(
        predicted=table["predicted"] / table["channels"], measured=table["measured"] / table["channels"]
    )
    for name in dict.fromkeys(table["rotation"]):
        part = share[share["rotation"] == name].groupby(x)[["predicted", "measured"]].mean()
        colour = COLOURS.get(name, "k")
        ax.plot(part.index, part["predicted"], c=colour, lw=1.5)
        ax.plot(
            part.index,
            part["measured"],
            ls="",
            marker=MARKERS.get(name, "o"),
            c=colour,
            mfc="white",
            ms=6,
            label=name,
        )
    ax.set(
        xlabel=_LABELS.get(x, x),
        ylabel=r"share lost, $E\,/\,\|x\|^2$",
        yscale="log" if x in ("snr", "bits") else "linear",
    )
    if x in ("snr", "channels"):
        ax.set(xscale="log")
        ticks = [value for value in np.unique(table.loc[table["measured"].notna(), x])]
        ax.set_xticks(ticks, [f"{value:g}" for value in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
    ax.legend(title="line: predicted", fontsize=8, title_fontsize=8)
    return ax


def plot_predicted_rows(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Each real row's measured root error against the predicted one, a colour a rotation; on the dashed line
    they agree.

    Columns: rotation, predicted, measured (squared errors).
    """
    ax = _axes(ax)
    for name in dict.fromkeys(table["rotation"]):
        part = table[table["rotation"] == name]
        predicted, measured = part["predicted"] ** 0.5, part["measured"] ** 0.5
        ax.plot(
            predicted,
            measured,
            ls="",
            marker=MARKERS.get(name, "o"),
            c=COLOURS.get(name, "k"),
            mfc="none",
            ms=5,
            alpha=0.7,
            label=name,
        )
    roots = table[["predicted", "measured"]].to_numpy() ** 0.5
    low, high = float(roots.min()) * 0.9, float(roots.max()) * 1.1
    ax.plot([low, high], [low, high], ls="--", lw=1, c="#333333")
    ax.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        ylim=(low, high),
        xlabel="predicted root E",
        ylabel="measured root E",
    )
    ticks = [value for value in (0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 10, 16) if low <= value <= high]
    ax.set_xticks(ticks, [f"{value:g}" for value in ticks])
    ax.set_yticks(ticks, [f"{value:g}" for value in ticks])
    ax.minorticks_off()
    ax.legend(fontsize=8)
    return ax
