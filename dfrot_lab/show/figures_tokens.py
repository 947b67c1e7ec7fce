"""The paper's pictures of single tokens: errors in the plane and in space, one massive token, the residual
stream. Each draws one tidy table.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dfrot_lab.maths import tables
from dfrot_lab.show import figures
from dfrot_lab.show.figures import MASSIVE_COLOUR, plot_error_pair
from dfrot_lab.show.figures_sweeps import LINES, SERIES, plot_dots
from dfrot_lab.study.setting import figure_site

ORDERS = {
    "NR > RO > RH": ("#117733", "o"),
    "NR > RH > RO": ("#56B4E9", "v"),
    "RO > NR > RH": (MASSIVE_COLOUR, "D"),
    "RO > RH > NR": ("#E69F00", "s"),
    "RH > NR > RO": ("#AA4499", "P"),
    "RH > RO > NR": ("#222222", "X"),
}
"""Colour and marker of each order of the errors: green, blue and red are the paper's."""
SITES = (
    "layers.3.input_norm",
    "layers.6.post_attention_norm",
    "layers.15.input_norm",
    "layers.28.input_norm",
)


def _sites(table: pd.DataFrame, wanted: Sequence[str] = SITES) -> list[str]:
    """The wanted sites a table has, or its first, middle and last."""
    own = [str(site) for site in table["site"].unique()]
    return [site for site in wanted if site in own] or list(
        dict.fromkeys([own[0], own[len(own) // 2], own[-1]])
    )


def plot_errors_3d(wide: pd.DataFrame, *, ax: Any) -> Axes:
    """Each token's error under NR, RO and RH in space, coloured by their order (DFRot, Fig. 2). Columns: NR,
    RO, RH, order. `ax` is a 3-D Axes.
    """
    for order, (colour, marker) in ORDERS.items():
        part = wide[wide["order"] == order]
        rare = len(part) < 0.05 * len(wide)
        options = {
            "c": colour,
            "marker": marker,
            "s": 30 if rare else 6,
            "alpha": 1 if rare else 0.5,
            "linewidths": 0,
            "depthshade": False,
            "rasterized": True,
        }
        ax.scatter(part["NR"], part["RO"], part["RH"], label=order, **options)
    ax.set(xlabel="E(NR)", ylabel="E(RO)", zlabel="E(RH)")
    ax.view_init(elev=22, azim=-60)
    ax.set_box_aspect(None, zoom=0.82)  # else the third label is cut off
    ax.tick_params(labelsize=7, pad=0)
    axes: Axes = ax
    return axes


def figure_errors_3d(table: pd.DataFrame) -> Figure:
    """The paper's Fig. 2 (and 13 to 24): a panel a site."""
    sites = _sites(table)
    fig = plt.figure(figsize=(4.1 * len(sites), 4.2))
    for place, site in enumerate(sites):
        ax = fig.add_subplot(1, len(sites), place + 1, projection="3d")
        plot_errors_3d(table[table["site"] == site], ax=ax)
        ax.set_title(site, fontsize=9)
    shown = set(table.loc[table["site"].isin(sites), "order"])
    present = [order for order in ORDERS if order in shown]
    handles = [plt.Line2D([], [], ls="", marker=ORDERS[o][1], c=ORDERS[o][0], label=o) for o in present]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    return fig


def figure_orders(table: pd.DataFrame) -> Figure:
    """How many tokens have each order of their errors, at every site. Columns: site (in the model's order),
    order, tokens.
    """
    fig, ax = plt.subplots(figsize=(10, 3.8))
    sites = list(dict.fromkeys(table["site"]))
    for order, (colour, marker) in ORDERS.items():
        part = table[table["order"] == order]
        ax.plot(
            [sites.index(site) for site in part["site"]],
            part["tokens"],
            c=colour,
            marker=marker,
            ms=4,
            ls="",
            label=order,
        )
    step = max(1, len(sites) // 10)
    names = [str(site).replace("layers.", "").replace("_norm", "") for site in sites[::step]]
    ax.set_xticks(range(0, len(sites), step), names, rotation=30, ha="right")
    ax.set(ylabel="tokens", yscale="log", ylim=(0.7, None), xlabel="site (layer and norm)")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def figure_errors_2d(table: pd.DataFrame) -> Figure:
    """The paper's Fig. 3: NR-RO, NR-RH, RO-RH and RH-DFRot, a row a site."""
    sites, pairs = (
        _sites(table)[1:3] or _sites(table),
        (("NR", "RO"), ("NR", "RH"), ("RO", "RH"), ("RH", "DFRot")),
    )
    fig, axes = plt.subplots(len(sites), 4, figsize=(13, 3.4 * len(sites)), squeeze=False)
    for line, site in zip(axes, sites, strict=True):
        for ax, (x, y) in zip(line, pairs, strict=True):
            plot_error_pair(table[table["site"] == site], x, y, ax=ax)
            ax.set_title(f"{y} against {x}, {site}", fontsize=8)
    fig.legend(*axes[-1, -1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return fig


def figure_massive_token(table: pd.DataFrame) -> Figure:
    """The paper's Fig. 4: one massive token's values before and after quantization, a panel a rotation, at
    the site of the main figures.
    """
    site = figure_site(table["site"].unique().tolist())
    part = table[table["site"] == site]
    fig = figures.figure_massive_token(part)
    fig.suptitle(f"token {part['token'].iloc[0]} ({part['text'].iloc[0]!r}) at {site}", fontsize=10)
    return fig


def figure_massive_activations(table: pd.DataFrame) -> Figure:
    """Sun et al.: the largest three values and the median by layer; and perplexity with massive values set to
    zero or to their mean.
    """
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2))
    profile = table[table["layer"].notna()]
    for number, (name, part) in enumerate(profile.groupby("metric", sort=False)):
        axes[0].plot(
            part["layer"],
            part["value"],
            label=name,
            c=SERIES[number % len(SERIES)],
            ls=LINES[number % len(LINES)],
            lw=1.6,
        )
    axes[0].set(yscale="log", xlabel="layer", ylabel="|residual stream|", title="Largest values and median")
    axes[0].legend(fontsize=8)
    rows = table[table["metric"] == tables.PERPLEXITY]
    plot_dots(rows, lambda r: str(r["set_massive"]), ax=axes[1])
    axes[1].set(xscale="log", xlabel="perplexity, 16-16-16", title="Massive values set to")
    return fig


def figure_magnitudes(table: pd.DataFrame) -> Figure:
    """Sun et al., Fig. 1: |residual stream| over tokens and channels, in space. Columns: token, text,
    channel, magnitude.
    """
    fig = plt.figure(figsize=(8, 5))
    ax: Any = fig.add_subplot(projection="3d")
    for token, part in table.groupby("token"):
        ax.plot(
            [token] * len(part),
            part["channel"],
            part["magnitude"],
            c=MASSIVE_COLOUR if part["magnitude"].max() > 100 else "#0072B2",
            lw=0.8,
        )
    texts = table.drop_duplicates("token")["text"].tolist()
    step = max(1, len(texts) // 12)
    ax.set_xticks(range(0, len(texts), step), [repr(t)[1:-1] for t in texts[::step]], rotation=45, fontsize=7)
    ax.set_xlabel("token", labelpad=22)
    ax.set_ylabel("channel", labelpad=8)
    ax.set_zlabel("|residual stream|", labelpad=12)
    ax.tick_params(axis="y", labelsize=8)
    ax.tick_params(axis="z", labelsize=8, pad=5)
    ax.view_init(elev=24, azim=-58)
    ax.set_box_aspect(None, zoom=0.88)  # else the labels are cut off
    return fig
