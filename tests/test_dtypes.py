"""Models in 16 bits, as most are published: what `auto` is, and that every step works on them."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import save_tiny, tiny_model

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.massive import numbers
from dfrot_lab.model import door, loading
from dfrot_lab.model.loading import fingerprint, load_model
from dfrot_lab.observe import errors, massive, residual
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import (
    MASSIVE_RULES,
    CaptureSpec,
    CorpusSpec,
    ModelSpec,
    Recipe,
    RefineSpec,
    RotationSpec,
    WeightSpec,
    recipe_of,
)
from dfrot_lab.rotate.dfrot import refined
from dfrot_lab.score import rows
from dfrot_lab.score.perplexity import evaluate

SHORT = ("bfloat16", "float16")
WINDOW = 64


@pytest.fixture
def short_folder(tmp_path: Path) -> ModelSpec:
    """The tiny model as a bfloat16 folder."""
    return save_tiny(tmp_path / "m", dtype=torch.bfloat16)


def capture_spec(model: ModelSpec, text: Path) -> CaptureSpec:
    return CaptureSpec(model=model, corpus=CorpusSpec(name=str(text), split="calibration"), tokens=WINDOW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_auto_is_float32_on_a_cpu_whatever_the_folder_is_in(dtype: torch.dtype, tmp_path: Path, store: Store):
    spec = save_tiny(tmp_path / "m", dtype=dtype)
    assert spec.dtype == "auto" and door.resolved(spec).dtype == "float32"
    assert (
        fingerprint(spec)
        == fingerprint(spec.with_(dtype="float32"))
        != fingerprint(spec.with_(dtype="bfloat16"))
    )
    loaded, original = load_model(spec, store), tiny_model(dtype=dtype).model.state_dict()
    for name, x in loaded.model.state_dict().items():
        assert x.dtype == torch.float32 and torch.equal(x, original[name].float()), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_auto_is_the_folder_s_own_on_a_gpu(dtype: str, tmp_path: Path):
    spec = save_tiny(tmp_path / "m", dtype=getattr(torch, dtype)).with_(device="cuda")
    assert door.resolved(spec).dtype == dtype
    assert door.resolved(spec.with_(dtype="float64")).dtype == "float64"


def test_auto_of_the_default_model_is_float32_everywhere(monkeypatch: pytest.MonkeyPatch):
    """Nothing of the model has to be there, and rows that were stored before `auto` have the same keys."""
    assert door.resolved(ModelSpec()) == ModelSpec(dtype="float32", device="cpu")
    assert door.resolved(ModelSpec(device="cuda")).dtype == "float32"
    plain = Recipe(model=ModelSpec(dtype="float32", device="cpu"), corpus=CorpusSpec(name="wikipedia-sample"))
    asked = Recipe(corpus=CorpusSpec(name="wikipedia-sample"))
    assert door.resolved(asked).canonical().key == door.resolved(plain).canonical().key
    assert rows.columns(door.resolved(asked))["parameters"] == ""
    assert rows.columns(plain.with_(model=ModelSpec(dtype="bfloat16")))["parameters"] == "dtype=bfloat16"


def test_a_16_bit_folder_gives_the_row_of_its_weights_in_float32(
    short_folder: ModelSpec, tmp_path: Path, text_file: Path, store: Store
):
    """To the bit, since `auto` computes in float32: the same numbers in two kinds of folder."""
    wide = tiny_model(dtype=torch.bfloat16)
    wide.model.float().save_pretrained(tmp_path / "wide")
    wide.tokenizer.save_pretrained(tmp_path / "wide")
    found = [
        evaluate(recipe(model, text_file, RefineSpec(capture=capture_spec(model, text_file), steps=3)), store)
        for model in (short_folder, ModelSpec(source=str(tmp_path / "wide")))
    ]
    assert found[0].losses.tolist() == found[1].losses.tolist()
    assert found[0].key != found[1].key, "they are different bytes"


def recipe(
    model: ModelSpec, text: Path, rotation: RotationSpec | RefineSpec, weights: str = "gptq"
) -> Recipe:
    corpus = CorpusSpec(name=str(text), split="calibration")
    quantizer = QuantSpec(bits=4, granularity="per_channel")
    how = WeightSpec(method=weights, quantizer=quantizer, corpus=corpus, windows=2, window=WINDOW)
    parts = {"model": model, "corpus": CorpusSpec(name=str(text)), "rotation": rotation, "windows": 2}
    return recipe_of("4-4-4", **parts, window=WINDOW).with_(weights=how)


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("weights", ["gptq", "rtn"])
def test_a_model_that_is_computed_in_16_bits_is_quantized_and_scored(
    dtype: str, weights: str, short_folder: ModelSpec, text_file: Path, store: Store
):
    """Hessians are summed in float32: in 16 bits they were not positive definite."""
    model = short_folder.with_(dtype=dtype)
    rotation = RefineSpec(capture=capture_spec(model, text_file), steps=3)
    for method in (RotationSpec(kind="RH"), rotation):
        losses = evaluate(recipe(model, text_file, method, weights), store).losses
        wanted = evaluate(recipe(short_folder, text_file, method, weights), store).losses
        assert abs(losses - wanted).max() < 0.01


@pytest.mark.parametrize("dtype", SHORT)
def test_what_is_seen_in_16_bits_is_what_is_seen_in_float32(
    dtype: str, short_folder: ModelSpec, text_file: Path, store: Store
):
    """Rows are 16 bits wide, every statistic of them float32 or wider; 8 bits of mantissa leave 1%."""
    short, wide = (capture_spec(short_folder.with_(dtype=name), text_file) for name in (dtype, "float32"))
    found, wanted = capture(short, store), capture(wide, store)
    assert found.artefact.tensors(found.sites[0])["x"].dtype == getattr(torch, dtype)
    assert found.rows(found.sites[0]).dtype == torch.float32
    one, other = errors.token_errors(found), errors.token_errors(wanted)
    pd.testing.assert_series_equal(one["massive"], other["massive"])
    same_totals = one.groupby("rotation")["error"].sum(), other.groupby("rotation")["error"].sum()
    pd.testing.assert_series_equal(*same_totals, rtol=1e-2)
    for rule in MASSIVE_RULES:
        assert torch.equal(massive.find(found, rule), massive.find(wanted, rule)), rule
    assert massive.table(found).shape == massive.table(wanted).shape
    values = errors.massive_values(found, found.sites[1], 0, errors.default_rotations(found.channels))
    assert len(values) and values["quantized"].notna().all()
    pd.testing.assert_frame_equal(
        residual.magnitudes(short, 1, store=store),
        residual.magnitudes(wide, 1, store=store),
        rtol=2e-2,
        atol=0.05,
    )
    assert len(residual.residual_profile(short, store)) == len(residual.residual_profile(wide, store))
    assert refined(RefineSpec(capture=short, steps=3), store).R.dtype == torch.float64
    loaded = load_model(short.model, store)
    assert numbers.look(loaded, torch.arange(20)).profile["median"].gt(0).all()
    assert residual.mean_massive(loaded, torch.arange(20)[None]).dtype == torch.float64


def test_a_config_that_names_no_dtype_is_computed_in_float32_on_a_gpu(tmp_path: Path):
    spec = save_tiny(tmp_path / "m").with_(device="cuda")
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float32",', ""))
    assert loading.placed(spec).dtype == "float32"
