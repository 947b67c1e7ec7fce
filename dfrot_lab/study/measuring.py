"""How fine the instrument is: where the noise of a comparison comes from, and what a finer one would cost."""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import statistics
from dfrot_lab.maths.tables import DIVERGENCE
from dfrot_lab.model.shapes import shape
from dfrot_lab.recipe.specs import Recipe, RefineSpec
from dfrot_lab.score.perplexity import EvalResult
from dfrot_lab.study import cost
from dfrot_lab.study.main import Found, Row, evaluated, named
from dfrot_lab.study.setting import Setting

MEASURED = (("16-4-16", "rtn"), ("4-4-16", "rtn"), ("4-4-16", "gptq"), ("4-4-4", "gptq"))
"""Bits, and by what weights are rounded."""
ROTATIONS = ("RO", "RH", "DFRot")
PAIRS = (("RO", "RH"), ("DFRot", "RH"))
TARGETS = (2.0, 1.0, 0.5)  # percent of perplexity: half widths of a 95% interval
JITTERS = 3
MOST_WINDOWS = 12  # that a build is thought to be scored on
LOSS = "loss"


def measuring(setting: Setting, store: Store) -> pd.DataFrame:
    """A comparison's standard deviations, in nats, between builds and between a build's windows; how many
    builds of how many windows resolve each of TARGETS, and in how long; what jitter alone does."""
    settings = MEASURED[:2] if setting.quick else MEASURED

    def asks(own: Setting) -> Iterator[Row]:
        for (bits, by), name in product(settings, ROTATIONS):
            yield Row(own.row(bits, own.method(name), weights=by))

    def jitters(own: Setting) -> Iterator[Row]:
        yield from (Row(spec) for specs in _jittered(own).values() for spec in specs[1:])

    found = evaluated(asks, setting, store)[1]
    found |= evaluated(jitters, setting.with_(builds=1), store)[1]
    lines = list(_components(setting, settings, found)) + list(_rounding(setting, found))
    return pd.DataFrame(lines).assign(**named(setting), windows=setting.windows, window=setting.window)


def _jittered(setting: Setting) -> dict[str, list[Recipe]]:
    """By rotation one build's recipe, and the same with other jitters alone."""
    plain = {name: setting.row("16-4-16", setting.method(name), weights="rtn") for name in ROTATIONS}
    jitters = [{}, *({"jitter": 1000 + number} for number in range(JITTERS))]
    return {name: [spec.with_(**jitter) for jitter in jitters] for name, spec in plain.items()}


def _components(
    setting: Setting, settings: Sequence[tuple[str, str]], found: Found
) -> Iterator[dict[str, Any]]:
    """A line a setting, pair, measure and target."""
    for bits, by in settings:
        specs = {
            name: [own.row(bits, own.method(name), weights=by) for own in setting.each()]
            for name in ROTATIONS
        }
        for pair in PAIRS:
            prices = price([specs[name][0] for name in pair])
            for measure in (LOSS, DIVERGENCE):
                windows = np.array([
                    _values(found[own], measure) - _values(found[other], measure)
                    for own, other in zip(*(specs[name] for name in pair), strict=True)
                ])  # fmt: skip
                sds = deviations(windows)
                about: dict[str, Any] = {"bits": bits, "weights": by, "pair": " - ".join(pair)}
                about |= {"measure": measure, "builds": setting.builds, "mean": float(windows.mean())}
                about |= {"sd between builds": sds[0], "sd between windows": sds[1]}
                for target in TARGETS if measure == LOSS else (math.nan,):
                    design = cheapest(*sds, math.log1p(target / 100), *prices) if target == target else {}
                    yield {**about, "target": target, **design}


def _values(result: EvalResult, measure: str) -> np.ndarray:
    return result.losses if measure == LOSS else result.divergences


def deviations(values: np.ndarray) -> tuple[float, float]:
    """The standard deviations between builds, and between the windows of one build, of `values` (builds,
    windows): by the mean squares of a one-way analysis of variance, not below 0. NaN where there is one."""
    builds, windows = values.shape
    within = float(values.var(1, ddof=1).mean()) if windows > 1 else math.nan
    between = float(values.mean(1).var(ddof=1)) if builds > 1 else math.nan
    between -= within / windows if windows > 1 else 0
    return math.sqrt(between) if between > 0 else 0.0 * between, math.sqrt(within)


def price(specs: Sequence[Recipe]) -> tuple[float, float]:
    """Nominal seconds on two cores: of building all of `specs` once, and of scoring one window of each."""
    sizes, built = shape(specs[0].model), 0.0
    for spec in specs:
        work = cost.load(sizes, 1, 1)
        if spec.canonical().weights.corpus:
            work += cost.gptq(sizes, spec.weights.window, spec.weights.windows)
        if isinstance(spec.rotation, RefineSpec):
            work += cost.refinement(sizes, spec.rotation)
        built += work.seconds(cost.TWO_CORES)
    return built, sum(cost.scoring(spec).seconds(cost.TWO_CORES) / spec.windows for spec in specs)


def cheapest(between: float, within: float, half: float, build: float, window: float) -> dict[str, Any]:
    """The builds, and windows in each, that resolve a difference of losses to `half` (nats, half an interval)
    in the least time, if standard deviations and seconds are these; and the minutes that it takes."""
    designs = []
    for windows in range(1, MOST_WINDOWS + 1):
        builds = statistics.builds_for(math.sqrt(between**2 + within**2 / windows), half)
        designs.append((builds * (build + windows * window) / 60, builds, windows))
    minutes, builds, windows = min(designs)
    return {"builds needed": builds, "windows in each": windows, "minutes on 2 cores": minutes}


def _rounding(setting: Setting, found: Found) -> Iterator[dict[str, Any]]:
    """What jitter alone does to a build's level: a line a rotation."""
    for name, specs in _jittered(setting.each()[0]).items():
        same = [found[spec] for spec in specs]
        for measure in (LOSS, DIVERGENCE):
            levels = np.array([_values(result, measure) for result in same])
            about: dict[str, Any] = {"bits": "16-4-16", "pair": f"{name}, jitter alone", "measure": measure}
            about |= {"builds": len(same), "mean": float(levels.mean())}
            yield about | {"sd between builds": float(levels.mean(1).std(ddof=1)),
                           "sd of a window": float(levels.std(0, ddof=1).mean())}  # fmt: skip
