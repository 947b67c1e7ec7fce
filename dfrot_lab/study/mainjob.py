"""The main job, what `make run` does: capture, refine, evaluate every rotation at every setting of the bits,
draw and report.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.observe.capture import Capture, capture
from dfrot_lab.recipe.specs import EvalSpec, RefineSpec, RotationSpec
from dfrot_lab.rotate.dfrot import RefineResult, refined
from dfrot_lab.score import perplexity, results
from dfrot_lab.score.perplexity import EvalResult
from dfrot_lab.study.setting import MAIN_BITS, Setting

log = logging.getLogger(__name__)


NOMINAL_SECONDS = {"capture": 30, "refine": 15, "build": 8, "gptq": 75, "window": 3.3}
"""What each kind of work takes on 2 cores with the default model: the first guess of the time left, scaled by
the pace measured since.
"""


def row_label(spec: EvalSpec) -> str:
    """A row's rotation in words: `RO`, `RO, kept out`, `full precision`."""
    return (
        "full precision"
        if spec.bits == "16-16-16"
        else spec.rotation.name + (", kept out" if spec.keep_out else "")
    )


def row_name(spec: EvalSpec) -> str:
    """A row in words: `RO 4-4-16, kept out`."""
    return (
        "full precision"
        if spec.bits == "16-16-16"
        else f"{spec.rotation.name} {spec.bits}" + (", kept out" if spec.keep_out else "")
    )


def main_specs(setting: Setting) -> list[EvalSpec]:
    """Full precision; NR, RO, RH, DFRot at all bits, RO and RH also with massive tokens kept out; then RO and
    RH at 16-4-16 with more seeds.

    Rows that share a built model stand side by side.
    """
    rotations: list[tuple[RotationSpec | RefineSpec, bool]] = [
        (setting.rotation("NR"), False),
        (setting.rotation("RO"), True),
    ]
    rotations += [(setting.rotation("RH"), True), (setting.refine, False)]
    specs = [setting.row("16-16-16", setting.rotation("NR"))]
    for rotation, with_keep_out in rotations:
        for bits in MAIN_BITS:
            specs.append(setting.row(bits, rotation))
            if with_keep_out:
                specs.append(setting.row(bits, rotation, keep_out="nr_error"))
    more = [setting.rotation(kind, offset) for offset in range(1, setting.seeds) for kind in ("RO", "RH")]
    return specs + [setting.row(MAIN_BITS[0], rotation) for rotation in more]


class Progress:
    """Says what is being done and how long the rest will take, as log lines."""

    def __init__(self, costs: Sequence[float]) -> None:
        self.costs = list(costs)
        self.begun = 0
        self.at = time.perf_counter()
        self.nominal, self.spent = 1.0, 1.0

    def begin(self, what: str) -> None:
        """Announce the next step; the pace comes from the steps that really ran, not from those the store
        had.
        """
        now = time.perf_counter()
        cost, took = (self.costs[self.begun - 1], now - self.at) if self.begun else (0.0, 0.0)
        if took > 0.1 * cost:
            self.nominal, self.spent = self.nominal + cost, self.spent + took
        left = sum(self.costs[self.begun :]) * self.spent / self.nominal
        log.info(
            "[%2d/%d] %s; %s",
            self.begun + 1,
            len(self.costs),
            what,
            f"about {_minutes(left)} left" if left > 1 else "stored",
        )
        self.begun, self.at = self.begun + 1, now


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@dataclass(frozen=True)
class MainResult:
    """What the main job found: results rows as a table, the capture, and the refinement (None in a report
    made before there is one).
    """

    setting: Setting
    table: pd.DataFrame
    capture: Capture
    refinement: RefineResult | None


def main(setting: Setting, store: Store | None = None) -> MainResult:
    """Capture, refine, evaluate every row of `main_specs`; whatever is stored is reused, and a stopped run
    goes on where it was.
    """
    store, setting = store or Store(), setting.resolved()
    log.info("model %s, corpus %s", setting.model.source, setting.corpus)
    specs = main_specs(setting)
    progress = Progress([NOMINAL_SECONDS["capture"], NOMINAL_SECONDS["refine"], *costs(specs, store)])
    progress.begin("capturing activations")
    recorded = capture(setting.capture, store)
    progress.begin(f"refining R1 with gamma {setting.gamma:g}")
    refinement = refined(setting.refine, store)
    iterator = iter(specs[1:])

    def announce(spec: EvalSpec | None) -> None:
        if spec is not None:
            kept = ", massive tokens kept out" if spec.keep_out else ""
            seed = results.seed_of(spec)
            progress.begin(
                f"{spec.rotation.name}{'' if seed is None else f' (seed {seed})'} {spec.bits}{kept}"
            )

    announce(specs[0])
    found = perplexity.evaluate_all(specs, store, on_result=lambda _result: announce(next(iterator, None)))
    return MainResult(setting, main_table(found), recorded, refinement)


def costs(specs: Sequence[EvalSpec], store: Store) -> list[float]:
    """Nominal seconds of each row: nothing if it is stored, else as `costs_of_missing`."""
    missing = [spec for spec in specs if perplexity.stored(spec, store) is None]
    cost = dict(zip(missing, costs_of_missing(missing), strict=True))
    return [cost.get(spec, 0.0) for spec in specs]


def costs_of_missing(specs: Sequence[EvalSpec]) -> list[float]:
    """Nominal seconds of each row: its windows, and the build where it is the first to need it."""
    built: set[str] = set()
    costs = []
    for spec in specs:
        cost, key = NOMINAL_SECONDS["window"] * spec.windows, str(perplexity.build_key(spec))
        if key not in built:
            by_gptq = spec.weights.method == "gptq" and spec.weights.quantizer.bits < 16
            cost += NOMINAL_SECONDS["build"] + NOMINAL_SECONDS["gptq"] * by_gptq
        built.add(key)
        costs.append(cost)
    return costs


def main_table(found: Sequence[EvalResult]) -> pd.DataFrame:
    """Perplexity rows, then paired differences: each rotation minus RH at the same bits, and each keep-out
    row's gain over its own rotation.
    """
    rows: list[dict[str, Any]] = [results.row(result) for result in found]
    plain = {
        (r.spec.rotation.name, r.spec.bits, results.seed_of(r.spec)): r
        for r in found
        if r.spec.keep_out is None
    }
    base = next((seed for name, _, seed in plain if name == "RH"), None)
    for result in found:
        name, bits, seed = result.spec.rotation.name, result.spec.bits, results.seed_of(result.spec)
        if result.spec.keep_out:
            if reference := plain.get((name, bits, seed)):
                rows.append(results.difference_row(result, reference, name))
        elif name != "RH" and (reference := plain.get(("RH", bits, base if seed is None else seed))):
            rows.append(results.difference_row(result, reference, "RH"))
    return results.table(rows)
