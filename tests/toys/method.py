"""A rotation method in one file: two random Hadamard matrices one after the other; R2 to R4 as usual."""

from typing import ClassVar

from dfrot_lab.maths import rotations
from dfrot_lab.recipe.base import MethodSpec, ruled
from dfrot_lab.recipe.specs import CaptureSpec, Recipe, RotationSpec
from dfrot_lab.rotate.transforms import Context, Transforms


class ToySpec(MethodSpec):
    """The seeds of the first and of the second."""

    method: ClassVar[str] = "toy"
    seed: int = ruled(0, "a whole number >= 0", ge=0)
    second: int = ruled(1, "a whole number >= 0", ge=0)

    @property
    def name(self) -> str:
        """As tables show it."""
        return "TOY"


SPEC = ToySpec


def spec(row: str, *, seed: int = 0, capture: CaptureSpec | None = None) -> ToySpec:
    """The row TOY."""
    del row, capture
    return ToySpec(seed=seed)


def fit(recipe: Recipe, context: Context) -> Transforms:
    """R1 as the spec says."""
    assert isinstance(recipe.rotation, ToySpec)
    first, second = (RotationSpec(seed=seed) for seed in (recipe.rotation.seed, recipe.rotation.second))
    channels = context.model.channels
    return Transforms(R1=rotations.make(first, channels) @ rotations.make(second, channels))
