"""The main job's figures and its findings in words."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from dfrot_lab.disk import row_files
from dfrot_lab.maths import tables
from dfrot_lab.observe import errors, massive
from dfrot_lab.score import rows
from dfrot_lab.show import figures
from dfrot_lab.show.markup import visible
from dfrot_lab.show.theme import save_figure
from dfrot_lab.study.main import MainResult
from dfrot_lab.study.setting import figure_site


def main_matrices(result: MainResult) -> dict[str, Tensor]:
    """NR, RO, RH and, where there is a refinement, DFRot: float64 (channels, channels) each."""
    refined_too = {} if result.refinement is None else {"DFRot": result.refinement.R}
    return {**errors.default_rotations(result.capture.channels, result.setting.seed), **refined_too}


def error_table(result: MainResult) -> pd.DataFrame:
    """Each token's error at the main figures' site, a column a rotation, by the evaluation's and the
    refinement's own quantizer; massive by the setting's rule.
    """
    setting, sites = result.setting, [figure_site(result.capture.sites)]
    rule, quantizers = setting.rule, [setting.refine.quantizer]
    return errors.wide(
        errors.token_errors(result.capture, main_matrices(result), quantizers, sites=sites, rule=rule)
    )


def main_figures(result: MainResult, wide: pd.DataFrame) -> dict[str, tuple[Figure, dict[str, Any]]]:
    """The main figures by name, each with what it was made from; without refinement or rows their pictures
    are left out. Draw inside `theme`."""
    recorded, refine = result.capture, result.setting.refine
    site = figure_site(recorded.sites)
    token = int(recorded.residual_max[recorded.sites.index(site)].argmax())
    values = errors.massive_values(recorded, site, token, main_matrices(result), refine.quantizer)
    across = 1 if result.refinement is None else 2
    residual, axes = figures.plt.subplots(1, across, figsize=(5.1 * across, 3.6), squeeze=False)
    figures.plot_residual(recorded.residual_max, recorded.residual_median, ax=axes[0, 0])
    if result.refinement is not None:
        figures.plot_history(result.refinement.history, ax=axes[0, 1])
    drawn: dict[str, tuple[Figure, dict[str, Any]]] = {
        "residual-and-refinement": (residual, {"refine": refine.to_dict()}),
        "token-errors": (figures.figure_errors(wide), {"site": site, "rows": len(wide)}),
        "massive-token-values": (figures.figure_massive_token(values), {"site": site, "token": token}),
    }
    if any(tables.label(row) != "full precision" for row in tables.records(result.table)):
        specs = sorted(set(result.table["recipe"]))
        drawn["perplexity"] = (figures.figure_perplexity(result.table), {"rows": specs})
    return drawn


def save_main(result: MainResult, folder: Path) -> list[Path]:
    """Draw the main figures into `folder`: residual stream, errors, the massive token, refinement,
    perplexity. Returns the PNGs."""
    setting = result.setting
    about = {
        "model": setting.model.source,
        "corpus": setting.corpus,
        "seed": setting.seed,
        "capture": result.capture.key,
        "quantizer": setting.refine.quantizer.name,
    }
    with figures.theme():
        drawn = main_figures(result, error_table(result))
        return [save_figure(fig, name, folder, {**about, **extra}) for name, (fig, extra) in drawn.items()]


def save_run(result: MainResult, folder: Path) -> None:
    """Write rows.jsonl, rows.md, rows.recipes.yaml, massive-tokens.csv and figures/ of the main job into
    `folder`."""
    row_files.write_table(massive_table(result), folder / "massive-tokens.csv")
    save(result, folder / "rows.jsonl", folder / "figures")


def save(result: MainResult, table: Path, pictures: Path) -> list[Path]:
    """Write the rows to `table`, their recipes and comparison beside it, the main figures to `pictures`."""
    written = row_files.save(table, result.table, rows.recipes(result.found.values()))
    return [*written, *save_main(result, pictures)]


def massive_table(result: MainResult) -> pd.DataFrame:
    """The massive tokens by any rule, most extreme first."""
    return massive.table(result.capture).sort_values("residual_max", ascending=False, ignore_index=True)


def most_massive(table: pd.DataFrame) -> str:
    """The first token of `massive_table` in a sentence."""
    if table.empty:
        return "No token of the first calibration window is massive by any rule."
    head = table.iloc[0]
    return (
        f"The most massive token, \u2018{visible(head['text'])}\u2019, reaches {head['residual_max']:,.0f} "
        f"in channel {head['channel']} of the residual stream at {head['site']}, "
        f"{head['ratio_to_median']:,.0f} times the median."
    )


def differences(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Captions and tables of the paired differences, and of RO - RH seed by seed, where there are any."""
    metrics = [name for name in dict.fromkeys(table["metric"]) if name != tables.PERPLEXITY]
    said = "{} on the same windows, with the paired 95% interval"
    shown = [(said.format(name), tables.comparison(table, name)) for name in metrics]
    shown.append(("RO - RH, each random seed on its own", tables.by_seed(table).rename_axis("bits")))
    return [(caption, frame) for caption, frame in shown if not frame.empty]


def report(result: MainResult) -> str:
    """The main job's findings as text: the most massive token, the table, the paired differences, RO - RH
    seed by seed."""
    setting, table = result.setting, result.table
    said = (
        f"Perplexity on {setting.corpus}, {setting.windows} windows of {setting.window} tokens, with the "
        "95% interval; bits are weights-activations-KV cache"
    )
    shown = [(said, tables.comparison(table)), *differences(table)]
    parts = [f"{caption}:\n{frame.to_string()}" for caption, frame in shown]
    return "\n\n".join([most_massive(massive_table(result)), *parts]) + "\n"
