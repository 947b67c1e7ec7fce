"""The command line: every step of the notebooks as one command. Heavy imports happen inside the commands, so
that `--help` is instant.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dfrot_lab.cli.malloc import keep_freed_memory
from dfrot_lab.cli.output import show_facts, show_json, show_table
from dfrot_lab.recipe.specs import (
    DEFAULT_MODEL,
    CaptureSpec,
    CorpusSpec,
    ModelSpec,
    QuantSpec,
    RefineSpec,
    RotationSpec,
    eval_spec,
)

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)
log = logging.getLogger("dfrot_lab")

Model = Annotated[
    str,
    typer.Option(
        help="smollm2-135m, a folder, a .gguf file, or hub:owner/name (the only form that uses the network)."
    ),
]
Corpus = Annotated[str, typer.Option(help="auto, wikitext2, wikipedia-sample, or a text file.")]
Seed = Annotated[int, typer.Option(help="Seed of the random rotations.", min=0)]
Out = Annotated[Path | None, typer.Option(help="Where the result goes; the ending says the format.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
Tokens = Annotated[int, typer.Option(help="Tokens to record: up to 2048, or a multiple of it.")]
Gamma = Annotated[float, typer.Option(help="Weight of massive rows; inf fits them alone.")]
Windows = Annotated[int, typer.Option(help="Evaluation windows of 2048 tokens.")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Only say what it would take; --model may also be llama-2-7b or llama-3-70b."
    ),
]
Variant = StrEnum("Variant", ["accelerated", "guarded", "as_paper", "as_released"])


@app.callback()
def _setup(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False) -> None:
    """See, prove and use what rotation does to 4-bit language models (DFRot, arXiv 2412.00648)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    keep_freed_memory()


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 1, and Ctrl-C into a promise that is kept."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("Stopped. What is finished is kept: the same command goes on from here.", err=True)
        raise typer.Exit(130) from None
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        if log.isEnabledFor(logging.DEBUG):
            raise
        typer.echo(f"Error: {error.args[0] if isinstance(error, KeyError) else error}", err=True)
        raise typer.Exit(1) from None


@app.command()
def run(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None, as_json: Json = False,
    windows: Windows = 6, gamma: Gamma = 100.0, dry_run: DryRun = False,
) -> None:  # fmt: skip
    """The main job: capture, refine, GPTQ, and a table of NR, RO, RH and DFRot at 16-4-16, 4-4-16 and 4-4-4,
    with keep-out rows and figures.

    Everything is kept as it is finished: Ctrl-C and the same command goes on. Results go to --out (default:
    runs/<date>/).
    """
    from dfrot_lab.score import results
    from dfrot_lab.show import main_figures
    from dfrot_lab.study import mainjob
    from dfrot_lab.study.setting import Setting

    with _clear_errors():
        if dry_run:
            _dry_run(model, windows, as_json)
            return
        folder = out or Path("runs") / f"{datetime.now():%Y-%m-%d}"
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        result = mainjob.main(
            Setting(model=ModelSpec(source=model), corpus=corpus, seed=seed, windows=windows, gamma=gamma)
        )
        main_figures.save_run(result, folder)
        if as_json:
            show_json(results.rows(result.table))
        else:
            typer.echo(f"\n{main_figures.report(result)}\nRows, table, figures and log: {folder}/")


@app.command("capture")
def capture_command(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None, as_json: Json = False, tokens: Tokens = 2048,
) -> None:  # fmt: skip
    """Record every norm's output and find the massive tokens by all four rules. --out: their table (.csv,
    .parquet, .json).
    """
    from dfrot_lab.observe import massive
    from dfrot_lab.observe.capture import capture

    del seed  # nothing random here; taken so that all commands take the same options
    with _clear_errors():
        recorded = capture(_capture_spec(model, corpus, tokens))
        table = massive.table(recorded).sort_values("residual_max", ascending=False)
        about = {
            "key": recorded.key,
            "sites": len(recorded.sites),
            "tokens": recorded.tokens,
            "folder": recorded.artefact.path,
        }
        show_table(table, out, as_json, about)


@app.command("errors")
def errors_command(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None, as_json: Json = False, tokens: Tokens = 2048,
    bits: Annotated[int, typer.Option(help="Bits of the quantizer.")] = 4,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Asymmetric quantizer instead of symmetric.")] = False,
) -> None:  # fmt: skip
    """Per-token quantization error under NR, RO and RH at every site. --out: the whole table; on screen its
    summary.
    """
    from dfrot_lab.disk import tables
    from dfrot_lab.observe import errors
    from dfrot_lab.observe.capture import capture

    with _clear_errors():
        quantizer = QuantSpec(bits=bits, symmetric=not asymmetric)
        recorded = capture(_capture_spec(model, corpus, tokens))
        table = errors.token_errors(recorded, errors.default_rotations(recorded.channels, seed), [quantizer])
        if out:
            tables.write_table(table, out)
        show_table(errors.summary(table), None, as_json, {"rows": len(table), "out": out})


@app.command("refine")
def refine_command(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None, as_json: Json = False, tokens: Tokens = 2048,
    gamma: Gamma = 100.0,
    init: Annotated[str, typer.Option(help="Rotation to start from: RH or RO.")] = "RH",
    rule: Annotated[str, typer.Option(help="What makes a row massive: nr_error, ro_vs_nr, sun or ratio.")] = "nr_error",
    steps: Annotated[int, typer.Option(help="Steps.")] = 100,
    variant: Annotated[Variant, typer.Option(help="accelerated (default), guarded, as_paper, or as_released.")] = Variant.accelerated,
) -> None:  # fmt: skip
    """Refine R1 (DFRot) and save it as safetensors with its spec. --out: default R1.safetensors."""
    from dfrot_lab.maths import rotations
    from dfrot_lab.rotate.dfrot import refined

    with _clear_errors():
        spec = RefineSpec(
            capture=_capture_spec(model, corpus, tokens), init=RotationSpec(kind=init, seed=seed), gamma=gamma, rule=rule, steps=steps,
            variant=variant.value, quantizer=QuantSpec(symmetric=variant is Variant.as_released),
        )  # fmt: skip
        result = refined(spec)
        path = out or Path("R1.safetensors")
        rotations.save(result.R, path, spec)
        show_table(result.history.iloc[[0, -1]], None, as_json, {"out": path, "spec": spec.key})


@app.command("evaluate")
def evaluate_command(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None, as_json: Json = False, windows: Windows = 6,
    rotation: Annotated[str, typer.Option(help="NR, RO, RH, DFRot, or a safetensors file with R1.")] = "RH",
    bits: Annotated[str, typer.Option(help="Weights-activations-KV, such as 4-4-16.")] = "4-4-16",
    weights: Annotated[str, typer.Option(help="gptq or rtn.")] = "gptq",
    keep_out: Annotated[bool, typer.Option("--keep-out", help="Let massive tokens pass unquantised (QuaRot.FP16()).")] = False,
    gamma: Gamma = 100.0,
) -> None:  # fmt: skip
    """Perplexity of one rotation at given bits. --out: a .jsonl file the row is added to."""
    from dfrot_lab.disk import tables
    from dfrot_lab.score import results
    from dfrot_lab.score.perplexity import evaluate

    with _clear_errors():
        model_spec = ModelSpec(source=model)
        spec = eval_spec(
            bits, weights=weights, model=model_spec, corpus=CorpusSpec(name=corpus), windows=windows, keep_out="nr_error" if keep_out else None,
            rotation=_rotation(rotation, seed, RefineSpec(capture=_capture_spec(model, corpus, 2048), gamma=gamma, init=RotationSpec(seed=seed))),
        )  # fmt: skip
        spec = spec.with_(weights=spec.weights.with_(corpus=CorpusSpec(name=corpus, split="calibration")))
        row = results.row(evaluate(spec))
        if out:
            tables.append(out, [row])
        if as_json:
            show_json(row)
        else:
            low, high = row["ci95"]
            typer.echo(
                f"{results.label(row)} {results.bits(row)} on {row['corpus']}: {row['value']:.3f} [{low:.3f}, {high:.3f}], {row['windows']} windows"
            )


@app.command("experiment")
def experiment_command(
    name: Annotated[str, typer.Argument(help="Which experiment; without it they are listed.")] = "",
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None, as_json: Json = False, windows: Windows = 6,
    limit: Annotated[int, typer.Option(help="Items of each zero-shot task; 0 takes all.", min=0)] = 100,
    quick: Annotated[bool, typer.Option("--quick", help="A few rows of a few short windows: to see that it works, not what is true.")] = False,
) -> None:  # fmt: skip
    """One of the paper's tables or figures by name, row by row; a stopped one goes on. --out: folder
    (default: runs/experiments/).
    """
    from dfrot_lab.show import gallery
    from dfrot_lab.study import experiments
    from dfrot_lab.study.setting import QUICK, Setting

    with _clear_errors():
        if not name:
            show_table(experiments.listing(), None, as_json, {})
            return
        setting = Setting(
            model=ModelSpec(source=model), corpus=corpus, seed=seed, windows=windows, limit=limit or None
        ).resolved()
        setting = replace(setting, **QUICK) if quick else setting
        table = experiments.run(name, setting)
        written = gallery.save_experiment(name, table, setting, *[out or Path("runs") / "experiments"] * 2)
        shown = [
            column
            for column in table
            if column not in ("spec", "commit", "model", "corpus") and table[column].notna().any()
        ]
        show_table(table if as_json else table[shown], None, as_json, {"written": list(map(str, written))})


@app.command("figures")
def figures_command(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None, as_json: Json = False, windows: Windows = 6,
) -> None:  # fmt: skip
    """Rewrite the committed figures/ and data/results/: the main job's and every experiment's. What is not
    stored is computed: hours, resumable.

    --out: another folder for both.
    """
    from dfrot_lab.score import results
    from dfrot_lab.show import gallery, main_figures
    from dfrot_lab.study import experiments, mainjob
    from dfrot_lab.study.setting import Setting

    with _clear_errors():
        root = out or Path()
        setting = Setting(model=ModelSpec(source=model), corpus=corpus, seed=seed, windows=windows)
        result = mainjob.main(setting)
        rows = root / "data" / "results" / f"main-{result.setting.corpus}.jsonl"
        results.save(rows, result.table)
        pictures = root / "figures" / result.setting.corpus
        written = [rows, rows.with_suffix(".md"), *main_figures.save_main(result, pictures)]
        for name in experiments.EXPERIMENTS:
            written += gallery.save_experiment(
                name, experiments.run(name, result.setting), result.setting, rows.parent, pictures
            )
        show_json(written) if as_json else typer.echo("\n".join(map(str, written)))


@app.command("report")
def report_command(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None, as_json: Json = False,
    windows: Windows = 6, gamma: Gamma = 100.0,
) -> None:  # fmt: skip
    """One HTML file to send to a colleague: the main job's results for --model, figures inside, nothing
    loaded from the network.

    --out: default report.html, in a folder that is there. Shown is what is stored; the capture alone is
    computed if it is missing, and rows that are not stored are named with the command that computes them.
    """
    from dfrot_lab.show import report
    from dfrot_lab.study import mainjob
    from dfrot_lab.study.setting import Setting

    with _clear_errors():
        path = report.check_out(out or Path("report.html"))
        setting = Setting(
            model=ModelSpec(source=model), corpus=corpus, seed=seed, windows=windows, gamma=gamma
        )
        findings = report.collect(setting)
        report.write(path, report.page(findings))
        missing = [mainjob.row_name(spec) for spec in findings.missing]
        computes = report.command(findings.result.setting) if missing else None
        show_facts(
            {
                "out": path,
                "bytes": path.stat().st_size,
                "rows not stored": missing,
                "which this computes": computes,
            },
            None,
            as_json,
        )


@app.command("models")
def models_command(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None, as_json: Json = False,
) -> None:  # fmt: skip
    """What can be loaded: supported and refused architectures with the reason; then --model itself, loaded
    and described.
    """
    from dfrot_lab.model import families, loading

    del corpus, seed
    with _clear_errors():
        loaded = loading.load_model(ModelSpec(source=model))
        about = {
            "model": model, "provenance": loaded.provenance, "channels": loaded.channels, "layers": len(loaded.layers), "context": loaded.context,
            "fingerprint": loaded.fingerprint, "supported": list(families.FAMILIES), "refused": families.REFUSED,
        }  # fmt: skip
        show_facts(about, out, as_json)


@app.command()
def fetch(
    model: Model = DEFAULT_MODEL,
    corpus: Corpus = "auto",
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Fetch and convert the model and the corpus now, so that everything else works without a network."""
    from dfrot_lab.model import corpus as corpora
    from dfrot_lab.model import loading

    del seed
    with _clear_errors():
        loaded = loading.load_model(ModelSpec(source=model))
        texts = {
            split: corpora.resolve(CorpusSpec(name=corpus, split=split))
            for split in ("calibration", "evaluation")
        }
        sizes = {
            f"{spec.name} {split}": f"{len(corpora.load_text(spec)):,} characters"
            for split, spec in texts.items()
        }
        show_facts({"model": model, "provenance": loaded.provenance, **sizes}, out, as_json)


@app.command()
def doctor(
    model: Model = DEFAULT_MODEL,
    corpus: Corpus = "auto",
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Versions, cores, memory, what is cached and what is missing; exit code 1 if the main job could not run."""
    from dfrot_lab.cli.doctor import checkup

    del seed
    with _clear_errors():
        about, missing = checkup(ModelSpec(source=model), CorpusSpec(name=corpus))
        show_facts({**about, "missing": missing or "nothing"}, out, as_json)
        if missing:
            raise typer.Exit(1)


def _dry_run(model: str, windows: int, as_json: bool) -> None:
    from dfrot_lab.study import cost

    shape, machines = cost.shape(ModelSpec(source=model)), [cost.measure_machine(), cost.GPU_80GB]
    if as_json:
        tables = [(machine.name, cost.estimate(shape, machine, windows=windows)) for machine in machines]
        show_json(
            [
                {"model": model, "machine": name, **row}
                for name, table in tables
                for row in table.to_dict("records")
            ]
        )
    else:
        typer.echo(cost.describe(model, shape, machines, windows=windows))


def _capture_spec(model: str, corpus: str, tokens: int) -> CaptureSpec:
    return CaptureSpec(
        model=ModelSpec(source=model), corpus=CorpusSpec(name=corpus, split="calibration"), tokens=tokens
    )


def _rotation(name: str, seed: int, refinement: RefineSpec) -> RotationSpec | RefineSpec:
    if name == "DFRot":
        return refinement
    if name in ("NR", "RO", "RH"):
        return RotationSpec(kind=name, seed=seed)
    if Path(name).is_file():
        return RotationSpec(kind="file", path=name)
    raise ValueError(f"--rotation must be NR, RO, RH, DFRot or an existing safetensors file; got {name!r}")
