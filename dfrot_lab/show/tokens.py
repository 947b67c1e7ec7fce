"""Pictures of single tokens: their errors in the plane and in space, one massive token's values, the residual
stream, a refinement. Each draws one table."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dfrot_lab.observe.massive import SUN_ABSOLUTE, SUN_RATIO
from dfrot_lab.show.perplexity import plot_rows, rows_of
from dfrot_lab.show.theme import (
    COLOURS,
    INK,
    MASSIVE_COLOUR,
    ORDINARY_COLOUR,
    draw_lines,
    legend_below,
    panels,
)
from dfrot_lab.study.setting import figure_site

TOKENS: dict[str, Any] = {
    "palette": {"ordinary tokens": ORDINARY_COLOUR, "massive tokens": MASSIVE_COLOUR},
    "markers": {"ordinary tokens": "o", "massive tokens": "D"},
    "sizes": {"ordinary tokens": 8, "massive tokens": 36},
}
"""seaborn's options for ordinary and massive tokens."""
ORDER_COLOURS = {
    "NR > RO > RH": "#117733",
    "NR > RH > RO": "#56B4E9",
    "RO > NR > RH": MASSIVE_COLOUR,
    "RO > RH > NR": "#E69F00",
    "RH > NR > RO": "#AA4499",
    "RH > RO > NR": "#222222",
}
"""A colour for each order of the errors: green, blue and red are the paper's."""
ORDER_MARKERS = dict(zip(ORDER_COLOURS, "ovDsPX", strict=True))
SITES = {f"layers.{site}_norm" for site in ("3.input", "6.post_attention", "15.input", "28.input")}
"""Where the paper looks at all tokens."""
PAIRS = (("NR", "RO"), ("NR", "RH"), ("RO", "RH"), ("RH", "DFRot"))
"""Which rotations the paper's Fig. 3 compares, the reference first."""


def is_massive(wide: pd.DataFrame) -> "pd.Series[bool]":
    """Which tokens of a table of errors are drawn as massive."""
    return wide["massive"]


def plot_error_pair(wide: pd.DataFrame, x: str, y: str, *, ax: Axes | None = None) -> Axes:
    """Each token's error under one rotation against another's (DFRot, Fig. 3), massive tokens marked; below
    the dashed line, `y` is better.

    Columns: one of errors a rotation (`errors.wide`), and massive."""
    tokens = is_massive(wide).map({False: "ordinary tokens", True: "massive tokens"})
    shown = wide.assign(tokens=tokens).sort_values("tokens", ascending=False, kind="stable")
    by = {"hue": "tokens", "style": "tokens", "size": "tokens"}
    ax = sns.scatterplot(shown, x=x, y=y, **by, **TOKENS, linewidth=0, rasterized=True, ax=ax)
    ax.collections[-1].set_alpha(np.where(is_massive(shown), 1, 0.5).tolist())
    top = wide[[x, y]].max() * 1.05  # not one for both: errors without rotation are ten times the others
    ax.plot([0, top.max()], [0, top.max()], ls="--", lw=1, c=INK, label="equal")
    ax.set(xlabel=f"E({x})", ylabel=f"E({y})", xlim=(0, top[x]), ylim=(0, top[y]), title=f"{y} against {x}")
    ax.legend()
    return ax


def figure_errors(wide: pd.DataFrame) -> Figure:
    """The paper's Fig. 3: each token's error, a panel a pair of rotations, the table's or the paper's middle
    sites row by row."""
    pairs = [pair for pair in PAIRS if set(pair) <= set(wide.columns)]
    sites = _sites(wide)[1:3] or _sites(wide)
    size = (3.5 * len(pairs), 3.4 * len(sites) + 0.4)
    fig, axes = plt.subplots(len(sites), len(pairs), figsize=size, squeeze=False)
    for line, site in zip(axes, sites, strict=True):
        for ax, (x, y) in zip(line, pairs, strict=True):
            plot_error_pair(wide[wide["site"] == site], x, y, ax=ax)
            ax.set_title(f"{y} against {x}, {site}", fontsize=8)
    legend_below(fig)
    return fig


def _sites(table: pd.DataFrame) -> list[str]:
    """The paper's sites that a table has, or its first, middle and last."""
    own = [str(site) for site in table["site"].unique()]
    few = dict.fromkeys((own[0], own[len(own) // 2], own[-1]))
    return [site for site in own if site in SITES] or list(few)


def plot_errors_3d(wide: pd.DataFrame, *, ax: Any) -> Axes:
    """Each token's error under NR, RO and RH in space, coloured by their order (DFRot, Fig. 2). Columns: NR,
    RO, RH, order. `ax` is a 3-D Axes."""
    for order, colour in ORDER_COLOURS.items():
        part = wide[wide["order"] == order]
        size, alpha = (30, 1) if len(part) < 0.05 * len(wide) else (6, 0.5)
        look = {"marker": ORDER_MARKERS[order], "linewidths": 0, "depthshade": False, "rasterized": True}
        ax.scatter(part["NR"], part["RO"], part["RH"], s=size, alpha=alpha, c=colour, **look)
    ax.set(xlabel="E(NR)", ylabel="E(RO)", zlabel="E(RH)")
    ax.tick_params(labelsize=7, pad=-2)
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.labelpad = -4
    ax.view_init(elev=22, azim=-60)
    ax.set_box_aspect(None, zoom=0.84)  # else the labels are cut off
    return ax


def figure_errors_3d(table: pd.DataFrame) -> Figure:
    """The paper's Fig. 2: every token in space, a panel a site."""
    shown = table[table["site"].isin(_sites(table))]
    fig = panels(shown, "site", plot_errors_3d, size=(3.2, 3.6), subplot_kw={"projection": "3d"})
    for order, colour in ORDER_COLOURS.items():
        if order in set(shown["order"]):
            fig.axes[-1].plot([], [], [], ls="", marker=ORDER_MARKERS[order], c=colour, label=order)
    legend_below(fig)
    return fig


def figure_orders(table: pd.DataFrame) -> Figure:
    """How many tokens have each order of their errors, at every site. Columns: site (in the model's order),
    order, tokens."""
    fig, ax = plt.subplots(figsize=(10, 3.8))
    places, sites = pd.factorize(table["site"])
    size = dict(zip(ORDER_COLOURS, (14, 14, 20, 36, 56, 80), strict=True))  # the rarer is seen behind
    rank = table["order"].map(list(ORDER_COLOURS).index)
    shown = table.assign(place=places, rank=rank).sort_values("rank", ascending=False)
    by = {"hue": "order", "style": "order", "size": "order", "sizes": size, "linewidth": 0}
    by |= {"palette": ORDER_COLOURS, "markers": ORDER_MARKERS}
    sns.scatterplot(shown, x="place", y="tokens", hue_order=ORDER_COLOURS, **by, ax=ax)
    step = max(1, len(sites) // 10)
    names = [str(site).replace("layers.", "").replace("_norm", "") for site in sites[::step]]
    ax.set_xticks(range(0, len(sites), step), names, rotation=30, ha="right")
    ax.set(ylabel="tokens", yscale="log", ylim=(0.7, None), xlabel="site (layer and norm)")
    sns.move_legend(ax, "center left", bbox_to_anchor=(1, 0.5), title=None)
    return fig


def plot_massive_values(values: pd.DataFrame, rotation: str, *, ax: Axes | None = None) -> Axes:
    """One token's values under one rotation, before and after quantization (DFRot, Fig. 4). Columns:
    rotation, value, quantized."""
    part, ax = values[values["rotation"] == rotation], ax or plt.gca()
    error = float(((part["value"] - part["quantized"]) ** 2).sum())
    ax.scatter(part["value"], part["quantized"], s=10, c=COLOURS.get(rotation, "k"), alpha=0.6, linewidths=0)
    bound = float(part["value"].abs().max()) * 1.1
    ax.plot([-bound, bound], [-bound, bound], lw=0.8, ls="--", c=INK)
    ax.set(title=f"{rotation}: E = {error:.2f}", xlabel="value", ylabel="quantized value")
    return ax


def figure_massive_token(values: pd.DataFrame) -> Figure:
    """The paper's Fig. 4: one massive token, a panel a rotation; of a table with several sites, at the main
    figures' one. Columns: rotation, value, quantized; or also site, token, text."""
    title = ""
    if "site" in values:
        site = figure_site(values["site"].unique().tolist())
        values = values[values["site"] == site]
        title = f"token {values['token'].iloc[0]} ({values['text'].iloc[0]!r}) at {site}"

    fig = panels(
        values,
        "rotation",
        lambda part, ax: plot_massive_values(part, part["rotation"].iloc[0], ax=ax),
        size=(2.9, 3),
    )
    fig.suptitle(title, fontsize=10)
    return fig


def plot_value_counts(values: pd.DataFrame, rotation: str, *, ax: Axes | None = None) -> Axes:
    """How many of one token's values lie where under one rotation, over the grid they are rounded to.
    Columns: rotation, value, quantized."""
    part = values[values["rotation"] == rotation]
    ax = sns.histplot(part, x="value", bins=60, color=COLOURS.get(rotation, "k"), linewidth=0, alpha=1, ax=ax)
    for level in part["quantized"].unique():
        ax.axvline(level, c=INK, lw=0.6, ls=":", zorder=0)
    title = f"{rotation}: largest |value| {part['value'].abs().max():.2f}"
    ax.set(title=title, xlabel="value (dotted: quantized values in use)", ylabel="channels")
    ax.grid(visible=False)
    return ax


def plot_token_roots(errors: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """One token's root error at every site of the model, a line a rotation. Columns: site (two a layer, in
    their order), rotation, root."""
    layer = pd.factorize(errors["site"])[0] / 2
    ax = draw_lines(errors.assign(layer=layer), "layer", "root", "rotation", dashes=False, ax=ax)
    ax.set(xlabel="layer", ylabel="root E(xR)", ylim=(0, None), title="One token, every layer")
    sns.move_legend(ax, "best", ncols=errors["rotation"].nunique(), title=None)
    return ax


def plot_seed_spread(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Mean root error of ordinary and of massive tokens, a marker a seed. Columns: kind (of rotation), tokens
    (ordinary or massive), mean."""
    look = {"palette": TOKENS["palette"], "dodge": True, "jitter": False, "size": 7}
    table = table.assign(tokens=table["tokens"] + " tokens")
    ax = sns.stripplot(table, x="kind", y="mean", hue="tokens", **look, ax=ax)
    ax.set(xlabel="", ylabel="mean root E(xR)", ylim=(0, None), title="Each marker is one seed")
    ax.legend(title=None)
    return ax


def plot_residual(maxima: Tensor, median: Tensor, *, ax: Axes | None = None) -> Axes:
    """The residual stream before each norm: the largest |value| of the first token, of any other token, and
    the median (Sun et al., Fig. 4). `maxima` (sites, tokens) and `median` (sites,) as a Capture has them."""
    lines = {
        "token 0, largest channel": maxima[:, 0],
        "any other token, largest channel": maxima[:, 1:].amax(1),
        "median of all values": median,
    }
    table = pd.DataFrame(lines, index=np.arange(len(median)) / 2)
    ax = sns.lineplot(table, palette=[MASSIVE_COLOUR, "#555555", "#56B4E9"], ax=ax)
    ax.set(yscale="log", xlabel="layer", ylabel="|residual stream|", title="One token, one channel")
    return ax


def plot_history(history: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """A refinement's mean squared error of ordinary and massive rows, step by step. Columns: step, normal,
    massive."""
    table = history.set_index("step")[["ordinary", "massive"]]
    table.columns = ["ordinary rows", "massive rows"]
    markers = len(history) < 30  # an accelerated refinement looks at all rows now and then: show when
    palette = list(TOKENS["palette"].values())
    ax = sns.lineplot(table, palette=palette, markers=["o", "D"] if markers else None, dashes=False, ax=ax)
    ax.set(xlabel="step", ylabel="mean E(xR)", ylim=(0, None), title="Refining R1")
    return ax


def figure_massive_activations(table: pd.DataFrame) -> Figure:
    """Sun et al.: the largest three values and the median by layer; and perplexity with massive values set to
    zero or to their mean."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2))
    draw_lines(table[table["layer"].notna()], "layer", "value", "metric", markers=False, ax=left)
    left.set(yscale="log", ylabel="|residual stream|", title="Largest values and median")
    rows = rows_of(table)
    plot_rows(rows.assign(label=rows["set_massive"]), ax=right)
    right.set(xscale="log", xlabel="perplexity, 16-16-16", title="Massive values set to")
    return fig


def figure_magnitudes(table: pd.DataFrame) -> Figure:
    """Sun et al., Fig. 1: |residual stream| over tokens and channels, in space; red are the tokens that are
    massive by their rule. Columns: token, text, channel, magnitude."""
    fig = plt.figure(figsize=(8, 5))
    ax: Any = fig.add_subplot(projection="3d")
    least = max(SUN_ABSOLUTE, SUN_RATIO * table["magnitude"].median())
    for token, part in table.groupby("token"):
        colour = MASSIVE_COLOUR if part["magnitude"].max() >= least else ORDINARY_COLOUR
        ax.plot([token] * len(part), part["channel"], part["magnitude"], c=colour, lw=0.8)
    texts = table.drop_duplicates("token")["text"].tolist()
    step = max(1, len(texts) // 12)
    ax.set_xticks(range(0, len(texts), step), [repr(t)[1:-1] for t in texts[::step]], rotation=45, fontsize=7)
    ax.set(xlabel="token", ylabel="channel", zlabel="|residual stream|")
    for axis, pad in ((ax.xaxis, 22), (ax.yaxis, 8), (ax.zaxis, 12)):
        axis.labelpad = pad
    ax.view_init(elev=24, azim=-58)
    ax.set_box_aspect(None, zoom=0.88)  # else the labels are cut off
    return fig
