"""Tables of results as the paper prints them; one that would have to merge rows that differ is an error."""

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import pandas as pd

COLUMNS = (
    "model", "family", "corpus", "method", "rotation", "gamma", "rule", "parameters", "seed",
    "weights", "weight_quantizer", "calibration", "activations", "keys", "values",
    "w_bits", "a_bits", "kv_bits", "bits", "keep_out", "keep_out_rule", "keep_out_tokens",
    "set_massive", "windows", "window", "device",
    "builds", "metric", "value", "ci95", "verdict", "smallest", "by_build",
    "seconds", "recipe", "key", "versions", "formulas", "commit",
)  # fmt: skip
"""Columns of every results row, in order. `parameters`: what a method has beside its columns; `builds`: of
how many the `value` is the mean, `by_build` each one's; `seed`, `parameters`, `recipe`: the first's. `ci95`:
[low, high] or None, over builds; `verdict` and the `smallest` difference the design would have found: of
comparisons; `recipe`: the key of the YAML beside the rows, `key`: of all the value hangs on, by bytes."""
WHOLE = ("seed", "w_bits", "a_bits", "kv_bits", "keep_out_tokens", "windows", "window", "builds", "formulas")
FREE = {"metric", "value", "ci95", "verdict", "smallest", "by_build"}
FREE |= {"seconds", "recipe", "versions", "commit"}
"""Columns that say what came out and when; the others say of what, and by which formulas."""
PERPLEXITY, DIVERGENCE, AGREEMENT = "perplexity", "KL divergence", "top-1 agreement"
LEVELS = (PERPLEXITY, DIVERGENCE, AGREEMENT)
"""Measures of one row: exp of the mean next-token loss; the mean divergence, in nats, of the full-precision
model's next-token distribution to the quantized one's; how often both have the same first choice."""
SHARE = "share of RO - RH closed"


def change(name: str) -> str:
    """The metric of a change in perplexity, in percent, against the row called `name`."""
    return f"change of {PERPLEXITY} against {name}, %"


def further(name: str) -> str:
    """The metric of the difference in KL divergence, in nats, to the row called `name`."""
    return f"{DIVERGENCE} - {name}"


def against(metric: str) -> str:
    """What a metric compares with, the reverse of `change` and `further`: `against RH`; empty for others."""
    for start, end in (change("\0").split("\0"), further("\0").split("\0")):
        if metric.startswith(start):
            return f"against {metric.removeprefix(start).removesuffix(end)}"
    return ""


def table(entries: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Results rows as a table, COLUMNS in order, whole numbers whole or missing."""
    return whole(pd.DataFrame(list(entries), columns=list(COLUMNS)))


def whole(table: pd.DataFrame) -> pd.DataFrame:
    """The table with whole numbers whole or missing, in those of the columns WHOLE that it has."""
    return table.astype(dict.fromkeys((name for name in WHOLE if name in table), "Int64"))


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
    last = len(down) - 1
    index = list(dict.fromkeys(place[: last + 1] if last else place[0] for place in places))
    return wide.loc[index, list(dict.fromkeys(place[-1] for place in places))]


def comparison(
    table: pd.DataFrame, *metrics: str, down: str | Sequence[str] = "", across: str = ""
) -> pd.DataFrame:
    """Perplexity, or one other of `metrics`, as the paper prints it: a row a rotation, a column for each
    setting of the bits; else a row for each value of the table's column `down`, or of some columns together,
    a column for each of `across`; of several metrics one for each. Cells as `cell` says. ValueError: rows of
    one place that differ in another column."""
    names = [down] if isinstance(down, str) else down
    rows: dict[str, Any] = {name: itemgetter(name) for name in names} if down else {"row": label}
    across = across or ("metric" if len(metrics) > 1 else "")
    columns = {across: itemgetter(across)} if across else {"bits": bits_of}
    found = [row for metric in metrics or (PERPLEXITY,) for row in records(table, metric)]
    return _wide(found, rows, columns).fillna("")


def bits_of(entry: Mapping[str, Any]) -> str:
    """The bits of a row; with the weight quantizer where it is not GPTQ: `4-4-4 (rtn)`."""
    by = entry["weights"]
    return str(entry["bits"]) + (f" ({by})" if isinstance(by, str) and by != "gptq" else "")


def cell(entry: Mapping[str, Any]) -> str:
    """`36.11 [31.20, 40.80]`, `+4.3% [1.8, 6.8] worse`; without an interval where there is none."""
    metric, value, ci95 = entry["metric"], entry["value"], entry["ci95"]
    is_change, is_small = metric.endswith("%"), metric.startswith((DIVERGENCE, AGREEMENT))
    digits, sign = 1 if is_change else 3 if is_small else 2, "+" if " - " in metric or is_change else ""
    text = f"{value:{sign}.{digits}f}" + "%" * is_change
    known = isinstance(ci95, list | tuple) and all(bound == bound for bound in ci95)
    text += f" [{ci95[0]:.{digits}f}, {ci95[1]:.{digits}f}]" if known else ""
    return f"{text} {entry['verdict']}" if isinstance(entry.get("verdict"), str) else text


def markdown(table: pd.DataFrame) -> str:
    """A small table of strings as GitHub Markdown, its index as first column."""
    header = [str(table.index.name or ""), *map(str, table.columns)]
    body = [map(str, (name, *row)) for name, row in zip(table.index, table.to_numpy(), strict=True)]
    head, *lines = ("| " + " | ".join(line) + " |" for line in (header, *body))
    return "\n".join([head, "|" + "---|" * len(header), *lines])
