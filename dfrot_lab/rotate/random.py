"""Rotations that look at nothing: none (NR), random orthogonal (RO), random Hadamard (RH), two of these
(RHT2), Walsh matrices in blocks (GSR); and a rotation from a file."""

from torch import Tensor

from dfrot_lab.disk import rotation_files
from dfrot_lab.maths import hadamard, rotations
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.specs import Recipe, RotationSpec
from dfrot_lab.rotate.transforms import Context, Transforms

SPEC = RotationSpec
VERSION = 1
NEEDS = "nothing"


def spec(row: str, *, seed: int = 0, **_capture: object) -> RotationSpec:
    """The rotation of a row, with its seed where it is random."""
    return RotationSpec(kind=row, seed=seed).canonical()


def fit(recipe: Recipe, context: Context) -> Transforms:
    """R1 as the spec says, R2 to R4 Hadamard; NR is no rotation anywhere."""
    assert isinstance(recipe.rotation, RotationSpec)
    if not recipe.is_rotated:
        return Transforms(R1=None, R2=None, r3=False, r4=False)
    return Transforms(R1=matrix(recipe.rotation, context.model.channels))


def start(seed: int, channels: int) -> Tensor:
    """Where a descent starts (channels, channels), float64: a random Hadamard in the largest blocks; where
    there are none, a random orthogonal matrix."""
    kind = "RH" if hadamard.block_of(channels) > 1 else "RO"
    return rotations.make(RotationSpec(kind=kind, seed=seed), channels)


def matrix(spec: RotationSpec, channels: int) -> Tensor:
    """R1 (channels, channels) float64 of a spec; of kind `file` what the file holds. ValueError."""
    if spec.kind != "file":
        return rotations.make(spec, channels)
    said = f"{spec.block}. The matrix is used as it is"
    require("RotationSpec.block", said, spec.block is None, "None for kind 'file'")
    return rotation_files.load(str(spec.path), channels)
