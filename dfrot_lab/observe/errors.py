"""Quantization errors of captured tokens under any rotations and quantizers, as one tidy table."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import fake_quantize, squared_error
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.grids import SYM4, QuantSpec
from dfrot_lab.recipe.specs import DEFAULT_RULE, MASSIVE_RULES, RotationSpec


def default_rotations(channels: int, seed: int = 0) -> dict[str, Tensor]:
    """NR, RO and RH of `channels`, float64 (channels, channels)."""
    return {kind: rotations.make(RotationSpec(kind=kind, seed=seed), channels) for kind in ("NR", "RO", "RH")}


def token_errors(
    capture: Capture, rotation: Mapping[str, Tensor] | None = None,
    quantizers: Sequence[QuantSpec] = (SYM4,), *,
    sites: Sequence[str] | None = None, rule: str = DEFAULT_RULE,
) -> pd.DataFrame:  # fmt: skip
    """E(x R) of every token at every site under every rotation and quantizer: site, token (index), text,
    rotation, quantizer, error (sum of squares over channels), root (of it), massive (by `rule`, there)."""
    chosen = list(sites or capture.sites)
    matrices = rotation if rotation is not None else default_rotations(capture.channels)
    massive_at = dict(zip(chosen, massive.find(capture, rule, chosen).numpy(), strict=True))
    places, errors = [], []
    for site in chosen:
        x = capture.rows(site)
        for name, R in matrices.items():
            rotated = x @ R.to(x)
            places += [(site, name, quantizer.name) for quantizer in quantizers]
            errors += [squared_error(rotated, quantizer).double().numpy() for quantizer in quantizers]
    error, texts = np.concatenate(errors), np.array(capture.texts, dtype=object)
    at, rotated_by, quantized_by = (_repeated(names, capture.tokens) for names in zip(*places, strict=True))
    columns = {"site": at, "token": np.tile(np.arange(capture.tokens), len(places))}
    columns |= {"text": np.tile(texts, len(places)), "rotation": rotated_by, "quantizer": quantized_by}
    marks = np.concatenate([massive_at[site] for site, *_ in places])
    return pd.DataFrame({**columns, "error": error, "root": np.sqrt(error), "massive": marks})


def massive_names(capture: Capture, sites: Sequence[str] | None = None) -> np.ndarray:
    """The rules that call each token massive, in words (sites, tokens): at all sites, or those named."""
    names = np.full((len(capture.sites if sites is None else sites), capture.tokens), "", dtype=object)
    for rule in MASSIVE_RULES:
        mask = massive.find(capture, rule, sites).numpy()
        names[mask] = [f"{old}, {rule}".lstrip(", ") for old in names[mask]]
    return names


def wide(errors: pd.DataFrame, value: str = "error") -> pd.DataFrame:
    """The table with one column a rotation (one quantizer at a time): what scatters of RO against RH need."""
    if len(set(errors["quantizer"])) != 1:
        names = sorted(errors["quantizer"].unique())
        raise ValueError(f"errors must hold one quantizer to be widened; got {names}")
    index = ["site", "token", "text", "massive"]
    table = errors.pivot(index=index, columns="rotation", values=value)  # refuses two rows in one place
    return table.set_axis(list(map(str, table.columns)), axis=1).reset_index()


def orders(wide: pd.DataFrame, names: Sequence[str] = ("NR", "RO", "RH")) -> pd.Series:
    """The order of each token's errors, largest first, such as `RO > NR > RH`: Fig. 2 colours by it."""
    place = np.argsort(-wide[list(names)].to_numpy(), axis=1, kind="stable")
    labels = [" > ".join(row) for row in np.array(names, dtype=object)[place].tolist()]
    return pd.Series(labels, index=wide.index, dtype="category")


def summary(errors: pd.DataFrame) -> pd.DataFrame:
    """Mean, median and p99 of root errors by rotation and quantizer, of ordinary and of massive tokens."""
    labelled = errors.assign(tokens=errors["massive"].map({True: "massive", False: "ordinary"}))
    groups = labelled.groupby(["quantizer", "rotation", "tokens"], sort=False, observed=True)["root"]
    return groups.agg(rows="size", mean="mean", median="median", p99=lambda v: v.quantile(0.99)).reset_index()


def _repeated(names: Sequence[str], times: int) -> "pd.Categorical[str]":
    """Each name `times` times, as a categorical in order of appearance."""
    codes, order = pd.factorize(pd.Index(names))
    return pd.Categorical.from_codes(np.repeat(codes, times), categories=order)


def massive_values(
    capture: Capture, site: str, token: int, matrices: Mapping[str, Tensor], quantizer: QuantSpec = SYM4
) -> pd.DataFrame:
    """One token's values under each rotation (the paper's Fig. 4): rotation, channel, value, quantized."""
    row, tables = capture.rows(site)[token : token + 1].float(), []
    for name, R in matrices.items():
        value = row @ R.to(row)
        columns = {"rotation": name, "channel": range(row.shape[1]), "value": value[0].numpy()}
        tables.append(pd.DataFrame({**columns, "quantized": fake_quantize(value, quantizer)[0].numpy()}))
    return pd.concat(tables, ignore_index=True)
