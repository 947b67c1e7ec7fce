"""Where models run: said by one variable, kept apart in the store, and on a GPU the same to rounding."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import door, loading
from dfrot_lab.observe import residual
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.keys import content_key
from dfrot_lab.recipe.specs import (
    CaptureSpec,
    CorpusSpec,
    ModelSpec,
    Recipe,
    RefineSpec,
    RotationSpec,
    recipe_of,
)
from dfrot_lab.rotate.dfrot import refined
from dfrot_lab.score import perplexity

with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BITS_AND_WEIGHTS = (("16-16-16", "rtn"), ("16-4-16", "rtn"), ("4-4-16", "rtn"), ("4-4-4", "gptq"))


def row(model: ModelSpec, text: Path, bits: str, weights: str, **fields: object) -> Recipe:
    spec = recipe_of(
        bits, weights=weights, model=model, corpus=CorpusSpec(name=str(text)), windows=3, window=64
    )
    calibration = CorpusSpec(name=str(text), split="calibration")
    return spec.with_(
        **{
            "rotation": RotationSpec(kind="RH"),
            "weights": spec.weights.with_(corpus=calibration, windows=2, window=64),
            **fields,
        }
    )


def test_an_unknown_device_is_refused_with_the_choices(monkeypatch):
    monkeypatch.setenv(loading.DEVICE, "gpu")
    with pytest.raises(ValueError, match="DFROT_LAB_DEVICE must be auto, cpu or cuda; got 'gpu'"):
        loading.device()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(monkeypatch, tiny_spec):
    monkeypatch.setenv(loading.DEVICE, "auto")
    assert loading.device() == "cpu" and loading.load_model(tiny_spec).device.type == "cpu"
    monkeypatch.setenv(loading.DEVICE, "cuda")
    with pytest.raises(
        ValueError,
        match=r"ModelSpec\.device and DFROT_LAB_DEVICE must be cpu or auto where torch sees no GPU; got cuda",
    ):
        loading.load_model(tiny_spec)


def test_rows_of_two_devices_never_share_a_key_and_can_be_read_without_the_device(
    monkeypatch, tiny_spec, text_file, store
):
    recipe, found = row(tiny_spec, text_file, "4-4-16", "rtn"), {}
    for device in ("cpu", "cuda"):
        monkeypatch.setenv(loading.DEVICE, device)
        found[device] = door.resolved(recipe).canonical()
        assert found[device].model.device == device
        said = recipe.with_(model=tiny_spec.with_(device=device))
        assert door.resolved(said).canonical() == found[device], "said or found out, it is one device"
        assert perplexity.stored(recipe, store) is None
    ours = [keys.evaluation(each, door.prints) for each in found.values()]
    assert content_key(ours[0]) != content_key(ours[1]) and found["cpu"].key != found["cuda"].key
    for each in ours:  # but for the model's bytes and device they are the same
        each["recipe"]["model"] = None
    assert ours[0] == ours[1]


def on_both(monkeypatch, work, folder: Path):
    found = []
    for device in ("cpu", "cuda"):
        monkeypatch.setenv(loading.DEVICE, device)
        found.append(work(Store(folder / device)))
    return found


@with_gpu
@pytest.mark.parametrize(("bits", "weights"), BITS_AND_WEIGHTS)
@pytest.mark.parametrize(
    "fields", [{}, {"keep_out": "nr_error_9.5"}, {"keep_out": "random", "keep_out_tokens": 3}]
)
def test_a_gpu_gives_the_losses_of_the_cpu(
    monkeypatch, tmp_path, tiny_spec, text_file, bits, weights, fields
):
    if "keep_out" in fields and bits == "16-16-16":
        pytest.skip("nothing is quantized, so nothing is kept out")
    spec = row(tiny_spec, text_file, bits, weights, **fields)
    cpu, gpu = on_both(monkeypatch, lambda store: perplexity.evaluate(spec, store), tmp_path)
    assert np.allclose(cpu.losses, gpu.losses, rtol=1e-4 if bits == "16-16-16" else 0.05), (
        cpu.losses,
        gpu.losses,
    )


@with_gpu
@pytest.mark.parametrize("to", ["zero", "mean"])
def test_a_gpu_sets_massive_values_as_the_cpu_does(monkeypatch, tmp_path, tiny_spec, text_file, to):
    spec = row(tiny_spec, text_file, "16-16-16", "rtn", rotation=RotationSpec(kind="NR"), set_massive=to)
    cpu, gpu = on_both(monkeypatch, lambda store: perplexity.evaluate(spec, store), tmp_path)
    assert np.allclose(cpu.losses, gpu.losses, rtol=1e-4)


@with_gpu
@pytest.mark.parametrize("variant", ["accelerated", "as_paper", "as_released"])
def test_a_gpu_refines_as_the_cpu_does(monkeypatch, tmp_path, tiny_spec, text_file, variant):
    corpus = CorpusSpec(name=str(text_file), split="calibration")
    spec = RefineSpec(
        capture=CaptureSpec(model=tiny_spec, corpus=corpus, tokens=128),
        init=RotationSpec(kind="RH"),
        steps=40,
        variant=variant,
    )
    cpu, gpu = on_both(monkeypatch, lambda store: refined(spec, store), tmp_path)
    assert gpu.R.device.type == "cpu" and gpu.R.dtype == torch.float64
    assert cpu.history["objective"].iloc[0] == pytest.approx(gpu.history["objective"].iloc[0], rel=1e-3)
    if variant != "as_released":  # whose sign flips make it another run after the first rounding that differs
        assert cpu.history["best"].iloc[-1] == pytest.approx(gpu.history["best"].iloc[-1], rel=0.1)


@with_gpu
def test_a_gpu_captures_what_the_cpu_captures(monkeypatch, tmp_path, tiny_spec, text_file):
    spec = CaptureSpec(
        model=tiny_spec, corpus=CorpusSpec(name=str(text_file), split="calibration"), tokens=128
    )
    cpu, gpu = on_both(monkeypatch, lambda store: capture(spec, store), tmp_path)
    assert cpu.sites == gpu.sites and all(
        torch.allclose(cpu.rows(site), gpu.rows(site), atol=1e-4) for site in cpu.sites
    )
    profile = on_both(monkeypatch, lambda store: residual.residual_profile(spec, store), tmp_path)
    assert np.allclose(profile[0]["value"], profile[1]["value"], rtol=1e-3)
