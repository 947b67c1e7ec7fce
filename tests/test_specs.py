"""Specs say what is wrong with them, never change, and are named by their content in every process."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from dfrot_lab.recipe import grids, registry, specs
from dfrot_lab.recipe.base import MethodSpec, Spec, content_key
from dfrot_lab.recipe.grids import ACTIVATIONS, GRANULARITIES, KV_CACHE, SCHEMES, QuantSpec
from dfrot_lab.recipe.specs import (
    KEEP_OUT_COUNTS,
    MASSIVE_RULES,
    ONLINE,
    REFINE_VARIANTS,
    ROW_RULES,
    CaptureSpec,
    CorpusSpec,
    ModelSpec,
    PrefixSpec,
    Recipe,
    RefineSpec,
    RotationSpec,
    StaticSpec,
    WeightSpec,
    recipe_of,
)

SPECS = (
    ModelSpec,
    CorpusSpec,
    RotationSpec,
    QuantSpec,
    CaptureSpec,
    RefineSpec,
    WeightSpec,
    StaticSpec,
    PrefixSpec,
    Recipe,
)

SYMMETRIC, ASYMMETRIC = QuantSpec(), QuantSpec(scheme="asymmetric")
NOTHING = QuantSpec(bits=16)
PER_HEAD = QuantSpec(granularity="per_group")
KIVI_LIKE = QuantSpec(scheme="free", granularity="per_group", group_size=32, method="kivi", residual=128)
STATIC = {"activations": QuantSpec(granularity="static"), "static": StaticSpec()}
UNROTATED = RotationSpec(kind="NR")
HEADS = {"granularity": "per_group"}
COUNTED = "a number with keep_out most_massive, worst, random, and None with any other"

BAD = [
    (ModelSpec, {"source": "  "}, "source", "a packaged name"),
    (ModelSpec, {"dtype": "int4"}, "dtype", "one of auto, float32, float64, bfloat16, float16"),
    (CorpusSpec, {"name": ""}, "name", "auto, wikitext2, wikipedia-sample or a text file"),
    (CorpusSpec, {"split": "dev"}, "split", "one of calibration, evaluation, train, valid, test"),
    (RotationSpec, {"kind": "HR"}, "kind", "one of NR, RO, RH, RHT2, GSR, file"),
    (RotationSpec, {"seed": -1}, "seed", "a whole number in 0..2^63"),
    (RotationSpec, {"block": 0}, "block", "None or a whole number >= 1"),
    (RotationSpec, {"kind": "file"}, "path", "given for kind 'file' and for no other"),
    (RotationSpec, {"path": "R1.safetensors"}, "path", "given for kind 'file' and for no other"),
    (QuantSpec, {"bits": 1}, "bits", "a whole number in 2..16"),
    (QuantSpec, {"bits": 17}, "bits", "a whole number in 2..16"),
    (QuantSpec, {"bits": 4.5}, "bits", "a whole number in 2..16"),
    (QuantSpec, {"clip_ratio": 0.0}, "clip_ratio", "in (0, 1]"),
    (QuantSpec, {"clip_ratio": 1.5}, "clip_ratio", "in (0, 1]"),
    (QuantSpec, {"clip_ratio": math.nan}, "clip_ratio", "in (0, 1]"),
    (QuantSpec, {"scheme": "no"}, "scheme", "one of symmetric, asymmetric, free"),
    (QuantSpec, {"granularity": "per_row"}, "granularity", f"one of {', '.join(GRANULARITIES)}"),
    (QuantSpec, {"group_size": 32}, "group_size", "a whole number >= 1, with granularity per_group"),
    (QuantSpec, {"group_size": 0, "granularity": "per_group"}, "group_size", "a whole number >= 1"),
    (QuantSpec, {"group_size": 2.5, "granularity": "per_group"}, "group_size", "a whole number >= 1"),
    (QuantSpec, {"method": "kvquant"}, "method", "None or one of kivi, qjl, turboquant"),
    (QuantSpec, {"method": "qjl", "granularity": "per_token"}, "granularity", "'per_group' with method qjl"),
    (QuantSpec, {"method": "kivi", "scheme": "symmetric", **HEADS}, "scheme", "'free' with method kivi"),
    (QuantSpec, {"method": "qjl", "clip_ratio": 0.9, **HEADS}, "clip_ratio", "1 with method qjl"),
    (QuantSpec, {"method": "qjl", **HEADS}, "seed", "given with method qjl"),
    (QuantSpec, {"method": "qjl", "seed": -1, **HEADS}, "seed", "None or a whole number in 0..2^63"),
    (
        QuantSpec,
        {"method": "qjl", "seed": 0, "group_size": 32, **HEADS},
        "group_size",
        "None with method qjl",
    ),
    (
        QuantSpec,
        {"method": "kivi", "scheme": "free", "residual": 1, **HEADS},
        "group_size",
        "given with method",
    ),
    (QuantSpec, {"method": "kivi", "scheme": "free", "group_size": 8, **HEADS}, "residual", "given with"),
    (
        QuantSpec,
        {"method": "turboquant", "seed": 0, "residual": 1, **HEADS},
        "residual",
        "None with method tu",
    ),
    (QuantSpec, {"residual": 128}, "residual", "None with method None"),
    (QuantSpec, {"seed": 0}, "seed", "None with method None"),
    (CaptureSpec, {"tokens": 0}, "tokens", "a whole number >= 1"),
    (CaptureSpec, {"tokens": -2048}, "tokens", "a whole number >= 1"),
    (CaptureSpec, {"skip": -1}, "skip", "a whole number >= 0"),
    (CaptureSpec, {"skip": 0.5}, "skip", "a whole number >= 0"),
    (CaptureSpec, {"sample": -1}, "sample", "None or a whole number >= 0"),
    (CaptureSpec, {"skip": 1, "sample": 0}, "skip", "0 with a sample, which says where"),
    (RefineSpec, {"gamma": 0.0}, "gamma", "> 0"),
    (RefineSpec, {"gamma": -3}, "gamma", "> 0"),
    (RefineSpec, {"gamma": math.nan}, "gamma", "> 0"),
    (RefineSpec, {"gamma": 1e9}, "gamma", "below 1e9, or inf"),
    (
        RefineSpec,
        {"rule": "moon"},
        "rule",
        "one of ratio_8, ratio_64, sun, nr_error_8.5, nr_error_9.5, ro_vs_nr",
    ),
    (RefineSpec, {"steps": 0}, "steps", "a whole number >= 1"),
    (RefineSpec, {"variant": "as_told"}, "variant", "one of accelerated, guarded, as_paper, as_released"),
    (RefineSpec, {"quantizer": NOTHING}, "quantizer", "per_token, of fewer than 16 bits"),
    (RefineSpec, {"quantizer": PER_HEAD}, "quantizer", "per_token, of fewer than 16 bits"),
    (RefineSpec, {"quantizer": QuantSpec(granularity="per_channel")}, "quantizer", "per_token"),
    (RefineSpec, {"rows": 0}, "rows", "None or a whole number >= 1"),
    (RefineSpec, {"rows": -8}, "rows", "None or a whole number >= 1"),
    (
        RefineSpec,
        {"quantizer": SYMMETRIC, "variant": "as_released", "gamma": math.inf},
        "gamma",
        "finite with variant as_released",
    ),
    (WeightSpec, {"method": "awq"}, "method", "one of rtn, gptq, gptaq, qep, foem, lwc, rsq, aespa"),
    (WeightSpec, {"damping": 0.0}, "damping", "> 0"),
    (WeightSpec, {"correction": 1.5}, "correction", "None or in [0, 1]"),
    (WeightSpec, {"windows": 0}, "windows", "a whole number >= 1"),
    (WeightSpec, {"window": 1}, "window", "a whole number >= 2"),
    (WeightSpec, {"sample": -1}, "sample", "None or a whole number >= 0"),
    (
        WeightSpec,
        {"quantizer": SYMMETRIC},
        "quantizer",
        "symmetric, and per_channel or per_group with a group_size",
    ),
    (
        WeightSpec,
        {"quantizer": QuantSpec(granularity="per_channel", scheme="asymmetric")},
        "quantizer",
        "symmetric, and per_channel or per_group with a group_size",
    ),
    (Recipe, {"sample": -1}, "sample", "None or a whole number >= 0"),
    (Recipe, {"jitter": 0.5}, "jitter", "None or a whole number >= 0"),
    (Recipe, {"windows": 0}, "windows", "a whole number >= 1"),
    (Recipe, {"window": 1}, "window", "a whole number >= 2"),
    (Recipe, {"jitter": -1}, "jitter", "None or a whole number >= 0"),
    (StaticSpec, {"windows": 0}, "windows", "a whole number >= 1"),
    (StaticSpec, {"window": 1}, "window", "a whole number >= 2"),
    (StaticSpec, {"sample": -1}, "sample", "None or a whole number >= 0"),
    (PrefixSpec, {"windows": 0}, "windows", "a whole number >= 1"),
    (PrefixSpec, {"window": 1}, "window", "a whole number >= 2"),
    (PrefixSpec, {"ratio": 1.0}, "ratio", "> 1 and finite"),
    (PrefixSpec, {"ratio": math.inf}, "ratio", "> 1 and finite"),
    (PrefixSpec, {"ratio": math.nan}, "ratio", "> 1 and finite"),
    (PrefixSpec, {"reference": "none"}, "reference", "one of plain, prefix"),
    (Recipe, {"prefix": PrefixSpec(), "keep_out": "ro_vs_nr"}, "keep_out", "None with a prefix"),
    (
        Recipe,
        {"prefix": PrefixSpec(), "set_massive": "zero", "rotation": UNROTATED},
        "set_massive",
        "None with a prefix, after which no token is massive",
    ),
    *(
        (Recipe, {"activations": grid}, "activations", "per_token, per_group with a group_size, or static")
        for grid in (QuantSpec(granularity="per_tensor"), QuantSpec(granularity="per_channel"), PER_HEAD)
    ),
    (
        Recipe,
        STATIC | {"activations": QuantSpec(granularity="static", clip_ratio=0.9)},
        "activations",
        "of clip_ratio 1 where static",
    ),
    (Recipe, {"activations": KIVI_LIKE}, "activations", "of method None, the others being of the KV cache"),
    (Recipe, {"static": StaticSpec()}, "static", "the text for static activations, and None with any other"),
    (Recipe, STATIC | {"static": None}, "static", "the text for static activations"),
    *(
        (Recipe, STATIC | {name: value}, name, "None with static activations, whose scales are found without")
        for name, value in (("clips", CaptureSpec()), ("scales", CaptureSpec()), ("keep_out", "ro_vs_nr"))
    ),
    (Recipe, STATIC | {"set_massive": "zero", "rotation": UNROTATED}, "set_massive", "None with static"),
    (Recipe, {"keys": SYMMETRIC}, "keys", "per_group"),
    (Recipe, {"values": SYMMETRIC}, "values", "per_group"),
    (Recipe, {"keep_out": "sun"}, "keep_out", f"one of None, {', '.join((*ROW_RULES, *KEEP_OUT_COUNTS))}"),
    (Recipe, {"keep_out_tokens": 4}, "keep_out_tokens", COUNTED),
    (Recipe, {"keep_out": "nr_error_9.5", "keep_out_tokens": 4}, "keep_out_tokens", COUNTED),
    (Recipe, {"keep_out": "worst"}, "keep_out_tokens", COUNTED),
    (Recipe, {"keep_out": "worst", "keep_out_tokens": 0}, "keep_out_tokens", COUNTED),
    (Recipe, {"set_massive": "one", "rotation": UNROTATED}, "set_massive", "one of None, zero, mean"),
    (Recipe, {"set_massive": "zero"}, "set_massive", "None with a rotation"),
    (Recipe, {"set_massive": "mean", "rotation": RefineSpec()}, "set_massive", "None with a rotation"),
]

WRONG_TYPES = [
    (ModelSpec, {"source": 5}, "a packaged name, a folder, a .gguf file or hub:owner/name"),
    (ModelSpec, {"revision": 1}, "a str"),
    (ModelSpec, {"device": 0}, "one of auto, cpu, cuda"),
    (RotationSpec, {"seed": 1.5}, "a whole number in 0..2^63"),
    (RotationSpec, {"seed": True}, "a whole number in 0..2^63"),
    (RotationSpec, {"seed": "1"}, "a whole number in 0..2^63"),
    (RotationSpec, {"block": 16.0}, "None or a whole number >= 1"),
    (RotationSpec, {"kind": "file", "path": Path("R1.safetensors")}, "a str"),
    (QuantSpec, {"bits": "4"}, "a whole number in 2..16"),
    (QuantSpec, {"bits": None}, "a whole number in 2..16"),
    (QuantSpec, {"scheme": True}, "one of symmetric, asymmetric, free"),
    (QuantSpec, {"clip_ratio": "0.9"}, "in (0, 1]"),
    (CaptureSpec, {"model": "x"}, "a ModelSpec"),
    (CaptureSpec, {"corpus": None}, "a CorpusSpec"),
    (RefineSpec, {"init": "RH"}, "a RotationSpec"),
    (RefineSpec, {"init": RefineSpec()}, "a RotationSpec"),
    (RefineSpec, {"gamma": "inf"}, "> 0"),
    (RefineSpec, {"gamma": [1, 2]}, "> 0"),
    (CaptureSpec, {"sample": True}, "None or a whole number >= 0"),
    (WeightSpec, {"quantizer": 4}, "a QuantSpec"),
    (WeightSpec, {"method": None}, "a str"),
    (WeightSpec, {"clip_search": 1}, "a bool"),
    (WeightSpec, {"corpus": "wikitext2"}, "a CorpusSpec"),
    (Recipe, {"rotation": "RH"}, "a MethodSpec"),
    (Recipe, {"rotation": QuantSpec()}, "a MethodSpec"),
    (Recipe, {"activations": 4}, "a QuantSpec"),
    (Recipe, {"keep_out": True}, "one of None, "),
    (Recipe, {"sample": 1.0}, "None or a whole number >= 0"),
    (Recipe, {"jitter": "1"}, "None or a whole number >= 0"),
]

OTHER_VALUES = {
    ModelSpec: {"source": "hub:owner/name", "dtype": "float64", "revision": "main", "device": "cpu"},
    CorpusSpec: {"name": "wikitext2", "split": "test"},
    # path can differ for kind file only: below
    RotationSpec: {"kind": "RO", "seed": 1, "block": 32, "path": None},
    QuantSpec: {
        "bits": 5,
        "scheme": "free",
        "clip_ratio": 0.9,
        "granularity": "per_group",
        "group_size": None,
        "method": "qjl",
        "residual": 7,
        "seed": 7,
    },
    CaptureSpec: {
        "model": ModelSpec(dtype="float64"),
        "corpus": CorpusSpec(),
        "tokens": 7,
        "skip": 1,
        "sample": 0,
    },
    RefineSpec: {
        "capture": CaptureSpec(tokens=7),
        "init": RotationSpec(seed=1),
        "gamma": math.inf,
        "rule": "sun",
        "steps": 7,
        "quantizer": SYMMETRIC,
        "variant": "as_paper",
        "rows": 7,
    },
    WeightSpec: {
        "method": "rtn",
        "quantizer": QuantSpec(bits=3, granularity="per_channel"),
        "clip_search": False,
        "damping": 0.1,
        "corpus": CorpusSpec(),
        "windows": 7,
        "window": 7,
        "sample": 0,
        "rounded": True,
        "correction": 0.3,
    },
    Recipe: {
        "model": ModelSpec(dtype="float64"),
        "corpus": CorpusSpec(split="test"),
        "rotation": RefineSpec(),
        "weights": WeightSpec(method="rtn"),
        "activations": SYMMETRIC,
        "keys": PER_HEAD,
        "values": PER_HEAD,
        "keep_out": "ro_vs_nr",
        "windows": 7,
        "window": 7,
        "keep_out_tokens": 7,
        "set_massive": "zero",
        "head_block": 32,
        "mlp_block": 64,
        "sample": 0,
        "jitter": 0,
        "clips": CaptureSpec(tokens=7),
        "scales": CaptureSpec(tokens=7),
        "online": "none",
        "static": None,  # with static activations only: below
        "prefix": PrefixSpec(),
    },
    StaticSpec: {"corpus": CorpusSpec(), "windows": 7, "window": 7, "sample": 0},
    PrefixSpec: {"corpus": CorpusSpec(), "windows": 7, "window": 7, "ratio": 8.0, "reference": "prefix"},
}
DEPENDENT = {
    (RotationSpec, "path"),
    (QuantSpec, "group_size"),
    (QuantSpec, "method"),
    (QuantSpec, "residual"),
    (QuantSpec, "seed"),
    (Recipe, "keep_out_tokens"),
    (Recipe, "set_massive"),
    (Recipe, "static"),
}
"""Fields that may leave their default only together with another: tested by themselves."""


def test_every_spec_of_the_module_is_tested_here():
    defined = {
        value
        for value in vars(specs).values()
        if isinstance(value, type) and issubclass(value, Spec) and value not in (Spec, MethodSpec)
    }
    assert defined == set(SPECS)
    assert {spec for spec, *_ in BAD} == set(SPECS)


@pytest.mark.parametrize(
    ("spec", "values", "field", "rule"), BAD, ids=lambda v: v.__name__ if isinstance(v, type) else None
)
def test_a_bad_value_is_refused_by_field_rule_and_value(spec, values, field, rule):
    message = f"{spec.__name__}.{field} must be "
    with pytest.raises(
        ValueError,
        match=f"^{re.escape(message)}.*{re.escape(rule)}.*; got {re.escape(repr(values.get(field)))}$",
    ):
        spec(**values)


@pytest.mark.parametrize(
    ("spec", "values", "rule"), WRONG_TYPES, ids=lambda v: v.__name__ if isinstance(v, type) else None
)
def test_a_value_of_the_wrong_type_is_refused_by_field_rule_and_value(spec, values, rule):
    name, value = list(values.items())[-1]
    said = f"{spec.__name__}.{name} must be {rule}"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}.*; got {re.escape(repr(value))}$"):
        spec(**values)


@pytest.mark.parametrize("spec", SPECS)
def test_an_unknown_field_is_refused_with_those_there_are(spec):
    fields = ", ".join(spec.model_fields)
    with pytest.raises(ValueError, match=f"^{spec.__name__} has no field 'gama'; it has {fields}$"):
        spec(gama=1)
    with pytest.raises(TypeError, match="positional argument"):
        spec("value")


@pytest.mark.parametrize("spec", SPECS)
def test_frozen_and_hashable(spec):
    one = spec()
    name = next(iter(spec.model_fields))
    with pytest.raises(ValueError, match="frozen"):
        setattr(one, name, getattr(one, name))
    assert {one: 1}[spec()] == 1


@pytest.mark.parametrize("spec", SPECS)
def test_the_key_differs_when_any_field_differs(spec):
    names = set(spec.model_fields)
    assert set(OTHER_VALUES[spec]) == names, "a new field needs another value here"
    changed = [
        spec().with_(**{name: OTHER_VALUES[spec][name]})
        for name in sorted(names)
        if (spec, name) not in DEPENDENT
    ]
    keys = [spec().key, *(other.key for other in changed)]
    assert len(set(keys)) == len(keys) >= 3
    assert all(re.fullmatch(r"[0-9a-f]{32}", key) for key in keys)


def test_the_key_differs_in_the_fields_that_need_another():
    assert RotationSpec(kind="file", path="a").key != RotationSpec(kind="file", path="b").key
    keys = {QuantSpec(granularity="per_group", group_size=size).key for size in (None, 16, 32)}
    assert len(keys) == 3
    held = [grids.cache_of(name, 2, seed=seed) for name in registry.CACHES for seed in (0, 1)]
    held += [grids.cache_of("kivi", 2, **{name: 7}) for name in ("group_size", "residual")]
    assert len({KV_CACHE.with_(bits=2).key, *(one["keys"].key for one in held)}) == 1 + 1 + 2 * 2 + 2
    keys = {
        Recipe(keep_out=which, keep_out_tokens=count).key
        for which in ("most_massive", "worst", "random")
        for count in (1, 2)
    }
    assert len(keys) == 6
    assert len({Recipe(rotation=UNROTATED, set_massive=to).key for to in (None, "zero", "mean")}) == 3
    texts = (StaticSpec(), StaticSpec(windows=4), StaticSpec(sample=0), StaticSpec(window=64))
    assert len({Recipe().key, *(Recipe(**STATIC | {"static": text}).key for text in texts)}) == 5


@pytest.mark.parametrize(
    ("spec", "names"),
    [(CaptureSpec, ["sample"]), (WeightSpec, ["sample"]), (Recipe, ["sample", "jitter"])],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_each_sample_and_jitter_has_a_key_and_none_has_that_of_before(spec, names):
    """What is not sampled and not jittered is what it was before there were samples: its key hangs on none."""
    assert set(names) <= spec().unkeyed
    later = {*spec.LATER, *CaptureSpec.LATER, *WeightSpec.LATER, *QuantSpec.LATER}

    def before(part: dict[str, object]) -> dict[str, object]:
        kept = {name: value for name, value in part.items() if name not in later}
        kept |= {name: part[name] for name in ("seed", "method") if part.get(name) is not None}
        return {name: before(value) if isinstance(value, dict) else value for name, value in kept.items()}

    assert spec().key == content_key(before(spec().to_dict())), "nor does that of a spec with one in it"
    for name in names:
        found = [spec(**{name: value}) for value in (None, 0, 1, 2**40)]
        assert len({one.key for one in found}) == 4 and found[0] == spec()
        assert all(spec.of(one.plain()) == one for one in found)


def test_specs_of_two_classes_with_equal_fields_differ():
    assert content_key({"a": 1}) != CorpusSpec().key
    assert CorpusSpec().to_dict()["spec"] == "CorpusSpec"


@pytest.mark.parametrize("seed", ["0", "1", "12345"])
def test_keys_are_equal_in_another_process(seed):
    names = [spec.__name__ for spec in SPECS]
    code = f"from dfrot_lab.recipe import specs; print(*[getattr(specs, n)().key for n in {names}])"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert told == [spec().key for spec in SPECS]


@pytest.mark.parametrize(
    ("whole", "real"),
    [
        (RefineSpec(gamma=7), RefineSpec(gamma=7.0)),
        (QuantSpec(clip_ratio=1), QuantSpec(clip_ratio=1.0)),
        (WeightSpec(damping=1), WeightSpec(damping=1.0)),
    ],
)
def test_equal_specs_have_equal_keys(whole, real):
    """`--gamma 7` on the command line is 7.0, a notebook says 7: the same work must not be done twice."""
    assert whole == real
    assert whole.key == real.key


def test_nested_specs_are_part_of_the_dict_and_key():
    spec = Recipe(rotation=RefineSpec(capture=CaptureSpec(tokens=5)))
    assert spec.to_dict()["rotation"]["capture"]["tokens"] == 5
    assert spec.key != Recipe(rotation=RefineSpec(capture=CaptureSpec(tokens=6))).key
    assert json.loads(json.dumps(spec.to_dict(), allow_nan=False)) == spec.to_dict()


def test_infinite_gamma_has_its_own_key():
    spec = RefineSpec(gamma=math.inf)
    assert spec.plain()["gamma"] == math.inf
    assert spec.key not in {RefineSpec().key, RefineSpec(gamma=9e8).key}


def test_with_changes_a_copy_and_validates_again():
    spec = RefineSpec()
    assert spec.with_(gamma=2.0) == RefineSpec(gamma=2.0)
    assert spec == RefineSpec()
    with pytest.raises(ValueError, match=r"RefineSpec\.gamma must be > 0; got -3"):
        spec.with_(gamma=-3)
    with pytest.raises(ValueError, match="RefineSpec has no field 'gama'"):
        spec.with_(gama=1)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (RotationSpec(kind="NR"), "NR"),
        (RotationSpec(), "RH"),
        (RotationSpec(block=312), "RH-b312"),
        (RotationSpec(kind="RO", block=16), "RO-b16"),
        (RotationSpec(kind="file", path="some/where/R1.safetensors"), "R1.safetensors"),
        (RotationSpec(kind="file", path="C:\\some\\R1.safetensors"), "R1.safetensors"),
        (RefineSpec(variant="as_paper"), "DFRot"),
        (QuantSpec(), "sym4"),
        (QuantSpec(bits=3, scheme="asymmetric", clip_ratio=0.9), "asym3-c0.9"),
        (QuantSpec(granularity="per_channel"), "sym4-channel"),
        (PER_HEAD.with_(scheme="asymmetric"), "asym4-head"),
        (PER_HEAD.with_(scheme="asymmetric", group_size=128), "asym4-g128"),
        (QuantSpec(granularity="per_tensor"), "sym4-tensor"),
        (QuantSpec(scheme="free"), "free4"),
        (QuantSpec(bits=2, scheme="free", clip_ratio=0.8, granularity="per_group"), "free2-c0.8-head"),
        (QuantSpec(bits=16, scheme="asymmetric"), "none"),
    ],
)
def test_names_for_tables(spec, name):
    assert spec.name == name


@pytest.mark.parametrize(
    ("text", "bits"), [("4-4-16", (4, 4, 16)), ("16-4-16", (16, 4, 16)), ("2-8-3", (2, 8, 3))]
)
def test_recipe_of_reads_its_bits(text, bits):
    spec = recipe_of(text)
    assert (spec.weights.quantizer.bits, spec.activations.bits, spec.keys.bits) == bits
    assert spec.values == spec.keys
    assert spec.bits == text


def test_bits_say_keys_and_values_apart_where_they_differ():
    cache = {bits: grids.KV_CACHE.with_(bits=bits) for bits in (2, 4)}
    assert recipe_of("4-4-16", keys=cache[4], values=cache[2]).bits == "4-4-k4v2"
    assert recipe_of("4-4-4", values=grids.KV_CACHE).bits == "4-4-k4v16"


@pytest.mark.parametrize(
    "text", ["4-4", "4-4-16-16", "", "4,4,16", "w4-a4-kv16", "4--4", "4-4-", "4.0-4-16", "-4-4-16", "²-4-16"]
)
def test_bits_of_another_form_are_refused(text):
    with pytest.raises(
        ValueError, match=f"bits must be WEIGHTS-ACTIVATIONS-KV such as 4-4-16; got {re.escape(repr(text))}"
    ):
        recipe_of(text)


@pytest.mark.parametrize(("text", "value"), [("1-4-16", 1), ("4-17-16", 17), ("4-4-0", 0), ("4-4-32", 32)])
def test_bits_out_of_range_are_refused(text, value):
    with pytest.raises(ValueError, match=rf"QuantSpec\.bits must be a whole number in 2\.\.16; got {value}$"):
        recipe_of(text)


def test_recipe_of_has_the_design_s_quantizers_and_passes_fields_on():
    spec = recipe_of("4-4-4", weights="rtn", windows=2, keep_out="ro_vs_nr")
    assert (spec.weights.method, spec.windows, spec.keep_out) == ("rtn", 2, "ro_vs_nr")
    assert spec.weights.quantizer == QuantSpec(granularity="per_channel")
    assert spec.activations == QuantSpec(scheme="asymmetric")
    assert spec.keys == spec.values == QuantSpec(scheme="asymmetric", granularity="per_group")
    assert recipe_of("4-4-16") == Recipe()


def test_content_key_is_sha256_of_sorted_json():
    assert content_key({"b": [1, None], "a": "x"}) == content_key({"a": "x", "b": [1, None]})
    assert content_key({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()[:32]


# ---- plain values and YAML, any spec

WORDS = st.text(min_size=1, max_size=12).filter(str.strip)
COUNTS = st.integers(1, 10**6)
MODELS = st.builds(
    ModelSpec,
    source=WORDS,
    dtype=st.sampled_from(specs.DTYPES),
    revision=st.none() | WORDS,
    device=st.sampled_from(specs.DEVICES),
)
CORPORA = st.builds(CorpusSpec, name=WORDS, split=st.sampled_from(specs.SPLITS))
ROTATIONS = st.builds(
    RotationSpec,
    kind=st.sampled_from(["NR", "RO", "RH"]),
    seed=st.integers(0, 2**40),
    block=st.none() | COUNTS,
) | st.builds(RotationSpec, kind=st.just("file"), path=WORDS)
SAMPLES = st.none() | st.integers(0, 99)
CAPTURES = st.builds(
    CaptureSpec, model=MODELS, corpus=CORPORA, tokens=COUNTS, skip=st.integers(0, 99)
) | st.builds(CaptureSpec, model=MODELS, tokens=COUNTS, sample=SAMPLES)


def quantizers(*granularities: str, schemes: tuple[str, ...] = tuple(SCHEMES), most: int = 16):
    """Quantizers of the granularities named; a per_group one with or without a size."""

    def build(granularity: str, size: int | None, **fields: object) -> QuantSpec:
        size = size if granularity == "per_group" else None
        return QuantSpec(granularity=granularity, group_size=size, **fields)

    return st.builds(
        build,
        st.sampled_from(granularities),
        st.none() | COUNTS,
        bits=st.integers(2, most),
        scheme=st.sampled_from(schemes),
        clip_ratio=st.floats(0, 1, exclude_min=True) | st.just(1.0),
    )


REFINEMENTS = st.builds(
    RefineSpec,
    capture=CAPTURES,
    init=ROTATIONS,
    gamma=st.floats(0, 1e8, exclude_min=True),
    rule=st.sampled_from(MASSIVE_RULES),
    steps=COUNTS,
    quantizer=quantizers("per_token", most=15),
    variant=st.sampled_from(REFINE_VARIANTS),
    rows=st.none() | COUNTS,
) | st.builds(RefineSpec, gamma=st.just(math.inf))
WEIGHTS = st.builds(
    WeightSpec,
    method=st.sampled_from(list(registry.WEIGHTS)),
    quantizer=quantizers("per_channel", schemes=("symmetric",)),
    clip_search=st.booleans(),
    damping=st.floats(1e-9, 10),
    corpus=st.none() | CORPORA,
    windows=COUNTS,
    window=st.integers(2, 4096),
    sample=SAMPLES,
    rounded=st.sampled_from([None, True, False]),
    correction=st.none() | st.floats(0, 1),
)
PLAIN_RECIPES = st.builds(
    Recipe,
    model=MODELS,
    corpus=CORPORA,
    rotation=ROTATIONS | REFINEMENTS,
    weights=WEIGHTS,
    activations=quantizers("per_token"),
    keys=quantizers("per_group"),
    values=quantizers("per_group"),
    windows=COUNTS,
    window=st.integers(2, 4096),
    head_block=st.none() | COUNTS,
    mlp_block=st.none() | COUNTS,
    online=st.sampled_from((None, *ONLINE)),
    sample=SAMPLES,
    jitter=SAMPLES,
)
PREFIXES = st.builds(
    PrefixSpec,
    corpus=CORPORA,
    windows=COUNTS,
    window=st.integers(2, 4096),
    ratio=st.floats(1, 1e9, exclude_min=True),
    reference=st.sampled_from(("plain", "prefix")),
)
RECIPES = st.one_of(
    st.builds(lambda r, rule: r.with_(keep_out=rule), PLAIN_RECIPES, st.sampled_from([None, *ROW_RULES])),
    st.builds(
        lambda r, which, count: r.with_(keep_out=which, keep_out_tokens=count),
        PLAIN_RECIPES,
        st.sampled_from(KEEP_OUT_COUNTS),
        COUNTS,
    ),
    st.builds(
        lambda r, to: r.with_(rotation=UNROTATED, set_massive=to),
        PLAIN_RECIPES,
        st.sampled_from(("zero", "mean")),
    ),
    st.builds(
        lambda r, grid, text: r.with_(activations=grid.with_(clip_ratio=1.0), clips=text),
        PLAIN_RECIPES,
        quantizers("per_token"),
        CAPTURES,
    ),
    st.builds(lambda r, prefix: r.with_(prefix=prefix), PLAIN_RECIPES, PREFIXES),
    st.builds(
        lambda r, bits, scheme, text: r.with_(
            activations=QuantSpec(bits=bits, scheme=scheme, granularity="static"), static=text
        ),
        PLAIN_RECIPES,
        st.integers(2, 16),
        st.sampled_from(tuple(SCHEMES)),
        st.builds(StaticSpec, corpus=CORPORA, windows=COUNTS, window=st.integers(2, 4096), sample=SAMPLES),
    ),
    st.builds(
        lambda r, grid, size: r.with_(activations=grid.with_(granularity="per_group", group_size=size)),
        PLAIN_RECIPES,
        quantizers("per_token"),
        COUNTS,
    ),
)
ANY_SPEC = st.one_of(MODELS, CORPORA, ROTATIONS, quantizers(*GRANULARITIES), CAPTURES, REFINEMENTS, WEIGHTS)


@given(spec=ANY_SPEC | RECIPES)
@settings(max_examples=100, deadline=None)
def test_plain_values_are_the_spec_again(spec):
    assert type(spec).of(spec.plain()) == spec
    assert type(spec).of(spec.to_dict()) == spec
    text = json.dumps(spec.plain())  # nothing but plain values, whatever is nested
    assert type(spec).of(json.loads(text)) == spec
    assert type(spec).of(json.loads(text)).key == spec.key


@given(recipe=RECIPES)
@settings(max_examples=60, deadline=None)
def test_a_recipe_comes_back_from_its_yaml_with_its_key(recipe):
    found = Recipe.from_yaml(recipe.to_yaml())
    assert found == recipe and found.key == recipe.key
    assert found.to_yaml() == recipe.to_yaml()


@given(recipe=RECIPES)
@settings(max_examples=40, deadline=None)
def test_canonical_is_canonical_already_and_keeps_what_is_quantized(recipe):
    found = recipe.canonical()
    assert found.canonical() == found
    assert (found.bits, found.is_rotated) == (recipe.bits, recipe.is_rotated)
    assert (found.model, found.corpus) == (recipe.model, recipe.corpus)


def test_canonical_drops_what_has_no_effect():
    bare = recipe_of("16-16-16", rotation=UNROTATED)
    noise = bare.with_(
        weights=WeightSpec(quantizer=QuantSpec(bits=16, granularity="per_channel"), windows=3, damping=0.5),
        activations=QuantSpec(bits=16, clip_ratio=0.5),
        keys=PER_HEAD.with_(bits=16, group_size=8),
        values=PER_HEAD.with_(bits=16, scheme="free"),
        rotation=RotationSpec(kind="NR", seed=5),
        keep_out="ro_vs_nr",
        jitter=5,
    )
    assert noise != bare and noise.canonical() == bare.canonical()
    rtn = recipe_of("4-4-4", weights="rtn")
    changes = {"damping": 0.5, "windows": 3, "corpus": CorpusSpec(name="x"), "sample": 2}
    other = rtn.with_(weights=rtn.weights.with_(**changes))
    assert other.canonical() == rtn.canonical()
    assert rtn.with_(weights=rtn.weights.with_(clip_search=False)).canonical() != rtn.canonical()
    gptq = recipe_of("4-4-4")
    assert gptq.with_(weights=gptq.weights.with_(damping=0.5)).canonical() != gptq.canonical()
    assert gptq.canonical() == gptq
    for recipe in (bare, rtn, gptq):
        assert recipe.with_(sample=0).canonical() != recipe.canonical(), "other windows are scored"
    assert rtn.with_(jitter=0).canonical() != rtn.canonical(), "where something is rounded, jitter shows"
    assert rtn.with_(weights=rtn.weights.with_(sample=1)).canonical() == rtn.canonical()
    assert gptq.with_(weights=gptq.weights.with_(sample=1)).canonical() != gptq.canonical()
    bare_keys = recipe_of("4-4-16").canonical()
    none = bare_keys.with_(online="none")
    assert bare_keys.with_(online="R4").canonical() == bare_keys, "with keys of 16 bits there is no R3"
    assert none.with_(online="R3", mlp_block=8).canonical() == none.canonical() != bare_keys
    assert rtn.with_(online="R4").canonical() != rtn.canonical(), "keys of 4 bits are rotated by R3"
    assert bare.with_(online="none").canonical() == bare.canonical(), "NR has neither"


def test_a_recipe_file_says_only_what_is_not_the_default(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("rotation: {method: dfrot, gamma: 10, init: {kind: RO}}\nweights: {corpus: null}\n")
    expected = Recipe(
        rotation=RefineSpec(gamma=10.0, init=RotationSpec(kind="RO")), weights=WeightSpec(corpus=None)
    )
    assert Recipe.from_yaml(path) == Recipe.from_yaml(path.read_text()) == expected
    assert Recipe.from_yaml("rotation: {kind: RO}") == Recipe(rotation=RotationSpec(kind="RO"))


def test_what_a_part_of_a_recipe_leaves_out_is_as_it_is_there_by_default():
    """Not as it is in a spec of that kind: activations are asymmetric, calibration is on the other half."""
    of = Recipe.from_yaml
    assert of("activations: {bits: 8}").activations == ACTIVATIONS.with_(bits=8)
    assert of("keys: {bits: 2}").keys == KV_CACHE.with_(bits=2)
    text = CorpusSpec(name="wikitext2", split="calibration")
    assert of("weights: {corpus: {name: wikitext2}}").weights == WeightSpec(corpus=text)
    assert of("weights: {quantizer: {bits: 8}}").weights.quantizer == WeightSpec().quantizer.with_(bits=8)
    made = of(
        "rotation: {method: dfrot, capture: {corpus: {name: wikitext2}}, quantizer: {bits: 3}}"
    ).rotation
    quantizer = RefineSpec().quantizer.with_(bits=3)
    assert made == RefineSpec(capture=CaptureSpec(corpus=text), quantizer=quantizer)
    assert of("weights: {damping: 1e-3}").weights.damping == 0.001
    assert of("rotation: {method: dfrot, gamma: inf}").rotation == RefineSpec(gamma=math.inf)


def test_r1_is_refined_on_the_recipes_own_model():
    other = ModelSpec(source="other", dtype="float64")
    made = Recipe(model=other, rotation=RefineSpec(gamma=7.0)).canonical().rotation
    assert made == RefineSpec(gamma=7.0, capture=CaptureSpec(model=other))


def test_a_names_odd_characters_survive_the_yaml():
    """The next-line character is a line break to YAML, and folded away where it is written as it is."""
    recipe = Recipe(model=ModelSpec(source="a\x85b: \u2028 # 'é\"\n"), corpus=CorpusSpec(name="1e5"))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "rotation: {method: spin}",
            r"rotation method must be one of random, dfrot, offset, offset_plus, klt, proxy, task, smoothquant, optrot, duquant, duquant_online, flatquant, scale_search; got 'spin'",
        ),
        (
            "rotation: {method: [1]}",
            r"rotation method must be one of random, dfrot, offset, offset_plus, klt, proxy, task, smoothquant, optrot, duquant, duquant_online, flatquant, scale_search; got \[1\]",
        ),
        ("", r"Recipe must be a mapping of its fields; got None"),
        ("rotation: RH", r"Recipe\.rotation must be a MethodSpec; got 'RH'"),
        ("rotation: {method: dfrot, kind: RO}", r"RefineSpec has no field 'kind'; it has capture, init, .*"),
        ("rotation: {method: dfrot, gamma: -3}", r"RefineSpec\.gamma must be > 0; got -3"),
        (
            "rotation: {method: dfrot, init: {method: dfrot}}",
            r"RefineSpec\.init must be a RotationSpec; got .*",
        ),
        (
            "weights: {method: awq}",
            r"WeightSpec\.method must be one of rtn, gptq, gptaq, qep, foem, lwc, rsq, aespa; got 'awq'",
        ),
        ("activations: {bits: 4.5}", r"QuantSpec\.bits must be a whole number in 2\.\.16; got 4\.5"),
        ("kv: {bits: 4}", r"Recipe has no field 'kv'; it has model, corpus, rotation, .*"),
        ("1: 2", r"Recipe has no field '1'; it has .*"),
        ("- model", r"Recipe must be a mapping of its fields; got \['model'\]"),
        ("0", r"Recipe must be a mapping of its fields; got 0"),
        ("recipe.yaml", r"Recipe must be a mapping of its fields; got 'recipe\.yaml'"),
        ("model: {source: x", r"a recipe must be YAML; got 'model: \{source: x' \(.*\)"),
        ("!!python/object/apply:os.getcwd []", r"a recipe must be YAML; got .*"),
    ],
)
def test_what_is_wrong_in_a_recipe_file_is_said_in_one_line(text, said):
    with pytest.raises(ValueError, match=f"^{said}$"):  # without DOTALL a dot is no line break
        Recipe.from_yaml(text)


DIFFERING = quantizers(*GRANULARITIES, most=15)


@given(one=DIFFERING, other=DIFFERING)
@settings(max_examples=200, deadline=None)
def test_two_quantizers_never_share_a_name(one, other):
    assert (one.name == other.name) == (one == other)


@given(one=DIFFERING, data=st.data())
@settings(max_examples=200, deadline=None)
def test_one_change_of_a_quantizer_changes_its_name(one, data):
    name = data.draw(st.sampled_from(["bits", "scheme", "clip_ratio", "granularity", "group_size"]))
    other = data.draw(DIFFERING)
    changes = {name: getattr(other, name)}
    if name == "granularity":
        changes["group_size"] = other.group_size
    if name == "group_size":
        changes["granularity"] = other.granularity
    if name == "clip_ratio":  # as near as two ratios can be
        changes[name] = math.nextafter(one.clip_ratio, 0.5)
    changed = one.with_(**changes)
    assert (changed.name == one.name) == (changed == one)
