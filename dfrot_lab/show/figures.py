"""The pictures that notebooks and explorers draw, each of one table: draw inside `with figures.theme():`."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dfrot_lab.maths import tables
from dfrot_lab.show import theme as style
from dfrot_lab.study.setting import figure_site

theme = style.theme
FAR = 5.0  # a perplexity more than this many times the best is written out: drawn it would squeeze all others
TOKENS: dict[str, Any] = {  # seaborn's options for ordinary and massive tokens
    "palette": {"ordinary tokens": style.ORDINARY_COLOUR, "massive tokens": style.MASSIVE_COLOUR},
    "markers": {"ordinary tokens": "o", "massive tokens": "D"},
    "sizes": {"ordinary tokens": 8, "massive tokens": 36},
}
SITES = {f"layers.{site}_norm" for site in ("3.input", "6.post_attention", "15.input", "28.input")}
"""Where the paper looks at all tokens."""
PAIRS = (("NR", "RO"), ("NR", "RH"), ("RO", "RH"), ("RH", "DFRot"))  # of Fig. 3, the reference first
LABELS = {"channels": "channels $C$", "ratio": "second spike / first spike"}
LABELS["snr"] = r"signal to noise, $m\,/\,(\sigma\sqrt{C})$"


def rows_of(table: pd.DataFrame, metric: str = tables.PERPLEXITY) -> pd.DataFrame:
    """The rows of one metric, `bounded`, with a column label."""
    labels = [tables.label(row) for row in tables.records(table, metric)]
    return bounded(table[table["metric"] == metric]).assign(label=labels)


def bounded(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with columns low and high: the interval's bounds, or the value."""
    pairs = zip(rows["ci95"], rows["value"], strict=True)
    bounds = [ci if np.ndim(ci) else (value, value) for ci, value in pairs]
    return rows.assign(low=[low for low, _ in bounds], high=[high for _, high in bounds])


def plot_rows(rows: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """`value` from `low` to `high` by `label` and `rotation`; hollow where massive tokens are kept out. Each
    label has a line; each category, where labels are categories, whether it has a row here or not."""
    ax, look, labels = ax or plt.gca(), style.looks(rows["rotation"]), by_place(rows["label"]).cat
    places, names = labels.codes.to_numpy(), labels.categories
    for place in range(len(names)):
        own = rows[places == place].to_dict("records")
        shifts = np.linspace(-0.2, 0.2, len(own)) if len(own) > 1 else [0.0] * len(own)
        for shift, row in zip(shifts, own, strict=True):
            colour, marker = look["palette"][row["rotation"]], look["markers"][row["rotation"]]
            bars = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
            mark = {"marker": marker, "mfc": "white" if row["keep_out"] else colour, "ms": 6}
            ax.errorbar(row["value"], place + shift, xerr=bars, c=colour, **mark, elinewidth=1)
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.5, -0.6), xlabel="perplexity")
    return ax


def by_place(labels: pd.Series) -> pd.Series:
    """Labels as categories in the order in which they come, if they are none yet."""
    return labels if labels.dtype == "category" else labels.astype(pd.CategoricalDtype(list(labels.unique())))


def panels_of_rows(rows: pd.DataFrame, by: str, **more: Any) -> Figure:
    """`style.panels` of `plot_rows`, a value of `by` each, that share their labels: a line is one label's in
    all of them."""
    return style.panels(rows.assign(label=by_place(rows["label"])), by, plot_rows, sharey=True, **more)


def plot_perplexity(table: pd.DataFrame, bits: str, *, ax: Axes | None = None) -> Axes:
    """Perplexity and interval of every rotation at these bits of a results table; dotted: full precision."""
    rows = rows_of(table)
    exact = rows["label"] == "full precision"
    shown = rows[~exact & (rows["bits"] == bits)]
    near = shown["value"] <= FAR * shown["value"].min()
    ax = plot_rows(shown.assign(value=shown["value"].where(near)), ax=ax)
    for place, value in enumerate(shown["value"]):
        if near.iloc[place]:
            ax.text(value, place - 0.15, f"{value:.2f}", ha="center", va="bottom", fontsize=8)
        else:
            edge = ax.get_yaxis_transform()
            ax.text(1, place, f"{value:,.0f}, off the scale ", ha="right", va="center", transform=edge)
    for value in rows.loc[exact, "value"].head(1):
        ax.axvline(value, ls=":", c=style.INK, lw=1)
    ax.set_title(bits)
    return ax


def figure_perplexity(table: pd.DataFrame) -> Figure:
    """Perplexity at every setting of the bits in a results table, a panel each."""
    rows = rows_of(table)
    shown = rows[rows["label"] != "full precision"]
    return style.panels(shown, "bits", lambda part, ax: plot_perplexity(table, part["bits"].iloc[0], ax=ax))


def plot_error_pair(wide: pd.DataFrame, x: str, y: str, *, ax: Axes | None = None) -> Axes:
    """Each token's error (`errors.wide`) under `y` against `x` (DFRot, Fig. 3); below the line `y` wins."""
    tokens = wide["massive"].map({False: "ordinary tokens", True: "massive tokens"})
    shown = wide.assign(tokens=tokens).sort_values("tokens", ascending=False, kind="stable")
    by = {"hue": "tokens", "style": "tokens", "size": "tokens"}
    ax = sns.scatterplot(shown, x=x, y=y, **by, **TOKENS, linewidth=0, rasterized=True, ax=ax)
    ax.collections[-1].set_alpha(np.where(shown["massive"], 1, 0.5).tolist())
    top = wide[[x, y]].max() * 1.05  # not one for both: errors without rotation are ten times the others
    ax.plot([0, top.max()], [0, top.max()], ls="--", lw=1, c=style.INK, label="equal")
    if not wide["massive"].any():
        ax.plot([], [], ls="", label="no token is massive here")
    limits = {"xlim": (-top[x] / 50, top[x]), "ylim": (-top[y] / 50, top[y])}  # a marker at 0 is seen whole
    ax.set(xlabel=f"E({x})", ylabel=f"E({y})", title=f"{y} against {x}", **limits)
    ax.legend()
    return ax


def sites_of(table: pd.DataFrame) -> list[str]:
    """The paper's sites that a table has, or its first, middle and last."""
    own = [str(site) for site in table["site"].unique()]
    few = dict.fromkeys((own[0], own[len(own) // 2], own[-1]))
    return [site for site in own if site in SITES] or list(few)


def figure_errors(wide: pd.DataFrame) -> Figure:
    """The paper's Fig. 3: each token's error, a panel a pair of rotations, the middle sites row by row."""
    pairs = [pair for pair in PAIRS if set(pair) <= set(wide.columns)]
    sites = sites_of(wide)[1:3] or sites_of(wide)
    size = (3.5 * len(pairs), 3.4 * len(sites) + 0.4)
    fig, axes = plt.subplots(len(sites), len(pairs), figsize=size, squeeze=False)
    for line, site in zip(axes, sites, strict=True):
        for ax, (x, y) in zip(line, pairs, strict=True):
            plot_error_pair(wide[wide["site"] == site], x, y, ax=ax)
            ax.set_title(f"{y} against {x}, {site}", fontsize=8)
    style.legend_below(fig)
    return fig


def plot_massive_values(values: pd.DataFrame, rotation: str, *, ax: Axes | None = None) -> Axes:
    """One token's `value` before and `quantized` after, under one `rotation` (DFRot, Fig. 4)."""
    part, ax = values[values["rotation"] == rotation], ax or plt.gca()
    error, colour = ((part["value"] - part["quantized"]) ** 2).sum(), style.COLOURS.get(rotation, "k")
    ax.scatter(part["value"], part["quantized"], s=10, c=colour, alpha=0.6, linewidths=0)
    bound = float(part["value"].abs().max()) * 1.1
    ax.plot([-bound, bound], [-bound, bound], lw=0.8, ls="--", c=style.INK)
    ax.set(title=f"{rotation}: E = {error:.2f}", xlabel="value", ylabel="quantized value")
    return ax


def figure_massive_token(values: pd.DataFrame) -> Figure:
    """Fig. 4: one token's rotation, value, quantized (site, token, text: at the figures' site), in panels."""
    title = ""
    if "site" in values:
        values = values[values["site"] == figure_site(values["site"].unique().tolist())]
        title = "token {token} ({text!r}) at {site}".format_map(values.iloc[0])
    fig = style.panels(
        values, "rotation", lambda part, ax: plot_massive_values(part, part["rotation"].iloc[0], ax=ax),
        size=(2.9, 3),
    )  # fmt: skip
    fig.suptitle(title, fontsize=10)
    return fig


def plot_residual(maxima: Tensor, median: Tensor, *, ax: Axes | None = None) -> Axes:
    """The residual stream by layer (Sun et al., Fig. 4): a Capture's `maxima` (sites, tokens), `median`."""
    lines = {
        "token 0, largest channel": maxima[:, 0], "any other token, largest channel": maxima[:, 1:].amax(1),
        "median of all values": median,
    }  # fmt: skip
    table = pd.DataFrame(lines, index=np.arange(len(median)) / 2)
    ax = sns.lineplot(table, palette=[style.MASSIVE_COLOUR, "#555555", "#56B4E9"], ax=ax)
    ax.set(yscale="log", xlabel="layer", ylabel="|residual stream|", title="One token, one channel")
    return ax


def plot_history(history: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """A refinement's mean squared error of `ordinary` and `massive` rows, `step` by step."""
    table = history.set_index("step")[["ordinary", "massive"]].add_suffix(" rows").dropna(axis=1, how="all")
    found = len(table.columns)  # without a massive row, one
    markers = ["o", "D"][:found] if len(history) < 30 else None  # accelerated, it looks at all rows at times
    colours = [*TOKENS["palette"].values()][:found]
    ax = sns.lineplot(table, palette=colours, markers=markers, dashes=False, ax=ax)
    title = "Refining R1" + (", no row massive" if "massive rows" not in table else "")
    ax.set(xlabel="step", ylabel="mean E(xR)", ylim=(0, None), title=title)
    return ax


def plot_prediction(table: pd.DataFrame, x: str, *, ax: Axes | None = None) -> Axes:
    """Share of ||x||^2 (channels: rows of mean square 1) lost against `x` (snr, channels, bits or ratio), a
    colour a rotation: lines predicted, markers measured (mean over seeds; NaN where only predicted)."""
    share = table.assign(**{name: table[name] / table["channels"] for name in ("predicted", "measured")})
    means = share.groupby(["rotation", x], sort=False)[["predicted", "measured"]].mean().reset_index()
    plain = {"markers": False, "dashes": False, "legend": False}
    ax = style.draw_lines(means, x, "predicted", "rotation", **plain, ax=ax)
    by = {"hue": "rotation", "style": "rotation", "s": 45}
    sns.scatterplot(means, x=x, y="measured", **by, **style.looks(means["rotation"]), ax=ax)
    scale = "log" if x in ("snr", "bits") else "linear"
    ax.set(xlabel=LABELS.get(x, x), ylabel=r"share lost, $E\,/\,\|x\|^2$", yscale=scale)
    if x in ("snr", "channels"):
        ax.set(xscale="log")
        ticks = np.unique(table.loc[table["measured"].notna(), x])
        ax.set_xticks(ticks, [f"{value:g}" for value in ticks])
        ax.set_xticks([], minor=True)
    ax.legend(title="line: predicted", title_fontsize=8)
    return ax


def plot_logit_errors(steps: pd.DataFrame, tolerance: float, *, ax: Axes | None = None) -> Axes:
    """Relative `error` of the logits after each `step`, on a log axis; red beyond `tolerance`, dashed."""
    ax = ax or plt.gca()
    floor = min([tolerance, *steps.loc[steps["error"] > 0, "error"]]) / 10
    for place, error in enumerate(steps["error"]):
        at, bad = (max(error, floor), place), error > tolerance
        colour = style.MASSIVE_COLOUR if bad else style.COLOURS["RH"]
        ax.plot(*at, ls="", marker="D" if bad else "o", c=colour, mfc=colour if error else "white", ms=7)
        text = f"{error:.1e}" if error else "0"
        ax.annotate(text, at, xytext=(9, 0), textcoords="offset points", va="center", fontsize=8)
    ax.axvline(tolerance, ls="--", c=style.INK, lw=1)
    ax.set_yticks(range(len(steps)), steps["step"])
    ax.set(xscale="log", xlim=(floor / 2, 30), ylim=(len(steps) - 0.4, -0.6))
    ax.set_xlabel("relative error of the logits (dashed: the tolerance)")
    return ax


def figure_agreement(changes: pd.DataFrame) -> Figure:
    """`paper.changes`: a panel a comparison, the paper's models grey, ours with its interval."""
    rows = changes.assign(label=changes["bits"] + ", " + changes["weights"])
    axes = {"xlabel": "change of perplexity, %"}
    return style.panels(rows, "comparison", _plot_agreement, size=(3.2, 2.8), axes=axes, legend=True)


def _plot_agreement(part: pd.DataFrame, *, ax: Axes) -> None:
    labels = list(dict.fromkeys(part["label"]))[::-1]
    height = part["label"].map(labels.index)
    theirs, ours = part["model"] != "ours", part["model"] == "ours"
    ax.axvline(0, ls="--", lw=1, c=style.INK)
    ax.scatter(
        part["change"][theirs],
        height[theirs] + 0.15,
        s=14,
        c=style.ORDINARY_COLOUR,
        label="the paper's models",
    )
    ax.hlines(
        height[ours] - 0.15, part["low"][ours], part["high"][ours], color=style.COLOURS["DFRot"], lw=1.5
    )
    ax.scatter(
        part["change"][ours], height[ours] - 0.15, s=26, c=style.COLOURS["DFRot"], marker="D", label="ours"
    )
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(-0.6, len(labels) - 0.4)
