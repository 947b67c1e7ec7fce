"""Results as rows with provenance: append them to a JSON-lines file, read them back as one table, show them
as the paper does.
"""

import json
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dfrot_lab.disk import tables
from dfrot_lab.recipe.specs import EvalSpec, RefineSpec
from dfrot_lab.score.perplexity import EvalResult, paired_difference

COLUMNS = (
    "model", "corpus", "rotation", "gamma", "rule", "weights", "w_bits", "a_bits", "kv_bits", "keep_out",
    "metric", "value", "ci95", "windows", "seconds", "seed", "spec", "commit",
)  # fmt: skip
"""Columns of every results row, in order. `ci95` is [low, high]; `spec` the key of the EvalSpec; `commit` the
code's.
"""

PERPLEXITY = "perplexity"


@cache
def commit() -> str | None:
    """The git commit of the code that runs, with `+` behind it where files differ from it; None outside a
    checkout.
    """
    here = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def row(result: EvalResult) -> dict[str, Any]:
    """The results row of one evaluation: its perplexity with the bootstrap interval over windows."""
    return {**_identity(result), "metric": PERPLEXITY, "value": result.perplexity, "ci95": list(result.ci95)}


def difference_row(result: EvalResult, reference: EvalResult, name: str) -> dict[str, Any]:
    """The results row of a paired difference: perplexity of `result` minus that of `reference` (called
    `name`) on the same windows.
    """
    return statistic_row(result, f"{PERPLEXITY} - {name}", *paired_difference(result, reference))


def statistic_row(
    result: EvalResult, metric: str, value: float, interval: tuple[float, float]
) -> dict[str, Any]:
    """The results row of any number, with its interval, that is said of the evaluation `result`."""
    return {**_identity(result), "metric": metric, "value": value, "ci95": list(interval)}


def seed_of(spec: EvalSpec) -> int | None:
    """The seed of a row's rotation, or of a refined one's start; None where nothing is random."""
    rotation = spec.rotation.init if isinstance(spec.rotation, RefineSpec) else spec.rotation
    return rotation.seed if rotation.kind in ("RO", "RH") else None


def table(entries: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Results rows as a table, COLUMNS in order, seeds whole numbers or missing."""
    return pd.DataFrame(list(entries), columns=list(COLUMNS)).astype({"seed": "Int64"})


def first_seed(entries: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first seed, and those in which nothing is random."""
    seeds = entries["seed"].dropna()
    return (
        entries
        if seeds.empty
        else entries[entries["seed"].isna() | (entries["seed"] == seeds.iloc[0]).fillna(value=False)]
    )


def _identity(result: EvalResult) -> dict[str, Any]:
    spec = result.spec
    w_bits, a_bits, kv_bits = (int(b) for b in spec.bits.split("-"))
    refined = spec.rotation if isinstance(spec.rotation, RefineSpec) else None
    values = {
        "model": spec.model.source, "corpus": spec.corpus.name, "rotation": spec.rotation.name,
        "gamma": refined.gamma if refined else None, "rule": refined.rule if refined else _kept(spec),
        "weights": spec.weights.method if w_bits < 16 else None, "w_bits": w_bits, "a_bits": a_bits, "kv_bits": kv_bits,
        "keep_out": spec.keep_out is not None, "metric": None, "value": None, "ci95": None, "windows": len(result.losses),
        "seconds": round(result.seconds, 2), "seed": seed_of(spec), "spec": spec.key, "commit": commit(),
    }  # fmt: skip
    return {name: values[name] for name in COLUMNS}


def _kept(spec: EvalSpec) -> str | None:
    """The rule of what is kept out, with the number of tokens where it has one: `nr_error`, `random 16`."""
    return spec.keep_out if spec.keep_out_tokens is None else f"{spec.keep_out} {spec.keep_out_tokens}"


def load(path: Path) -> pd.DataFrame:
    """All rows of a JSON-lines file as one table with COLUMNS; a last line cut short by a killed writer is
    left out.
    """
    return table(tables.entries(path))


def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON values, NaN as null, infinity (a gamma) as itself."""
    found: list[dict[str, Any]] = json.loads(table.to_json(orient="records"))
    for name, values in table.select_dtypes("float").items():
        for number in np.isinf(values.to_numpy()).nonzero()[0].tolist():
            found[number][str(name)] = float(values.iloc[number])
    return found


def save(path: Path, table: pd.DataFrame) -> None:
    """Write a whole results table as JSON lines, replacing what was there, and beside it the comparison as
    Markdown.
    """
    tables.replace(path, rows(table))
    path.with_suffix(".md").write_text(markdown(comparison(table)) + "\n", encoding="utf-8")


def label(entry: Mapping[str, Any]) -> str:
    """A row's name in tables: `RO`, `RO, kept out`, `DFRot gamma=100`; `full precision` at 16-16-16."""
    if (entry["w_bits"], entry["a_bits"], entry["kv_bits"]) == (16, 16, 16):
        return "full precision"
    name = entry["rotation"] if pd.isna(entry["gamma"]) else f"{entry['rotation']} gamma={entry['gamma']:g}"
    counted = f" ({entry['rule']})" if entry["keep_out"] and " " in str(entry["rule"]) else ""
    return f"{name}, kept out{counted}" if entry["keep_out"] else str(name)


def bits(entry: Mapping[str, Any]) -> str:
    """A row's bits as in the paper: `4-4-16`."""
    return f"{entry['w_bits']}-{entry['a_bits']}-{entry['kv_bits']}"


def records(table: pd.DataFrame, metric: str = PERPLEXITY) -> list[dict[str, Any]]:
    """The rows of one metric as dictionaries."""
    return [
        dict(zip(table.columns, values, strict=True))
        for values in table[table["metric"] == metric].itertuples(index=False)
    ]


def comparison(table: pd.DataFrame, metric: str = PERPLEXITY) -> pd.DataFrame:
    """One metric as the paper prints it: a row a rotation, a column for each setting of the bits, cells
    `value [low, high]`; first seed only.
    """
    rows = records(first_seed(table), metric)
    cells = pd.DataFrame(
        {"row": [label(r) for r in rows], "bits": [bits(r) for r in rows], "cell": [_cell(r) for r in rows]}
    )
    order = list(dict.fromkeys(cells["row"]))
    columns = list(dict.fromkeys(cells["bits"]))
    wide = cells.drop_duplicates(["row", "bits"], keep="last").pivot(
        index="row", columns="bits", values="cell"
    )
    return wide.reindex(index=order, columns=columns).fillna("")


def by_seed(table: pd.DataFrame, metric: str = f"{PERPLEXITY} - RH", rotation: str = "RO") -> pd.DataFrame:
    """One rotation's rows of a metric at the bits that were run with several seeds: a row for each bits, a
    column a seed.
    """
    rows = [r for r in records(table, metric) if r["rotation"] == rotation and not r["keep_out"]]
    seeds = sorted({r["seed"] for r in rows})
    cells = {(bits(r), r["seed"]): _cell(r) for r in rows}
    complete = [b for b in dict.fromkeys(bits(r) for r in rows) if all((b, s) in cells for s in seeds)]
    return pd.DataFrame(
        [[cells[b, s] for s in seeds] for b in complete], index=complete, columns=[f"seed {s}" for s in seeds]
    )


def _cell(entry: Mapping[str, Any]) -> str:
    """`36.11 [31.20, 40.80]`; without an interval where there is none."""
    value, ci95 = entry["value"], entry["ci95"]
    if not ci95 or any(bound != bound for bound in ci95):
        return f"{value:.2f}"
    return f"{value:.2f} [{ci95[0]:.2f}, {ci95[1]:.2f}]"


def markdown(table: pd.DataFrame) -> str:
    """A small table of strings as GitHub Markdown, its index as first column."""
    header = [str(table.index.name or ""), *map(str, table.columns)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += [
        "| " + " | ".join([str(name), *map(str, values)]) + " |"
        for name, values in zip(table.index, table.to_numpy(), strict=True)
    ]
    return "\n".join(lines)
