"""Rows of a spike and noise: planted, to measure what `theory` predicts, and real, as it sees them."""

import itertools
import math
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.maths.theory import PREDICT, SYM4, Floats, check_token, require, unit_rms
from dfrot_lab.recipe.specs import QuantSpec, RotationSpec


def rows(
    m: float, sigma: float, channels: int, tokens: int, generator: torch.Generator, others: Floats = ()
) -> Tensor:
    """Rows (tokens, channels), float64, of Gaussian noise `sigma` with the spike `m`, and `others`, in
    different random channels."""
    check_token(m, sigma, channels, others)
    require("tokens", tokens, tokens >= 1, "a whole number >= 1")
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
        require("kinds", repr(kind), kind in PREDICT, f"among {tuple(PREDICT)}")
        m, sigma = unit_rms(snr, c, ratio)
        others = (ratio * m,) if ratio else ()
        lines.append((c, kind, snr, ratio, q.name, q.bits, PREDICT[kind](m, sigma, c, q, others)))
    names = ["channels", "rotation", "snr", "ratio", "quantizer", "bits", "predicted"]
    return pd.DataFrame(lines, columns=names)


def measure(
    channels: Sequence[int], snrs: Floats, quantizers: Sequence[QuantSpec] = (SYM4,), *,
    ratios: Floats = (0.0,), kinds: Sequence[str] = tuple(PREDICT),
    seeds: Sequence[int] = (0,), tokens: int = 64,
) -> pd.DataFrame:  # fmt: skip
    """`curve` with what planted tokens of the same snr and ratio measure: column measured, the mean over
    `tokens` tokens, a row a seed, which draws the rotation and the tokens."""
    parts = []
    for c, kind in itertools.product(channels, kinds):
        table = curve([c], snrs, quantizers, ratios=ratios, kinds=[kind])
        for seed in seeds:
            R, found = rotations.make(RotationSpec(kind=kind, seed=seed), c), []
            for snr, ratio in itertools.product(snrs, ratios):
                m, sigma = unit_rms(snr, c, ratio)
                generator, others = torch.Generator().manual_seed(seed), (ratio * m,) if ratio else ()
                x = rows(m, sigma, c, tokens, generator, others) @ R
                found += [float(squared_error(x, q).mean()) for q in quantizers]
            parts.append(table.assign(seed=seed, measured=found))
    return pd.concat(parts, ignore_index=True)


def estimate(x: Tensor) -> pd.DataFrame:
    """Spike and noise of real rows `x` (tokens, channels), a line a row, in x's unit.

    Columns: channel and m (of the largest |entry|), second (the next), sigma (root mean square of all but the
    largest), snr (m / (sigma sqrt(C))), tail (fourth moment of all but the largest / sigma^4: 3 for Gaussian
    noise). ValueError: not (tokens, >= 3 channels), not finite."""
    fits = x.ndim == 2 and x.shape[1] >= 3 and bool(x.isfinite().all())
    require("x", f"shape {tuple(x.shape)}", fits, "finite, (tokens, channels >= 3)")
    largest, where = x.double().abs().sort(1, descending=True)
    m, second = largest[:, 0], largest[:, 1]
    sigma, fourth = largest[:, 1:].square().mean(1).sqrt(), largest[:, 1:].pow(4).mean(1)
    columns = {"channel": where[:, 0], "m": m, "second": second, "sigma": sigma}
    columns |= {"snr": m / (sigma * math.sqrt(x.shape[1])), "tail": fourth / sigma**4}
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()})


def predict(x: Tensor, quantizer: QuantSpec = SYM4, *, spikes: int = 1) -> pd.DataFrame:
    """Predicted squared errors of real rows `x` (tokens, channels): their `spikes` largest |entries| as
    spikes, all else as Gaussian noise. Columns NR, RO, RH, a line a row. Signs are dropped, which matters to
    NR of an asymmetric quantizer alone."""
    require("spikes", spikes, 1 <= spikes <= math.log2(x.shape[-1]), "a whole number in 1..log2(channels)")
    largest = x.double().abs().sort(1, descending=True).values
    noise = largest[:, spikes:].square().mean(1).sqrt()
    lines = []
    for (m, *others), sigma in zip(largest[:, :spikes].tolist(), noise.tolist(), strict=True):
        lines.append([error(m, sigma, x.shape[1], quantizer, others) for error in PREDICT.values()])
    return pd.DataFrame(lines, columns=list(PREDICT))
