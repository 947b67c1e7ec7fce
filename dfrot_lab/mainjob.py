"""The main job, what `make run` does: capture, refine, evaluate every rotation at every setting of the bits, draw and report."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from . import corpus, errors, evaluate, figures, massive, results
from .capture import Capture, capture
from .evaluate import EvalResult
from .refine import RefineResult, refined
from .specs import WINDOW, CaptureSpec, CorpusSpec, EvalSpec, ModelSpec, RefineSpec, RotationSpec, eval_spec
from .store import Store

log = logging.getLogger(__name__)

MAIN_BITS = ("16-4-16", "4-4-16", "4-4-4")
FIGURE_LAYER = 15
"""A layer in the middle of the stretch where the default model's first token is massive (12 to 28)."""

NOMINAL_SECONDS = {"capture": 30, "refine": 15, "build": 8, "gptq": 75, "window": 3.3}
"""What each kind of work takes on 2 cores with the default model: the first guess of the time left, scaled by the pace measured since."""


PROFILE = "DFROT_LAB_PROFILE"
"""The environment variable that makes notebooks and experiments `quick` (minutes, for tests) or `full` (default)."""

QUICK: dict[str, Any] = {"windows": 2, "window": 512, "gptq_windows": 4, "seeds": 1, "limit": 2, "weights": "rtn", "steps": 20, "quick": True}


@dataclass(frozen=True)
class Setting:
    """What the main job and the experiments are run on. `quick` trims sweeps to a few rows: to see that all works, not what is true."""

    model: ModelSpec = field(default_factory=ModelSpec)
    corpus: str = "auto"
    seed: int = 0
    windows: int = 6
    gamma: float = 100.0
    seeds: int = 3
    window: int = WINDOW
    gptq_windows: int = 16
    limit: int | None = 100
    weights: str = "gptq"
    steps: int = 100
    quick: bool = False

    @classmethod
    def of_profile(cls, **choices: Any) -> "Setting":
        """The setting of the profile that DFROT_LAB_PROFILE names, corpus resolved; `choices` go before it."""
        profile = os.environ.get(PROFILE, "full")
        if profile not in ("quick", "full"):
            raise ValueError(f"{PROFILE} must be quick or full; got {profile!r}")
        return cls(**{**(QUICK if profile == "quick" else {}), **choices}).resolved()

    def resolved(self) -> "Setting":
        """With `auto` replaced by the corpus that is there."""
        return replace(self, corpus=corpus.resolve(CorpusSpec(name=self.corpus)).name)

    @property
    def capture(self) -> CaptureSpec:
        """The first window of calibration tokens."""
        return CaptureSpec(model=self.model, corpus=CorpusSpec(name=self.corpus, split="calibration"), tokens=self.window)

    @property
    def refine(self) -> RefineSpec:
        """DFRot with the paper's rows, gamma and 100 steps, from RH, with the evaluation's own asymmetric quantizer."""
        return RefineSpec(capture=self.capture, gamma=self.gamma, init=RotationSpec(kind="RH", seed=self.seed), steps=self.steps)

    def rotation(self, kind: str, offset: int = 0) -> RotationSpec:
        """NR, RO or RH with the setting's seed, or one of the `seeds` that follow it."""
        return RotationSpec(kind=kind, seed=self.seed + offset)

    def row(self, bits: str, rotation: RotationSpec | RefineSpec, *, weights: str | None = None, **fields: Any) -> EvalSpec:
        """The EvalSpec of one row: this setting's model, text and windows, weights calibrated on the text's other half."""
        text = CorpusSpec(name=self.corpus, split="evaluation")
        spec = eval_spec(bits, model=self.model, corpus=text, rotation=rotation, windows=self.windows, window=self.window, **fields)
        calibration = {"corpus": text.with_(split="calibration"), "windows": self.gptq_windows, "window": self.window}
        return spec.with_(weights=spec.weights.with_(method=weights or self.weights, **calibration))


def row_label(spec: EvalSpec) -> str:
    """A row's rotation in words: `RO`, `RO, kept out`, `full precision`."""
    return "full precision" if spec.bits == "16-16-16" else spec.rotation.name + (", kept out" if spec.keep_out else "")


def row_name(spec: EvalSpec) -> str:
    """A row in words: `RO 4-4-16, kept out`."""
    return "full precision" if spec.bits == "16-16-16" else f"{spec.rotation.name} {spec.bits}" + (", kept out" if spec.keep_out else "")


def main_specs(setting: Setting) -> list[EvalSpec]:
    """Full precision; NR, RO, RH, DFRot at all bits, RO and RH also with massive tokens kept out; then RO and RH at 16-4-16 with more seeds.

    Rows that share a built model stand side by side.
    """
    rotations: list[tuple[RotationSpec | RefineSpec, bool]] = [(setting.rotation("NR"), False), (setting.rotation("RO"), True)]
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
        """Announce the next step; the pace comes from the steps that really ran, not from those the store had."""
        now = time.perf_counter()
        cost, took = (self.costs[self.begun - 1], now - self.at) if self.begun else (0.0, 0.0)
        if took > 0.1 * cost:
            self.nominal, self.spent = self.nominal + cost, self.spent + took
        left = sum(self.costs[self.begun :]) * self.spent / self.nominal
        log.info("[%2d/%d] %s; %s", self.begun + 1, len(self.costs), what, f"about {_minutes(left)} left" if left > 1 else "stored")
        self.begun, self.at = self.begun + 1, now


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@dataclass(frozen=True)
class MainResult:
    """What the main job found: results rows as a table, the capture, and the refinement (None in a report made before there is one)."""

    setting: Setting
    table: pd.DataFrame
    capture: Capture
    refinement: RefineResult | None


def main(setting: Setting, store: Store | None = None) -> MainResult:
    """Capture, refine, evaluate every row of `main_specs`; whatever is stored is reused, and a stopped run goes on where it was."""
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
            progress.begin(f"{spec.rotation.name}{'' if seed is None else f' (seed {seed})'} {spec.bits}{kept}")

    announce(specs[0])
    found = evaluate.evaluate_all(specs, store, on_result=lambda _result: announce(next(iterator, None)))
    return MainResult(setting, main_table(found), recorded, refinement)


def costs(specs: Sequence[EvalSpec], store: Store) -> list[float]:
    """Nominal seconds of each row: nothing if it is stored, else as `costs_of_missing`."""
    missing = [spec for spec in specs if evaluate.stored(spec, store) is None]
    cost = dict(zip(missing, costs_of_missing(missing), strict=True))
    return [cost.get(spec, 0.0) for spec in specs]


def costs_of_missing(specs: Sequence[EvalSpec]) -> list[float]:
    """Nominal seconds of each row: its windows, and the build where it is the first to need it."""
    built: set[str] = set()
    costs = []
    for spec in specs:
        cost, key = NOMINAL_SECONDS["window"] * spec.windows, str(evaluate.build_key(spec))
        if key not in built:
            by_gptq = spec.weights.method == "gptq" and spec.weights.quantizer.bits < 16
            cost += NOMINAL_SECONDS["build"] + NOMINAL_SECONDS["gptq"] * by_gptq
        built.add(key)
        costs.append(cost)
    return costs


def main_table(found: Sequence[EvalResult]) -> pd.DataFrame:
    """Perplexity rows, then paired differences: each rotation minus RH at the same bits, and each keep-out row's gain over its own rotation."""
    rows: list[dict[str, Any]] = [results.row(result) for result in found]
    plain = {(r.spec.rotation.name, r.spec.bits, results.seed_of(r.spec)): r for r in found if r.spec.keep_out is None}
    base = next((seed for name, _, seed in plain if name == "RH"), None)
    for result in found:
        name, bits, seed = result.spec.rotation.name, result.spec.bits, results.seed_of(result.spec)
        if result.spec.keep_out:
            if reference := plain.get((name, bits, seed)):
                rows.append(results.difference_row(result, reference, name))
        elif name != "RH" and (reference := plain.get(("RH", bits, base if seed is None else seed))):
            rows.append(results.difference_row(result, reference, "RH"))
    return results.table(rows)


def error_site(recorded: Capture) -> str:
    """The site the main figures show: layer 15's input norm, or the middle layer's where there are fewer."""
    wanted = f"layers.{FIGURE_LAYER}.input_norm"
    return wanted if wanted in recorded.sites else recorded.sites[len(recorded.sites) // 4 * 2]


def figure_site(sites: Sequence[str]) -> str:
    """Of the sites an experiment's table has, the one its figure shows: the first of layer 15, or the first of all."""
    return next((site for site in sites if site.startswith(f"layers.{FIGURE_LAYER}.")), sites[0])


def save_main(result: MainResult, folder: Path) -> list[Path]:
    """Draw the main figures into `folder`: residual stream, errors, the massive token, refinement, perplexity. Returns the PNGs."""
    about = {
        "model": result.setting.model.source,
        "corpus": result.setting.corpus,
        "seed": result.setting.seed,
        "capture": result.capture.key,
        "quantizer": result.setting.refine.quantizer.name,
    }
    with figures.theme():
        drawn = main_figures(result, error_table(result))
        return [figures.save_figure(fig, name, folder, {**about, **extra}) for name, (fig, extra) in drawn.items()]


def main_matrices(result: MainResult) -> dict[str, Tensor]:
    """NR, RO, RH and, where there is a refinement, DFRot: float64 (channels, channels) each."""
    refined_too = {} if result.refinement is None else {"DFRot": result.refinement.R}
    return {**errors.default_rotations(result.capture.channels, result.setting.seed), **refined_too}


def error_table(result: MainResult) -> pd.DataFrame:
    """Each token's error at the main figures' site, a column a rotation, by the evaluation's and the refinement's own quantizer."""
    site = error_site(result.capture)
    return errors.wide(errors.token_errors(result.capture, main_matrices(result), [result.setting.refine.quantizer], sites=[site]))


def main_figures(result: MainResult, wide: pd.DataFrame) -> dict[str, tuple[Figure, dict[str, Any]]]:
    """The main figures by name, each with what it was made from; without refinement or rows their pictures are left out. Draw inside `theme`."""
    recorded, quantizer, site = result.capture, result.setting.refine.quantizer, error_site(result.capture)
    token = int(recorded.residual_max[recorded.sites.index(site)].argmax())
    values = errors.massive_values(recorded, site, token, main_matrices(result), quantizer)
    refined_too = result.refinement is not None
    residual, axes = figures.plt.subplots(1, 1 + refined_too, figsize=(10 if refined_too else 5.2, 3.6), squeeze=False)
    figures.plot_residual(recorded.residual_max, recorded.residual_median, ax=axes[0, 0])
    if result.refinement is not None:
        figures.plot_history(result.refinement.history, ax=axes[0, 1])
    drawn: dict[str, tuple[Figure, dict[str, Any]]] = {
        "residual-and-refinement": (residual, {"refine": result.setting.refine.to_dict()}),
        "token-errors": (figures.figure_errors(wide), {"site": site, "rows": len(wide)}),
        "massive-token-values": (figures.figure_massive_token(values), {"site": site, "token": token}),
    }
    if any(results.label(row) != "full precision" for row in results.records(result.table)):
        drawn["perplexity"] = (figures.figure_perplexity(result.table), {"rows": sorted(set(result.table["spec"]))})
    return drawn


def save_run(result: MainResult, folder: Path) -> None:
    """Write rows.jsonl, rows.md, massive-tokens.csv and figures/ of the main job into `folder`."""
    results.save(folder / "rows.jsonl", result.table)
    results.write_table(massive_table(result), folder / "massive-tokens.csv")
    save_main(result, folder / "figures")


def report(result: MainResult) -> str:
    """The main job's findings as text: the most massive token, the table, the paired differences, RO - RH seed by seed."""
    setting, table = result.setting, result.table
    head = massive_table(result).head(1).to_dict("records")[0]
    parts = [
        f"The most massive token: {head['text']!r} at {head['site']}, |{head['residual_max']:,.0f}| in channel {head['channel']}, "
        f"{head['ratio_to_median']:,.0f} times the median.",
        f"Perplexity on {setting.corpus}, {setting.windows} windows of 2048 tokens, with the 95% interval over windows;\n"
        "bits are weights-activations-KV:",
        results.comparison(table).to_string(),
        "On the same windows, the difference and its paired 95% interval:",
    ]
    for metric in dict.fromkeys(table["metric"]):
        if metric != results.PERPLEXITY:
            parts.append(f"{metric}\n{results.comparison(table, metric).to_string()}")
    parts.append(f"RO - RH, each random seed on its own:\n{results.by_seed(table).to_string()}")
    return "\n\n".join(parts) + "\n"


def massive_table(result: MainResult) -> pd.DataFrame:
    """The massive tokens by any rule, most extreme first."""
    return massive.table(result.capture).sort_values("residual_max", ascending=False, ignore_index=True)
