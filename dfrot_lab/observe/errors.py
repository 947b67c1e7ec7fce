"""Per-token quantization errors of captured activations, for any set of rotations and quantizers, as one tidy
table.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.specs import MASSIVE_RULES, QuantSpec, RotationSpec

SYM4 = QuantSpec(bits=4, symmetric=True)


def default_rotations(channels: int, seed: int = 0) -> dict[str, Tensor]:
    """NR, RO and RH of `channels`, float64 (channels, channels)."""
    return {kind: rotations.make(RotationSpec(kind=kind, seed=seed), channels) for kind in ("NR", "RO", "RH")}


def token_errors(
    capture: Capture,
    rotation: Mapping[str, Tensor] | None = None,
    quantizers: Sequence[QuantSpec] = (SYM4,),
    *,
    sites: Sequence[str] | None = None,
    rules: Sequence[str] = MASSIVE_RULES,
) -> pd.DataFrame:
    """E(x R) of every token at every site under every rotation and quantizer.

    Columns: site, token (index), text, rotation, quantizer, error (sum of squares over channels: the paper's
    figures), root (its square root) and massive (the rules that call the token massive at that site, joined
    by commas; empty for an ordinary token).
    """
    chosen = list(sites or capture.sites)
    matrices = rotation if rotation is not None else default_rotations(capture.channels)
    verdicts = dict(zip(chosen, massive_names(capture, rules, chosen), strict=True))
    texts = np.array(capture.texts, dtype=object)
    parts = []
    for site in chosen:
        x = capture.rows(site)
        for name, R in matrices.items():
            rotated = x @ R.to(x)
            for quantizer in quantizers:
                error = squared_error(rotated, quantizer).numpy()
                parts.append((site, name, quantizer.name, error))
    tokens = capture.tokens
    error = np.concatenate([part[3] for part in parts])
    return pd.DataFrame(
        {
            "site": _repeated([part[0] for part in parts], tokens),
            "token": np.tile(np.arange(tokens), len(parts)),
            "text": np.tile(texts, len(parts)),
            "rotation": _repeated([part[1] for part in parts], tokens),
            "quantizer": _repeated([part[2] for part in parts], tokens),
            "error": error,
            "root": np.sqrt(error),
            "massive": np.concatenate([verdicts[part[0]] for part in parts]),
        }
    )


def massive_names(
    capture: Capture, rules: Sequence[str] = MASSIVE_RULES, sites: Sequence[str] | None = None
) -> np.ndarray:
    """For each (site, token) the rules that call it massive, joined by commas: an object array (sites,
    tokens); all sites, or those named.
    """
    names = np.full((len(capture.sites if sites is None else sites), capture.tokens), "", dtype=object)
    for rule in rules:
        mask = massive.find(capture, rule, sites).numpy()
        names[mask] = [f"{old},{rule}".lstrip(",") for old in names[mask]]
    return names


def wide(errors: pd.DataFrame, value: str = "error") -> pd.DataFrame:
    """The table with one column a rotation (one quantizer at a time): what scatters of RO against RH need."""
    if len(set(errors["quantizer"])) != 1:
        raise ValueError(
            f"errors must hold one quantizer to be widened; got {sorted(errors['quantizer'].unique())}"
        )
    index = ["site", "token", "text", "massive"]
    return errors.pivot_table(
        index=index, columns="rotation", values=value, sort=False, observed=True
    ).reset_index()


def orders(wide: pd.DataFrame, names: Sequence[str] = ("NR", "RO", "RH")) -> pd.Series:
    """The order of each token's errors, largest first, such as `RO > NR > RH`: what the paper's Fig. 2
    colours by.
    """
    place = np.argsort(-wide[list(names)].to_numpy(), axis=1, kind="stable")
    labels = {
        order: " > ".join(names[i] for i in order) for order in itertools.permutations(range(len(names)))
    }
    return pd.Series([labels[tuple(row)] for row in place.tolist()], index=wide.index, dtype="category")


def summary(errors: pd.DataFrame) -> pd.DataFrame:
    """Mean, median and 99th percentile of the root error by rotation and quantizer, for ordinary tokens and
    for those the nr_error rule marks.
    """
    marked = errors["massive"].str.contains("nr_error").map({True: "massive", False: "ordinary"})
    groups = errors.assign(tokens=marked).groupby(
        ["quantizer", "rotation", "tokens"], sort=False, observed=True
    )["root"]
    return groups.agg(rows="size", mean="mean", median="median", p99=lambda v: v.quantile(0.99)).reset_index()


def _repeated(names: list[str], times: int) -> "pd.Categorical[str]":
    """Each name `times` times, as a categorical in order of appearance."""
    order = list(dict.fromkeys(names))
    return pd.Categorical.from_codes(
        np.repeat([order.index(name) for name in names], times), categories=pd.Index(order)
    )


def massive_values(
    capture: Capture, site: str, token: int, matrices: Mapping[str, Tensor], quantizer: QuantSpec = SYM4
) -> pd.DataFrame:
    """One token's values before and after quantization under each rotation (the paper's Fig. 4): rotation,
    channel, value, quantized.
    """
    from dfrot_lab.maths.quantizers import fake_quantize

    row = capture.rows(site)[token : token + 1]
    tables = []
    for name, R in matrices.items():
        value = row @ R.to(row)
        columns = {
            "rotation": name,
            "channel": torch.arange(value.shape[-1]).numpy(),
            "value": value[0].numpy(),
        }
        tables.append(pd.DataFrame({**columns, "quantized": fake_quantize(value, quantizer)[0].numpy()}))
    return pd.concat(tables, ignore_index=True)
