"""Every family in the table: a tiny random model of each whose logits stay through every step of surgery, read layer
by layer or kept; quantized end to end; refused where rotation would change it.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import rotations
from dfrot_lab.model import (
    checkpoint,
    families,
    hooks,
    loading,
    parts,
    proof,
    scales,
    shapes,
    stream,
    surgery,
)
from dfrot_lab.model.checkpoint import EMBEDDING, HEAD
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe.grids import SYM4
from dfrot_lab.recipe.specs import CorpusSpec, ModelSpec, RotationSpec, recipe_of
from dfrot_lab.score import perplexity

SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "granite": ("granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2, "logits_scaling": 4.0}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 80, "mlp_only_layers": [1]}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 32, "decoder_sparse_step": 2, "norm_topk_prob": True}),
    "qwen3_moe of experts alone": ("qwen3_moe", {**EXPERTS, "tie_word_embeddings": True}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "helium": ("helium", {"head_dim": 16}),
    "ministral": ("ministral", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "head_dim": 16}),
    "seed_oss": ("seed_oss", {"head_dim": 32, "attention_out_bias": True}),
    "ernie4_5": ("ernie4_5", {"use_bias": True, "head_dim": 16}),
    "glm": ("glm", {"head_dim": 16, "attention_bias": True}),
    "starcoder2": ("starcoder2", {"use_bias": True}),
    "gemma": ("gemma", {"head_dim": 32, "tie_word_embeddings": True}),
    "olmo": ("olmo", {}),
    "gemma2": ("gemma2", {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32}),
    "gemma3": ("gemma3_text", {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}),
    "gpt_neox one after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox, no biases in attention": ("gpt_neox", {"attention_bias": False}),
    "starcoder2, biases in norms alone": ("starcoder2", {"use_bias": False}),
    "opt, biases in norms alone": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "enable_bias": False}),
}  # fmt: skip
"""What is tested of each family: its model type, and what differs from the sizes above."""


def sizes(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    grouped = {} if kind in ("opt", "gpt_neox", "gpt2") else {"num_key_value_heads": 2}
    return {**SIZES, **grouped, **changes}


def random_model(case: str, seed: int = 0) -> torch.nn.Module:
    """A random model whose gains, biases and means are far from 1 and 0, so that a forgotten one shows."""
    kind, changes = CASES[case]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes(kind, changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed" in name:
                parameter.mul_(25).add_(0.1)
            else:
                parameter.mul_(3).add_(0.01)
    return model


def folder_of(case: str, path: Path) -> Path:
    random_model(case).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def load(folder: Path, dtype: str = "float64") -> LoadedModel:
    return loading.load_model(ModelSpec(source=str(folder), dtype=dtype))


def logits_of(loaded: LoadedModel, ids: Tensor) -> Tensor:
    hidden = stream.through(loaded, [ids])
    with stream.part(loaded, HEAD), torch.no_grad():
        return stream.logits(loaded, hidden[0])


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_every_family_of_the_table_has_a_case():
    made = {type(random_model(case)).__name__ for case in CASES}
    assert made == set(families.FAMILIES)


@pytest.mark.parametrize("memory", ["kept", "streamed"])
@pytest.mark.parametrize("case", CASES)
def test_the_logits_stay_through_every_step(case, memory, tmp_path, ids, monkeypatch):
    """Most norms work in float32 whatever the model's dtype, which alone makes 4e-7."""
    folder = folder_of(case, tmp_path / "m")
    expected = load(folder).model(ids).logits
    monkeypatch.setenv(checkpoint.MEMORY, "0" if memory == "streamed" else "")
    loaded = load(folder)
    R = rotations.make(RotationSpec(kind="RO", seed=1), loaded.channels)
    steps = {
        "plain": lambda: None,
        "untie": lambda: surgery.untie(loaded),
        "centre": lambda: surgery.centre(loaded),
        "fuse": lambda: surgery.fuse_norms(loaded),
        "R1": lambda: surgery.rotate_residual(loaded, R),
        "gains": lambda: surgery.fold_gains(
            loaded, {"layers.1.input_norm": torch.linspace(0.5, 2, loaded.channels)}
        ),
        "scales": lambda: scales.fold(loaded, scales.find(loaded, ids, SYM4)),
        "R2": lambda: surgery.rotate_heads(loaded),
    }
    if case == "olmo" or loaded.roles.online:
        del steps["gains"]
    for name, step in steps.items():
        step()
        assert apart(logits_of(loaded, ids), expected) < 1e-6, name
    surgery.rotate_down(loaded)
    with surgery.online(loaded, r3=True, r4=True):
        assert apart(logits_of(loaded, ids), expected) < 1e-6
    assert apart(logits_of(loaded, ids), expected) > 1e-3, "half of R4 is another model"


@pytest.mark.parametrize("case", ["llama 3", "qwen3_moe", "gemma"])
def test_heads_may_be_wider_than_their_share_of_the_channels(case, tmp_path, ids):
    """Halves of 32 in 16 would keep the logits too; any R2 of the whole head does, and is accepted."""
    loaded = load(folder_of(case, tmp_path / "m"))
    expected = loaded.model(ids).logits
    surgery.prepare(loaded)
    surgery.rotate_heads(loaded, rotations.make(RotationSpec(kind="RO", seed=1), 32))
    assert apart(logits_of(loaded, ids), expected) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_a_rotated_residual_stream_is_the_plain_one_times_r(case, tmp_path, ids):
    """What makes R1 more than a change that leaves the logits: every norm's output is x R."""
    plain, rotated = (load(folder_of(case, tmp_path / name)) for name in "ab")
    R = rotations.make(RotationSpec(kind="RO", seed=1), plain.channels)
    seen: list[dict[str, Tensor]] = []
    for loaded in (plain, rotated):
        surgery.prepare(loaded)
        if loaded is rotated:
            surgery.rotate_residual(loaded, R)
        seen.append({})
        with hooks.at_sites(
            loaded,
            lambda site, x: seen[-1].update({site: x.detach().clone()}),
            hooks.sites_of(loaded, *hooks.NORMS),
        ):
            loaded.model(ids)
    for site, x in seen[0].items():
        assert apart(seen[1][site], x @ R) < 1e-6, site


@pytest.mark.parametrize("case", CASES)
def test_it_is_quantized_end_to_end_either_way(case, tmp_path, text_file, monkeypatch):
    model = ModelSpec(source=str(folder_of(case, tmp_path / "m")))
    text = CorpusSpec(name=str(text_file))
    spec = recipe_of("4-4-4", model=model, corpus=text, windows=2, window=32)
    spec = spec.with_(
        weights=spec.weights.with_(windows=3, window=32, corpus=text.with_(split="calibration"))
    )
    plain = spec.with_(weights=spec.weights.with_(quantizer=spec.weights.quantizer.with_(bits=16)), activations=spec.activations.with_(bits=16),
                       keys=spec.keys.with_(bits=16), values=spec.values.with_(bits=16))  # fmt: skip
    found = perplexity.evaluate(spec, Store(tmp_path / "kept")).losses
    full = perplexity.evaluate(plain, Store(tmp_path / "kept")).losses
    assert abs(found - full).max() > 1e-4 and abs(found - full).max() < 3
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    assert perplexity.evaluate(spec, Store(tmp_path / "streamed")).losses == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_its_cost_is_counted_from_its_config(case, tmp_path):
    folder = folder_of(case, tmp_path / "m")
    shape = shapes.shape(ModelSpec(source=str(folder)))
    mlp = CASES[case][1].get("moe_intermediate_size", 96)
    assert (shape.channels, shape.layers, shape.mlp, shape.heads) == (64, 3, mlp, 4)
    assert shape.kv_heads == (4 if CASES[case][0] in ("opt", "gpt_neox") else 2)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": False}, "its norms sit after the residual add"),
        ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 32}, "its embedding is narrower than its layers"),
        ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "_remove_final_layer_norm": True}, "it has no norm after its layers"),
        ("olmo", {"clip_qkv": 8.0}, "it cuts queries, keys and values at a threshold"),
        ("cohere", {}, "CohereForCausalLM cannot be rotated here without changing it: its attention and its MLP read one norm"),
        ("gpt_oss", {}, "GptOssForCausalLM cannot be rotated here without changing it: its experts are transposed"),
        ("deepseek_v3", {}, "DeepseekV3ForCausalLM cannot be rotated here without changing it: its keys and values"),
        ("olmo3", {}, "Olmo3ForCausalLM cannot be rotated here without changing it: its post-norms"),
        ("exaone4", {}, "Exaone4ForCausalLM cannot be rotated here without changing it: its post-norms"),
        ("cohere2", {}, "Cohere2ForCausalLM cannot be rotated here without changing it: its attention and its MLP read one norm"),
        ("deepseek_v2", {}, "DeepseekV2ForCausalLM cannot be rotated here without changing it: its keys and values"),
        ("glm4", {}, "Glm4ForCausalLM cannot be rotated here without changing it: its post-norms"),
        ("gpt2", {}, "GPT2LMHeadModel cannot be rotated here without changing it"),
    ],
)  # fmt: skip
def test_what_rotation_would_change_is_refused_before_its_weights_are_read(kind, changes, said, tmp_path):
    AutoConfig.for_model(kind, **sizes(kind, changes)).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=said):
        load(tmp_path / "m")


def first_rows(config: Any) -> list[int]:
    """Where Phi-3 has its queries."""
    _, kv_heads, size = families.heads_of(config)
    return list(range(kv_heads * size))


@pytest.mark.parametrize("memory", ["", "0"])
@pytest.mark.parametrize(
    ("case", "wrong", "where"),
    [
        ("gemma", {"norm": "rms"}, "the residual stream after layer 0"),
        ("olmo", {"norm": "rms"}, "the residual stream after layer 0"),
        ("phi3", {"v_rows": first_rows}, "the residual stream after layer [01]"),
        ("opt", {"positions": None}, "the residual stream after layer 0"),
        ("granite", {"o": "self_attn.q_proj"}, "the residual stream after layer [01]"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_entry_is_found_on_the_model_itself(
    case, wrong, where, memory, dtype, tmp_path, text_file, monkeypatch
):
    """Not by a test of the family: whoever adds an entry that is wrong gets no number from it."""
    monkeypatch.setenv(checkpoint.MEMORY, memory)
    model = ModelSpec(source=str(folder_of(case, tmp_path / "m")), dtype=dtype)
    name = type(random_model(case)).__name__
    monkeypatch.setitem(families.FAMILIES, name, dataclasses.replace(families.FAMILIES[name], **wrong))
    spec = recipe_of("16-4-16", model=model, corpus=CorpusSpec(name=str(text_file)), windows=1, window=32)
    with pytest.raises(
        ValueError, match=rf"{where} must stay within 0\.0(01|3) .* got [0-9.]+: {name} is not what"
    ):
        perplexity.evaluate(spec, Store(tmp_path / "s"))


@pytest.mark.parametrize(
    ("case", "wrong"), [("phi3", {"v_rows": None}), ("granite", {"down": "self_attn.o_proj"})]
)
def test_a_wrong_entry_of_another_shape_is_refused_before_a_model_is_built(
    case, wrong, tmp_path, monkeypatch
):
    folder, name = folder_of(case, tmp_path / "m"), type(random_model(case)).__name__
    monkeypatch.setitem(families.FAMILIES, name, dataclasses.replace(families.FAMILIES[name], **wrong))
    with pytest.raises(
        ValueError, match=r"config\.json must be as in the weights, \d+; got \d+: model\.layers\.0"
    ):
        load(folder)


@pytest.mark.parametrize("memory", ["", "0"])
@pytest.mark.parametrize(("part", "where"), [(HEAD, "the logits"), (0, "the residual stream after layer 0")])
def test_a_fault_in_ordinary_tokens_is_not_hidden_by_a_massive_one(
    part, where, memory, tmp_path, monkeypatch
):
    """Of one token the stream is 10,000 times larger: of the whole, the others' error is nothing."""
    folder, ids = folder_of("llama", tmp_path / "m"), torch.arange(16)[None]
    monkeypatch.setenv(checkpoint.MEMORY, memory)
    loaded = load(folder, "float32")

    def plant(_part: int) -> None:
        loaded.model.get_submodule(loaded.roles.embedding).weight.data[0] *= 1e4

    stream.change(loaded, plant, {EMBEDDING})
    before = proof.Proof(loaded, ids)
    surgery.prepare(loaded)
    before.check(None)

    def spoil(_part: int) -> None:
        for reader in [parts.ends(loaded)[0]] if part == HEAD else parts.writers(loaded, 0):
            reader.weight.data *= 1.05

    stream.change(loaded, spoil, {part})
    with pytest.raises(ValueError, match=f"{where} must stay within"):
        before.check(None)
