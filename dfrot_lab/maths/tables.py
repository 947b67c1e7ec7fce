"""Tables of results as the paper prints them; one that would have to merge rows that differ is an error."""

from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Any

import pandas as pd

COLUMNS = (
    "model", "family", "corpus", "method", "rotation", "gamma", "rule", "parameters", "seed",
    "weights", "weight_quantizer", "calibration", "activations", "keys", "values",
    "w_bits", "a_bits", "kv_bits", "bits", "keep_out", "keep_out_rule", "keep_out_tokens",
    "set_massive", "windows", "window", "device",
    "metric", "value", "ci95", "seconds", "recipe", "key", "versions", "formulas", "commit",
)  # fmt: skip
"""Columns of every results row, in order. `parameters`: what a method has beside its columns; `ci95`: [low,
high] or None; `recipe`: the key of the YAML beside the rows, `key`: of all the value hangs on, by bytes."""
WHOLE = ("seed", "w_bits", "a_bits", "kv_bits", "keep_out_tokens", "windows", "window", "formulas")  # whole
FREE = {"metric", "value", "ci95", "seconds", "recipe", "versions", "commit"}
"""Columns that say what came out and when; the others say of what, and by which formulas."""
PERPLEXITY = "perplexity"


def table(entries: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Results rows as a table, COLUMNS in order, whole numbers whole or missing."""
    return whole(pd.DataFrame(list(entries), columns=list(COLUMNS)))


def whole(table: pd.DataFrame) -> pd.DataFrame:
    """The table with whole numbers whole or missing, in those of the columns WHOLE that it has."""
    return table.astype(dict.fromkeys((name for name in WHOLE if name in table), "Int64"))


def first_seed(entries: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first seed, and those in which nothing is random."""
    seeds = entries["seed"]
    return entries[seeds.isna() | seeds.isin(seeds.dropna().head(1))]


def label(entry: Mapping[str, Any]) -> str:
    """A row's name in tables: `RO`, `RO, kept out`, `DFRot gamma=100`; `full precision` at 16-16-16."""
    if entry["bits"] == "16-16-16":
        return "full precision"
    gamma, tokens = entry["gamma"], entry["keep_out_tokens"]
    name = str(entry["rotation"]) + ("" if pd.isna(gamma) else f" gamma={gamma:g}")
    counted = "" if pd.isna(tokens) else f" ({entry['keep_out_rule']} {tokens})"
    return f"{name}, kept out{counted}" if entry["keep_out"] else name


def records(table: pd.DataFrame, metric: str = PERPLEXITY) -> list[dict[Any, Any]]:
    """The rows of one metric as dictionaries."""
    return table[table["metric"] == metric].to_dict("records")


def _require_distinct(rows: list[dict[str, Any]], place: Mapping[str, Any]) -> None:
    """Refuse rows that a table would put in one place though they differ: a ValueError names the column."""
    for name in [name for name in rows[0] if name not in FREE]:
        values = [None if pd.isna(row[name]) else row[name] for row in rows]  # however a table holds nothing
        seen = list(dict.fromkeys(str(value) or "nothing" for value in values))
        if len(seen) > 1:
            where = ", ".join(f"{key} {value}" for key, value in place.items())
            said = f"({', '.join(seen)}): choose one of them"
            raise ValueError(f"rows of {where} differ in column {name!r} {said}")


def _wide(rows: list[dict[str, Any]], down: Mapping[str, Any], across: Mapping[str, Any]) -> pd.DataFrame:
    """Cells of rows in their order, by each axis's name and function. ValueError: two rows of one place."""
    axes, places = {**down, **across}, dict[tuple[str, ...], list[dict[str, Any]]]()
    for row in rows:
        places.setdefault(tuple(str(value(row)) for value in axes.values()), []).append(row)
    for place, same in places.items():
        _require_distinct(same, dict(zip(axes, place, strict=True)))
    table = pd.DataFrame([(*at, cell(same[-1])) for at, same in places.items()], columns=[*axes, "cell"])
    wide = table.pivot(index=list(down), columns=list(across), values="cell")
    index, columns = (list(dict.fromkeys(place[n] for place in places)) for n in (0, 1))
    return wide.reindex(index=index, columns=columns)


def comparison(table: pd.DataFrame, metric: str = PERPLEXITY) -> pd.DataFrame:
    """One metric as the paper prints it: a row a rotation, a column for each setting of the bits, cells
    `value [low, high]`; first seed only. ValueError: rows of one place that differ in another column."""
    rows = records(first_seed(table), metric)
    return _wide(rows, {"row": label}, {"bits": itemgetter("bits")}).fillna("")


def by_seed(table: pd.DataFrame, metric: str = f"{PERPLEXITY} - RH", rotation: str = "RO") -> pd.DataFrame:
    """One rotation's rows of a metric at the bits that were run with several seeds: bits by seed."""
    rows = [r for r in records(table, metric) if r["rotation"] == rotation and not r["keep_out"]]
    return _wide(rows, {"bits": itemgetter("bits")}, {"seed": lambda r: f"seed {r['seed']}"}).dropna()


def cell(entry: Mapping[str, Any]) -> str:
    """`36.11 [31.20, 40.80]`; without an interval where there is none."""
    value, ci95 = f"{entry['value']:.2f}", entry["ci95"]
    known = isinstance(ci95, list | tuple) and all(bound == bound for bound in ci95)
    return f"{value} [{ci95[0]:.2f}, {ci95[1]:.2f}]" if known else value


def markdown(table: pd.DataFrame) -> str:
    """A small table of strings as GitHub Markdown, its index as first column."""
    header = [str(table.index.name or ""), *map(str, table.columns)]
    body = [map(str, (name, *row)) for name, row in zip(table.index, table.to_numpy(), strict=True)]
    head, *lines = ("| " + " | ".join(line) + " |" for line in (header, *body))
    return "\n".join([head, "|" + "---|" * len(header), *lines])
