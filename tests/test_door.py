"""What a spec leaves open is said once, at the door: the corpus, and the device of every model in it."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dfrot_lab.model import corpus, loading
from dfrot_lab.model.door import resolved
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec, Recipe, RefineSpec, WeightSpec


@dataclass(frozen=True, kw_only=True)
class Placed(ModelSpec):
    """A model that says where it runs."""

    device: str = "auto"


def recipe(**model: str) -> Recipe:
    placed = Placed(**model)
    return Recipe(model=placed, rotation=RefineSpec(capture=CaptureSpec(model=placed)))


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(corpus.DATA_FOLDER, raising=False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_nested_model_and_corpus_is_said(device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(loading.DEVICE, device)
    found = resolved(recipe())
    assert found.model.device == found.rotation.capture.model.device == device
    specs = (found.corpus, found.weights.corpus, found.rotation.capture.corpus)
    assert {(spec.name, spec.split) for spec in specs} == {
        ("wikipedia-sample", "evaluation"), ("wikipedia-sample", "calibration"),
    }  # fmt: skip
    assert found.with_(
        model=recipe().model, corpus=CorpusSpec(), rotation=recipe().rotation, weights=WeightSpec()
    ) == (recipe()), "nothing else changed"


def test_a_resolved_spec_comes_back_as_it_is_whatever_changes_later(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(loading.DEVICE, "cpu")
    found = resolved(recipe())
    monkeypatch.setenv(loading.DEVICE, "cuda")
    assert resolved(found) is found


def test_what_is_said_stays(monkeypatch: pytest.MonkeyPatch, text_file: Path):
    monkeypatch.setenv(loading.DEVICE, "cuda")
    spec = CaptureSpec(model=Placed(device="cpu"), corpus=CorpusSpec(name=str(text_file)))
    assert resolved(spec) is spec


def test_an_unknown_corpus_is_refused_at_the_door():
    with pytest.raises(ValueError, match=r"CorpusSpec.name must be auto, .*; got 'nowhere'"):
        resolved(Recipe(corpus=CorpusSpec(name="nowhere")))


def test_a_spec_s_own_device_goes_before_the_environment_s(
    monkeypatch: pytest.MonkeyPatch, tiny_spec: ModelSpec
):
    keys = {}
    for device in ("auto", "cpu", "cuda"):
        keys[device] = loading.fingerprint(Placed(source=tiny_spec.source, device=device))
    assert keys["auto"] == keys["cpu"] == loading.fingerprint(tiny_spec) != keys["cuda"]
    monkeypatch.setenv(loading.DEVICE, "cuda")
    assert loading.fingerprint(Placed(source=tiny_spec.source)) == keys["cuda"]
    loaded = loading.load_model(Placed(source=tiny_spec.source, device="cpu"))
    assert loaded.device.type == "cpu" and loaded.fingerprint == keys["cpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_spec_that_wants_a_gpu_is_refused_where_there_is_none(tiny_spec: ModelSpec):
    with pytest.raises(
        ValueError, match=r"ModelSpec.device must be cpu or auto where torch sees no GPU; got cuda"
    ):
        loading.load_model(Placed(source=tiny_spec.source, device="cuda"))
