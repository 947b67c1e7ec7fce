"""The rows of `worth`: which they are, what they cost, and how they and the paper's numbers are shown. No
widget is needed here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.recipe.specs import DEFAULT_MODEL, WINDOW, Recipe, RefineSpec
from dfrot_lab.rotate import dfrot
from dfrot_lab.score import perplexity
from dfrot_lab.score.perplexity import EvalResult
from dfrot_lab.show import figures
from dfrot_lab.show.markup import safe
from dfrot_lab.study import cost, mainjob, paper
from dfrot_lab.study.mainjob import NOMINAL_SECONDS
from dfrot_lab.study.setting import Setting

from . import base
from .parts import plain

ROTATIONS = ("NR", "RO", "RH", "DFRot")
FULL = "16-16-16"
BITS = (FULL, "16-4-16", "4-8-16", "4-4-16", "4-4-4")
KEPT = {"none": None, "nr_error": "nr_error"}
"""Which massive tokens pass unquantized: none, or those the released code's rule finds."""
PAPER_MODELS = (
    "LLaMA-7B", "LLaMA-13B", "LLaMA-30B", "LLaMA2-7B", "LLaMA2-13B", "LLaMA2-70B", "LLaMA3-8B", "LLaMA3-70B", "Mistral-7B-v0.3", "QWen2-7B",
)  # fmt: skip

Lookup = Callable[[Recipe], EvalResult | None]


def specs_of(
    setting: Setting,
    rotations: Sequence[str],
    bits: Sequence[str],
    weights: str,
    keep_out: Sequence[str | None],
) -> list[Recipe]:
    """The rows picked, those that share a built model side by side; at 16-16-16 there is one, since no
    rotation changes anything there.
    """
    found = [setting.row(FULL, setting.rotation("NR"), weights=weights)] if FULL in bits else []
    for name in rotations:
        rotation = setting.refine if name == "DFRot" else setting.rotation(name)
        rows = [(b, kept) for b in bits if b != FULL for kept in keep_out]
        found += [setting.row(b, rotation, weights=weights, keep_out=kept) for b, kept in rows]
    return found


def pace(spec: Recipe) -> float:
    """Operations of one of the row's windows over those of a default model's window of 2048: what scales the
    nominal seconds.
    """
    usual = cost.forward(cost.SHAPES[DEFAULT_MODEL], WINDOW).float_flops
    return cost.forward(cost.shape(spec.model), spec.window).float_flops / usual


def scoring_seconds(spec: Recipe) -> float:
    """Nominal seconds of the row's windows on 2 cores."""
    return NOMINAL_SECONDS["window"] * spec.windows * pace(spec)


def costs(specs: Sequence[Recipe], store: Store) -> list[float]:
    """Nominal seconds on 2 cores of each row that is missing: windows, the model where it is the first to
    need it, a refinement not stored yet.
    """
    seconds = mainjob.costs_of_missing(specs)
    refined: set[str] = set()
    for place, spec in enumerate(specs):
        if isinstance(spec.rotation, RefineSpec) and spec.rotation.key not in refined:
            refined.add(spec.rotation.key)
            seconds[place] += (
                0
                if dfrot.stored(spec.rotation, store)
                else NOMINAL_SECONDS["capture"] + NOMINAL_SECONDS["refine"]
            )
    return [second * pace(spec) for second, spec in zip(seconds, specs, strict=True)]


def duration(seconds: float) -> str:
    """Seconds in words, as the estimates say them; nothing under a second is told apart."""
    return cost.duration(seconds) if seconds >= 1 else "1 s"


def said(missing: Sequence[Recipe], store: Store) -> str:
    """Which rows are not stored and about how long they take."""
    if not missing:
        return "All rows that are picked are stored."
    names = "; ".join(mainjob.row_name(spec) for spec in missing)
    return f"Not stored: {names}. To compute: about {duration(sum(costs(missing, store)))} on 2 cores."


def rows_table(
    specs: Sequence[Recipe], lookup: Lookup, references: Mapping[str, EvalResult | None]
) -> pd.DataFrame:
    """A line a row: rotation, kept out, bits, weights, perplexity, its 95% interval, the paired difference to
    RH, windows, stored or not.
    """
    lines = []
    for spec in specs:
        result = lookup(spec)
        low, high = result.ci95 if result else (math.nan, math.nan)
        line = {
            "rotation": spec.rotation.name,
            "kept_out": spec.keep_out is not None,
            "row": mainjob.row_label(spec),
            "bits": spec.bits,
        }
        line |= {"weights": spec.weights.method if spec.weights.quantizer.bits < 16 else None}
        line |= {"perplexity": result.perplexity if result else math.nan, "low": low, "high": high}
        line |= dict(
            zip(
                ("minus_rh", "minus_rh_low", "minus_rh_high"),
                _difference(result, references.get(spec.bits)),
                strict=True,
            )
        )
        lines.append(line | {"windows": spec.windows, "stored": result is not None})
    return pd.DataFrame(lines, columns=_COLUMNS)


_COLUMNS = [
    "rotation", "kept_out", "row", "bits", "weights", "perplexity", "low", "high", "minus_rh", "minus_rh_low", "minus_rh_high", "windows", "stored",
]  # fmt: skip


def _difference(result: EvalResult | None, reference: EvalResult | None) -> tuple[float, float, float]:
    if result is None or reference is None or result.spec == reference.spec or result.spec.bits == FULL:
        return math.nan, math.nan, math.nan
    value, (low, high) = perplexity.paired_difference(result, reference)
    return value, low, high


def paper_table(specs: Sequence[Recipe], lookup: Lookup) -> pd.DataFrame:
    """The paper's perplexities in the rows' places: row, bits, a column a model (as printed), ours last,
    missing where it is not stored.
    """
    return paper.beside_rows(
        [lookup(spec) or EvalResult(spec, np.array([math.nan]), math.nan, "") for spec in specs]
    )


def empty_bars() -> go.FigureWidget:
    """A plot of rows: a trace for each rotation, filled, and hollow with massive tokens kept out."""
    plot = base.figure(barmode="group", bargap=0.2, bargroupgap=0.08)
    for name in ROTATIONS:
        for kept in (False, True):
            colour = base.COLOURS[name]
            marker = {"color": "rgba(0,0,0,0)" if kept else colour, "line": {"color": colour, "width": 2}}
            text = {
                "textposition": "inside",
                "textangle": -90,
                "insidetextanchor": "start",
                "insidetextfont_color": base.GREY if kept else "#ffffff",
            }
            plot.add_bar(name=name + (", kept out" if kept else ""), marker=marker, visible=False, **text)
    plot.update_traces(error_y={"type": "data", "symmetric": False, "color": base.GREY})
    plot.update_layout(
        yaxis={"title": {"text": "perplexity"}},
        xaxis={"type": "category"},
        margin={"t": 96},
        title={"y": 0.96, "font": {"size": 13}},
    )
    return plot


def draw_bars(plot: go.FigureWidget, table: pd.DataFrame, title: str) -> None:
    """Put the stored rows of `rows_table` into the plot; a value far above the best is cut off at the top and
    written out.
    """
    rows = table[(table["bits"] != FULL) & table["stored"]]
    exact = table.loc[(table["bits"] == FULL) & table["stored"], "perplexity"].tolist()
    near = rows[rows["perplexity"] <= figures.FAR * rows["perplexity"].min()]
    top = 1.08 * float(max([*near["high"].fillna(near["perplexity"]), *exact, 1.0]))
    with plot.batch_update():
        for trace in plot.data:
            _draw_bar(trace, rows[rows["row"] == trace.name], top)
        plot.layout.xaxis.categoryarray = [b for b in BITS if b in set(rows["bits"])]
        plot.layout.yaxis.range = [0, top]
        plot.layout.shapes = [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": _DOTTED}
            for y in exact
        ]
        plot.layout.title.text = title + "".join(f"<br>dotted: full precision, {y:.2f}" for y in exact)


_DOTTED = {"dash": "dot", "color": base.GREY, "width": 1.5}


def _draw_bar(trace: Any, rows: pd.DataFrame, top: float) -> None:
    value, far = rows["perplexity"].to_numpy(), (rows["perplexity"] > top).to_numpy()
    trace.x, trace.y = rows["bits"].tolist(), np.minimum(value, top).tolist()
    trace.error_y.array = np.where(far, 0, np.nan_to_num(rows["high"] - value)).tolist()
    trace.error_y.arrayminus = np.where(far, 0, np.nan_to_num(value - rows["low"])).tolist()
    trace.text = [
        f"{v:,.0f}, off the scale" if out else f"{v:.2f}" for v, out in zip(value, far, strict=True)
    ]
    trace.customdata = [_hover(row) for row in rows.to_dict("records")]
    trace.hovertemplate = "%{customdata}<extra></extra>"
    trace.visible = bool(len(rows))


def _hover(row: Mapping[Any, Any]) -> str:
    difference = _interval(row["minus_rh"], row["minus_rh_low"], row["minus_rh_high"])
    head = f"{plain(row['row'])} at {row['bits']}: {_interval(row['perplexity'], row['low'], row['high'])}"
    return (
        head
        + (f"<br>minus RH: {difference}" if difference else "")
        + (f"<br>{row['windows']} windows" if row["windows"] else "")
    )


def _interval(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:,.2f}" if math.isnan(low) else f"{value:,.2f} [{low:,.2f}, {high:,.2f}]"


def paper_rows(beside: pd.DataFrame, model: str) -> pd.DataFrame:
    """One model's column of `paper_table` as rows to draw; what is printed as NaN is left out."""
    value = pd.to_numeric(beside.get(model, pd.Series(dtype=float)), errors="coerce")
    nothing = dict.fromkeys(("low", "high", "minus_rh", "minus_rh_low", "minus_rh_high"), math.nan)
    rows = beside[["row", "bits"]].assign(perplexity=value, stored=True, windows="", **nothing)
    return rows[rows["perplexity"].notna()]


def shown(table: pd.DataFrame) -> str:
    """The rows as an HTML table."""
    view = pd.DataFrame({"row": table["row"], "bits": table["bits"], "weights": table["weights"].fillna("")})
    columns = (
        ("perplexity [95%]", ("perplexity", "low", "high")),
        ("minus RH [95%]", ("minus_rh", "minus_rh_low", "minus_rh_high")),
    )
    for title, names in columns:
        view[title] = [_interval(*values) for values in table[list(names)].itertuples(index=False)]
    view["windows"] = table["windows"]
    view["stored"] = table["stored"].map({True: "yes", False: "no"})
    return _html(view)


def shown_paper(beside: pd.DataFrame, text: str) -> str:
    """The paper's numbers beside ours as an HTML table, and what may be compared."""
    if beside.empty:
        return (
            "The paper has no number for these rows."
            if paper.PUBLISHED.exists()
            else "The paper's numbers are in a checkout's data/paper only."
        )
    mine = beside["ours"].map(lambda v: "" if pd.isna(v) else f"{v:,.2f}")
    return f"Ours is on {safe(text)}: other models, so compare the order and the gaps.{_html(beside.assign(ours=mine).fillna(''))}"


def _html(table: pd.DataFrame) -> str:
    return str(table.to_html(index=False, escape=True, border=0, classes="dfrot-table"))
