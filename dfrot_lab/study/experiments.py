"""The paper's tables and figures, and what its reviewers asked for, as named experiments: specs in, one tidy
table out.

An experiment that evaluates is a list of `Row`s, each one artefact in the store: a stopped run goes on at the
row it was at, and rows that two experiments share are computed once. Its table has a line a row and metric,
with the columns of `results` after the experiment's own.
"""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from dfrot_lab.disk import tables
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import corpus
from dfrot_lab.observe import massive, residual
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.specs import KEEP_OUT_COUNTS, CorpusSpec, EvalSpec, QuantSpec, RefineSpec, RotationSpec
from dfrot_lab.rotate import dfrot
from dfrot_lab.score import perplexity, results, zeroshot
from dfrot_lab.score.perplexity import EvalResult
from dfrot_lab.study import token_studies
from dfrot_lab.study.mainjob import Progress, costs
from dfrot_lab.study.setting import Setting

log = logging.getLogger(__name__)

GAMMAS = (1.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, float("inf"))
"""The paper's sweep (Fig. 5 and 6)."""
CLIPS = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
ROW_COUNTS = (48, 32, 24, 16, 8)
"""Table 3: calibration rows in units of the window; a model of n layers has 2n windows of rows, and counts
beyond that are left out.
"""
SAMPLES = 5
KEPT = (1, 4, 16, 64)
SHARE = "share of RO - RH closed"


@dataclass(frozen=True)
class Row:
    """One evaluation of an experiment: the experiment's own columns, and rows of the same experiment to take
    paired differences to, by name.
    """

    spec: EvalSpec
    labels: Mapping[str, Any] = field(default_factory=dict)
    against: Mapping[str, EvalSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A named experiment: what it reproduces, its question, and the function from setting and store to a tidy
    table.
    """

    name: str
    reproduces: str
    question: str
    table: Callable[[Setting, Store], pd.DataFrame]


def run(name: str, setting: Setting | None = None, store: Store | None = None) -> pd.DataFrame:
    """The table of the experiment `name`, from the store where it has the rows, else computed now; KeyError
    for a name that is none.
    """
    if name not in EXPERIMENTS:
        raise KeyError(f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    setting = (setting or Setting.of_profile()).resolved()
    log.info("experiment %s: model %s, corpus %s", name, setting.model.source, setting.corpus)
    return EXPERIMENTS[name].table(setting, store or Store())


def listing() -> pd.DataFrame:
    """The experiments: name, what it reproduces, its question."""
    return pd.DataFrame(
        [{"name": e.name, "reproduces": e.reproduces, "question": e.question} for e in EXPERIMENTS.values()]
    )


def evaluated(rows: Sequence[Row], store: Store) -> tuple[pd.DataFrame, dict[str, EvalResult]]:
    """Evaluate rows in order: their table (perplexity, and each paired difference), and the evaluations by
    spec key.
    """
    rows = [row for n, row in enumerate(rows) if row not in rows[:n]]
    progress = Progress(costs([row.spec for row in rows], store))
    announced = iter(rows)

    def announce(_done: EvalResult | None = None) -> None:
        if row := next(announced, None):
            progress.begin(
                ", ".join(
                    [
                        row.spec.rotation.name,
                        row.spec.bits,
                        *(f"{name} {value}" for name, value in row.labels.items()),
                    ]
                )
            )

    announce()
    done = perplexity.evaluate_all([row.spec for row in rows], store, on_result=announce)
    found = {row.spec.key: result for row, result in zip(rows, done, strict=True)}
    lines = []
    for row, result in zip(rows, done, strict=True):
        lines.append({**row.labels, **results.row(result)})
        for name, reference in row.against.items():
            lines.append({**row.labels, **results.difference_row(result, found[reference.key], name)})
    return pd.DataFrame(lines).astype(dict.fromkeys(tables.WHOLE, "Int64")), found


def _trimmed(values: Sequence[Any], setting: Setting) -> list[Any]:
    """All values; in the quick profile the first and the last."""
    return [values[0], values[-1]] if setting.quick and len(values) > 2 else list(values)


def _refinement(setting: Setting, offset: int = 0, **changes: Any) -> RefineSpec:
    """The setting's refinement from RH with one of its seeds, some fields changed."""
    return setting.refine.with_(**{"init": setting.rotation("RH", offset), **changes})


def keep_out(setting: Setting, store: Store) -> pd.DataFrame:
    """Table 1: RO and RH with all tokens quantized and with massive ones kept out; then the share of the RO -
    RH gap that keep-out closes.
    """
    rows = [Row(setting.row("16-16-16", setting.rotation("NR")))]
    settings = ("4-4-16", "4-4-4", "4-8-16")
    for offset in range(setting.seeds):
        for kind in ("RH", "RO"):
            for bits in settings:
                plain = setting.row(bits, setting.rotation(kind, offset))
                kept = plain.with_(keep_out="nr_error")
                rh = setting.row(bits, setting.rotation("RH", offset))
                rows += [
                    Row(plain, against={"RH": rh} if kind == "RO" else {}),
                    Row(kept, against={kind: plain}),
                ]
    rows += [Row(setting.row(bits, setting.rotation("NR"))) for bits in settings]
    table, found = evaluated(rows, store)
    return pd.concat([table, pd.DataFrame(_shares(setting, found, settings))], ignore_index=True)


def _shares(
    setting: Setting, found: Mapping[str, EvalResult], settings: Sequence[str]
) -> list[dict[str, Any]]:
    """For each seed and setting of the bits, 1 - (RO - RH with massive tokens kept out) / (RO - RH), with its
    paired bootstrap interval.

    Left out where the interval of RO - RH itself has 0 in it: there is no gap to have a share of.
    """
    lines = []
    for offset in range(setting.seeds):
        for bits in settings:
            plain = {kind: setting.row(bits, setting.rotation(kind, offset)) for kind in ("RO", "RH")}
            low, high = perplexity.paired_difference(*(found[plain[kind].key] for kind in ("RO", "RH")))[1]
            if low <= 0 <= high:
                continue
            four = [
                found[spec.key]
                for kind in ("RO", "RH")
                for spec in (plain[kind], plain[kind].with_(keep_out="nr_error"))
            ]
            value, interval = perplexity.statistic(perplexity.closed_share, four)
            lines.append(results.statistic_row(four[1], SHARE, value, interval))
    return lines


def main_table(setting: Setting, store: Store) -> pd.DataFrame:
    """Table 2 and the README's tables: NR, RO, RH and DFRot by RTN and GPTQ, with the minutes each takes
    beyond RH.
    """
    rows = [Row(setting.row("16-16-16", setting.rotation("NR")), {"extra_minutes": 0.0})]
    minutes = dfrot.refined(setting.refine, store).seconds / 60
    rotations: list[RotationSpec | RefineSpec] = [*map(setting.rotation, ("NR", "RO", "RH")), setting.refine]
    for rotation in rotations:
        for weights in ("rtn", "gptq"):
            for bits in ("4-4-4", "4-4-16"):
                rh = setting.row(bits, setting.rotation("RH"), weights=weights)
                against = {} if rotation.name == "RH" else {"RH": rh}
                extra = minutes if rotation.name == "DFRot" else 0.0
                rows.append(
                    Row(setting.row(bits, rotation, weights=weights), {"extra_minutes": extra}, against)
                )
    return evaluated(rows, store)[0]


def gamma_sweep(setting: Setting, store: Store) -> pd.DataFrame:
    """Fig. 5 and 6: perplexity against gamma, from RH and from RO, beside QuaRot and QuaRot.FP16() of the
    same start.
    """
    rows = []
    some = massive.find(capture(setting.capture, store), setting.refine.rule).any()
    gammas = [
        gamma for gamma in GAMMAS if some or gamma < float("inf")
    ]  # with no massive row there is nothing to fit alone
    for bits, seeds in (("16-4-16", setting.seeds), ("4-4-16", 1)):
        for offset in range(seeds):
            for kind in ("RH", "RO"):
                start = setting.rotation(kind, offset)
                plain = setting.row(bits, start)
                rows.append(Row(plain, {"init": kind, "line": "QuaRot"}))
                rows.append(
                    Row(
                        plain.with_(keep_out="nr_error"),
                        {"init": kind, "line": "QuaRot.FP16()"},
                        {"QuaRot": plain},
                    )
                )
                for gamma in _trimmed(gammas, setting):
                    refined = setting.row(bits, setting.refine.with_(init=start, gamma=gamma))
                    rows.append(Row(refined, {"init": kind, "line": "DFRot"}, {"QuaRot": plain}))
    return evaluated(rows, store)[0]


def calibration(setting: Setting, store: Store) -> pd.DataFrame:
    """Table 3: five samples, five row counts; and the text refined on another than the one it is tested on,
    and the reverse.
    """
    ways: list[tuple[dict[str, Any], Setting, RefineSpec]] = []
    for skip in _trimmed(range(SAMPLES), setting):
        ways.append(
            (
                {"varied": "sample", "level": str(skip)},
                setting,
                _refinement(setting, capture=setting.capture.with_(skip=skip)),
            )
        )
    sites = len(capture(setting.capture, store).sites)
    for count in _trimmed([count for count in ROW_COUNTS if count <= sites], setting):
        ways.append(
            (
                {"varied": "rows", "level": f"{count} x {setting.window}"},
                setting,
                _refinement(setting, rows=count * setting.window),
            )
        )
    texts = _texts(setting)
    for fitted, tested in itertools.product(texts, texts) if len(texts) > 1 else ():
        own = setting.capture.with_(corpus=CorpusSpec(name=fitted, split="calibration"))
        ways.append(
            (
                {"varied": "text", "level": f"{fitted} -> {tested}"},
                replace(setting, corpus=tested),
                _refinement(setting, capture=own),
            )
        )
    rows = []
    for bits in (
        "16-4-16",
        "4-4-16",
    ):  # the paper's is 4-4-16; the other shows what the rotation does without the noise of GPTQ
        for labels, where, spec in ways:
            plain = where.row(bits, where.rotation("RH"))
            rows += [
                Row(plain, {"varied": "none", "level": f"RH on {where.corpus}"}),
                Row(where.row(bits, spec), labels, {"RH": plain}),
            ]
    return evaluated(rows, store)[0]


def _texts(setting: Setting) -> list[str]:
    """The texts to exchange: the setting's own and, where both can be had, WikiText-2 and the packaged
    sample.
    """
    if setting.quick or corpus.resolve(CorpusSpec(name="auto")).name != "wikitext2":
        log.info(
            "calibrating on one text and testing on another is left out: it needs WikiText-2 (and the full profile)"
        )
        return [setting.corpus]
    return ["wikitext2", "wikipedia-sample"]


def clip_sweep(setting: Setting, store: Store) -> pd.DataFrame:
    """The activation clip ratio under RO, RH and DFRot, refined with the same clip: what a reviewer asked
    for.
    """
    rows = []
    for rotation in (setting.rotation("RO"), setting.rotation("RH"), setting.refine):
        whole = setting.row("16-4-16", rotation)
        for clip in _trimmed(CLIPS, setting):
            quantizer = whole.activations.with_(clip_ratio=clip)
            own = rotation.with_(quantizer=quantizer) if isinstance(rotation, RefineSpec) else rotation
            rows.append(
                Row(
                    whole.with_(activations=quantizer, rotation=own),
                    {"clip": clip},
                    {} if clip == 1 else {"clip 1": whole},
                )
            )
    return evaluated(rows, store)[0]


def symmetric_or_not(setting: Setting, store: Store) -> pd.DataFrame:
    """Refine with a symmetric or asymmetric quantizer, evaluate with either; the refinement with and without
    the released code's sign flips.
    """
    rows = []
    for tested in ("asymmetric", "symmetric"):
        activations = QuantSpec(symmetric=tested == "symmetric")
        rh = setting.row("16-4-16", setting.rotation("RH")).with_(activations=activations)
        rows.append(Row(rh, {"refined_with": "not refined", "sign_flips": False, "tested_with": tested}))
        for fitted in ("asymmetric", "symmetric"):
            for flips in (False, True):
                spec = _refinement(
                    setting,
                    quantizer=QuantSpec(symmetric=fitted == "symmetric"),
                    variant="as_released" if flips else "as_paper",
                )
                labels = {"refined_with": fitted, "sign_flips": flips, "tested_with": tested}
                rows.append(Row(rh.with_(rotation=spec), labels, {"RH": rh}))
    return evaluated(rows, store)[0]


def variants(setting: Setting, store: Store) -> pd.DataFrame:
    """The refinement as released, as in the paper and as here, some seeds each: objective and errors under
    the evaluation's quantizer, perplexity.
    """
    names = ("as_released", "as_paper", "accelerated")
    specs = {
        (name, offset): _refinement(
            setting, offset, variant=name, quantizer=QuantSpec(symmetric=name == "as_released")
        )
        for offset in range(setting.seeds)
        for name in names
    }
    rows = []
    for bits in ("16-4-16", "4-4-16"):
        for (name, offset), spec in specs.items():
            rh = setting.row(bits, setting.rotation("RH", offset))
            rows += [
                Row(rh, {"variant": "not refined"}),
                Row(setting.row(bits, spec), {"variant": name}, {"RH": rh}),
            ]
    losses = [
        line
        for (name, offset), spec in specs.items()
        for line in _final_losses(name, setting.seed + offset, spec, setting, store)
    ]
    return pd.concat([evaluated(rows, store)[0], pd.DataFrame(losses)], ignore_index=True)


def _final_losses(
    name: str, seed: int, spec: RefineSpec, setting: Setting, store: Store
) -> list[dict[str, Any]]:
    """Weighted objective, ordinary and massive error of a refined R over all rows of its capture, all under
    one quantizer; and its seconds.
    """
    result = dfrot.refined(spec, store)
    recorded = capture(spec.capture, store)
    mask = massive.find(recorded, spec.rule).flatten()
    losses = dfrot.losses_of(
        recorded.all_rows(), result.R, dfrot.row_weights(mask, spec.gamma), mask, setting.refine.quantizer
    )
    columns = {
        "variant": name,
        "model": setting.model.source,
        "corpus": setting.corpus,
        "rotation": spec.name,
        "gamma": spec.gamma,
        "seed": seed,
    }
    return [
        {**columns, "metric": metric, "value": value}
        for metric, value in {**losses, "seconds of refinement": result.seconds}.items()
    ]


def intervene(setting: Setting, store: Store) -> pd.DataFrame:
    """Which tokens matter: perplexity with k tokens of each window kept out, chosen by size, by error or at
    random, under RO and RH.
    """
    rows = []
    for kind in ("RO", "RH"):
        plain = setting.row("16-4-16", setting.rotation(kind))
        rows.append(Row(plain, {"chosen": "none", "k": 0}))
        rows.append(
            Row(plain.with_(keep_out="nr_error"), {"chosen": "rule nr_error", "k": None}, {kind: plain})
        )
        for chosen in KEEP_OUT_COUNTS:
            for k in _trimmed(KEPT, setting):
                rows.append(
                    Row(
                        plain.with_(keep_out=chosen, keep_out_tokens=k),
                        {"chosen": chosen, "k": k},
                        {kind: plain},
                    )
                )
    return evaluated(rows, store)[0].astype({"k": "Int64"})


def massive_activations(setting: Setting, store: Store) -> pd.DataFrame:
    """Sun et al.: the three largest values and the median of the residual stream by layer; then massive
    values set to zero, or to their mean.
    """
    plain = setting.row("16-16-16", setting.rotation("NR"))
    rows = [Row(plain, {"set_massive": "left alone"})]
    rows += [
        Row(plain.with_(set_massive=to), {"set_massive": to}, {"left alone": plain})
        for to in ("zero", "mean")
    ]
    return pd.concat(
        [evaluated(rows, store)[0], residual.residual_profile(setting.capture, store)], ignore_index=True
    )


def zero_shot(setting: Setting, store: Store) -> pd.DataFrame:
    """Table 5 and the README's: six tasks through lm-eval, for the plain model, NR and RH unquantized, and
    RO, RH and DFRot at 4 bits.
    """
    rows: list[tuple[str, EvalSpec | None]] = [("plain transformers", None)]
    rows += [(f"{kind} 16-16-16", setting.row("16-16-16", setting.rotation(kind))) for kind in ("NR", "RH")]
    for bits in ("4-4-16",) if setting.quick else ("4-4-16", "4-4-4"):
        rows += [(f"{kind} {bits}", setting.row(bits, setting.rotation(kind))) for kind in ("RO", "RH")]
        rows.append((f"DFRot {bits}", setting.row(bits, setting.refine)))
    return pd.concat(
        [zeroshot.table(name, spec, setting.model, setting.limit, store) for name, spec in rows],
        ignore_index=True,
    )


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "token-errors-3d",
            "Fig. 2, 13-24",
            "Which tokens does each rotation help, site by site?",
            token_studies.token_errors,
        ),
        Experiment(
            "token-errors-2d", "Fig. 3, 10-12", "Where do RO, RH and DFRot part?", token_studies.token_errors
        ),
        Experiment(
            "token-orders",
            "Fig. 2, 13-24",
            "How many tokens have the paper's order, site by site?",
            token_studies.token_orders,
        ),
        Experiment(
            "massive-token",
            "Fig. 4, 7-9",
            "What happens to one massive token's values?",
            token_studies.massive_token,
        ),
        Experiment("gamma-sweep", "Fig. 5, 6", "How much should massive tokens weigh?", gamma_sweep),
        Experiment("keep-out", "Table 1", "Do massive tokens explain the gap between RO and RH?", keep_out),
        Experiment(
            "main-table", "Table 2, README", "What is each rotation worth, by RTN and by GPTQ?", main_table
        ),
        Experiment("calibration", "Table 3", "Does it matter what R1 is refined on?", calibration),
        Experiment(
            "zero-shot", "Table 5, README", "Does what holds for perplexity hold for tasks?", zero_shot
        ),
        Experiment(
            "clip-sweep", "asked by a reviewer", "Is it the rotation, or would a clip do?", clip_sweep
        ),
        Experiment(
            "symmetric-or-not",
            "Eq. 5 against the code",
            "Does it matter which quantizer R1 is refined with?",
            symmetric_or_not,
        ),
        Experiment(
            "variants",
            "Alg. 1 against the code",
            "Do the released steps, the paper's and ours end alike?",
            variants,
        ),
        Experiment(
            "massive-activations",
            "Sun et al.",
            "How large are they, and does the model need them?",
            massive_activations,
        ),
        Experiment(
            "massive-magnitudes",
            "Sun et al., Fig. 1",
            "Which token, which channel?",
            token_studies.massive_magnitudes,
        ),
        Experiment("intervene", "asked here", "Which tokens must be kept out?", intervene),
    )
}
"""Every experiment by name, in the paper's order."""
