"""Specs say what is wrong with them, never change, and are named by their content in every process."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import pytest

from dfrot_lab.recipe import specs
from dfrot_lab.recipe.specs import (
    CaptureSpec,
    CorpusSpec,
    EvalSpec,
    ModelSpec,
    QuantSpec,
    RefineSpec,
    RotationSpec,
    Spec,
    WeightSpec,
    content_key,
    eval_spec,
    parse_bits,
)

SPECS = (ModelSpec, CorpusSpec, RotationSpec, QuantSpec, CaptureSpec, RefineSpec, WeightSpec, EvalSpec)

SYMMETRIC, ASYMMETRIC = QuantSpec(), QuantSpec(symmetric=False)
NOTHING = QuantSpec(bits=16)
UNROTATED = RotationSpec(kind="NR")

BAD = [
    (ModelSpec, {"source": "  "}, "source", "a packaged name"),
    (ModelSpec, {"dtype": "int4"}, "dtype", "one of float32, float64, bfloat16, float16"),
    (CorpusSpec, {"name": ""}, "name", "auto, wikitext2, wikipedia-sample or a text file"),
    (CorpusSpec, {"split": "dev"}, "split", "one of calibration, evaluation, train, valid, test"),
    (RotationSpec, {"kind": "HR"}, "kind", "one of NR, RO, RH, file"),
    (RotationSpec, {"seed": -1}, "seed", "a whole number >= 0"),
    (RotationSpec, {"block": 0}, "block", "None or >= 1"),
    (RotationSpec, {"kind": "file"}, "path", "given for kind 'file' and for no other"),
    (RotationSpec, {"path": "R1.safetensors"}, "path", "given for kind 'file' and for no other"),
    (QuantSpec, {"bits": 1}, "bits", "a whole number in 2..16"),
    (QuantSpec, {"bits": 17}, "bits", "a whole number in 2..16"),
    (QuantSpec, {"bits": 4.5}, "bits", "a whole number in 2..16"),
    (QuantSpec, {"clip_ratio": 0.0}, "clip_ratio", "in (0, 1]"),
    (QuantSpec, {"clip_ratio": 1.5}, "clip_ratio", "in (0, 1]"),
    (QuantSpec, {"clip_ratio": math.nan}, "clip_ratio", "in (0, 1]"),
    (
        QuantSpec,
        {"granularity": "per_row"},
        "granularity",
        "one of per_token, per_channel, per_group, per_tensor",
    ),
    (QuantSpec, {"group_size": 32}, "group_size", "with granularity per_group"),
    (QuantSpec, {"group_size": 0, "granularity": "per_group"}, "group_size", "a whole number >= 1"),
    (CaptureSpec, {"tokens": 0}, "tokens", "a whole number >= 1"),
    (CaptureSpec, {"tokens": -2048}, "tokens", "a whole number >= 1"),
    (CaptureSpec, {"skip": -1}, "skip", "a whole number >= 0"),
    (CaptureSpec, {"skip": 0.5}, "skip", "a whole number >= 0"),
    (RefineSpec, {"gamma": 0.0}, "gamma", "> 0"),
    (RefineSpec, {"gamma": -3}, "gamma", "> 0"),
    (RefineSpec, {"gamma": math.nan}, "gamma", "> 0"),
    (RefineSpec, {"rule": "moon"}, "rule", "one of sun, nr_error, ro_vs_nr, ratio"),
    (RefineSpec, {"steps": 0}, "steps", "a whole number >= 1"),
    (RefineSpec, {"variant": "as_told"}, "variant", "one of accelerated, guarded, as_paper, as_released"),
    (RefineSpec, {"quantizer": NOTHING}, "quantizer", "fewer than 16 bits"),
    (RefineSpec, {"rows": 0}, "rows", "a whole number >= 1"),
    (RefineSpec, {"rows": -8}, "rows", "a whole number >= 1"),
    (
        RefineSpec,
        {"quantizer": SYMMETRIC, "variant": "as_released", "gamma": math.inf},
        "gamma",
        "finite with variant as_released",
    ),
    (WeightSpec, {"method": "awq"}, "method", "one of gptq, rtn"),
    (WeightSpec, {"damping": 0.0}, "damping", "> 0"),
    (WeightSpec, {"windows": 0}, "windows", "a whole number >= 1"),
    (WeightSpec, {"window": 1}, "window", "a whole number >= 2"),
    (WeightSpec, {"quantizer": SYMMETRIC}, "quantizer", "per_channel and symmetric"),
    (
        WeightSpec,
        {"quantizer": QuantSpec(granularity="per_channel", symmetric=False)},
        "quantizer",
        "per_channel and symmetric",
    ),
    (EvalSpec, {"windows": 0}, "windows", "a whole number >= 1"),
    (EvalSpec, {"window": 1}, "window", "a whole number >= 2"),
    (EvalSpec, {"activations": QuantSpec(granularity="per_tensor")}, "activations", "per_token"),
    (EvalSpec, {"kv": SYMMETRIC}, "kv", "per_group"),
    (
        EvalSpec,
        {"keep_out": "sun"},
        "keep_out",
        "one of None, nr_error, ro_vs_nr, most_massive, worst, random",
    ),
    (
        EvalSpec,
        {"keep_out_tokens": 4},
        "keep_out_tokens",
        "given for keep_out most_massive, worst, random alone",
    ),
    (
        EvalSpec,
        {"keep_out": "nr_error", "keep_out_tokens": 4},
        "keep_out_tokens",
        "given for keep_out most_massive, worst, random alone",
    ),
    (
        EvalSpec,
        {"keep_out": "worst"},
        "keep_out_tokens",
        "given for keep_out most_massive, worst, random alone",
    ),
    (EvalSpec, {"set_massive": "one", "rotation": UNROTATED}, "set_massive", "one of None, zero, mean"),
    (EvalSpec, {"set_massive": "zero"}, "set_massive", "None with a rotation"),
    (EvalSpec, {"set_massive": "mean", "rotation": RefineSpec()}, "set_massive", "None with a rotation"),
]

OTHER_VALUES = {
    ModelSpec: {"source": "hub:owner/name", "dtype": "float64", "revision": "main"},
    CorpusSpec: {"name": "wikitext2", "split": "test"},
    # path can differ for kind file only: below
    RotationSpec: {"kind": "RO", "seed": 1, "block": 32, "path": None},
    QuantSpec: {"bits": 5, "symmetric": False, "clip_ratio": 0.9, "granularity": "per_group", "group_size": None},
    CaptureSpec: {"model": ModelSpec(dtype="float64"), "corpus": CorpusSpec(), "tokens": 7, "skip": 1},
    RefineSpec: {
        "capture": CaptureSpec(tokens=7), "init": RotationSpec(seed=1), "gamma": math.inf, "rule": "sun", "steps": 7, "quantizer": SYMMETRIC,
        "variant": "as_paper", "rows": 7,
    },
    WeightSpec: {
        "method": "rtn", "quantizer": QuantSpec(bits=3, granularity="per_channel"), "clip_search": False, "damping": 0.1, "corpus": CorpusSpec(),
        "windows": 7, "window": 7,
    },
    EvalSpec: {
        "model": ModelSpec(dtype="float64"), "corpus": CorpusSpec(split="test"), "rotation": RefineSpec(), "weights": WeightSpec(method="rtn"),
        "activations": SYMMETRIC, "kv": QuantSpec(granularity="per_group"), "keep_out": "nr_error", "windows": 7, "window": 7,
        "keep_out_tokens": 7, "set_massive": "zero",
    },
}  # fmt: skip
DEPENDENT = {
    (RotationSpec, "path"),
    (QuantSpec, "group_size"),
    (EvalSpec, "keep_out_tokens"),
    (EvalSpec, "set_massive"),
}
"""Fields that may leave their default only together with another: tested by themselves."""


def test_every_spec_of_the_module_is_tested_here():
    defined = {
        value
        for value in vars(specs).values()
        if isinstance(value, type) and issubclass(value, Spec) and value is not Spec
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


@pytest.mark.parametrize("spec", SPECS)
def test_an_unknown_field_is_a_type_error(spec):
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'gama'"):
        spec(gama=1)
    with pytest.raises(TypeError, match="positional argument"):
        spec("value")


@pytest.mark.parametrize("spec", SPECS)
def test_frozen_and_hashable(spec):
    one = spec()
    name = fields(spec)[0].name
    with pytest.raises(FrozenInstanceError, match=f"'{name}'"):
        setattr(one, name, getattr(one, name))
    assert {one: 1}[spec()] == 1


@pytest.mark.parametrize("spec", SPECS)
def test_the_key_differs_when_any_field_differs(spec):
    names = {f.name for f in fields(spec)}
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
    keys = {
        EvalSpec(keep_out=which, keep_out_tokens=count).key
        for which in ("most_massive", "worst", "random")
        for count in (1, 2)
    }
    assert len(keys) == 6
    assert len({EvalSpec(rotation=UNROTATED, set_massive=to).key for to in (None, "zero", "mean")}) == 3


BEFORE_THEY_WERE_ADDED = {
    CaptureSpec: ("skip", "75ece2bde3cf2994bb1ad82761fd3af6"),
    RefineSpec: ("rows", "6666dc46523d8e9cf84cfd8ff7d1951d"),
    EvalSpec: ("keep_out_tokens set_massive", "13c9a30a1525400b3ac54bc5563609a7"),
}
"""Spec: the fields that came when results were stored already, and the key the spec had without them (commit
1f9d142).
"""


@pytest.mark.parametrize("spec", BEFORE_THEY_WERE_ADDED)
def test_fields_added_later_leave_the_key_alone_at_their_default(spec):
    names, key = BEFORE_THEY_WERE_ADDED[spec]
    assert {f.name for f in fields(spec) if "later" in f.metadata} == set(names.split())
    assert not set(names.split()) & set(spec().to_dict())
    assert spec().key == key


def test_fields_added_later_are_in_the_dict_and_key_once_set():
    inner = CaptureSpec(skip=2)
    whole = EvalSpec(rotation=RefineSpec(capture=inner, rows=9))
    assert whole.to_dict()["rotation"]["capture"]["skip"] == 2
    assert whole.to_dict()["rotation"]["rows"] == 9
    plain = EvalSpec(rotation=RefineSpec())
    keys = {
        plain.key,
        whole.key,
        plain.with_(rotation=RefineSpec(rows=9)).key,
        plain.with_(rotation=RefineSpec(capture=inner)).key,
    }
    assert len(keys) == 4
    kept = EvalSpec(keep_out="random", keep_out_tokens=3)
    assert {name: kept.to_dict().get(name) for name in ("keep_out_tokens", "set_massive")} == {
        "keep_out_tokens": 3,
        "set_massive": None,
    }
    assert EvalSpec(rotation=UNROTATED, set_massive="mean").to_dict()["set_massive"] == "mean"


def test_specs_of_two_classes_with_equal_fields_differ():
    assert content_key({"a": 1}) != CorpusSpec().key
    assert CorpusSpec().to_dict()["spec"] == "CorpusSpec"


@pytest.mark.parametrize("seed", ["0", "1", "12345"])
def test_keys_are_equal_in_another_process(seed):
    code = f"from dfrot_lab import specs; print(*[getattr(specs, name)().key for name in {[s.__name__ for s in SPECS]}])"
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
    spec = EvalSpec(rotation=RefineSpec(capture=CaptureSpec(tokens=5)))
    assert spec.to_dict()["rotation"]["capture"]["tokens"] == 5
    assert spec.key != EvalSpec(rotation=RefineSpec(capture=CaptureSpec(tokens=6))).key
    assert json.loads(json.dumps(spec.to_dict(), allow_nan=False)) == spec.to_dict()


def test_infinite_gamma_serialises_and_has_its_own_key():
    spec = RefineSpec(gamma=math.inf)
    assert json.loads(json.dumps(spec.to_dict(), allow_nan=False))["gamma"] == "inf"
    assert spec.key not in {RefineSpec().key, RefineSpec(gamma=1e300).key}


def test_with_changes_a_copy_and_validates_again():
    spec = RefineSpec()
    assert spec.with_(gamma=2.0) == RefineSpec(gamma=2.0)
    assert spec == RefineSpec()
    with pytest.raises(ValueError, match=r"RefineSpec\.gamma must be > 0; got -3"):
        spec.with_(gamma=-3)
    with pytest.raises(TypeError, match="gama"):
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
        (QuantSpec(bits=3, symmetric=False, clip_ratio=0.9), "asym3-c0.9"),
        (QuantSpec(bits=16, symmetric=False), "none"),
    ],
)
def test_names_for_tables(spec, name):
    assert spec.name == name


@pytest.mark.parametrize(
    ("text", "bits"), [("4-4-16", (4, 4, 16)), ("16-4-16", (16, 4, 16)), ("2-8-3", (2, 8, 3))]
)
def test_parse_bits_and_eval_spec(text, bits):
    assert parse_bits(text) == bits
    spec = eval_spec(text)
    assert (spec.weights.quantizer.bits, spec.activations.bits, spec.kv.bits) == bits
    assert spec.bits == text


@pytest.mark.parametrize(
    "text", ["4-4", "4-4-16-16", "", "4,4,16", "w4-a4-kv16", "4--4", "4-4-", "4.0-4-16", "-4-4-16", "²-4-16"]
)
def test_bits_of_another_form_are_refused(text):
    with pytest.raises(
        ValueError, match=f"bits must be WEIGHTS-ACTIVATIONS-KV such as 4-4-16; got {re.escape(repr(text))}"
    ):
        parse_bits(text)


@pytest.mark.parametrize(("text", "value"), [("1-4-16", 1), ("4-17-16", 17), ("4-4-0", 0), ("4-4-32", 32)])
def test_bits_out_of_range_are_refused(text, value):
    with pytest.raises(ValueError, match=rf"QuantSpec\.bits must be a whole number in 2\.\.16; got {value}$"):
        eval_spec(text)


def test_eval_spec_has_the_design_s_quantizers_and_passes_fields_on():
    spec = eval_spec("4-4-4", weights="rtn", windows=2, keep_out="ro_vs_nr")
    assert (spec.weights.method, spec.windows, spec.keep_out) == ("rtn", 2, "ro_vs_nr")
    assert spec.weights.quantizer == QuantSpec(granularity="per_channel")
    assert spec.activations == QuantSpec(symmetric=False)
    assert spec.kv == QuantSpec(symmetric=False, granularity="per_group")
    assert eval_spec("4-4-16") == EvalSpec()


def test_content_key_is_sha256_of_sorted_json():
    assert content_key({"b": [1, None], "a": "x"}) == content_key({"a": "x", "b": [1, None]})
    assert content_key({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()[:32]
