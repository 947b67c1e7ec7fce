"""A model read layer by layer is the model kept in memory: the same activations, weights, losses, gradients and
task scores, in the memory of a layer; a killed walk goes on where it was.
"""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, LAYERS, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import rotations
from dfrot_lab.model import checkpoint, files, loading, stream, surgery
from dfrot_lab.model.checkpoint import EMBEDDING, HEAD
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe import residual
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec, Recipe, RotationSpec, recipe_of
from dfrot_lab.rotate import transforms
from dfrot_lab.score import build, perplexity
from dfrot_lab.weights import calibrate, gptq

TOKENS = 32


def folder_of(
    path: Path, family: str = "llama", *, tied: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
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
            filled = {
                checkpoint.part_of(name, loaded.roles)
                for name, x in loaded.model.named_parameters()
                if not x.is_meta
            }
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
    for path in files.weights_of(folder):
        tensors |= {key: value.clone() for key, value in load_file(path).items()}
        path.unlink()
    (folder / files.INDEX).unlink(missing_ok=True)
    tensors = {key: value for key, value in (tensors | {name: tensor}).items() if value is not None}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (
            "model.layers.0.self_attn.q_proj.bias",
            torch.zeros(64),
            "no place for, the first model.layers.0.self_attn.q_proj.bias",
        ),
        (
            "model.layers.2.input_layernorm.weight",
            torch.ones(64),
            "num_hidden_layers in .* must be as in the weights, 3; got 2",
        ),
        (
            "model.layers.1.mlp.up_proj.weight",
            None,
            "lack 1 tensors, the first model.layers.1.mlp.up_proj.weight",
        ),
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


@pytest.mark.parametrize("held", ["both", "embedding alone", "head alone"])
def test_tied_weights_are_taken_as_transformers_takes_them(held, tmp_path, streamed, ids):
    """Where both ends are there and differ, each keeps its own, whatever the config says."""
    folder = folder_of(tmp_path / "m", tied=True)
    embedding = next(
        load_file(path)["model.embed_tokens.weight"]
        for path in files.weights_of(folder)
        if "model.embed_tokens.weight" in load_file(path)
    )
    other = embedding.flip(0) if held == "both" else embedding
    changed(folder, "lm_head.weight", None if held == "embedding alone" else other)
    if held == "head alone":
        changed(folder, "model.embed_tokens.weight", None)
    assert torch.equal(logits_of(streamed(folder), ids), kept(folder).model(ids).logits)


def test_old_buffers_are_no_weights(tmp_path, streamed, ids):
    folder = folder_of(tmp_path / "m")
    expected = kept(folder).model(ids).logits
    changed(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8))
    assert torch.equal(logits_of(streamed(folder), ids), expected)
    assert torch.equal(kept(folder).model(ids).logits, expected)


# ---- what is computed with it


def recipe(model: Path, text: Path, bits: str = "4-4-4", **fields: object) -> Recipe:
    """A recipe of two windows of the folder's model, calibrated on four short ones of the text's other half."""
    corpus = CorpusSpec(name=str(text))
    own = {"model": ModelSpec(source=str(model)), "corpus": corpus, "windows": 2, "window": TOKENS}
    spec = recipe_of(bits, **{**own, **fields})
    short = {"corpus": corpus.with_(split="calibration"), "windows": 4, "window": TOKENS}
    return spec.with_(weights=spec.weights.with_(**short))


def looking(spec: Recipe, field: str) -> Recipe:
    """The same with a field (clips, scales) found on a window of the text's other half."""
    text = spec.corpus.with_(split="calibration")
    return spec.with_(**{field: CaptureSpec(model=spec.model, corpus=text, tokens=TOKENS)})


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model fits: each is read layer by layer."""
    monkeypatch.setenv(checkpoint.MEMORY, "0")


@pytest.mark.parametrize(
    ("bits", "weights", "fields"),
    [
        ("16-16-16", "rtn", {"rotation": RotationSpec(kind="NR"), "set_massive": "mean"}),
        ("16-4-16", "rtn", {"rotation": RotationSpec(kind="RO"), "keep_out": "nr_error_9.5"}),
        ("4-4-4", "rtn", {}),
        ("4-4-4", "gptq", {"keep_out": "most_massive", "keep_out_tokens": 2}),
        ("4-4-4", "qep", {}),
        ("4-8-3", "gptq", {"activations": QuantSpec(scheme="free", clip_ratio=0.9)}),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_recipe_has_the_same_losses_either_way(
    family, bits, weights, fields, tmp_path, text_file, monkeypatch
):
    spec = recipe(folder_of(tmp_path / "m", family), text_file, bits, weights=weights, **fields)
    expected = perplexity.evaluate(spec, Store(tmp_path / "kept"))
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    told: list[tuple[str, int, int]] = []
    found = perplexity.evaluate(spec, Store(tmp_path / "streamed"), lambda *part: told.append(part))
    assert found.losses.tolist() == expected.losses.tolist() and found.seconds > 0
    assert told[-LAYERS:] == [("layer", n + 1, LAYERS) for n in range(LAYERS)]


def test_calibration_windows_may_pass_in_several_lots(tmp_path, text_file, monkeypatch, ids):
    """Each lot stops at the group of linears that is next until all have been there."""
    spec = recipe(folder_of(tmp_path / "m"), text_file, weights="gptq")
    built = build.build(spec, Store(tmp_path / "one"))
    monkeypatch.setattr(calibrate, "CHUNK_BYTES", 1)
    hessians = []
    monkeypatch.setattr(calibrate, "hessian_of", lambda x: hessians.append(len(x)) or gptq.hessian_of(x))
    other = build.build(spec, Store(tmp_path / "lots"))
    assert hessians == [TOKENS] * (4 * 4 * LAYERS)
    for one, two in zip(built.codes, other.codes, strict=True):
        for name in one:
            turned = (one[name].codes != two[name].codes).float().mean()
            assert turned < 0.03, "sums of four Hessians round otherwise than one of all"
    with torch.no_grad():
        apart = (built.loaded.model(ids).logits - other.loaded.model(ids).logits).abs().mean()
        assert apart < 0.01 * built.loaded.model(ids).logits.abs().mean()


def test_a_capture_and_its_gradients_are_the_same_either_way(tmp_path, text_file, monkeypatch):
    model = ModelSpec(source=str(folder_of(tmp_path / "m")), device="cpu")
    corpus = CorpusSpec(name=str(text_file), split="calibration")
    spec = CaptureSpec(model=model, corpus=corpus, tokens=TOKENS)
    found = []
    for memory in ("", "0"):
        monkeypatch.setenv(checkpoint.MEMORY, memory)
        store = Store(tmp_path / f"store{memory}")
        context = transforms.Context(Recipe(model=model), store)
        squares = context.sensitivities(spec)
        found.append((capture(spec, store), squares))
        assert is_empty(context.model) == bool(memory)
    (one, squares), (two, others) = found
    assert all(torch.equal(one.rows(site), two.rows(site)) for site in one.sites)
    assert torch.equal(one.residual_max, two.residual_max)
    assert torch.equal(one.residual_median, two.residual_median) and one.sites == two.sites
    assert set(squares) == set(others) == set(one.sites)
    assert all(torch.equal(squares[site], others[site]) for site in squares)


def test_the_residual_streams_are_the_same_either_way(tmp_path, text_file, monkeypatch):
    spec = CaptureSpec(
        model=ModelSpec(source=str(folder_of(tmp_path / "m"))),
        corpus=CorpusSpec(name=str(text_file), split="calibration"),
        tokens=TOKENS,
    )
    expected = residual.residual_profile(spec, Store(tmp_path / "s"))
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    assert residual.residual_profile(spec, Store(tmp_path / "s")).equals(expected)


def test_what_needs_a_whole_model_says_so(tmp_path, small_memory):
    folder = folder_of(tmp_path / "m")
    with pytest.raises(ValueError, match=r"a model must fit into memory as a whole for this; got 0\.0 GB of"):
        loading.load_model(ModelSpec(source=str(folder)), whole=True)


@pytest.mark.parametrize("said", ["8GB", "-", "nan"])
def test_a_memory_that_is_no_number_is_refused(said, tmp_path, monkeypatch):
    monkeypatch.setenv(checkpoint.MEMORY, said)
    with pytest.raises(ValueError, match=f"DFROT_LAB_MEMORY must be a number of GB; got '{said}'"):
        kept(folder_of(tmp_path / "m"))


# ---- killed and gone on

KILLED = """
import os, signal, sys
from pathlib import Path
from dfrot_lab.model import stream
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score import build, perplexity
from dfrot_lab.disk.artefacts import Store

stream.SAVE_AFTER = 0
left = [int(sys.argv[3])]
own = stream.Walk.run
def run(walk, number, x):
    left[0] -= walk.writer is not None  # a proof's few tokens are not kept
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return own(walk, number, x)
stream.Walk.run = run
print(perplexity.evaluate(Recipe.from_yaml(Path(sys.argv[1])), Store(Path(sys.argv[2]))).losses.tolist())
"""


@pytest.mark.parametrize(
    ("weights", "steps"),
    [("rtn", 1), ("rtn", 2 * LAYERS), ("gptq", 0), ("gptq", LAYERS), ("gptq", 3 * LAYERS - 1)],
)
def test_a_killed_walk_goes_on_at_its_layer(weights, steps, tmp_path, text_file, small_memory, monkeypatch):
    spec = recipe(folder_of(tmp_path / "m"), text_file, weights=weights)
    (tmp_path / "r.yaml").write_text(spec.to_yaml())
    done: list[int] = []
    own = stream.Walk.run

    def counted(walk, number, x):
        if walk.writer is not None:
            done.append(number)
        return own(walk, number, x)

    monkeypatch.setattr(stream.Walk, "run", counted)
    expected = perplexity.evaluate(spec, Store(tmp_path / "whole")).losses.tolist()
    passes = len(done)  # of windows through layers: two are scored, and one lot calibrates
    store = tmp_path / "store"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "r.yaml"), str(store), str(steps)]
    killed = subprocess.run(command, capture_output=True).returncode
    assert killed == (-signal.SIGKILL if steps < passes else 0)
    done.clear()
    assert perplexity.evaluate(spec, Store(store)).losses.tolist() == expected
    assert len(done) <= max(0, passes - steps + 1), "a layer that was passed is not passed again"
