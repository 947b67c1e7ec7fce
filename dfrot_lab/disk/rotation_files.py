"""A rotation as a safetensors file: written whole, read with every check."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dfrot_lab import __version__
from dfrot_lab.disk.atomic import replacing
from dfrot_lab.maths.rotations import check
from dfrot_lab.recipe.base import Spec

TENSOR = "R1"
NUMPY = b"\x93NUMPY"  # how a NumPy array's file begins
OTHERS = {b"PK": "torch's own format", b"\x80": "a pickle"}
"""Files of other formats by how they begin. Pickles are never read: they can run code."""


def save(R: Tensor, path: str | Path, spec: Spec | None, **note: Any) -> None:
    """Write R as tensor `R1` (float64) of a safetensors file, whole or not at all, with `spec`, `note` (JSON
    values) and the package version as metadata. What `load` would refuse is refused here too (ValueError)."""
    plain = {"spec": json.dumps(spec and spec.to_dict()), "note": json.dumps(note)}
    tensor = check(R).cpu().contiguous()
    with replacing(Path(path), tensor.nbytes) as temporary:
        save_file({TENSOR: tensor}, temporary, {**plain, "dfrot_lab": __version__})


def load(path: str | Path, channels: int | None = None) -> Tensor:
    """R (channels, channels) float64 of a safetensors file (tensor `R1`, else the one square tensor), or of a
    NumPy array's. FileNotFoundError; ValueError: not complete, no such tensor, wrong size, not finite or
    orthogonal."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"rotation.path must be an existing safetensors file; got {path}")
    matrix = _array(path) if _begins(path).startswith(NUMPY) else _tensor(path)
    try:
        return check(matrix, channels)
    except ValueError as error:
        raise ValueError(f"{error} (in {path})") from error


def _begins(path: str | Path) -> bytes:
    with Path(path).open("rb") as start:
        return start.read(8)


def _array(path: str | Path) -> Tensor:
    """The array in a NumPy file, no object among its numbers."""
    try:
        found = np.load(path, allow_pickle=False, mmap_mode="r")
        return torch.from_numpy(np.array(found))
    except (ValueError, TypeError, EOFError, OSError) as error:
        said = f"got {path} ({' '.join(str(error).split())[:200]})"
        raise ValueError(f"rotation.path must be a whole array of floats; {said}") from error


def _tensor(path: str | Path) -> Tensor:
    """The one tensor of a safetensors file that can be R1."""
    try:
        with safe_open(str(path), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            square = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == shape[1]]
            if TENSOR not in shapes and len(square) != 1:
                rule = f"hold a tensor {TENSOR!r} or exactly one square tensor"
                raise ValueError(f"rotation.path must {rule}; got {shapes or 'no tensor'} in {path}")
            return file.get_tensor(TENSOR if TENSOR in shapes else square[0])
    except SafetensorError as error:
        begins = _begins(path)
        for mark, kind in OTHERS.items():
            if begins.startswith(mark):
                how = f"save_file({{{TENSOR!r}: R}}, 'R1.safetensors') of safetensors.torch"
                said = f"{path}, which is {kind}: load it yourself and save it with {how}"
                raise ValueError(f"rotation.path must be a safetensors file; got {said}") from error
        said = f"got {path} ({error}). Save or copy it again"
        raise ValueError(f"rotation.path must be a complete safetensors file; {said}") from error
