"""What is kept of an experiment and of the main job: tables, figures, findings in words."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from matplotlib.figure import Figure

from dfrot_lab.disk import artefacts, atomic, provenance, row_files
from dfrot_lab.maths import tables
from dfrot_lab.model import loading
from dfrot_lab.model.public import public
from dfrot_lab.observe import errors, massive
from dfrot_lab.recipe.base import strict_json
from dfrot_lab.recipe.keys import FORMULAS
from dfrot_lab.recipe.specs import DEFAULT_MODEL, Recipe
from dfrot_lab.score import perplexity
from dfrot_lab.show import figures
from dfrot_lab.show.experiment_figures import FIGURES
from dfrot_lab.show.theme import visible
from dfrot_lab.study import experiments
from dfrot_lab.study.main import MainResult, named
from dfrot_lab.study.setting import Setting, figure_site

log = logging.getLogger(__name__)
QUESTION = ".setting.yaml"  # the ending of what says, beside a table, which question it answers
SMALL = 5000  # rows up to which an experiment's table is kept as JSON lines, to be compared; above: Parquet


def save_experiment(
    name: str, table: pd.DataFrame, setting: Setting, at: Path, pictures: Path,
    store: artefacts.Store | None = None,
) -> list[Path]:  # fmt: skip
    """Write an experiment's table into `at`, its rows' recipes beside it, its figure into `pictures`."""
    is_small = len(table) <= SMALL
    kept = at / f"{_stem(name, setting)}.{'jsonl' if is_small else 'parquet'}"
    row_files.replace(kept, row_files.rows(table)) if is_small else row_files.write_table(table, kept)
    about = {"experiment": name, "quick": setting.quick, "device": loading.device_name(), "rows": len(table)}
    about |= {"models": list(dict.fromkeys(table["model"]))} if name == "compare" else {}
    about["recipes"] = sorted(set(table["recipe"].dropna())) if "recipe" in table else []
    written = [kept, _save_question(name, setting, kept)]
    if about["recipes"]:
        found = {recipe.key: recipe for recipe in _evaluated(store or artefacts.Store())}
        asked = [found[key] for key in table["recipe"].dropna().unique() if key in found]
        written.append(row_files.save_recipes(kept, asked))
    with figures.theme():
        return [*written, _save_figure(FIGURES[name](table), name, pictures, setting, about)]


def _evaluated(store: artefacts.Store) -> Iterator[Recipe]:
    """The recipes, as they may be shown, of all evaluations in a store; one of another version of the package
    that this one cannot read is left out."""
    for each in store.list():
        if each.kind == perplexity.KIND:
            with suppress(ValueError):
                yield public(Recipe.of(each.json("recipe")))


def _stem(name: str, setting: Setting) -> str:
    """What the table of an experiment is called: by the text, and by what is not the default."""
    model = setting.model.source
    others = [Path(model).name] if model != DEFAULT_MODEL else []
    others += [Path(setting.calibration).stem] if setting.calibration else []
    return "-".join([name, Path(setting.corpus).stem, *others, *(["quick"] if setting.quick else [])])


def table(name: str, setting: Setting, root: Path) -> pd.DataFrame:
    """The experiment's table: the one kept under `root` if it answers this very question, else computed."""
    kept = root / f"data/results/{_stem(name, setting)}.jsonl"
    beside = kept.with_suffix(QUESTION)
    said = yaml.safe_load(beside.read_text(encoding="utf-8")) if beside.is_file() and kept.is_file() else {}
    if {part: said.get(part) for part in _question(name, setting)} != _question(name, setting):
        return experiments.run(name, setting)
    log.info("%s: read from %s, computed on %s", name, kept.name, said["device"])
    return row_files.load(kept)


def _save_question(name: str, setting: Setting, kept: Path) -> Path:
    """Write beside a table what it answers, and where it was computed: as YAML."""
    said = _question(name, setting) | {"device": loading.device_name()}
    atomic.write_text(beside := kept.with_suffix(QUESTION), yaml.safe_dump(said, sort_keys=False))
    return beside


def _save_figure(fig: Figure, name: str, folder: Path, setting: Setting, about: dict[str, Any]) -> Path:
    """Write and close a figure: `<name>.png` (returned), `.svg`, `.json` (what it is made from, versions)."""
    folder.mkdir(parents=True, exist_ok=True)
    for ending, unsaid in (("png", "Software"), ("svg", "Date")):
        with atomic.replacing(folder / f"{name}.{ending}") as temporary:
            fig.savefig(temporary, format=ending, metadata={unsaid: None})
    figures.plt.close(fig)
    own = {"figure": name, **named(setting), "seed": setting.seed}
    versions = {
        each: provenance.version_of(each) for each in ("dfrot-lab", "torch", "transformers", "matplotlib")
    }
    said = {**own, **about, "versions": versions, "commit": provenance.commit()}
    atomic.write_text(folder / f"{name}.json", strict_json(said) + "\n")
    return folder / f"{name}.png"


def _question(name: str, setting: Setting) -> dict[str, Any]:
    """The experiment, the formulas, its own setting as plain values, whatever the device: a question that was
    answered is not asked again."""
    own = experiments.setting_of(name, setting)
    said = public(own.with_(model=loading.placed(own.model).with_(device="auto"))).plain()
    return {"experiment": name, "formulas": FORMULAS, "setting": said}


def main_figures(result: MainResult, wide: pd.DataFrame) -> dict[str, tuple[Figure, dict[str, Any]]]:
    """The main figures that can be drawn, each with what it is made from; `wide`: errors at their site."""
    recorded, refine, site = result.capture, result.setting.refine, figure_site(result.capture.sites)
    token = recorded.largest(site)
    values = errors.massive_values(recorded, site, token, result.matrices, refine.quantizer)
    across = 2 if result.refinement else 1
    residual, axes = figures.plt.subplots(1, across, figsize=(5.1 * across, 3.6), squeeze=False)
    figures.plot_residual(recorded.residual_max, recorded.residual_median, ax=axes[0, 0])
    if result.refinement:
        figures.plot_history(result.refinement.history, ax=axes[0, 1])
    drawn: dict[str, tuple[Figure, dict[str, Any]]] = {
        "residual-and-refinement": (residual, {"refine": public(refine).to_dict()}),
        "token-errors": (figures.figure_errors(wide), {"site": site, "rows": len(wide)}),
        "massive-token-values": (figures.figure_massive_token(values), {"site": site, "token": token}),
    }
    if "bits" in result.table and set(result.table["bits"]) - {"16-16-16"}:
        made_from = {"rows": sorted(set(result.table["recipe"]))}
        drawn["perplexity"] = (figures.figure_perplexity(result.table), made_from)
    return drawn


def save(result: MainResult, table: Path, pictures: Path) -> list[Path]:
    """Write the main job's rows to `table`, recipes and comparison beside it, its figures to `pictures`."""
    recipes = [public(found.spec) for found in result.found.values()]
    written = [*row_files.save(table, result.table, recipes), _save_question("main", result.setting, table)]
    return written + save_pictures(result, pictures)


def save_pictures(result: MainResult, pictures: Path) -> list[Path]:
    """Write the figures that can be drawn of the main job, as far as it has come, to `pictures`."""
    written = list[Path]()
    about = {"capture": result.capture.key, "quantizer": result.setting.refine.quantizer.name}
    with figures.theme():
        drawn = main_figures(result, result.errors([figure_site(result.capture.sites)]))
        for name, (fig, extra) in drawn.items():
            written.append(_save_figure(fig, name, pictures, result.setting, about | extra))
    return written


def massive_table(result: MainResult) -> pd.DataFrame:
    """The massive tokens by any rule, most extreme first."""
    return massive.table(result.capture).sort_values("residual_max", ascending=False, ignore_index=True)


def most_massive(table: pd.DataFrame) -> str:
    """The first token of `massive_table` in a sentence."""
    if table.empty:
        return "No token of the first calibration window is massive by any rule."
    head = table.iloc[0]
    reaches = f"\u2018{visible(head['text'])}\u2019, reaches {head['residual_max']:,.0f}"
    where = f"channel {head['channel']} of the residual stream at {head['site']}"
    return f"The most massive token, {reaches} in {where}, {head['ratio_to_median']:,.0f} times the median."


def differences(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Captions and tables of KL divergence, and of the comparisons: with interval and verdict."""
    names = [name for name in table["metric"].unique() if name not in (tables.PERPLEXITY, tables.AGREEMENT)]
    shown = [(name, tables.comparison(table, name)) for name in names]
    return [(caption[0].upper() + caption[1:], frame) for caption, frame in shown if not frame.empty]


def resolution(table: pd.DataFrame) -> str:
    """What the comparisons of a table would have found, in a sentence; empty where there is no interval."""
    rows = table[table["metric"].str.endswith("%") & table["smallest"].notna()] if len(table) else table
    if rows.empty:
        return ""
    entries: list[Any] = rows.to_dict("records")
    said = [
        f"{tables.label(row)} {tables.against(row['metric'])} at {tables.bits_of(row)} {row['smallest']:.1f}%"
        for row in entries
    ]
    start = f"The smallest change that these {rows['builds'].max()} builds find four times of five"
    return f"{start}: {'; '.join(said)}."


def report(result: MainResult) -> str:
    """The main job's findings as text: the most massive token, the table, comparisons, what they can see."""
    setting, bits = result.setting, "bits are weights-activations-KV cache"
    text = (
        f"{setting.corpus}, {setting.builds} builds of {setting.windows} windows of {setting.window} tokens"
    )
    text += ", with the 95% interval"
    shown = [(f"Perplexity on {text}; {bits}", tables.comparison(result.table)), *differences(result.table)]
    parts = [f"{caption}:\n{frame.to_string()}" for caption, frame in shown]
    parts = [most_massive(massive_table(result)), *parts, resolution(result.table)]
    return "\n\n".join(filter(None, parts)) + "\n"
