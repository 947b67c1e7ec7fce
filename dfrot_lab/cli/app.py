"""The command line: every step of the notebooks as one command, which imports what is heavy itself."""

import logging
import shutil
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from dfrot_lab.cli import cache
from dfrot_lab.cli.options import BITS, MANY, RECIPE, ROTATION, SCORED, SOURCES, Options, app, command, log
from dfrot_lab.model.malloc import keep_freed_memory
from dfrot_lab.recipe import grids, specs
from dfrot_lab.recipe.base import require_file

MODELS = f"Two or more, with commas between, each: {SOURCES}"
SCHEME = f"The quantizer's range, or float format: {', '.join((*grids.SCHEMES, *grids.BLOCK_FLOATS))}."
VARIANT = f"{', '.join(specs.REFINE_VARIANTS)}."
YES = "Go on where the estimate says that memory or disk will not do."
DRY_RUN = "Only say what it would take; --model may also be llama-2-7b or llama-3-70b."
app.add_typer(cache.group, name="cache")


@app.callback()
def _setup(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False) -> None:
    """See, prove and use what rotation does to 4-bit language models (DFRot, arXiv 2412.00648)."""
    try:
        Path.cwd()
    except OSError as error:  # torch would end the process
        raise OSError(error.errno, "the current folder is not there any more: cd to one that is") from None
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    keep_freed_memory()


@command("run", f"{MANY} gamma rule")
def run(
    said: Options, dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN)] = False,
    yes: Annotated[bool, typer.Option("--yes", help=YES)] = False,
) -> None:  # fmt: skip
    """The main job: capture, refine, a table of NR, RO, RH, DFRot with keep-out rows, and figures.

    What is finished is kept: after Ctrl-C the same command goes on. --out: folder (runs/<date>/)."""
    from dfrot_lab.disk.atomic import cache_dir
    from dfrot_lab.model import loading, shapes
    from dfrot_lab.study import cost, main, needs

    setting, name = said.setting(), said.model
    recipes = main.recipes(main.rows_by_build(main.rows, setting))
    if dry_run:
        shape, machines = shapes.shape(setting.model), [cost.measure_machine(), cost.GPU_80GB]
        tables = {machine.name: cost.estimate(shape, machine, recipes) for machine in machines}
        rows = [(machine, row) for machine, table in tables.items() for row in table.to_dict("records")]
        about, own = needs.describe(name, shape, machines, recipes), {"rotations": needs.hadamards(shape)}
        return said.show([{"model": name, "machine": machine, **row, **own} for machine, row in rows], about)
    loading.resolve(setting.model)  # a name that only a dry run takes is refused before anything else
    free = shutil.disk_usage(cache_dir()).free
    if not yes and (lack := needs.shortage(shapes.shape(setting.model), recipes, setting.window, free)):
        raise ValueError(f"{lack}: see --dry-run, or go on all the same with --yes")
    from dfrot_lab.disk import row_files
    from dfrot_lab.show import gallery  # loads what draws: a dry run needs none of it

    folder = said.out or Path("runs") / f"{datetime.now():%Y-%m-%d}"
    folder.mkdir(parents=True, exist_ok=True)
    _log_into(folder / "log.txt")

    def show_first(ready: main.MainResult) -> None:
        row_files.write_table(gallery.massive_table(ready), folder / "massive-tokens.csv")
        log.info("first pictures: %s", ", ".join(map(str, gallery.save_pictures(ready, folder / "figures"))))

    result = main.run(setting, on_ready=show_first)
    gallery.save(result, folder / "rows.jsonl", folder / "figures")
    text = f"\n{gallery.report(result)}\nRows, recipes, table, figures and log: {folder}/"
    return said.show(row_files.rows(result.table), text)


def _log_into(path: Path) -> None:
    require_file("the log", path, or_none=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)


@command("experiment", MANY)
def experiment(
    said: Options, name: Annotated[str, typer.Argument(help="Which one; without it they are listed.")] = "",
    limit: Annotated[int, typer.Option(help="Items of each zero-shot task; 0 takes all.", min=0)] = 100,
    quick: Annotated[bool, typer.Option("--quick", help="A few short windows, to see it work.")] = False,
) -> None:  # fmt: skip
    """One of the paper's tables or figures by name; a stopped one goes on. --out: runs/experiments/."""
    from dfrot_lab.show import gallery
    from dfrot_lab.study import experiments

    if not name:
        return said.show_table(experiments.listing(), {})
    setting = said.setting(limit=limit or None).resolved()
    setting = said.quickened(setting) if quick else setting
    out = said.out or Path("runs") / "experiments"
    if name in experiments.EXPERIMENTS:
        out.mkdir(parents=True, exist_ok=True)  # what cannot be written to is refused before hours of work
    table = experiments.run(name, setting)
    written = gallery.save_experiment(name, table, setting, out, out / Path(setting.corpus).stem)
    hidden = ("recipe", "key", "commit", "model", "corpus", "versions", "formulas", "parameters")
    shown = [column for column in table if column not in hidden and table[column].notna().any()]
    return said.show_table(table if said.as_json else table[shown], {"written": ", ".join(map(str, written))})


@command("compare", MANY.removeprefix("model ") + " gamma rule")
def compare_command(said: Options, models: Annotated[str, typer.Option(help=MODELS)]) -> None:
    """Models side by side: massive tokens, errors, RO - RH, keep-out, what each kind of site costs.

    What is finished is kept: the same command goes on. --out: folder (runs/compare/<models>/)."""
    from dfrot_lab.disk import row_files
    from dfrot_lab.show import gallery
    from dfrot_lab.study import compare

    names, setting = [name.strip() for name in models.split(",")], said.setting().resolved()
    out = said.out or Path("runs", "compare", "-".join(Path(name).name for name in names))
    out.mkdir(parents=True, exist_ok=True)
    table = compare.compare(names, setting)
    written = gallery.save_experiment("compare", table, setting, out, out)
    text = f"{compare.side_by_side(table).to_string()}\n\nwritten: {', '.join(map(str, written))}"
    said.show({"written": written, "rows": row_files.rows(table)}, text)


@command("figures", "model corpus seed out as_json windows builds dtype workers scheduler")
def figures(said: Options) -> None:
    """Rewrite the committed figures/ and data/results/: the main job's and every experiment's.

    What is neither stored nor in data/results/evaluations/ is computed: hours, resumable. --out: another
    folder for both."""
    from dfrot_lab.disk.artefacts import Store
    from dfrot_lab.score import exchange
    from dfrot_lab.show import gallery
    from dfrot_lab.study import experiments, main

    root, setting = said.out or Path(), said.setting().resolved()
    tables, pictures = root / "data" / "results", root / "figures" / setting.corpus
    if (kept := tables / "evaluations").is_dir():
        log.info("%d evaluations taken from %s", exchange.read(kept, Store()), kept)
    written = gallery.save(main.run(setting), tables / f"main-{setting.corpus}.jsonl", pictures)
    for name in experiments.EXPERIMENTS:
        if name != "main":
            table = experiments.run(name, setting)
            written += gallery.save_experiment(name, table, setting, tables, pictures)
    said.show(written, "\n".join(map(str, written)))


@command("report", "model corpus calibration seed out as_json windows builds window gamma rule dtype")
def report_command(said: Options) -> None:
    """One HTML file to send to a colleague: the main job's results for --model, nothing from the network.

    --out: default report.html, in a folder that is there. Shown is what is stored; the capture alone is
    computed if it is missing, and rows that are not stored are named with the command that computes them."""
    from dfrot_lab.disk.atomic import write_text
    from dfrot_lab.show import report
    from dfrot_lab.study import main

    path = said.file("report.html")
    if not path.parent.is_dir():
        need = f"--out must be in a folder that is there; got {path}."
        raise ValueError(f"{need} Make the folder {path.parent} first")
    findings = report.collect(said.setting())
    write_text(path, report.page(report.values(findings)))
    missing = [main.row_name(spec) for spec in findings.missing]
    about: dict[str, Any] = {"out": path, "bytes": path.stat().st_size, "rows not stored": missing}
    about["which this computes"] = report.command(findings.result.setting) if missing else None
    said.show_facts(about)


@command("capture", "model corpus out as_json tokens dtype")
def capture_command(said: Options) -> None:
    """Record norms' outputs, find massive tokens by all rules. --out: their table, .csv, .parquet, .json."""
    from dfrot_lab.observe import capture, massive

    said.require_table()
    recorded = capture.capture(said.capture)
    massive.warn(recorded, specs.DEFAULT_RULE)
    table = massive.table(recorded).sort_values("residual_max", ascending=False)
    about = {"key": recorded.key, "sites": len(recorded.sites), "tokens": recorded.tokens}
    said.show_table(table, {**about, "folder": recorded.artefact.path}, table)


@command("errors", "model corpus seed out as_json tokens rule dtype")
def errors_command(
    said: Options, bits: Annotated[int, typer.Option(help="Bits of the quantizer.")] = 4,
    scheme: Annotated[str, typer.Option(help=SCHEME)] = "symmetric",
) -> None:  # fmt: skip
    """Per-token quantization error under NR, RO and RH at every site: a summary. --out: the whole table."""
    from dfrot_lab.observe import capture, errors

    said.require_table()
    quantizer, recorded = grids.of_scheme(scheme, bits), capture.capture(said.capture)
    rotations = errors.default_rotations(recorded.channels, said.seed)
    table = errors.token_errors(recorded, rotations, [quantizer], rule=said.rule)
    said.show_table(errors.summary(table), {"rows": len(table), "out": said.out}, table)


@command("refine", "model corpus seed out as_json tokens gamma rule dtype")
def refine(
    said: Options, init: Annotated[str, typer.Option(help="Rotation to start from: RH or RO.")] = "RH",
    steps: Annotated[int, typer.Option(help="Steps.")] = 100,
    variant: Annotated[str, typer.Option(help=VARIANT)] = specs.REFINE_VARIANTS[0],
) -> None:  # fmt: skip
    """Refine R1 (DFRot) and save it as safetensors with its spec. --out: default R1.safetensors."""
    from dfrot_lab.disk import rotation_files
    from dfrot_lab.model.public import public
    from dfrot_lab.rotate.dfrot import refined

    path = said.file("R1.safetensors", ".safetensors")
    fields: dict[str, Any] = {"init": specs.RotationSpec(kind=init, seed=said.seed), "steps": steps}
    fields |= {"quantizer": grids.QuantSpec()} if variant == "as_released" else {}
    spec = said.rotation("DFRot", variant=variant, **fields)
    result = refined(spec)
    rotation_files.save(result.R, path, public(spec))
    said.show_table(result.history.iloc[[0, -1]], {"out": path, "spec": spec.key})


@command("evaluate", SCORED)
def evaluate_command(
    said: Options, context: typer.Context, rotation: Annotated[str, typer.Option(help=ROTATION)] = "RH",
    bits: Annotated[str, typer.Option(help=BITS)] = "4-4-16",
    keep_out: Annotated[bool, typer.Option("--keep-out", help="Massive tokens pass unquantised.")] = False,
    recipe: Annotated[Path | None, typer.Option(help=RECIPE)] = None,
) -> None:  # fmt: skip
    """Perplexity of a rotation at given bits, or of a recipe. --out: .jsonl to add to; recipe beside it."""
    from dfrot_lab.disk import atomic, row_files
    from dfrot_lab.maths import tables
    from dfrot_lab.model.public import public
    from dfrot_lab.score import perplexity, rows

    spec = said.whole_recipe(context, recipe, rotation, bits)
    spec = spec.with_(keep_out=specs.RELEASED_KEEP_OUT) if keep_out else spec
    if path := said.out and said.file("rows.jsonl", row_files.ROWS):
        row_files.require_rows(path)
    result = perplexity.evaluate(spec)
    found = rows.rows([result])
    row = found[0]
    if path:
        row_files.append(path, found)
        beside = path.with_name(f"{path.stem}.{row['recipe']}.yaml")
        atomic.write_text(beside, public(result.spec).to_yaml())
    about = f"{tables.label(row)} {row['bits']} on {row['corpus']}: perplexity {tables.cell(row)}"
    more = ", ".join(f"{each['metric']} {tables.cell(each)}" for each in found[1:])
    said.show(
        row | {each["metric"]: each["value"] for each in found[1:]},
        f"{about}, {more}; {row['windows']} windows",
    )


@command("recipe", SCORED.replace("as_json ", ""))
def recipe_command(
    said: Options,
    rotation: Annotated[str, typer.Argument(help="A row such as RO, or a safetensors file with R1.")] = "RH",
    bits: Annotated[str, typer.Argument(help=BITS)] = "4-4-16",
) -> None:
    """A recipe as YAML, every field said: to keep, to change, to evaluate with `evaluate --recipe`."""
    text = said.recipe(rotation, bits).to_yaml()
    if said.out:
        said.file("recipe.yaml").write_text(text, encoding="utf-8")
    typer.echo(f"written: {said.out}" if said.out else text, nl=bool(said.out))


from dfrot_lab.cli import export, here, leaderboard  # noqa: E402, F401 their commands come last
