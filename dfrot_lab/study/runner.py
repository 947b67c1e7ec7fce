"""The one runner: rows of recipes in, evaluations and a table of results out, with the time that is left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths.tables import COLUMNS, whole
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score import perplexity, rows
from dfrot_lab.score.perplexity import EvalResult
from dfrot_lab.study import cost

Found = dict[Recipe, EvalResult]
"""Evaluations by the recipe that was asked for."""


@dataclass(frozen=True)
class Row:
    """One evaluation of an experiment: its own columns; recipes, by name, to take paired differences to."""

    spec: Recipe
    labels: Mapping[str, Any] = field(default_factory=dict)
    against: Mapping[str, Recipe] = field(default_factory=dict)


def row_label(spec: Recipe, more: str = "") -> str:
    """A row's rotation in words, with `more` behind it: `RO`, `RO, kept out`, `full precision`."""
    if spec.bits == "16-16-16":
        return "full precision"
    return spec.rotation.name + more + (", kept out" if spec.keep_out else "")


def row_name(spec: Recipe) -> str:
    """A row in words: `RO (seed 0) 4-4-16, kept out`."""
    seed = spec.rotation.first_seed
    return row_label(spec, ("" if seed is None else f" (seed {seed})") + f" {spec.bits}")


def evaluated(
    asked: Sequence[Row], store: Store, progress: cost.Progress | None = None
) -> tuple[pd.DataFrame, Found]:
    """Evaluate rows in order: their table (perplexity, and each paired difference), and the evaluations. A
    stopped run goes on at the row it was at; rows that two experiments share are computed once."""
    specs = list(dict.fromkeys(row.spec for row in asked))
    progress = progress or cost.Progress()
    progress.costs += cost.seconds(specs, store)
    names = map(row_name, specs)

    def announce(_done: EvalResult | None = None) -> None:
        if name := next(names, None):
            progress.begin(name)

    announce()
    found = dict(zip(specs, perplexity.evaluate_all(specs, store, on_result=announce), strict=True))
    return table_of(asked, found), found


def looked_up(asked: Sequence[Row], store: Store) -> tuple[pd.DataFrame, Found]:
    """As `evaluated`, of the rows that the store has; computes nothing."""
    specs = dict.fromkeys(row.spec for row in asked)
    found = {spec: done for spec in specs if (done := perplexity.stored(spec, store)) is not None}
    return table_of(asked, found), found


def table_of(asked: Sequence[Row], found: Found) -> pd.DataFrame:
    """The table of the rows that were found: a line for each perplexity, and for each paired difference."""
    lines: list[dict[str, Any]] = []
    for n, row in enumerate(asked):
        if row.spec in found and row not in asked[:n]:
            own = found[row.spec]
            lines.append({**row.labels, **rows.row(own)})
            pairs = [(found[other], name) for name, other in row.against.items() if other in found]
            lines += [{**row.labels, **rows.difference_row(own, *pair)} for pair in pairs]
    return whole(pd.DataFrame(lines, columns=None if lines else list(COLUMNS)))


def joined(*parts: pd.DataFrame) -> pd.DataFrame:
    """Tables below one another, their columns in order, whole numbers whole."""
    return whole(pd.concat(parts, ignore_index=True))
