"""The door: where `auto` is replaced by what is here, once, before anything is computed or keyed."""

from functools import cache
from typing import Any, TypeVar, cast

from dfrot_lab.disk.atomic import digest
from dfrot_lab.maths.hadamard import block_of
from dfrot_lab.model import corpus, loading, shapes
from dfrot_lab.recipe.base import Spec, require
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec, Recipe, RotationSpec

S = TypeVar("S", bound=Spec)


def resolved(spec: S, model: ModelSpec | None = None) -> S:
    """`spec`, of `model` (its own by default), without an `auto`: every text and device in it is named, and
    where no Hadamard matrix of a size is known the largest block. ValueError: not here, or no such block."""
    if isinstance(spec, CorpusSpec):
        return cast(S, corpus.resolve(spec))
    if isinstance(spec, ModelSpec):
        return cast(S, loading.placed(spec))
    looks = (value for _, value in spec if isinstance(value, ModelSpec | CaptureSpec))
    model = model or next((of if isinstance(of, ModelSpec) else of.model for of in looks), None)
    inner = {name: value for name, value in spec if isinstance(value, Spec)}
    changed: dict[str, Any] = {
        name: new for name, value in inner.items() if (new := resolved(value, model)) is not value
    }
    if model is not None and isinstance(spec, RotationSpec | Recipe):
        changed |= _blocks(spec, model)
    if model is not None and isinstance(spec, Recipe):
        _require_groups("WeightSpec.quantizer", spec.weights.quantizer, model)
        _require_groups("Recipe.activations", spec.activations, model)
    return spec.with_(**changed) if changed else spec


def _require_groups(name: str, grid: QuantSpec, model: ModelSpec) -> None:
    """Refuse groups of which the inputs of the model's linears have no whole number; ValueError."""
    if size := grid.group_size:
        inputs = sorted(set(_shape_of(model).inputs))
        fits = all(width % size == 0 for width in inputs)
        require(f"{name}.group_size", size, fits, f"a divisor of {', '.join(map(str, inputs))}")


def _blocks(spec: RotationSpec | Recipe, model: ModelSpec) -> dict[str, int | None]:
    """The blocks of a rotation, or of a recipe's R2 to R4, that are not as `model` has to have them."""
    if isinstance(spec, RotationSpec) and not (spec.kind == "RH" and spec.block is None):
        return {}
    if isinstance(spec, Recipe) and not spec.is_rotated:
        return {}
    shape = _shape_of(model)
    sizes = {"head_block": shape.head, "mlp_block": shape.mlp, "block": shape.channels}
    asked = {name: value for name, value in spec if name in sizes}
    if shape.experts > 1 and asked.get("mlp_block", 0) is None:  # MLPs of several widths: each its largest
        del asked["mlp_block"]
    found = {name: block_of(sizes[name], block, f"Recipe.{name}") for name, block in asked.items()}
    named = {name: None if block == sizes[name] else block for name, block in found.items()}
    return {name: block for name, block in named.items() if block != asked[name]}


def _shape_of(model: ModelSpec) -> shapes.Shape:
    return _shape(model.with_(device="cpu"), loading.fingerprint(model))


@cache
def _shape(model: ModelSpec, _bytes: str) -> shapes.Shape:
    return shapes.shape(model)


def prints(of: ModelSpec | CorpusSpec | str) -> str:
    """The hash of what stands behind a name here: of a model, a text, the file at a path."""
    if isinstance(of, ModelSpec):
        return loading.fingerprint(of)
    return corpus.fingerprint(of) if isinstance(of, CorpusSpec) else digest(of)
