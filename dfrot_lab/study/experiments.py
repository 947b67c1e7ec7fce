"""The paper's tables and figures, and what its reviewers asked for, as experiments: a tidy table each."""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import pandas as pd

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths.tables import whole
from dfrot_lab.model import corpus
from dfrot_lab.observe import massive, residual
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe import specs
from dfrot_lab.rotate import dfrot, steps
from dfrot_lab.score import perplexity, rows, zeroshot
from dfrot_lab.study import main
from dfrot_lab.study.main import Row, evaluated, named
from dfrot_lab.study.setting import Setting

log = logging.getLogger(__name__)

GAMMAS = (1.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, float("inf"))  # the paper's, Fig. 5 and 6
CLIPS = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
ROW_COUNTS = (48, 32, 24, 16, 8)  # Table 3, in windows; a model of n layers has 2n: more is left out
SAMPLES, KEPT, BITS = 5, (1, 4, 16, 64), ("16-4-16", "4-4-16")
SHARE = "share of RO - RH closed"
CALIBRATED = "perplexity of the calibration text"
CHOSEN = "perplexity at the clip chosen on the calibration text"


def run(name: str, setting: Setting | None = None, store: Store | None = None) -> pd.DataFrame:
    """The table of an experiment, from the store where it has the rows, else computed now. KeyError."""
    if name not in EXPERIMENTS:
        raise KeyError(f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    setting, store = setting_of(name, (setting or Setting.of_profile()).resolved()), store or Store()
    log.info("experiment %s: model %s, corpus %s", name, *named(setting).values())
    made = EXPERIMENTS[name][-1](setting, store)
    return made if isinstance(made, pd.DataFrame) else evaluated(list(made), store)[0]


def setting_of(name: str, setting: Setting) -> Setting:
    """The setting an experiment runs on: the paper's rule; the main job and `compare` keep the setting's."""
    return setting if name in ("main", "compare") else setting.with_(rule=specs.PAPER_RULE)


def listing() -> pd.DataFrame:
    """The experiments: name, what it reproduces, its question."""
    about = [(name, *said[:2]) for name, said in EXPERIMENTS.items()]
    return pd.DataFrame(about, columns=["name", "reproduces", "question"])


def _trimmed(values: Sequence[Any], setting: Setting) -> list[Any]:
    """All values; in the quick profile the first and the last of many, the first of two."""
    few = values[:: len(values) - 1] if len(values) > 2 else values[:1]
    return list(few if setting.quick else values)


def keep_out(setting: Setting, store: Store) -> pd.DataFrame:
    """Table 1: RO and RH with massive tokens quantized or kept out; the share of RO - RH that this closes."""
    asked, settings = [Row(setting.row("16-16-16", setting.rotation("NR")))], ("4-4-16", "4-4-4", "4-8-16")
    for offset, kind, bits in product(range(setting.seeds), ("RH", "RO"), settings):
        plain, rh = (setting.row(bits, setting.rotation(each, offset)) for each in (kind, "RH"))
        asked.append(Row(plain, against={"RH": rh} if kind == "RO" else {}))
        asked.append(Row(plain.with_(keep_out=specs.RELEASED_KEEP_OUT), against={kind: plain}))
    asked += [Row(setting.row(bits, setting.rotation("NR"))) for bits in settings]
    (table, found), shares = evaluated(asked, store), list[dict[str, Any]]()
    for offset, bits in product(range(setting.seeds), settings):
        ro, rh = (setting.row(bits, setting.rotation(kind, offset)) for kind in ("RO", "RH"))
        shares += closed_shares(found, ro, rh, keep_out=specs.RELEASED_KEEP_OUT)
    return whole(pd.concat([table, pd.DataFrame(shares)], ignore_index=True))


def closed_shares(
    found: main.Found, ro: specs.Recipe, rh: specs.Recipe, **kept: Any
) -> Iterator[dict[str, Any]]:
    """The row of the share of RO - RH that is gone with the fields `kept`; of a gap that may be 0, none."""
    low, high = perplexity.paired_difference(found[ro], found[rh])[1]
    if low > 0 or high < 0:  # nor of one window, which has no interval
        four = [found[spec] for spec in (ro, ro.with_(**kept), rh, rh.with_(**kept))]
        yield rows.statistic_row(four[1], SHARE, *perplexity.statistic(perplexity.closed_share, four))


def main_table(setting: Setting, store: Store) -> Iterator[Row]:
    """Table 2 and the README's: NR, RO, RH and DFRot by RTN and GPTQ, with the minutes beyond RH."""
    yield Row(setting.row("16-16-16", setting.rotation("NR")), {"extra_minutes": 0.0})
    minutes = dfrot.refined(setting.refine, store).seconds / 60
    for name, by, bits in product(("NR", "RO", "RH", "DFRot"), ("rtn", "gptq"), ("4-4-4", "4-4-16")):
        spec, rh = (setting.row(bits, setting.method(each), weights=by) for each in (name, "RH"))
        extra = {"extra_minutes": minutes if name == "DFRot" else 0.0}
        yield Row(spec, extra, {} if name == "RH" else {"RH": rh})


def gamma_sweep(setting: Setting, store: Store) -> Iterator[Row]:
    """Fig. 5 and 6: perplexity against gamma, from RH and RO, beside QuaRot and its FP16() of that start: the
    paper's QuaRot, with asymmetric activations, clip 1 and no Hadamard at o_proj online (QuaRot's: symmetric,
    clip 0.9, one across heads)."""
    some = massive.find(capture(setting.capture, store), setting.rule).any()
    gammas = [gamma for gamma in GAMMAS if some or gamma < float("inf")]  # no massive row to fit alone
    for bits, seeds in _trimmed((("16-4-16", setting.seeds), ("4-4-16", 1)), setting):
        for offset, kind in product(range(seeds), ("RH", "RO")):
            start = setting.rotation(kind, offset)
            plain = setting.row(bits, start)
            yield Row(plain, {"init": kind, "line": "QuaRot"})
            others = [("QuaRot.FP16()", plain.with_(keep_out=specs.RELEASED_KEEP_OUT))]
            refined = [setting.refine.with_(init=start, gamma=gamma) for gamma in _trimmed(gammas, setting)]
            others += [("DFRot", setting.row(bits, spec)) for spec in refined]
            yield from (Row(spec, {"init": kind, "line": line}, {"QuaRot": plain}) for line, spec in others)


def calibration(setting: Setting, store: Store) -> Iterator[Row]:
    """Table 3: five samples, five row counts; refined on one text and tested on another, and the reverse."""
    ways: list[tuple[str, str, Setting, dict[str, Any]]] = []
    for skip in _trimmed(range(SAMPLES), setting):
        ways.append(("sample", str(skip), setting, {"capture": setting.capture.with_(skip=skip)}))
    sites = len(capture(setting.capture, store).sites)
    for count in _trimmed([count for count in ROW_COUNTS if count <= sites], setting):
        ways.append(("rows", f"{count} x {setting.window}", setting, {"rows": count * setting.window}))
    texts = _texts(setting)
    for fitted, tested in product(texts, texts) if len(texts) > 1 else ():
        own = setting.capture.with_(corpus=specs.CorpusSpec(name=fitted, split="calibration"))
        ways.append(("text", f"{fitted} -> {tested}", setting.with_(corpus=tested), {"capture": own}))
    # the paper's is 4-4-16; the other shows what the rotation does without the noise of GPTQ
    for bits, (varied, level, where, changes) in product(_trimmed(BITS, setting), ways):
        plain = where.row(bits, where.rotation("RH"))
        yield Row(plain, {"varied": "none", "level": f"RH on {named(where)['corpus']}"})
        spec = where.row(bits, setting.refine.with_(**changes))
        yield Row(spec, {"varied": varied, "level": level}, {"RH": plain})


def _texts(setting: Setting) -> list[str]:
    """The texts to exchange: WikiText-2 and the packaged sample where both can be had, else the setting's."""
    if setting.quick or corpus.resolve(specs.CorpusSpec(name="auto")).name != "wikitext2":
        log.info("testing on another text is left out: it needs WikiText-2 (and the full profile)")
        return [setting.corpus]
    return ["wikitext2", "wikipedia-sample"]


def clip_sweep(setting: Setting, store: Store) -> pd.DataFrame:
    """The activation clip ratio under RO, RH and DFRot, refined with the same clip, on the scored text and on
    the calibration text; and what each rotation scores at the clip that is best on the latter."""
    told = list(_clipped(setting))
    pairs = [(row, Row(row.spec.with_(corpus=setting.calibration_text), row.labels)) for row in told]
    table, found = evaluated([row for pair in pairs for row in pair], store)
    calibrated = [found[chosen_by.spec].key for _, chosen_by in pairs]
    table.loc[table["key"].isin(calibrated), "metric"] = CALIBRATED
    lines = list[dict[str, Any]]()
    for name in dict.fromkeys(row.spec.rotation.name for row in told):
        own = [pair for pair in pairs if pair[0].spec.rotation.name == name]
        best = min(own, key=lambda pair: found[pair[1].spec].perplexity)[0]
        result = found[best.spec]
        lines.append({**best.labels, **rows.statistic_row(result, CHOSEN, result.perplexity, result.ci95)})
    return whole(pd.concat([table, pd.DataFrame(lines)], ignore_index=True))


def _clipped(setting: Setting) -> Iterator[Row]:
    """A row a rotation and clip, against the rotation without one."""
    for name, clip in product(("RO", "RH", "DFRot"), _trimmed(CLIPS, setting)):
        unclipped = setting.row("16-4-16", setting.method(name))
        quantizer = unclipped.activations.with_(clip_ratio=clip)
        rotation = unclipped.rotation.with_(quantizer=quantizer) if name == "DFRot" else unclipped.rotation
        spec = unclipped.with_(activations=quantizer, rotation=rotation)
        yield Row(spec, {"clip": clip}, {} if clip == 1 else {"clip 1": unclipped})


def either_scheme(setting: Setting, _store: Store) -> Iterator[Row]:
    """Refine and evaluate with either quantizer; refine with and without the released code's sign flips."""
    schemes = ("asymmetric", "symmetric")
    for tested in schemes:
        quantizer = specs.QuantSpec(scheme=tested)
        rh = setting.row("16-4-16", setting.rotation("RH"), activations=quantizer)
        yield Row(rh, {"refined_with": "not refined", "sign_flips": False, "tested_with": tested})
        for fitted, flips in product(schemes, (False, True)):
            variant = "as_released" if flips else "as_paper"
            spec = setting.refine.with_(quantizer=specs.QuantSpec(scheme=fitted), variant=variant)
            labels = {"refined_with": fitted, "sign_flips": flips, "tested_with": tested}
            yield Row(rh.with_(rotation=spec), labels, {"RH": rh})


def variants(setting: Setting, store: Store) -> pd.DataFrame:
    """The refinement as released, as in the paper and as here: losses under one quantizer, perplexity."""
    fits, asked = {}, []
    for offset, name in product(range(setting.seeds), ("as_released", "as_paper", "accelerated")):
        quantizer = specs.QuantSpec(scheme="symmetric" if name == "as_released" else "asymmetric")
        own = {"init": setting.rotation("RH", offset), "variant": name, "quantizer": quantizer}
        fits[name, offset] = setting.refine.with_(**own)
    for bits, ((name, offset), spec) in product(_trimmed(BITS, setting), fits.items()):
        rh = setting.row(bits, setting.rotation("RH", offset))
        asked.append(Row(rh, {"variant": "not refined"}))
        asked.append(Row(setting.row(bits, spec), {"variant": name}, {"RH": rh}))
    losses = [line for (name, _), spec in fits.items() for line in _final_losses(name, spec, setting, store)]
    return whole(pd.concat([evaluated(asked, store)[0], pd.DataFrame(losses)], ignore_index=True))


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


def intervene(setting: Setting, store: Store) -> pd.DataFrame:
    """Which tokens matter: k tokens a window kept out, by size, by error or at random, under RO and RH."""
    asked, counts = [], list(product(specs.KEEP_OUT_COUNTS, _trimmed(KEPT, setting)))
    for kind in ("RO", "RH"):
        plain = setting.row("16-4-16", setting.rotation(kind))
        asked.append(Row(plain, {"chosen": "none", "k": 0}))
        for chosen, k in [(specs.RELEASED_KEEP_OUT, None), *counts]:
            labels = {"chosen": chosen if k else f"rule {chosen}", "k": k}
            asked.append(Row(plain.with_(keep_out=chosen, keep_out_tokens=k), labels, {kind: plain}))
    return evaluated(asked, store)[0].astype({"k": "Int64"})


def massive_activations(setting: Setting, store: Store) -> pd.DataFrame:
    """Sun et al.: massive values set to zero, or to their mean; the residual stream by layer."""
    plain = setting.row("16-16-16", setting.rotation("NR"))
    set_to = [Row(plain.with_(set_massive=to), against={"left alone": plain}) for to in ("zero", "mean")]
    table = evaluated([Row(plain), *set_to], store)[0].fillna({"set_massive": "left alone"})
    return whole(pd.concat([table, residual.residual_profile(setting.capture, store)], ignore_index=True))


def zero_shot(setting: Setting, store: Store) -> pd.DataFrame:
    """Table 5 and the README's: six tasks by lm-eval; plain, NR, RH in full, RO, RH, DFRot at 4 bits."""
    named: dict[str, specs.Recipe | None] = {"plain transformers": None}
    quantized = ("4-4-16",) if setting.quick else ("4-4-16", "4-4-4")
    for bits, name in [*product(["16-16-16"], ("NR", "RH")), *product(quantized, ("RO", "RH", "DFRot"))]:
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
    "keep-out": ("Table 1", "Do massive tokens explain the gap between RO and RH?", keep_out),
    "main-table": ("Table 2, README", "What is each rotation worth, by RTN and GPTQ?", main_table),
    "calibration": ("Table 3", "Does it matter what R1 is refined on?", calibration),
    "zero-shot": ("Table 5, README", "Does what holds for perplexity hold for tasks?", zero_shot),
    "clip-sweep": ("asked by a reviewer", "Is it the rotation, or would a clip do?", clip_sweep),
    "symmetric-or-not": ("Eq. 5, released code", "Which quantizer to refine R1 with?", either_scheme),
    "variants": ("Alg. 1, released code", "Do its steps, the paper's and ours end alike?", variants),
    "massive-activations": ("Sun et al.", "How large, and are they needed?", massive_activations),
    "massive-magnitudes": ("Sun et al., Fig. 1", "Which token, which channel?", main.massive_magnitudes),
    "intervene": ("asked here", "Which tokens must be kept out?", intervene),
}  # by name, in the paper's order: what it reproduces, its question, what makes its rows
