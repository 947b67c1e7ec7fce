"""Every experiment's figure, and how table and figure are kept."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from . import figures_sweeps as sweeps
from . import figures_tokens as tokens
from . import results
from .figures import save_figure, theme
from .mainjob import Setting

FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "token-errors-3d": tokens.figure_errors_3d,
    "token-errors-2d": tokens.figure_errors_2d,
    "token-orders": tokens.figure_orders,
    "massive-token": tokens.figure_massive_token,
    "gamma-sweep": sweeps.figure_gamma,
    "keep-out": sweeps.figure_keep_out,
    "main-table": sweeps.figure_main_table,
    "calibration": sweeps.figure_calibration,
    "zero-shot": sweeps.figure_zero_shot,
    "clip-sweep": sweeps.figure_clip,
    "symmetric-or-not": sweeps.figure_symmetric,
    "variants": sweeps.figure_variants,
    "massive-activations": tokens.figure_massive_activations,
    "massive-magnitudes": tokens.figure_magnitudes,
    "intervene": sweeps.figure_intervene,
}
"""The figure that draws each experiment's table."""

SMALL = 5000
"""Rows up to which an experiment's table is kept as JSON lines, to be read and compared; above it as Parquet, beside the figure alone."""


def save_experiment(name: str, table: pd.DataFrame, setting: Setting, tables: Path, folder: Path) -> list[Path]:
    """Write an experiment's table into `tables`, named after it and the corpus, and its figure into `folder`; what was written."""
    rows = tables / f"{name}-{Path(setting.corpus).stem}.{'jsonl' if len(table) <= SMALL else 'parquet'}"
    if len(table) <= SMALL:
        results.replace(rows, results.rows(table))
    else:
        results.write_table(table, rows)
    specs = sorted(set(table["spec"].dropna())) if "spec" in table else []
    about = {"experiment": name, "model": setting.model.source, "corpus": setting.corpus, "seed": setting.seed, "quick": setting.quick}
    with theme():
        picture = save_figure(FIGURES[name](table), name, folder, {**about, "rows": len(table), "specs": specs})
    return [rows, picture]
