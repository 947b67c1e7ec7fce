"""What is built and quantized, against a LLaMA forward pass, its rotations and its quantizers written out by
hand in float64: whatever is left out, in one layer or in all, is a difference.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from again import apart
from conftest import HEAD_SIZE, HEADS, INNER, KV_HEADS, LAYERS
from test_evaluate import RH, save_lively, spec_for
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import rotations
from dfrot_lab.maths.hadamard import hadamard_matrix
from dfrot_lab.model import corpus, loading
from dfrot_lab.recipe.grids import KV_CACHE
from dfrot_lab.recipe.specs import ONLINE, RotationSpec
from dfrot_lab.score.build import build, quantized

BOUND = 0.01
"""Of the largest logit. It is 2e-7 (transformers takes norms in float32) where no code flips at the border of
two; R2 left out of one layer makes it 0.12.
"""
DAMPING = 0.01

Weight = Callable[[int, str, Tensor, Tensor], Tensor]
"""From layer, name, rotated weight (out, in) and the inputs (tokens, in) it is used on: the weight to use."""


def rounded(x: Tensor, bits: int) -> Tensor:
    """Each row of the last dimension on its own asymmetric grid, in which 0 lies."""
    if bits == 16:
        return x
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    step = (high - low) / (2**bits - 1)
    zero = torch.round(-low / step)
    return step * ((torch.round(x / step) + zero).clamp(0, 2**bits - 1) - zero)


def norm(x: Tensor, epsilon: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + epsilon)


def rope(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of x (..., tokens, head size): channel i turns with channel i + half."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def orthogonal(n: int) -> Tensor:
    return hadamard_matrix(n).double() / n**0.5


def each_head(weight: Tensor) -> Tensor:
    """W (out, in) with each head's inputs times the Hadamard matrix."""
    return (weight.reshape(len(weight), -1, HEAD_SIZE) @ orthogonal(HEAD_SIZE).T).reshape(weight.shape)


def rotated(w: dict[str, Tensor], layer: int, R1: Tensor, r4: bool = True) -> dict[str, Tensor]:
    """One layer's weights with norm gains, R1, R2 and the offline half of R4 in them."""
    own = {name.split(".")[-2]: x for name, x in w.items() if name.startswith(f"model.layers.{layer}.")}
    reads = {
        "input_layernorm": ("q_proj", "k_proj", "v_proj"),
        "post_attention_layernorm": ("gate_proj", "up_proj"),
    }
    made = {name: own[name] * own[gain] @ R1 for gain, names in reads.items() for name in names}
    made["v_proj"] = each_head(made["v_proj"].T).T
    made["o_proj"] = R1.T @ each_head(own["o_proj"])
    made["down_proj"] = R1.T @ own["down_proj"] @ (orthogonal(INNER).T if r4 else torch.eye(INNER).double())
    return made


def forward(
    w: dict[str, Tensor],
    config: Any,
    ids: Tensor,
    R1: Tensor,
    weight: Weight,
    a_bits: int = 16,
    kv_bits: int = 16,
    v_bits: int | None = None,
    online: tuple[str, ...] = ("R3", "R4"),
) -> Tensor:
    """Logits (windows, window, vocabulary) of token ids (windows, window); values in `v_bits` of their own."""
    window, theta, eps = ids.shape[1], config.rope_parameters["rope_theta"], config.rms_norm_eps
    x = w["model.embed_tokens.weight"][ids] @ R1
    for layer in range(LAYERS):
        own = rotated(w, layer, R1, "R4" in online)

        def linear(name: str, y: Tensor, layer: int = layer, own: dict[str, Tensor] = own) -> Tensor:
            return y @ weight(layer, name, own[name], y.flatten(0, 1)).T

        y = rounded(norm(x, eps), a_bits)
        q, k, v = (linear(f"{n}_proj", y).unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2) for n in "qkv")
        q, k = rope(q, theta), rope(k, theta)
        if kv_bits < 16 and "R3" in online:
            q, k = (each @ orthogonal(HEAD_SIZE).T for each in (q, k))
        both = (k, kv_bits), (v, kv_bits if v_bits is None else v_bits)
        k, v = (rounded(*each).repeat_interleave(HEADS // KV_HEADS, 1) for each in both)
        later = torch.ones(window, window, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) / HEAD_SIZE**0.5).masked_fill(later, -torch.inf)
        heads = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear("o_proj", rounded(heads, a_bits))
        y = rounded(norm(x, eps), a_bits)
        inner = torch.nn.functional.silu(linear("gate_proj", y)) * linear("up_proj", y)
        inner = inner @ orthogonal(INNER).T if "R4" in online else inner
        x = x + linear("down_proj", rounded(inner, a_bits))
    return norm(x, eps) @ (w["lm_head.weight"] * w["model.norm.weight"] @ R1).T


def as_it_is(_layer: int, _name: str, weight: Tensor, _x: Tensor) -> Tensor:
    return weight


def to_nearest(_layer: int, _name: str, weight: Tensor, _x: Tensor) -> Tensor:
    step = weight.abs().amax(1, keepdim=True) / 7
    return step * (weight / step).round().clamp(-8, 7)


def gptq(weight: Tensor, x: Tensor) -> Tensor:
    """Codes of GPTQ as its paper has it: column by column, each one's error spread over all that follow."""
    hessian = x.T @ x
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    weight, step = weight.clone(), weight.abs().amax(1, keepdim=True) / 7
    codes = torch.empty_like(weight)
    for i in range(weight.shape[1]):
        codes[:, i] = (weight[:, i] / step[:, 0]).round().clamp(-8, 7)
        error = (weight[:, i] - codes[:, i] * step[:, 0]) / factor[i, i]
        weight[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    return codes


@pytest.fixture
def model(tmp_path: Path):
    """A tiny model in float64, and its weights before anything is done to it."""
    spec = save_lively(tmp_path / "model", dtype=torch.float64).with_(dtype="float64")
    loaded = loading.load_model(spec)
    return spec, {name: x.double() for name, x in loaded.model.state_dict().items()}, loaded.model.config


@pytest.mark.parametrize("bits", ["16-16-16", "16-4-16", "16-16-4", "16-4-4", "4-16-16", "4-4-4"])
@pytest.mark.parametrize("rotation", [RH, RotationSpec(kind="RO", seed=1)], ids=["RH", "RO"])
def test_a_quantized_model_is_the_one_written_out_by_hand(model, store, text_file, bits, rotation):
    spec, w, config = model
    recipe = spec_for(spec, text_file, bits, rotation=rotation)
    recipe = recipe.with_(weights=recipe.weights.with_(clip_search=False))
    ids = (torch.arange(96) * 7 % 250).reshape(2, 48)
    R1, weight = rotations.make(rotation, 64), as_it_is if bits.startswith("16") else to_nearest
    wanted = forward(w, config, ids, R1, weight, *(int(n) for n in bits.split("-")[1:]))
    built = build(recipe, store)
    with quantized(built, recipe), torch.inference_mode():
        found = built.loaded.model(ids).logits
    assert apart(found.double(), wanted) < (BOUND if bits != "16-16-16" else 1e-6)


@pytest.mark.parametrize("bits", ["16-16-16", "16-4-4", "4-4-4"])
@pytest.mark.parametrize("online", ONLINE)
def test_which_hadamards_act_online_is_as_the_recipe_says(model, store, text_file, bits, online):
    """Integer products and rounded floats, and weights rounded as down_proj is without R4."""
    spec, w, config = model
    recipe = spec_for(spec, text_file, bits, rotation=RH).with_(online=online)
    recipe = recipe.with_(weights=recipe.weights.with_(clip_search=False))
    ids, (a_bits, kv_bits) = (torch.arange(96) * 7 % 250).reshape(2, 48), map(int, bits.split("-")[1:])
    weight = as_it_is if bits.startswith("16") else to_nearest
    built = build(recipe, store)
    with quantized(built, recipe), torch.inference_mode():
        found = built.loaded.model(ids).logits.double()
    R1, which = rotations.make(RH, 64), () if online == "none" else (online,)
    right, both = (
        forward(w, config, ids, R1, weight, a_bits, kv_bits, online=acting)
        for acting in (which, ("R3", "R4"))
    )
    assert apart(found, right) < (BOUND if bits != "16-16-16" else 1e-6)
    assert bits == "16-16-16" or apart(found, both) > BOUND


@pytest.mark.parametrize(("k_bits", "v_bits"), [(4, 16), (16, 4), (3, 4)])
def test_keys_and_values_have_bits_of_their_own(model, store, text_file, k_bits, v_bits):
    """And keys alone decide whether R3 acts."""
    spec, w, config = model
    recipe = spec_for(spec, text_file, "16-16-16", rotation=RH)
    recipe = recipe.with_(keys=KV_CACHE.with_(bits=k_bits), values=KV_CACHE.with_(bits=v_bits))
    ids = (torch.arange(96) * 7 % 250).reshape(2, 48)
    built = build(recipe, store)
    with quantized(built, recipe), torch.inference_mode():
        found = built.loaded.model(ids).logits.double()
    right, exchanged = (
        forward(w, config, ids, rotations.make(RH, 64), as_it_is, kv_bits=k, v_bits=v)
        for k, v in ((k_bits, v_bits), (v_bits, k_bits))
    )
    assert apart(found, right) < BOUND < apart(found, exchanged)


def test_gptq_is_calibrated_on_what_each_linear_will_read(model, store: Store, text_file):
    """Rotations R1 to R4 on, activations unquantised, earlier linears quantized already: code by code."""
    spec, w, config = model
    recipe = spec_for(spec, text_file, "4-4-4", rotation=RH)
    recipe = recipe.with_(weights=recipe.weights.with_(method="gptq", clip_search=False))
    built = build(recipe, store)
    ids = corpus.token_blocks(recipe.weights.corpus, built.loaded.tokenizer, blocks=2, window=64)
    same: dict[str, float] = {}

    def look(layer: int, name: str, weight: Tensor, x: Tensor) -> Tensor:
        """How many codes are those built; on with those, lest one in doubt make all later ones others."""
        [codes] = (found for key, found in built.codes[layer].items() if key.endswith(name))
        same[f"{layer}.{name}"] = float((gptq(weight, x) == codes.codes).double().mean())
        return codes.codes.double() * codes.scale.double()

    forward(w, config, ids, rotations.make(RH, 64), look)
    assert len(same) == 7 * LAYERS
    assert min(same.values()) > 0.995, same
