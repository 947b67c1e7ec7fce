"""A rotation as a safetensors file: written whole, read with every check."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dfrot_lab import __version__
from dfrot_lab.disk.atomic import replacing
from dfrot_lab.maths.rotations import check
from dfrot_lab.recipe.base import Spec

TENSOR = "R1"


def save(R: Tensor, path: str | Path, spec: Spec | None, **note: Any) -> None:
    """Write R as tensor `R1` (float64) of a safetensors file, with `spec`, `note` (JSON values) and the
    package version as metadata.

    A reader sees the old file or the new one, never a part. What `load` would refuse is refused here too
    (ValueError)."""
    target = Path(path)
    metadata = {
        "spec": json.dumps(spec and spec.to_dict()),
        "note": json.dumps(note),
        "dfrot_lab": __version__,
    }
    tensor = check(R).cpu().contiguous()
    with replacing(target, tensor.nbytes) as temporary:
        save_file({TENSOR: tensor}, temporary, metadata)


def _open(path: str | Path) -> Any:
    """The safetensors file at `path`, opened; FileNotFoundError or ValueError that names it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"rotation.path must be an existing safetensors file; got {path}")
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"rotation.path must be a complete safetensors file; got {path} ({error}). Save or copy it again"
        ) from error


def _rotation_name(file: Any, path: str | Path) -> str:
    """The name of the rotation's tensor: `R1`, else the one square tensor."""
    names = list(file.keys())
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    square = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == shape[1]]
    if TENSOR in names:
        return TENSOR
    if len(square) != 1:
        raise ValueError(
            f"rotation.path must hold a tensor {TENSOR!r} or exactly one square tensor; "
            f"got {shapes or 'no tensor'} in {path}"
        )
    return square[0]


def load(path: str | Path, channels: int | None = None) -> Tensor:
    """The rotation R (channels, channels) in a safetensors file, float64: tensor `R1`, else the file's one
    square tensor, of any float dtype.

    FileNotFoundError: no such file. ValueError: not a complete safetensors file, no such tensor, wrong size,
    not finite, not orthogonal."""
    with _open(path) as file:
        matrix = file.get_tensor(_rotation_name(file, path))
    try:
        return check(matrix, channels)
    except ValueError as error:
        raise ValueError(f"{error} (in {path})") from error


def load_spec(path: str | Path) -> dict[str, Any] | None:
    """The spec that `save` wrote into the file, as plain values; None where there is none."""
    with _open(path) as file:
        text = (file.metadata() or {}).get("spec", "null")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"rotation.metadata['spec'] must be JSON; got {text!r} in {path}") from error
