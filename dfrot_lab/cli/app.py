"""The command line: every step of the notebooks as one command, which imports what is heavy itself."""

import logging
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from dfrot_lab.cli.malloc import keep_freed_memory
from dfrot_lab.cli.options import Options, app, command, log, show_facts, show_json, show_table

__all__ = ["app"]

DRY_RUN = "Only say what it would take; --model may also be llama-2-7b or llama-3-70b."


@app.callback()
def _setup(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False) -> None:
    """See, prove and use what rotation does to 4-bit language models (DFRot, arXiv 2412.00648)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    keep_freed_memory()


@command("run", "model corpus seed out as_json windows gamma rule dtype")
def run(said: Options, dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN)] = False) -> None:
    """The main job: capture, refine, GPTQ, and a table of NR, RO, RH and DFRot at 16-4-16, 4-4-16 and 4-4-4,
    with keep-out rows and figures.

    Everything is kept as it is finished: Ctrl-C and the same command goes on. Results go to --out (default:
    runs/<date>/)."""
    from dfrot_lab.disk import row_files
    from dfrot_lab.show import main_figures
    from dfrot_lab.study import main

    setting = said.setting()
    if dry_run:
        _dry_run(setting, said.as_json)
        return
    folder = said.out or Path("runs") / f"{datetime.now():%Y-%m-%d}"
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    result = main.run(setting)
    main_figures.save_run(result, folder)
    if said.as_json:
        show_json(row_files.rows(result.table))
    else:
        typer.echo(f"\n{main_figures.report(result)}\nRows, recipes, table, figures and log: {folder}/")


def _dry_run(setting: Any, as_json: bool) -> None:
    from dfrot_lab.study import cost, main, shapes

    shape, machines = shapes.shape(setting.model), [cost.measure_machine(), cost.GPU_80GB]
    recipes, name = [row.spec for row in main.rows(setting)], setting.model.source
    if not as_json:
        typer.echo(cost.describe(name, shape, machines, recipes))
        return
    tables = {machine.name: cost.estimate(shape, machine, recipes) for machine in machines}
    rows = [(machine, row) for machine, table in tables.items() for row in table.to_dict("records")]
    show_json([{"model": name, "machine": machine, **row} for machine, row in rows])


@command("experiment", "model corpus seed out as_json windows")
def experiment(
    said: Options,
    name: Annotated[str, typer.Argument(help="Which experiment; without it they are listed.")] = "",
    limit: Annotated[int, typer.Option(help="Items of each zero-shot task; 0 takes all.", min=0)] = 100,
    quick: Annotated[bool, typer.Option("--quick", help="A few short windows, to see it work.")] = False,
) -> None:
    """One of the paper's tables or figures by name, row by row; a stopped one goes on. --out: folder
    (default: runs/experiments/)."""
    from dfrot_lab.show import gallery
    from dfrot_lab.study import experiments
    from dfrot_lab.study.setting import QUICK

    if not name:
        show_table(experiments.listing(), said.as_json, {})
        return
    setting = said.setting(limit=limit or None).resolved().with_(**QUICK if quick else {})
    table = experiments.run(name, setting)
    written = gallery.save_experiment(name, table, setting, *[said.out or Path("runs") / "experiments"] * 2)
    hidden = ("recipe", "commit", "model", "corpus", "versions", "formulas", "parameters")
    shown = [column for column in table if column not in hidden and table[column].notna().any()]
    show_table(table if said.as_json else table[shown], said.as_json, {"written": list(map(str, written))})


@command("figures", "model corpus seed out as_json windows")
def figures(said: Options) -> None:
    """Rewrite the committed figures/ and data/results/: the main job's and every experiment's. What is not
    stored is computed: hours, resumable.

    --out: another folder for both."""
    from dfrot_lab.show import gallery, main_figures
    from dfrot_lab.study import experiments, main

    root, setting = said.out or Path(), said.setting().resolved()
    tables, pictures = root / "data" / "results", root / "figures" / setting.corpus
    written = main_figures.save(main.run(setting), tables / f"main-{setting.corpus}.jsonl", pictures)
    for name in experiments.EXPERIMENTS:
        if name != "main":
            table = experiments.run(name, setting)
            written += gallery.save_experiment(name, table, setting, tables, pictures)
    show_json(written) if said.as_json else typer.echo("\n".join(map(str, written)))


@command("report", "model corpus seed out as_json windows gamma rule dtype")
def report_command(said: Options) -> None:
    """One HTML file to send to a colleague: the main job's results for --model, figures inside, nothing
    loaded from the network.

    --out: default report.html, in a folder that is there. Shown is what is stored; the capture alone is
    computed if it is missing, and rows that are not stored are named with the command that computes them."""
    from dfrot_lab.show import report
    from dfrot_lab.study import runner

    path = report.check_out(said.out or Path("report.html"))
    findings = report.collect(said.setting())
    report.write(path, report.page(findings))
    missing = [runner.row_name(spec) for spec in findings.missing]
    computes = report.command(findings.result.setting) if missing else None
    about = {"out": path, "bytes": path.stat().st_size, "rows not stored": missing}
    show_facts({**about, "which this computes": computes}, said.as_json)


from dfrot_lab.cli import steps  # noqa: E402, F401  its commands are listed after those above
