"""Every rotation, free extra and weight quantizer under one pipeline: the same model, text, windows and
grids, a verdict against RH. Groups are never mixed: what is compared costs the same when the model runs."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import tables
from dfrot_lab.model import shapes
from dfrot_lab.model.public import public
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.rotate import proxy
from dfrot_lab.study import fits
from dfrot_lab.study.beyond import NONE, options
from dfrot_lab.study.main import Evaluated, Found, Row, evaluated, found_of, rows_by_build, table_of
from dfrot_lab.study.setting import Setting

BITS = ("16-4-16", "4-4-16")
FEW_BITS = ("3-16-16", "2-16-16")
GROUP = 64  # inputs that share a scale, or their largest common divisor with it
UNROTATED = ("NR", "SmoothQuant", "AWQ", "OS+")
ONLINE = ("DuQuant", "FlatQuant")  # act before every linear: more work than any fused R1, as is said
PUBLISHED = {"SpinQuant": (5.9, 7.3), "OSTQuant R1": (5.91, 7.29), "DartQuant": (5.93, 7.43)}
"""Perplexity of WikiText-2 at 4-4-4 on LLaMA-2-7B and LLaMA-3-8B (full precision 5.47 and 6.14) as published,
each by a pipeline of its own (other weight groups, clips, what is learned beside R1), so they cannot be
ranked; SpinQuant's was not found again by its own release (8.0 in place of 7.3)."""
COLUMNS = ("published LLaMA-2-7B", "published LLaMA-3-8B")
EVEN = "all rows alike"  # beside a method that weighs massive rows more: the same without that
FITTED = ("DFRot", "Offset", "Offset+")  # the paper's and this lab's, in seconds or minutes
FITTED_THERE = "fitted there"  # beside one that was fitted on another text: the same, on the one it meets
FIT = "fit, s"  # seconds in which a rotation was found
PEAK = "peak, GB"  # of memory
ONLINE_OPS = "online, %"  # of the linears' products


def alone(
    setting: Setting, bits: str, names: Callable[[], Sequence[str]], whole: bool = False
) -> Iterator[tuple[str, Recipe]]:
    """Each rotation with nothing beside it; `whole`: in the quick profile all of them, too, and not a few."""
    for name in names() if whole else setting.few(names()):
        yield NONE, setting.row(bits, setting.method(name))


def fused() -> list[str]:
    """The names of all that make one fused R1, with R2 to R4 Hadamard: no cost at inference beyond RH's."""
    return [name for name in registry.rows() if name not in (*UNROTATED, *ONLINE)]


def extras(setting: Setting) -> Iterator[tuple[str, Recipe]]:
    """A fused R1 with what else costs nothing when the model runs."""
    for name in ("RH", "DFRot", "Offset+"):
        yield from setting.few(
            [(said, spec) for said, spec in options(setting, name).items() if said != NONE]
        )


def weights(setting: Setting) -> Iterator[tuple[str, Recipe]]:
    """Weights of 4 bits by every quantizer, under RH and under the best R1 of this lab."""
    for name in ("RH", "Offset+"):
        for by in setting.few(list(registry.WEIGHTS)):
            yield NONE, setting.row(BITS[1], setting.method(name), weights=by)


def few_bits(setting: Setting) -> Iterator[tuple[str, Recipe]]:
    """Weights alone, of 3 and 2 bits: what incoherence was made for (QuIP's LDLQ is GPTQ, its basis for the
    inputs RH); with a scale for each group of inputs too."""
    for bits in setting.few(FEW_BITS):
        for name in ("NR", "RH", "Offset+"):
            for by in ("rtn", "gptq"):
                yield NONE, setting.row(bits, setting.method(name), weights=by)
        spec = setting.row(bits, setting.method("RH"), weights="gptq")
        size = math.gcd(GROUP, *shapes.shape(setting.model).inputs)
        grid = spec.weights.quantizer.with_(granularity="per_group", group_size=size)
        yield f"groups of {size}", spec.with_(weights=spec.weights.with_(quantizer=grid))


Group = Callable[[Setting], Iterator[tuple[str, Recipe]]]
FLOAT_WEIGHTS: dict[str, Group] = {
    "fused R1": partial(alone, bits=BITS[0], names=fused, whole=True), "free extras": extras,
    "no rotation": partial(alone, bits=BITS[0], names=lambda: UNROTATED),
    "online": partial(alone, bits=BITS[0], names=lambda: ONLINE),
}  # fmt: skip
LOW_BIT_WEIGHTS: dict[str, Group] = {
    "fused R1, 4-bit weights": partial(alone, bits=BITS[1], names=fused),
    "no rotation, 4-bit weights": partial(alone, bits=BITS[1], names=lambda: UNROTATED),
    "online, 4-bit weights": partial(alone, bits=BITS[1], names=lambda: ONLINE),
    "weight quantizers": weights, "few-bit weights": few_bits,
}  # fmt: skip
GROUPS = FLOAT_WEIGHTS | LOW_BIT_WEIGHTS


def rows(group: str, setting: Setting) -> Iterator[Row]:
    """One build's rows of a group, each against RH at its bits, weights by the setting, and one whose massive
    rows weigh more against the same without that; RH itself first."""
    seen = set[str]()
    for option, spec in GROUPS[group](setting):
        rh = setting.row(spec.bits, setting.rotation("RH"))
        if spec.bits not in seen:
            yield Row(rh, {"group": group, "option": NONE})
            seen.add(spec.bits)
        against = {"RH": rh}
        if (plain := spec.rotation.name.removesuffix(proxy.MASSIVE)) != spec.rotation.name:
            against[EVEN] = spec.with_(rotation=setting.method(plain))
        if spec != rh:
            yield Row(spec, {"group": group, "option": option}, against)


def transfer(setting: Setting, _store: Store) -> Iterator[Row]:
    """Each R1 that looks at a text, fitted on the setting's and scored on that and on the others: against RH,
    and FITTED against the same fitted on the text that is scored."""
    names = [name for name in fused() if "capture" in type(setting.method(name)).model_fields]
    for text in dict.fromkeys([setting.corpus, *setting.texts()]):
        there = setting.with_(corpus=text)
        rh = there.row(BITS[0], setting.rotation("RH"))
        yield Row(rh, {"fitted": NONE})
        for name in setting.few(names):
            spec, own = (there.row(BITS[0], each.method(name)) for each in (setting, there))
            is_other = name in FITTED and own != spec
            beside = {FITTED_THERE: own} if is_other else {}
            yield Row(spec, {"fitted": public(setting.calibration_text).name}, {"RH": rh, **beside})
            if is_other:
                yield Row(own, {"fitted": public(there.calibration_text).name}, {"RH": rh})


def leaderboard(setting: Setting, store: Store, groups: Sequence[str] = tuple(GROUPS)) -> pd.DataFrame:
    """The table of some groups: a results table with the group, the option, what the first build's rotation
    took to be found (`fits`), what it costs `ONLINE_OPS` and published numbers."""
    asked = [partial(rows, group) for group in groups]
    recipes = _rotations(asked, setting.with_(build=0))
    found = fits.costs(recipes, store)
    table = pd.concat([evaluated(asks, setting, store)[0] for asks in asked], ignore_index=True)
    return _about(table, recipes, found)


def stored(setting: Setting, store: Store) -> Evaluated:
    """The table of what is stored, of each row the builds that are there, and the evaluations behind it;
    computes nothing."""
    asked = [partial(rows, group) for group in GROUPS]
    parts, found = list[pd.DataFrame](), Found()
    for by_build in (rows_by_build(asks, setting) for asks in asked):
        own = found_of(by_build, store)
        found |= own
        parts.append(table_of(by_build, own))
    specs = _rotations(asked, setting.with_(build=0))
    known = {spec.rotation.name: fits.stored(spec, store) for spec in specs}
    table = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    return _about(table, specs, {name: fit for name, fit in known.items() if fit}), found


def _about(table: pd.DataFrame, recipes: Sequence[Recipe], found: Mapping[str, fits.Fit]) -> pd.DataFrame:
    """`table` with what each rotation takes to be found, what it costs online, and what is published."""
    about: dict[str, dict[str, Any]] = {
        FIT: {name: fit.seconds for name, fit in found.items()},
        PEAK: {name: fit.peak / 1e9 for name, fit in found.items()},
        "needs": {recipe.rotation.name: fits.needs_of(recipe) for recipe in recipes},
        ONLINE_OPS: {recipe.rotation.name: online_share(recipe) for recipe in recipes},
    }
    for place, column in enumerate(COLUMNS):
        about[column] = {name: pair[place] for name, pair in PUBLISHED.items()}
    return table.assign(**{column: table["rotation"].map(of) for column, of in about.items()})


def online_share(recipe: Recipe) -> float:
    """The products that a recipe's rotation takes before the linears while the model runs, beside R3 and R4,
    in % of the linears' own, for one token; of experts those that a token passes."""
    products = getattr(registry.load(registry.METHODS, recipe.rotation.method), "products", None)
    if products is None:
        return 0.0
    shape = shapes.shape(recipe.model)
    times = zip(shape.inputs, (1, 1, 1, shape.active), strict=True)
    taken = shape.layers * sum(count * products(recipe.rotation, into) for into, count in times)
    return float(100 * taken / shape.active_weights)


def _rotations(asked: Sequence[Callable[[Setting], Iterator[Row]]], setting: Setting) -> list[Recipe]:
    """A recipe for each rotation of the rows, at the same bits whichever they have."""
    names = dict.fromkeys(row.spec.rotation.name for asks in asked for row in asks(setting))
    return [setting.row(BITS[0], setting.method(name)) for name in names]


def ranked(table: pd.DataFrame) -> pd.DataFrame:
    """A line a row of the table, best first within group and bits: KL divergence, perplexity, and the
    change against RH with its interval and verdict; the first build's recipe by its key."""
    keys = ["group", "bits", "rotation", "weights", "option"]
    lines = []
    for place, own in table.fillna({"weights": "none"}).groupby(keys, sort=False):
        by = own.set_index("metric")
        line = dict(zip(keys, place, strict=True))
        for metric in ("KL divergence", "perplexity"):
            line[metric] = by.loc[metric, "value"] if metric in by.index else float("nan")
        line |= {"change, %": float("nan"), "interval": None, "verdict": None}
        if (change := tables.change("RH")) in by.index:
            found: Any = by.loc[change]
            line |= {"change, %": found["value"], "interval": found["ci95"], "verdict": found["verdict"]}
        line |= {
            name: own[name].iloc[0] for name in ("builds", FIT, PEAK, "needs", ONLINE_OPS, *COLUMNS, "recipe")
        }
        lines.append(line)
    ranks = pd.DataFrame(lines)
    return ranks.sort_values(["group", "bits", "KL divergence"], key=_in_order, ignore_index=True)


def _in_order(column: pd.Series) -> pd.Series:
    return column.map(list(GROUPS).index) if column.name == "group" else column


EXPERIMENTS: dict[str, tuple[str, str, Callable[[Setting, Store], pd.DataFrame]]] = {
    "leaderboard": (
        "rivals",
        "Which rotation of activations is best, and what does it cost?",
        partial(leaderboard, groups=tuple(FLOAT_WEIGHTS)),
    ),
    "leaderboard-weights": (
        "rivals",
        "And with weights of 4 bits and fewer?",
        partial(leaderboard, groups=tuple(LOW_BIT_WEIGHTS)),
    ),
}
"""The two halves of it as experiments: the second, with its calibrated weights, takes many times as long."""
