"""Models load from every kind of place, are named by their bytes, and are refused with the reason."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from again import assert_near
from conftest import CHANNELS, CONTEXT, FAMILIES, LAYERS, save_tiny, tiny_model
from gguf_writer import to_interleaved, write_gguf
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from dfrot_lab.disk import downloads
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import rotations
from dfrot_lab.model import door, families, loading, shapes, surgery
from dfrot_lab.model.families import roles_of
from dfrot_lab.model.loading import LoadedModel, check_tokens, fingerprint, load_model, resolve
from dfrot_lab.recipe.keys import model_key
from dfrot_lab.recipe.specs import DTYPES, ModelSpec, RotationSpec

SUPPORTED = "Supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TINY_KV = {**TINY, "num_key_value_heads": 1, "head_dim": 8}

REFUSED = {
    "gpt2": (
        {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2},
        "GPT2LMHeadModel cannot be rotated.*linears are stored transposed",
    ),
    "bert": (TINY, "BertForMaskedLM has no head for next tokens"),
    "stablelm": (TINY, "StableLmForCausalLM is not in the table of roles"),
}


def same_weights(a: LoadedModel, b: LoadedModel) -> bool:
    """Whether two models hold the same tensors, to the bit."""
    one, other = a.model.state_dict(), b.model.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_every_family_loads_as_it_was_saved(
    family: str, tied: bool, tmp_path: Path, store: Store
):
    spec = save_tiny(tmp_path / "m", family, tied=tied)
    loaded = load_model(spec, store)
    assert same_weights(loaded, tiny_model(family, tied=tied))
    assert type(loaded.model).__name__ == FAMILIES[family] and not loaded.model.training
    assert (loaded.channels, len(loaded.layers), loaded.context) == (CHANNELS, LAYERS, CONTEXT)
    assert loaded.spec == door.resolved(spec) and loaded.fingerprint == fingerprint(spec)
    assert loaded.provenance == f"folder {tmp_path / 'm'}"
    assert loaded.tokenizer.decode(loaded.tokenizer("two words\n").input_ids) == "two words\n"
    assert not list(tmp_path.glob("store/*/*")), "a folder is not copied"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_roles_name_every_parameter_that_the_residual_stream_meets(family: str):
    """What no role names is a bias, a QK gain, or part of q and k, which R1 meets through the table's
    `feeds`.
    """
    loaded = tiny_model(family)
    roles = loaded.roles
    inner = {*roles.linears(loaded.layers[0]), *(norm for _, norm, _ in roles.feeds)}
    named = {
        roles.embedding,
        roles.final_norm,
        roles.lm_head,
        *(f"{roles.layers}.{i}.{part}" for i in range(LAYERS) for part in inner),
    }
    owners = {name.rsplit(".", 1)[0] for name, _ in loaded.model.named_parameters()}
    assert named <= owners
    assert {name.rsplit(".", 1)[-1] for name in owners - named} == (
        {"q_norm", "k_norm"} if family == "qwen3" else set()
    )
    assert roles.linears(loaded.layers[0]) == tuple(
        name for name, part in loaded.layers[0].named_modules() if isinstance(part, torch.nn.Linear)
    )
    assert loading.body(loaded).get_submodule("layers") is loaded.layers


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_is_what_the_spec_says(dtype: str, tiny_spec: ModelSpec, store: Store):
    loaded = load_model(tiny_spec.with_(dtype=dtype), store)
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}


def test_the_fingerprint_is_of_bytes_and_dtype(tmp_path: Path):
    spec, copy = save_tiny(tmp_path / "a"), save_tiny(tmp_path / "b")
    assert fingerprint(spec) == fingerprint(copy), "it does not depend on where the model lies"
    assert len({fingerprint(spec.with_(dtype=dtype)) for dtype in DTYPES}) == len(DTYPES)
    weights = Path(copy.source) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(spec) != fingerprint(copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_the_fingerprint_changes_with_the_files_beside_the_weights(name: str, tmp_path: Path):
    """Another tokenizer cuts the same text into other tokens, so that nothing computed with the first may be
    used.
    """
    spec = save_tiny(tmp_path / "m")
    before = fingerprint(spec)
    file = tmp_path / "m" / name
    file.write_text(file.read_text().replace("{", '{"a_new_field": 1,', 1))
    assert fingerprint(spec) != before


@pytest.mark.parametrize("model_type", REFUSED)
def test_architectures_that_rotation_would_change_are_refused_with_the_reason(
    model_type: str, tmp_path: Path, store: Store
):
    options, reason = REFUSED[model_type]
    auto = AutoModelForMaskedLM if model_type == "bert" else AutoModelForCausalLM
    auto.from_config(AutoConfig.for_model(model_type, **options)).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=f"^{reason}.*{SUPPORTED}"):
        load_model(ModelSpec(source=str(tmp_path / "m")), store)


@pytest.mark.parametrize("architecture", families.REFUSED)
def test_every_refusal_gives_a_reason(architecture: str):
    with pytest.raises(ValueError, match=f"^{architecture} cannot be rotated here without changing it: it"):
        roles_of(architecture)


def test_a_config_without_architectures_is_known_by_its_type(tmp_path: Path, store: Store):
    """Saved by hand, a Llama's config may not name its class: it is a decoder all the same."""
    spec = save_tiny(tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(
        json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "architectures"})
    )
    assert load_model(spec, store).roles == families.FAMILIES["LlamaForCausalLM"]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_weights_or_config_is_refused(missing: str, tmp_path: Path, store: Store):
    spec = save_tiny(tmp_path / "m")
    (tmp_path / "m" / missing).unlink()
    message = rf"ModelSpec\.source must be a folder with config\.json and \*\.safetensors weights; got {re.escape(spec.source)} without them"
    with pytest.raises(ValueError, match=message):
        load_model(spec, store)


@pytest.mark.parametrize("size", [-1000, 100, 4, 0], ids=["data cut", "header cut", "4 bytes", "empty"])
def test_weights_cut_short_are_refused_by_name(size: int, tmp_path: Path, store: Store):
    spec = save_tiny(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ValueError, match=re.escape(spec.source)):
        load_model(spec, store)


def test_weights_that_lack_a_tensor_are_refused_by_its_name(tmp_path: Path, store: Store):
    """transformers fills the gap with random numbers and a report on the terminal: results of such a model
    would mean nothing.
    """
    spec = save_tiny(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        load_model(spec, store)


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: Path, store: Store):
    spec = save_tiny(tmp_path / "m")
    for file in (tmp_path / "m").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(
        ValueError, match=f"(?s)tokenizer.*{re.escape(spec.source)}|{re.escape(spec.source)}.*tokenizer"
    ):
        load_model(spec, store)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("smollm3", None),
        ("meta-llama/Llama-2-7b-hf", "For a model on the hub say hub:meta-llama/Llama-2-7b-hf."),
        ("/no/such/folder", None),
        ("no-such-file.gguf", None),
        (
            "tiny@f96e104cfc96",
            "A name with @ and a hash stands for a file or folder of one's own: say where it lies.",
        ),
        ("tiny@home", None),
    ],
)
def test_an_unknown_source_is_refused_and_only_a_hub_s_form_is_hinted_at(
    source: str, hint: str | None, store: Store
):
    rule = rf"^ModelSpec\.source must be smollm2-135m, qwen2\.5-coder-0\.5b, a folder, a \.gguf file or hub:owner/name; got '{source}', which is none of them\."
    with pytest.raises(ValueError, match=rule + (f" {re.escape(hint)}$" if hint else "$")):
        load_model(ModelSpec(source=source), store)


def test_a_hub_without_network_is_a_clear_os_error(tmp_path: Path):
    code = """
from dfrot_lab import ModelSpec, load_model
try:
    load_model(ModelSpec(source="hub:nobody/nothing"))
except OSError as error:
    print(error)
"""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "DFROT_LAB_CACHE": str(tmp_path / "cache"),
    }
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert told.startswith("cannot read hub:nobody/nothing from the hub (")
    assert told.rstrip().endswith("Check the network and the name, or give a local folder.")


def test_a_model_of_the_hub_loads_from_its_cache_and_is_named_by_its_commit(tmp_path: Path):
    """As a download leaves it: refs say which commit `main` is, snapshots hold a commit's files."""
    cached = tmp_path / "hub" / "models--me--tiny"
    for seed, commit in enumerate(("1" * 40, "2" * 40)):
        save_tiny(cached / "snapshots" / commit, seed=seed)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1" * 40)
    code = """
from dfrot_lab import ModelSpec, load_model
from dfrot_lab.model.loading import fingerprint
spec = ModelSpec(source="hub:me/tiny")
print(load_model(spec).fingerprint == fingerprint(spec) != fingerprint(spec.with_(revision="2" * 40)))
print(load_model(spec).provenance, load_model(spec).family)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert told.splitlines() == ["True", "hub me/tiny LlamaForCausalLM"]


def test_a_new_family_is_one_entry_in_the_table(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
):
    """Granite is a Llama whose embedding, residual branches and logits have multipliers."""
    torch.manual_seed(0)
    sizes = {**TINY_KV, "vocab_size": 256}
    config = AutoConfig.for_model("granite", **sizes, embedding_multiplier=3.0, residual_multiplier=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    tiny_model().tokenizer.save_pretrained(tmp_path / "m")
    spec = ModelSpec(source=str(tmp_path / "m"), dtype="float64")
    monkeypatch.delitem(families.FAMILIES, "GraniteForCausalLM")
    with pytest.raises(ValueError, match="GraniteForCausalLM is not in the table of roles"):
        load_model(spec, store)
    monkeypatch.setitem(families.FAMILIES, "GraniteForCausalLM", families.Roles())
    loaded = load_model(spec, store)
    assert loaded.family == "GraniteForCausalLM"
    ids = torch.arange(40)[None]
    wanted = loaded.model(ids).logits
    surgery.prepare(loaded)
    surgery.rotate_residual(loaded, rotations.make(RotationSpec(kind="RO"), loaded.channels))
    surgery.rotate_heads(loaded)
    assert not torch.equal(loaded.model(ids).logits, wanted)
    torch.testing.assert_close(loaded.model(ids).logits, wanted, rtol=1e-6, atol=1e-6)


def test_a_folder_and_the_packaged_model_are_told_apart(tiny_spec: ModelSpec):
    assert resolve(tiny_spec)[:2] == ("folder", Path(tiny_spec.source))
    for name, file in downloads.MODELS.items():  # named by the bytes it has, wherever that is known
        assert resolve(ModelSpec(source=name)) == ("packaged", name)
        assert fingerprint(ModelSpec(source=name)) == model_key(file.sha256[:32], "float32", "cpu")


@pytest.mark.parametrize("window", [CONTEXT, CONTEXT + 1])
def test_a_window_is_limited_by_the_context(window: int):
    loaded = tiny_model()
    if window <= CONTEXT:
        check_tokens(loaded, window)
    else:
        with pytest.raises(
            ValueError, match="window must be at most the model's context of 128 tokens; got 129"
        ):
            check_tokens(loaded, window)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_gguf_file_is_dequantised_once_to_the_same_weights(
    tied: bool, tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
):
    original = tiny_model("llama", tied=tied)
    write_gguf(tmp_path / "tiny.gguf", original)
    spec = ModelSpec(source=str(tmp_path / "tiny.gguf"))
    with caplog.at_level(logging.INFO, logger="dfrot_lab"):
        first, second = load_model(spec, store), load_model(spec, store)
    assert caplog.text.count("dequantising tiny.gguf") == 1
    assert same_weights(first, original) and same_weights(second, original)
    assert first.provenance == second.provenance == "dequantised F32 of tiny.gguf"
    assert first.fingerprint == fingerprint(spec)
    assert second.tokenizer("ab c\n").input_ids == original.tokenizer("ab c\n").input_ids
    ids = torch.arange(40)[None]
    assert_near(first.model(ids).logits, original.model(ids).logits)  # the config came over too


@pytest.mark.model
@pytest.mark.parametrize("size", [1000, 2_000_000, -4096])
def test_the_default_model_s_file_cut_short_is_refused(size: int, tmp_path: Path, store: Store):
    path = tmp_path / "short.gguf"
    path.write_bytes(downloads.fetch(downloads.SMOLLM2_GGUF).read_bytes()[:size])
    with pytest.raises(ValueError, match=r"short\.gguf is truncated"):
        load_model(ModelSpec(source=str(path)), store)
    assert not store.list()


@pytest.mark.model
def test_the_default_model_is_what_the_design_says(default_model: LoadedModel):
    assert (default_model.channels, len(default_model.layers), default_model.context) == (576, 30, 2048 * 4)
    config = default_model.model.config
    assert (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
    ) == (9, 3, 1536, 49152)
    assert (
        config.tie_word_embeddings
        and default_model.model.lm_head.weight is default_model.model.model.embed_tokens.weight
    )
    assert default_model.provenance == "dequantised Q4_1/Q8_0 of SmolLM2-135M-Instruct.Q4_1.gguf"
    assert default_model.fingerprint == fingerprint(ModelSpec())
    assert default_model.tokenizer.decode(default_model.tokenizer("Hello, world").input_ids) == "Hello, world"


@pytest.mark.model
def test_the_default_model_is_converted_once(
    default_model: LoadedModel, default_store: Store, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="dfrot_lab"):
        again = load_model(ModelSpec(), default_store)
    assert "dequantising" not in caplog.text
    assert same_weights(default_model, again)


@pytest.mark.model
def test_the_default_model_s_weights_are_gguf_s_own_values(default_model: LoadedModel):
    """llama.cpp interleaves the rows of q and k for its RoPE; the rest is stored as it is."""
    stored = {
        tensor.name: tensor for tensor in gguf.GGUFReader(downloads.fetch(downloads.SMOLLM2_GGUF)).tensors
    }

    def values(name: str, kind: str) -> np.ndarray:
        assert stored[name].tensor_type.name == kind
        return gguf.dequantize(stored[name].data, stored[name].tensor_type)

    state = default_model.model.state_dict()
    assert np.array_equal(state["model.embed_tokens.weight"].numpy(), values("token_embd.weight", "Q8_0"))
    assert np.array_equal(
        state["model.layers.3.mlp.down_proj.weight"].numpy(), values("blk.3.ffn_down.weight", "Q4_1")
    )
    for part in "qk":
        weight = state[f"model.layers.29.self_attn.{part}_proj.weight"].numpy()
        assert np.array_equal(to_interleaved(weight, 64), values(f"blk.29.attn_{part}.weight", "Q4_1"))
        assert not np.array_equal(weight, values(f"blk.29.attn_{part}.weight", "Q4_1"))


QUANTIZED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "hqq": {"quant_method": "hqq", "quant_config": {}},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    "auto-round": {"quant_method": "auto-round", "bits": 4},
    "quark": {"quant_method": "quark"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "int-quantized"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "a method it does not name": {"bits": 4},
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_a_folder_that_is_already_quantized_is_refused_before_work(method: str, tmp_path: Path, store: Store):
    """Weights that cannot be read are never reached."""
    spec = save_tiny(tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "quantization_config": QUANTIZED[method]})
    )
    (tmp_path / "m" / "model.safetensors").write_bytes(b"no weights")
    rule = rf"^{re.escape(spec.source)} is already quantized, by {method}(, .*)?: use the unquantized model$"
    for look in (lambda: load_model(spec, store), lambda: shapes.shape(spec)):
        with pytest.raises(ValueError, match=rule):
            look()
