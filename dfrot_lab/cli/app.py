"""The command line: every step of the notebooks as one command. Heavy imports happen inside the commands, so
that `--help` is instant."""

import logging
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfrot_lab.cli.options import (
    Corpus,
    DryRun,
    Dtype,
    Gamma,
    Json,
    Model,
    Out,
    Rule,
    Seed,
    Windows,
    app,
    clear_errors,
    log,
    set_up,
)
from dfrot_lab.cli.output import show_facts, show_json, show_table
from dfrot_lab.recipe.specs import DEFAULT_MODEL, DEFAULT_RULE, ModelSpec

if TYPE_CHECKING:
    from dfrot_lab.study.setting import Setting

__all__ = ["app"]


@app.callback()
def _setup(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False) -> None:
    """See, prove and use what rotation does to 4-bit language models (DFRot, arXiv 2412.00648)."""
    set_up(verbose)


@app.command()
def run(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None,
    as_json: Json = False,
    windows: Windows = 6, gamma: Gamma = 100.0, rule: Rule = DEFAULT_RULE, dry_run: DryRun = False,
    dtype: Dtype = "float32",
) -> None:  # fmt: skip
    """The main job: capture, refine, GPTQ, and a table of NR, RO, RH and DFRot at 16-4-16, 4-4-16 and 4-4-4,
    with keep-out rows and figures.

    Everything is kept as it is finished: Ctrl-C and the same command goes on. Results go to --out (default:
    runs/<date>/)."""
    from dfrot_lab.disk import row_files
    from dfrot_lab.show import gallery
    from dfrot_lab.study import main
    from dfrot_lab.study.setting import Setting

    with clear_errors():
        spec = ModelSpec(source=model, dtype=dtype)
        setting = Setting(model=spec, corpus=corpus, seed=seed, windows=windows, gamma=gamma, rule=rule)
        if dry_run:
            _dry_run(setting, as_json)
            return
        folder = out or Path("runs") / f"{datetime.now():%Y-%m-%d}"
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        result = main.run(setting)
        row_files.write_table(gallery.massive_table(result), folder / "massive-tokens.csv")
        gallery.save(result, folder / "rows.jsonl", folder / "figures")
        if as_json:
            show_json(row_files.rows(result.table))
        else:
            typer.echo(f"\n{gallery.report(result)}\nRows, recipes, table, figures and log: {folder}/")


def _dry_run(setting: "Setting", as_json: bool) -> None:
    from dfrot_lab.study import cost, main, shapes

    shape, machines = shapes.shape(setting.model), [cost.measure_machine(), cost.GPU_80GB]
    recipes, name = [row.spec for row in main.rows(setting)], setting.model.source
    if not as_json:
        typer.echo(cost.describe(name, shape, machines, recipes))
        return
    tables = {machine.name: cost.estimate(shape, machine, recipes) for machine in machines}
    rows = [(machine, row) for machine, table in tables.items() for row in table.to_dict("records")]
    show_json([{"model": name, "machine": machine, **row} for machine, row in rows])


@app.command("experiment")
def experiment_command(
    name: Annotated[str, typer.Argument(help="Which experiment; without it they are listed.")] = "",
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None,
    as_json: Json = False,
    windows: Windows = 6,
    limit: Annotated[int, typer.Option(help="Items of each zero-shot task; 0 takes all.", min=0)] = 100,
    quick: Annotated[bool, typer.Option("--quick", help="A few short windows, to see it work.")] = False,
) -> None:  # fmt: skip
    """One of the paper's tables or figures by name, row by row; a stopped one goes on. --out: folder
    (default: runs/experiments/)."""
    from dfrot_lab.show import gallery
    from dfrot_lab.study import experiments
    from dfrot_lab.study.setting import QUICK, Setting

    with clear_errors():
        if not name:
            show_table(experiments.listing(), None, as_json, {})
            return
        spec = ModelSpec(source=model)
        setting = Setting(
            model=spec, corpus=corpus, seed=seed, windows=windows, limit=limit or None
        ).resolved()
        setting = setting.with_(**QUICK) if quick else setting
        table = experiments.run(name, setting)
        written = gallery.save_experiment(name, table, setting, *[out or Path("runs") / "experiments"] * 2)
        hidden = ("recipe", "commit", "model", "corpus", "versions", "formulas", "parameters")
        shown = [column for column in table if column not in hidden and table[column].notna().any()]
        show_table(table if as_json else table[shown], None, as_json, {"written": list(map(str, written))})


@app.command("figures")
def figures_command(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None,
    as_json: Json = False,
    windows: Windows = 6,
) -> None:  # fmt: skip
    """Rewrite the committed figures/ and data/results/: the main job's and every experiment's. What is not
    stored is computed: hours, resumable.

    --out: another folder for both."""
    from dfrot_lab.show import gallery
    from dfrot_lab.study import experiments, main
    from dfrot_lab.study.setting import Setting

    with clear_errors():
        root = out or Path()
        setting = Setting(model=ModelSpec(source=model), corpus=corpus, seed=seed, windows=windows).resolved()
        tables, pictures = root / "data" / "results", root / "figures" / setting.corpus
        written = gallery.save(main.run(setting), tables / f"main-{setting.corpus}.jsonl", pictures)
        for name in experiments.EXPERIMENTS:
            if name != "main":
                written += gallery.save_experiment(
                    name, experiments.run(name, setting), setting, tables, pictures
                )
        show_json(written) if as_json else typer.echo("\n".join(map(str, written)))


@app.command("report")
def report_command(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None,
    as_json: Json = False,
    windows: Windows = 6, gamma: Gamma = 100.0, rule: Rule = DEFAULT_RULE, dtype: Dtype = "float32",
) -> None:  # fmt: skip
    """One HTML file to send to a colleague: the main job's results for --model, figures inside, nothing
    loaded from the network.

    --out: default report.html, in a folder that is there. Shown is what is stored; the capture alone is
    computed if it is missing, and rows that are not stored are named with the command that computes them."""
    from dfrot_lab.show import report
    from dfrot_lab.study import main
    from dfrot_lab.study.setting import Setting

    with clear_errors():
        path, spec = report.check_out(out or Path("report.html")), ModelSpec(source=model, dtype=dtype)
        setting = Setting(model=spec, corpus=corpus, seed=seed, windows=windows, gamma=gamma, rule=rule)
        findings = report.collect(setting)
        report.write(path, report.page(findings))
        missing = [main.row_name(spec) for spec in findings.missing]
        computes = report.command(findings.result.setting) if missing else None
        about = {"out": path, "bytes": path.stat().st_size, "rows not stored": missing}
        show_facts({**about, "which this computes": computes}, None, as_json)


from dfrot_lab.cli import about, steps  # noqa: E402, F401  their commands are listed after those above
