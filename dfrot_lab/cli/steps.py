"""Commands that say what is here (models, fetch, doctor) or take one step (capture, errors, refine, ...)."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dfrot_lab.cli.options import Options, command, show_facts, show_json, show_table
from dfrot_lab.recipe.specs import (
    DEFAULT_RULE,
    REFINE_VARIANTS,
    RELEASED_KEEP_OUT,
    SCHEMES,
    CorpusSpec,
    QuantSpec,
    Recipe,
    RotationSpec,
)

ROTATION = "A row of the rotations listed by --help, or a safetensors file with R1."
BITS = "Weights-activations-KV, such as 4-4-16."
RECIPE = "A recipe's YAML, in place of all options but --out, --json."


@command("models", "model out as_json dtype")
def models(said: Options) -> None:
    """What can be loaded: supported and refused families with the reason; then --model itself, described."""
    from dfrot_lab.model import families, loading

    loaded = loading.load_model(said.model_spec)
    about: dict[str, Any] = {"model": said.model, "family": loaded.family, "provenance": loaded.provenance}
    about |= {"channels": loaded.channels, "layers": len(loaded.layers), "context": loaded.context}
    about |= {"fingerprint": loaded.fingerprint, "supported": list(families.FAMILIES)}
    show_facts({**about, "refused": families.REFUSED}, said.as_json, said.out)


@command("fetch", "model corpus out as_json")
def fetch(said: Options) -> None:
    """Fetch and convert the model and the corpus now, so that everything else works without a network."""
    from dfrot_lab.model import corpus, loading

    about = {"model": said.model, "provenance": loading.load_model(said.model_spec).provenance}
    for split in ("calibration", "evaluation"):
        spec = corpus.resolve(CorpusSpec(name=said.corpus, split=split))
        about[f"{spec.name} {split}"] = f"{len(corpus.load_text(spec)):,} characters"
    show_facts(about, said.as_json, said.out)


@command("doctor", "model corpus out as_json")
def doctor(said: Options) -> None:
    """Versions, cores, memory, what is cached, what is missing; exit code 1 if the main job could not run."""
    from dfrot_lab.cli.doctor import checkup

    about, missing = checkup(said.model_spec, CorpusSpec(name=said.corpus))
    show_facts({**about, "missing": missing or "nothing"}, said.as_json, said.out)
    if missing:
        raise typer.Exit(1)


@command("capture", "model corpus out as_json tokens dtype")
def capture_command(said: Options) -> None:
    """Record every norm's output and find the massive tokens by all rules. --out: their table (.csv,
    .parquet, .json)."""
    from dfrot_lab.disk import row_files
    from dfrot_lab.observe import capture, massive

    recorded = capture.capture(said.capture)
    massive.warn(recorded, DEFAULT_RULE)
    table = massive.table(recorded).sort_values("residual_max", ascending=False)
    if said.out:
        row_files.write_table(table, said.out)
    about = {"key": recorded.key, "sites": len(recorded.sites), "tokens": recorded.tokens}
    show_table(table, said.as_json, {**about, "folder": recorded.artefact.path})


@command("errors", "model corpus seed out as_json tokens rule dtype")
def errors_command(
    said: Options,
    bits: Annotated[int, typer.Option(help="Bits of the quantizer.")] = 4,
    scheme: Annotated[str, typer.Option(help=f"The quantizer's range: {', '.join(SCHEMES)}.")] = "symmetric",
) -> None:
    """Per-token quantization error under NR, RO and RH at every site. --out: the whole table; on screen its
    summary."""
    from dfrot_lab.disk import row_files
    from dfrot_lab.observe import capture, errors

    quantizer, recorded = QuantSpec(bits=bits, scheme=scheme), capture.capture(said.capture)
    rotations = errors.default_rotations(recorded.channels, said.seed)
    table = errors.token_errors(recorded, rotations, [quantizer], rule=said.rule)
    if said.out:
        row_files.write_table(table, said.out)
    show_table(errors.summary(table), said.as_json, {"rows": len(table), "out": said.out})


@command("refine", "model corpus seed out as_json tokens gamma rule dtype")
def refine(
    said: Options,
    init: Annotated[str, typer.Option(help="Rotation to start from: RH or RO.")] = "RH",
    steps: Annotated[int, typer.Option(help="Steps.")] = 100,
    variant: Annotated[str, typer.Option(help=f"{', '.join(REFINE_VARIANTS)}.")] = REFINE_VARIANTS[0],
) -> None:
    """Refine R1 (DFRot) and save it as safetensors with its spec. --out: default R1.safetensors."""
    from dfrot_lab.disk import rotation_files
    from dfrot_lab.rotate.dfrot import refined

    path = said.out or Path("R1.safetensors")
    if path.is_dir():
        example = path / "R1.safetensors"
        raise ValueError(f"--out must be a file; {path} is a folder. Say for example {example}")
    fields: dict[str, Any] = {"init": RotationSpec(kind=init, seed=said.seed), "steps": steps}
    if variant == "as_released":
        fields["quantizer"] = QuantSpec()
    spec = said.rotation("DFRot", variant=variant, **fields)
    result = refined(spec)
    rotation_files.save(result.R, path, spec)
    show_table(result.history.iloc[[0, -1]], said.as_json, {"out": path, "spec": spec.key})


@command("evaluate", "model corpus seed out as_json windows weights gamma rule dtype")
def evaluate_command(
    said: Options,
    rotation: Annotated[str, typer.Option(help=ROTATION)] = "RH",
    bits: Annotated[str, typer.Option(help=BITS)] = "4-4-16",
    keep_out: Annotated[bool, typer.Option("--keep-out", help="Massive tokens pass unquantised.")] = False,
    recipe: Annotated[Path | None, typer.Option(help=RECIPE)] = None,
) -> None:
    """Perplexity of one rotation at given bits, or of a recipe. --out: a .jsonl file the row is added to; the
    recipe is written beside it."""
    from dfrot_lab.disk import row_files
    from dfrot_lab.maths import tables
    from dfrot_lab.score import perplexity, rows

    kept = RELEASED_KEEP_OUT if keep_out else None
    spec = Recipe.from_yaml(recipe) if recipe else said.recipe(rotation, bits).with_(keep_out=kept)
    result = perplexity.evaluate(spec)
    row = rows.row(result)
    if said.out:
        row_files.append(said.out, [row])
        beside = said.out.with_name(f"{said.out.stem}.{row['recipe']}.yaml")
        beside.write_text(result.spec.to_yaml(), encoding="utf-8")
    about = f"{tables.label(row)} {row['bits']} on {row['corpus']}: {tables.cell(row)}"
    show_json(row) if said.as_json else typer.echo(f"{about}, {row['windows']} windows")


@command("recipe", "weights model corpus seed gamma rule dtype windows out")
def recipe_command(
    said: Options,
    rotation: Annotated[str, typer.Argument(help="A row such as RO, or a safetensors file with R1.")] = "RH",
    bits: Annotated[str, typer.Argument(help=BITS)] = "4-4-16",
) -> None:
    """A recipe as YAML, every field said: to keep, to change, to evaluate with `evaluate --recipe`."""
    text = said.recipe(rotation, bits).to_yaml()
    if said.out:
        said.out.write_text(text, encoding="utf-8")
    typer.echo(f"written: {said.out}" if said.out else text, nl=bool(said.out))
