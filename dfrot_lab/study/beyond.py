"""Beyond the paper, as experiments: one build's rows each."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import shapes
from dfrot_lab.recipe import grids, registry
from dfrot_lab.recipe.specs import Recipe, StaticSpec, prefix_on
from dfrot_lab.study import main
from dfrot_lab.study.main import Row
from dfrot_lab.study.setting import Setting

NONE = "none"  # the option of a row without one
CACHE_BITS = (4, 3, 2)
PER_TOKEN, STATIC = "per token", "static"
MX = grids.BLOCK_FLOATS["mxfp4"]
ROTATED = ("RO", "DFRot", "Offset+")  # beside RH; what they are fitted by is a grid with a scale a token
KEPT = 4  # tokens of a window that block floats are shown without
KEPT_OUT = ("NR", "RH", "RO")  # rotations under which they are
GROUP = 128  # channels of a group at most: what group-wise papers and kernels have


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
    for name in setting.few(("RH", "Offset+")):
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
        if not setting.quick:
            yield Row(qep.with_(clips=setting.capture), {"option": "clips"}, {**against, "QEP": qep})


def kv_caches(setting: Setting, _store: Store) -> Iterator[Row]:
    """Quantizers of the KV cache, which alone is rounded, with R3 and without; each against full precision,
    against rounding per token with the same R3, and with R3 against without. R1 and R4 do not touch keys."""
    rh, names = setting.rotation("RH"), (grids.PER_TOKEN, *registry.CACHES)
    full = setting.row("16-16-16", rh)
    yield Row(full, {"cache": NONE, "option": NONE})
    for says, only in (("without R3", "R4"), ("R3", None)):  # rows that share a built model side by side
        for bits, name in product(setting.few(CACHE_BITS), names):
            cache: dict[str, Any] = grids.cache_of(name, bits, seed=rh.seed, **fitted(name, setting.window))
            own = setting.row(f"16-16-{bits}", rh, **cache, online=only)
            plain = own.with_(**grids.cache_of(grids.PER_TOKEN, bits))
            against = {"full precision": full} | ({} if own == plain else {"per token": plain})
            against |= {} if only else {"without R3": own.with_(online="R4")}
            yield Row(own, {"cache": name, "option": says}, against)


def fitted(name: str, window: int) -> dict[str, int]:
    """The fields of a KV quantizer that a window is too short for: a quarter of it, and no more, as float."""
    usual = registry.CACHES[name].fields if name in registry.CACHES else {}
    is_short = "residual" in usual and window < usual["residual"] + usual["group_size"]
    return {"residual": window // 4, "group_size": min(usual["group_size"], window // 4)} if is_short else {}


def static_activations(setting: Setting, _store: Store) -> Iterator[Row]:
    """What shares a scale in activations: a token, a group of its channels, a whole site (static). Each row
    against RH with the same, and against its own rotation with a scale a token."""
    for bits in setting.few(("16-4-16", "16-8-16")):
        of_rh = shared(setting, "RH", bits)
        for name in setting.few(("NR", "RO", "DFRot", "Offset+", "RH")):
            own = shared(setting, name, bits)
            for said in setting.few(list(own)):
                against = {} if name == "RH" else {"RH": of_rh[said]}
                against |= {} if said == PER_TOKEN else {PER_TOKEN: own[PER_TOKEN]}
                yield Row(own[said], {"acts": said}, against, once=name == "NR")


def shared(setting: Setting, name: str, bits: str) -> dict[str, Recipe]:
    """The recipes of a rotation by what shares a scale in their activations: static scales are found on the
    build's own sample of the calibration text."""
    plain = setting.row(bits, setting.method(name))
    act, size = plain.activations, group_of(setting)
    text = StaticSpec(corpus=setting.calibration_text, window=setting.window, sample=setting.build or None)
    groups = act.with_(granularity="per_group", group_size=size)
    return {
        PER_TOKEN: plain,
        f"groups of {size}": plain.with_(activations=groups),
        STATIC: plain.with_(activations=act.with_(granularity="static"), static=text),
    }


def block_floats(setting: Setting, _store: Store) -> Iterator[Row]:
    """Activations in 4-bit floats with a scale a block, beside 4-bit integers with a scale a token or the
    same blocks: does a rotation still help where a spike has few channels to hurt? Each row against NR; and
    NR, RH and RO with a window's most massive tokens kept out, each against the same quantized."""
    for said, grid in formats().items():
        plain = setting.row("16-4-16", setting.rotation("NR"), activations=grid)
        yield Row(plain, {"format": said})
        rh = setting.row("16-4-16", setting.rotation("RH"), activations=grid)
        others = [setting.row("16-4-16", setting.method(name), activations=grid) for name in ROTATED]
        rotated = setting.few([rh, in_blocks(rh), *others])
        for spec in rotated:
            yield Row(spec, {"format": said}, {"NR": plain})
        for spec in (each for each in (plain, *rotated) if each.rotation.name in KEPT_OUT):
            kept = spec.with_(keep_out="most_massive", keep_out_tokens=KEPT)
            yield Row(kept, {"format": said}, {"quantized": spec})


def formats() -> dict[str, grids.QuantSpec]:
    """The quantizers of `block_floats` by name."""
    blocks = grids.ACTIVATIONS.with_(granularity="per_group", group_size=MX)
    floats = {name: grids.of_scheme(name, 4) for name in grids.BLOCK_FLOATS}
    return {"int4, a token": grids.ACTIVATIONS, f"int4, blocks of {MX}": blocks, **floats}


def in_blocks(recipe: Recipe) -> Recipe:
    """The recipe of RH with R1 to R4 in blocks of MX channels: none mixes what has two scales."""
    rotation = recipe.rotation.with_(block=MX)
    return recipe.with_(rotation=rotation, head_block=MX, mlp_block=MX)


def group_of(setting: Setting) -> int:
    """The largest power of 2, up to GROUP, that divides the inputs of all of a model's linears."""
    widths = shapes.shape(setting.model).inputs
    return next(GROUP >> n for n in range(8) if all(width % (GROUP >> n) == 0 for width in widths))


def prefix(setting: Setting, _store: Store) -> Iterator[Row]:
    """PrefixQuant's prefix beside rotations, with a scale a token and static, at 16-4-16; and in full
    precision, which it changes, too. Divergences are from full precision without it, and again with it: rows
    that are compared have one reference. Each against RH and a scale a token with the same prefix."""
    whole = setting.row("16-16-16", setting.rotation("NR"))
    yield Row(whole, {"acts": NONE, "prefix": NONE})
    yield Row(with_prefix(setting, whole, "plain"), {"acts": NONE, "prefix": "plain"}, {"without": whole})
    for name in setting.few(("RO", "DFRot", "Offset+", "RH")):
        own, of_rh = shared(setting, name, "16-4-16"), shared(setting, "RH", "16-4-16")
        for said, to in product((PER_TOKEN, STATIC), (NONE, "plain", "prefix")):
            against = {} if name == "RH" else {"RH": with_prefix(setting, of_rh[said], to)}
            against |= {PER_TOKEN: with_prefix(setting, own[PER_TOKEN], to)} if said == STATIC else {}
            against |= {"without": own[said]} if to == "plain" else {}
            yield Row(with_prefix(setting, own[said], to), {"acts": said, "prefix": to}, against)


def with_prefix(setting: Setting, recipe: Recipe, reference: str) -> Recipe:
    """The recipe with a prefix found on the setting's calibration text; as it is, of the reference NONE."""
    if reference == NONE:
        return recipe
    return recipe.with_(prefix=prefix_on(setting.calibration_text, setting.window, reference=reference))
