"""Pictures of what rotations are worth: sweeps over a knob, dots on a scale, differences with their
intervals. Each draws one experiment's table.
"""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dfrot_lab.maths import tables
from dfrot_lab.score import zeroshot
from dfrot_lab.show.figures import COLOURS, MARKERS, _axes

LINES = ("-", "--", ":", "-.")
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555", "#E69F00")


def plot_sweep(
    table: pd.DataFrame, x: str, line: str, *, metric: str = tables.PERPLEXITY, ax: Axes | None = None
) -> Axes:
    """A value against one knob, a line a kind: the mean over seeds, each seed a dot; with one seed, its
    interval over windows.

    A tidy table with columns metric, value, ci95 and those named by `x` (drawn evenly spaced, in order of
    appearance) and `line`.
    """
    ax = _axes(ax)
    rows = table[table["metric"] == metric]
    levels = list(dict.fromkeys(rows[x]))
    for number, (name, part) in enumerate(rows.groupby(line, sort=False)):
        colour, marker = (
            COLOURS.get(str(name), SERIES[number % len(SERIES)]),
            MARKERS.get(str(name), "osD^v"[number % 5]),
        )
        means = part.groupby(x, sort=False)["value"].agg(["mean", "size"])
        places = np.array([levels.index(level) for level in means.index]) + 0.08 * (number - 1)
        ax.plot(
            places,
            means["mean"],
            c=colour,
            marker=marker,
            ms=5,
            ls=LINES[number % len(LINES)],
            label=str(name),
        )
        if (means["size"] > 1).any():
            ax.plot(
                [levels.index(v) + 0.08 * (number - 1) for v in part[x]],
                part["value"],
                c=colour,
                ls="",
                marker=marker,
                ms=3,
                alpha=0.5,
            )
        else:
            low, high = np.array(part["ci95"].tolist()).T
            ax.vlines(places, low, high, colors=colour, lw=1, alpha=0.6)
    ax.set_xticks(range(len(levels)), [f"{v:g}" if isinstance(v, float) else str(v) for v in levels])
    ax.set(xlabel=x, ylabel=metric)
    ax.legend(fontsize=8)
    return ax


def figure_gamma(table: pd.DataFrame) -> Figure:
    """The paper's Fig. 5 and 6: perplexity against gamma, a panel a start and setting of the bits, with
    QuaRot's and QuaRot.FP16()'s lines.
    """
    rows = table[table["metric"] == tables.PERPLEXITY]
    rows = rows.assign(bits=[tables.bits(r) for r in tables.records(rows)])
    panels = list(dict.fromkeys(zip(rows["bits"], rows["init"], strict=True)))
    fig, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), squeeze=False)
    for ax, (bits, init) in zip(axes[0], panels, strict=True):
        part = rows[(rows["bits"] == bits) & (rows["init"] == init)]
        refined = part[part["line"] == "DFRot"]
        plot_sweep(refined, "gamma", "line", ax=ax)
        for name, style, colour in (("QuaRot", "--", COLOURS[init]), ("QuaRot.FP16()", ":", "#333333")):
            ax.axhline(part.loc[part["line"] == name, "value"].mean(), ls=style, c=colour, lw=1.3, label=name)
        seeds = refined["seed"].nunique()
        ax.set_title(f"{bits}, start {init}, {seeds} seed{'s' if seeds > 1 else ''}")
        ax.legend(fontsize=8)
    return fig


def plot_dots(table: pd.DataFrame, label: Callable[[dict[str, Any]], str], *, ax: Axes | None = None) -> Axes:
    """One value a row on a common scale, each seed a dot with its interval: for tables whose rows are names.
    `label` names a row.
    """
    ax = _axes(ax)
    rows = [dict(zip(table.columns, values, strict=True)) for values in table.itertuples(index=False)]
    names = list(dict.fromkeys(label(row) for row in rows))
    for place, name in enumerate(names):
        own = [row for row in rows if label(row) == name]
        for shift, row in zip(np.linspace(-0.2, 0.2, len(own)) if len(own) > 1 else [0.0], own, strict=True):
            low, high = (
                row["ci95"]
                if isinstance(row["ci95"], (list, tuple, np.ndarray))
                else (row["value"], row["value"])
            )
            colour = COLOURS.get(row.get("rotation", ""), "#555555")
            face = "white" if row.get("keep_out") is True else colour
            ax.plot([low, high], [place + shift] * 2, c=colour, lw=1)
            ax.plot(
                row["value"],
                place + shift,
                ls="",
                marker=MARKERS.get(row.get("rotation", ""), "o"),
                c=colour,
                mfc=face,
                ms=6,
            )
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.5, -0.5))
    return ax


def figure_keep_out(table: pd.DataFrame) -> Figure:
    """Table 1 as a picture: perplexity with all tokens quantized and with massive ones kept out (hollow), a
    panel a setting of the bits.
    """
    rows = table[(table["metric"] == tables.PERPLEXITY) & (table["rotation"] != "NR")]
    settings = list(dict.fromkeys(tables.bits(r) for r in tables.records(rows)))
    fig, axes = plt.subplots(1, len(settings), figsize=(4.3 * len(settings), 3.2), squeeze=False)
    for ax, bits in zip(axes[0], settings, strict=True):
        part = rows[[tables.bits(r) == bits for r in tables.records(rows)]]
        plot_dots(part.sort_values(["rotation", "keep_out"], ascending=[False, True]), tables.label, ax=ax)
        ax.set(title=f"{bits}, a dot a seed", xlabel="perplexity (hollow: massive tokens kept out)")
    return fig


def figure_clip(table: pd.DataFrame) -> Figure:
    """Perplexity against the activation clip ratio under RO, RH and DFRot."""
    fig, ax = plt.subplots(figsize=(6.4, 3.8))
    plot_sweep(table, "clip", "rotation", ax=ax)
    ax.set(title="16-4-16", xlabel="activation clip ratio")
    return fig


def figure_intervene(table: pd.DataFrame) -> Figure:
    """What keeping tokens of each window out does to perplexity, against how many and how they are chosen:
    paired differences, a panel a rotation.
    """
    kinds = list(dict.fromkeys(table["rotation"]))
    fig, axes = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 3.8), squeeze=False)
    for ax, kind in zip(axes[0], kinds, strict=True):
        metric = f"{tables.PERPLEXITY} - {kind}"
        part = table[(table["rotation"] == kind) & (table["metric"] == metric)]
        plot_sweep(part[part["k"].notna()], "k", "chosen", metric=metric, ax=ax)
        ax.axhline(0, ls="--", c="#333333", lw=1.2, label="none kept out")
        ax.axhline(
            part.loc[part["k"].isna(), "value"].mean(), ls=":", c="#333333", lw=1.6, label="rule nr_error"
        )
        ax.set(
            title=f"{kind}, 16-4-16", xlabel="tokens of each window kept out", ylabel=f"perplexity - {kind}'s"
        )
        ax.get_legend().remove()
    fig.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return fig


def figure_differences(
    table: pd.DataFrame,
    label: Callable[[dict[str, Any]], str],
    *,
    panel: Callable[[dict[str, Any]], str] = tables.bits,
    reference: str = "RH",
) -> Figure:
    """Paired differences of perplexity to `reference`: left of the line is better. `panel` and `label` name a
    row's panel and place.
    """
    metric = f"{tables.PERPLEXITY} - {reference}"
    rows, entries = table[table["metric"] == metric], tables.records(table, metric)
    panels = list(dict.fromkeys(map(panel, entries)))
    size = (1.5 + 3.6 * len(panels), 1.4 + 0.32 * len(set(map(label, entries))))
    fig, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True)
    for ax, name in zip(axes[0], panels, strict=True):
        plot_dots(rows[[panel(entry) == name for entry in entries]], label, ax=ax)
        ax.axvline(0, ls="--", lw=1, c="#333333")
        ax.set(title=name, xlabel=f"perplexity - {reference}'s")
    return fig


def figure_main_table(table: pd.DataFrame) -> Figure:
    """Table 2 as differences to RH: RO and DFRot by RTN and by GPTQ, on scales of their own."""
    part = table[table["rotation"] != "NR"]
    return figure_differences(
        part, lambda r: str(r["rotation"]), panel=lambda r: f"{r['weights'].upper()} {tables.bits(r)}"
    )


def figure_calibration(table: pd.DataFrame) -> Figure:
    """Table 3 as differences to RH: which sample, how many rows, which text R1 was refined on."""
    return figure_differences(table, lambda r: f"{r['varied']} {r['level']}")


def figure_symmetric(table: pd.DataFrame) -> Figure:
    """Refinement's and evaluation's quantizer, all four ways, with and without sign flips: differences to RH
    under the same test.
    """

    def name(row: dict[str, Any]) -> str:
        return f"refined {row['refined_with']}{', sign flips' if row['sign_flips'] else ''}"

    return figure_differences(
        table, name, panel=lambda row: f"tested {row['tested_with']}, {tables.bits(row)}"
    )


def figure_variants(table: pd.DataFrame) -> Figure:
    """The refinement's variants: differences of perplexity to RH."""
    return figure_differences(table, lambda r: str(r["variant"]))


def figure_zero_shot(table: pd.DataFrame) -> Figure:
    """Accuracy on each task and on average, a marker a row, with one standard error; acc_norm where a task
    has it.
    """
    shown = table.drop_duplicates(["row", "task"], keep="last")
    tasks = [*zeroshot.TASKS, zeroshot.AVERAGE]
    tasks = [task for task in tasks if task in set(shown["task"])]
    fig, ax = plt.subplots(figsize=(10, 4))
    names = list(dict.fromkeys(shown["row"]))
    for number, name in enumerate(names):
        part = shown[shown["row"] == name].set_index("task").reindex(tasks)
        places = np.arange(len(tasks)) + np.linspace(-0.3, 0.3, len(names))[number]
        rotation = str(name).split(" ", maxsplit=1)[0]
        colour, filled = (
            COLOURS.get(rotation, "#222222"),
            "none" if "16-16-16" in str(name) else "left" if "4-4-4" in str(name) else "full",
        )
        options: dict[str, Any] = {
            "c": colour,
            "marker": MARKERS.get(rotation, "*"),
            "fillstyle": filled,
            "ls": "",
            "ms": 7,
            "capsize": 2,
        }
        ax.errorbar(places, 100 * part["value"], yerr=100 * part["stderr"], label=name, **options)
    ax.set_xticks(range(len(tasks)), tasks, fontsize=8)
    ax.set(
        ylabel="accuracy, % (one standard error)",
        title=f"first {int(shown['items'].min())} items of each task" if len(shown) else "",
    )
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig
