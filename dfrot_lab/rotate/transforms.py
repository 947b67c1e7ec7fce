"""What a rotation method makes, and what it may look at: a method is a module of the table
`recipe.registry.METHODS` with `fit(recipe, context) -> Transforms`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import loading, surgery
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.specs import Recipe

HADAMARD: Literal["hadamard"] = "hadamard"


@dataclass(frozen=True)
class Transforms:
    """The transforms of one model: `R1` (channels, channels) or None; `R2` a Hadamard matrix on each head's
    values, one (head, head) for all layers, one a layer (layers, head, head), or None; `gains` (channels,) a
    norm, folded after R1, and `clips` a clip ratio a site, by site name; whether the online Hadamards R3 and
    R4 act."""

    R1: Tensor | None
    R2: Tensor | Literal["hadamard"] | None = HADAMARD
    gains: Mapping[str, Tensor] = field(default_factory=dict)
    clips: Mapping[str, float] = field(default_factory=dict)
    r3: bool = True
    r4: bool = True


class Context:
    """What a method may look at: the recipe, the store, and the model (not to be changed), once asked for."""

    def __init__(self, recipe: Recipe, store: Store, model: LoadedModel | None = None) -> None:
        self.recipe, self.store, self._model = recipe, store, model

    @property
    def model(self) -> LoadedModel:
        """The recipe's model, untied and with fused norms."""
        if self._model is None:
            self._model = loading.load_model(self.recipe.model, self.store)
            surgery.prepare(self._model)
        return self._model


def fit(recipe: Recipe, context: Context) -> Transforms:
    """The transforms of a recipe by its own method."""
    return registry.load(registry.METHODS, recipe.rotation.method).fit(recipe, context)
