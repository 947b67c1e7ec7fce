"""The shortest way from no rotation to a whole one, and what a token's error does on it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dfrot_lab.maths import offsets
from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.maths.rotations import check
from dfrot_lab.recipe.grids import QuantSpec

ORDINARY = 64  # tokens, spread over the window, whose mean error is drawn beside the one looked at
STEPS = 50  # of the curve
FLAT = 1e-6  # sine of an angle that is taken for 0 or 180 degrees
TILT = 0.6180339887  # at which hardly two angles look alike: cos + TILT sin


class Way(NamedTuple):
    """A geodesic of rotations: at share t every plane of two rows of `basis` is turned by t times its angle.
    `basis` (channels, channels), `angles` of its rows (0, 1), (2, 3), ...; `signs` (channels,) before it."""

    basis: Tensor
    angles: Tensor
    signs: Tensor


def way(R: Tensor) -> Way:
    """The shortest way to `R` (channels, channels), orthogonal: from the identity, or, where R turns space
    inside out (det -1), which no turning does, from the identity with the last channel's sign changed. Planes
    are pairs of R's eigenvectors a + ib, a - ib; those of R are those of the Hermitian matrix that its
    symmetric and, tilted, its skew part make, which are found fast. ValueError: R is not orthogonal."""
    R = check(R.double())
    signs = torch.ones(len(R), dtype=torch.float64)
    signs[-1] = torch.linalg.det(R).sign()
    R = signs[:, None] * R
    even, odd = (R + R.T) / 2, (R - R.T) / 2
    found = torch.linalg.eigh(torch.complex(even, TILT * odd)).eigenvectors
    angle = (found.conj() * (R.to(found.dtype) @ found)).sum(0).angle()
    alone = angle.sin().abs() <= FLAT  # turned by half a circle, or not at all
    planes, still = found[:, ~alone & (angle > 0)], found[:, alone]
    both = torch.stack([planes.real, planes.imag], 2).flatten(1) * 2**0.5
    span = torch.linalg.svd(torch.cat([still.real, still.imag], 1), full_matrices=False)[0]
    span = span[:, : still.shape[1]]
    values, order = torch.linalg.eigh(span.T @ even @ span)  # -1 first: an even number, for det is 1
    halves = torch.full((int((values < 0).sum()) // 2,), math.pi, dtype=torch.float64)
    basis = torch.cat([both, span @ order], 1)
    return Way(basis.T.contiguous(), torch.cat([angle[~alone & (angle > 0)], halves]), signs)


def turned(x: Tensor, to: Way, shares: Sequence[float]) -> Tensor:
    """Rows `x` (tokens, channels) turned by these shares of the way (shares, tokens, channels), float64."""
    at = (x.double() * to.signs) @ to.basis.T
    n = 2 * len(to.angles)
    first, second = at[:, 0:n:2], at[:, 1:n:2]
    angle = torch.tensor(list(shares), dtype=torch.float64)[:, None, None] * to.angles
    c, s = (torch.from_numpy(wave(angle.numpy())) for wave in (np.cos, np.sin))
    made = at.expand(len(angle), *at.shape).clone()
    made[..., 0:n:2], made[..., 1:n:2] = c * first - s * second, s * first + c * second
    return made @ to.basis


def ordinary(rows: Tensor, heavy: Tensor) -> Tensor:
    """A few of `rows` (tokens, channels) that are not `heavy` (tokens,), spread over all."""
    places = (~heavy).nonzero()[:, 0]
    return rows[places[:: max(1, math.ceil(len(places) / ORDINARY))]]


def curve(x: Tensor, others: Tensor, to: Way, quantizer: QuantSpec, steps: int = STEPS) -> pd.DataFrame:
    """Along the way, in `steps`: `share`, the error of the row x (channels,) as `token`, the mean one of
    `others` (tokens, channels) as `ordinary`, and the share of the token's energy that is the same in every
    channel as `offset`."""
    shares = [n / steps for n in range(steps + 1)]
    own = turned(x[None], to, shares)[:, 0]
    mean = [float(squared_error(rows, quantizer).mean()) for rows in turned(others, to, shares)]
    errors = {"token": squared_error(own, quantizer).numpy(), "ordinary": mean}
    return pd.DataFrame({"share": shares, **errors, "offset": offsets.offset_share(own).numpy()})


def histogram(y: Tensor, grid: Tensor, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """How many of a token's values y (channels,) lie in each of so many bins, and the bins' edges: from the
    lowest to the highest of them and of the `grid` (levels,)."""
    ends = (float(min(y.min(), grid.min())), float(max(y.max(), grid.max())))
    return np.histogram(y.numpy(), bins, ends)
