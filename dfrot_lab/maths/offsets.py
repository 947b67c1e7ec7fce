"""What an offset costs a quantized row, and the map that makes one: the plane map.

A row y = mu + sigma g, Gaussian g, spans 2 sigma nu, with nu = E max of its C Gaussian numbers. A free range
is just that, whatever mu. The asymmetric range also holds 0: it is no wider while |mu| <= sigma nu, then
grows with |mu|. So of a row's energy an offset may be up to nu^2 / (1 + nu^2) and cost nothing, and what it
takes away, its share s of the energy, is taken from the error: E = (1 - s) E_0. A symmetric range pays for
every part of it.

A rotation sends one direction u of its choice to the all-ones direction, u @ R = 1 / sqrt(C): then the offset
of every row x is (x . u) / sqrt(C). Two reflections make it of any rotation. Wrong arguments are
ValueErrors."""

import math

import torch
from scipy.integrate import quad
from scipy.special import ndtr
from torch import Tensor

from dfrot_lab.maths.quantizers import code_range
from dfrot_lab.maths.theory import rounding_error
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.grids import QuantSpec

ASYM4 = QuantSpec(scheme="asymmetric")
_FAR = 12.0  # standard deviations beyond which no Gaussian number is taken to lie
ALONG = 1e-3  # length of what is left of a unit vector that lies along another


def expected_highest(channels: int) -> float:
    """nu, the expected largest of `channels` numbers N(0, 1): 3.1 of 576, 3.7 of 4096."""
    require("offsets.channels", channels, channels >= 1, "a whole number >= 1")
    above = quad(lambda t: 1 - ndtr(t) ** channels, 0, _FAR, limit=200)[0]
    return float(above - quad(lambda t: ndtr(t) ** channels, -_FAR, 0, limit=200)[0])


def free_share(channels: int) -> float:
    """The largest share of a row's energy that an offset takes for nothing where the range holds 0: 0 to
    1."""
    squared = expected_highest(channels) ** 2
    return squared / (1 + squared)


def expected_error(offset: float, sigma: float, channels: int, quantizer: QuantSpec = ASYM4) -> float:
    """Expected squared error (unit of x^2) of a row of `channels` numbers N(offset, sigma^2), asymmetric or
    free, from the expected range alone: within 6% of planted rows from 64 channels and 3 bits on."""
    require("offsets.sigma", sigma, 0 < sigma < math.inf, "finite and > 0")
    require("offsets.offset", offset, math.isfinite(offset), "finite")
    plain = quantizer.granularity == "per_token" and quantizer.clip_ratio == 1 and quantizer.bits < 16
    rule = "asymmetric or free, per_token, with clip_ratio 1 and fewer than 16 bits"
    require("offsets.quantizer", quantizer.name, plain and not quantizer.symmetric, rule)
    half = sigma * expected_highest(channels)
    wide = 2 * half if quantizer.scheme == "free" else half + max(half, abs(offset))
    step = wide / code_range(quantizer)[1]
    level = torch.tensor([offset / step]).double().numpy()
    return channels * step**2 * float(rounding_error(level, level * 0 + sigma / step)[0])


def offset_share(rows: Tensor) -> Tensor:
    """The share of each row's energy that its offset has, 0 to 1 (tokens,); rows (tokens, channels)."""
    energy = rows.double().square().sum(-1)
    return (
        rows.shape[-1] * rows.double().mean(-1).square() / energy.clamp(min=torch.finfo(torch.float64).tiny)
    )


def flat_rows(channels: int) -> Tensor:
    """Two orthonormal rows (2, channels) float64 of equal |entries|: all of one sign, then in turn of either
    (of an odd number nearly). ValueError: fewer than 2 channels."""
    require("offsets.channels", channels, channels >= 2, "a whole number >= 2")
    rows = torch.ones(2, channels, dtype=torch.float64)
    rows[1, 1::2] = -1
    rows[1] -= rows[1].mean()
    return rows / rows.norm(dim=1, keepdim=True)


def carried(rows: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """`rows` (n, channels) after the rotation that takes each of the orthonormal rows `before` (k, channels)
    to that of `after`, by one or two reflections each: lengths and angles stay, and so does what is
    orthogonal to both. Where a row is near its goal it goes to the opposite first: their difference would be
    rounding."""
    both = torch.cat([before.double(), rows.double()])
    for place, goal in enumerate(after.double()):
        near = float(both[place] @ goal) > 0
        for normal in (both[place] + goal, goal) if near else (both[place] - goal,):
            unit = normal / normal.norm()
            both = both - 2 * torch.outer(both @ unit, unit)
    return both[len(before) :].to(rows)


def plane(mean: Tensor, spike: Tensor, mixture: float) -> Tensor:
    """Orthonormal rows (k, channels) float64, k = 1 or 2: u along (1 - mixture) mean + mixture spike, both
    taken at unit length and the spike with the sign that agrees with the mean; and what of the spike is
    orthogonal to u. One of zeros is left out; k = 0 where both are. ValueError: mixture not in [0, 1)."""
    require("offsets.mixture", mixture, 0 <= mixture < 1, "in [0, 1)")
    found = [v.double() / v.double().norm() for v in (mean, spike) if float(v.norm()) > 0]
    if len(found) < 2:
        return torch.stack(found) if found else torch.zeros(0, len(mean), dtype=torch.float64)
    along, other = found[0], found[1] * (1 if float(found[0] @ found[1]) >= 0 else -1)
    first = (1 - mixture) * along + mixture * other
    first = first / first.norm()
    rest = other - (other @ first) * first
    length = float(rest.norm())
    return torch.stack([first, rest / length] if length > ALONG else [first])


def spread(rows: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    """The sum of weights (tokens,) times the squared centred 8-norm of `rows` (tokens, channels), and its
    gradient there: with m a row's mean, (sum over channels of (x - m)^8)^(1/4). Smooth, and nearly the
    squared range, which sets an asymmetric grid's step (plain norms also punish the offset, which costs
    nothing)."""
    centred = rows - rows.mean(1, keepdim=True)
    square = centred * centred
    fourth = square * square
    total = (fourth * fourth).sum(1).clamp(min=torch.finfo(rows.dtype).tiny)
    slope = centred.mul_(square).mul_(fourth).mul_((2 * weights.to(rows) * total**-0.75)[:, None])
    return float((weights * total.double() ** 0.25).sum()), slope.sub_(slope.mean(1, keepdim=True))
