"""What a spec leaves open is said once, at the door: the corpus, and the device of every model in it."""

from pathlib import Path

import pytest
import torch

from dfrot_lab.model import corpus, door, loading
from dfrot_lab.model.door import resolved
from dfrot_lab.recipe.base import Spec
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
)

OPEN = [
    Recipe(),
    Recipe(rotation=RefineSpec()),
    Recipe(weights=WeightSpec(corpus=None)),
    RefineSpec(),
    CaptureSpec(),
    WeightSpec(),
    ModelSpec(),
    CorpusSpec(),
]
CLOSED = [QuantSpec(), RotationSpec(), WeightSpec(corpus=None), ModelSpec(device="cpu", dtype="float32")]


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(corpus.DATA_FOLDER, raising=False)


def autos(spec: Spec) -> list[str]:
    """The fields that say `auto`, at any depth."""
    inner = [name for _, value in spec if isinstance(value, Spec) for name in autos(value)]
    return [name for name, value in spec if value == "auto"] + inner


@pytest.mark.parametrize("spec", OPEN, ids=lambda spec: type(spec).__name__)
def test_no_auto_is_left_and_what_is_resolved_comes_back_as_it_is(spec: Spec):
    assert autos(spec)
    found = resolved(spec)
    assert type(found) is type(spec) and not autos(found)
    assert resolved(found) is found


@pytest.mark.parametrize("spec", CLOSED, ids=lambda spec: type(spec).__name__)
def test_what_leaves_nothing_open_comes_back_as_it_is(spec: Spec):
    assert resolved(spec) is spec


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_nested_model_and_corpus_is_said(device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(loading.DEVICE, device)
    recipe = Recipe(rotation=RefineSpec())
    found = resolved(recipe)
    assert found.model.device == found.rotation.capture.model.device == device
    assert found.corpus == CorpusSpec(name="wikipedia-sample")
    half = CALIBRATION.with_(name="wikipedia-sample")
    assert found.weights.corpus == found.rotation.capture.corpus == half
    changed = ("model", "corpus", "rotation", "weights")
    assert found.with_(**{name: getattr(recipe, name) for name in changed}) == recipe, "nothing else changed"


def test_a_resolved_spec_comes_back_as_it_is_whatever_changes_later(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(loading.DEVICE, "cpu")
    found = resolved(Recipe())
    monkeypatch.setenv(loading.DEVICE, "cuda")
    assert resolved(found) is found


def test_what_is_said_stays(monkeypatch: pytest.MonkeyPatch, text_file: Path):
    monkeypatch.setenv(loading.DEVICE, "cuda")
    spec = CaptureSpec(
        model=ModelSpec(device="cpu", dtype="bfloat16"), corpus=CorpusSpec(name=str(text_file))
    )
    assert resolved(spec) is spec


def test_what_is_not_here_is_refused_at_the_door(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"CorpusSpec.name must be auto, .*; got 'nowhere'"):
        resolved(Recipe(corpus=CorpusSpec(name="nowhere")))
    monkeypatch.setenv(loading.DEVICE, "tpu")
    with pytest.raises(ValueError, match="must be auto, cpu or cuda; got 'tpu'"):
        resolved(CaptureSpec())


def test_a_spec_s_own_device_goes_before_the_environment_s(
    monkeypatch: pytest.MonkeyPatch, tiny_spec: ModelSpec
):
    keys = {}
    for device in ("auto", "cpu", "cuda"):
        keys[device] = loading.fingerprint(tiny_spec.with_(device=device))
    assert keys["auto"] == keys["cpu"] == loading.fingerprint(tiny_spec) != keys["cuda"]
    monkeypatch.setenv(loading.DEVICE, "cuda")
    assert loading.fingerprint(tiny_spec) == keys["cuda"]
    loaded = loading.load_model(tiny_spec.with_(device="cpu"))
    assert loaded.device.type == "cpu" and loaded.fingerprint == keys["cpu"]


def test_a_loaded_models_spec_is_resolved(tiny_spec: ModelSpec):
    assert tiny_spec.device == tiny_spec.dtype == "auto"
    loaded = loading.load_model(tiny_spec)
    assert loaded.spec == resolved(tiny_spec) == tiny_spec.with_(device="cpu", dtype="float32")
    assert loaded.fingerprint == door.prints(loaded.spec) == door.prints(tiny_spec)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_spec_that_wants_a_gpu_is_refused_where_there_is_none(tiny_spec: ModelSpec):
    with pytest.raises(
        ValueError,
        match=r"ModelSpec.device and DFROT_LAB_DEVICE must be cpu or auto where torch sees no GPU; got cuda",
    ):
        loading.load_model(tiny_spec.with_(device="cuda"))
