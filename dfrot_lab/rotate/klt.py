"""KLT: the principal directions of captured rows, then a random Hadamard (the basis of SliceGPT, arXiv
2401.15024, and of ResQ, 2412.14363, which keeps some directions in 8 bits and mixes the others by a random
orthogonal matrix; here all are in 4 bits). Each channel then has the same second moment over those rows, or
nearly, where no Hadamard matrix is known and a random orthogonal one stands for it."""

from typing import ClassVar

import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import hadamard, rotations
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.base import MethodSpec, ruled
from dfrot_lab.recipe.specs import CaptureSpec, Recipe, RotationSpec
from dfrot_lab.rotate.transforms import Context, Transforms, of_rows

KIND = "klt"
VERSION = 1
NEEDS = "activations"


class KltSpec(MethodSpec):
    """The rows whose directions are taken, and the `seed` of the Hadamard that follows."""

    method: ClassVar[str] = "klt"
    capture: CaptureSpec = CaptureSpec()
    seed: int = ruled(0, "a whole number in 0..2^63", ge=0, lt=1 << 63)

    @property
    def name(self) -> str:
        """Name for tables and figures."""
        return "KLT"


SPEC = KltSpec


def spec(_row: str, *, seed: int = 0, capture: CaptureSpec | None = None) -> KltSpec:
    """The row KLT."""
    return KltSpec(capture=capture or CaptureSpec(), seed=seed)


def fit(recipe: Recipe, context: Context) -> Transforms:
    """R1 of the principal directions, R2 to R4 Hadamard."""
    assert isinstance(recipe.rotation, KltSpec)
    R, seconds = principal(recipe.rotation, context.store)
    return Transforms(R1=R, seconds=seconds)


def principal(spec: KltSpec, store: Store | None = None) -> tuple[Tensor, float]:
    """R1 (channels, channels) float64 of `spec`, from the store or made now from the rows of its capture; the
    seconds that took."""

    def make(recorded: Capture) -> Tensor:
        U = torch.linalg.eigh(second_moment(recorded)).eigenvectors.flip(1)
        kind = "RH" if hadamard.factors(len(U)) else "RO"  # blocks would mix large directions with large ones
        mixed = rotations.make(RotationSpec(kind=kind, seed=spec.seed), len(U))
        return U @ mixed

    return of_rows(KIND, spec, store or Store(), make)


def second_moment(recorded: Capture) -> Tensor:
    """The mean of x^T x over all rows of a capture (channels, channels) float64, site by site."""
    total = torch.zeros(recorded.channels, recorded.channels, dtype=torch.float64)
    for site in recorded.sites:
        rows = recorded.rows(site).double()
        total += rows.T @ rows
    return total / (len(recorded.sites) * recorded.tokens)
