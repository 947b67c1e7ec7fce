"""The figure of each experiment: sweeps over a knob, paired differences, tokens in space."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dfrot_lab.maths.tables import DIVERGENCE, PERPLEXITY, change
from dfrot_lab.observe.massive import SUN_ABSOLUTE, SUN_RATIO
from dfrot_lab.show import figures, inside_figures, ranks
from dfrot_lab.show.figures import panels_of_rows, plot_rows, rows_of
from dfrot_lab.show.theme import INK, MASSIVE_COLOUR, ORDINARY_COLOUR, draw_lines, legend_below, looks, panels
from dfrot_lab.study import compare, leaderboard

ORDER_COLOURS = {  # of the errors; green, blue and red are the paper's
    "NR > RO > RH": "#117733", "NR > RH > RO": "#56B4E9", "RO > NR > RH": MASSIVE_COLOUR,
    "RO > RH > NR": "#E69F00", "RH > NR > RO": "#AA4499", "RH > RO > NR": "#222222",
}  # fmt: skip
SCHEME_LABEL = "refined {refined_with}, sign flips: {sign_flips}"
ORDER_MARKERS = dict(zip(ORDER_COLOURS, "ovDsPX", strict=True))


def plot_sweep(rows: pd.DataFrame, x: str, line: str, *, ax: Axes, log: bool = False) -> None:
    """`rows_of` a metric against `x`, a `line` a kind; intervals of comparisons only. With `log` values are
    on a logarithmic axis, plain numbers at 1, 2 and 5."""
    places, levels = pd.factorize(rows[x])
    kinds, names = pd.factorize(rows[line])
    colour = rows[line].map(looks(names)["palette"])
    rows = rows.assign(place=places + 0.08 * (kinds - (len(names) - 1) / 2), colour=colour)
    draw_lines(rows, "place", "value", line, ax=ax)
    ax.scatter(rows["place"], rows["value"], s=9, c=rows["colour"], alpha=0.6)
    paired = rows[rows["metric"] != PERPLEXITY]
    ax.vlines(paired["place"], paired["low"], paired["high"], colors=paired["colour"].tolist(), lw=1)
    ax.set_xticks(range(len(levels)), [f"{v:g}" if isinstance(v, float) else str(v) for v in levels])
    ax.set(xlabel=x, ylabel=rows["metric"].iloc[0])
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())


def figure_gamma(table: pd.DataFrame) -> Figure:
    """The paper's Fig. 5 and 6: perplexity against gamma by start and bits, with QuaRot's lines."""
    rows = rows_of(table)
    title = rows["bits"] + ", start " + rows["init"] + ", builds: " + rows["builds"].astype(str)
    return panels(rows.assign(title=title), "title", _plot_gamma, legend=True)


def _plot_gamma(part: pd.DataFrame, *, ax: Axes) -> None:
    refined, means = part[part["line"] == "DFRot"], part.groupby("line")["value"].mean()
    plot_sweep(refined, "gamma", "line", ax=ax)
    for name, style in (("QuaRot", "--"), ("QuaRot.FP16()", ":")):
        ax.axhline(means[name], ls=style, c=INK, lw=1.3, label=name)
    top = max(1.2 * part["value"].min(), 1.05 * means["QuaRot"])  # what is above is written at the edge
    ax.set_ylim(0.97 * part["value"].min(), top)
    for place, value in enumerate(refined.groupby("gamma", sort=False)["value"].mean()):
        if value > top:
            ax.annotate(f"\u2191 {value:.0f}", (place, top), ha="center", va="top", fontsize=9)


def figure_keep_out(table: pd.DataFrame) -> Figure:
    """Table 1: perplexity with all tokens quantized and massive ones kept out (hollow)."""
    rows = rows_of(table[table["rotation"] != "NR"])
    rows = rows.sort_values(["rotation", "keep_out"], ascending=[False, True])
    alone = rows.assign(low=rows["value"], high=rows["value"])  # only paired intervals would count here
    axes = {"xlabel": "perplexity (hollow: massive tokens kept out)"}
    return panels_of_rows(alone, "bits", size=(4.3, 3), axes=axes)


def figure_clip(table: pd.DataFrame) -> Figure:
    """Perplexity against the activation clip ratio under RO, RH and DFRot; and its change against no clip."""
    rows = pd.concat([rows_of(table), rows_of(table, change("clip 1"))])
    draw = partial(plot_sweep, x="clip", line="rotation")
    axes = {"title": "16-4-16", "xlabel": "activation clip ratio"}
    return panels(rows, "metric", draw, size=(5.4, 3.8), axes=axes, legend=True)


def figure_intervene(table: pd.DataFrame) -> Figure:
    """Changes of perplexity against how many tokens of a window are kept out, and chosen how."""
    names = [name for name in table["metric"].unique() if name.endswith("%")]
    rows = pd.concat([rows_of(table, name) for name in names])
    rows = rows.assign(chosen=rows["chosen"].str.replace("_", " "))
    axes = {"xlabel": "tokens of each window kept out"}
    return panels(rows, "metric", _plot_kept, size=(5, 3.8), axes=axes, legend=True)


def _plot_kept(part: pd.DataFrame, *, ax: Axes) -> None:
    plot_sweep(part[part["k"].notna()], "k", "chosen", ax=ax)
    by_rule = part.loc[part["k"].isna(), "value"].mean()
    ax.axhline(0, ls="--", c=INK, lw=1.2, label="none kept out")
    ax.axhline(by_rule, ls=":", c=INK, lw=1.6, label="the massive tokens")


def figure_differences(table: pd.DataFrame, label: str, panel: str = "{bits}") -> Figure:
    """Changes of perplexity against RH; `label` and `panel` are formats, filled by a row's columns."""
    rows = rows_of(table[table["rotation"] != "NR"], change("RH"))
    said = [label.format_map(row).replace("_", " ") for row in rows.to_dict("records")]
    labels = [each.removesuffix(", none") for each in said]
    rows = rows.assign(label=labels, panel=[panel.format_map(row) for row in rows.to_dict("records")])
    size = (5.2 if len(set(rows["panel"])) == 1 else 4.2, 1.4 + 0.32 * len(set(labels)))
    fig = panels_of_rows(rows, "panel", size=size, axes={"xlabel": change("RH")})
    for ax in fig.axes:
        ax.axvline(0, ls="--", lw=1, c=INK)
    return fig


def figure_caches(table: pd.DataFrame) -> Figure:
    """KL divergence of each KV quantizer, a line, against the number of bits; a panel with R3 and without."""
    rows = rows_of(table[table["bits"] != "16-16-16"], DIVERGENCE)
    draw = partial(plot_sweep, x="bits", line="cache", log=True)
    return panels(rows, "option", draw, size=(4.6, 3.8), legend=True, sharey=True)


def figure_zero_shot(table: pd.DataFrame) -> Figure:
    """Accuracy with one standard error, a panel a task and for their average; acc_norm where there is one."""
    rows = table.drop_duplicates(["row", "task"], keep="last").fillna({"rotation": "plain"})
    value, error = 100 * rows["value"], 100 * rows["stderr"]
    rows = rows.assign(label=rows["row"], value=value, low=value - error, high=value + error, keep_out=False)
    fig = panels_of_rows(rows, "task", size=(1.9, 3.4), axes={"xlabel": "accuracy, %"})
    fig.suptitle(f"first {rows['items'].min():.0f} items of each task; bars: one standard error", fontsize=10)
    return fig


def _plot_errors_3d(wide: pd.DataFrame, *, ax: Any) -> None:
    """Each token's error under NR, RO and RH in space, coloured by their order (DFRot, Fig. 2)."""
    for order, colour in ORDER_COLOURS.items():
        part = wide[wide["order"] == order]
        size, alpha = (30, 1) if len(part) < 0.05 * len(wide) else (6, 0.5)
        look = {"marker": ORDER_MARKERS[order], "linewidths": 0, "depthshade": False, "rasterized": True}
        ax.scatter(part["NR"], part["RO"], part["RH"], s=size, alpha=alpha, c=colour, **look)
    ax.set(xlabel="E(NR)", ylabel="E(RO)", zlabel="E(RH)")
    ax.tick_params(labelsize=7, pad=-2)
    ax.xaxis.labelpad = ax.yaxis.labelpad = ax.zaxis.labelpad = -4
    ax.view_init(elev=22, azim=-60)
    ax.set_box_aspect(None, zoom=0.84)  # else the labels are cut off


def figure_errors_3d(table: pd.DataFrame) -> Figure:
    """The paper's Fig. 2: every token in space, a panel a site, at the sites that it shows."""
    return figure_space(table[table["site"].isin(figures.sites_of(table))], "site")


def figure_space(shown: pd.DataFrame, by: str) -> Figure:
    """Fig. 2 and 13 to 24: every token in space, a panel a `by`, four in a line."""
    fig = panels(shown, by, _plot_errors_3d, size=(3.2, 3.2), across=4, subplot_kw={"projection": "3d"})
    for order, colour in ORDER_COLOURS.items():
        if order in set(shown["order"]):
            fig.axes[-1].plot([], [], [], ls="", marker=ORDER_MARKERS[order], c=colour, label=order)
    legend_below(fig)
    return fig


def figure_orders(table: pd.DataFrame) -> Figure:
    """How many `tokens` have each `order` of their errors, at every `site` (in the model's order)."""
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


def figure_massive_activations(table: pd.DataFrame) -> Figure:
    """Sun et al.: largest values and median by layer; perplexity with massive values set to 0 or the mean."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2))
    draw_lines(table[table["layer"].notna()], "layer", "value", "metric", markers=False, ax=left)
    left.set(yscale="log", ylabel="|residual stream|", title="Largest values and median")
    rows = rows_of(table)
    plot_rows(rows.assign(label=rows["set_massive"]), ax=right)
    right.set(xscale="log", xlabel="perplexity, 16-16-16", title="Massive values set to")
    return fig


def figure_magnitudes(table: pd.DataFrame) -> Figure:
    """Sun et al., Fig. 1: |residual stream| over tokens and channels; red: tokens massive by their rule."""
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
    if table["magnitude"].max() < least:
        ax.set_title("No token is massive by Sun et al.'s rule")
    ax.xaxis.labelpad, ax.yaxis.labelpad, ax.zaxis.labelpad = 22, 8, 12
    ax.view_init(elev=24, azim=-58)
    ax.set_box_aspect(None, zoom=0.88)  # else the labels are cut off
    return fig


def figure_compare(table: pd.DataFrame) -> Figure:
    """Models side by side, a column each (`study.compare`): a row of panels a part, on one axis."""
    models, groups = list(dict.fromkeys(table["model"])), dict(list(figures.bounded(table).groupby("part")))
    parts = {part: groups[part] for part in compare.PARTS[1:] if part in groups}
    tall = [rows["what"].nunique() + 2 for rows in parts.values()]
    more: dict[str, Any] = {"figsize": (2 + 3.6 * len(models), 0.22 * sum(tall)), "height_ratios": tall}
    more |= {"sharex": "row", "sharey": "row", "squeeze": False}
    fig, axes = plt.subplots(len(parts), len(models), **more)
    for line, (part, rows) in zip(axes, parts.items(), strict=True):
        for ax, model in zip(line, models, strict=True):
            own = rows[rows["model"] == model].set_index("what").reindex(rows["what"].unique())
            own = own.rename_axis("label").reset_index().fillna({"rotation": "any", "keep_out": False})
            scale = "symlog" if part in (compare.ROWS, compare.COST) else "linear"
            head = f"{Path(model).name}\n" if ax in axes[0] else ""
            plot_rows(own, ax=ax).set(xlabel="", xscale=scale, title=head + part)
    return fig


def figure_acts(table: pd.DataFrame) -> Figure:
    """KL divergence of each rotation, a line, against what shares a scale in activations; panels: bits."""
    rows = rows_of(table, DIVERGENCE)
    draw = partial(plot_sweep, x="acts", line="rotation", log=True)
    axes = {"xlabel": "one scale for"}
    return panels(rows, "bits", draw, size=(5, 3.8), axes=axes, legend=True)


def figure_formats(table: pd.DataFrame) -> Figure:
    """KL divergence of each rotation, a line, against the format of activations; all tokens quantized."""
    rows = rows_of(table[~table["keep_out"]], DIVERGENCE)
    axes = {"xlabel": "activations"}
    draw = partial(plot_sweep, x="format", line="rotation", log=True)
    return panels(rows, "bits", draw, size=(7, 3.8), axes=axes, legend=True)


def figure_prefix(table: pd.DataFrame) -> Figure:
    """KL divergence of each rotation, a line, without a prefix and with it, from full precision without and
    with it; a panel what shares a scale."""
    rows = rows_of(table[table["bits"] != "16-16-16"], DIVERGENCE)
    draw = partial(plot_sweep, x="prefix", line="rotation", log=True)
    axes = {"xlabel": "prefix (full precision: plain without, prefix with it)"}
    return panels(rows, "acts", draw, size=(5, 3.8), axes=axes, legend=True, sharey=True)


def figure_measuring(table: pd.DataFrame) -> Figure:
    """Minutes on two cores against the smallest change of perplexity that a 95% interval can tell."""
    rows = table[table["target"].notna()]
    rows = rows.assign(panel=rows["bits"] + ", weights: " + rows["weights"])
    draw = partial(_plot_price, x="target", y="minutes on 2 cores")
    return panels(rows, "panel", draw, size=(3.4, 3.2), legend=True, sharey=True)


def _plot_price(part: pd.DataFrame, x: str, y: str, *, ax: Axes) -> None:
    draw_lines(part, x, y, "pair", ax=ax)
    ax.set(xscale="log", yscale="log", xlabel="told apart: % of perplexity", ylabel=y)
    ax.set_xticks(part[x].unique(), [f"{value:g}" for value in part[x].unique()])
    ax.minorticks_off()


RANKED = "{rotation}, {weights}, {option}"
FITTED = "{rotation}, fitted on {fitted}"
FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {  # by experiment, what draws its table
    "main": figures.figure_perplexity, "token-errors-3d": figure_errors_3d, "token-orders": figure_orders,
    "token-errors-2d": figures.figure_errors, "massive-token": figures.figure_massive_token,
    "gamma-sweep": figure_gamma, "keep-out": figure_keep_out, "clip-sweep": figure_clip,
    "massive-activations": figure_massive_activations, "massive-magnitudes": figure_magnitudes,
    "zero-shot": figure_zero_shot, "compare": figure_compare, "intervene": figure_intervene,
    "main-table": partial(figure_differences, label="{rotation} {bits}", panel="weights: {weights}"),
    "calibration": partial(figure_differences, label="{varied} {level}"),
    "symmetric-or-not": partial(figure_differences, label=SCHEME_LABEL, panel="tested {tested_with}, {bits}"),
    "variants": partial(figure_differences, label="{variant}"),
    "offset": partial(figure_differences, label="{rotation}"), "measuring": figure_measuring,
    "gain": partial(figure_differences, label="{rotation}"),
    "free-options": partial(figure_differences, label="{rotation}, {option}"),
    **dict.fromkeys(leaderboard.EXPERIMENTS, ranks.figure_ranks),
    "transfer": partial(figure_differences, label=FITTED, panel="tested on {corpus}"),
    "better-weights": partial(figure_differences, label=RANKED), "kv-caches": figure_caches,
    "static-activations": figure_acts, "prefix": figure_prefix, "block-floats": figure_formats,
    "spike-writers": inside_figures.figure_writers, "attention-sink": inside_figures.figure_sink,
    "token-costs": inside_figures.figure_costs,
}  # fmt: skip
