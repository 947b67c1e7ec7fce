"""What explorers offer: rotations, bits, the row a choice means, a capture's spec, a grid's levels."""

from typing import Any

import torch
from torch import Tensor

from dfrot_lab.maths.quantizers import code_range, scale_zero
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.specs import ROTATION_KINDS, CaptureSpec, CorpusSpec, EvalSpec, ModelSpec, QuantSpec
from dfrot_lab.study.setting import MAIN_BITS, Setting

KINDS = tuple(kind for kind in ROTATION_KINDS if kind != "file")
"""Rotations that need no activations."""
FULL = "16-16-16"
BITS = (FULL, "16-4-16", "4-8-16", *MAIN_BITS[1:])


def methods() -> tuple[str, ...]:
    """Names of the rotations that can be picked for a row."""
    return (*KINDS, "DFRot")


def row(setting: Setting, name: str, bits: str, **fields: Any) -> EvalSpec:
    """The row of a setting with the rotation `name` of `methods()`; `fields` are those of `Setting.row`."""
    return setting.row(bits, setting.refine if name == "DFRot" else setting.rotation(name), **fields)


def spec_of(acts: Capture) -> CaptureSpec | None:
    """The CaptureSpec an opened capture was made by; None if its store does not say."""
    said = acts.artefact.manifest.get("inputs", {}).get("spec")
    if not isinstance(said, dict) or said.get("spec") != "CaptureSpec":
        return None
    fields = {name: value for name, value in said.items() if name != "spec"}
    for name, kind in (("model", ModelSpec), ("corpus", CorpusSpec)):
        fields[name] = kind(**{key: value for key, value in fields[name].items() if key != "spec"})
    return CaptureSpec(**fields)


def levels(x: Tensor, quantizer: QuantSpec) -> Tensor:
    """All values the quantizer can give one row x (channels,), lowest first, in x's dtype."""
    scale, zero = scale_zero(x[None], quantizer)
    low, high = code_range(quantizer)
    return (scale * (torch.arange(low, high + 1, dtype=x.dtype) - zero))[0]
