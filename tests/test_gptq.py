"""Weight quantization: GPTQ against its definition, better than rounding where inputs correlate, layer by
layer, and a run that was stopped.
"""

from pathlib import Path

import pytest
import torch
from again import assert_near
from conftest import LAYERS, tiny_model
from hypothesis import given, settings, strategies as st
from torch import Tensor

from dfrot_lab.disk.artefacts import Artefact, Store
from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import clip_search, dequantize
from dfrot_lab.model import corpus, loading, surgery
from dfrot_lab.model.loading import LoadedModel, linear
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import CorpusSpec, RotationSpec, WeightSpec
from dfrot_lab.weights import codes as kept, gptq, rtn
from dfrot_lab.weights.gptq import Seen
from dfrot_lab.weights.run import quantize_weights

SPEC = WeightSpec()
UNCLIPPED = WeightSpec(clip_search=False)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(channels: int, tokens: int = 600, seed: int = 0, mix: float = 1.0) -> Tensor:
    """sum x x^T of inputs whose channels correlate."""
    x = gaussian(tokens, channels, seed=seed) @ (
        torch.eye(channels) + mix * gaussian(channels, channels, seed=seed + 1) / channels**0.5
    )
    return x.T @ x


def output_error(weight: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor) -> float:
    """tr(dW H dW^T): the squared error of the outputs over the calibration inputs."""
    delta = (weight - codes.float() * scale).double()
    return float(((delta @ hessian.double()) * delta).sum())


def slow_gptq(weight: Tensor, hessian: Tensor, spec: WeightSpec) -> Tensor:
    """Codes by the definition (Optimal Brain Quantization in a fixed order), in float64, the inverse Hessian
    shrunk by one input a step.
    """
    high = 2 ** (spec.quantizer.bits - 1) - 1
    weight, hessian = weight.double().clone(), hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    scale = (
        clip_search(weight.float(), spec.quantizer).double()
        if spec.clip_search
        else weight.abs().amax(1, keepdim=True) / high
    )
    inverse = torch.linalg.inv(hessian + spec.damping * hessian.diagonal().mean() * torch.eye(len(hessian)))
    codes = torch.zeros_like(weight)
    for i in range(weight.shape[1]):
        codes[:, i] = (weight[:, i] / scale[:, 0]).round().clamp(-high - 1, high)
        error = (weight[:, i] - codes[:, i] * scale[:, 0]) / inverse[i, i]
        weight -= torch.outer(error, inverse[i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


# ---- one matrix


@pytest.mark.parametrize("channels", [1, 20, 128, 129, 300])
@pytest.mark.parametrize(
    "spec",
    [SPEC, UNCLIPPED, SPEC.with_(quantizer=QuantSpec(bits=3, granularity="per_channel"))],
    ids=["4", "4 unclipped", "3"],
)
def test_gptq_equals_its_definition(channels, spec):
    """Sizes below, at and above one block of 128 columns, and no multiple of it."""
    weight, hessian = gaussian(12, channels, seed=channels), hessian_of(channels, seed=channels)
    found, expected = gptq.quantize(weight, Seen(hessian), spec), slow_gptq(weight, hessian, spec)
    # A weight at the border of two codes may go the other way in float32, and the weights after it a little
    # otherwise.
    assert (found.codes.double() == expected).double().mean() > 0.98
    error = output_error(weight, found.codes, found.scale, hessian)
    assert error == pytest.approx(output_error(weight, expected, found.scale, hessian), rel=0.03, abs=1e-6)


GROUPED = SPEC.with_(quantizer=QuantSpec(granularity="per_group", group_size=16))


def test_a_group_of_inputs_is_rounded_as_if_it_were_a_channel_of_its_own():
    weight = gaussian(12, 96, seed=1)
    found = rtn.quantize(weight, None, GROUPED)
    alone = rtn.quantize(weight.reshape(-1, 16), None, SPEC)
    assert torch.equal(found.codes, alone.codes) and torch.equal(found.scale, alone.scale)
    lost = dequantize(found, weight.shape) - weight
    assert lost.norm() < (dequantize(rtn.quantize(weight, None, SPEC), weight.shape) - weight).norm()


@pytest.mark.parametrize("channels", [96, 160])
def test_gptq_of_groups_takes_each_column_in_its_groups_steps(channels):
    """By the definition, the scales being those of the weights before any is rounded."""
    weight, hessian = gaussian(12, channels, seed=channels), hessian_of(channels, seed=channels)
    found = gptq.quantize(weight, Seen(hessian), GROUPED)
    scale = rtn.quantize(weight, None, GROUPED).scale.reshape(12, -1).repeat_interleave(16, 1).double()
    wide, inverse = weight.double(), hessian.double()
    inverse = torch.linalg.inv(inverse + SPEC.damping * inverse.diagonal().mean() * torch.eye(channels))
    codes = torch.zeros_like(wide)
    for i in range(channels):
        codes[:, i] = (wide[:, i] / scale[:, i]).round().clamp(-8, 7)
        wide -= torch.outer((wide[:, i] - codes[:, i] * scale[:, i]) / inverse[i, i], inverse[i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    assert (found.codes.reshape(12, -1).double() == codes).double().mean() > 0.98


@given(seed=st.integers(0, 10_000), channels=st.integers(2, 40), scale=st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_an_identity_hessian_gives_round_to_nearest(seed, channels, scale):
    weight = gaussian(6, channels, seed=seed)
    for spec in (SPEC, UNCLIPPED):
        found, nearest = (
            dequantize(made, weight.shape)
            for made in (
                gptq.quantize(weight, Seen(scale * torch.eye(channels)), spec),
                rtn.quantize(weight, None, spec),
            )
        )
        # Of two scales or codes that lose the same, rounding may choose the other.
        torch.testing.assert_close(
            (weight - found).square().sum(1), (weight - nearest).square().sum(1), rtol=1e-4, atol=1e-9
        )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mix", [1.0, 3.0])
def test_gptq_has_less_output_error_than_rtn_on_correlated_inputs(seed, mix):
    weight, hessian = gaussian(24, 200, seed=seed), hessian_of(200, seed=seed + 10, mix=mix)
    ours, nearest = gptq.quantize(weight, Seen(hessian), SPEC), rtn.quantize(weight, None, SPEC)
    assert output_error(weight, *ours[:2], hessian) < 0.85 * output_error(weight, *nearest[:2], hessian)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_and_scale(bits):
    spec = SPEC.with_(quantizer=QuantSpec(bits=bits, granularity="per_channel"))
    weight = gaussian(16, 150)
    for found in (rtn.quantize(weight, None, spec), gptq.quantize(weight, Seen(hessian_of(150)), spec)):
        assert found.codes.dtype == torch.int8 and found.codes.shape == (16, 150)
        assert -(2 ** (bits - 1)) <= int(found.codes.min()) and int(found.codes.max()) <= 2 ** (bits - 1) - 1
        assert int(found.codes.max()) > 2 ** (bits - 1) - 3 + (bits == 2)
        assert found.scale.shape == found.zero.shape == (16, 1)
        assert not found.zero.any()


def test_rtn_rounds_to_the_nearest_point_of_its_grid():
    weight = gaussian(8, 40)
    found = rtn.quantize(weight, None, UNCLIPPED)
    torch.testing.assert_close(found.scale, weight.abs().amax(1, keepdim=True) / 7)
    assert bool(((weight - dequantize(found, weight.shape)).abs() <= found.scale * 0.50001).all())
    clipped = rtn.quantize(weight, None, SPEC)
    assert_near(clipped.scale, clip_search(weight, SPEC.quantizer))
    assert (weight - dequantize(clipped, weight.shape)).square().sum() < (
        weight - dequantize(found, weight.shape)
    ).square().sum()


def test_inputs_that_are_always_zero_have_their_weights_set_to_zero():
    x = gaussian(300, 150) @ gaussian(150, 150, seed=1)
    dead = [0, 5, 127, 128, 149]
    x[:, dead] = 0
    hessian = x.T @ x
    weight = gaussian(10, 150, seed=2)
    weight[:, 5] = 100  # must not set the scale either
    found = gptq.quantize(weight, Seen(hessian), SPEC)
    assert not found.codes[:, dead].any()
    assert found.scale.max() < 1
    assert (found.codes.double() == slow_gptq(weight, hessian, SPEC)).double().mean() > 0.98


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_hessian_that_is_not_finite_is_refused(bad):
    hessian = hessian_of(20)
    hessian[3, 3] = bad
    said = r"the calibration Hessian must be positive definite; it is not .* Look for NaN or Inf"
    with pytest.raises(ValueError, match=said):
        gptq.quantize(gaussian(4, 20), Seen(hessian), SPEC)


def test_gptq_needs_a_hessian_and_rounding_looks_at_none():
    with pytest.raises(ValueError, match=r"gptq\.seen must have the Hessian .*; got None"):
        gptq.quantize(gaussian(4, 20), None, SPEC)
    weight = gaussian(4, 20)
    bare, given = (
        rtn.quantize(weight, None, SPEC),
        rtn.quantize(weight, torch.full((20, 20), torch.nan), SPEC),
    )
    assert torch.equal(bare.codes, given.codes) and torch.equal(bare.scale, given.scale)


@pytest.mark.parametrize("channels", [1, 5, 192, 193, 500])
def test_a_hessian_is_the_sum_of_the_inputs_outer_products(channels):
    x = gaussian(70, channels)
    torch.testing.assert_close(gptq.hessian_of(x), x.T @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gptq.hessian_of(x), gptq.hessian_of(x).T, rtol=1e-5, atol=1e-4)


def test_the_arguments_are_left_as_they_were():
    weight, hessian = gaussian(6, 140), hessian_of(140)
    hessian[:, 3] = hessian[3] = 0
    before = weight.clone(), hessian.clone()
    gptq.quantize(weight, Seen(hessian), SPEC), rtn.quantize(weight, hessian, SPEC)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


# ---- a model


def weight_spec(text: Path, **fields: object) -> WeightSpec:
    return WeightSpec(corpus=CorpusSpec(name=str(text), split="calibration"), windows=3, window=40, **fields)


def fresh(family: str = "llama", *, rotated: bool = False) -> LoadedModel:
    loaded = tiny_model(family)
    surgery.prepare(loaded)
    if rotated:
        surgery.rotate_residual(loaded, rotations.make(RotationSpec(kind="RH"), loaded.channels))
        surgery.rotate_heads(loaded)
        surgery.rotate_down(loaded)
    return loaded


def linears(loaded: LoadedModel) -> dict[str, Tensor]:
    names = [(i, name) for i in range(LAYERS) for name in loaded.roles.linears(loaded.layers[i])]
    return {f"{i}.{name}": linear(loaded.layers[i], name).weight for i, name in names}


def the_artefact(store: Store) -> Artefact:
    [artefact] = [a for a in store.list() if a.kind == "weights"]
    return artefact


def same_weights(a: LoadedModel, b: LoadedModel) -> bool:
    """To the bit: of what was stored and installed, or left alone."""
    return all(
        torch.equal(w, other)
        for w, other in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    )


def moved(found: Tensor, expected: Tensor) -> float:
    """Relative norm of the difference: 4 bits make 0.1, the codes that a rounding flips one after another
    0.011.
    """
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_every_linear_is_on_its_grid_and_nothing_else_changes(text_file, store, method, family):
    loaded, original = fresh(family), fresh(family)
    quantize_weights(loaded, weight_spec(text_file, method=method), {"model": "tiny"}, store, r4=False)
    artefact, after = the_artefact(store), linears(loaded)
    assert artefact.names == [f"layer-{i:03d}" for i in range(LAYERS)]
    for name, before in linears(original).items():
        layer, inner = name.split(".", 1)
        saved = artefact.tensors(f"layer-{int(layer):03d}")
        codes, scale = saved[f"{inner}:codes"], saved[f"{inner}:scale"]
        assert codes.dtype == torch.int8 and int(codes.min()) >= -8 and int(codes.max()) <= 7
        assert scale.shape == (len(before), 1)
        assert torch.equal(after[name], codes.float() * scale)
        assert 0 < float((after[name] - before).norm() / before.norm()) < 0.3
    others = set(original.model.state_dict()) - {f"model.layers.{name}.weight" for name in after}
    assert {"lm_head.weight", "model.embed_tokens.weight"} < others
    for name in others:
        assert torch.equal(loaded.model.state_dict()[name], original.model.state_dict()[name]), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.model.modules())


@pytest.mark.parametrize("rotated", [False, True], ids=["NR", "RH with R4"])
def test_one_pass_equals_a_pass_a_group(text_file, store, rotated):
    """Each group calibrated on a pass of its own through the model as quantized so far, R4 acting,
    activations as they are.
    """
    loaded, slow = fresh(rotated=rotated), fresh(rotated=rotated)
    spec = weight_spec(text_file)
    quantize_weights(loaded, spec, {"model": "tiny"}, store, r4=rotated)
    ids = corpus.token_blocks(spec.corpus, slow.tokenizer, blocks=3, window=40)
    q, k, v, o, gate, up, down = slow.roles.linears(slow.layers[0])
    for layer in slow.layers:
        for group in ((q, k, v), (o,), (gate, up), (down,)):
            seen: list[Tensor] = []
            with surgery.online(slow, r4=rotated), torch.inference_mode():
                handle = layer.get_submodule(group[0]).register_forward_pre_hook(
                    lambda _m, args, seen=seen: seen.append(args[0].reshape(120, -1))
                )
                loading.body(slow)(ids)
                handle.remove()
            for name in group:
                module_ = linear(layer, name)
                found = gptq.quantize(module_.weight, Seen(seen[0].T @ seen[0]), spec)
                module_.weight.copy_(dequantize(found, module_.weight.shape))
    for (name, found), expected in zip(linears(loaded).items(), linears(slow).values(), strict=True):
        assert moved(found, expected) < 0.03, name


def test_r4_changes_what_down_proj_is_calibrated_on(text_file, tmp_path):
    with_r4, without = fresh(rotated=True), fresh(rotated=True)
    quantize_weights(with_r4, weight_spec(text_file), {"model": "tiny"}, Store(tmp_path / "a"), r4=True)
    quantize_weights(without, weight_spec(text_file), {"model": "tiny"}, Store(tmp_path / "b"), r4=False)
    a, b = linears(with_r4), linears(without)
    assert (
        moved(a["0.self_attn.q_proj"], b["0.self_attn.q_proj"])
        < 0.03
        < 0.05
        < moved(a["0.mlp.down_proj"], b["0.mlp.down_proj"])
    )


def test_gptq_leaves_the_logits_nearer_than_rtn(text_file, store):
    original, ids = fresh(), torch.arange(90)[None] % 60 + 32
    error = {}
    for method in ("gptq", "rtn"):
        loaded = fresh()
        quantize_weights(loaded, weight_spec(text_file, method=method), {"by": method}, store, r4=False)
        error[method] = float((loaded.model(ids).logits - original.model(ids).logits).norm())
    assert error["gptq"] < error["rtn"]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_stored_weights_are_installed_identically_without_being_made_again(text_file, store, method):
    first, second = fresh(), fresh()
    spec = weight_spec(text_file, method=method)
    quantize_weights(first, spec, {"model": "tiny"}, store, r4=False)
    written = {p: p.stat().st_mtime_ns for p in the_artefact(store).path.iterdir()}
    quantize_weights(second, spec, {"model": "tiny"}, store, r4=False)
    assert same_weights(first, second)
    assert {p: p.stat().st_mtime_ns for p in the_artefact(store).path.iterdir()} == written


def stop_after_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run keeps its first layer and is stopped as it is about to keep the second."""
    keep = kept.keep

    def keep_first_then_stop(writer, number, done):
        if number == 1:
            raise KeyboardInterrupt
        keep(writer, number, done)

    monkeypatch.setattr(kept, "keep", keep_first_then_stop)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_stopped_run_goes_on_at_its_layer(text_file, store, tmp_path, monkeypatch, method):
    spec, stopped = weight_spec(text_file, method=method), fresh()
    stop_after_a_layer(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        quantize_weights(stopped, spec, {"model": "tiny"}, store, r4=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stopped.model.modules())
    monkeypatch.undo()
    [partial] = store.root.glob("weights/*.partial")
    finished = (partial / "layer-000.safetensors").stat().st_mtime_ns
    resumed, whole = fresh(), fresh()
    quantize_weights(resumed, spec, {"model": "tiny"}, store, r4=False)
    quantize_weights(whole, spec, {"model": "tiny"}, Store(tmp_path / "one go"), r4=False)
    for name, weight in linears(resumed).items():
        assert moved(weight, linears(whole)[name]) < 0.03, name
    assert (the_artefact(store).path / "layer-000.safetensors").stat().st_mtime_ns == finished, (
        "the finished layer was made again"
    )


def test_16_bits_leave_the_model_and_the_store_alone(text_file, store):
    loaded, original = fresh(), fresh()
    quantize_weights(
        loaded,
        weight_spec(text_file, quantizer=QuantSpec(bits=16, granularity="per_channel")),
        {"model": "tiny"},
        store,
        r4=False,
    )
    assert same_weights(loaded, original)
    assert store.list() == []


def test_another_key_is_another_artefact_and_stored_is_what_it_says(text_file, store):
    """What goes into the key is tested with the keys; here, that nothing else is looked at."""
    spec = weight_spec(text_file)
    found = []
    for model in ("a", "b", "a"):
        found.append(store.open("weights", {"model": model}) is not None)
        quantize_weights(fresh(), spec, {"model": model}, store, r4=False)
    assert found == [False, False, True]
    assert len([a for a in store.list() if a.kind == "weights"]) == 2


def test_a_calibrated_quantizer_needs_a_text(store):
    with pytest.raises(ValueError, match=r"WeightSpec\.corpus must be a text to calibrate gptq on; got None"):
        quantize_weights(fresh(), WeightSpec(corpus=None), {"model": "tiny"}, store, r4=False)
    assert store.list() == []


def test_nan_in_the_calibration_is_refused_and_nothing_is_stored(text_file, store):
    loaded = fresh()
    linear(loaded.layers[1], "mlp.up_proj").weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"the calibration Hessian must be positive definite"):
        quantize_weights(loaded, weight_spec(text_file), {"model": "tiny"}, store, r4=False)
    assert store.list() == []


def test_more_calibration_than_context_or_text(text_file, store):
    with pytest.raises(
        ValueError, match=r"window must be at most the model's context of 128 tokens; got 129"
    ):
        quantize_weights(
            fresh(), weight_spec(text_file).with_(window=129), {"model": "tiny"}, store, r4=False
        )
    with pytest.raises(ValueError, match=r"windows must be at most \d+: .* got 9999"):
        quantize_weights(
            fresh(), weight_spec(text_file).with_(windows=9999), {"model": "tiny"}, store, r4=False
        )
    assert store.list() == []
