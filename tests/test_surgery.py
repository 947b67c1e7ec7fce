"""Surgery leaves every logit as it was, at each step alone and together; what would not is refused, and what
is online goes away again.

Tolerances are relative to the largest logit. TINY: 1e-6 in float64, since transformers' RMSNorm computes in
float32 inside a float64 model, and about 7e-8 is what remains of exact steps. DEFAULT: 2e-5 in float32
through 30 layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from again import FLOAT32
from conftest import CHANNELS, FAMILIES, HEAD_SIZE, HEADS, INNER, KV_HEADS, LAYERS, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dfrot_lab.maths import rotations
from dfrot_lab.maths.hadamard import hadamard_matrix
from dfrot_lab.maths.quantizers import fake_quantize
from dfrot_lab.model import surgery
from dfrot_lab.model.hooks import ALL_KINDS, NORMS, at_sites, sites_of
from dfrot_lab.model.loading import LoadedModel, linear
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import RotationSpec

TINY, DEFAULT = 1e-6, 2e-5
SEEN = 1e-3
"""A change that leaves the logits' place by more than this is seen by every test here."""

KV4 = QuantSpec(bits=4, scheme="asymmetric", granularity="per_group")


def kv4(x: Tensor) -> Tensor:
    """Keys or values at 4 bits."""
    return fake_quantize(x, KV4)


def at(*kinds: str, function: Callable[[Tensor], Tensor]) -> dict[str, object]:
    """Arguments of `surgery.online` that put `function` at all sites of some kinds of a tiny model."""
    sites = [f"layers.{i}.{kind}" for i in range(LAYERS) for kind in kinds]
    return {"function": lambda _site, x: function(x), "sites": sites}


ROTATIONS = {
    "NR": RotationSpec(kind="NR"),
    "RO": RotationSpec(kind="RO", seed=1),
    "RH": RotationSpec(seed=2),
    "RH-b16": RotationSpec(block=16),
}

TEXT = "\n".join(
    f"{i} sheep and {i * 7 % 13} goats went over hill {i % 5}; nobody counted them but the dog."
    for i in range(20)
)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value; NaN, which compares false, where one is not finite."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def ids_of(loaded: LoadedModel, tokens: int = 60) -> Tensor:
    """Ids (1, tokens) of a text with the massive newlines of the tiny models in it."""
    ids = torch.tensor([loaded.tokenizer(TEXT).input_ids[:tokens]])
    assert ids.shape == (1, tokens)
    return ids


def logits(loaded: LoadedModel, ids: Tensor | None = None, **options: object) -> Tensor:
    with torch.no_grad():
        return loaded.model(ids_of(loaded) if ids is None else ids, **options).logits


def weights(loaded: LoadedModel) -> dict[str, Tensor]:
    """A copy of every tensor of the model."""
    return {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}


def changed(loaded: LoadedModel, before: dict[str, Tensor]) -> set[str]:
    """Which tensors are no longer what they were, without the layers' numbers."""
    now = loaded.model.state_dict()
    assert now.keys() == before.keys()
    return {
        ".".join(part for part in name.split(".") if not part.isdigit())
        for name in now
        if not torch.equal(now[name], before[name])
    }


def hooks(loaded: LoadedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules())


def rotate(name: str) -> Callable[[LoadedModel], None]:
    """Prepare a model and fuse R1 of `name`."""

    def apply(loaded: LoadedModel) -> None:
        surgery.prepare(loaded)
        surgery.rotate_residual(loaded, rotations.make(ROTATIONS[name], loaded.channels))

    return apply


def everything(loaded: LoadedModel, r1: str = "RH") -> None:
    """All that is done to the weights before a 4-bit evaluation."""
    rotate(r1)(loaded)
    surgery.rotate_heads(loaded)
    surgery.rotate_down(loaded)


R1_TENSORS = {f"model.layers.{part}.weight" for part in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)} | {"model.embed_tokens.weight", "lm_head.weight"}  # fmt: skip
GAINS = {
    "model.norm.weight",
    "model.layers.input_layernorm.weight",
    "model.layers.post_attention_layernorm.weight",
}
READERS = R1_TENSORS - {
    "model.embed_tokens.weight",
    "model.layers.self_attn.o_proj.weight",
    "model.layers.mlp.down_proj.weight",
}
R2_TENSORS = {"model.layers.self_attn.v_proj.weight", "model.layers.self_attn.o_proj.weight"}
R4_TENSORS = {"model.layers.mlp.down_proj.weight"}

STEPS: dict[str, tuple[Callable[[LoadedModel], None], dict[str, bool], set[str]]] = {
    "untie": (surgery.untie, {}, set()),
    "fuse": (surgery.prepare, {}, GAINS | READERS),
    "R1 NR": (rotate("NR"), {}, GAINS | READERS),
    "R1 RO": (rotate("RO"), {}, GAINS | R1_TENSORS),
    "R1 RH": (rotate("RH"), {}, GAINS | R1_TENSORS),
    "R1 RH-b16": (rotate("RH-b16"), {}, GAINS | R1_TENSORS),
    "R2": (surgery.rotate_heads, {}, R2_TENSORS),
    "R3": (lambda loaded: None, {"r3": True}, set()),
    "R4": (surgery.rotate_down, {"r4": True}, R4_TENSORS),
    "everything, RO": (lambda loaded: everything(loaded, "RO"), {"r3": True, "r4": True}, GAINS | R1_TENSORS),
    "everything, RH": (everything, {"r3": True, "r4": True}, GAINS | R1_TENSORS),
}
"""Step: what it does to the weights, what runs online with it, which tensors must have changed (so that a
step that does nothing fails).
"""


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_equal(family: str, tied: bool, step: str):
    apply, online, touched = STEPS[step]
    loaded = tiny_model(family, tied=tied, dtype=torch.float64)
    wanted, before = logits(loaded), weights(loaded)
    apply(loaded)
    with surgery.online(loaded, **online):
        assert relative(logits(loaded), wanted) <= TINY
    biases = (
        {"model.layers.self_attn.v_proj.bias"}
        if family == "qwen2" and "model.layers.self_attn.v_proj.weight" in touched & R2_TENSORS
        else set()
    )
    assert changed(loaded, before) - {"model.layers.self_attn.v_proj.bias"} == touched
    if step in ("R2", "everything, RH"):
        assert biases <= changed(loaded, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_is_x_at_R(family: str):
    loaded, rotated = (tiny_model(family, dtype=torch.float64) for _ in range(2))
    surgery.prepare(loaded)
    rotate("RO")(rotated)
    R = rotations.make(ROTATIONS["RO"], CHANNELS)
    plain, turned = (
        [*m.model(ids_of(m), output_hidden_states=True).hidden_states] for m in (loaded, rotated)
    )
    assert len(plain) == LAYERS + 1
    for x, y in zip(plain, turned, strict=True):
        assert relative(y, x @ R) <= TINY
        assert relative(y, x) > SEEN


def orthogonal(*shape: int) -> Tensor:
    """Random orthogonal matrices (..., head, head)."""
    return torch.linalg.qr(
        torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    )[0]


R2_SHAPES = {
    "one for all": (HEAD_SIZE, HEAD_SIZE),
    "one a layer": (LAYERS, HEAD_SIZE, HEAD_SIZE),
    "one a head": (LAYERS, KV_HEADS, HEAD_SIZE, HEAD_SIZE),
}


@pytest.mark.parametrize("shape", R2_SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_orthogonal_r2_leaves_the_logits_and_turns_the_values(family: str, shape: str):
    loaded, R2 = tiny_model(family, dtype=torch.float64), orthogonal(*R2_SHAPES[shape])
    values: list[Tensor] = []

    def look(_site: str, x: Tensor) -> None:
        values.append(x)

    sites = sites_of(loaded, "v")
    with at_sites(loaded, look, sites):
        wanted, before = logits(loaded), weights(loaded)
    surgery.rotate_heads(loaded, R2)
    with at_sites(loaded, look, sites):
        assert relative(logits(loaded), wanted) <= TINY
    assert R2_TENSORS <= changed(loaded, before) <= R2_TENSORS | {"model.layers.self_attn.v_proj.bias"}
    full = (R2[:, None] if R2.ndim == 3 else R2).expand(LAYERS, KV_HEADS, HEAD_SIZE, HEAD_SIZE)
    for layer in range(LAYERS):
        x, y = values[layer][0], values[LAYERS + layer][0]  # (heads, tokens, head size)
        assert relative(y, x @ full[layer]) <= TINY and relative(y, x) > SEEN


def test_the_hadamard_r2_is_the_default():
    by_default, given = (tiny_model("qwen2", dtype=torch.float64) for _ in range(2))
    surgery.rotate_heads(by_default)
    surgery.rotate_heads(given, hadamard_matrix(HEAD_SIZE).T / HEAD_SIZE**0.5)
    for one, other in zip(weights(by_default).values(), weights(given).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("R2", "message"),
    [
        (
            torch.eye(8),
            r"R2\.shape must be one of \(\(16, 16\), \(2, 16, 16\), \(2, 2, 16, 16\)\); got \(8, 8\)",
        ),
        (orthogonal(3, HEAD_SIZE, HEAD_SIZE), r"R2\.shape must be one of .*; got \(3, 16, 16\)"),
        (
            torch.stack([torch.eye(HEAD_SIZE), torch.ones(HEAD_SIZE, HEAD_SIZE)]),
            r"orthogonality_error must be",
        ),
    ],
)
def test_an_r2_that_does_not_fit_is_refused(R2: Tensor, message: str):
    loaded = tiny_model()
    with nothing_changes(loaded), pytest.raises(ValueError, match=message):
        surgery.rotate_heads(loaded, R2)


@pytest.mark.parametrize("family", FAMILIES)
def test_gains_after_r1_leave_the_logits_and_scale_the_norm_s_output(family: str):
    loaded, seen = tiny_model(family, dtype=torch.float64), []
    rotate("RH")(loaded)
    site = "layers.1.post_attention_norm"
    with at_sites(loaded, lambda _, x: seen.append(x), [site]):
        wanted = logits(loaded)
    before = weights(loaded)
    generator = torch.Generator().manual_seed(1)
    gains = {name: torch.rand(CHANNELS, generator=generator) + 0.5 for name in (site, "layers.0.input_norm")}
    surgery.fold_gains(loaded, gains)
    with at_sites(loaded, lambda _, x: seen.append(x), [site]):
        assert relative(logits(loaded), wanted) <= TINY
    assert relative(seen[1], seen[0] * gains[site]) <= TINY and relative(seen[1], seen[0]) > SEEN
    readers = {f"model.layers.self_attn.{part}_proj.weight" for part in "qkv"}
    readers |= {"model.layers.mlp.gate_proj.weight", "model.layers.mlp.up_proj.weight"}
    assert changed(loaded, before) == readers | GAINS - {"model.norm.weight"}


@pytest.mark.parametrize(
    ("site", "gain", "error", "message"),
    [
        ("layers.0.o_proj_in", torch.ones(CHANNELS), KeyError, "no norm at site 'layers.0.o_proj_in'"),
        (
            "layers.0.input_norm",
            torch.ones(3),
            ValueError,
            "must be 64 finite numbers that are not 0; got shape",
        ),
        (
            "layers.0.input_norm",
            torch.zeros(CHANNELS),
            ValueError,
            "must be 64 finite numbers that are not 0",
        ),
        ("layers.0.input_norm", torch.full((CHANNELS,), torch.inf), ValueError, "must be 64 finite numbers"),
    ],
)
def test_gains_that_cannot_be_folded_are_refused(
    site: str, gain: Tensor, error: type[Exception], message: str
):
    loaded = tiny_model()
    surgery.prepare(loaded)
    with nothing_changes(loaded), pytest.raises(error, match=message):
        surgery.fold_gains(loaded, {"layers.1.input_norm": torch.full((CHANNELS,), 2.0), site: gain})


def with_output_biases() -> LoadedModel:
    """A Llama whose o and down have biases too, as some fine-tunes do: they live in the residual stream and
    must turn with it.
    """
    loaded = tiny_model("llama", dtype=torch.float64)
    loaded.model.config.attention_bias = loaded.model.config.mlp_bias = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(loaded.model.config).double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter))
    return LoadedModel(model, loaded.tokenizer, loaded.roles, loaded.spec, "biases", "random")


@pytest.mark.parametrize("step", ["R1 RO", "R1 RH", "R2", "everything, RH"])
def test_biases_of_o_and_down_turn_with_the_stream(step: str):
    apply, online, _ = STEPS[step]
    loaded = with_output_biases()
    wanted = logits(loaded)
    apply(loaded)
    with surgery.online(loaded, **online):
        assert relative(logits(loaded), wanted) <= TINY


def other_sizes(
    *, head: int = HEAD_SIZE, inner: int = INNER, sliding_window: int | None = None, family: str = "llama"
) -> LoadedModel:
    """A float64 tiny model of other sizes, or with a sliding window."""
    loaded = tiny_model(family, dtype=torch.float64)
    config = loaded.model.config
    config.head_dim, config.intermediate_size = head, inner
    if sliding_window is not None:
        config.sliding_window = sliding_window
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False)
    model.model.embed_tokens.weight.mul_(25)
    return LoadedModel(model, loaded.tokenizer, loaded.roles, loaded.spec, "other", "random")


def test_hadamard_matrices_that_are_not_symmetric_are_taken_back_by_their_transpose():
    for order in (20, 80):
        assert not torch.equal(hadamard_matrix(order), hadamard_matrix(order).T)
    loaded = other_sizes(head=20, inner=80)
    wanted = logits(loaded)
    everything(loaded)
    with surgery.online(loaded, r3=True, r4=True):
        assert relative(logits(loaded), wanted) <= TINY


@pytest.mark.model
@pytest.mark.parametrize("step", ["R2", "R3", "R4"])
def test_the_default_model_keeps_its_logits_in_float32_at_a_step_alone(step: str, default_model: LoadedModel):
    apply, online, _ = STEPS[step]
    ids = ids_of(default_model, 256)
    wanted = logits(default_model, ids)
    apply(default_model)
    with surgery.online(default_model, **online):
        assert relative(logits(default_model, ids), wanted) <= DEFAULT


@pytest.mark.model
@pytest.mark.parametrize("kind", ["RO", "RH"])
def test_the_default_model_keeps_its_logits_in_float32_after_every_further_step(
    kind: str, default_model: LoadedModel
):
    """One step on top of the other, as an evaluation takes them: nearly all the time is the float64 products
    of R1.
    """
    ids = ids_of(default_model, 256)
    wanted = logits(default_model, ids)
    R = rotations.make(RotationSpec(kind=kind), default_model.channels)
    steps = {
        "untie": (surgery.untie, {}),
        "fuse": (surgery.fuse_norms, {}),
        "R1": (lambda loaded: surgery.rotate_residual(loaded, R), {}),
        "R2": (surgery.rotate_heads, {}),
        "R4": (surgery.rotate_down, {"r4": True}),
        "R3": (lambda loaded: None, {"r3": True, "r4": True}),
    }
    errors = {}
    for name, (apply, online) in steps.items():
        apply(default_model)
        with surgery.online(default_model, **online):
            errors[name] = relative(logits(default_model, ids), wanted)
    assert errors["untie"] < 1e-6
    assert {name: error for name, error in errors.items() if not error <= DEFAULT} == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_stays_and_the_cast_comes_last(dtype: torch.dtype):
    """Each tensor is the float64 product cast once: the last bit of the product may decide on the last bit of
    the cast, and on no more.
    """
    loaded = tiny_model(dtype=dtype)
    surgery.prepare(loaded)
    before = weights(loaded)
    R = rotations.make(ROTATIONS["RO"], CHANNELS)
    surgery.rotate_residual(loaded, R.float())
    R = R.float().double()
    now = loaded.model.state_dict()
    assert {tensor.dtype for tensor in now.values()} == {dtype}
    for name, rotated in (
        ("model.layers.0.self_attn.q_proj", lambda w: w @ R),
        ("model.layers.1.mlp.down_proj", lambda w: R.T @ w),
    ):
        found, wanted = now[f"{name}.weight"], rotated(before[f"{name}.weight"].double()).to(dtype)
        torch.testing.assert_close(found, wanted, rtol=torch.finfo(dtype).eps, atol=1e-12)
        assert (found == wanted).double().mean() > 0.99


@pytest.mark.parametrize("kind", ["RH", "RO"])
def test_a_rotation_and_its_transpose_give_the_weights_back(kind: str):
    """The entries of RO are no float32 numbers, as those of RH of 64 channels are: fused in float64 they come back."""
    loaded = tiny_model(dtype=torch.float64)
    surgery.prepare(loaded)
    before = weights(loaded)
    R = rotations.make(ROTATIONS[kind], CHANNELS)
    surgery.rotate_residual(loaded, R)
    surgery.rotate_residual(loaded, R.T)
    assert all(
        torch.allclose(now, before[name], rtol=0, atol=1e-11)
        for name, now in loaded.model.state_dict().items()
    )


def test_untying_and_preparing_twice_is_preparing_once():
    loaded = tiny_model(tied=True)
    assert surgery.is_tied(loaded) and not surgery.norms_are_fused(loaded)
    surgery.prepare(loaded)
    once = weights(loaded)
    surgery.prepare(loaded)
    loaded.model.tie_weights()  # what transformers does when it saves or resizes a model
    assert not surgery.is_tied(loaded) and surgery.norms_are_fused(loaded)
    assert not changed(loaded, once)


# What must be refused, and what must show


@contextmanager
def nothing_changes(loaded: LoadedModel) -> Iterator[None]:
    """Every tensor is the same to the bit after the block."""
    before = weights(loaded)
    yield
    assert not changed(loaded, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_rotating_before_fusing_is_refused(family: str):
    loaded = tiny_model(family)
    surgery.untie(loaded)
    with (
        nothing_changes(loaded),
        pytest.raises(ValueError, match=r"norm gains must be fused \(surgery\.fuse_norms\) before R1"),
    ):
        surgery.rotate_residual(loaded, rotations.make(ROTATIONS["RH"], CHANNELS))


@pytest.mark.parametrize("gain", ["model.layers.1.post_attention_layernorm", "model.norm"])
def test_one_gain_that_is_not_1_is_enough_to_be_refused(gain: str):
    loaded = tiny_model()
    surgery.prepare(loaded)
    linear(loaded.model, gain).weight[7] = 1.01
    with nothing_changes(loaded), pytest.raises(ValueError, match="norm gains must be fused"):
        surgery.rotate_residual(loaded, rotations.make(ROTATIONS["RH"], CHANNELS))


@pytest.mark.parametrize(
    "step",
    [surgery.fuse_norms, lambda loaded: surgery.rotate_residual(loaded, torch.eye(CHANNELS))],
    ids=["fuse", "R1"],
)
def test_a_tied_model_is_refused_until_it_is_untied(step: Callable[[LoadedModel], None]):
    loaded = tiny_model(tied=True)
    with (
        nothing_changes(loaded),
        pytest.raises(ValueError, match=r"embeddings must be untied \(surgery\.untie\) first"),
    ):
        step(loaded)


def bad_rotations() -> dict[str, tuple[Tensor, str]]:
    R = rotations.make(ROTATIONS["RO"], CHANNELS)
    nan = R.clone()
    nan[3, 4] = torch.nan
    return {
        "too small": (R[:32, :32], r"rotation\.shape must be \(64, 64\); got \(32, 32\)"),
        "too large": (torch.eye(CHANNELS + 1), r"rotation\.shape must be \(64, 64\); got \(65, 65\)"),
        "not square": (R[:, :32], r"rotation\.shape must be \(channels, channels\); got \(64, 32\)"),
        "scaled": (1.001 * R, r"rotation\.orthogonality_error must be <= 0\.0001; got 0\.002"),
        "singular": (
            torch.zeros(CHANNELS, CHANNELS),
            r"rotation\.orthogonality_error must be <= 0\.0001; got 1\.",
        ),
        "NaN": (nan, r"rotation\.values must be finite; got 1 NaN or Inf of 4096"),
        "whole numbers": (
            torch.eye(CHANNELS, dtype=torch.int64),
            r"rotation\.dtype must be a float dtype; got torch\.int64",
        ),
    }


@pytest.mark.parametrize("case", bad_rotations())
def test_a_matrix_that_is_no_rotation_of_this_model_is_refused(case: str):
    R, message = bad_rotations()[case]
    loaded = tiny_model()
    surgery.prepare(loaded)
    with nothing_changes(loaded), pytest.raises(ValueError, match=message):
        surgery.rotate_residual(loaded, R)


def centre_embedding(loaded: LoadedModel) -> None:
    weight = linear(loaded.model, loaded.roles.embedding).weight
    weight -= weight.mean(-1, keepdim=True)


def rotate_the_embedding_alone(loaded: LoadedModel) -> None:
    weight = linear(loaded.model, loaded.roles.embedding).weight
    weight.copy_(weight @ rotations.make(ROTATIONS["RH"], CHANNELS).to(weight.dtype))


def forget_gains(loaded: LoadedModel) -> None:
    for layer in loaded.layers:
        layer.input_layernorm.weight.fill_(1)


WRONG = {
    "the offline half of R4 alone": (surgery.rotate_down, {}),
    "the online half of R4 alone": (lambda loaded: None, {"r4": True}),
    "a centred embedding": (centre_embedding, {}),
    "an embedding rotated alone": (rotate_the_embedding_alone, {}),
    "gains dropped instead of fused": (forget_gains, {}),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_wrong_shows_in_the_logits(family: str, wrong: str):
    """The equivalence tests can fail: each of these leaves the tolerance a thousandfold behind."""
    apply, online = WRONG[wrong]
    loaded = tiny_model(family, dtype=torch.float64)
    surgery.untie(loaded)
    wanted = logits(loaded)
    apply(loaded)
    with surgery.online(loaded, **online):
        assert relative(logits(loaded), wanted) > SEEN


# What runs online


def test_each_site_is_met_once_a_layer_in_the_forward_pass_s_order():
    loaded = tiny_model()
    wanted, seen = logits(loaded), []
    with at_sites(loaded, lambda site, x: seen.append((site, tuple(x.shape)))):
        assert hooks(loaded) == 4 * LAYERS
        assert relative(logits(loaded), wanted) <= FLOAT32
    rows, heads = (1, 60), {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    shapes = {
        "input_norm": (*rows, CHANNELS),
        **{kind: (1, n, 60, HEAD_SIZE) for kind, n in heads.items()},
        "o_proj_in": (*rows, HEADS * HEAD_SIZE),
        "post_attention_norm": (*rows, CHANNELS),
        "down_proj_in": (*rows, INNER),
    }
    assert seen == [(f"layers.{i}.{kind}", shape) for i in range(LAYERS) for kind, shape in shapes.items()]


def test_online_hooks_only_what_it_needs():
    loaded = tiny_model()
    with surgery.online(loaded, r4=True):
        assert hooks(loaded) == LAYERS and loaded.config._attn_implementation == "sdpa"
    with surgery.online(loaded, r3=True, **at("k", "v", function=torch.clone)):
        assert hooks(loaded) == 0, "they go through the attention function"


def test_one_site_alone():
    loaded = tiny_model()
    seen = []
    with at_sites(loaded, lambda site, x: seen.append(site), ["layers.1.v", "layers.0.down_proj_in"]):
        logits(loaded)
    assert seen == ["layers.0.down_proj_in", "layers.1.v"]
    with (
        pytest.raises(
            KeyError, match=r"no site 'layers.2.q' in this model; it has layers.0.input_norm \.\. "
        ),
        at_sites(loaded, lambda site, x: None, ["layers.0.q", "layers.2.q"]),
    ):
        pass
    with pytest.raises(KeyError, match=r"a site's kind must be one of .*; got \['o_proj'\]"):
        sites_of(loaded, "k", "o_proj")


@pytest.mark.parametrize("kind", [kind for kind in ALL_KINDS if kind != "mlp_in"])  # of experts alone
def test_inner_blocks_see_what_outer_ones_put_there(kind: str):
    loaded = tiny_model(dtype=torch.float64)
    sites, seen = [f"layers.1.{kind}"], {}

    def note(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[str, Tensor], Tensor]:
        return lambda _, x: function(seen.setdefault(name, x.clone()))

    wanted = logits(loaded)
    with (
        at_sites(loaded, note("outer", lambda x: 2 * x), sites),
        at_sites(loaded, note("inner", torch.neg), sites),
        at_sites(loaded, note("innermost", lambda x: x), sites),
    ):
        assert relative(logits(loaded), wanted) > 1e-9
    assert torch.equal(seen["inner"], 2 * seen["outer"]) and torch.equal(
        seen["innermost"], -2 * seen["outer"]
    )
    assert relative(logits(loaded), wanted) <= FLOAT32


def test_an_inner_block_keeps_the_outer_one_s_r3():
    """As an evaluation inside a block that looks at its keys."""
    loaded = tiny_model(dtype=torch.float64)
    plain, rotated, wanted = [], [], logits(loaded)
    with surgery.online(loaded, **at("k", function=lambda x: (plain.append(x), x)[1])):
        logits(loaded)
    with (
        surgery.online(loaded, r3=True),
        surgery.online(loaded, **at("k", function=lambda x: (rotated.append(x), x)[1])),
    ):
        assert relative(logits(loaded), wanted) <= TINY
    H = hadamard_matrix(HEAD_SIZE) / HEAD_SIZE**0.5
    assert relative(rotated[0], plain[0] @ H.T) <= 1e-12


def test_nothing_stays_in_transformers_tables():
    loaded = tiny_model()
    before = len(ALL_ATTENTION_FUNCTIONS), len(ALL_MASK_ATTENTION_FUNCTIONS)
    with surgery.online(loaded, r3=True), surgery.online(loaded, **ALL_ONLINE):
        assert len(ALL_ATTENTION_FUNCTIONS) > before[0]
    assert (len(ALL_ATTENTION_FUNCTIONS), len(ALL_MASK_ATTENTION_FUNCTIONS)) == before


def test_a_function_sees_down_s_input_after_r4():
    loaded = tiny_model(dtype=torch.float64)
    plain, rotated = [], []
    kinds = ("o_proj_in", "down_proj_in")
    with surgery.online(loaded, **at(*kinds, function=lambda x: (plain.append(x), x)[1])):
        logits(loaded)
    with surgery.online(loaded, r4=True, **at(*kinds, function=lambda x: (rotated.append(x), x)[1])):
        logits(loaded)
    H = hadamard_matrix(INNER) / INNER**0.5
    assert relative(rotated[1], plain[1] @ H.T) <= TINY  # layer 0's down_proj: nothing before it has changed
    assert relative(rotated[0], plain[0]) <= TINY


@pytest.mark.parametrize("kinds", [NORMS, ("o_proj_in", "down_proj_in"), ("v", "down_proj_in")], ids=str)
def test_what_a_function_returns_is_what_is_used(kinds: tuple[str, ...]):
    loaded = tiny_model(dtype=torch.float64)
    with surgery.online(loaded, **at(*kinds, function=torch.zeros_like)):
        found = logits(loaded)
    embedded = loaded.model.lm_head(loaded.model.model.norm(loaded.model.model.embed_tokens(ids_of(loaded))))
    assert relative(found, embedded) <= TINY, "with every branch silent only the embedding reaches the head"


ALL_ONLINE = {
    "r3": True,
    "r4": True,
    "function": lambda site, x: kv4(x) if site[-2:] in (".k", ".v") else x.clone(),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "raises"])
def test_everything_online_is_gone_after_the_block(fails: bool, attention: str):
    loaded = tiny_model()
    loaded.model.set_attn_implementation(attention)
    wanted = logits(loaded)
    with (
        pytest.raises(RuntimeError, match="inside") if fails else nullcontext(),
        surgery.online(loaded, **ALL_ONLINE),
    ):
        assert hooks(loaded) == (4 + 1) * LAYERS and loaded.model.config._attn_implementation not in (
            "sdpa",
            "eager",
        )
        assert relative(logits(loaded), wanted) > SEEN
        if fails:
            raise RuntimeError("inside")
    assert hooks(loaded) == 0
    assert loaded.model.config._attn_implementation == attention
    assert relative(logits(loaded), wanted) <= FLOAT32


def test_an_error_inside_the_forward_pass_leaves_nothing_behind():
    loaded = tiny_model()

    def refuse(x: Tensor) -> Tensor:
        raise ArithmeticError(f"no {tuple(x.shape)}")

    with (
        pytest.raises(ArithmeticError, match=r"no \(1, 60, 64\)"),
        surgery.online(loaded, r3=True, r4=True, **at("o_proj_in", function=refuse)),
    ):
        logits(loaded)
    assert hooks(loaded) == 0 and loaded.model.config._attn_implementation == "sdpa"


def test_blocks_nest_and_a_second_model_is_left_alone():
    loaded, other = tiny_model(), tiny_model()
    wanted = logits(other)
    with surgery.online(loaded, r3=True):
        outer = loaded.model.config._attn_implementation
        with surgery.online(loaded, **at("k", "v", function=kv4)):
            assert loaded.model.config._attn_implementation != outer
        assert loaded.model.config._attn_implementation == outer
        assert relative(logits(other), wanted) <= FLOAT32


def rotated_pair(family: str) -> tuple[LoadedModel, LoadedModel]:
    """A tiny model in float64, and the same with everything fused that is used with R3 and R4."""
    original, rotated = (tiny_model(family, dtype=torch.float64) for _ in range(2))
    everything(rotated)
    return original, rotated


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_r3_with_a_batch_and_a_padded_mask(family: str, padding: str):
    original, rotated = rotated_pair(family)
    ids = ids_of(original, 90).reshape(3, 30)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :11] = mask[2, :4] = 0
    if padding == "right":
        mask[1, -11:] = mask[2, -4:] = 0
    real = mask.bool()
    wanted = logits(original, ids, attention_mask=mask)[real]
    with surgery.online(rotated, r3=True, r4=True):
        assert relative(logits(rotated, ids, attention_mask=mask)[real], wanted) <= TINY
    if padding == "left":
        assert relative(logits(original, ids)[real], wanted) > SEEN, "the mask matters"


@pytest.mark.parametrize("family", FAMILIES)
def test_generating_with_a_cache_gives_the_same_tokens(family: str):
    original, rotated = rotated_pair(family)
    ids = ids_of(original, 40).reshape(2, 20)
    options = {
        "max_new_tokens": 16,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }
    mask = torch.ones_like(ids)
    wanted = original.model.generate(ids, attention_mask=mask, **options)
    with surgery.online(rotated, r3=True, r4=True):
        found = rotated.model.generate(ids, attention_mask=mask, **options)
        uncached = rotated.model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert found.past_key_values.get_seq_length() == 35 and uncached.past_key_values is None
    assert torch.equal(found.sequences, wanted.sequences) and torch.equal(
        uncached.sequences, wanted.sequences
    )
    assert found.sequences.shape == (2, 36) and len(found.sequences[:, 20:].unique()) > 1
    assert relative(torch.stack(found.logits), torch.stack(wanted.logits)) <= TINY


def test_a_sliding_window_shorter_than_the_text():
    original, rotated = (other_sizes(family="mistral", sliding_window=8) for _ in range(2))
    everything(rotated)
    wanted = logits(original)
    with surgery.online(rotated, r3=True, r4=True):
        assert relative(logits(rotated), wanted) <= TINY
    assert relative(logits(other_sizes(family="mistral", sliding_window=1000)), wanted) > SEEN, (
        "the window matters"
    )


# The KV cache


def slowly_quantized(x: Tensor) -> Tensor:
    """4 bits asymmetric, one scale a token and head, written out: x (batch, heads, tokens, head size)."""
    out = torch.empty_like(x)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).tolist():
        row = x[tuple(place)]
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        scale = (high - low) / 15
        zero = round(-low / scale)
        out[tuple(place)] = torch.tensor(
            [scale * (min(max(round(v / scale) + zero, 0), 15) - zero) for v in row.tolist()], dtype=x.dtype
        )
    return out


def attention_by_hand(
    attention: torch.nn.Module, x: Tensor, cos_sin: tuple[Tensor, Tensor], r3: bool
) -> Tensor:
    """Layer 0's attention with keys and values at 4 bits: grouped heads, causal, one query at a time."""
    heads = (1, x.shape[1], -1, HEAD_SIZE)
    q, k, v = (getattr(attention, f"{name}_proj")(x).view(heads) for name in "qkv")
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *cos_sin)
    H = hadamard_matrix(HEAD_SIZE) / HEAD_SIZE**0.5 if r3 else torch.eye(HEAD_SIZE, dtype=torch.float64)
    q, k, v = q @ H.T, slowly_quantized(k @ H.T), slowly_quantized(v.transpose(1, 2))
    assert k.shape[1] == KV_HEADS
    out = torch.zeros(x.shape[1], HEADS, HEAD_SIZE, dtype=torch.float64)
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        for t in range(x.shape[1]):
            share = torch.softmax(q[0, head, t] @ k[0, shared, : t + 1].T * HEAD_SIZE**-0.5, dim=0)
            out[t, head] = share @ v[0, shared, : t + 1]
    return attention.o_proj(out.reshape(1, x.shape[1], -1))


@pytest.mark.parametrize("r3", [False, True], ids=["without R3", "with R3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_4_bit_keys_and_values_are_quantized_after_r3_per_token_and_head(family: str, r3: bool):
    loaded = tiny_model(family, dtype=torch.float64)
    attention = loaded.layers[0].self_attn
    met = {}

    def note(_module: torch.nn.Module, _args: tuple, options: dict, output: tuple) -> None:
        met.update(x=options["hidden_states"], cos_sin=options["position_embeddings"], out=output[0])

    with surgery.online(loaded, r3=r3, **at("k", "v", function=kv4)):
        handle = attention.register_forward_hook(note, with_kwargs=True)
        logits(loaded, ids_of(loaded, 24))
    handle.remove()
    assert relative(met["out"], attention_by_hand(attention, met["x"], met["cos_sin"], r3)) <= TINY
    assert relative(met["out"], attention_by_hand(attention, met["x"], met["cos_sin"], not r3)) > 1e-4, (
        "R3 matters to the keys' error"
    )


def test_quantized_keys_in_the_cache_give_the_same_logits_as_the_whole_text_at_once():
    """Keys are quantized as they are read, each with its own scale, so it does not matter when a token came."""
    loaded = tiny_model(dtype=torch.float64)
    ids = ids_of(loaded, 30)
    with surgery.online(loaded, r3=True, **at("k", "v", function=kv4)), torch.no_grad():
        whole = logits(loaded, ids)
        first = loaded.model(ids[:, :20], use_cache=True)
        rest = loaded.model(ids[:, 20:], past_key_values=first.past_key_values).logits
    assert relative(rest, whole[:, 20:]) <= TINY


def test_the_norm_output_can_be_quantized_as_an_evaluation_does():
    """4 bits on inputs: a difference that shows without rotation, smaller with RH on a model with massive
    tokens and an outlier channel.
    """
    quantize = QuantSpec(bits=4, scheme="asymmetric")
    errors = {}
    for name in ("NR", "RH"):
        loaded = tiny_model(dtype=torch.float64)
        rotate(name)(loaded)
        wanted = logits(loaded)
        with surgery.online(loaded, **at(*NORMS, function=lambda x: fake_quantize(x, quantize))):
            errors[name] = float((logits(loaded) - wanted).pow(2).mean())
    assert 0 < errors["RH"] < errors["NR"]
