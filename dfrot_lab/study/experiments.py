"""The paper's tables and figures, and what its reviewers asked for, as experiments: a tidy table each."""

import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pandas as pd

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths.tables import whole
from dfrot_lab.observe import massive, residual
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe import specs
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.rotate import dfrot, steps, transforms
from dfrot_lab.score import rows as score_rows, zeroshot
from dfrot_lab.score.perplexity import EvalResult
from dfrot_lab.study import beyond, inside, keepout, leaderboard, main
from dfrot_lab.study.main import Row, evaluated, named
from dfrot_lab.study.measuring import measuring
from dfrot_lab.study.setting import BUILDS, Setting

log = logging.getLogger(__name__)

GAMMAS = (1.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, float("inf"))  # the paper's, Fig. 5 and 6
CLIPPED = ("RH", "RO", "DFRot")
CLIPS = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
ROW_COUNTS = (48, 32, 24, 16, 8)  # Table 3, in windows; a model of n layers has 2n: more is left out
SAMPLES, BITS = 5, ("16-4-16", "4-4-16")
SWEEPS = (
    "gamma-sweep", "calibration", "clip-sweep", "intervene", "better-weights", "kv-caches",
    *leaderboard.EXPERIMENTS, "transfer", "static-activations", "prefix", "block-floats",
)  # fmt: skip
LONG = ("keep-out", "main-table", "variants", "symmetric-or-not")  # of GPTQ, or of long refinements
BUILDS_OF = {"gain": 26, **dict.fromkeys(LONG, 5), **dict.fromkeys(SWEEPS, 3)}
"""Builds of an experiment where it has not as many as the main job: the one that is to see least has most,
long ones as many as a comparison needs, sweeps, where a curve is what is looked at, fewer."""
GAIN_WINDOWS = 5  # times the setting's: what a build of DFRot against RH varies by is mostly its windows
OWN_RULE = (
    "main", "compare", "gain", "measuring", "offset", "free-options", "better-weights",
    *leaderboard.EXPERIMENTS, "transfer", "static-activations", "prefix", "block-floats",
)  # fmt: skip
"""The experiments that refine by the setting's rule."""
CALIBRATED = "calibration text"
CHOSEN = "perplexity at the clip chosen on the calibration text"
EACH_CLIP = "RH, each at its chosen clip"


def run(name: str, setting: Setting | None = None, store: Store | None = None) -> pd.DataFrame:
    """The table of an experiment, from the store where it has the rows, else computed now. KeyError."""
    if name not in EXPERIMENTS:
        raise KeyError(f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    setting, store = setting_of(name, (setting or Setting.of_profile()).resolved()), store or Store()
    log.info("experiment %s: model %s, corpus %s", name, *named(setting).values())
    made = EXPERIMENTS[name][-1]
    if name in WHOLE:
        table: pd.DataFrame = made(setting, store)
        return table
    return evaluated(lambda own: made(own, store), setting, store)[0]


def setting_of(name: str, setting: Setting) -> Setting:
    """The setting an experiment runs on: its own number of builds where none is chosen; the paper's rule, but
    for those that ask of DFRot as it is used (OWN_RULE), which keep the setting's."""
    setting = setting.of_builds(BUILDS_OF.get(name, BUILDS))
    return setting if name in OWN_RULE else setting.with_(rule=specs.PAPER_RULE)


def listing() -> pd.DataFrame:
    """The experiments: name, what it reproduces, its question."""
    about = [(name, *said[:2]) for name, said in EXPERIMENTS.items()]
    return pd.DataFrame(about, columns=["name", "reproduces", "question"])


def main_table(setting: Setting, store: Store) -> pd.DataFrame:
    """Table 2 and the README's: NR, RO, RH and DFRot by RTN and GPTQ, and beside them Offset and Offset+;
    with the minutes beyond RH."""

    def asks(own: Setting) -> Iterator[Row]:
        yield Row(own.row("16-16-16", own.rotation("NR")))
        by_weights = setting.few(("rtn", "gptq"))
        for name, by, bits in product(
            ("NR", "RO", "RH", *leaderboard.FITTED), by_weights, ("4-4-4", "4-4-16")
        ):
            spec, rh = (own.row(bits, own.method(each), weights=by) for each in (name, "RH"))
            yield Row(spec, {}, {} if name == "RH" else {"RH": rh}, once=name == "NR")

    table = evaluated(asks, setting, store)[0]
    minutes = dict.fromkeys(table["rotation"], 0.0)
    for spec in (setting.row("16-16-16", setting.method(name)) for name in leaderboard.FITTED):
        minutes[spec.rotation.name] = transforms.fit(spec, transforms.Context(spec, store)).seconds / 60
    return table.assign(extra_minutes=table["rotation"].map(minutes))


def gain(setting: Setting, _store: Store) -> Iterator[Row]:
    """DFRot against RH in many builds of many windows: how small a difference can be told."""
    many: dict[str, Any] = {"windows": GAIN_WINDOWS * setting.windows}
    rh = setting.row("16-4-16", setting.rotation("RH"), **many)
    yield Row(rh)
    yield Row(setting.row("16-4-16", setting.method("DFRot"), **many), {}, {"RH": rh})


def gamma_sweep(setting: Setting, store: Store) -> Iterator[Row]:
    """Fig. 5 and 6: perplexity against gamma, from RH and RO, beside QuaRot and its FP16() of that start. The
    paper's QuaRot has asymmetric activations, clip 1, no Hadamard at o_proj online (QuaRot's own: symmetric,
    clip 0.9, one across heads)."""
    some = massive.find(capture(setting.with_(build=0).capture, store), setting.rule).any()
    gammas = [gamma for gamma in GAMMAS if some or gamma < float("inf")]  # no massive row to fit alone
    for bits, kind in product(setting.few(BITS), setting.few(("RH", "RO"))):
        start, once = setting.rotation(kind), bits != BITS[0]
        plain = setting.row(bits, start)
        yield Row(plain, {"init": kind, "line": "QuaRot"}, once=once)
        others = [("QuaRot.FP16()", plain.with_(keep_out=specs.RELEASED_KEEP_OUT))]
        refined = [setting.refine.with_(init=start, gamma=gamma) for gamma in setting.few(gammas)]
        others += [("DFRot", setting.row(bits, spec)) for spec in refined]
        for line, spec in others:
            yield Row(spec, {"init": kind, "line": line}, {"QuaRot": plain}, once=once)


def calibration(setting: Setting, store: Store) -> Iterator[Row]:
    """Table 3: five samples, five row counts; refined on one text and tested on another, and the reverse."""
    ways: list[tuple[str, str, Setting, dict[str, Any]]] = []
    for skip in setting.few(range(SAMPLES)):
        sample = {"sample": 1000 * skip + setting.build} if skip else {}  # none is another build's
        ways.append(("sample", str(skip), setting, {"capture": setting.capture.with_(**sample)}))
    sites = len(capture(setting.capture, store).sites)
    for count in setting.few([count for count in ROW_COUNTS if count <= sites]):
        ways.append(("rows", f"{count} x {setting.window}", setting, {"rows": count * setting.window}))
    texts = setting.texts()
    for fitted, tested in product(texts, texts) if len(texts) > 1 else ():
        own = setting.capture.with_(corpus=specs.CorpusSpec(name=fitted, split="calibration"))
        ways.append(("text", f"{fitted} -> {tested}", setting.with_(corpus=tested), {"capture": own}))
    # the paper's is 4-4-16, of one run; the other shows what the rotation does without the noise of GPTQ
    for bits, (varied, level, where, changes) in product(setting.few(BITS), ways):
        plain, once = where.row(bits, where.rotation("RH")), bits != BITS[0]
        yield Row(plain, {"varied": "none", "level": f"RH on {named(where)['corpus']}"}, once=once)
        spec = where.row(bits, setting.refine.with_(**changes))
        yield Row(spec, {"varied": varied, "level": level}, {"RH": plain}, once=once)


def clip_sweep(setting: Setting, store: Store) -> pd.DataFrame:
    """The activation clip ratio under RH, RO and DFRot, refined with the same clip, on the scored text and on
    the calibration text; what each scores at the clip that is best on the latter, and so against RH."""

    def asks(own: Setting) -> Iterator[Row]:
        for row in _clipped(own):
            yield replace(row, labels={**row.labels, "scored_on": "evaluation text"})
            yield Row(row.spec.with_(corpus=own.calibration_text), {**row.labels, "scored_on": CALIBRATED})

    table, found = evaluated(asks, setting, store)
    other = table["scored_on"] == CALIBRATED
    table.loc[other, "metric"] = table.loc[other, "metric"] + f" of the {CALIBRATED}"
    each = [list(_clipped(own)) for own in setting.each()]

    def calibrated(row: Row) -> float:
        return float(found[row.spec.with_(corpus=setting.calibration_text)].losses.mean())

    chosen, lines = dict[str, list[EvalResult]](), list[dict[str, Any]]()
    for name in setting.few(CLIPPED):
        own = [rows for rows in zip(*each, strict=True) if rows[0].spec.rotation.name == name]
        best = min(own, key=lambda rows: sum(map(calibrated, rows)))
        chosen[name] = [found[row.spec] for row in best]
        told = [score_rows.rows(chosen[name])[0] | {"metric": CHOSEN}]
        told += score_rows.compared(chosen[name], chosen["RH"], EACH_CLIP) if name != "RH" else []
        lines += [{**best[0].labels, **line} for line in told]
    return whole(pd.concat([table, pd.DataFrame(lines)], ignore_index=True))


def _clipped(setting: Setting) -> Iterator[Row]:
    """A row a rotation and clip, against the rotation without one."""
    for name, clip in product(setting.few(CLIPPED), setting.few(CLIPS)):
        unclipped = setting.row("16-4-16", setting.method(name))
        quantizer = unclipped.activations.with_(clip_ratio=clip)
        rotation = unclipped.rotation.with_(quantizer=quantizer) if name == "DFRot" else unclipped.rotation
        spec = unclipped.with_(activations=quantizer, rotation=rotation)
        yield Row(spec, {"clip": clip}, {} if clip == 1 else {"clip 1": unclipped})


def either_scheme(setting: Setting, _store: Store) -> Iterator[Row]:
    """Refine and evaluate with either quantizer; refine with and without the released code's sign flips."""
    schemes = ("asymmetric", "symmetric")
    fits = list(product(schemes, (False, True)))
    for tested in setting.few(schemes):
        quantizer = QuantSpec(scheme=tested)
        rh = setting.row("16-4-16", setting.rotation("RH"), activations=quantizer)
        yield Row(rh, {"refined_with": "not refined", "sign_flips": False, "tested_with": tested})
        for fitted, flips in setting.few(fits):
            variant = "as_released" if flips else "as_paper"
            spec = setting.refine.with_(quantizer=QuantSpec(scheme=fitted), variant=variant)
            labels = {"refined_with": fitted, "sign_flips": flips, "tested_with": tested}
            yield Row(rh.with_(rotation=spec), labels, {"RH": rh})


def variants(setting: Setting, store: Store) -> pd.DataFrame:
    """The refinement as released, as in the paper and as here: losses under one quantizer, perplexity."""

    def fits(own: Setting) -> dict[str, specs.RefineSpec]:
        said: dict[str, Any] = {"init": own.rotation("RH")}
        of = {name: QuantSpec(scheme="asymmetric") for name in ("as_paper", "accelerated")}
        of = {"as_released": QuantSpec(), **of}
        return {name: own.refine.with_(**said, variant=name, quantizer=grid) for name, grid in of.items()}

    def asks(own: Setting) -> Iterator[Row]:
        for bits in setting.few(BITS):
            rh = own.row(bits, own.rotation("RH"), weights="rtn")
            yield Row(rh, {"variant": "not refined"})
            for name, spec in fits(own).items():
                yield Row(own.row(bits, spec, weights="rtn"), {"variant": name}, {"RH": rh})

    every = [(own, *fit) for own in setting.each() for fit in fits(own).items()]
    table = evaluated(asks, setting, store)[0]
    losses = [line for own, name, spec in every for line in _final_losses(name, spec, own, store)]
    return whole(pd.concat([table, pd.DataFrame(losses)], ignore_index=True))


def _final_losses(name: str, spec: specs.RefineSpec, setting: Setting, store: Store) -> list[dict[str, Any]]:
    """Losses of a refined R over all rows of its capture under the setting's quantizer; and its seconds."""
    result, recorded = dfrot.refined(spec, store), capture(spec.capture, store)
    mask = massive.find(recorded, spec.rule).flatten()
    weights, quantizer = steps.row_weights(mask, spec.gamma), setting.refine.quantizer
    losses = steps.losses_of(recorded.all_rows(), result.R, weights, mask, quantizer)
    about: dict[str, Any] = {"variant": name, **named(setting)}
    about |= {"rotation": spec.name, "gamma": spec.gamma, "rule": spec.rule, "seed": spec.first_seed}
    losses["seconds of refinement"] = result.seconds
    return [{**about, "metric": metric, "value": value} for metric, value in losses.items()]


def massive_activations(setting: Setting, store: Store) -> pd.DataFrame:
    """Sun et al.: massive values set to zero, or to their mean; the residual stream by layer."""

    def asks(own: Setting) -> Iterator[Row]:
        plain = own.row("16-16-16", own.rotation("NR"))
        yield Row(plain)
        for to in ("zero", "mean"):
            yield Row(plain.with_(set_massive=to), against={"left alone": plain})

    table = evaluated(asks, setting, store)[0].fillna({"set_massive": "left alone"})
    return whole(pd.concat([table, residual.residual_profile(setting.capture, store)], ignore_index=True))


def zero_shot(setting: Setting, store: Store) -> pd.DataFrame:
    """Table 5 and the README's: six tasks by lm-eval; plain, NR, RH in full, RO, RH, DFRot at 4 bits."""
    named: dict[str, specs.Recipe | None] = {"plain transformers": None}
    bits_of, names = (["4-4-16"], ["RH"]) if setting.quick else (["4-4-16", "4-4-4"], ["RO", "RH", "DFRot"])
    for bits, name in [*product(["16-16-16"], ("NR", "RH")), *product(bits_of, names)]:
        named[f"{name} {bits}"] = setting.row(bits, setting.method(name))
    tables = [zeroshot.table(name, spec, setting.model, setting.limit, store) for name, spec in named.items()]
    return pd.concat(tables, ignore_index=True)


def _main(setting: Setting, store: Store) -> pd.DataFrame:
    return main.run(setting, store).table


EXPERIMENTS: dict[str, tuple[str, str, Callable[[Setting, Store], Any]]] = {
    "main": ("Table 1, 2", "What is each rotation worth, with massive tokens and without?", _main),
    "token-errors-3d": ("Fig. 2, 13-24", "Which tokens does each rotation help?", main.token_errors),
    "token-errors-2d": ("Fig. 3, 10-12", "Where do RO, RH and DFRot part?", main.token_errors),
    "token-orders": ("Fig. 2, 13-24", "How many tokens have the paper's order?", main.token_orders),
    "massive-token": ("Fig. 4, 7-9", "What happens to one massive token's values?", main.massive_token),
    "gamma-sweep": ("Fig. 5, 6", "How much should massive tokens weigh?", gamma_sweep),
    "keep-out": ("Table 1", "Do massive tokens explain the gap between RO and RH?", keepout.keep_out),
    "main-table": ("Table 2, README", "What is each rotation worth, by RTN and GPTQ?", main_table),
    "calibration": ("Table 3", "Does it matter what R1 is refined on?", calibration),
    "gain": ("asked by reviewers", "How much does DFRot gain, and could less be seen?", gain),
    "measuring": ("asked here", "How small a difference can be told, and what would less cost?", measuring),
    "offset": ("not in the paper", "Is there a better R1, if the zero point may take a part?", beyond.offset),
    "free-options": ("not in the paper", "What else costs nothing when the model runs?", beyond.free_options),
    "better-weights": ("not in the paper", "How much of GPTQ's loss is its inputs'?", beyond.better_weights),
    "kv-caches": ("rivals", "Which KV cache loses least, and does R3 help?", beyond.kv_caches),
    "static-activations": ("asked by reviewers", "What shares a scale?", beyond.static_activations),
    "block-floats": ("asked here", "Does a rotation help MXFP4 and NVFP4?", beyond.block_floats),
    "prefix": ("asked here", "What is a prefix worth beside a rotation?", beyond.prefix),
    **leaderboard.EXPERIMENTS,
    "transfer": ("rivals", "Does what is fitted on one text help on another?", leaderboard.transfer),
    "zero-shot": ("Table 5, README", "Does what holds for perplexity hold for tasks?", zero_shot),
    "clip-sweep": ("asked by a reviewer", "Is it the rotation, or would a clip do?", clip_sweep),
    "symmetric-or-not": ("Eq. 5, released code", "Which quantizer to refine R1 with?", either_scheme),
    "variants": ("Alg. 1, released code", "Do its steps, the paper's and ours end alike?", variants),
    "massive-activations": ("Sun et al.", "How large, and are they needed?", massive_activations),
    "massive-magnitudes": ("Sun et al., Fig. 1", "Which token, which channel?", main.massive_magnitudes),
    "intervene": ("asked here", "Which tokens must be kept out?", keepout.intervene),
    **inside.EXPERIMENTS,
}  # by name, in the paper's order: what it reproduces, its question, what makes its table or a build's rows
WHOLE = {name for name, (*_, made) in EXPERIMENTS.items() if not inspect.isgeneratorfunction(made)}
"""The experiments that make a table; the others yield one build's rows, and are run for every build."""
