"""Pictures of what is inside: who writes a massive value, the sink, whose rounding costs which words."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from dfrot_lab.observe.residual import REMOVED
from dfrot_lab.observe.writers import ATTENTION, EMBEDDING, MLP
from dfrot_lab.show.theme import COLOURS, INK, MASSIVE_COLOUR, draw_lines, visible
from dfrot_lab.study.inside import LEFT, LOSS, SHARE

WRITER_COLOURS = {EMBEDDING: "#E69F00", ATTENTION: "#56B4E9", MLP: MASSIVE_COLOUR}
LINEAR = 10.0  # below this a spike's parts are drawn on a linear scale
LEAST = 1e-4  # nats: of a colour scale
HEAT: dict[str, Any] = {"cmap": "rocket_r", "rasterized": True}  # an SVG of every cell would be megabytes
LABELS = 24  # of an axis of words at most


def plot_writers(table: pd.DataFrame, *, ax: Axes) -> None:
    """What each layer's writers add to the value (bars), and the value before each layer (line)."""
    sums = table.groupby(["layer", "writer"], observed=True)["value"].sum().unstack(fill_value=0)
    layers, left, right = sums.index.astype(int).to_numpy(), 0.0, 0.0
    for place, writer in enumerate(name for name in WRITER_COLOURS if name in sums):
        at = layers + 0.36 * (place - 1)
        ax.bar(at, sums[writer], width=0.36, color=WRITER_COLOURS[writer], label=writer, zorder=2)
        left, right = min(left, at.min()), max(right, at.max())
    height = sums.sum(axis=1).cumsum()
    ax.plot(layers + 0.5, height, c=INK, lw=1.2, drawstyle="steps-mid", label="value so far")
    ax.axhline(0, c=INK, lw=0.6)
    ax.legend()
    ax.set_yscale("symlog", linthresh=LINEAR)
    ax.set_yticks([tick for tick in ax.get_yticks() if abs(tick) != LINEAR], minor=False)
    ax.set(xlabel="layer", ylabel="added to the channel", title="Who writes it")
    ax.set_xlim(left - 0.6, right + 0.9)
    low, high = ax.get_ylim()
    ax.set_ylim(3 * min(low, 0), 3 * max(high, 0))
    sns.move_legend(ax, "center left", bbox_to_anchor=(1, 0.5))


def plot_neurons(table: pd.DataFrame, *, ax: Axes) -> None:
    """The neurons' parts of what one layer's MLP adds, largest first, each with its gate and up."""
    wide = table.pivot(index=["writer", "neuron"], columns="metric", values="value")
    wide = wide.sort_values("value", key=abs, ascending=False).reset_index()
    names = [f"{row.writer} {row.neuron}".strip() for row in wide.itertuples()]
    ax.barh(range(len(wide)), wide["value"], color=MASSIVE_COLOUR)
    for place, row in enumerate(wide.to_dict("records")):
        said = [f"{name} {row[name]:.3g} ({row[f'{name}_usual']:.2g})" for name in ("gate", "up")]
        ax.text(max(row["value"], 0), place, " " + ", ".join(said), va="center", fontsize=8)
    ax.set_yticks(range(len(wide)), names)
    ends = min(0, 1.1 * wide["value"].min()), 2.1 * max(wide["value"].max(), 0) or 1
    ax.set(ylim=(len(wide) - 0.4, -0.6), xlim=ends, xlabel="added to the channel", ylabel="neuron")
    ax.set_title(f"Neurons of layer {table['layer'].iloc[0]} (in brackets: other tokens' median size)")
    ax.grid(axis="y", visible=False)


def figure_writers(table: pd.DataFrame) -> Figure:
    """Who writes a token's massive value: writers by layer, neurons of the one layer, readers by layer."""
    parts = dict(list(table.groupby("part")))
    fig = plt.figure(figsize=(11, 7))
    grid: Any = fig.add_gridspec(2, 2)
    plot_writers(parts["writes"], ax=fig.add_subplot(grid[0, :]))
    plot_neurons(parts["neurons"], ax=fig.add_subplot(grid[1, 0]))
    ax = fig.add_subplot(grid[1, 1])
    shares = parts["reads"].query("metric == 'share'").assign(layer=lambda rows: rows["layer"].astype(int))
    draw_lines(shares, "layer", "value", "writer", markersize=4, ax=ax)
    sns.move_legend(ax, "center left", bbox_to_anchor=(1, 0.5), title=None)
    ax.set(ylabel="share of what it gives", title="Who reads it")
    ax.set_ylim(min(-0.1, 1.1 * shares["value"].min()), max(1.1, 1.1 * shares["value"].max()))
    fig.suptitle(title_of(table) + ", channel {channel}".format_map(table.iloc[0]), fontsize=11)
    return fig


def title_of(table: pd.DataFrame) -> str:
    """The token that a table is of, in words."""
    return f"token {table['token'].iloc[0]} \u2018{visible(str(table['text'].iloc[0]))}\u2019"


def figure_sink(table: pd.DataFrame) -> Figure:
    """Attention that later tokens give to the massive token: by layer and head; and by layer where its
    massive values are removed."""
    shares = table[table["metric"] == SHARE].astype({"layer": int, "head": int})
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 5), width_ratios=(2, 3))
    own = shares[shares["massive"] == LEFT].pivot(index="layer", columns="head", values="value")
    sns.heatmap(own, vmin=0, vmax=1, **HEAT, ax=left)
    _name_bar(left, "share")
    left.set(title="As the model is", xlabel="head", ylabel="layer")
    left.tick_params(axis="y", rotation=0)
    losses = table[table["metric"] == LOSS].set_index("massive")["value"]
    names = {how: f"{how}: loss {losses[how]:.2f}" for how in (LEFT, *REMOVED)}
    said = shares.assign(massive=shares["massive"].map(names))
    colours = dict(zip(names.values(), (INK, MASSIVE_COLOUR, "#E69F00", COLOURS["RH"]), strict=True))
    draw_lines(said, "layer", "value", "massive", palette=colours, markersize=5, ax=right)
    sns.move_legend(right, "upper left", bbox_to_anchor=(0, -0.14), ncols=2, title=None)
    right.set(ylim=(0, 1), ylabel="share of attention, mean of heads", title="Its massive values")
    fig.suptitle("What later tokens give to " + title_of(table), fontsize=11)
    return fig


def _name_bar(ax: Axes, name: str) -> None:
    """Write what a heat map's colours are above their bar."""
    bar: Any = ax.collections[0].colorbar
    bar.ax.set_title(name, fontsize=8)


def plot_costs(part: pd.DataFrame, *, ax: Axes, top: float, bar: bool) -> None:
    """What rounding each token alone (down) costs each word (across), colours on a log scale; none of
    the words before it, which it cannot cost anything."""
    wide = part.assign(place=part["place"].astype(int)).pivot(index="place", columns="word", values="value")
    texts = part.drop_duplicates("word")["text"].map(visible).tolist()
    style = {"norm": LogNorm(LEAST, max(top, 10 * LEAST)), "cbar": bar, **HEAT}
    sns.heatmap(wide.clip(lower=LEAST), **style, mask=np.tri(*wide.shape, -1, dtype=bool), ax=ax)
    if bar:
        _name_bar(ax, "KL, nats")
    step = max(1, -(-len(texts) // LABELS))
    ax.set_xticks(np.arange(0, len(texts), step) + 0.5, texts[::step], rotation=90, fontsize=7)
    numbers = wide.index[::step].astype(str).tolist()
    ax.set_yticks(np.arange(0, len(wide), step) + 0.5, numbers, fontsize=7, rotation=0)
    ax.set(xlabel="what follows the word", ylabel="token that is rounded")


def _plot_sums(table: pd.DataFrame, way: str, names: Sequence[str], *, ax: Axes) -> None:
    """What rounding in each place alone costs all words together, a line a rotation."""
    rows = table[table["rounded"] == way].groupby(["rotation", "place"], sort=False)["value"].sum()
    lines = rows.reset_index().assign(place=lambda own: own["place"].map(names.index))
    draw_lines(lines, "place", "value", "rotation", ax=ax)
    ax.set(xlabel=f"{way} that is rounded", ylabel="KL divergence of all words, nats", yscale="log")


def figure_costs(table: pd.DataFrame) -> Figure:
    """Which rounding costs which words: tokens by words, a panel a rotation; sums by token, layer, site."""
    kinds = list(dict.fromkeys(table["rotation"]))
    ways = [way for way in ("token", "layer", "site") if way in set(table["rounded"])]
    fig = plt.figure(figsize=(5 * max(2, len(kinds)), 8.4))
    halves: Any = fig.subfigures(2, 1, height_ratios=(3, 2))
    above, below = halves
    own = table[table["rounded"] == "token"]
    if len(own):
        for ax, kind in zip(above.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
            plot_costs(own[own["rotation"] == kind], ax=ax, top=own["value"].max(), bar=kind == kinds[-1])
            ax.set_title(kind)
    for ax, way in zip(below.subplots(1, len(ways), squeeze=False)[0], ways, strict=True):
        names = list(dict.fromkeys(table.loc[table["rounded"] == way, "place"]))
        _plot_sums(table, way, names, ax=ax)
        if way == "site":
            said = [name.replace("_", " ") for name in names]
            ax.set_xticks(range(len(names)), said, rotation=15, fontsize=8)
    return fig
