"""SmoothQuant (arXiv 2211.10438): no rotation anywhere. A channel that is large in the activations is made
smaller there and its weights larger, by s = max|x|^alpha / max|w|^(1 - alpha), which the norms' gains hold:
free when the model runs. Made for 8 bits; with 4-bit activations it collapses, and that is what it is here
to show. The inputs of o and down, which no norm makes, stay as they are, as in its release."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from dfrot_lab.model import stream
from dfrot_lab.model.parts import feeds
from dfrot_lab.recipe.base import MethodSpec, ruled
from dfrot_lab.recipe.specs import CaptureSpec, Recipe
from dfrot_lab.rotate.transforms import Context, Transforms

log = logging.getLogger(__name__)
VERSION = 1
NEEDS = "activations"
LEAST = 1e-5  # of the largest: a channel or column below it is taken for it
Scale = Callable[[int, Tensor, list[nn.Linear]], Tensor]
"""Of a layer's number, a norm's output (tokens, channels), all that reads it: the scale s (channels,)."""


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
    spec = recipe.rotation
    assert isinstance(spec, SmoothQuantSpec)
    context.rows(spec.capture)
    started = time.perf_counter()

    def scale(_number: int, rows: Tensor, readers: list[nn.Linear]) -> Tensor:
        return smoothing(rows.abs().amax(0).double(), readers, spec.alpha)

    found = gains(context, spec.capture, scale)
    return unrotated(found, time.perf_counter() - started)


def unrotated(gains: Mapping[str, Tensor], seconds: float) -> Transforms:
    """Gains in the norms by site, and nothing else."""
    return Transforms(R1=None, R2=None, gains=gains, r3=False, r4=False, seconds=seconds)


def gains(context: Context, capture: CaptureSpec, scale: Scale) -> dict[str, Tensor]:
    """By site of a norm that has a gain 1 / s (channels,), s what `scale` finds."""
    recorded, loaded, found = context.rows(capture), context.model, dict[str, Tensor]()
    for number in range(len(loaded.layers)):
        with stream.part(loaded, number):
            for site, (norm, readers) in feeds(loaded, number).items():
                if getattr(norm, "weight", None) is not None:
                    found[site] = 1 / scale(number, recorded.rows(site), readers)
    if not found:
        log.warning("no norm of %s has a gain to hold a scale: nothing is scaled", loaded.family)
    return found


def smoothing(largest: Tensor, readers: list[nn.Linear], alpha: float) -> Tensor:
    """s (channels,) of SmoothQuant's Eq. 4, of each channel's `largest` magnitude (channels,) and the linears
    that read it."""
    columns = torch.stack([one.weight.abs().amax(0).double().cpu() for one in readers]).amax(0)
    x, w = (each.clamp(min=LEAST * float(each.max())) for each in (largest, columns))
    return x**alpha / w ** (1 - alpha)
