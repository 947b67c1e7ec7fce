"""Experts made of plain linears: transformers' own numbers, each calibrated on its own tokens, routing left alone."""

import json
import logging
from pathlib import Path

import pytest
import torch
from test_families import folder_of, load, random_model
from torch import Tensor, nn

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths.quantizers import dequantize
from dfrot_lab.model import checkpoint, corpus, families, hooks, loading, stream, surgery
from dfrot_lab.model.experts import Mixture, fused, unfuse
from dfrot_lab.model.loading import LoadedModel, linear
from dfrot_lab.recipe.specs import CorpusSpec, ModelSpec, WeightSpec, recipe_of
from dfrot_lab.score import build, perplexity
from dfrot_lab.weights import calibrate, gptq, rtn, run

CASES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
SPARSE = {"mixtral": [0, 1, 2], "qwen2_moe": [0, 2], "qwen3_moe": [1], "olmoe": [0, 1, 2]}
"""Which of the three layers have experts."""


def spec_of(text: Path) -> WeightSpec:
    return WeightSpec(corpus=CorpusSpec(name=str(text), split="calibration"), windows=3, window=40)


def prepared(case: str, folder: Path) -> LoadedModel:
    loaded = load(folder_of(case, folder), "float32")
    surgery.prepare(loaded)
    return loaded


@pytest.mark.parametrize(
    ("own", "dtype", "close"), [("eager", torch.float64, 1e-12), ("grouped_mm", torch.float32, 1e-4)]
)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_unfused_experts_are_transformers_own(case, own, dtype, close):
    """To the dtype's rounding: a token's two experts may be added in another order."""
    model = random_model(case).to(dtype)
    model.set_experts_implementation(own)
    roles, layers = families.roles_of(type(model).__name__), model.model.layers
    x, blocks = torch.randn(2, 24, 64, dtype=dtype), [layer.mlp for layer in layers]
    for layer in layers:
        unfuse(layer, roles)
    assert [i for i, layer in enumerate(layers) if isinstance(layer.mlp, Mixture)] == SPARSE[case]
    for number in SPARSE[case]:
        layer, block = layers[number], blocks[number]
        expected = block(x)
        torch.testing.assert_close(layer.mlp(x), expected, rtol=close, atol=close)
        layer.mlp.experts[1].up_proj.weight.mul_(2)
        assert (block(x) - expected).abs().max() > 1e-3, "an edit in place is one of the fused tensors"
        torch.testing.assert_close(layer.mlp(x), block(x), rtol=close, atol=close)
        with fused(layer, roles):
            assert layer.mlp is block
        assert isinstance(layer.mlp, Mixture)


@pytest.mark.parametrize("case", CASES)
def test_every_linear_but_the_routers_is_named(case, tmp_path):
    loaded = load(folder_of(case, tmp_path / "m"))
    for number, layer in enumerate(loaded.layers):
        named = loaded.roles.linears(layer)
        assert set(named) == {
            name
            for name, part in layer.named_modules()
            if isinstance(part, nn.Linear) and not name.endswith("_gate")
        }
        sites = [site.split(".", 2)[2] for site in hooks.sites_of(loaded, "mlp_in", "down_proj_in")]
        own = [
            site for site in hooks.sites_of(loaded, "down_proj_in") if site.startswith(f"layers.{number}.")
        ]
        mlps = 1 if number not in SPARSE[case] else 5 if case == "qwen2_moe" else 4
        assert len(own) == mlps == len(loaded.roles.downs(layer))
        assert ("shared.mlp_in" in sites) == (case == "qwen2_moe")
        readers = loaded.roles.readers(layer)["post_attention_norm"][1]
        assert ("mlp.gate" in readers) == (number in SPARSE[case])
        assert ("mlp.shared_expert_gate" in readers) == (case == "qwen2_moe" and number in SPARSE[case])


@pytest.mark.parametrize("case", CASES)
def test_what_is_put_before_experts_is_not_what_routes(case, tmp_path):
    loaded, ids = load(folder_of(case, tmp_path / "m")), torch.arange(48)[None]
    number, seen = SPARSE[case][0], []
    mixture = loaded.layers[number].mlp
    mixture.gate.register_forward_hook(lambda _module, _args, out: seen.append(out[0]))
    plain = loaded.model(ids).logits
    with hooks.at_sites(loaded, lambda _, x: x.round(), [f"layers.{number}.post_attention_norm"]):
        rounded = loaded.model(ids).logits
    assert torch.equal(*seen) and (rounded - plain).abs().max() > 1e-3


def routed(loaded: LoadedModel, layer: nn.Module, ids: Tensor) -> list[tuple[str, Tensor]]:
    """Of each expert the rows sent to it, found by the router's own logits; of a plain MLP all."""
    found: list[Tensor] = []
    handle = layer.post_attention_layernorm.register_forward_hook(lambda _m, _a, out: found.append(out))
    loading.body(loaded)(ids)
    handle.remove()
    rows = found[0].reshape(-1, loaded.channels)
    if not isinstance(layer.mlp, Mixture):
        return [("mlp", rows)]
    chosen = (rows @ layer.mlp.gate.weight.T).topk(2).indices
    experts = [(f"mlp.experts.{i}", rows[(chosen == i).any(-1)]) for i in range(len(layer.mlp.experts))]
    return experts + ([("mlp.shared_expert", rows)] if hasattr(layer.mlp, "shared_expert") else [])


@pytest.mark.parametrize("lots", [False, True])
@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe"])
@torch.no_grad()
def test_gptq_of_an_expert_is_of_the_tokens_sent_to_it(case, lots, tmp_path, text_file, store, monkeypatch):
    """Against a slow loop: a pass of all windows before each group, each expert's rows picked by hand."""
    loaded, slow = prepared(case, tmp_path / "a"), prepared(case, tmp_path / "b")
    spec = spec_of(text_file)
    monkeypatch.setattr(calibrate, "CHUNK_BYTES", 1 if lots else 2e9)
    run.quantize_weights(loaded, spec, {"model": case}, store, r4=False)
    ids = corpus.token_blocks(spec.corpus, slow.tokenizer, blocks=3, window=40)

    used = []

    def put(layer: nn.Module, names: list[str], rows: Tensor) -> None:
        for name in names:
            part = linear(layer, name)
            used.append(gptq if len(rows) else rtn)
            part.weight.copy_(
                dequantize(used[-1].quantize(part.weight, gptq.Seen(rows.T @ rows), spec), part.weight.shape)
            )

    for layer in slow.layers:
        for names in (["q_proj", "k_proj", "v_proj"], ["o_proj"]):
            seen: list[Tensor] = []
            reader = layer.get_submodule(f"self_attn.{names[0]}")
            handle = reader.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
            loading.body(slow)(ids)
            handle.remove()
            put(layer, [f"self_attn.{name}" for name in names], seen[0].flatten(0, 1))
        for name, rows in routed(slow, layer, ids):
            put(layer, [f"{name}.gate_proj", f"{name}.up_proj"], rows)
            gate, up = (linear(layer, f"{name}.{part}_proj")(rows) for part in ("gate", "up"))
            put(layer, [f"{name}.down_proj"], nn.functional.silu(gate) * up)
    for one, other in zip(loaded.layers, slow.layers, strict=True):
        for name in loaded.roles.linears(one):
            found, expected = linear(one, name).weight, linear(other, name).weight
            assert (found - expected).norm() < 0.03 * expected.norm(), name
    assert used.count(gptq) > 0.7 * len(used)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.model.modules())


@pytest.mark.parametrize("lots", [False, True])
def test_an_expert_that_no_token_reaches_is_rounded_to_nearest_and_named(
    lots, tmp_path, text_file, store, monkeypatch, caplog
):
    loaded = prepared("mixtral", tmp_path / "m")
    gate = loaded.layers[1].mlp.gate.weight
    gate.copy_(torch.tensor([1.0, -1.0, 0.0, 0.0])[:, None] * gate[0])
    gate[3] = 2 * gate[0]  # where 0 has l, 1 has -l, 3 has 2 l, and 2 has 0: chosen only where l < 0
    gate[1] = -2 * gate[0]
    loaded.layers[1].mlp.gate.top_k = 1
    before = [expert.up_proj.weight.clone() for expert in loaded.layers[1].mlp.experts]
    spec = spec_of(text_file)
    monkeypatch.setattr(calibrate, "CHUNK_BYTES", 1 if lots else 2e9)
    with caplog.at_level(logging.WARNING):
        codes = run.quantize_weights(loaded, spec, {"model": "m"}, store, r4=False)
    [line] = [line for record in caplog.records if (line := record.getMessage()).startswith("layer 1")]
    names = [f"mlp.experts.{i}.{part}_proj" for i in (0, 2) for part in ("gate", "up", "down")]
    assert line.startswith("layer 1: no calibration token reached 6 linears, so they are rounded to nearest")
    assert all(name in line for name in names)
    [artefact] = store.list()
    assert set(artefact.json("layer-001-nearest")) == set(names) and "layer-000-nearest" not in artefact.names
    for number, weight in enumerate(before):
        nearest = rtn.quantize(weight, None, spec).codes
        assert torch.equal(codes[1][f"mlp.experts.{number}.up_proj"].codes, nearest) == (number in (0, 2))


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe"])
def test_integers_make_what_rounded_floats_make(case, tmp_path, text_file):
    model = ModelSpec(source=str(folder_of(case, tmp_path / "m")), dtype="float64")
    text = CorpusSpec(name=str(text_file))
    spec = recipe_of("4-4-16", model=model, corpus=text, windows=1, window=32, weights="rtn")
    built = build.build(spec, Store(tmp_path / "s"))
    ids = build.windows(spec, built.loaded)
    found = []
    for fake in (False, True):
        with build.quantized(built, spec, fake=fake), torch.no_grad():
            found.append(built.loaded.model(ids).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_massive_tokens_are_kept_out_before_they_are_sent_to_experts(tmp_path, text_file, monkeypatch):
    """The most massive of all tokens, not of each expert's: kept and streamed alike."""
    model = ModelSpec(source=str(folder_of("mixtral", tmp_path / "m")))
    text = CorpusSpec(name=str(text_file))
    fields = {"windows": 1, "window": 32, "weights": "rtn", "keep_out": "most_massive"}
    spec = recipe_of("4-4-16", model=model, corpus=text, **fields, keep_out_tokens=32)
    free = spec.with_(keep_out_tokens=1)
    found = [perplexity.evaluate(each, Store(tmp_path / "kept")).losses[0] for each in (spec, free)]
    assert abs(found[0] - found[1]) > 1e-4
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    assert perplexity.evaluate(spec, Store(tmp_path / "streamed")).losses[0] == pytest.approx(
        found[0], rel=1e-6
    )


def test_a_streamed_layer_of_experts_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    loaded = load(folder_of("qwen3_moe", tmp_path / "m"))
    with stream.part(loaded, 1):
        there = {name for name, x in loaded.model.named_parameters() if not x.is_meta}
        assert "model.layers.1.mlp.experts.3.down_proj.weight" in there
        assert all(name.startswith("model.layers.1.") for name in there)
    assert all(x.is_meta for x in loaded.model.parameters())
    assert all(x.is_meta for x in loaded.layers[1].mlp.block.parameters())
    assert json.dumps(hooks.sites_of(loaded, "mlp_in")).count("experts") == 4
