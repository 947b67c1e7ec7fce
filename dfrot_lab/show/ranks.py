"""The leaderboard to look at: a picture with a panel a group, and a table that a reader sorts and filters."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths.tables import change
from dfrot_lab.model.public import public
from dfrot_lab.show import figures, theme
from dfrot_lab.study import experiments, leaderboard
from dfrot_lab.study.setting import Setting

SCRIPT = Path(__file__).with_name("ranks.js")
FAR = 1000  # percent, beyond which an axis is logarithmic
NOTHING: dict[str, Any] = {"columns": [], "rows": [], "recipes": {}}  # is listed
ROW = ("rotation", "weights", "option")  # what a row of one group and bits is called by


def figure_ranks(table: pd.DataFrame) -> Figure:
    """Changes of perplexity against RH with their intervals, least first: a panel for each group and its
    bits, with an axis of its own, since groups are not compared."""
    rows = figures.rows_of(table, change("RH"))
    panels = {name: own.sort_values("value") for name, own in rows.groupby(["group", "bits"], sort=False)}
    tall = [len(own) + 3 for own in panels.values()]
    more: dict[str, Any] = {"figsize": (7.5, 0.23 * sum(tall)), "height_ratios": tall, "squeeze": False}
    fig, axes = figures.plt.subplots(len(panels), 1, **more)
    for ax, (name, own) in zip(axes[:, 0], panels.items(), strict=True):
        figures.plot_rows(own.assign(label=_labels(own)), ax=ax)
        ax.axvline(0, ls="--", lw=1, c=theme.INK)
        ax.set(title=f"{name[0]}, {name[1]}", xlabel=change("RH"))
        if own["value"].max() > FAR:
            ax.set(xscale="symlog", xlim=(min(-1, own["low"].min()), 2 * own["high"].max()))
    return fig


def _labels(own: pd.DataFrame) -> list[str]:
    """What tells the rows of one panel apart."""
    said = own[list(ROW)].fillna("none").astype(str)
    telling = [name for name in ROW if name == "rotation" or len(set(said[name])) > 1]
    lines = said[telling].to_dict("records")
    return [", ".join(v for n, v in line.items() if n == "rotation" or v != "none") for line in lines]


def listed(setting: Setting, store: Store) -> dict[str, Any]:
    """The rows of the leaderboard that are stored, for `ranks.js`: columns, the rows of each group, the
    recipe of each as YAML; no rows where none is stored."""
    table, found = leaderboard.stored(experiments.setting_of("leaderboard", setting), store)
    if table.empty:
        return NOTHING
    ranks = leaderboard.ranked(table)
    said = {recipe.key: recipe for recipe in (public(done.spec) for done in found.values())}
    recipes = {key: said[key].to_yaml() for key in ranks["recipe"]}
    columns = [*ROW, *(name for name in ranks if name not in ROW)]
    rows = [[_plain(value) for value in line] for line in ranks[columns].itertuples(index=False)]
    return {"columns": columns, "rows": rows, "recipes": recipes}


def _plain(value: Any) -> Any:
    """A cell as JSON has it: an interval as text, what is not there as null."""
    if isinstance(value, list | tuple):
        return "[{:.3g}, {:.3g}]".format(*value)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value.item() if hasattr(value, "item") else value
