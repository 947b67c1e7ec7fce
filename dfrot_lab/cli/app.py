"""The command line: every step of the notebooks as one command. Heavy imports happen inside the commands, so
that `--help` is instant.
"""

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
    Group,
    Json,
    Model,
    Out,
    Rule,
    Seed,
    Tokens,
    Windows,
    capture_spec,
    clear_errors,
    log,
    rotation_spec,
    set_up,
)  # fmt: skip
from dfrot_lab.cli.output import show_facts, show_json, show_table
from dfrot_lab.recipe.specs import (
    DEFAULT_MODEL,
    DEFAULT_RULE,
    REFINE_VARIANTS,
    RELEASED_KEEP_OUT,
    SCHEMES,
    CorpusSpec,
    ModelSpec,
    QuantSpec,
    Recipe,
    recipe_of,
)  # fmt: skip

if TYPE_CHECKING:
    from dfrot_lab.study.setting import Setting

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
RecipeFile = Annotated[
    Path | None, typer.Option(help="A recipe's YAML, in place of all options but --out, --json.")
]
Scheme = Annotated[str, typer.Option(help=f"The quantizer's range: {', '.join(SCHEMES)}.")]


@app.callback()
def _setup(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False) -> None:
    """See, prove and use what rotation does to 4-bit language models (DFRot, arXiv 2412.00648)."""
    set_up(verbose)


@app.command()
def run(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None, as_json: Json = False,
    windows: Windows = 6, gamma: Gamma = 100.0, rule: Rule = DEFAULT_RULE, dry_run: DryRun = False,
    dtype: Dtype = "float32",
) -> None:  # fmt: skip
    """The main job: capture, refine, GPTQ, and a table of NR, RO, RH and DFRot at 16-4-16, 4-4-16 and 4-4-4,
    with keep-out rows and figures.

    Everything is kept as it is finished: Ctrl-C and the same command goes on. Results go to --out (default:
    runs/<date>/).
    """
    from dfrot_lab.disk import row_files
    from dfrot_lab.show import main_figures
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
        main_figures.save_run(result, folder)
        if as_json:
            show_json(row_files.rows(result.table))
        else:
            typer.echo(f"\n{main_figures.report(result)}\nRows, recipes, table, figures and log: {folder}/")


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


@app.command("capture")
def capture_command(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", out: Out = None, as_json: Json = False,
    tokens: Tokens = 2048, dtype: Dtype = "float32",
) -> None:  # fmt: skip
    """Record every norm's output and find the massive tokens by all rules. --out: their table (.csv,
    .parquet, .json).
    """
    from dfrot_lab.observe import massive
    from dfrot_lab.observe.capture import capture

    with clear_errors():
        recorded = capture(capture_spec(ModelSpec(source=model, dtype=dtype), corpus, tokens))
        massive.warn(recorded, DEFAULT_RULE)
        table = massive.table(recorded).sort_values("residual_max", ascending=False)
        about = {"key": recorded.key, "sites": len(recorded.sites), "tokens": recorded.tokens}
        show_table(table, out, as_json, {**about, "folder": recorded.artefact.path})


@app.command("errors")
def errors_command(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None, as_json: Json = False,
    tokens: Tokens = 2048, bits: Annotated[int, typer.Option(help="Bits of the quantizer.")] = 4,
    scheme: Scheme = "symmetric", rule: Rule = DEFAULT_RULE, dtype: Dtype = "float32",
) -> None:  # fmt: skip
    """Per-token quantization error under NR, RO and RH at every site. --out: the whole table; on screen its
    summary.
    """
    from dfrot_lab.disk import row_files
    from dfrot_lab.observe import errors
    from dfrot_lab.observe.capture import capture

    with clear_errors():
        quantizer = QuantSpec(bits=bits, scheme=scheme)
        recorded = capture(capture_spec(ModelSpec(source=model, dtype=dtype), corpus, tokens))
        rotations = errors.default_rotations(recorded.channels, seed)
        table = errors.token_errors(recorded, rotations, [quantizer], rule=rule)
        if out:
            row_files.write_table(table, out)
        show_table(errors.summary(table), None, as_json, {"rows": len(table), "out": out})


@app.command("refine")
def refine_command(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None, as_json: Json = False,
    tokens: Tokens = 2048, gamma: Gamma = 100.0,
    init: Annotated[str, typer.Option(help="Rotation to start from: RH or RO.")] = "RH", rule: Rule = DEFAULT_RULE,
    steps: Annotated[int, typer.Option(help="Steps.")] = 100,
    variant: Annotated[str, typer.Option(help=f"{', '.join(REFINE_VARIANTS)}.")] = REFINE_VARIANTS[0],
    dtype: Dtype = "float32",
) -> None:  # fmt: skip
    """Refine R1 (DFRot) and save it as safetensors with its spec. --out: default R1.safetensors."""
    from dfrot_lab.disk import rotation_files
    from dfrot_lab.recipe.specs import RotationSpec
    from dfrot_lab.rotate.dfrot import refined

    with clear_errors():
        path = out or Path("R1.safetensors")
        if path.is_dir():
            raise ValueError(
                f"--out must be a file; {path} is a folder. Say for example {path / 'R1.safetensors'}"
            )
        capture = capture_spec(ModelSpec(source=model, dtype=dtype), corpus, tokens)
        fields = {"gamma": gamma, "rule": rule, "steps": steps, "variant": variant}
        if variant == "as_released":
            fields["quantizer"] = QuantSpec()
        start = RotationSpec(kind=init, seed=seed)
        spec = rotation_spec("DFRot", seed, capture, init=start, **fields)
        result = refined(spec)
        rotation_files.save(result.R, path, spec)
        show_table(result.history.iloc[[0, -1]], None, as_json, {"out": path, "spec": spec.key})


Rotation = Annotated[
    str, typer.Option(help="A row of the rotations listed by --help, or a safetensors file with R1.")
]
Bits = Annotated[str, typer.Option(help="Weights-activations-KV, such as 4-4-16.")]
Weights = Annotated[str, typer.Option(help="A weight quantizer listed by --help.")]


@app.command("evaluate")
def evaluate_command(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None, as_json: Json = False,
    windows: Windows = 6, rotation: Rotation = "RH", bits: Bits = "4-4-16", weights: Weights = "gptq",
    keep_out: Annotated[bool, typer.Option("--keep-out", help="Massive tokens pass unquantised.")] = False,
    gamma: Gamma = 100.0, rule: Rule = DEFAULT_RULE, dtype: Dtype = "float32", recipe: RecipeFile = None,
) -> None:  # fmt: skip
    """Perplexity of one rotation at given bits, or of a recipe. --out: a .jsonl file the row is added to; the
    recipe is written beside it.
    """
    from dfrot_lab.disk import row_files
    from dfrot_lab.maths import tables
    from dfrot_lab.score import rows
    from dfrot_lab.score.perplexity import evaluate

    with clear_errors():
        if recipe:
            spec = Recipe.from_yaml(recipe)
        else:
            kept = {"keep_out": RELEASED_KEEP_OUT if keep_out else None, "windows": windows}
            chosen = ModelSpec(source=model, dtype=dtype)
            spec = _recipe(rotation, bits, weights, chosen, corpus, seed, gamma, rule).with_(**kept)
        result = evaluate(spec)
        row = rows.row(result)
        if out:
            row_files.append(out, [row])
            beside = out.with_name(f"{out.stem}.{row['recipe']}.yaml")
            beside.write_text(result.spec.to_yaml(), encoding="utf-8")
        if as_json:
            show_json(row)
        else:
            value = tables.cell(row)
            typer.echo(
                f"{tables.label(row)} {row['bits']} on {row['corpus']}: {value}, {row['windows']} windows"
            )


@app.command("recipe")
def recipe_command(
    rotation: Annotated[str, typer.Argument(help="A row such as RO, or a safetensors file with R1.")] = "RH",
    bits: Annotated[str, typer.Argument(help="Weights-activations-KV, such as 4-4-16.")] = "4-4-16",
    weights: Weights = "gptq", model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0,
    gamma: Gamma = 100.0, rule: Rule = DEFAULT_RULE, dtype: Dtype = "float32", windows: Windows = 6, out: Out = None,
) -> None:  # fmt: skip
    """A recipe as YAML, every field said: to keep, to change, to evaluate with `evaluate --recipe`."""
    with clear_errors():
        chosen = ModelSpec(source=model, dtype=dtype)
        spec = _recipe(rotation, bits, weights, chosen, corpus, seed, gamma, rule).with_(windows=windows)
        if out:
            out.write_text(spec.to_yaml(), encoding="utf-8")
        typer.echo(f"written: {out}" if out else spec.to_yaml(), nl=bool(out))


def _recipe(
    rotation: str, bits: str, weights: str, model: ModelSpec, corpus: str, seed: int, gamma: float, rule: str
) -> Recipe:
    capture = capture_spec(model, corpus, 2048)
    method = rotation_spec(rotation, seed, capture, gamma=gamma, rule=rule)
    spec = recipe_of(bits, weights=weights, model=model, corpus=CorpusSpec(name=corpus), rotation=method)
    return spec.with_(weights=spec.weights.with_(corpus=capture.corpus))


@app.command("experiment")
def experiment_command(
    name: Annotated[str, typer.Argument(help="Which experiment; without it they are listed.")] = "",
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None, as_json: Json = False,
    windows: Windows = 6,
    limit: Annotated[int, typer.Option(help="Items of each zero-shot task; 0 takes all.", min=0)] = 100,
    quick: Annotated[bool, typer.Option("--quick", help="A few short windows: to see that it works.")] = False,
) -> None:  # fmt: skip
    """One of the paper's tables or figures by name, row by row; a stopped one goes on. --out: folder
    (default: runs/experiments/).
    """
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
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None, as_json: Json = False,
    windows: Windows = 6,
) -> None:  # fmt: skip
    """Rewrite the committed figures/ and data/results/: the main job's and every experiment's. What is not
    stored is computed: hours, resumable.

    --out: another folder for both.
    """
    from dfrot_lab.show import gallery, main_figures
    from dfrot_lab.study import experiments, main
    from dfrot_lab.study.setting import Setting

    with clear_errors():
        root = out or Path()
        setting = Setting(model=ModelSpec(source=model), corpus=corpus, seed=seed, windows=windows).resolved()
        tables, pictures = root / "data" / "results", root / "figures" / setting.corpus
        written = main_figures.save(main.run(setting), tables / f"main-{setting.corpus}.jsonl", pictures)
        for name in experiments.EXPERIMENTS:
            if name != "main":
                written += gallery.save_experiment(
                    name, experiments.run(name, setting), setting, tables, pictures
                )
        show_json(written) if as_json else typer.echo("\n".join(map(str, written)))


@app.command("report")
def report_command(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None, as_json: Json = False,
    windows: Windows = 6, gamma: Gamma = 100.0, rule: Rule = DEFAULT_RULE, dtype: Dtype = "float32",
) -> None:  # fmt: skip
    """One HTML file to send to a colleague: the main job's results for --model, figures inside, nothing
    loaded from the network.

    --out: default report.html, in a folder that is there. Shown is what is stored; the capture alone is
    computed if it is missing, and rows that are not stored are named with the command that computes them.
    """
    from dfrot_lab.show import report
    from dfrot_lab.study import runner
    from dfrot_lab.study.setting import Setting

    with clear_errors():
        path, spec = report.check_out(out or Path("report.html")), ModelSpec(source=model, dtype=dtype)
        setting = Setting(model=spec, corpus=corpus, seed=seed, windows=windows, gamma=gamma, rule=rule)
        findings = report.collect(setting)
        report.write(path, report.page(findings))
        missing = [runner.row_name(spec) for spec in findings.missing]
        computes = report.command(findings.result.setting) if missing else None
        about = {"out": path, "bytes": path.stat().st_size, "rows not stored": missing}
        show_facts({**about, "which this computes": computes}, None, as_json)


@app.command("models")
def models_command(
    model: Model = DEFAULT_MODEL, out: Out = None, as_json: Json = False, dtype: Dtype = "float32"
) -> None:
    """What can be loaded: supported and refused families with the reason; then --model itself, described."""
    from dfrot_lab.model import loading
    from dfrot_lab.model.families import FAMILIES, REFUSED

    with clear_errors():
        loaded = loading.load_model(ModelSpec(source=model, dtype=dtype))
        about = {"model": model, "family": loaded.family, "provenance": loaded.provenance}
        about |= {"channels": loaded.channels, "layers": len(loaded.layers), "context": loaded.context}
        about |= {"fingerprint": loaded.fingerprint, "supported": list(FAMILIES), "refused": REFUSED}
        show_facts(about, out, as_json)


@app.command()
def fetch(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", out: Out = None, as_json: Json = False
) -> None:
    """Fetch and convert the model and the corpus now, so that everything else works without a network."""
    from dfrot_lab.model import corpus as corpora
    from dfrot_lab.model import loading

    with clear_errors():
        loaded = loading.load_model(ModelSpec(source=model))
        halves = [
            corpora.resolve(CorpusSpec(name=corpus, split=split)) for split in ("calibration", "evaluation")
        ]
        sizes = {
            f"{spec.name} {spec.split}": f"{len(corpora.load_text(spec)):,} characters" for spec in halves
        }
        show_facts({"model": model, "provenance": loaded.provenance, **sizes}, out, as_json)


@app.command()
def doctor(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", out: Out = None, as_json: Json = False
) -> None:
    """Versions, cores, memory, what is cached and what is missing; exit code 1 if the main job could not run."""
    from dfrot_lab.cli.doctor import checkup

    with clear_errors():
        about, missing = checkup(ModelSpec(source=model), CorpusSpec(name=corpus))
        show_facts({**about, "missing": missing or "nothing"}, out, as_json)
        if missing:
            raise typer.Exit(1)
