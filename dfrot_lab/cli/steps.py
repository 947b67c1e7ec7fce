"""Commands that take one step: capture, errors, refine, evaluate, recipe."""

from pathlib import Path
from typing import Annotated

import typer

from dfrot_lab.cli.options import (
    Bits,
    Corpus,
    Dtype,
    Gamma,
    Json,
    Model,
    Out,
    RecipeFile,
    Rotation,
    Rule,
    Scheme,
    Seed,
    Tokens,
    Weights,
    Windows,
    app,
    capture_spec,
    clear_errors,
    rotation_spec,
)
from dfrot_lab.cli.output import show_json, show_table
from dfrot_lab.recipe.specs import (
    DEFAULT_MODEL,
    DEFAULT_RULE,
    REFINE_VARIANTS,
    RELEASED_KEEP_OUT,
    CorpusSpec,
    ModelSpec,
    QuantSpec,
    Recipe,
    recipe_of,
)


@app.command("capture")
def capture_command(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", out: Out = None, as_json: Json = False,
    tokens: Tokens = 2048, dtype: Dtype = "float32",
) -> None:  # fmt: skip
    """Record every norm's output and find the massive tokens by all rules. --out: their table (.csv,
    .parquet, .json)."""
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
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None,
    as_json: Json = False,
    tokens: Tokens = 2048, bits: Annotated[int, typer.Option(help="Bits of the quantizer.")] = 4,
    scheme: Scheme = "symmetric", rule: Rule = DEFAULT_RULE, dtype: Dtype = "float32",
) -> None:  # fmt: skip
    """Per-token quantization error under NR, RO and RH at every site. --out: the whole table; on screen its
    summary."""
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
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None,
    as_json: Json = False,
    tokens: Tokens = 2048, gamma: Gamma = 100.0,
    init: Annotated[str, typer.Option(help="Rotation to start from: RH or RO.")] = "RH",
    rule: Rule = DEFAULT_RULE,
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


@app.command("evaluate")
def evaluate_command(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", seed: Seed = 0, out: Out = None,
    as_json: Json = False,
    windows: Windows = 6, rotation: Rotation = "RH", bits: Bits = "4-4-16", weights: Weights = "gptq",
    keep_out: Annotated[bool, typer.Option("--keep-out", help="Massive tokens pass unquantised.")] = False,
    gamma: Gamma = 100.0, rule: Rule = DEFAULT_RULE, dtype: Dtype = "float32", recipe: RecipeFile = None,
) -> None:  # fmt: skip
    """Perplexity of one rotation at given bits, or of a recipe. --out: a .jsonl file the row is added to; the
    recipe is written beside it."""
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
    gamma: Gamma = 100.0, rule: Rule = DEFAULT_RULE, dtype: Dtype = "float32", windows: Windows = 6,
    out: Out = None,
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
