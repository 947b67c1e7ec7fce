"""The playground's numbers: a spike and noise, rotated by angles or by matrices, its grid, its error, and
what the closed form says it should be.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dfrot_lab.maths import planted, rotations, theory
from dfrot_lab.maths.quantizers import code_range, fake_quantize, scale_zero, squared_error
from dfrot_lab.recipe.specs import QuantSpec, RotationSpec

KINDS = ("NR", "RO", "RH")
SEEDS = 5
"""Matrices a kind whose errors are shown."""
SPIKES = 3
"""Largest entries of a real token that the theory takes as spikes: as many as the model's massive tokens
have.
"""
FEWEST = 32
"""Channels below which there is no prediction: the theory takes the grid's step as independent of each entry,
and it is not among a few.
"""


def hand_token(snr: float, dims: int, seed: int = 0) -> Tensor:
    """A spike in the first channel and Gaussian noise (dims,), float64, of signal-to-noise ratio `snr` and
    expected mean square 1.
    """
    m, sigma = theory.unit_rms(snr, dims)
    x = sigma * torch.randn(dims, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[0] += m
    return x


def planted_token(snr: float, channels: int, seed: int = 0) -> Tensor:
    """The same in a random channel of many (channels,)."""
    m, sigma = theory.unit_rms(snr, channels)
    return planted.rows(m, sigma, channels, 1, torch.Generator().manual_seed(seed))[0]


def by_angles(degrees: Sequence[float]) -> Tensor:
    """The rotation R (2, 2) of one angle, or (3, 3) of three: in the planes of channels 0 and 1, 0 and 2, 1
    and 2, one after the other.

    x = (1, 0) turned by a is x @ R = (cos a, sin a). ValueError: neither one angle nor three.
    """
    if len(degrees) not in (1, 3):
        raise ValueError(
            f"by_angles.degrees must be one angle (2 channels) or three (3 channels); got {len(degrees)}"
        )
    dims = 2 if len(degrees) == 1 else 3
    R = torch.eye(dims, dtype=torch.float64)
    for angle, (i, j) in zip(degrees, ((0, 1), (0, 2), (1, 2)), strict=False):
        plane = torch.eye(dims, dtype=torch.float64)
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        plane[i, i], plane[i, j], plane[j, i], plane[j, j] = c, s, -s, c
        R = R @ plane
    return R


def levels(x: Tensor, quantizer: QuantSpec) -> Tensor:
    """The values that codes stand for in the grid of one row x (channels,), lowest first."""
    scale, zero = scale_zero(x[None], quantizer)
    low, high = code_range(quantizer)
    return (scale * (torch.arange(low, high + 1, dtype=x.dtype) - zero))[0]


def reading(x: Tensor, R: Tensor, quantizer: QuantSpec) -> dict[str, float]:
    """What the grid of x @ R is: range (largest |entry|, or largest less smallest), step, error, and the
    error of x itself, all in x's unit.
    """
    y = x @ R
    scale, _ = scale_zero(y[None], quantizer)
    span = y.abs().max() if quantizer.symmetric else y.max().clamp(min=0) - y.min().clamp(max=0)
    return {
        "range": float(span),
        "step": float(scale),
        "error": float(squared_error(y[None], quantizer)),
        "unrotated": float(squared_error(x[None], quantizer)),
    }


def rounded(x: Tensor, R: Tensor, quantizer: QuantSpec) -> tuple[Tensor, Tensor]:
    """x @ R (channels,) and the grid point it is rounded to."""
    y = x @ R
    return y, fake_quantize(y[None], quantizer)[0]


def sweep(x: Tensor, degrees: Sequence[float], quantizer: QuantSpec) -> pd.DataFrame:
    """The error at each whole first angle from 0 to 180 degrees, the other angles as they are. Columns:
    angle, error.
    """
    angles = np.arange(181)
    turned = torch.stack([x @ by_angles([float(angle), *degrees[1:]]) for angle in angles])
    return pd.DataFrame({"angle": angles, "error": squared_error(turned, quantizer).numpy()})


@functools.lru_cache(maxsize=64)
def matrix(kind: str, seed: int, channels: int) -> Tensor:
    """The rotation of a kind and seed (channels, channels), kept: a slider asks for the same ones again and
    again.
    """
    return rotations.make(RotationSpec(kind=kind, seed=seed), channels)


def measured(x: Tensor, quantizer: QuantSpec, seeds: Sequence[int] = range(SEEDS)) -> pd.DataFrame:
    """Error of one token x (channels,) without rotation and under RO and RH of each seed. Columns: rotation,
    seed, largest (|entry|), error.
    """
    drawn = [("NR", 0), *((kind, seed) for kind in KINDS[1:] for seed in seeds)]
    rows = []
    for kind, seed in drawn:
        y = x @ matrix(kind, seed, len(x))
        rows.append((kind, seed, float(y.abs().max()), float(squared_error(y[None], quantizer))))
    return pd.DataFrame(rows, columns=["rotation", "seed", "largest", "error"])


def expected(snr: float, channels: int, quantizer: QuantSpec) -> dict[str, float]:
    """The closed form's error of each kind for a planted token; not a number below FEWEST channels."""
    if channels < FEWEST:
        return dict.fromkeys(KINDS, math.nan)
    m, sigma = theory.unit_rms(snr, channels)
    return {kind: theory.PREDICT[kind](m, sigma, channels, quantizer) for kind in KINDS}


def expected_real(x: Tensor, quantizer: QuantSpec) -> dict[str, float]:
    """The same for a real token x (channels,): its largest entries are the spikes, the rest is the noise."""
    return {
        str(kind): float(value)
        for kind, value in planted.predict(x[None], quantizer, spikes=SPIKES).iloc[0].items()
    }


def why(found: pd.DataFrame, predicted: dict[str, float]) -> pd.DataFrame:
    """`measured`'s table beside the closed form: one row a kind. Columns: rotation, measured (mean over
    seeds), low, high, predicted, ratio.
    """
    error = (
        found.groupby("rotation", sort=False)["error"]
        .agg(measured="mean", low="min", high="max")
        .reset_index()
    )
    error["predicted"] = error["rotation"].map(predicted)
    return error.assign(ratio=error["measured"] / error["predicted"])
