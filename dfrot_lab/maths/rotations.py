"""Orthogonal matrices R (channels, channels), used as `x @ R`: make them from a spec, check, measure."""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dfrot_lab.maths.hadamard import block_of, factors, hadamard_matrix, hadamard_transform
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.specs import RotationSpec

log = logging.getLogger(__name__)
WALSH_BLOCK = 128  # of GSR, where channels allow it: its paper's
FAST_FROM = 2048  # channels from which a product with a Hadamard matrix is worth a transform of its own
MAX_ORTHOGONALITY_ERROR = 1e-4  # float32 has about 1e-6; more than this changes the model visibly


def _block(kind: str, channels: int, generator: torch.Generator) -> Tensor:
    """One diagonal block (channels, channels) of a kind, float64."""
    if kind == "RO":
        q, r = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64, generator=generator))
        return q * torch.where(r.diagonal() < 0, -1.0, 1.0)  # else not uniform: Mezzadri, math-ph/0609050
    if kind == "RHT2":
        first, second = (_block("RH", channels, generator) for _ in range(2))
        return first @ second
    if kind == "GSR":
        H = hadamard_matrix(channels) / math.sqrt(channels)
        return H[(H[:, 1:] * H[:, :-1] < 0).sum(1).argsort(stable=True)]
    if kind == "RH":
        signs = torch.randint(0, 2, (channels, 1), generator=generator) * 2 - 1
        return signs * hadamard_matrix(channels).T / math.sqrt(channels)
    return torch.eye(channels, dtype=torch.float64)


def make(spec: RotationSpec, channels: int) -> Tensor:
    """The rotation R (channels, channels) of `spec`, float64 on the CPU. Same spec, same bytes. NR is the
    identity; RO is uniform (Haar); RH is diag(s) @ H.T / sqrt(channels), its random signs s before H, as
    after it they would only flip output channels (QuaRot, arXiv 2404.00456); RHT2 is two of these, one after
    the other; GSR has Walsh matrices on the diagonal, Hadamard matrices with rows by their changes of sign
    (arXiv 2505.03810), of up to 128 channels. `block=b`: independent ones of b channels on the diagonal;
    None: one, and of RH and RHT2 the largest that there are (`block_of`, which says so). ValueError: a block
    that does not divide channels, or of which no H is known."""
    require("rotation.channels", channels, channels >= 1, ">= 1")
    if spec.kind == "file":
        raise ValueError(f"rotations.make: a file is read by rotate.random.matrix; got {spec.path}")
    block = spec.block or _default_block(spec.kind, channels)
    if channels % block:
        near = [size for size in range(1, channels + 1) if channels % size == 0]
        said = f"the {channels} channels; got {block}. Use one of {near}"
        raise ValueError(f"RotationSpec.block must divide {said}")
    generator = torch.Generator().manual_seed(spec.seed)
    return torch.block_diag(*(_block(spec.kind, block, generator) for _ in range(channels // block)))


def _default_block(kind: str, channels: int) -> int:
    if kind == "GSR":
        block = math.gcd(channels, WALSH_BLOCK)
        if block == 1:
            log.warning("GSR has blocks of a power of two: what is %d wide is rotated not at all", channels)
        return block
    return block_of(channels) if kind in ("RH", "RHT2") else channels


def fast_product(R: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The function x -> x @ R, x (..., channels), by the fast transform if R is a large RH: a tenth
    of the time. None for other matrices."""
    n = len(R)
    if n >= FAST_FROM and factors(n) is not None:
        signs = R[:, :1] / (H := hadamard_matrix(n).T.to(R) / math.sqrt(n))[:, :1]
        if torch.equal(signs * H, R):
            return lambda x: hadamard_transform(x * signs.T.to(x.dtype), n**-0.5)
    return None


def orthogonality_error(R: Tensor) -> float:
    """max |R.T @ R - I| in float64: about 1e-15 times a small factor for a rotation made here."""
    wide = R.detach().to(torch.float64)
    gram = wide.T @ wide
    return float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())


def check(R: Tensor, channels: int | None = None) -> Tensor:
    """R in float64, once it is known to be a finite, orthogonal (channels, channels) matrix; ValueError."""
    shape = tuple(R.shape)
    square = R.ndim == 2 and shape[0] == shape[1] > 0
    require("rotation.shape", shape, square, "(channels, channels)")
    advice = f"{shape}. Use a rotation made for this model's hidden size"
    require("rotation.shape", advice, channels in (None, shape[0]), f"({channels}, {channels})")
    require("rotation.dtype", R.dtype, R.is_floating_point(), "a float dtype")
    bad = int((~R.isfinite()).sum())
    require("rotation.values", f"{bad} NaN or Inf of {R.numel()}. Make or save it again", not bad, "finite")
    error, most = orthogonality_error(R), MAX_ORTHOGONALITY_ERROR
    advice = "or use U @ Vt of its SVD, its nearest rotation (Q of a QR flips signs)"
    said = f"{error:.3g}. Save it in float32 or float64, {advice}"
    require("rotation.orthogonality_error", said, not error > most, f"<= {most:g}")
    return R.detach().to(torch.float64)


def distance(R: Tensor, R0: Tensor) -> float:
    """||R - R0||_F / sqrt(channels) in float64: 0 for equal ones, about sqrt(2) unrelated, 2 opposite."""
    if R.shape != R0.shape:
        raise ValueError(f"distance.R0 must have the shape of R, {tuple(R.shape)}; got {tuple(R0.shape)}")
    difference = R.detach().to(torch.float64) - R0.detach().to(R.device, torch.float64)
    return float(torch.linalg.matrix_norm(difference) / math.sqrt(R.shape[0]))
