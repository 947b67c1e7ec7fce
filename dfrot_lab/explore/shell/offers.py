"""What explorers offer: rotations, weight quantizers, bits, the row a choice means, a grid's levels."""

from typing import Any

import torch
from torch import Tensor

from dfrot_lab.maths.quantizers import code_range, scale_zero
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.specs import ROTATION_KINDS, QuantSpec, Recipe
from dfrot_lab.study import main
from dfrot_lab.study.setting import Setting

KINDS = tuple(kind for kind in ROTATION_KINDS if kind != "file")
"""Rotations that need no activations."""
FULL = "16-16-16"
BITS = (FULL, "16-4-16", "4-8-16", *main.BITS[1:])


def methods() -> tuple[str, ...]:
    """Names of the rotations that can be picked for a row: those of the table of methods."""
    return tuple(registry.rows())


def weights() -> list[str]:
    """Names of the weight quantizers, those of the table."""
    return list(registry.WEIGHTS)


def row(setting: Setting, name: str, bits: str, **fields: Any) -> Recipe:
    """The row of a setting with the rotation `name` of `methods()`; `fields` are those of `Setting.row`."""
    return setting.row(bits, setting.method(name), **fields)


def levels(x: Tensor, quantizer: QuantSpec) -> Tensor:
    """All values the quantizer can give one row x (channels,), lowest first, in x's dtype."""
    scale, zero = scale_zero(x[None], quantizer)
    low, high = code_range(quantizer)
    return (scale * (torch.arange(low, high + 1, dtype=x.dtype) - zero))[0]
