"""What attention is called with, its maps, its sinks; what is at inner sites; massive values removed: by
transformers' own maps, by loops, by hooks of torch alone.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from again import assert_near
from conftest import LAYERS, MASSIVE, tiny_model
from test_families import folder_of, load
from test_intervene import hooks as count_hooks, slow_mask, windows_of
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dfrot_lab.model import checkpoint, hooks, stream
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe import attention, inside, residual

FAMILIES = (
    "llama", "mistral", "qwen2 with a window", "qwen3", "smollm3", "granite", "mixtral", "gemma2", "gemma3", "olmo2",
    "phi3", "opt", "gpt_neox",
)  # fmt: skip
"""Of the families those that compute attention each in its own way."""
WINDOW = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(0))


def slow_shares(maps: list[Tensor]) -> Tensor:
    """Token by token, from whole maps (heads, tokens, tokens)."""
    tokens = maps[0].shape[-1]
    later = [[own[:, j + 1 :, j].double().mean(1) for j in range(tokens)] for own in maps]
    return torch.stack([torch.stack(own, -1) for own in later])


@pytest.mark.parametrize("case", FAMILIES)
def test_maps_and_sinks_are_those_of_transformers_eager_attention(case: str, tmp_path: Path):
    folder = folder_of(case, tmp_path / "model")
    eager: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        wanted = [each[0] for each in eager(WINDOW[None], output_attentions=True).attentions]
    loaded = load(folder, "float32")
    found = attention.maps(loaded, WINDOW, range(3), queries=7)
    assert [*found] == [0, 1, 2]
    for own, other in zip(found.values(), wanted, strict=True):
        assert own.dtype == torch.float32 and (own - other).abs().max() < 1e-5
    shares, hidden = attention.shares(loaded, WINDOW, queries=5)
    slow = slow_shares(wanted)
    assert (shares - slow)[..., :-1].abs().max() < 1e-5 and shares[..., -1].isnan().all()
    assert_near(hidden, stream.through(loaded, [WINDOW[None]])[0][0])


def test_weights_of_keys_that_say_nothing_are_equal_and_of_queries_so_far():
    q, k = torch.randn(4, 10, 8), torch.zeros(2, 10, 8)
    parts = list(attention.weights(q, k, None, {}, queries=4))
    assert [first for first, _ in parts] == [0, 4, 8]
    whole = torch.cat([part for _, part in parts], 1)
    wanted = torch.ones(10, 10).tril() / torch.arange(1, 11)[:, None]
    torch.testing.assert_close(whole, wanted.expand(4, 10, 10))


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_weights_keep_to_the_mask_they_are_given(kind: str):
    q, k = torch.randn(2, 2, 6, 8).unbind()
    mask = torch.ones(6, 6, dtype=torch.bool).tril() & ~torch.ones(6, 6, dtype=torch.bool).tril(-3)
    given = mask[None] if kind == "bool" else torch.zeros(1, 6, 6).masked_fill(~mask, -math.inf)
    found = torch.cat(
        [part for _, part in attention.weights(q, k, given, {"scaling": 0.5, "softcap": 2.0}, 4)], 1
    )
    scores = 2 * torch.tanh(0.5 * q @ k.mT / 2)
    torch.testing.assert_close(found, scores.masked_fill(~mask, -math.inf).softmax(-1))


def test_the_values_weighted_are_what_o_proj_reads():
    """q, k, v and o_proj_in of one layer hang together: softmax(q k^T / sqrt(d)) v, head beside head."""
    loaded = tiny_model("qwen3")
    for _, seen in inside.walked(loaded, WINDOW, "q", "k", "v", "o_proj_in"):
        [(_, own)] = attention.weights(seen["q"], seen["k"], None, {})
        values = seen["v"].repeat_interleave(len(own) // len(seen["v"]), 0)
        assert_near((own @ values).transpose(0, 1).flatten(1), seen["o_proj_in"])


# ---- inner sites


def test_what_is_walked_is_what_torch_s_own_hooks_see():
    loaded, wanted = tiny_model(), dict[str, Tensor]()
    names = {"o_proj_in": "self_attn.o_proj", "down_proj_in": "mlp.down_proj", "residual": ""}
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, key=f"{number} {site}": wanted.update({key: args[0][0]})
        )
        for number, layer in enumerate(loaded.layers)
        for site, name in names.items()
    ]
    loaded.model(WINDOW[None])
    for handle in handles:
        handle.remove()
    found = dict(inside.walked(loaded, WINDOW, *names))
    assert [*found] == [0, 1] and len(wanted) == 6
    for number, seen in found.items():
        for site, x in seen.items():
            assert_near(x, wanted[f"{number} {site}"])


def test_chosen_layers_alone_are_handed_over_and_later_ones_not_run(monkeypatch: pytest.MonkeyPatch):
    ran: list[int] = []
    own = stream.Walk.run
    monkeypatch.setattr(stream.Walk, "run", lambda walk, n, x: ran.append(n) or own(walk, n, x))
    loaded = tiny_model()
    found = dict(inside.walked(loaded, WINDOW, "v", layers=[0]))
    assert [*found] == ran == [0] and [*found[0]] == ["v"] and count_hooks(loaded) == 0


def test_a_walk_that_is_left_leaves_no_hook():
    loaded = tiny_model()
    for _ in inside.walked(loaded, WINDOW, "q", "down_proj_in"):
        assert count_hooks(loaded) > 0
        break
    assert count_hooks(loaded) == 0 and loaded.config._attn_implementation == "sdpa"


def test_an_expert_is_seen_with_the_tokens_it_was_given(tmp_path: Path):
    loaded = load(folder_of("mixtral", tmp_path / "m"), "float32")
    for number, seen in inside.walked(loaded, WINDOW, "post_attention_norm", "down_proj_in", "mlp_in"):
        rows = seen["post_attention_norm"]
        _, _, chosen = loaded.layers[number].mlp.gate(rows)
        for expert in chosen.unique().tolist():
            assert_near(seen[f"experts.{expert}.mlp_in"], rows[(chosen == expert).any(1)])
            assert len(seen[f"experts.{expert}.down_proj_in"]) == len(seen[f"experts.{expert}.mlp_in"])


def test_a_model_read_layer_by_layer_has_the_same_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = folder_of("llama", tmp_path / "m")
    wanted = attention.shares(load(folder), WINDOW)[0], dict(inside.walked(load(folder), WINDOW, "k"))
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    streamed = load(folder)
    assert streamed.checkpoint is not None
    assert torch.equal(attention.shares(streamed, WINDOW)[0][..., :-1], wanted[0][..., :-1])
    for number, seen in inside.walked(streamed, WINDOW, "k"):
        assert torch.equal(seen["k"], wanted[1][number]["k"])


# ---- what attention is called with


def test_what_attention_is_called_with_can_be_changed_and_inner_blocks_see_it():
    loaded, seen = tiny_model(), list[Any]()
    plain = attention.maps(loaded, WINDOW, [0, 1])

    def still(layer: int, call: list[Tensor | None], how: Any) -> None:
        seen.append((layer, how["scaling"]))
        call[0] = torch.zeros_like(call[0])

    before = set(ALL_ATTENTION_FUNCTIONS)
    with hooks.at_attention(loaded, still):
        found = attention.maps(loaded, WINDOW, [0, 1])
    equal = torch.ones(24, 24).tril() / torch.arange(1, 25)[:, None]
    assert all((own - equal).abs().max() < 1e-6 for own in found.values())
    assert seen == [(0, 0.25), (1, 0.25)], "a head has 16 channels"
    assert set(ALL_ATTENTION_FUNCTIONS) == before
    again = attention.maps(loaded, WINDOW, [0, 1])
    assert all(torch.equal(again[n], plain[n]) for n in plain)


# ---- massive values removed


def entered(loaded: LoadedModel, ids: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    handles = [
        x.register_forward_pre_hook(lambda _m, args: found.append(args[0].clone())) for x in loaded.layers
    ]
    loaded.model(ids)
    for handle in handles:
        handle.remove()
    return found


def test_zero_is_what_set_massive_does():
    loaded = tiny_model()
    ids = windows_of(loaded, 2)
    with residual.massive_set(loaded, "zero", ids):
        wanted = loaded.model(ids).logits
    with residual.massive_removed(loaded, "zero"):
        assert_near(loaded.model(ids).logits, wanted)


def test_the_mean_of_the_others_is_of_tokens_without_a_massive_value_in_the_channel():
    loaded = tiny_model()
    ids = windows_of(loaded, 1)
    [was, *_] = entered(loaded, ids)
    with residual.massive_removed(loaded, "mean of the others"):
        [became, *_] = entered(loaded, ids)
    mask, channel = slow_mask(was), max(MASSIVE, key=lambda c: abs(MASSIVE[c]))
    column = was[0, :, channel]
    others = column[~mask[0, :, channel]].mean()
    assert 0 < int(mask.sum()) < 60 and torch.equal(became[~mask], was[~mask])
    assert_near(became[mask], others.expand_as(became[mask]))


def test_zero_after_the_norm_leaves_the_stream_and_the_rest_of_the_row():
    loaded = tiny_model()
    ids = windows_of(loaded)[0]
    plain = dict(inside.walked(loaded, ids, "residual", "input_norm", layers=[0]))[0]
    with residual.massive_removed(loaded, "zero after the norm"):
        found = dict(inside.walked(loaded, ids, "residual", "input_norm", layers=[0]))[0]
    mask = slow_mask(plain["residual"][None])[0]
    assert mask.any() and torch.equal(found["residual"], plain["residual"])
    assert torch.equal(found["input_norm"], plain["input_norm"].masked_fill(mask, 0))
    assert count_hooks(loaded) == 0


@pytest.mark.parametrize("how", residual.REMOVED)
def test_where_nothing_is_massive_nothing_is_removed(how: str):
    loaded = tiny_model(plant=False)
    ids = windows_of(loaded)
    plain = loaded.model(ids).logits
    with residual.massive_removed(loaded, how):
        assert_near(loaded.model(ids).logits, plain)


# ---- refusals


def test_what_cannot_be_looked_at_is_refused_in_words():
    loaded = tiny_model()
    with pytest.raises(ValueError, match=r"how must be one of zero, mean of the others, .*; got 'half'"):
        residual.massive_removed(loaded, "half").__enter__()
    with pytest.raises(ValueError, match=r"layers must be numbers from 0 to 1; got \[2\]"):
        attention.maps(loaded, WINDOW, [0, LAYERS])
    with pytest.raises(ValueError, match=r"ids.shape must be that of one window \(tokens,\); got \(1, 24\)"):
        next(inside.walked(loaded, WINDOW[None], "q"))
    with pytest.raises(ValueError, match=r"ids must be of two tokens or more.*; got 1 tokens"):
        attention.shares(loaded, WINDOW[:1])
    with pytest.raises(KeyError, match="a site's kind must be one of"):
        next(inside.walked(loaded, WINDOW, "scores"))
    assert count_hooks(loaded) == 0
