"""Orthogonal matrices R (channels, channels), used as `x @ R`: make them from a spec, check, measure, export
and import them.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dfrot_lab import __version__
from dfrot_lab.disk.atomic import replacing
from dfrot_lab.disk.digests import digest
from dfrot_lab.maths.hadamard import hadamard_matrix
from dfrot_lab.recipe.specs import RotationSpec, Spec

TENSOR = "R1"
MAX_ORTHOGONALITY_ERROR = 1e-4
"""A float32 rotation is within about 1e-6; a matrix that is off by more than this changes the model's
function visibly.
"""


def _random_orthogonal(channels: int, generator: torch.Generator) -> Tensor:
    """RO, Haar distributed: Q of a Gaussian's QR; without the signs of R's diagonal Q would not be uniform
    (Mezzadri, math-ph/0609050).
    """
    q, r = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64, generator=generator))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def _random_hadamard(channels: int, generator: torch.Generator) -> Tensor:
    """RH: diag(s) @ H.T / sqrt(channels), signs before the Hadamard matrix."""
    signs = torch.randint(0, 2, (channels, 1), generator=generator) * 2 - 1
    return signs * hadamard_matrix(channels).T / math.sqrt(channels)


def _block(kind: str, channels: int, generator: torch.Generator) -> Tensor:
    if kind == "RO":
        return _random_orthogonal(channels, generator)
    if kind == "RH":
        return _random_hadamard(channels, generator)
    return torch.eye(channels, dtype=torch.float64)


def make(spec: RotationSpec, channels: int) -> Tensor:
    """The rotation R (channels, channels) of `spec`, float64 on the CPU; `x @ R` rotates rows. Same spec,
    same bytes.

    NR is the identity. RO is uniform over all orthogonal matrices. RH is diag(s) @ H.T / sqrt(channels) with
    random signs s, so that `x @ R = hadamard_transform(x * s) / sqrt(channels)`: the signs come before the
    Hadamard matrix. After it they would only flip output channels and leave every symmetric per-token error
    as it was (QuaRot, arXiv 2404.00456; DFRot, arXiv 2412.00648). `block=b` puts independent rotations of b
    channels on the diagonal. Kind `file` is `load(spec.path, channels)`.

    ValueError: channels < 1, a block that does not divide channels, RH of an order without a Hadamard matrix.
    """
    if channels < 1:
        raise ValueError(f"rotation.channels must be >= 1; got {channels}")
    if spec.kind == "file":
        if spec.block is not None:
            raise ValueError(
                f"RotationSpec.block must be None for kind 'file'; got {spec.block}. The file's matrix is used as it is"
            )
        return load(str(spec.path), channels)
    block = spec.block or channels
    if channels % block:
        near = [size for size in range(1, channels + 1) if channels % size == 0]
        raise ValueError(
            f"RotationSpec.block must divide the {channels} channels; got {block}. Use one of {near}"
        )
    generator = torch.Generator().manual_seed(spec.seed)
    return torch.block_diag(*(_block(spec.kind, block, generator) for _ in range(channels // block)))


def identity(spec: RotationSpec) -> dict[str, Any]:
    """What a rotation is keyed by: its spec, a file by its bytes and not by where it lies."""
    return {**spec.to_dict(), "path": digest(spec.path) if spec.path else None}


def orthogonality_error(R: Tensor) -> float:
    """max |R.T @ R - I| in float64: 0 for an exact rotation, about 1e-15 times a small factor for one made
    here.
    """
    wide = R.detach().to(torch.float64)
    return float(
        (wide.T @ wide - torch.eye(wide.shape[1], dtype=torch.float64, device=wide.device)).abs().max()
    )


def check(R: Tensor, channels: int | None = None) -> Tensor:
    """R in float64, once it is known to be a finite, orthogonal (channels, channels) matrix; a ValueError
    says what it is instead.
    """
    if R.ndim != 2 or R.shape[0] != R.shape[1] or R.shape[0] == 0:
        raise ValueError(f"rotation.shape must be (channels, channels); got {tuple(R.shape)}")
    if channels is not None and R.shape[0] != channels:
        raise ValueError(
            f"rotation.shape must be ({channels}, {channels}); got {tuple(R.shape)}. Use a rotation made for this model's hidden size"
        )
    if not R.is_floating_point():
        raise ValueError(f"rotation.dtype must be a float dtype; got {R.dtype}")
    if not R.isfinite().all():
        raise ValueError(
            f"rotation.values must be finite; got {int((~R.isfinite()).sum())} NaN or Inf of {R.numel()}. Make or save it again"
        )
    error = orthogonality_error(R)
    if error > MAX_ORTHOGONALITY_ERROR:
        advice = "Save it in float32 or float64, or use its nearest rotation, U @ Vt of its SVD (not Q of a QR, which flips signs)"
        raise ValueError(
            f"rotation.orthogonality_error must be <= {MAX_ORTHOGONALITY_ERROR:g}; got {error:.3g}. {advice}"
        )
    return R.detach().to(torch.float64)


def distance(R: Tensor, R0: Tensor) -> float:
    """||R - R0||_F / sqrt(channels), in float64: 0 for equal, about sqrt(2) for unrelated, 2 for opposite
    rotations.
    """
    if R.shape != R0.shape:
        raise ValueError(f"distance.R0 must have the shape of R, {tuple(R.shape)}; got {tuple(R0.shape)}")
    difference = R.detach().to(torch.float64) - R0.detach().to(R.device, torch.float64)
    return float(torch.linalg.matrix_norm(difference) / math.sqrt(R.shape[0]))


def save(R: Tensor, path: str | Path, spec: Spec | None, **note: Any) -> None:
    """Write R as tensor `R1` (float64) of a safetensors file, with `spec`, `note` (JSON values) and the
    package version as metadata.

    A reader sees the old file or the new one, never a part. What `load` would refuse is refused here too
    (ValueError).
    """
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
            f"rotation.path must hold a tensor {TENSOR!r} or exactly one square tensor; got {shapes or 'no tensor'} in {path}"
        )
    return square[0]


def load(path: str | Path, channels: int | None = None) -> Tensor:
    """The rotation R (channels, channels) in a safetensors file, float64: tensor `R1`, else the file's one
    square tensor, of any float dtype.

    FileNotFoundError: no such file. ValueError: not a complete safetensors file, no such tensor, wrong size,
    not finite, not orthogonal.
    """
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
