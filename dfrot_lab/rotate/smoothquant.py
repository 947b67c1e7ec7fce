"""SmoothQuant (arXiv 2211.10438): no rotation anywhere. A channel that is large in the activations is made
smaller there and its weights larger, by s = max|x|^alpha / max|w|^(1 - alpha), which the norms' gains hold:
free when the model runs. Made for 8 bits; with 4-bit activations it collapses, and that is what it is here
to show. The inputs of o and down, which no norm makes, stay as they are, as in its release."""

import time
from typing import ClassVar

import torch
from torch import Tensor, nn

from dfrot_lab.model import stream
from dfrot_lab.model.parts import feeds
from dfrot_lab.recipe.base import MethodSpec, ruled
from dfrot_lab.recipe.specs import CaptureSpec, Recipe
from dfrot_lab.rotate.transforms import Context, Transforms

VERSION = 1
NEEDS = "activations"
LEAST = 1e-5  # of the largest: a channel or column below it is taken for it


class SmoothQuantSpec(MethodSpec):
    """The rows whose largest values count, and how much of the difficulty moves into the weights."""

    method: ClassVar[str] = "smoothquant"
    capture: CaptureSpec = CaptureSpec()
    alpha: float = ruled(0.5, "in [0, 1]", ge=0, le=1)

    @property
    def name(self) -> str:
        """Name for tables and figures."""
        return "SmoothQuant"


SPEC = SmoothQuantSpec


def spec(_row: str, *, capture: CaptureSpec | None = None, **_seed: object) -> SmoothQuantSpec:
    """The row SmoothQuant."""
    return SmoothQuantSpec(capture=capture or CaptureSpec())


def fit(recipe: Recipe, context: Context) -> Transforms:
    """Gains 1 / s at every norm, and no rotation."""
    assert isinstance(recipe.rotation, SmoothQuantSpec)
    recorded, started, gains = context.rows(recipe.rotation.capture), time.perf_counter(), dict[str, Tensor]()
    for number in range(len(context.model.layers)):
        with stream.part(context.model, number):
            for site, (_, readers) in feeds(context.model, number).items():
                largest = recorded.rows(site).abs().amax(0).double()
                gains[site] = 1 / smoothing(largest, readers, recipe.rotation.alpha)
    seconds = time.perf_counter() - started
    return Transforms(R1=None, R2=None, gains=gains, r3=False, r4=False, seconds=seconds)


def smoothing(largest: Tensor, readers: list[nn.Linear], alpha: float) -> Tensor:
    """s (channels,) of SmoothQuant's Eq. 4, of each channel's `largest` magnitude (channels,) and the linears
    that read it."""
    columns = torch.stack([one.weight.abs().amax(0).double().cpu() for one in readers]).amax(0)
    x, w = (each.clamp(min=LEAST * float(each.max())) for each in (largest, columns))
    return x**alpha / w ** (1 - alpha)
