"""The paper's published numbers beside ours: what we measured in each one's place, or why there is none."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from dfrot_lab.maths import tables
from dfrot_lab.score import zeroshot
from dfrot_lab.study.setting import figure_site

PLACE = ("table", "method", "weight_quantizer", "w_a_kv_bits", "metric", "note")
"""The columns that say which number of the paper a line is, whatever the model."""
PUBLISHED = Path(__file__).parents[2] / "data" / "paper" / "published.csv"  # in a checkout alone
METHODS = {"NR": "GPTQ", "RO": "QuaRot-RO", "RH": "QuaRot-RH", "DFRot": "DFRot"}
"""The paper's names of our rows; one without rotation has the weight quantizer's name."""
TASKS = "needs items that are not here: a file, or DFROT_LAB_TASKS with the hub (data/README.md)"
RIVALS = "copied by the authors from another paper; here `dfrot-lab leaderboard` runs them"
NOT_YET = "not measured yet: run the experiment"
ABSENT = {  # metrics, methods and tables that have none of our numbers beside them, and why
    **dict.fromkeys(("mmlu", "acc_average9", "acc_boolq", "acc_openbookqa", "acc_social_iqa"), TASKS),
    "c4_ppl": "C4 is not here", "SpinQuant": RIVALS, "OSTQuant": RIVALS,
}  # fmt: skip
CHANGE = ("change", "low", "high", "verdict")
LEVEL = 0.25  # percent: half a unit in the second digit that is printed of a perplexity of 5, of both numbers
CANNOT = "cannot tell"
COMPARED = {  # what is compared, ours: the paper's methods, then the rotation, kept out or not, against which
    "RO against RH": ("QuaRot-RO", "QuaRot-RH", "RO", False, "RH"),
    "RO kept out against RO": ("QuaRot-RO.FP16()", "QuaRot-RO", "RO", True, "RO"),
    "RH kept out against RH": ("QuaRot-RH.FP16()", "QuaRot-RH", "RH", True, "RH"),
    "DFRot against RH": ("DFRot", "QuaRot-RH", "DFRot", False, "RH"),
}
AS_PRINTED: dict[str, Any] = {"columns": "model", "values": "printed", "aggfunc": "first", "sort": False}

Row = Mapping[str, Any]
Places = list[tuple[str, str, str, str]]  # where a perplexity belongs: table, method, weight quantizer, note
Lines = Iterator[tuple[tuple[str, ...], Row]]  # the values of PLACE, and what has their model and value


@cache
def published(path: Path) -> pd.DataFrame:
    """The published numbers, one a row: source, PLACE, model, value, and `printed`, the text. ValueError."""
    table = pd.read_csv(path, keep_default_na=False)
    missing = ", ".join(sorted({*PLACE, "source", "model", "value"} - set(table.columns)))
    if missing:
        raise ValueError(f"{path} must have the columns of the published numbers; it lacks {missing}")
    value = pd.to_numeric(table["value"].replace("Inf", "inf"), errors="coerce")
    return table.assign(value=value, printed=table["value"])


def ours(found: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What the experiments' tables say in the paper's places: PLACE, model, value, builds, command."""
    lines = []
    for name, table in found.items():
        for place, row in _READERS[name](table) if name in _READERS else ():
            own = "" if row["model"] == "smollm2-135m" else f" --model {row['model']}"
            command = f"dfrot-lab experiment {name}{own}"
            lines.append((*place, row["model"], row["value"], row.get("builds"), command))
    return pd.DataFrame(lines, columns=[*PLACE, "model", "value", "builds", "command"])


def beside(numbers: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """Every published number with ours in its place: the columns of both, and why where there is none."""
    mine = measured.rename(columns={"value": "ours", "model": "our_model"})
    both = numbers.merge(mine, on=list(PLACE), how="left", validate="many_to_one")
    why = both["metric"].map(ABSENT).fillna(both["method"].map(ABSENT)).fillna(both["table"].map(ABSENT))
    why = why.fillna(NOT_YET)
    return both.assign(why=why.where(both["command"].isna(), ""))


def beside_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The paper's perplexities in the places of a results table's: row, bits, a column a model (as printed),
    ours."""
    nothing = pd.DataFrame(columns=["row", "bits", "ours"])
    if not PUBLISHED.exists() or not tables.records(table):
        return nothing
    table = table.assign(extra_minutes=math.nan)
    numbers = published(PUBLISHED)
    measured = ours({"main-table": table, "keep-out": table[table["weights"] == "gptq"]})
    both = beside(numbers[numbers["metric"] == "wikitext2_ppl"], measured).dropna(subset="command")
    newest = pd.concat([both[both["table"] == source] for source in ("T2", "T1", "T2old")])
    if newest.empty:
        return nothing
    newest = newest.assign(row=newest["method"].map(_row_label), bits=newest["w_a_kv_bits"])
    wide = newest.pivot_table(index=["row", "bits"], **AS_PRINTED)[list(dict.fromkeys(newest["model"]))]
    mine = newest.groupby(["row", "bits"], sort=False)["ours"].first()
    places = dict.fromkeys((_shown(row), row["bits"]) for row in tables.records(table))
    shown = [place for place in places if place in wide.index]
    return wide.assign(ours=mine).loc[shown].reset_index().rename_axis(columns=None)


def changes(numbers: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """What COMPARED changes in perplexity, in percent: a line a comparison, weight quantizer, bits and model
    of the paper's that has both numbers (of Tables 1 and 2 and the README's, the first), then `ours`, of a
    results table, with its interval `low` to `high` and verdict."""
    numbers = numbers[(numbers["metric"] == "wikitext2_ppl") & numbers["table"].isin(["T1", "T2old", "T2"])]
    place = ["weight_quantizer", "w_a_kv_bits", "model"]
    by = numbers.drop_duplicates([*place, "method"]).set_index(["method", *place])["value"]
    lines: list[dict[str, Any]] = []
    for name, (method, base, rotation, kept, against) in COMPARED.items():
        own = (table["rotation"] == rotation) & table["keep_out"].eq(kept)
        ours_by = table[own & (table["metric"] == tables.change(against))].set_index(["weights", "bits"])
        both = pd.concat([by[method], by[base]], axis=1, join="inner", keys=["its", "base"])
        for (weights, bits), part in both.groupby(level=[0, 1]):
            about = {"comparison": name, "weights": weights, "bits": bits}
            found = 100 * (part["its"] / part["base"] - 1)
            lines += [{**about, "model": model, "change": value} for (*_, model), value in found.items()]
            if (weights, bits) in ours_by.index:
                mine = ours_by.loc[(weights, bits)]
                low, high = mine["ci95"] or (math.nan, math.nan)
                said = {"change": mine["value"], "low": low, "high": high, "verdict": mine["verdict"]}
                lines.append({**about, "model": "ours", **said})
    return pd.DataFrame(lines, columns=["comparison", "weights", "bits", "model", *CHANGE])


def agreement(found: pd.DataFrame) -> pd.DataFrame:
    """Of `changes` a line a comparison: how many of the paper's models are worse by it, level (less than
    LEVEL) or better, from what to what; ours; and whether ours says `the same` as all of them."""
    lines: list[dict[str, Any]] = []
    for (name, weights, bits), part in found.groupby(["comparison", "weights", "bits"], sort=False):
        theirs = part[part["model"] != "ours"]["change"]
        signs = [_sign(value) for value in theirs]
        count = ", ".join(f"{signs.count(sign)} {sign}" for sign in dict.fromkeys(signs))
        about = {"comparison": name, "weights": weights, "bits": bits, "their models": count}
        about |= {"from, %": theirs.min(), "to, %": theirs.max()}
        for own in tables.records(part[part["model"] == "ours"].assign(metric="%"), "%"):
            said = own["verdict"]
            others = "as some of them" if said in signs else "no"
            as_theirs = said if said == CANNOT else "the same" if set(signs) == {said} else others
            cell = tables.cell({**own, "value": own["change"], "ci95": [own["low"], own["high"]]})
            lines.append({**about, "ours": cell, "as theirs": as_theirs})
    return pd.DataFrame(lines)


def _sign(change: float) -> str:
    return "level" if abs(change) < LEVEL else "worse" if change > 0 else "better"


def _shown(row: Row) -> str:
    """A results row's name without its parameters: `RO`, `RO, kept out`, `full precision`."""
    name = str(row["rotation"]) + (", kept out" if row["keep_out"] is True else "")
    return "full precision" if row["bits"] == "16-16-16" else name


def _row_label(method: str) -> str:
    """Our name of a row from the paper's."""
    names = {name: rotation for rotation, name in METHODS.items()} | {"FP16": "full precision", "RTN": "NR"}
    return names[method.removesuffix(".FP16()")] + (", kept out" if method.endswith(".FP16()") else "")


def spread(both: pd.DataFrame, table: str) -> pd.DataFrame:
    """One of the paper's tables as it is printed: a row a place, a column a model, ours last."""
    part = both[both["table"] == table]
    index = [name for name in PLACE[1:] if len(part[name].unique()) > 1] or ["method"]
    first = part.drop_duplicates(index).set_index(index)
    return part.pivot_table(index=index, **AS_PRINTED).assign(ours=first["ours"].round(2)).loc[first.index]


def _perplexities(table: pd.DataFrame, places: Callable[[Row, str], Places]) -> Lines:
    """Perplexity rows where `places`, from a row and the paper's name of its method, says they belong."""
    for row in tables.records(table):
        if (method := "FP16" if row["bits"] == "16-16-16" else METHODS.get(row["rotation"])) is None:
            continue  # such as RH in blocks, which the paper has not
        method += ".FP16()" if row["keep_out"] is True else ""
        for where, name, weights, note in places(row, method):
            yield (where, name, weights, str(row["bits"]), "wikitext2_ppl", note), row


def _keep_out(row: Row, method: str) -> Places:
    return [("T1", method, "gptq", "")] if row["weights"] == "gptq" else []


def _weights(row: Row, method: str) -> Places:
    weights = "none" if method == "FP16" else row["weights"]
    name = "RTN" if method == "GPTQ" and weights == "rtn" else method
    return [(where, name, weights, "") for where in ("T2old", "T2")]


def _swept(row: Row, method: str) -> Places:
    """Fig. 5 and 6: a gamma of DFRot, or a line that does not hang on it."""
    if row["bits"] != "4-4-16":
        return []
    figure = {"RH": "F5", "RO": "F6"}[row["init"]]
    if method == "DFRot":
        return [(figure, f"DFRot-{row['init']}init", "gptq", f"gamma={row['gamma']:g}")]
    return [(figure, method, "gptq", "line")]


def _refined(row: Row, method: str) -> Places:
    if method != "DFRot" or row["bits"] != "4-4-16" or row.get("varied") == "text":
        return []
    level, is_sample = row["level"], row["varied"] == "sample"
    note = f"calibration sample {int(level) + 1}" if is_sample else f"{level} token rows"
    return [("T3", "DFRot", "gptq", note)]


def _main_table(table: pd.DataFrame) -> Lines:
    """The perplexities, and the minutes that DFRot takes beyond RH."""
    yield from _perplexities(table, _weights)
    for row in tables.records(table[table["rotation"] == "DFRot"])[:1]:
        place = ("T2old", "DFRot", "none", "-", "extra_minutes_A100", "")
        yield place, {**row, "value": row["extra_minutes"]}


def _massive_token(table: pd.DataFrame) -> Lines:
    """The massive token's squared error at the figure's site under each rotation."""
    part = table[table["site"] == figure_site(table["site"].unique().tolist())]
    errors = ((part["value"] - part["quantized"]) ** 2).groupby(part["rotation"], sort=False).sum()
    for rotation, error in errors.items():
        place = ("F4", str(rotation), "none", "A4", "massive_token_error_squared_l2", "")
        yield place, {"model": part["model"].iloc[0], "value": error}


def _zero_shot(table: pd.DataFrame) -> Lines:
    """Accuracy in percent; of tasks that have acc_norm, that one, as in the paper."""
    for (name, task), part in table.groupby(["row", "task"], sort=False):
        rotation, _, bits = str(name).partition(" ")
        method = "FP16" if name == "NR 16-16-16" else METHODS.get(rotation) if bits != "16-16-16" else None
        row = dict(zip(map(str, part), part.iloc[-1], strict=True))  # acc_norm comes after acc
        if method and row["metric"] in zeroshot.METRICS:
            weights = "none" if method == "FP16" else "gptq"
            for where, metric in _OF_TASK.get(str(task), [(t, f"acc_{task}") for t in ("zero-shot", "T5")]):
                yield (where, method, weights, bits, metric, ""), {**row, "value": 100 * row["value"]}


_OF_TASK = {  # the paper's tables and metrics of what is no single task of the nine
    "average of six": [("zero-shot", "acc_average6")], "average of nine": [("T2", "acc_average9")],
    "mmlu": [("T4", "mmlu")],
}  # fmt: skip
_READERS: dict[str, Callable[[pd.DataFrame], Lines]] = {  # by experiment, what reads its table
    "keep-out": partial(_perplexities, places=_keep_out), "main-table": _main_table,
    "gamma-sweep": partial(_perplexities, places=_swept), "massive-token": _massive_token,
    "calibration": partial(_perplexities, places=_refined), "zero-shot": _zero_shot,
}  # fmt: skip
