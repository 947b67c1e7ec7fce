"""Keys stand for bytes and not for names, for device and dtype, and for the version of the formulas."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_tiny

from dfrot_lab.disk import artefacts, rotation_files
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import rotations
from dfrot_lab.model import door
from dfrot_lab.recipe import keys, registry
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import (
    CALIBRATION,
    CaptureSpec,
    CorpusSpec,
    ModelSpec,
    Recipe,
    RefineSpec,
    RotationSpec,
    WeightSpec,
    recipe_of,
)


def SAID(of: ModelSpec | CorpusSpec | str) -> str:
    """Fingerprints of files that are not there: what stands behind a name is its first letter."""
    if isinstance(of, ModelSpec):
        return keys.model_key(of.source[0], of.dtype, of.device)
    return f"file {of[0]}" if isinstance(of, str) else f"text {of.name[0]} {of.split}"


def named(letter: str, number: int = 1, **fields: object) -> Recipe:
    """A recipe whose model, texts and start are files, all called by `letter` and `number`."""
    name = f"{letter}{number}"
    model, text = ModelSpec(source=name, device="cpu"), CorpusSpec(name=name)
    capture = CaptureSpec(model=model, corpus=text)
    return Recipe(
        model=model,
        corpus=text,
        rotation=RefineSpec(capture=capture, init=RotationSpec(kind="file", path=name)),
        weights=WeightSpec(corpus=text),
        **fields,
    )


def identities(recipe: Recipe) -> dict[str, str]:
    """The content key of a recipe and of each part that is keyed by itself."""
    parts = {
        "recipe": keys.identity(recipe, SAID),
        "capture": keys.identity(recipe.rotation.capture, SAID),
        "rotation": keys.identity(recipe.rotation, SAID),
        "weights": keys.weights(recipe, SAID),
        "evaluation": keys.evaluation(recipe, SAID),
        "tasks": keys.tasks(recipe, SAID, {"piqa": "d"}, None, "1"),
    }
    return {name: keys.content_key(part) for name, part in parts.items()}


# ---- bytes, not names


def test_the_same_bytes_at_another_place_have_the_same_keys():
    assert identities(named("a", 1)) == identities(named("a", 2))


def test_other_bytes_at_the_same_place_have_other_keys():
    one, other = identities(named("a")), identities(named("b"))
    assert all(one[name] != other[name] for name in one)


@pytest.mark.parametrize("changes", [{"dtype": "float64"}, {"device": "cuda"}, {"source": "b"}])
def test_dtype_device_and_bytes_of_a_model_are_part_of_every_key_made_with_it(changes):
    recipe = named("a")
    model = recipe.model.with_(**changes)
    capture = recipe.rotation.capture.with_(model=model)
    changed = recipe.with_(model=model, rotation=recipe.rotation.with_(capture=capture))
    one, other = identities(recipe), identities(changed)
    assert all(one[name] != other[name] for name in one)


def test_every_field_of_every_part_is_in_the_key():
    recipe = named("a")
    rotation, weights, text = recipe.rotation, recipe.weights, recipe.corpus
    changed = [
        recipe.with_(corpus=text.with_(split="test")),
        recipe.with_(rotation=rotation.with_(gamma=float("inf"))),
        recipe.with_(rotation=rotation.with_(init=RotationSpec(kind="file", path="b"))),
        recipe.with_(rotation=rotation.with_(capture=rotation.capture.with_(skip=1))),
        recipe.with_(rotation=rotation.init),
        recipe.with_(rotation=RotationSpec()),
        recipe.with_(rotation=RotationSpec(seed=1)),
        recipe.with_(weights=weights.with_(corpus=text.with_(split="test"))),
        recipe.with_(weights=weights.with_(corpus=None)),
        recipe.with_(activations=QuantSpec(scheme="free")),
        recipe.with_(keys=recipe.keys.with_(bits=4)),
        recipe.with_(values=recipe.values.with_(bits=4)),
        recipe.with_(windows=7),
        recipe.with_(window=512),
        recipe.with_(keep_out="ro_vs_nr"),
        recipe.with_(head_block=8),
        recipe.with_(mlp_block=8),
        *(recipe.with_(sample=sample) for sample in (0, 1)),
        *(recipe.with_(jitter=seed) for seed in (0, 1)),
        *(recipe.with_(weights=weights.with_(sample=sample)) for sample in (0, 1)),
        recipe.with_(rotation=rotation.with_(capture=rotation.capture.with_(sample=1))),
    ]
    found = [keys.content_key(keys.evaluation(one, SAID)) for one in (recipe, *changed)]
    assert len(set(found)) == len(found)
    assert len({one.key for one in (recipe, *changed)}) == len(found)


def test_a_method_without_a_version_is_keyed_by_its_code(monkeypatch, tmp_path):
    """So that who works on one never gets the number of another state of it."""
    file = tmp_path / "own_method.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(registry.WEIGHTS, "own", registry.Choice("own_method"))
    recipe, found = named("a"), []
    recipe = recipe.with_(weights=WeightSpec(method="own", corpus=None))
    for text in ("", "# new", "VERSION = 2", "VERSION = 2  # new", "VERSION = 1"):
        file.write_text(f"CALIBRATED = False\n{text}")
        sys.modules.pop("own_method", None)
        importlib.invalidate_caches()
        found.append(keys.content_key(keys.weights(recipe, SAID)))
    assert len({*found}) == 4 and found[2] == found[3]
    names = (registry.METHODS, registry.WEIGHTS)
    own = {name: registry.code(table, name) for table in names for name in table if name != "own"}
    assert all(isinstance(code, int) for code in own.values()), f"none is keyed by its file: {own}"


def test_a_key_is_of_plain_values_that_come_back_from_json():
    recipe = named("a")
    infinite = recipe.with_(rotation=recipe.rotation.with_(gamma=float("inf")))
    for part in (keys.identity(infinite, SAID), keys.weights(infinite, SAID)):
        assert json.loads(json.dumps(part)) == part


def test_keys_of_specs_of_two_classes_with_equal_fields_differ():
    file = RotationSpec(kind="NR")
    assert keys.identity(file, SAID)["spec"] == "RotationSpec"
    assert keys.identity(CorpusSpec(name="a"), SAID) != keys.identity(ModelSpec(source="a"), SAID)


# ---- what is keyed by what


def test_weights_are_keyed_by_the_rotated_model_and_nothing_that_comes_later():
    recipe = named("a")
    before = keys.weights(recipe, SAID)
    later = {
        "corpus": CorpusSpec(name="b"),
        "activations": QuantSpec(bits=8, scheme="asymmetric"),
        "keys": recipe.keys.with_(bits=2),
        "values": recipe.values.with_(bits=2),
        "windows": 1,
        "window": 64,
        "keep_out": "ro_vs_nr",
        "sample": 1,
    }
    for name, value in later.items():
        assert keys.weights(recipe.with_(**{name: value}), SAID) == before, name
    assert keys.weights(recipe.with_(weights=recipe.weights.with_(damping=0.5)), SAID) != before


def test_all_that_a_rotated_model_is_of_is_in_the_key_of_its_weights():
    recipe = named("a")
    changed = [
        recipe.with_(model=recipe.model.with_(source="b")),
        recipe.with_(rotation=recipe.rotation.with_(gamma=5.0)),
        recipe.with_(rotation=RotationSpec(kind="RO")),
        recipe.with_(rotation=RotationSpec(kind="RH")),
        recipe.with_(weights=recipe.weights.with_(method="rtn")),
        recipe.with_(weights=recipe.weights.with_(windows=3)),
        recipe.with_(head_block=8),
        recipe.with_(weights=recipe.weights.with_(sample=1)),
        recipe.with_(mlp_block=8),
        recipe.with_(jitter=1),
    ]
    found = [keys.content_key(keys.weights(one, SAID)) for one in (recipe, *changed)]
    assert len(set(found)) == len(found)


def test_what_is_not_calibrated_is_shared_by_all_jitters_and_calibration_samples():
    """Of one rotated model: its codes are those of the weights alone, which a jitter leaves as they are."""

    def key(recipe: Recipe) -> dict[str, object]:
        return keys.weights(recipe.canonical(), SAID)

    nearest = named("a").with_(weights=WeightSpec(method="rtn", corpus=CorpusSpec(name="a")))
    calibrated = named("a").with_(weights=WeightSpec(corpus=CorpusSpec(name="a")))
    for recipe, shared in ((nearest, True), (calibrated, False)):
        assert (key(recipe) == key(recipe.with_(jitter=1))) == shared
        assert (key(recipe) == key(recipe.with_(weights=recipe.weights.with_(sample=1)))) == shared
        assert key(recipe) == key(recipe.with_(sample=1, windows=2))


def test_a_built_model_is_another_with_another_jitter_but_not_with_other_windows():
    nearest = named("a").with_(weights=WeightSpec(method="rtn", corpus=None))
    built = [keys.built(nearest.with_(jitter=jitter), SAID) for jitter in (None, 0, 1)]
    assert len(set(map(keys.content_key, built))) == 3
    assert keys.built(nearest.with_(sample=2, windows=1), SAID) == built[0]


def test_where_nothing_is_rounded_a_jitter_is_none():
    full = recipe_of("16-16-16", rotation=RotationSpec(kind="NR"), jitter=3, sample=3)
    assert full.canonical().jitter is None and full.canonical().sample == 3
    assert recipe_of("16-4-16", jitter=3).canonical().jitter == 3


def test_mean_massive_values_bring_the_calibration_text_into_the_key():
    bare = recipe_of("16-16-16", corpus=CorpusSpec(name="a"), rotation=RotationSpec(kind="NR"))
    found = {to: keys.evaluation(bare.with_(set_massive=to), SAID) for to in (None, "zero", "mean")}
    assert "means" not in found[None] and "means" not in found["zero"]
    assert found["mean"]["means"] == "text a calibration"


def test_tasks_are_keyed_by_their_items_their_number_and_the_harness():
    recipe, found = named("a"), []
    for of in (recipe, recipe.model):
        for digests in ({"piqa": "d"}, {"piqa": "e"}):
            for limit in (None, 5):
                for version in ("1", "2"):
                    found.append(keys.content_key(keys.tasks(of, SAID, digests, limit, version)))
    assert len(set(found)) == len(found) == 16


# ---- the files of this machine


@pytest.fixture
def resolved(tmp_path: Path, text_file: Path) -> Recipe:
    """A recipe with a model, a text and a rotation in files."""
    path = tmp_path / "R1.safetensors"
    rotation_files.save(rotations.make(RotationSpec(), 64), path, None)
    return recipe_of(
        "4-4-4",
        model=save_tiny(tmp_path / "model"),
        corpus=CorpusSpec(name=str(text_file)),
        rotation=RotationSpec(kind="file", path=str(path)),
    )


def key_of(recipe: Recipe) -> str:
    return keys.content_key(keys.evaluation(door.resolved(recipe), door.prints))


def test_what_moved_is_found_again_and_what_changed_is_not(resolved, tmp_path, text_file):
    before, weights = key_of(resolved), resolved.weights
    assert weights.corpus == CALIBRATION
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "model", moved / "model")
    for file in (text_file, tmp_path / "R1.safetensors"):
        shutil.copy(file, moved / file.name)
    copied = resolved.with_(
        model=ModelSpec(source=str(moved / "model")),
        corpus=CorpusSpec(name=str(moved / text_file.name)),
        rotation=RotationSpec(kind="file", path=str(moved / "R1.safetensors")),
    )
    assert key_of(copied) == before
    rotation_files.save(rotations.make(RotationSpec(seed=1), 64), moved / "R1.safetensors", None)
    with_other_rotation = key_of(copied)
    (moved / text_file.name).write_text(text_file.read_text() + "\nother words")
    with_other_text = key_of(copied)
    save_tiny(moved / "model", seed=1)
    assert len({before, with_other_rotation, with_other_text, key_of(copied)}) == 4


def test_a_missing_file_is_named(resolved, tmp_path):
    (tmp_path / "R1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"R1\.safetensors"):
        key_of(resolved)


def test_another_version_of_the_formulas_finds_nothing(store: Store, monkeypatch: pytest.MonkeyPatch):
    inputs = keys.identity(RotationSpec(), SAID)
    store.get_or_make("any", inputs, lambda writer: writer.save_tensors("x", {"x": torch.ones(2)}))
    assert store.open("any", inputs) is not None
    monkeypatch.setattr(artefacts, "FORMULAS", keys.FORMULAS + 1)
    assert store.open("any", inputs) is None
