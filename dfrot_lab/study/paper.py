"""The paper's published numbers beside ours: every number it prints, what we measured in its place, the
command, or the reason there is none."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from dfrot_lab.disk import row_files
from dfrot_lab.maths import tables
from dfrot_lab.score import rows, zeroshot
from dfrot_lab.score.perplexity import EvalResult
from dfrot_lab.study.runner import row_label
from dfrot_lab.study.setting import figure_site

PLACE = ("table", "method", "weight_quantizer", "w_a_kv_bits", "metric", "note")
"""The columns that say which number of the paper a line is, whatever the model."""

PUBLISHED = Path(__file__).parents[2] / "data" / "paper" / "published.csv"
"""The published numbers in a checkout; an installed package is without them."""

PERPLEXITY_TABLES = ("T2", "T1", "T2old")
"""The paper's tables of perplexities, the newest first."""

METHODS = {"NR": "GPTQ", "RO": "QuaRot-RO", "RH": "QuaRot-RH", "DFRot": "DFRot"}
"""Our rotations by the names of the paper's rows; without a rotation its row has the weight quantizer's name.
"""

ABSENT: tuple[tuple[Callable[[Mapping[str, str]], bool], str], ...] = (
    (
        lambda row: row["metric"] == "mmlu",
        "MMLU's questions are not among the local tasks: `lm_eval` with the hub runs them",
    ),
    (
        lambda row: row["metric"] == "acc_average9",
        "an average of nine tasks, three of which are not among the local six: see the zero-shot rows",
    ),
    (lambda row: row["metric"] == "c4_ppl", "C4 is not here"),
    (
        lambda row: row["method"] in ("SpinQuant", "OSTQuant"),
        "copied by the authors from another paper: the rivals are not run here yet",
    ),
)
"""Which published numbers have none of ours beside them, and why."""


def published(path: Path) -> pd.DataFrame:
    """The published numbers (data/paper/published.csv): source, the columns of PLACE, model, value; one
    number a row."""
    table = pd.read_csv(path, keep_default_na=False)
    missing = {*PLACE, "source", "model", "value"} - set(table.columns)
    if missing:
        raise ValueError(
            f"{path} must have the columns of the published numbers; it lacks {', '.join(sorted(missing))}"
        )
    return table.assign(
        value=pd.to_numeric(table["value"].replace("Inf", "inf"), errors="coerce"), printed=table["value"]
    )


def ours(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What the experiments' tables (by name) say in the paper's places: the columns of PLACE, model, value
    (mean over seeds), seeds, command."""
    lines = [line for name, table in tables.items() if name in _READERS for line in _READERS[name](table)]
    found = pd.DataFrame(lines, columns=[*PLACE, "model", "value", "command"])
    groups = found.groupby([*PLACE, "model", "command"], sort=False)["value"]
    return groups.agg(value="mean", seeds="size").reset_index()


def beside(numbers: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """Every published number with ours in the same place: the published columns, then ours, seeds, command,
    and why where there is none."""
    mine = measured.rename(columns={"value": "ours", "model": "our_model"})
    both = numbers.merge(mine, on=list(PLACE), how="left", validate="many_to_one")
    reasons = [
        _reason(row) if pd.isna(row["command"]) else ""
        for row in row_files.rows(both.assign(command=both["command"].astype(object)))
    ]
    return both.assign(why=reasons)


def _reason(row: Mapping[str, Any]) -> str:
    return next((reason for holds, reason in ABSENT if holds(row)), "not measured yet: run the experiment")


def beside_rows(found: Sequence[EvalResult]) -> pd.DataFrame:
    """The paper's perplexities in the evaluations' places: row, bits, a column a model (as printed), ours
    last; empty outside a checkout."""
    nothing = pd.DataFrame(columns=["row", "bits", "ours"])
    if not PUBLISHED.exists() or not found:
        return nothing
    lines = [rows.row(result) for result in found]
    table = tables.table(lines).assign(extra_minutes=math.nan)
    numbers = _checkouts_numbers()
    measured = ours({"main-table": table, "keep-out": table[table["weights"] == "gptq"]})
    both = beside(numbers[numbers["metric"] == "wikitext2_ppl"], measured)
    newest = pd.concat(
        [both[(both["table"] == source) & both["command"].notna()] for source in PERPLEXITY_TABLES]
    )
    if newest.empty:
        return nothing
    newest = newest.assign(row=newest["method"].map(_row_label), bits=newest["w_a_kv_bits"])
    models = list(dict.fromkeys(newest["model"]))
    index = ["row", "bits"]
    wide = newest.pivot_table(index=index, columns="model", values="printed", aggfunc="first", sort=False)[
        models
    ]
    mine = newest.groupby(index, sort=False)["ours"].first()
    places = dict.fromkeys((row_label(result.spec), result.spec.bits) for result in found)
    shown = [place for place in places if place in wide.index]
    return wide.assign(ours=mine).loc[shown].reset_index().rename_axis(columns=None)


@cache
def _checkouts_numbers() -> pd.DataFrame:
    return published(PUBLISHED)


def _row_label(method: str) -> str:
    """Our name of a row from the paper's."""
    names = {name: rotation for rotation, name in METHODS.items()} | {"FP16": "full precision", "RTN": "NR"}
    return names[method.removesuffix(".FP16()")] + (", kept out" if method.endswith(".FP16()") else "")


def spread(both: pd.DataFrame, table: str) -> pd.DataFrame:
    """One of the paper's tables as it is printed: a row a place, a column a model, ours last."""
    part = both[both["table"] == table]
    index = [name for name in PLACE[1:] if len(set(part[name])) > 1] or ["method"]
    order = part[index].drop_duplicates()
    wide = part.pivot_table(index=index, columns="model", values="printed", aggfunc="first", sort=False)
    mine = part.drop_duplicates(index).set_index(index)["ours"].round(2)
    return wide.assign(ours=mine).loc[
        list(order.itertuples(index=False, name=None)) if len(index) > 1 else order[index[0]].tolist()
    ]


def _line(
    table: str,
    method: str,
    weights: str,
    bits: str,
    metric: str,
    row: Mapping[str, Any],
    name: str,
    note: str = "",
) -> dict[str, Any]:
    place = dict(zip(PLACE, (table, method, weights, bits, metric, note), strict=True))
    command = f"dfrot-lab experiment {name}" + (
        "" if row["model"] == "smollm2-135m" else f" --model {row['model']}"
    )
    return {**place, "model": row["model"], "value": row["value"], "command": command}


def _perplexities(table: pd.DataFrame) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Perplexity rows with the paper's name of the method and the bits."""
    for row in tables.records(table):
        bits = str(row["bits"])
        full = bits == "16-16-16"
        method = "FP16" if full else METHODS[row["rotation"]]
        yield row, method + (".FP16()" if row["keep_out"] is True else ""), bits


def _keep_out(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for row, method, bits in _perplexities(table):
        if bits != "16-16-16":
            yield _line("T1", method, "gptq", bits, "wikitext2_ppl", row, "keep-out")


def _main_table(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for row, method, bits in _perplexities(table):
        weights = "none" if method == "FP16" else row["weights"]
        name = "RTN" if method == "GPTQ" and weights == "rtn" else method
        for where in ("T2old", "T2"):
            yield _line(where, name, weights, bits, "wikitext2_ppl", row, "main-table")
    minutes = table[(table["rotation"] == "DFRot") & (table["metric"] == tables.PERPLEXITY)].head(1)
    for row in tables.records(minutes):
        yield _line(
            "T2old",
            "DFRot",
            "none",
            "-",
            "extra_minutes_A100",
            {**row, "value": row["extra_minutes"]},
            "main-table",
        )


def _gamma_sweep(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for row, method, bits in _perplexities(table):
        if method == "DFRot" and bits == "4-4-16":
            figure = {"RH": "F5", "RO": "F6"}[row["init"]]
            yield _line(
                figure,
                f"DFRot-{row['init']}init",
                "gptq",
                bits,
                "wikitext2_ppl",
                row,
                "gamma-sweep",
                f"gamma={row['gamma']:g}",
            )


def _calibration(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for row, method, bits in _perplexities(table):
        if method == "DFRot" and bits == "4-4-16" and row["varied"] in ("sample", "rows"):
            note = (
                f"calibration sample {int(row['level']) + 1}"
                if row["varied"] == "sample"
                else f"{row['level']} token rows"
            )
            yield _line("T3", "DFRot", "gptq", bits, "wikitext2_ppl", row, "calibration", note)


def _massive_token(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    site = figure_site(table["site"].unique().tolist())
    part = table[table["site"] == site]
    errors = ((part["value"] - part["quantized"]) ** 2).groupby(part["rotation"], sort=False).sum()
    for rotation, error in errors.items():
        row = {"model": part["model"].iloc[0], "value": error}
        yield _line("F4", str(rotation), "none", "A4", "massive_token_error_squared_l2", row, "massive-token")


def _zero_shot(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Accuracy in percent; of tasks that have acc_norm, that one, as in the paper."""
    for (name, task), part in table.groupby(["row", "task"], sort=False):
        rotation, _, bits = str(name).partition(" ")
        method = {"NR 16-16-16": "FP16"}.get(str(name), METHODS.get(rotation) if bits != "16-16-16" else None)
        row = {str(column): value for column, value in part.iloc[-1].items()}  # acc_norm comes after acc
        if method and row["metric"] in zeroshot.METRICS:
            metric = "acc_average6" if task == zeroshot.AVERAGE else f"acc_{task}"
            yield _line(
                "zero-shot",
                method,
                "none" if method == "FP16" else "gptq",
                bits,
                metric,
                {**row, "value": 100 * row["value"]},
                "zero-shot",
            )


_READERS: dict[str, Callable[[pd.DataFrame], Iterator[dict[str, Any]]]] = {
    "keep-out": _keep_out,
    "main-table": _main_table,
    "gamma-sweep": _gamma_sweep,
    "calibration": _calibration,
    "massive-token": _massive_token,
    "zero-shot": _zero_shot,
}
