"""TurboQuant for least squared error (arXiv 2504.19874, Alg. 1): a vector's norm is held, its direction is
turned by a random rotation, and each of the d coordinates rounded to the nearest of 2^b centroids. Turned so,
whatever it was, a coordinate t has the density  f(t) ~ (1 - t^2)^((d - 3) / 2)  on [-1, 1]  (a Beta
distribution), so one codebook is best for all: Lloyd-Max's, in which each centroid is the mean of f over what
is nearest to it. Norms stay float. Not here: the variant `prod`, with one bit of QJL on what is left."""

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betainc, betaincinv, betaln
from torch import Tensor

from dfrot_lab.maths import rotations
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import RotationSpec

VERSION = 1
MOST_BITS = 8
STILL = 1e-7  # standard deviations of a coordinate: the step at which Lloyd's iterations end
Array = NDArray[np.float64]


def keys(x: Tensor, spec: QuantSpec) -> Tensor:
    """Keys x (..., head size) rounded so, turned back: one rotation, of `seed`, for all heads. ValueError:
    more than 8 bits, a head of 1 channel."""
    require("QuantSpec.bits", spec.bits, spec.bits <= MOST_BITS, f"<= {MOST_BITS} with method turboquant")
    kind = torch.promote_types(x.dtype, torch.float32)
    R = rotation(x.shape[-1], int(spec.seed or 0)).to(x.device, kind)
    centroids = torch.from_numpy(codebook(x.shape[-1], spec.bits)).to(x.device, kind)
    rows = x.to(kind)
    norms = rows.norm(dim=-1, keepdim=True)
    turned = rows @ R / torch.where(norms == 0, 1, norms)
    nearest = torch.bucketize(turned, (centroids[1:] + centroids[:-1]) / 2)
    return (centroids[nearest] @ R.T * norms).to(x.dtype)


values = keys


@lru_cache(maxsize=8)
def rotation(channels: int, seed: int) -> Tensor:
    """The random orthogonal matrix (channels, channels), float64 on the CPU. Same seed, same bytes."""
    return rotations.make(RotationSpec(kind="RO", seed=seed), channels)


@lru_cache(maxsize=32)
def codebook(channels: int, bits: int) -> Array:
    """The 2^bits Lloyd-Max centroids, rising, of one coordinate of a random direction of `channels`: from the
    density's quantiles of the best fine grid (its cube root's), Lloyd's iterations until none moves."""
    require("turboquant.channels", channels, channels >= 2, "a head size >= 2: of 1 there is no rotation")
    count = 1 << bits
    own = (channels - 1) / 2  # both of the Beta distribution's parameters, of (t + 1) / 2
    spread = (own - 1) / 3 + 1  # of the density's cube root
    centroids = 2 * betaincinv(spread, spread, (np.arange(count) + 0.5) / count) - 1
    moved = math.inf
    while moved > STILL / math.sqrt(channels):
        following = _means(centroids, channels)
        moved, centroids = float(np.abs(following - centroids).max()), following
    return centroids


def _means(centroids: Array, channels: int) -> Array:
    """The mean of the density over what is nearest to each centroid: its first moment over its mass there."""
    mass, moment, _ = _moments(centroids, channels)
    return moment / mass


def distortion(centroids: Array, channels: int) -> float:
    """The expected squared error of a direction of `channels`, each coordinate at its nearest centroid
    (Eq. 4, times d); of a vector times its squared norm."""
    mass, moment, square = _moments(centroids, channels)
    return float(channels * (square - 2 * centroids * moment + centroids**2 * mass).sum())


def _moments(centroids: Array, d: int) -> tuple[Array, Array, Array]:
    """Mass, first and second moment of a coordinate's density over what is nearest to each centroid. With c
    the density's constant, t f integrates to F = -c (1 - t^2)^((d - 1) / 2) / (d - 1), and t^2 f to t F less
    the integral of F, which is -1 / d times the mass in d + 2 dimensions."""
    edges = np.concatenate([[-1.0], (centroids[1:] + centroids[:-1]) / 2, [1.0]])
    own = (d - 1) / 2
    below = betainc(own, own, (edges + 1) / 2)
    constant = math.exp(-betaln(own, 0.5))
    F = -constant * (1 - edges**2) ** own / (d - 1)
    mass, moment = np.diff(below), np.diff(F)
    square = np.diff(edges * F) + np.diff(betainc(own + 1, own + 1, (edges + 1) / 2)) / d
    return mass, moment, square
