"""Every content key and fingerprint: what an artefact is named by, the hash of plain values. A model, a text
and a file stand for their bytes, so that what moved is found again and what changed is not."""

from collections.abc import Callable, Sequence
from typing import Any

from dfrot_lab.recipe import registry
from dfrot_lab.recipe.base import MethodSpec, Spec, content_key
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec, Recipe, StaticSpec, WeightSpec

FORMULAS = 5  # version of what artefacts hold and how it is computed; raise it with any change of a formula
Prints = Callable[[ModelSpec | CorpusSpec | str], str]  # a model's, a text's, a path's hash


def model_key(digest: str, dtype: str, device: str) -> str:
    """A model's key: its bytes, its dtype, and the kind of device, since at 4 bits a rounding turns codes."""
    return content_key([digest, dtype, device])


def identity(spec: Spec, prints: Prints) -> Any:
    """What a resolved spec is keyed by: its values, with bytes in place of names."""
    if isinstance(spec, ModelSpec | CorpusSpec):
        return prints(spec)
    fields = {name: value for name, value in spec if name not in spec.unkeyed}
    said = {name: identity(v, prints) if isinstance(v, Spec) else v for name, v in fields.items()}
    tables = {WeightSpec: registry.WEIGHTS, QuantSpec: registry.CACHES}
    if isinstance(spec, MethodSpec | WeightSpec | QuantSpec) and spec.method is not None:
        table = tables.get(type(spec), registry.METHODS)
        if (code := registry.code(table, spec.method)) != 1:  # a first version adds nothing to a key
            said["code"] = code
    if said.get("path") is not None:
        said["path"] = prints(said["path"])
    return {"spec": type(spec).__name__, **said}


def weights(recipe: Recipe, prints: Prints) -> dict[str, Any]:
    """What quantized weights are keyed by: how, and the rotated model they are of."""
    of = {name: identity(getattr(recipe, name), prints) for name in ("model", "rotation", "weights")}
    calibrated = registry.load(registry.WEIGHTS, recipe.weights.method).CALIBRATED
    of |= {"scales": scales(recipe, prints)} if recipe.scales else {}
    of |= prefix(recipe, prints) if calibrated and recipe.prefix else {}
    names = (*recipe.SHAPES, "jitter") if calibrated else recipe.SHAPES  # jitter moves what is calibrated on
    if recipe.weights.sees_rounded:
        of |= {name: identity(getattr(recipe, name), prints) for name in ("activations", "keys", "values")}
        looks = {name: text for name in ("clips", "static") if (text := getattr(recipe, name)) is not None}
        of |= {name: identity(text, prints) for name, text in looks.items()}
        names = (*names, "keep_out", "keep_out_tokens")
    return of | {name: getattr(recipe, name) for name in names if name not in recipe.unkeyed}


def clips(recipe: Recipe, prints: Prints) -> dict[str, Any]:
    """What the clip ratios of a recipe are keyed by: the rotated model, its scales, the text, the grid."""
    own = {"scales": scales(recipe, prints)} if recipe.scales else {}
    return _found_on(recipe, recipe.clips, prints) | own


def scales(recipe: Recipe, prints: Prints) -> dict[str, Any]:
    """What the channel scales of a recipe are keyed by: the rotated model, the text, the grid."""
    return _found_on(recipe, recipe.scales, prints)


def static(recipe: Recipe, prints: Prints) -> dict[str, Any]:
    """What the static scales of a recipe are keyed by: the rotated model, the text, the grid."""
    return _found_on(recipe, recipe.static, prints)


def prefix(recipe: Recipe, prints: Prints) -> dict[str, Any]:
    """What the tokens of a recipe's prefix are keyed by: the model, the text, the rule."""
    assert recipe.prefix is not None
    own = recipe.prefix.with_(reference="plain")  # which is a matter of what they are compared with
    return {"prefixed": prints(recipe.model), "prefix": identity(own, prints)}


def _found_on(recipe: Recipe, text: CaptureSpec | StaticSpec | None, prints: Prints) -> dict[str, Any]:
    assert text is not None
    of = {name: identity(getattr(recipe, name), prints) for name in ("model", "rotation", "activations")}
    names = [name for name in (*recipe.SHAPES, "jitter") if name not in recipe.unkeyed]
    of |= prefix(recipe, prints) if recipe.prefix else {}
    return of | {"on": identity(text, prints)} | {name: getattr(recipe, name) for name in names}


def built(recipe: Recipe, prints: Prints) -> dict[str, Any]:
    """What the whole model of a recipe is keyed by: its weights, its embedding, its clips."""
    own = {"clips": clips(recipe, prints)} if recipe.clips else {}
    own |= {"static": static(recipe, prints)} if recipe.static else {}
    own |= prefix(recipe, prints) if recipe.prefix else {}
    return weights(recipe, prints) | {"jitter": recipe.jitter} | own


def evaluation(recipe: Recipe, prints: Prints) -> dict[str, Any]:
    """What the measures of a canonical recipe are keyed by."""
    found = {"recipe": identity(recipe, prints)}
    if recipe.set_massive == "mean":  # the values it sets come from the text's other half
        found["means"] = prints(recipe.corpus.with_(split="calibration"))
    return found


def reference(model: ModelSpec, ids: list[int], prints: Prints, before: Sequence[int] = ()) -> dict[str, Any]:
    """What the full-precision model makes of one window of token ids is keyed by: the two, and the ids of
    what is `before` them, where anything is."""
    return {"model": prints(model), "ids": content_key(ids)} | ({"before": [*before]} if before else {})


def costs(recipe: Recipe, ids: list[int], prints: Prints) -> dict[str, Any]:
    """What the cost of each place's rounding in one window of token ids is keyed by: the built model, which
    is the same for all activations' grids, the grid, the ids."""
    own = {"built": built(recipe, prints), "activations": identity(recipe.activations, prints)}
    return {**own, "ids": content_key(ids)}


def tasks(of: Spec, prints: Prints, digests: dict[str, str], limit: int | None, version: str) -> Any:
    """What zero-shot accuracies are keyed by: of whom, the tasks' items, how many, and lm-eval's version."""
    return {"of": identity(of, prints), "tasks": digests, "limit": limit, "lm_eval": version}
