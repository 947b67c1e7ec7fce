"""DFRot Lab: see, prove and use what rotation does to 4-bit language models.

Words used everywhere: x (tokens, channels); R (channels, channels); `x @ R` is the rotation, in this
direction only; NR, RO, RH are no rotation, random orthogonal and random Hadamard; a site is a place in the
model whose activations we look at, such as `layers.12.input_norm`.

Importing this package is cheap: torch and transformers load with the first name that needs them. What shares
its module's name is taken from there: `from dfrot_lab.observe.capture import capture`."""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "ModelSpec": "recipe.specs", "CorpusSpec": "recipe.specs", "RotationSpec": "recipe.specs",
    "QuantSpec": "recipe.specs", "CaptureSpec": "recipe.specs", "RefineSpec": "recipe.specs",
    "WeightSpec": "recipe.specs", "Recipe": "recipe.specs", "recipe_of": "recipe.specs",
    "load_model": "model.loading", "token_blocks": "model.corpus", "Store": "disk.artefacts",
    "token_errors": "observe.errors", "load_export": "export.compressed",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dfrot_lab' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dfrot_lab.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_HOME, "__version__"])
