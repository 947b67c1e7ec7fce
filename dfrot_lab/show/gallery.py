"""Every experiment's figure, and how table and figure are kept."""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from dfrot_lab.disk import row_files
from dfrot_lab.model import loading
from dfrot_lab.show import perplexity, tokens
from dfrot_lab.show.theme import save_figure, theme
from dfrot_lab.study import experiments
from dfrot_lab.study.setting import Setting

log = logging.getLogger(__name__)

FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "main": perplexity.figure_perplexity,
    "token-errors-3d": tokens.figure_errors_3d,
    "token-errors-2d": tokens.figure_errors,
    "token-orders": tokens.figure_orders,
    "massive-token": tokens.figure_massive_token,
    "gamma-sweep": perplexity.figure_gamma,
    "keep-out": perplexity.figure_keep_out,
    "main-table": partial(
        perplexity.figure_differences, label="{rotation} {bits}", panel="weights: {weights}"
    ),
    "calibration": partial(perplexity.figure_differences, label="{varied} {level}"),
    "zero-shot": perplexity.figure_zero_shot,
    "clip-sweep": perplexity.figure_clip,
    "symmetric-or-not": partial(
        perplexity.figure_differences,
        label="refined {refined_with}, sign flips: {sign_flips}",
        panel="tested {tested_with}, {bits}",
    ),
    "variants": partial(perplexity.figure_differences, label="{variant}"),
    "massive-activations": tokens.figure_massive_activations,
    "massive-magnitudes": tokens.figure_magnitudes,
    "intervene": perplexity.figure_intervene,
}
"""The figure that draws each experiment's table."""

SMALL = 5000
"""Rows up to which an experiment's table is kept as JSON lines, to be read and compared; above it as Parquet,
beside the figure alone."""


def save_experiment(
    name: str, table: pd.DataFrame, setting: Setting, tables: Path, folder: Path
) -> list[Path]:
    """Write an experiment's table into `tables`, named after it and the corpus, and its figure into `folder`;
    what was written."""
    small = len(table) <= SMALL
    rows = _file(name, setting, tables, "jsonl" if small else "parquet")
    if small:
        row_files.replace(rows, row_files.rows(table))
    else:
        row_files.write_table(table, rows)
    about = {
        "experiment": name,
        "model": setting.model.source,
        "corpus": setting.corpus,
        "seed": setting.seed,
        "quick": setting.quick,
        "device": loading.device_name(),
        "setting": _question(name, setting),
        "rows": len(table),
        "recipes": sorted(set(table["recipe"].dropna())) if "recipe" in table else [],
    }
    with theme():
        return [rows, save_figure(FIGURES[name](table), name, folder, about)]


def table(name: str, setting: Setting, root: Path) -> pd.DataFrame:
    """The experiment's table: the one kept under `root` (data/results/, figures/) if it was made with this
    very setting, else computed now.

    For sweeps of hours, which one machine computes and everybody reads; `experiments.run` computes in any
    case."""
    rows = _file(name, setting, root / "data" / "results", "jsonl")
    beside = root / "figures" / Path(setting.corpus).stem / f"{name}.json"
    if not (rows.is_file() and beside.is_file()):
        return experiments.run(name, setting)
    about = json.loads(beside.read_text(encoding="utf-8"))
    if about.get("setting") != _question(name, setting):
        return experiments.run(name, setting)
    log.info("%s: read from %s, computed on %s", name, rows.name, about["device"])
    return row_files.load(rows)


def _file(name: str, setting: Setting, tables: Path, suffix: str) -> Path:
    return tables / f"{name}-{Path(setting.corpus).stem}.{suffix}"


def _question(name: str, setting: Setting) -> dict[str, Any]:
    """An experiment's own setting as JSON values, whatever the device: the same question is answered once."""
    own = experiments.EXPERIMENTS[name].setting(setting)
    return own.with_(model=own.model.with_(device="auto")).plain()
