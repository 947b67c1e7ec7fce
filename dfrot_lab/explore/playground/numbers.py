"""A spike and noise, rotated by angles or by matrices: its grid, its error, and what the closed form says."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from dfrot_lab.maths import offsets, quantizers, rotations, theory
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import RotationSpec

KINDS = ("NR", "RO", "RH")
SEEDS = 5  # matrices a kind whose errors are shown
SPIKES = 3  # largest entries of a real token that are its spikes: as many as the model's massive tokens have
FEWEST = 32  # channels with a prediction: it takes the grid's step as independent of each entry


def hand_token(snr: float, dims: int, seed: int = 0) -> Tensor:
    """A spike in the first channel and noise (dims,), float64, of that ratio and expected mean square 1."""
    m, sigma = theory.unit_rms(snr, dims)
    x = sigma * torch.randn(dims, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[0] += m
    return x


def planted_token(snr: float, channels: int, seed: int = 0) -> Tensor:
    """The same in a random channel of many (channels,)."""
    m, sigma = theory.unit_rms(snr, channels)
    return theory.planted(m, sigma, channels, 1, torch.Generator().manual_seed(seed))[0]


def by_angles(degrees: Sequence[float]) -> Tensor:
    """The rotation R (2, 2) of one angle, or (3, 3) of three: in the planes of channels 0 and 1, 0 and 2, 1
    and 2, one after the other. x = (1, 0) turned by a is x @ R = (cos a, sin a)."""
    if len(degrees) not in (1, 3):
        rule = "must be one angle (2 channels) or three (3 channels)"
        raise ValueError(f"by_angles.degrees {rule}; got {len(degrees)}")
    dims, (first, second, third) = 2 if len(degrees) == 1 else 3, [*degrees, 0, 0][:3]
    turn = Rotation.from_euler("XYZ", [third, -second, first], degrees=True)  # of columns, the last first
    return torch.from_numpy(turn.inv().as_matrix()[:dims, :dims].copy())


def reading(x: Tensor, R: Tensor, quantizer: QuantSpec) -> dict[str, float]:
    """The grid of x @ R: its range (largest |entry|, or less the smallest), step, error; x's own error; the
    share of its energy that is the same in every channel, 0 to 1."""
    y = x @ R
    scale, _ = quantizers.scale_zero(y[None], quantizer)
    span = y.abs().max() if quantizer.symmetric else y.max().clamp(min=0) - y.min().clamp(max=0)
    error, unrotated = quantizers.squared_error(torch.stack([y, x]), quantizer).tolist()
    found = {"range": float(span), "step": float(scale), "error": error, "unrotated": unrotated}
    return {**found, "offset": float(offsets.offset_share(y))}


def sweep(x: Tensor, degrees: Sequence[float], quantizer: QuantSpec, step: float = 1.0) -> pd.DataFrame:
    """The error at each first angle, 0 to 180 degrees, the others kept. Columns: angle, error."""
    angles = np.arange(0, 180 + step, step)
    c, s = (torch.from_numpy(wave(np.radians(angles))) for wave in (np.cos, np.sin))
    first = torch.stack([c * x[0] - s * x[1], s * x[0] + c * x[1], *x[2:, None].expand(-1, len(c))], 1)
    turned = first @ by_angles([0, *degrees[1:]])
    return pd.DataFrame({"angle": angles, "error": quantizers.squared_error(turned, quantizer).numpy()})


@functools.lru_cache(maxsize=64)
def matrix(kind: str, seed: int, channels: int) -> Tensor:
    """The rotation of a kind and seed (channels, channels), kept: a slider asks for the same ones again."""
    return rotations.make(RotationSpec(kind=kind, seed=seed), channels)


def measured(x: Tensor, quantizer: QuantSpec, seeds: Sequence[int] = range(SEEDS)) -> pd.DataFrame:
    """A token's error under each rotation. Columns: rotation, seed, largest (of its |entries|), error."""
    drawn = [("NR", 0), *((kind, seed) for kind in KINDS[1:] for seed in seeds)]
    turned = torch.stack([x @ matrix(kind, seed, len(x)) for kind, seed in drawn])
    largest, error = turned.abs().amax(1).numpy(), quantizers.squared_error(turned, quantizer).numpy()
    return pd.DataFrame(drawn, columns=["rotation", "seed"]).assign(largest=largest, error=error)


def expected(snr: float, channels: int, quantizer: QuantSpec) -> dict[str, float]:
    """The closed form's error of each kind for a planted token; not a number below FEWEST channels."""
    if channels < FEWEST:
        return dict.fromkeys(KINDS, math.nan)
    m, sigma = theory.unit_rms(snr, channels)
    return {kind: theory.PREDICT[kind](m, sigma, channels, quantizer) for kind in KINDS}


def why(found: pd.DataFrame, predicted: dict[str, float]) -> pd.DataFrame:
    """`measured` beside the closed form. Columns: rotation, measured (mean), low, high, predicted, ratio."""
    errors = found.groupby("rotation", sort=False)["error"].agg(measured="mean", low="min", high="max")
    errors["predicted"] = errors.index.map(predicted)
    return errors.eval("ratio = measured / predicted").reset_index()
