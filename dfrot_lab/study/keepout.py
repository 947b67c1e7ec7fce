"""Massive tokens kept out of the rounding: how much of RO - RH is theirs, and which ones matter."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import statistics
from dfrot_lab.maths.tables import SHARE, whole
from dfrot_lab.recipe import specs
from dfrot_lab.score import rows
from dfrot_lab.score.perplexity import EvalResult
from dfrot_lab.study.main import Found, Row, evaluated
from dfrot_lab.study.setting import Setting

KEPT = (1, 4, 16, 64)  # tokens of a window


def keep_out(setting: Setting, store: Store) -> pd.DataFrame:
    """Table 1: RO and RH with massive tokens quantized or kept out; the share of RO - RH that this closes."""
    settings = ("16-4-16", "4-4-4", "4-4-16", "4-8-16")

    def asks(own: Setting) -> Iterator[Row]:
        yield Row(own.row("16-16-16", own.rotation("NR")))
        for bits, kind in product(settings, ("RH", "RO")):
            plain, rh = (own.row(bits, own.rotation(each)) for each in (kind, "RH"))
            yield Row(plain, against={"RH": rh} if kind == "RO" else {})
            yield Row(plain.with_(keep_out=specs.RELEASED_KEEP_OUT), against={kind: plain})
        for bits in settings:
            yield Row(own.row(bits, own.rotation("NR")), once=True)

    table, found = evaluated(asks, setting, store)
    shares = list[dict[str, Any]]()
    for bits in settings:
        shares += share_of(found, setting, bits, setting.weights, keep_out=specs.RELEASED_KEEP_OUT)
    return whole(pd.concat([table, pd.DataFrame(shares)], ignore_index=True))


def share_of(found: Found, setting: Setting, bits: str, weights: str, **kept: Any) -> list[dict[str, Any]]:
    """`closed_share` of the builds' evaluations at some bits, by a weight quantizer; `kept` are the fields of
    recipes that keep tokens out."""
    ro, ro_kept, rh, rh_kept = (
        [found[own.row(bits, own.rotation(kind), weights=weights).with_(**fields)] for own in setting.each()]
        for kind, fields in product(("RO", "RH"), ({}, kept))
    )
    return closed_share(ro, ro_kept, rh, rh_kept)


def closed_share(
    ro: Sequence[EvalResult], ro_kept: Sequence[EvalResult],
    rh: Sequence[EvalResult], rh_kept: Sequence[EvalResult],
) -> list[dict[str, Any]]:  # fmt: skip
    """The row of the share of the gap in loss between RO and RH that is gone with tokens kept out, its
    interval by the jackknife over builds; none of a gap that is not twice its own uncertainty."""
    parts = np.array([[result.losses.mean() for result in four] for four in (ro, ro_kept, rh, rh_kept)])
    gap = statistics.estimate(parts[0] - parts[2])
    if not abs(gap.mean) > gap.ci95[1] - gap.ci95[0]:  # nor of one build, which has no interval
        return []
    found = statistics.jackknife(parts, lambda a, a_kept, b, b_kept: 1 - (a_kept - b_kept) / (a - b))
    return [rows.line(ro_kept, SHARE, found)]


def intervene(setting: Setting, store: Store) -> pd.DataFrame:
    """Which tokens matter: k tokens a window kept out, by size, by error or at random, under RO and RH."""
    counts = list(product(specs.KEEP_OUT_COUNTS, setting.few(KEPT)))

    def asks(own: Setting) -> Iterator[Row]:
        for kind in ("RO", "RH"):
            plain = own.row("16-4-16", own.rotation(kind))
            yield Row(plain, {"chosen": "none", "k": 0})
            for chosen, k in [(specs.RELEASED_KEEP_OUT, None), *counts]:
                labels = {"chosen": chosen if k else f"rule {chosen}", "k": k}
                yield Row(plain.with_(keep_out=chosen, keep_out_tokens=k), labels, {kind: plain})

    return evaluated(asks, setting, store)[0].astype({"k": "Int64"})
