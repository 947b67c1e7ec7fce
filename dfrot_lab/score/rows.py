"""Results as rows with provenance: a column for everything that makes a row different, nothing in a label."""

import math
from collections.abc import Sequence
from typing import Any

from dfrot_lab.maths.tables import COLUMNS, PERPLEXITY
from dfrot_lab.model.public import public
from dfrot_lab.recipe.base import Spec
from dfrot_lab.recipe.keys import FORMULAS
from dfrot_lab.recipe.specs import CorpusSpec, Recipe
from dfrot_lab.score.perplexity import EvalResult, paired_difference

PACKAGES = ("dfrot_lab", "torch", "transformers")


def row(result: EvalResult) -> dict[str, Any]:
    """The results row of one evaluation: its perplexity with the bootstrap interval over windows."""
    return statistic_row(result, PERPLEXITY, result.perplexity, result.ci95)


def difference_row(result: EvalResult, reference: EvalResult, name: str) -> dict[str, Any]:
    """The row of the paired difference in perplexity of `result` and `reference`, called `name`."""
    return statistic_row(result, f"{PERPLEXITY} - {name}", *paired_difference(result, reference))


def statistic_row(result: EvalResult, metric: str, value: float, ci95: Sequence[float]) -> dict[str, Any]:
    """The results row of any number, with its interval, that is said of the evaluation `result`."""
    interval = list(ci95) if all(map(math.isfinite, ci95)) else None  # of one window there is none
    said = {"metric": metric, "value": value, "ci95": interval, "seconds": round(result.seconds, 2)}
    made = {name: result.versions[name] for name in PACKAGES if name in result.versions}
    code = {"recipe": public(result.spec).key, "key": result.key, "versions": made, "formulas": FORMULAS}
    values = {**columns(result.spec), "family": result.family, **said, **code, "commit": result.commit}
    return {name: values[name] for name in COLUMNS}


def columns(recipe: Recipe) -> dict[str, Any]:
    """What a row says of its recipe, column by column; `parameters` are what else is not the default."""
    name, recipe = recipe.rotation.name, public(recipe)
    model, weights, rotation = recipe.model, recipe.weights, recipe.rotation
    rest = [
        parameters(rotation),
        parameters(model, "source device" + " dtype" * (model.dtype == "float32")),
        parameters(recipe.corpus, "name"),
    ]
    rest.append(parameters(weights, "method quantizer corpus windows window"))
    rest += [f"{name}={getattr(recipe, name)}" for name in recipe.LATER if name not in recipe.unkeyed]
    said: dict[str, Any] = {"model": model.source, "device": model.device, "corpus": recipe.corpus.name}
    said |= {"method": rotation.method, "rotation": name, "seed": rotation.first_seed}
    said |= {name: getattr(rotation, name, None) for name in ("gamma", "rule")}
    said |= {"parameters": ", ".join(filter(None, rest)), "weight_quantizer": weights.quantizer.name}
    said["weights"] = weights.method if weights.quantizer.bits < 16 else None
    said["calibration"] = weights.corpus and f"{_word(weights.corpus)}, {weights.windows} x {weights.window}"
    said |= {name: getattr(recipe, name).name for name in ("activations", "keys", "values")}
    said |= {"bits": recipe.bits, "w_bits": weights.quantizer.bits, "a_bits": recipe.activations.bits}
    said["kv_bits"] = recipe.keys.bits if recipe.keys.bits == recipe.values.bits else None
    said |= {"keep_out": recipe.keep_out is not None, "keep_out_rule": recipe.keep_out}
    same = ("keep_out_tokens", "set_massive", "windows", "window")
    return said | {name: getattr(recipe, name) for name in same}


def parameters(spec: Spec, shown: str = "gamma rule seed kind model") -> str:
    """What of a spec is not the default and not `shown` elsewhere, in words: `steps=20, quantizer=sym4`."""
    fields, known = type(spec).model_fields, shown.split()
    own = {name: value for name, value in spec if name not in known and value != fields[name].default}
    return ", ".join(f"{name}={_word(value)}" for name, value in own.items())


def _word(value: Any) -> str:
    """A field's value in a word: a text with its part, another spec by its name or its parameters."""
    if isinstance(value, CorpusSpec):
        return f"{value.name} ({value.split})"
    return str(getattr(value, "name", f"({parameters(value)})") if isinstance(value, Spec) else value)
