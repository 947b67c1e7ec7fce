"""Draw one tidy table on one Axes, in one theme; save by name with what it was made from. Nothing here
computes a result.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dfrot_lab.maths import tables
from dfrot_lab.score import rows as score_rows

COLOURS = {"NR": "#555555", "RO": "#D55E00", "RH": "#0072B2", "DFRot": "#009E73"}
"""One colour a rotation everywhere: from Okabe and Ito's colour-blind-safe set, of different lightness so
that they part in grey too.
"""
MARKERS = {"NR": "s", "RO": "^", "RH": "o", "DFRot": "D"}
FAR = 5.0
"""A perplexity more than this many times the best is written out instead of drawn: it would squeeze all
others into one spot.
"""
MASSIVE_COLOUR, ORDINARY_COLOUR = "#CC2936", "#9AA5B1"

THEME: dict[str, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E6EA",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "dfrot-lab",  # same figure, same bytes
}


@contextmanager
def theme() -> Iterator[None]:
    """While the block runs, the project's matplotlib settings; nothing is changed for anybody else.

    Only the theme's own settings are put back: mpl.rc_context would also undo `interactive`, which a
    notebook's backend turns on when the first figure loads it, and no figure after that one would be shown.
    """
    settings: Any = mpl.rcParams  # typed by a list of literal names
    before = {name: settings[name] for name in THEME}
    settings.update(THEME)
    try:
        yield
    finally:
        settings.update(before)


def _axes(ax: Axes | None) -> Axes:
    return plt.gca() if ax is None else ax


def plot_error_pair(wide: pd.DataFrame, x: str, y: str, *, ax: Axes | None = None) -> Axes:
    """Each token's error under one rotation against another's (DFRot, Fig. 3), massive tokens marked; below
    the dashed line, `y` is better.

    Columns: one of errors a rotation (`errors.wide`), and massive.
    """
    ax = _axes(ax)
    heavy = wide["massive"]
    for part, colour, size, name in (
        (wide[~heavy], ORDINARY_COLOUR, 8, "ordinary tokens"),
        (wide[heavy], MASSIVE_COLOUR, 36, "massive tokens"),
    ):
        rare = size > 20
        options: dict[str, Any] = {
            "marker": "D" if rare else "o",
            "linewidths": 0,
            "alpha": 1 if rare else 0.5,
            "rasterized": not rare,
        }
        ax.scatter(part[x], part[y], s=size, c=colour, label=name, **options)
    top = float(wide[[x, y]].to_numpy().max()) * 1.05
    ax.plot([0, top], [0, top], ls="--", lw=1, c="#333333", label="equal")
    right, high = (
        float(wide[name].max()) * 1.05 for name in (x, y)
    )  # not the line's end: errors without rotation are ten times the others
    ax.set(xlabel=f"E({x})", ylabel=f"E({y})", xlim=(0, right), ylim=(0, high), title=f"{y} against {x}")
    return ax


def plot_massive_values(values: pd.DataFrame, rotation: str, *, ax: Axes | None = None) -> Axes:
    """One token's values under one rotation, before and after quantization (DFRot, Fig. 4). Columns:
    rotation, value, quantized.
    """
    ax = _axes(ax)
    part = values[values["rotation"] == rotation]
    error = float(((part["value"] - part["quantized"]) ** 2).sum())
    ax.scatter(part["value"], part["quantized"], s=10, c=COLOURS.get(rotation, "k"), alpha=0.6, linewidths=0)
    bound = float(part["value"].abs().max()) * 1.1
    ax.plot([-bound, bound], [-bound, bound], lw=0.8, ls="--", c="#333333")
    ax.set(title=f"{rotation}: E = {error:.2f}", xlabel="value", ylabel="quantized value")
    return ax


def plot_residual(maxima: Tensor, median: Tensor, *, ax: Axes | None = None) -> Axes:
    """The residual stream before each norm: the largest |value| of the first token, of any other token, and
    the median (Sun et al., Fig. 4).

    `maxima` (sites, tokens) and `median` (sites,) as a Capture has them.
    """
    ax = _axes(ax)
    sites = np.arange(len(median)) / 2
    ax.plot(sites, maxima[:, 0], c=MASSIVE_COLOUR, lw=2, label="token 0, largest channel")
    ax.plot(
        sites,
        maxima[:, 1:].max(1).values,
        c="#555555",
        lw=1.2,
        ls="--",
        label="any other token, largest channel",
    )
    ax.plot(sites, median, c="#0072B2", lw=1.2, ls=":", label="median of all values")
    ax.set(yscale="log", xlabel="layer", ylabel="|residual stream|", title="One token, one channel")
    ax.legend(fontsize=8)
    return ax


def plot_history(history: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """A refinement's mean squared error of ordinary and massive rows, step by step. Columns: step, normal,
    massive.
    """
    ax = _axes(ax)
    marker = (
        "o" if len(history) < 30 else None
    )  # an accelerated refinement looks at all rows now and then: show when
    ax.plot(
        history["step"], history["ordinary"], c=ORDINARY_COLOUR, lw=2, marker=marker, label="ordinary rows"
    )
    ax.plot(history["step"], history["massive"], c=MASSIVE_COLOUR, lw=2, marker=marker, label="massive rows")
    ax.set(xlabel="step", ylabel="mean E(xR)", ylim=(0, None), title="Refining R1")
    ax.legend()
    return ax


def plot_perplexity(table: pd.DataFrame, bits: str, *, ax: Axes | None = None) -> Axes:
    """Perplexity of every rotation at one setting of the bits, with its interval over windows; hollow where
    massive tokens are kept out.

    A results table; the dotted line is full precision, where the table has it.
    """
    ax = _axes(ax)
    rows = tables.records(tables.first_seed(table))
    exact = [r for r in rows if tables.label(r) == "full precision"]
    shown = [r for r in rows if tables.bits(r) == bits and r not in exact]
    for place, entry in enumerate(shown):
        colour, value = COLOURS.get(entry["rotation"], "k"), entry["value"]
        low, high = entry["ci95"]
        if value > FAR * min(r["value"] for r in shown):
            ax.annotate(
                f"{value:,.0f}, off the scale ",
                (1, place),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="center",
                c=colour,
            )
            continue
        face = "white" if entry["keep_out"] else colour
        ax.errorbar(
            value,
            place,
            xerr=[[value - low], [high - value]],
            c=colour,
            marker=MARKERS.get(entry["rotation"], "o"),
            mfc=face,
            ms=7,
            capsize=3,
        )
        ax.annotate(
            f"{value:.2f}", (value, place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8
        )
    ax.set_yticks(range(len(shown)), [tables.label(r) for r in shown])
    ax.set(title=bits, xlabel="perplexity", ylim=(len(shown) - 0.5, -0.6))
    for entry in exact[:1]:
        ax.axvline(entry["value"], ls=":", c="#333333", lw=1)
    return ax


def plot_token_roots(errors: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """One token's root error at every site of the model, a line a rotation. Columns: site (two a layer, in
    their order), rotation, root.
    """
    ax = _axes(ax)
    roots = errors.pivot(index="site", columns="rotation", values="root")
    for name in map(str, roots.columns):
        ax.plot(
            np.arange(len(roots)) / 2,
            roots[name],
            c=COLOURS.get(name, "k"),
            marker=MARKERS.get(name, "o"),
            ms=4,
            lw=1,
            label=name,
        )
    ax.set(xlabel="layer", ylabel="root E(xR)", ylim=(0, None), title="One token, every layer")
    ax.legend(fontsize=8, ncols=len(roots.columns))
    return ax


def plot_seed_spread(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Mean root error of ordinary and of massive tokens, a marker a seed. Columns: kind (of rotation), tokens
    (ordinary or massive), mean.
    """
    ax = _axes(ax)
    kinds = list(dict.fromkeys(table["kind"]))
    for place, kind in enumerate(kinds):
        colour = COLOURS.get(kind, "k")
        for shift, face, tokens in ((0, "white", "ordinary"), (0.3, colour, "massive")):
            means = table.loc[(table["kind"] == kind) & (table["tokens"] == tokens), "mean"]
            ax.plot(
                [place + shift] * len(means),
                means,
                ls="",
                marker=MARKERS.get(kind, "o"),
                c=colour,
                mfc=face,
                ms=6,
            )
    for tokens, face in (("ordinary", "white"), ("massive", "#333333")):
        ax.plot([], [], ls="", marker="o", c="#333333", mfc=face, label=f"{tokens} tokens")
    ax.set_xticks(np.arange(len(kinds)) + 0.15, kinds)
    ax.set(ylabel="mean root E(xR)", ylim=(0, None), xlim=(-0.4, len(kinds) - 0.3), title="A marker a seed")
    ax.grid(axis="x", visible=False)
    ax.legend(fontsize=8, loc="lower left")
    return ax


def plot_value_counts(values: pd.DataFrame, rotation: str, *, ax: Axes | None = None) -> Axes:
    """How many of one token's values lie where under one rotation, over the grid they are rounded to.
    Columns: rotation, value, quantized.
    """
    ax = _axes(ax)
    part = values[values["rotation"] == rotation]
    ax.hist(part["value"], bins=60, color=COLOURS.get(rotation, "k"))
    for level in part["quantized"].unique():
        ax.axvline(level, c="#333333", lw=0.6, ls=":", zorder=0)
    ax.set(
        title=f"{rotation}: largest |value| {part['value'].abs().max():.2f}",
        xlabel="value (dotted: quantized values in use)",
        ylabel="channels",
    )
    ax.grid(visible=False)
    return ax


def plot_logit_errors(steps: pd.DataFrame, tolerance: float, *, ax: Axes | None = None) -> Axes:
    """Relative error of the logits after each step, on a log axis; red beyond `tolerance`, the dashed line.
    Columns: step, error.
    """
    ax = _axes(ax)
    floor = min([tolerance, *steps.loc[steps["error"] > 0, "error"]]) / 10
    for place, error in enumerate(steps["error"]):
        colour = MASSIVE_COLOUR if error > tolerance else COLOURS["RH"]
        ax.plot(
            max(error, floor),
            place,
            ls="",
            marker="D" if error > tolerance else "o",
            c=colour,
            mfc=colour if error else "white",
            ms=7,
        )
        ax.annotate(
            f"{error:.1e}" if error else "0",
            (max(error, floor), place),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    ax.axvline(tolerance, ls="--", c="#333333", lw=1)
    ax.set_yticks(range(len(steps)), steps["step"])
    ax.set(
        xscale="log",
        xlabel="relative error of the logits (dashed: the tolerance)",
        xlim=(floor / 2, 30),
        ylim=(len(steps) - 0.4, -0.6),
    )
    return ax


def figure_errors(wide: pd.DataFrame) -> Figure:
    """The paper's Fig. 3 in three panels: RO against NR, RH against NR, RH against RO."""
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.9))
    for ax, (x, y) in zip(axes, (("NR", "RO"), ("NR", "RH"), ("RO", "RH")), strict=True):
        plot_error_pair(wide, x, y, ax=ax)
    fig.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return fig


def figure_massive_token(values: pd.DataFrame) -> Figure:
    """The paper's Fig. 4: one massive token, a panel a rotation."""
    names = list(dict.fromkeys(values["rotation"]))
    fig, axes = plt.subplots(1, len(names), figsize=(2.9 * len(names), 3))
    for ax, name in zip(np.atleast_1d(axes), names, strict=True):
        plot_massive_values(values, name, ax=ax)
    return fig


def figure_perplexity(table: pd.DataFrame) -> Figure:
    """Perplexity at every setting of the bits in a results table, a panel each."""
    rows = tables.records(table)
    settings = list(dict.fromkeys(tables.bits(r) for r in rows if tables.label(r) != "full precision"))
    fig, axes = plt.subplots(1, len(settings), figsize=(4.2 * len(settings), 3.6), squeeze=False)
    for ax, bits in zip(axes[0], settings, strict=True):
        plot_perplexity(table, bits, ax=ax)
    return fig


def save_figure(fig: Figure, name: str, folder: Path, about: Mapping[str, Any]) -> Path:
    """Write `<name>.png`, `.svg` and `.json` (what it was made from, and versions) into `folder`; close the
    figure; return the PNG's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / f"{name}.png", metadata={"Software": None})
    fig.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(fig)
    versions = {
        package: metadata.version(package) for package in ("dfrot-lab", "torch", "transformers", "matplotlib")
    }
    about = {"figure": name, **about, "versions": versions, "commit": score_rows.commit()}
    (folder / f"{name}.json").write_text(json.dumps(about, indent=1, default=str) + "\n", encoding="utf-8")
    return folder / f"{name}.png"
