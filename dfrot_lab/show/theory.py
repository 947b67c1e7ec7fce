"""What should hold beside what was measured: lines of a closed form under markers, logits that must stay
equal. Nothing here computes a result."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from dfrot_lab.show.theme import COLOURS, INK, MASSIVE_COLOUR, draw_lines, looks

LABELS = {
    "snr": r"signal to noise, $m\,/\,(\sigma\sqrt{C})$",
    "channels": "channels $C$",
    "bits": "bits",
    "ratio": "second spike / first spike",
}
TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 10, 16)


def plot_prediction(table: pd.DataFrame, x: str, *, ax: Axes | None = None) -> Axes:
    """Share of ||x||^2 lost against `x` (snr, channels, bits or ratio), a colour a rotation: lines predicted,
    markers measured (mean over seeds).

    Columns: `x`, channels, rotation, predicted, measured (NaN where only predicted). Rows of mean square 1,
    so ||x||^2 is channels."""
    share = table.assign(**{name: table[name] / table["channels"] for name in ("predicted", "measured")})
    means = share.groupby(["rotation", x], sort=False)[["predicted", "measured"]].mean().reset_index()
    ax = draw_lines(means, x, "predicted", "rotation", markers=False, dashes=False, legend=False, ax=ax)
    by = {"hue": "rotation", "style": "rotation", "s": 45}
    sns.scatterplot(means, x=x, y="measured", **by, **looks(means["rotation"]), ax=ax)
    scale = "log" if x in ("snr", "bits") else "linear"
    ax.set(xlabel=LABELS.get(x, x), ylabel=r"share lost, $E\,/\,\|x\|^2$", yscale=scale)
    if x in ("snr", "channels"):
        ax.set(xscale="log")
        ticks = np.unique(table.loc[table["measured"].notna(), x])
        ax.set_xticks(ticks, [f"{value:g}" for value in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
    ax.legend(title="line: predicted", title_fontsize=8)
    return ax


def plot_predicted_rows(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Each real row's measured root error against the predicted one, a colour a rotation; on the dashed line
    they agree. Columns: rotation, predicted, measured (squared errors)."""
    roots = table.assign(predicted=table["predicted"] ** 0.5, measured=table["measured"] ** 0.5)
    by = {"hue": "rotation", "style": "rotation", "s": 30, "alpha": 0.7}
    ax = sns.scatterplot(roots, x="predicted", y="measured", **by, **looks(table["rotation"]), ax=ax)
    both = roots[["predicted", "measured"]].to_numpy()
    low, high = float(both.min()) * 0.9, float(both.max()) * 1.1
    ax.plot([low, high], [low, high], ls="--", lw=1, c=INK)
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    ax.set(xlabel="predicted root E", ylabel="measured root E")
    ticks = [value for value in TICKS if low <= value <= high]
    ax.set_xticks(ticks, [f"{value:g}" for value in ticks])
    ax.set_yticks(ticks, [f"{value:g}" for value in ticks])
    ax.minorticks_off()
    ax.legend(title=None)
    return ax


def plot_logit_errors(steps: pd.DataFrame, tolerance: float, *, ax: Axes | None = None) -> Axes:
    """Relative error of the logits after each step, on a log axis; red beyond `tolerance`, the dashed line.
    Columns: step, error."""
    ax = ax or plt.gca()
    floor = min([tolerance, *steps.loc[steps["error"] > 0, "error"]]) / 10
    for place, error in enumerate(steps["error"]):
        at, bad = (max(error, floor), place), error > tolerance
        colour = MASSIVE_COLOUR if bad else COLOURS["RH"]
        ax.plot(*at, ls="", marker="D" if bad else "o", c=colour, mfc=colour if error else "white", ms=7)
        text = f"{error:.1e}" if error else "0"
        ax.annotate(text, at, xytext=(9, 0), textcoords="offset points", va="center", fontsize=8)
    ax.axvline(tolerance, ls="--", c=INK, lw=1)
    ax.set_yticks(range(len(steps)), steps["step"])
    ax.set(xscale="log", xlim=(floor / 2, 30), ylim=(len(steps) - 0.4, -0.6))
    ax.set_xlabel("relative error of the logits (dashed: the tolerance)")
    return ax
