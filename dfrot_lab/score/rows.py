"""Results as rows with provenance: a column for everything that makes a row different, nothing in a label."""

import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from dfrot_lab.maths.tables import COLUMNS, PERPLEXITY
from dfrot_lab.recipe.base import Spec
from dfrot_lab.recipe.keys import FORMULAS
from dfrot_lab.recipe.specs import CorpusSpec, Recipe
from dfrot_lab.score.perplexity import EvalResult, paired_difference

PACKAGES = ("dfrot_lab", "torch", "transformers")


@cache
def commit() -> str | None:
    """The git commit of the code that runs, with `+` behind it where files differ from it; None outside a
    checkout."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def row(result: EvalResult) -> dict[str, Any]:
    """The results row of one evaluation: its perplexity with the bootstrap interval over windows."""
    return statistic_row(result, PERPLEXITY, result.perplexity, result.ci95)


def difference_row(result: EvalResult, reference: EvalResult, name: str) -> dict[str, Any]:
    """The results row of a paired difference: perplexity of `result` minus that of `reference` (called
    `name`) on the same windows."""
    return statistic_row(result, f"{PERPLEXITY} - {name}", *paired_difference(result, reference))


def statistic_row(
    result: EvalResult, metric: str, value: float, interval: tuple[float, float]
) -> dict[str, Any]:
    """The results row of any number, with its interval, that is said of the evaluation `result`."""
    said = {"metric": metric, "value": value, "ci95": list(interval), "seconds": round(result.seconds, 2)}
    made = {name: result.versions[name] for name in PACKAGES if name in result.versions}
    code = {"recipe": result.spec.key, "versions": made, "formulas": FORMULAS, "commit": commit()}
    values = {**columns(result.spec), "family": result.family, **said, **code}
    return {name: values[name] for name in COLUMNS}


def columns(recipe: Recipe) -> dict[str, Any]:
    """What a row says of its recipe, column by column."""
    weights, rotation = recipe.weights, recipe.rotation
    cache_bits = recipe.keys.bits if recipe.keys.bits == recipe.values.bits else None
    calibration = weights.corpus and f"{_word(weights.corpus)}, {weights.windows} x {weights.window}"
    return {
        "model": recipe.model.source,
        "corpus": recipe.corpus.name,
        "method": rotation.method,
        "rotation": rotation.name,
        "gamma": getattr(rotation, "gamma", None),
        "rule": getattr(rotation, "rule", None),
        "parameters": ", ".join(filter(None, [parameters(rotation), *_rest(recipe)])),
        "seed": rotation.first_seed,
        "weights": weights.method if weights.quantizer.bits < 16 else None,
        "weight_quantizer": weights.quantizer.name,
        "calibration": calibration,
        **{name: getattr(recipe, name).name for name in ("activations", "keys", "values")},
        "w_bits": weights.quantizer.bits,
        "a_bits": recipe.activations.bits,
        "kv_bits": cache_bits,
        "bits": recipe.bits,
        "keep_out": recipe.keep_out is not None,
        "keep_out_rule": recipe.keep_out,
        "keep_out_tokens": recipe.keep_out_tokens,
        "set_massive": recipe.set_massive,
        "windows": recipe.windows,
        "window": recipe.window,
        "device": recipe.model.device,
    }


def _rest(recipe: Recipe) -> list[str]:
    """What of a recipe has no column of its own and is not the default, in words."""
    parts: dict[Spec, tuple[str, ...]] = {
        recipe.model: ("source", "device"),
        recipe.corpus: ("name",),
        recipe.weights: ("method", "quantizer", "corpus", "windows", "window"),
    }
    return [parameters(part, shown) for part, shown in parts.items()]


def parameters(spec: Spec, shown: tuple[str, ...] = ("gamma", "rule", "seed", "kind", "model")) -> str:
    """What of a spec is not the default and not `shown` elsewhere, in words: `steps=20, quantizer=sym4`;
    empty where all is."""
    default = {name: field.default for name, field in type(spec).model_fields.items()}
    own = {name: value for name, value in spec if name not in shown}
    return ", ".join(f"{name}={_word(value)}" for name, value in own.items() if value != default[name])


def _word(value: Any) -> str:
    """A field's value in a word: a text with its part, a quantizer or rotation by its name, a capture by what
    of it is not the default."""
    if isinstance(value, CorpusSpec):
        return f"{value.name} ({value.split})"
    if isinstance(value, Spec):
        return str(getattr(value, "name", f"({parameters(value)})"))
    return str(value)


def recipes(found: Iterable[EvalResult]) -> dict[str, Any]:
    """The recipes of evaluations by key, as plain values: what is kept beside their rows."""
    return {result.spec.key: result.spec.plain() for result in found}
