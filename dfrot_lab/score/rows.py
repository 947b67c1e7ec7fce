"""Results as rows with provenance: a column for everything that makes a row different, nothing in a label."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dfrot_lab.disk.provenance import PACKAGES
from dfrot_lab.maths import statistics, tables
from dfrot_lab.maths.statistics import Estimate
from dfrot_lab.maths.tables import COLUMNS, LEVELS, PERPLEXITY
from dfrot_lab.model.public import public
from dfrot_lab.recipe.base import Spec, content_key
from dfrot_lab.recipe.keys import FORMULAS
from dfrot_lab.recipe.specs import CorpusSpec, Recipe
from dfrot_lab.score.perplexity import EvalResult


def rows(results: Sequence[EvalResult]) -> list[dict[str, Any]]:
    """The results rows of one recipe's evaluations, one a build: perplexity (exp of the mean loss), KL
    divergence, top-1 agreement, each with its 95% interval over builds."""
    found = []
    for metric, values in zip(LEVELS, _measures(results), strict=True):
        scale = np.exp if metric == PERPLEXITY else np.asarray
        each = [float(f"{value:.7g}") for value in scale(values)]
        found.append(line(results, metric, statistics.estimate(values), scale) | {"by_build": each})
    return found


def compared(
    results: Sequence[EvalResult], references: Sequence[EvalResult], name: str
) -> list[dict[str, Any]]:
    """The results rows of the builds' `results` against `references`, the row called `name`, build by build
    on the same windows: the change of perplexity in percent, the difference in KL divergence; each with its
    interval, verdict, and the smallest that would have been found. ValueError: other windows or device."""
    _require_pairs(results, references)
    pairs = zip(_measures(results)[:2], _measures(references)[:2], strict=True)
    loss, divergence = (statistics.estimate(own - other) for own, other in pairs)
    found = line(results, tables.change(name), loss, percent)
    further = line(results, tables.further(name), divergence)
    return [found | _told(loss, percent(loss.smallest)), further | _told(divergence, divergence.smallest)]


def percent(loss: Any) -> Any:
    """A difference of losses in nats as a change of perplexity in percent."""
    return 100 * np.expm1(loss)


def _measures(results: Sequence[EvalResult]) -> list[np.ndarray]:
    """Of each build the mean loss, KL divergence and top-1 agreement."""
    found = [(r.losses.mean(), r.divergences.mean(), r.agreements.mean()) for r in results]
    return list(np.array(found).T)


def _told(found: Estimate, smallest: float) -> dict[str, Any]:
    """A comparison's verdict, where there is an interval, and what it would have found."""
    if found.builds < 2:
        return {}
    return {"verdict": found.verdict, "smallest": float(smallest)}


def _require_pairs(results: Sequence[EvalResult], references: Sequence[EvalResult]) -> None:
    """Refuse to compare what was not scored on the same windows, on the same device; ValueError."""
    for own, other in zip(results, references, strict=True):
        places = [(r.spec.corpus, r.spec.windows, r.spec.sample, r.spec.window) for r in (own, other)]
        devices = [result.spec.model.device for result in (own, other)]
        if places[0] != places[1] or devices[0] != devices[1]:
            said = f"got {places[0]} on {devices[0]} and {places[1]} on {devices[1]}"
            raise ValueError(f"compared results must share corpus, windows, window and device; {said}")


def line(
    results: Sequence[EvalResult], metric: str, found: Estimate, scale: Callable[[Any], Any] = np.asarray
) -> dict[str, Any]:
    """The results row of any number said of the builds' `results`: `found`, before it is `scale`d."""
    first, interval = results[0], [float(scale(bound)) for bound in found.ci95]
    said = {"builds": len(results), "metric": metric, "value": float(scale(found.mean))}
    said["ci95"] = interval if all(map(math.isfinite, interval)) else None  # of one build there is none
    said |= dict.fromkeys(("verdict", "smallest", "by_build"))
    said["seconds"] = round(sum(result.seconds for result in results), 2)
    made = {name: first.versions[name] for name in PACKAGES if name in first.versions}
    keys = [result.key for result in results]
    said |= {"recipe": public(first.spec).key, "key": keys[0] if len(keys) == 1 else content_key(keys)}
    said |= {"versions": made, "formulas": FORMULAS, "commit": first.commit}
    values = {**columns(first.spec), "family": first.family, **said}
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
    rest += [f"{name}={_word(getattr(recipe, name))}" for name in recipe.LATER if name not in recipe.unkeyed]
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
