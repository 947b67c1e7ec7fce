"""What rotations are worth: values with their intervals, sweeps over a knob, paired differences. Each draws
one table of results."""

from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dfrot_lab.maths import tables
from dfrot_lab.show.theme import INK, draw_lines, legend_below, looks, panels

FAR = 5.0
"""A perplexity more than this many times the best is written out instead of drawn: it would squeeze all
others into one spot."""
NEAR = 1.2
"""The sweep over gamma is drawn up to this many times its best perplexity, or to QuaRot's line."""


def rows_of(table: pd.DataFrame, metric: str = tables.PERPLEXITY) -> pd.DataFrame:
    """The rows of one metric with columns bits, label, and low and high: the interval's bounds, or the value
    where there is no interval."""
    rows, entries = table[table["metric"] == metric], tables.records(table, metric)
    bounds = [r["ci95"] if np.ndim(r["ci95"]) else (r["value"], r["value"]) for r in entries]
    return rows.assign(
        bits=[r["bits"] for r in entries],
        label=[tables.label(r) for r in entries],
        low=[low for low, _ in bounds],
        high=[high for _, high in bounds],
    )


def plot_rows(rows: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """One value a row with its interval, rows of one label side by side; hollow where massive tokens are kept
    out. Columns: label, value, low, high, rotation, keep_out."""
    ax, look = ax or plt.gca(), looks(rows["rotation"])
    names = list(dict.fromkeys(rows["label"]))
    for place, name in enumerate(names):
        own = rows[rows["label"] == name]
        shifts = np.linspace(-0.2, 0.2, len(own)) if len(own) > 1 else [0.0]
        for shift, row in zip(shifts, own.to_dict("records"), strict=True):
            colour = look["palette"][row["rotation"]]
            ax.errorbar(
                row["value"],
                place + shift,
                xerr=[[row["value"] - row["low"]], [row["high"] - row["value"]]],
                c=colour,
                marker=look["markers"][row["rotation"]],
                mfc="white" if row["keep_out"] else colour,
                ms=6,
                elinewidth=1,
            )
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.5, -0.6), xlabel="perplexity")
    return ax


def plot_perplexity(table: pd.DataFrame, bits: str, *, ax: Axes | None = None) -> Axes:
    """Perplexity of every rotation at one setting of the bits, with its interval over windows. A results
    table; the dotted line is full precision, where the table has it."""
    rows = rows_of(tables.first_seed(table))
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
        ax.axvline(value, ls=":", c=INK, lw=1)
    ax.set_title(bits)
    return ax


def figure_perplexity(table: pd.DataFrame) -> Figure:
    """Perplexity at every setting of the bits in a results table, a panel each."""
    rows = rows_of(table)
    shown = rows[rows["label"] != "full precision"]
    return panels(shown, "bits", lambda part, ax: plot_perplexity(table, part["bits"].iloc[0], ax=ax))


def plot_sweep(rows: pd.DataFrame, x: str, line: str, *, ax: Axes | None = None) -> Axes:
    """A value against one knob, a line a kind through the mean over seeds, each seed a dot.

    Rows as `rows_of` gives them, with columns `x` (drawn evenly spaced, in order of appearance) and `line`.
    Intervals are drawn for paired differences alone: those of perplexities share the noise of the windows."""
    places, levels = pd.factorize(rows[x])
    kinds, names = pd.factorize(rows[line])
    rows = rows.assign(place=places + 0.08 * (kinds - (len(names) - 1) / 2))
    ax = draw_lines(rows, "place", "value", line, ax=ax)
    rows["colour"] = rows[line].map(looks(rows[line])["palette"])
    ax.scatter(rows["place"], rows["value"], s=9, c=rows["colour"], alpha=0.6)
    paired = rows[rows["metric"] != tables.PERPLEXITY]
    ax.vlines(paired["place"], paired["low"], paired["high"], colors=paired["colour"].tolist(), lw=1)
    ax.set_xticks(range(len(levels)), [f"{v:g}" if isinstance(v, float) else str(v) for v in levels])
    ax.set(xlabel=x, ylabel=rows["metric"].iloc[0])
    return ax


def figure_gamma(table: pd.DataFrame) -> Figure:
    """The paper's Fig. 5 and 6: perplexity against gamma, a panel a start and setting of the bits, with
    QuaRot's and QuaRot.FP16()'s lines."""
    rows = rows_of(table)
    seeds = rows.groupby(["bits", "init"])["seed"].transform("nunique").astype(str)
    title = rows["bits"] + ", start " + rows["init"] + ", seeds: " + seeds
    fig = panels(rows.assign(title=title), "title", _plot_gamma)
    legend_below(fig)
    return fig


def _plot_gamma(part: pd.DataFrame, *, ax: Axes) -> None:
    refined = part[part["line"] == "DFRot"]
    plot_sweep(refined, "gamma", "line", ax=ax)
    lines = {name: part.loc[part["line"] == name, "value"].mean() for name in ("QuaRot", "QuaRot.FP16()")}
    for (name, value), style in zip(lines.items(), ("--", ":"), strict=True):
        ax.axhline(value, ls=style, c=INK, lw=1.3, label=name)
    best = part["value"].min()
    top = max(NEAR * best, 1.05 * lines["QuaRot"])
    ax.set_ylim(0.97 * best, top)
    for place, value in enumerate(refined.groupby("gamma", sort=False)["value"].mean()):
        if value > top:
            ax.annotate(f"\u2191 {value:.0f}", (place, top), ha="center", va="top", fontsize=9)


def figure_keep_out(table: pd.DataFrame) -> Figure:
    """Table 1 as a picture: perplexity with all tokens quantized and with massive ones kept out (hollow), a
    marker for each seed, a panel a setting of the bits."""
    rows = rows_of(table[table["rotation"] != "NR"])
    rows = rows.sort_values(["rotation", "keep_out"], ascending=[False, True])
    alone = rows.assign(low=rows["value"], high=rows["value"])  # only paired intervals would count here
    fig = panels(alone, "bits", plot_rows, size=(4.3, 3), sharex=True, sharey=True)
    for ax in fig.axes:
        ax.set_xlabel("perplexity (hollow: massive tokens kept out)")
    return fig


def figure_clip(table: pd.DataFrame) -> Figure:
    """Perplexity against the activation clip ratio under RO, RH and DFRot; and, paired, against no clip."""
    rows = pd.concat([rows_of(table), rows_of(table, f"{tables.PERPLEXITY} - clip 1")])
    fig = panels(rows, "metric", partial(plot_sweep, x="clip", line="rotation"), size=(5.4, 3.8))
    for ax in fig.axes:
        ax.set(title="16-4-16", xlabel="activation clip ratio")
    legend_below(fig)
    return fig


def figure_intervene(table: pd.DataFrame) -> Figure:
    """What keeping tokens of each window out does to perplexity, against how many and how they are chosen:
    paired differences, a panel a rotation."""
    kinds = dict.fromkeys(table["rotation"])
    rows = pd.concat([rows_of(table, f"{tables.PERPLEXITY} - {kind}") for kind in kinds])
    own = rows["metric"] == f"{tables.PERPLEXITY} - " + rows["rotation"]
    chosen = rows["chosen"].str.replace("_", " ")
    fig = panels(rows.assign(chosen=chosen)[own], "metric", _plot_kept, size=(5, 3.8))
    legend_below(fig)
    return fig


def _plot_kept(part: pd.DataFrame, *, ax: Axes) -> None:
    plot_sweep(part[part["k"].notna()], "k", "chosen", ax=ax)
    by_rule = part.loc[part["k"].isna(), "value"].mean()
    ax.axhline(0, ls="--", c=INK, lw=1.2, label="none kept out")
    ax.axhline(by_rule, ls=":", c=INK, lw=1.6, label="the massive tokens")
    ax.set(xlabel="tokens of each window kept out")


def figure_differences(table: pd.DataFrame, label: str, panel: str = "{bits}") -> Figure:
    """Paired differences of perplexity to RH: left of the line is better. `label` and `panel` name a row's
    place and panel by its columns, as `str.format` fills them in."""
    rows = rows_of(table[table["rotation"] != "NR"], f"{tables.PERPLEXITY} - RH")
    entries = rows.to_dict("records")
    labels = [label.format_map(row).replace("_", " ") for row in entries]
    rows = rows.assign(label=labels, panel=[panel.format_map(row) for row in entries])
    size = (4.2, 1.4 + 0.32 * len(set(labels)))
    fig = panels(rows, "panel", plot_rows, size=size, sharey=True)
    for ax in fig.axes:
        ax.axvline(0, ls="--", lw=1, c=INK)
        ax.set(xlabel="perplexity - RH's")
    return fig


def figure_zero_shot(table: pd.DataFrame) -> Figure:
    """Accuracy on each task and on average, a panel each, with one standard error; acc_norm where a task has
    it. Columns: row, task, value, stderr, items, rotation."""
    rows = table.drop_duplicates(["row", "task"], keep="last")
    value, error = 100 * rows["value"], 100 * rows["stderr"]
    rows = rows.assign(label=rows["row"], value=value, low=value - error, high=value + error, keep_out=False)
    rows["rotation"] = rows["rotation"].fillna("plain")
    fig = panels(rows, "task", plot_rows, size=(1.9, 3.4), sharey=True)
    for ax in fig.axes:
        ax.set_xlabel("accuracy, %")
    fig.suptitle(f"first {rows['items'].min():.0f} items of each task; bars: one standard error", fontsize=10)
    return fig
