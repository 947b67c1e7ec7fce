"""What a massive token's error should be: a spike and Gaussian noise, x = m e_j + sigma g, make levels.

| rotation | entries of x R | levels (how many entries) | noise about a level |
|---|---|---|---|
| NR | x itself | m (1), 0 (C - 1) | sigma |
| RO | a random direction of length ||x||: Gaussian numbers | 0 (C) | sqrt(m^2 / C + sigma^2) |
| RH | +-m / sqrt(C) and the noise, rotated | each sign (C / 2) | sigma |

More spikes under RH make more levels, (+-m1 +-m2 ...) / sqrt(C). A row's largest entry (symmetric) or its
range (asymmetric) sets the step; nothing is clamped but ties. So one formula covers every case,
`error_of_levels`: the expected error of rounding a Gaussian number to a multiple of the step, summed over
levels, averaged over the step's distribution. It takes the step as independent of the entries; all else is
exact. snr = m / (sigma sqrt(C)). Squared errors, float64, unit of x^2. Wrong arguments are ValueErrors."""

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from torch import Tensor

from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import code_range, squared_error
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.grids import SYM4, QuantSpec
from dfrot_lab.recipe.specs import RotationSpec

Array = NDArray[np.float64]
Floats = Sequence[float]
_NODES = 48  # quantiles of the largest entry to average over; twice as many change nothing by 0.1%
_REACH = 9.0  # standard deviations beyond which no Gaussian number is taken to lie: P < 1e-18 a number
_CODES = np.arange(-10.0, 11.0)  # codes about the nearest one that noise below one step can reach


def check_token(m: float, sigma: float, channels: int, others: Floats) -> None:
    """Refuse a token of spikes `m` and `others` and noise `sigma` that no formula here covers."""
    require("theory.m", m, 0 <= m < math.inf, "finite and >= 0")
    require("theory.sigma", sigma, 0 <= sigma < math.inf, "finite and >= 0")
    n = 1 + len(others)
    require("theory.channels", channels, channels >= 2**n, f"a whole number >= {2**n} with {n} spikes")
    for other in others:
        require("theory.others", other, 0 <= other <= m, f"in 0..m = {m:g}")


def _steps(quantizer: QuantSpec) -> int:
    """Steps between zero and the largest entry (symmetric) or in the range; only what this theory covers."""
    plain = quantizer.granularity == "per_token" and quantizer.scheme != "free" and quantizer.clip_ratio == 1
    rule = "symmetric or asymmetric, per_token, with clip_ratio 1 and fewer than 16 bits"
    require("theory.quantizer", quantizer, plain and quantizer.bits < 16, rule)
    return code_range(quantizer)[1]


def expected_largest(channels: int) -> float:
    """Expected largest |N(0, 1)| of `channels`; the textbook's sqrt(2 ln C) is 7% above it at C = 4096."""
    require("theory.channels", channels, channels >= 1, "a whole number >= 1")
    return float(quad(lambda t: 1 - math.erf(t / math.sqrt(2)) ** channels, 0, _REACH + 3, limit=200)[0])


def uniform_error(largest: float, channels: int, quantizer: QuantSpec = SYM4) -> float:
    """The rule of thumb C step^2 / 12, for entries spread evenly within a step; `largest` is max |x R|."""
    require("theory.channels", channels, channels >= 2, "a whole number >= 2")
    step = largest * (1 if quantizer.symmetric else 2) / _steps(quantizer)
    return channels * step**2 / 12


def rounding_error(level: Array, sd: Array) -> Array:
    """E (y - round y)^2 of y ~ N(level, sd^2), elementwise, in steps squared: the noise's energy plus the
    level's misfit while both lie within half a step; 1/12 from sd = 1 on (Widrow: less than 1e-8 off)."""
    off = (level - np.round(level))[..., None] - _CODES
    noise = np.clip(sd, 1e-150, 1.0)[..., None]
    low, high = (-0.5 - off) / noise, (0.5 - off) / noise
    p_low, p_high = (np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) for z in (low, high))
    misfit, cross = (off**2 + noise**2) * (ndtr(high) - ndtr(low)), 2 * off * noise * (p_low - p_high)
    parts = misfit + cross + noise**2 * (low * p_low - high * p_high)
    return np.where(sd < 1, parts.sum(-1), 1 / 12)


def _largest(levels: Array, counts: Array, sd: float, *, absolute: bool) -> Array:
    """Quantiles of equal weight of a row's largest entry, or |entry|: `counts` entries about `levels`."""
    top = float(np.abs(levels).max() if absolute else levels.max())
    if sd == 0:
        return np.array([top])
    least = top - _REACH * sd
    t = np.linspace(max(least, 0) if absolute else least, top + _REACH * sd, 4001)[:, None]
    log_below = log_ndtr((t - levels) / sd)
    if absolute:
        with np.errstate(divide="ignore"):
            log_below = np.log(ndtr((t - levels) / sd) - ndtr((-t - levels) / sd))
    below = np.exp((counts * log_below).sum(-1))
    return np.interp((np.arange(_NODES) + 0.5) / _NODES, below, t[:, 0])


def error_of_levels(levels: Floats, counts: Floats, sd: float, quantizer: QuantSpec = SYM4) -> float:
    """Expected squared error of a row with `counts[i]` entries N(levels[i], sd^2): the formula behind all. A
    single entry at the top sets the step: it is on the grid, or (asymmetric) as far off it as the zero is."""
    require("theory.sd", sd, 0 <= sd < math.inf, "finite and >= 0")
    same, rule = len(counts) == len(levels) > 0, f"one for each of the {len(levels)} levels"
    require("theory.counts", len(counts), same, rule)
    place, many, steps = np.array(levels, np.float64), np.array(counts, np.float64), _steps(quantizer)
    if sd == 0 and not place.any():
        return 0.0
    top = int(np.abs(place).argmax() if quantizer.symmetric else place.argmax())
    if quantizer.symmetric:
        step, misfit = _largest(place, many, sd, absolute=True) / steps, np.zeros(1)
    else:
        high, low = (np.maximum(_largest(ends, many, sd, absolute=False), 0) for ends in (place, -place))
        step = ((high[:, None] + low) / steps).ravel()
        below = np.broadcast_to(low, (len(high), len(low))).ravel() / step
        misfit = (below - np.round(below)) ** 2
    width = step[:, None]
    each = rounding_error(place / width, np.broadcast_to(sd / width, (len(step), len(place))))
    if many[top] == 1:  # a spike that sets the step by itself is not independent of it
        each[:, top] = misfit
    return float((step**2 * (each * many).sum(-1)).mean())


def error(
    kind: str, m: float, sigma: float, channels: int, quantizer: QuantSpec = SYM4, others: Floats = ()
) -> float:
    """E(NR), E(RO) or E(RH) of a token of largest spike `m`, further spikes `others` and noise `sigma` a
    channel, all in x's unit and >= 0; at least 2^spikes channels. NR: C sigma^2 while the noise is below half
    a step. RO: *exactly* that of a Gaussian row of the same mean square, whose direction is as uniform. RH: a
    spike alone costs 0 (symmetric) or m^2 / (2^bits - 1)^2; with noise, symmetric, C step^2 / 12 while it is
    above half a step, below C sigma^2 (1 + E max^2). Exceptions to RH: asymmetric, a spike in the channel of
    a constant Hadamard row; three spikes or more whose signs depend on each other."""
    require("theory.kind", kind, kind in ("NR", "RO", "RH"), "NR, RO or RH")
    check_token(m, sigma, channels, others)
    spikes = (m, *others)
    if kind == "NR":
        counts = [1.0] * len(spikes) + [channels - len(spikes)]
        return error_of_levels([*spikes, 0.0], counts, sigma, quantizer)
    if kind == "RO":
        energy = m**2 + sum(other**2 for other in others)
        return error_of_levels([0.0], [channels], math.sqrt(energy / channels + sigma**2), quantizer)
    signed = itertools.product(*((-spike, spike) for spike in spikes))
    levels = [sum(signs) / math.sqrt(channels) for signs in signed]
    return error_of_levels(levels, [channels / len(levels)] * len(levels), sigma, quantizer)


PREDICT = {kind: functools.partial(error, kind) for kind in ("NR", "RO", "RH")}  # `error` of one kind


def unit_rms(snr: float, channels: int, ratio: float = 0.0) -> tuple[float, float]:
    """(m, sigma) of a token of mean square 1: `snr` = spikes' length / (sigma sqrt(C)), second ratio * m."""
    require("theory.snr", snr, snr >= 0, ">= 0")
    require("theory.ratio", ratio, 0 <= ratio <= 1, "in 0..1")
    signal = 1 / (1 + snr**-2) if snr > 0 else 0.0
    return math.sqrt(channels * signal / (1 + ratio**2)), math.sqrt(max(1 - signal, 0))


def paper_window(channels: int, quantizer: QuantSpec = SYM4) -> tuple[float, float]:
    """The snr from which E(RO) > E(NR), and that from which E(NR) < E(RH); ValueError: not within 1..1000."""

    def gap(log_snr: float, above: str, below: str) -> float:
        m, sigma = unit_rms(math.exp(log_snr), channels)
        more, less = (PREDICT[kind](m, sigma, channels, quantizer) for kind in (above, below))
        return math.log(more / less)

    def crossing(above: str, below: str) -> float:
        snr = next((snr for snr in np.linspace(0, math.log(1000), 81) if gap(snr, above, below) < 0), None)
        if not snr:
            rule = f"let E({above}) fall below E({below}) between snr 1 and 1000"
            raise ValueError(f"theory.channels must {rule}; got {channels} at {quantizer.name}")
        return math.exp(brentq(gap, snr - math.log(1000) / 80, snr, args=(above, below), xtol=1e-4))

    return crossing("NR", "RO"), crossing("NR", "RH")


def planted(
    m: float, sigma: float, channels: int, tokens: int, generator: torch.Generator, others: Floats = ()
) -> Tensor:
    """Rows (tokens, channels) float64 of noise `sigma`, spikes `m` and `others` in random channels."""
    check_token(m, sigma, channels, others)
    require("theory.tokens", tokens, tokens >= 1, "a whole number >= 1")
    x = sigma * torch.randn(tokens, channels, dtype=torch.float64, generator=generator)
    spikes = torch.tensor([m, *others], dtype=torch.float64)
    places = torch.rand(tokens, channels, generator=generator).argsort(1)[:, : len(spikes)]
    return x.scatter_add_(1, places, spikes.expand(tokens, -1))


def curve(
    channels: Sequence[int], snrs: Floats, quantizers: Sequence[QuantSpec] = (SYM4,), *,
    ratios: Floats = (0.0,), kinds: Sequence[str] = tuple(PREDICT),
) -> pd.DataFrame:  # fmt: skip
    """Predicted squared error of tokens of mean square 1, a row for every combination of the arguments; a
    ratio is second spike / first. Columns: channels, rotation, snr, ratio, quantizer, bits, predicted."""
    lines = []
    for c, kind, snr, ratio, q in itertools.product(channels, kinds, snrs, ratios, quantizers):
        require("theory.kinds", repr(kind), kind in PREDICT, f"among {tuple(PREDICT)}")
        m, sigma = unit_rms(snr, c, ratio)
        others = (ratio * m,) if ratio else ()
        lines.append((c, kind, snr, ratio, q.name, q.bits, PREDICT[kind](m, sigma, c, q, others)))
    columns = ["channels", "rotation", "snr", "ratio", "quantizer", "bits", "predicted"]
    return pd.DataFrame(lines, columns=columns)


def measure(
    channels: Sequence[int], snrs: Floats, quantizers: Sequence[QuantSpec] = (SYM4,), *,
    ratios: Floats = (0.0,), kinds: Sequence[str] = tuple(PREDICT),
    seeds: Sequence[int] = (0,), tokens: int = 64,
) -> pd.DataFrame:  # fmt: skip
    """`curve`, a row a seed, and column measured: the mean over `tokens` planted tokens, rotated by seed."""
    parts = []
    for c, kind in itertools.product(channels, kinds):
        table = curve([c], snrs, quantizers, ratios=ratios, kinds=[kind])
        for seed in seeds:
            R, found = rotations.make(RotationSpec(kind=kind, seed=seed), c), []
            for snr, ratio in itertools.product(snrs, ratios):
                m, sigma = unit_rms(snr, c, ratio)
                generator, others = torch.Generator().manual_seed(seed), (ratio * m,) if ratio else ()
                x = planted(m, sigma, c, tokens, generator, others) @ R
                found += [float(squared_error(x, q).mean()) for q in quantizers]
            parts.append(table.assign(seed=seed, measured=found))
    return pd.concat(parts, ignore_index=True)


def estimate(x: Tensor) -> pd.DataFrame:
    """Spike and noise of rows `x` (tokens, channels >= 3), a line a row, in x's unit: channel and m of the
    largest |entry|, second; of the others sigma, tail (fourth moment / sigma^4: 3 if Gaussian); snr."""
    fits = x.ndim == 2 and x.shape[1] >= 3 and bool(x.isfinite().all())
    require("theory.x", f"shape {tuple(x.shape)}", fits, "finite, (tokens, channels >= 3)")
    largest, where = x.double().abs().sort(1, descending=True)
    m, second = largest[:, 0], largest[:, 1]
    sigma, fourth = largest[:, 1:].square().mean(1).sqrt(), largest[:, 1:].pow(4).mean(1)
    columns = {"channel": where[:, 0], "m": m, "second": second, "sigma": sigma}
    columns |= {"snr": m / (sigma * math.sqrt(x.shape[1])), "tail": fourth / sigma**4}
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()})


def predict(x: Tensor, quantizer: QuantSpec = SYM4, *, spikes: int = 1) -> pd.DataFrame:
    """Predicted squared errors NR, RO, RH of real rows `x` (tokens, channels): their `spikes` largest
    |entries| as spikes, all else as noise. Signs are dropped, which matters to an asymmetric NR alone."""
    fits = 1 <= spikes <= math.log2(x.shape[-1])
    require("theory.spikes", spikes, fits, "a whole number in 1..log2(channels)")
    largest = x.double().abs().sort(1, descending=True).values
    noise = largest[:, spikes:].square().mean(1).sqrt()
    tokens = list(zip(largest[:, :spikes].tolist(), noise.tolist(), strict=True))
    given = [(m, sigma, x.shape[1], quantizer, others) for (m, *others), sigma in tokens]
    return pd.DataFrame({kind: [predicted(*args) for args in given] for kind, predicted in PREDICT.items()})
