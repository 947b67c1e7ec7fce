"""Beyond the paper, as experiments: one build's rows each."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.recipe import grids, registry
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.study import main
from dfrot_lab.study.main import Row
from dfrot_lab.study.setting import Setting

NONE = "none"  # the option of a row without one
CACHE_BITS = (4, 3, 2)


def offset(setting: Setting, _store: Store) -> Iterator[Row]:
    """R1 that points what rows share where the zero point takes it."""
    for bits in setting.few(main.BITS):
        rh, dfrot = (setting.row(bits, setting.method(name), weights="rtn") for name in ("RH", "DFRot"))
        yield Row(rh)
        yield Row(dfrot, {}, {"RH": rh})
        for name in ("Offset", "Offset+"):
            spec = setting.row(bits, setting.method(name), weights="rtn")
            yield Row(spec, {}, {"RH": rh, "DFRot": dfrot})


def free_options(setting: Setting, _store: Store) -> Iterator[Row]:
    """What else is free at inference, under three rotations: a clip ratio for each site, channel scales, a
    range that need not hold 0, all; each against RH without, against the rotation without, and against RH
    with the same."""
    of_rh = options(setting, "RH")
    for name in ("RH", "DFRot", "Offset+"):
        own = options(setting, name)
        for said in setting.few(list(own)):
            against = {} if own[said] == of_rh[NONE] else {"RH": of_rh[NONE]}
            against |= {} if said == NONE else {"without": own[NONE]}
            against |= {} if said == NONE or name == "RH" else {"RH with the same": of_rh[said]}
            yield Row(own[said], {"option": said}, against)


def options(setting: Setting, name: str) -> dict[str, Recipe]:
    """The recipes of a rotation at 16-4-16 with each free option, by its name."""
    plain = setting.row("16-4-16", setting.method(name))
    clips, scales = {"clips": setting.capture}, {"scales": setting.capture}
    free = {"activations": plain.activations.with_(scheme="free")}
    found: dict[str, dict[str, Any]] = {NONE: {}, "clips": clips, "scales": scales, "free range": free}
    found["all"] = clips | scales | free
    return {said: plain.with_(**fields) for said, fields in found.items()}


def better_weights(setting: Setting, _store: Store) -> Iterator[Row]:
    """Weight quantizers that know what their inputs have lost, under RH and Offset+ at 4-4-16."""
    rh = setting.row("4-4-16", setting.method("RH"), weights="gptq")
    for name in ("RH", "Offset+"):
        gptq, gptaq, qep, foem = (
            setting.row("4-4-16", setting.method(name), weights=by) for by in ("gptq", "gptaq", "qep", "foem")
        )
        against = {"RH": rh, "GPTQ": gptq}
        yield Row(gptq, {"option": NONE}, {} if name == "RH" else {"RH": rh})
        if name != "RH":
            rounded = gptq.with_(weights=gptq.weights.with_(rounded=True))
            yield Row(rounded, {"option": "rounded inputs"}, against)
            yield Row(gptaq, {"option": NONE}, against)
            yield Row(foem, {"option": NONE}, against)
        yield Row(qep, {"option": NONE}, against)
        clipped = qep.with_(clips=setting.capture)
        yield Row(clipped, {"option": "clips"}, {**against, "QEP": qep})


def kv_caches(setting: Setting, _store: Store) -> Iterator[Row]:
    """Quantizers of the KV cache, which alone is rounded, with R3 and without; each against full precision,
    against rounding per token with the same R3, and with R3 against without. R1 and R4 do not touch keys."""
    rh, names = setting.rotation("RH"), (grids.PER_TOKEN, *registry.CACHES)
    full = setting.row("16-16-16", rh)
    yield Row(full, {"cache": NONE, "option": NONE})
    for says, only in (("without R3", "R4"), ("R3", None)):  # rows that share a built model side by side
        for bits, name in product(setting.few(CACHE_BITS), names):
            cache: dict[str, Any] = grids.cache_of(name, bits, seed=rh.seed)
            own = setting.row(f"16-16-{bits}", rh, **cache, online=only)
            plain = own.with_(**grids.cache_of(grids.PER_TOKEN, bits))
            against = {"full precision": full} | ({} if own == plain else {"per token": plain})
            against |= {} if only else {"without R3": own.with_(online="R4")}
            yield Row(own, {"cache": name, "option": says}, against)
