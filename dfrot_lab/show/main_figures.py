"""The main job's figures and its findings in words."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from dfrot_lab.disk import row_files
from dfrot_lab.maths import tables
from dfrot_lab.observe import errors, massive
from dfrot_lab.observe.capture import Capture
from dfrot_lab.score import rows
from dfrot_lab.show import figures
from dfrot_lab.study.main import MainResult
from dfrot_lab.study.setting import FIGURE_LAYER


def error_site(recorded: Capture) -> str:
    """The site the main figures show: layer 15's input norm, or the middle layer's where there are fewer."""
    wanted = f"layers.{FIGURE_LAYER}.input_norm"
    return wanted if wanted in recorded.sites else recorded.sites[len(recorded.sites) // 4 * 2]


def save_main(result: MainResult, folder: Path) -> list[Path]:
    """Draw the main figures into `folder`: residual stream, errors, the massive token, refinement,
    perplexity. Returns the PNGs.
    """
    about = {
        "model": result.setting.model.source,
        "corpus": result.setting.corpus,
        "seed": result.setting.seed,
        "capture": result.capture.key,
        "quantizer": result.setting.refine.quantizer.name,
    }
    with figures.theme():
        drawn = main_figures(result, error_table(result))
        return [
            figures.save_figure(fig, name, folder, {**about, **extra}) for name, (fig, extra) in drawn.items()
        ]


def main_matrices(result: MainResult) -> dict[str, Tensor]:
    """NR, RO, RH and, where there is a refinement, DFRot: float64 (channels, channels) each."""
    refined_too = {} if result.refinement is None else {"DFRot": result.refinement.R}
    return {**errors.default_rotations(result.capture.channels, result.setting.seed), **refined_too}


def error_table(result: MainResult) -> pd.DataFrame:
    """Each token's error at the main figures' site, a column a rotation, by the evaluation's and the
    refinement's own quantizer.
    """
    site = error_site(result.capture)
    matrices, quantizers = main_matrices(result), [result.setting.refine.quantizer]
    rule = result.setting.rule
    return errors.wide(errors.token_errors(result.capture, matrices, quantizers, sites=[site], rule=rule))


def main_figures(result: MainResult, wide: pd.DataFrame) -> dict[str, tuple[Figure, dict[str, Any]]]:
    """The main figures by name, each with what it was made from; without refinement or rows their pictures
    are left out. Draw inside `theme`.
    """
    recorded, quantizer, site = result.capture, result.setting.refine.quantizer, error_site(result.capture)
    token = int(recorded.residual_max[recorded.sites.index(site)].argmax())
    values = errors.massive_values(recorded, site, token, main_matrices(result), quantizer)
    refined_too = result.refinement is not None
    residual, axes = figures.plt.subplots(
        1, 1 + refined_too, figsize=(10 if refined_too else 5.2, 3.6), squeeze=False
    )
    figures.plot_residual(recorded.residual_max, recorded.residual_median, ax=axes[0, 0])
    if result.refinement is not None:
        figures.plot_history(result.refinement.history, ax=axes[0, 1])
    drawn: dict[str, tuple[Figure, dict[str, Any]]] = {
        "residual-and-refinement": (residual, {"refine": result.setting.refine.to_dict()}),
        "token-errors": (figures.figure_errors(wide), {"site": site, "rows": len(wide)}),
        "massive-token-values": (figures.figure_massive_token(values), {"site": site, "token": token}),
    }
    if any(tables.label(row) != "full precision" for row in tables.records(result.table)):
        drawn["perplexity"] = (
            figures.figure_perplexity(result.table),
            {"rows": sorted(set(result.table["recipe"]))},
        )
    return drawn


def save_run(result: MainResult, folder: Path) -> None:
    """Write rows.jsonl, rows.md, massive-tokens.csv and figures/ of the main job into `folder`."""
    row_files.write_table(massive_table(result), folder / "massive-tokens.csv")
    save(result, folder / "rows.jsonl", folder / "figures")


def save(result: MainResult, table: Path, pictures: Path) -> list[Path]:
    """Write the rows to `table`, their recipes and comparison beside it, the main figures to `pictures`."""
    written = row_files.save(table, result.table, rows.recipes(result.found.values()))
    return [*written, *save_main(result, pictures)]


def report(result: MainResult) -> str:
    """The main job's findings as text: the most massive token, the table, the paired differences, RO - RH
    seed by seed.
    """
    setting, table = result.setting, result.table
    head = massive_table(result).head(1).to_dict("records")[0]
    parts = [
        f"The most massive token: {head['text']!r} at {head['site']}, |{head['residual_max']:,.0f}| in channel {head['channel']}, "
        f"{head['ratio_to_median']:,.0f} times the median.",
        f"Perplexity on {setting.corpus}, {setting.windows} windows of 2048 tokens, with the 95% interval over windows;\n"
        "bits are weights-activations-KV:",
        tables.comparison(table).to_string(),
        "On the same windows, the difference and its paired 95% interval:",
    ]
    for metric in dict.fromkeys(table["metric"]):
        if metric != tables.PERPLEXITY:
            parts.append(f"{metric}\n{tables.comparison(table, metric).to_string()}")
    parts.append(f"RO - RH, each random seed on its own:\n{tables.by_seed(table).to_string()}")
    return "\n\n".join(parts) + "\n"


def massive_table(result: MainResult) -> pd.DataFrame:
    """The massive tokens by any rule, most extreme first."""
    return massive.table(result.capture).sort_values("residual_max", ascending=False, ignore_index=True)
