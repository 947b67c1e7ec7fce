"""A model read layer by layer is the model kept in memory: the same activations, weights, losses, gradients and
task scores, in the memory of a layer; a killed walk goes on where it was.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, LAYERS, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import rotations
from dfrot_lab.model import checkpoint, loading, stream, surgery
from dfrot_lab.model.checkpoint import EMBEDDING, HEAD
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec, Recipe, RotationSpec, recipe_of
from dfrot_lab.rotate import transforms
from dfrot_lab.score import perplexity
from dfrot_lab.weights import run

TOKENS = 32


def folder_of(path: Path, family: str = "llama", *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model as a folder, in two shards or more."""
    loaded = tiny_model(family, tied=tied)
    loaded.model.to(dtype).save_pretrained(path, max_shard_size="50KB")
    loaded.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 256, (3, TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch):
    """Loads a folder to be read layer by layer."""

    def load(folder: Path) -> LoadedModel:
        with monkeypatch.context() as patch:
            patch.setenv(checkpoint.MEMORY, "0")
            return loading.load_model(ModelSpec(source=str(folder)))

    return load


def kept(folder: Path) -> LoadedModel:
    return loading.load_model(ModelSpec(source=str(folder)))


def logits_of(loaded: LoadedModel, ids: Tensor) -> Tensor:
    hidden = stream.through(loaded, ids.split(1))
    with stream.part(loaded, HEAD), torch.no_grad():
        return torch.cat([stream.logits(loaded, x) for x in hidden])


def is_empty(loaded: LoadedModel) -> bool:
    return all(x.is_meta for x in loaded.model.parameters())


# ---- the walk


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_model_is_the_kept_one_through_every_step(family, tied, tmp_path, streamed, ids):
    folder = folder_of(tmp_path / "m", family, tied=tied)
    one, other = streamed(folder), kept(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1 and is_empty(one)
    plain = other.model(ids).logits
    assert torch.equal(logits_of(one, ids), plain) and torch.equal(logits_of(other, ids), plain)
    for loaded in (one, other):
        surgery.prepare(loaded)
        surgery.rotate_residual(loaded, rotations.make(RotationSpec(kind="RO"), loaded.channels))
        surgery.fold_gains(loaded, {"layers.1.input_norm": torch.linspace(0.5, 2, loaded.channels)})
        surgery.rotate_heads(loaded)
        surgery.rotate_down(loaded)
    with surgery.online(one, r3=True, r4=True), surgery.online(other, r3=True, r4=True):
        found = logits_of(one, ids)
        assert torch.equal(found, other.model(ids).logits)
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))
    assert is_empty(one)


def test_only_the_part_in_use_has_weights(tmp_path, streamed, ids):
    loaded = streamed(folder_of(tmp_path / "m"))
    for which in (EMBEDDING, 0, LAYERS - 1, HEAD):
        with stream.part(loaded, which):
            filled = {checkpoint.part_of(name, loaded.roles) for name, x in loaded.model.named_parameters() if not x.is_meta}
            assert filled == {which}
        assert is_empty(loaded)
    with pytest.raises(KeyError), stream.part(loaded, 1):
        raise KeyError("what went wrong there")
    assert is_empty(loaded)


def test_a_sixteen_bit_folder_is_computed_in_float32(tmp_path, streamed, ids):
    folder = folder_of(tmp_path / "m", dtype=torch.bfloat16)
    found = logits_of(streamed(folder), ids)
    assert found.dtype == torch.float32 and torch.equal(found, kept(folder).model(ids).logits)


def test_windows_of_several_lengths_walk_together(tmp_path, streamed, ids):
    folder = folder_of(tmp_path / "m")
    texts = [ids[:2], ids[2:, :7], ids[:1, 3:10]]
    one, other = streamed(folder), kept(folder)
    hidden = stream.through(one, texts)
    with stream.part(one, HEAD), torch.no_grad():
        for x, text in zip(hidden, texts, strict=True):
            torch.testing.assert_close(stream.logits(one, x), other.model(text).logits)


# ---- what a file holds


def changed(folder: Path, name: str, tensor: Tensor | None) -> None:
    """The folder's weights in one file, with one tensor replaced, or without it."""
    tensors: dict[str, Tensor] = {}
    for path in checkpoint.files_of(folder):
        tensors |= {key: value.clone() for key, value in load_file(path).items()}
        path.unlink()
    (folder / checkpoint.INDEX).unlink()
    tensors = {key: value for key, value in (tensors | {name: tensor}).items() if value is not None}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("model.layers.0.self_attn.q_proj.bias", torch.zeros(64), "hold model.layers.0.self_attn.q_proj.bias"),
        ("model.layers.2.input_layernorm.weight", torch.ones(64), "hold model.layers.2.input_layernorm.weight"),
        ("model.layers.1.mlp.up_proj.weight", None, "lack 1 tensors, the first model.layers.1.mlp.up_proj.weight"),
        ("model.norm.weight", None, "lack 1 tensors, the first model.norm.weight"),
        ("lm_head.weight", None, "lack 1 tensors, the first lm_head.weight"),
    ],
)
def test_a_folder_that_is_not_its_config_is_refused_before_work(name, tensor, said, tmp_path, streamed):
    folder = folder_of(tmp_path / "m")
    changed(folder, name, tensor)
    for load in (streamed, kept):
        with pytest.raises(ValueError, match=said) as error:
            load(folder)
        assert str(folder) in str(error.value)


def test_old_buffers_are_no_weights(tmp_path, streamed, ids):
    folder = folder_of(tmp_path / "m")
    expected = kept(folder).model(ids).logits
    changed(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8))
    assert torch.equal(logits_of(streamed(folder), ids), expected)
    assert torch.equal(kept(folder).model(ids).logits, expected)
