"""The rows of `worth`: which they are, what they cost, and how they and the paper's numbers are shown."""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.page import TABLE
from dfrot_lab.maths.statistics import estimate
from dfrot_lab.maths.tables import PERPLEXITY, table
from dfrot_lab.recipe.specs import RELEASED_KEEP_OUT, Recipe
from dfrot_lab.score import rows
from dfrot_lab.score.perplexity import EvalResult
from dfrot_lab.show.theme import safe
from dfrot_lab.study import cost, main, paper
from dfrot_lab.study.setting import Setting

FULL = "16-16-16"
BITS = (FULL, "16-4-16", "4-8-16", "4-4-16", "4-4-4")
KEPT = {"none": None, RELEASED_KEEP_OUT: RELEASED_KEEP_OUT}  # whose tokens pass unquantized: a rule's, if any
DIFFERENCE = ["minus_rh", "minus_rh_low", "minus_rh_high"]
FOUND = ["perplexity", "low", "high"]
COLUMNS = ["rotation", "kept_out", "row", "bits", "weights", *FOUND, *DIFFERENCE, "windows", "stored"]
Lookup = Callable[[Recipe], EvalResult | None]
References = Mapping[str, EvalResult | None]


def specs_of(
    setting: Setting, names: Sequence[str], bits: Sequence[str], weights: str, keep_out: Sequence[str | None]
) -> list[Recipe]:
    """The rows picked, those that share a built model side by side; one row at 16-16-16."""
    found = [setting.row(FULL, setting.method("NR"), weights=weights)] if FULL in bits else []
    rows = [(b, kept) for b in bits if b != FULL for kept in keep_out]
    for method in map(setting.method, names):
        found += [setting.row(b, method, weights=weights, keep_out=kept) for b, kept in rows]
    return found


class Tally:
    """How far the work is: nominal seconds of every row and of scoring one; what is done of them."""

    def __init__(self, costs: list[float], scoring: float) -> None:
        self.costs, self.scoring = costs, scoring
        self.done, self.part, self.started = 0, 0.0, time.perf_counter()

    def at(self, part: str, done: int, total: int) -> None:
        """`done` of `total` layers of weights, or windows, of the row being made."""
        building = self.costs[self.done] - self.scoring
        self.part = building + self.scoring * done / total if part == "window" else building * done / total

    def next(self) -> None:
        """The row being made is finished."""
        self.done, self.part = self.done + 1, 0.0

    @property
    def share(self) -> float:
        """What is done, 0 to 1."""
        return min(1.0, (sum(self.costs[: self.done]) + self.part) / max(sum(self.costs), 1e-9))

    @property
    def left(self) -> float:
        """Seconds left, at the pace so far."""
        spent = time.perf_counter() - self.started
        return spent * (1 - self.share) / self.share if self.share > 0.02 else sum(self.costs)


def said(missing: Sequence[Recipe], store: Store) -> str:
    """Which rows are not stored and about how long they take."""
    if not missing:
        return "All rows that are picked are stored."
    names, takes = "; ".join(map(main.row_name, missing)), cost.duration(sum(cost.seconds(missing, store)))
    return f"Not stored: {names}. To compute: about {takes} on 2 cores."


def rows_table(specs: Sequence[Recipe], lookup: Lookup, references: References) -> pd.DataFrame:
    """COLUMNS, a line a row: one build's perplexity, its change against RH (`references`, by bits) in
    percent, each with the 95% interval over the windows of this build, which holds no other seed."""
    lines = []
    for spec in specs:
        result, reference = lookup(spec), references.get(spec.bits)
        about = (spec.rotation.name, spec.keep_out is not None, main.row_label(spec), spec.bits)
        weights = spec.weights.method if spec.weights.quantizer.bits < 16 else None
        found = _interval(result.losses, np.exp) if result else [math.nan] * 3
        difference = [math.nan] * 3
        if result and reference and result.spec != reference.spec and spec.bits != FULL:
            difference = _interval(result.losses - reference.losses, rows.percent)
        lines.append((*about, weights, *found, *difference, spec.windows, result is not None))
    return pd.DataFrame(lines, columns=COLUMNS)


def _interval(losses: np.ndarray, scale: Callable[[float], float]) -> list[float]:
    """The mean over windows and its interval's ends, each `scale`d."""
    found = estimate(losses)
    return [float(scale(value)) for value in (found.mean, *found.ci95)]


def paper_table(specs: Sequence[Recipe], lookup: Lookup) -> pd.DataFrame:
    """The paper's perplexities in the rows' places: row, bits, a column a model (as printed), ours last."""
    lines = []
    for spec in specs:
        result, about = lookup(spec), {"metric": PERPLEXITY, "value": math.nan, "family": ""}
        lines.append(rows.rows([result])[0] if result else rows.columns(spec) | about)
    return paper.beside_rows(table(lines))


def paper_rows(beside: pd.DataFrame, model: str) -> pd.DataFrame:
    """One model's column of `paper_table` as rows to draw; what is printed as NaN is left out."""
    value = pd.to_numeric(beside.get(model, pd.Series(dtype=float)), errors="coerce")
    nothing = dict.fromkeys(("low", "high", *DIFFERENCE), math.nan)
    rows = beside[["row", "bits"]].assign(perplexity=value, stored=True, windows="", **nothing)
    return rows[rows["perplexity"].notna()]


def interval(value: float, low: float, high: float) -> str:
    """`36.11 [31.20, 40.80]`, without an interval where there is none, nothing for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:,.2f}" if math.isnan(low) else f"{value:,.2f} [{low:,.2f}, {high:,.2f}]"


def shown(table: pd.DataFrame) -> str:
    """The rows as an HTML table."""
    view = pd.DataFrame({"row": table["row"], "bits": table["bits"], "weights": table["weights"].fillna("")})
    titles = {"perplexity [95%, windows]": FOUND, "change against RH, % [95%, windows]": DIFFERENCE}
    for title, names in titles.items():
        view[title] = [interval(*values) for values in table[names].itertuples(index=False)]
    stored = table["stored"].map({True: "yes", False: "no"})
    return view.assign(windows=table["windows"], stored=stored).to_html(**TABLE)


def shown_paper(beside: pd.DataFrame, text: str) -> str:
    """The paper's numbers beside ours as an HTML table, and what may be compared."""
    if beside.empty and paper.PUBLISHED.exists():
        return "The paper has no number for these rows."
    if beside.empty:
        return "The paper's numbers are in a checkout's data/paper only."
    mine = beside["ours"].map(lambda v: "" if pd.isna(v) else f"{v:,.2f}")
    said = f"Ours is on {safe(text)}: other models, so compare the order and the gaps."
    return said + beside.assign(ours=mine).fillna("").to_html(**TABLE)
