"""Orthogonal matrices R (channels, channels), used as `x @ R`: make them from a spec, check, measure."""

import math

import torch
from torch import Tensor

from dfrot_lab.maths.hadamard import hadamard_matrix
from dfrot_lab.recipe.specs import RotationSpec

MAX_ORTHOGONALITY_ERROR = 1e-4
"""A float32 rotation is within about 1e-6; a matrix that is off by more than this changes the model's
function visibly."""


def _random_orthogonal(channels: int, generator: torch.Generator) -> Tensor:
    """RO, Haar distributed: Q of a Gaussian's QR; without the signs of R's diagonal Q would not be uniform
    (Mezzadri, math-ph/0609050)."""
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
    channels on the diagonal.

    ValueError: channels < 1, a block that does not divide channels, RH of an order without a Hadamard matrix.
    """
    if channels < 1:
        raise ValueError(f"rotation.channels must be >= 1; got {channels}")
    if spec.kind == "file":
        raise ValueError(
            f"rotations.make makes NR, RO and RH; a file is read by rotate.random.matrix; got {spec.path}"
        )
    block = spec.block or channels
    if channels % block:
        near = [size for size in range(1, channels + 1) if channels % size == 0]
        raise ValueError(
            f"RotationSpec.block must divide the {channels} channels; got {block}. Use one of {near}"
        )
    generator = torch.Generator().manual_seed(spec.seed)
    return torch.block_diag(*(_block(spec.kind, block, generator) for _ in range(channels // block)))


def orthogonality_error(R: Tensor) -> float:
    """max |R.T @ R - I| in float64: 0 for an exact rotation, about 1e-15 times a small factor for one made
    here."""
    wide = R.detach().to(torch.float64)
    return float(
        (wide.T @ wide - torch.eye(wide.shape[1], dtype=torch.float64, device=wide.device)).abs().max()
    )


def check(R: Tensor, channels: int | None = None) -> Tensor:
    """R in float64, once it is known to be a finite, orthogonal (channels, channels) matrix; a ValueError
    says what it is instead."""
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
    rotations."""
    if R.shape != R0.shape:
        raise ValueError(f"distance.R0 must have the shape of R, {tuple(R.shape)}; got {tuple(R0.shape)}")
    difference = R.detach().to(torch.float64) - R0.detach().to(R.device, torch.float64)
    return float(torch.linalg.matrix_norm(difference) / math.sqrt(R.shape[0]))
