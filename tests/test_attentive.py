"""Weights that know what their layer's attention does, RSQ and aespa: what they are told against slow loops over
tokens and heads in float64, what they make of it against their definitions, and what both refuse.
"""

import sys

import pytest
import torch
from conftest import HEAD_SIZE, HEADS, KV_HEADS, LAYERS
from test_families import folder_of as family_folder, load
from test_gptq import (
    UNCLIPPED,
    fresh,
    gaussian,
    hessian_of,
    linears,
    same_weights,
    stop_after_a_layer,
    weight_spec,
)
from test_stream import folder_of, recipe
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths.quantizers import dequantize
from dfrot_lab.model import checkpoint, corpus, hooks, loading, surgery
from dfrot_lab.model.families import QKV, heads_of
from dfrot_lab.model.loading import LoadedModel, linear
from dfrot_lab.model.prefix import before
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import WeightSpec
from dfrot_lab.score import build
from dfrot_lab.weights import aespa, calibrate, gptq, look, places, rsq
from dfrot_lab.weights.aespa import Attention
from dfrot_lab.weights.gptq import Seen
from dfrot_lab.weights.run import quantize_weights

GROUP = HEADS // KV_HEADS
WINDOWS, WINDOW = 3, 40


class Told:
    """A weight quantizer that notes what it is told, and rounds by GPTQ."""

    CALIBRATED, VERSION = True, 1

    def __init__(self, asked: type[look.Look]) -> None:
        self.of, self.Look = list[Seen](), asked

    def quantize(self, weight, about, spec):
        self.of.append(Seen(about.hessian.clone(), None, about.attention))
        return gptq.quantize(weight, about, spec)


@pytest.fixture
def told(monkeypatch, request):
    found, load_of = Told(request.param), registry.load
    monkeypatch.setitem(registry.WEIGHTS, "told", registry.Choice("told"))
    monkeypatch.setattr(
        registry, "load", lambda table, name, *of: found if name == "told" else load_of(table, name, *of)
    )
    return found


def read(loaded: LoadedModel, ids: Tensor, *, r3: bool = False, then=None) -> dict[str, Tensor]:
    """What each site has of windows `ids`, (windows, [heads,] tokens, channels) float64, in float32 passes."""
    found: dict[str, Tensor] = {}

    def note(site: str, x: Tensor) -> Tensor | None:
        new = then(site, x) if then else None
        found[site] = (x if new is None else new).double()
        return new

    with surgery.online(loaded, r3=r3, function=note), torch.no_grad():
        loaded.model(ids)
    return found


def at_look(loaded: LoadedModel, original: LoadedModel, number: int) -> LoadedModel:
    """A model quantized as far as a layer, which is as it was."""
    for name in original.roles.linears(original.layers[number]):
        weights = [linear(each.layers[number], name).weight for each in (loaded, original)]
        kept = weights[0].clone()
        weights[0].copy_(weights[1])
        weights[1].copy_(kept)
    return loaded


def slow_map(
    q: Tensor, k: Tensor, scaling: float, window: int | None = None, bound: float | None = None
) -> Tensor:
    """A head's attention weights (tokens, tokens): a query sees itself and the tokens before it, `window` of
    them in all, if any; scores have a `bound`, if any."""
    found = torch.zeros(len(q), len(k), dtype=torch.float64)
    for t in range(len(q)):
        first = 0 if window is None else max(0, t + 1 - window)
        scores = torch.stack([q[t] @ k[s] for s in range(first, t + 1)]) * scaling
        shares = torch.exp(bound * torch.tanh(scores / bound) if bound else scores)
        found[t, first : t + 1] = shares / shares.sum()
    return found


def rotary(loaded: LoadedModel, tokens: int) -> Tensor:
    """R (tokens, size, size) of each place by what the family's own RoPE makes of columns of the identity."""
    size, layer = heads_of(loaded.config)[2], loaded.layers[0]
    if loaded.family == "OPTForCausalLM":
        return torch.eye(size, dtype=torch.float64).expand(tokens, -1, -1)
    kind = (layer.self_attn.layer_type,) if loaded.family == "Gemma3ForCausalLM" else ()
    places_ = torch.zeros(1, dtype=torch.float64), torch.arange(tokens)[None]
    cos, sin = loading.body(loaded).rotary_emb(*places_, *kind)
    apply = sys.modules[type(layer).__module__].apply_rotary_pos_emb
    unit = torch.eye(size, dtype=torch.float64)[None, :, None].expand(-1, -1, tokens, -1)
    return apply(unit, unit, cos, sin)[0][0].permute(1, 2, 0)


def gain(loaded: LoadedModel, number: int, name: str, heads: int) -> Tensor:
    """What a norm after the linear multiplies the rows of each head by (heads, size); 1 where there is none."""
    parts, size = dict(loaded.layers[number].named_modules()), heads_of(loaded.config)[2]
    norm = parts.get(f"self_attn.{name}")
    if norm is None:
        return torch.ones(heads, size, dtype=torch.float64)
    own = norm.weight.double() + (loaded.family == "Gemma3ForCausalLM")
    return own.repeat(heads).reshape(heads, size) if len(own) == size else own.reshape(heads, size)


def slow_attention(loaded: LoadedModel, seen: dict[str, Tensor], number: int, skip: int) -> Attention:
    """G of every head and the Hessian of every value head, token by token."""
    heads, kv_heads, _ = heads_of(loaded.config)
    group, x = heads // kv_heads, seen[f"layers.{number}.input_norm"]
    q, k = (seen[f"layers.{number}.{kind}"] for kind in "qk")
    attention = loaded.layers[number].get_submodule(loaded.roles.o.rpartition(".")[0])
    scaling = attention.scaling if loaded.family != "OPTForCausalLM" else 1.0
    sliding, bound = (
        getattr(loaded.config, own, None) for own in ("sliding_window", "attn_logit_softcapping")
    )
    turns = rotary(loaded, q.shape[2])[skip:]
    keys = [sum(torch.outer(r, r) for r in k[:, h // group].flatten(0, 1)) for h in range(heads)]
    queries = [
        sum(
            torch.outer(r, r) for h in range(n * group, (n + 1) * group) for r in q[:, h, skip:].flatten(0, 1)
        )
        for n in range(kv_heads)
    ]
    gains = [*gain(loaded, number, "q_norm", heads), *gain(loaded, number, "k_norm", kv_heads)]
    scores = torch.stack(
        [
            sum((R * D).T @ own @ (R * D) for R in turns) / len(turns)
            for own, D in zip(keys + queries, gains, strict=True)
        ]
    )
    values = torch.zeros(kv_heads, x.shape[-1], x.shape[-1], dtype=torch.float64)
    for window in range(len(x)):
        for h in range(heads):
            given = slow_map(q[window, h], k[window, h // group], scaling, sliding, bound)
            for t in range(skip, len(given)):
                mixed = sum(given[t, s] * x[window, s] for s in range(skip, t + 1))
                values[h // group] += torch.outer(mixed, mixed)
    return Attention(scores, values, None)


def slow_weights(seen: dict[str, Tensor], number: int, skip: int) -> Tensor:
    """r (windows, tokens): what each token is given by all heads and queries, from 0.005 to 1 in its window."""
    q, k = (seen[f"layers.{number}.{kind}"] for kind in "qk")
    found = []
    for window in range(len(q)):
        given = sum(
            slow_map(q[window, h], k[window, h // GROUP], HEAD_SIZE**-0.5)[skip:, skip:].sum(0)
            for h in range(HEADS)
        )
        found.append(0.005 + 0.995 * (given - given.min()) / (given.max() - given.min()))
    return torch.stack(found)


def near(found: Tensor, expected: Tensor, part: float = 1e-4) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=part * float(expected.abs().max()))


def ids_of(spec: WeightSpec, loaded: LoadedModel, prefix: Tensor | None = None) -> Tensor:
    ids = corpus.sampled_blocks(
        spec.corpus, loaded.tokenizer, blocks=spec.windows, window=spec.window, sample=None
    )
    return before(ids, prefix)


PREFIX = torch.tensor([10, 65, 66])


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))


WAYS = [(3, None), (1, None), (3, PREFIX)]


@pytest.fixture(params=WAYS, ids=["at once", "in lots", "after a prefix"])
def way(request, monkeypatch):
    """So many windows pass at once, after a prefix or none; maps and turns come in small parts."""
    monkeypatch.setattr(calibrate, "windows_at_once", lambda _window, _width: request.param[0])
    monkeypatch.setattr(look, "QUERIES", 16)
    monkeypatch.setattr(places, "PLACES", 7)
    return request.param[1]


# ---- what they are told


@pytest.mark.parametrize("told", [rsq.Look], indirect=True)
def test_rsq_s_hessians_weigh_each_token_by_what_it_is_given(told, way, text_file, store):
    """The weights are of the layer as it was, inputs quantized; what is weighed is of the linears as they are."""
    loaded, original, spec = fresh(rotated=True), fresh(rotated=True), weight_spec(text_file, method="told")
    quantize_weights(loaded, spec, {"by": "told"}, store, r4=False, prefix=way)
    ids, skip = ids_of(spec, loaded, way), 0 if way is None else len(way)
    now, abouts = read(loaded, ids), iter(told.of)
    for number in range(LAYERS):
        at_look(loaded, original, number)
        r = slow_weights(read(loaded, ids), number, skip)
        at_look(loaded, original, number)
        for site in ("input_norm", "o_proj_in", "post_attention_norm", "down_proj_in"):
            x = now[f"layers.{number}.{site}"][:, skip:]
            expected = sum(
                r[w, t] ** 2 * torch.outer(x[w, t], x[w, t]) for w in range(WINDOWS) for t in range(WINDOW)
            )
            about = next(abouts)
            near(about.hessian, expected, 1e-3)
            assert about.attention is None
    assert not list(abouts)


@pytest.mark.parametrize("told", [aespa.Look], indirect=True)
def test_aespa_is_told_what_scores_and_values_do(told, way, text_file, store):
    """Two query heads a key-value head; of the layer as it was, what it reads being quantized."""
    loaded, original, spec = fresh(rotated=True), fresh(rotated=True), weight_spec(text_file, method="told")
    quantize_weights(loaded, spec, {"by": "told"}, store, r4=False, prefix=way)
    ids, skip = ids_of(spec, loaded, way), 0 if way is None else len(way)
    for number, (about, *others) in enumerate(zip(*[iter(told.of)] * 4, strict=True)):
        at_look(loaded, original, number)
        seen = read(loaded, ids)
        expected = slow_attention(loaded, seen, number, skip)
        at_look(loaded, original, number)
        x = seen[f"layers.{number}.input_norm"][:, skip:].flatten(0, 1)
        near(about.hessian, x.T @ x)
        for found, own in zip(about.attention[:2], expected[:2], strict=True):
            assert found.shape == own.shape
            for head, wanted in zip(found, own, strict=True):
                near(head, wanted, 1e-3)
        assert all(other.attention is None for other in others)


FAMILIES = ["mistral", "granite", "helium", "glm", "ernie4_5", "opt", "phi3", "gpt_neox", "qwen3", "gemma3"]
FAMILIES += ["olmo2", "gemma2"]


@pytest.mark.parametrize("told", [aespa.Look], indirect=True)
@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_s_places_and_masks_are_its_own(told, case, tmp_path, text_file, store, monkeypatch):
    """A sliding window of 8, a scaling of its own, RoPE of neighbours, of half a head, none at all, all in one
    linear, norms of a head and of all heads, scores that are bounded."""
    monkeypatch.setattr(look, "QUERIES", 16)
    loaded = load(family_folder(case, tmp_path / "m"), "float32")
    surgery.prepare(loaded)
    spec = weight_spec(text_file, method="told").with_(windows=1, window=24)
    seen = read(loaded, ids_of(spec, loaded))
    expected = slow_attention(loaded, seen, 0, 0)
    quantize_weights(loaded, spec, {"by": "told"}, store, r4=False)
    for found, own in zip(told.of[0].attention[:2], expected[:2], strict=True):
        for head, wanted in zip(found, own, strict=True):
            scale = float(head.diagonal().sum() / wanted.diagonal().sum())  # GPTQ does not feel a factor
            near(head, scale * wanted, 1e-3)


@pytest.mark.parametrize("case", ["llama", "phi3", "gpt_neox"])
def test_rows_are_those_of_q_k_and_v_head_by_head(case, tmp_path, ids):
    """Other weights in a head's rows change that head alone, of what attention sees, and no other."""
    loaded = load(family_folder(case, tmp_path / "m"))
    heads, kv_heads, size = heads_of(loaded.config)
    weights = [linear(loaded.layers[0], name).weight for name in loaded.roles.feeds[0][2]]
    before_, order = read(loaded, ids), places.rows(loaded)
    assert sorted(order.tolist()) == list(range(sum(map(len, weights))))
    expected = [
        (kind, head)
        for kind, count in zip("qkv", (heads, kv_heads, kv_heads), strict=True)
        for head in range(count)
    ]
    for own, wanted in zip(order.split(size), expected, strict=True):
        kept = torch.cat(weights)
        kept[own] *= 2
        for weight, new in zip(weights, kept.split([len(w) for w in weights]), strict=True):
            weight.copy_(new)
        now = read(loaded, ids)
        changed = [
            (kind, head)
            for kind in "qkv"
            for head in range(now[f"layers.0.{kind}"].shape[1])
            if not torch.equal(now[f"layers.0.{kind}"][:, head], before_[f"layers.0.{kind}"][:, head])
        ]
        assert changed == [wanted]
        before_ = now


@pytest.mark.parametrize("told", [aespa.Look], indirect=True)
def test_the_hessian_of_values_is_what_attention_writes(told, text_file, store):
    """tr(dW H dW^T) is how far a change of v moves what o reads, squared: attention itself says so."""
    loaded, spec = fresh(), weight_spec(text_file, method="told")
    ids = ids_of(spec, loaded)
    first = read(loaded, ids)["layers.0.o_proj_in"]
    change = 0.01 * gaussian(KV_HEADS * HEAD_SIZE, loaded.channels, seed=5)
    changed = fresh()
    linear(changed.layers[0], QKV[2]).weight.add_(change)
    moved = float((read(changed, ids)["layers.0.o_proj_in"] - first).square().sum())
    quantize_weights(loaded, spec, {"by": "told"}, store, r4=False)
    of_heads = zip(change.split(HEAD_SIZE), told.of[0].attention.values, strict=True)
    assert sum(float((dW @ H * dW).sum()) for dW, H in of_heads) == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize("told", [aespa.Look], indirect=True)
def test_r3_and_r2_change_nothing_that_is_told(told, text_file, tmp_path):
    spec = weight_spec(text_file, method="told")
    turned = fresh()
    surgery.rotate_heads(turned)
    quantize_weights(fresh(), spec, {}, Store(tmp_path / "a"), r4=False)
    quantize_weights(turned, spec, {}, Store(tmp_path / "b"), r3=True, r4=False)
    plain, rotated = told.of[0], told.of[len(told.of) // 2]
    for one, other in zip(plain.attention[:2], rotated.attention[:2], strict=True):
        near(other, one.double(), 1e-4)


@pytest.mark.parametrize("told", [aespa.Look, rsq.Look], indirect=True, ids=["aespa", "rsq"])
def test_rounded_calibration_has_the_maps_of_what_is_rounded(told, tmp_path, text_file, store):
    """Inputs and keys at 4 bits: the maps of the last layer are those of the built model that is quantized."""
    spec = recipe(folder_of(tmp_path / "m"), text_file, "16-4-4", weights="gptq")
    grid = spec.weights.quantizer.with_(bits=8)
    spec = spec.with_(weights=spec.weights.with_(method="told", rounded=True, quantizer=grid))
    built, notes = build.build(spec, store), {}

    def note(layer, seen, _how):
        notes[layer] = seen[:2]

    own = spec.weights
    ids = corpus.sampled_blocks(own.corpus, built.loaded.tokenizer, blocks=4, window=own.window, sample=None)
    original = build.build(spec.with_(weights=WeightSpec(method="rtn", quantizer=grid.with_(bits=16))), store)
    at_look(built.loaded, original.loaded, 1)
    seen = {}
    with (
        build.quantized(built, spec, fake=True),
        hooks.at_attention(built.loaded, note),
        hooks.at_sites(
            built.loaded, lambda site, x: seen.update({site: x.double()}), ["layers.1.input_norm"]
        ),
        torch.no_grad(),
    ):
        built.loaded.model(ids)
    seen |= {f"layers.1.{kind}": x.double() for kind, x in zip("qk", notes[1], strict=True)}
    if told.Look is rsq.Look:
        x, r = seen["layers.1.input_norm"], slow_weights(seen, 1, 0)
        near(told.of[4].hessian, torch.einsum("wt,wti,wtj->ij", r**2, x, x), 2e-3)
    else:
        expected = slow_attention(built.loaded, seen, 1, 0)
        near(told.of[4].attention.values, expected.values, 2e-3)
        H = surgery.hadamard(torch.eye(HEAD_SIZE, dtype=torch.float64))
        keys = seen["layers.1.k"][:, 0].flatten(0, 1) @ H
        turns = rotary(built.loaded, own.window)
        wanted = torch.einsum("tai,ab,tbj->ij", turns, keys.T @ keys, turns) / len(turns)
        near(told.of[4].attention.scores[0], wanted, 2e-3)


# ---- what they make of it


def test_weights_of_a_window_go_from_the_least_to_one():
    given = torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 5.0]])
    torch.testing.assert_close(rsq.scaled(given), torch.tensor([[1.0, 0.005, 0.5025], [1.0, 1.0, 1.0]]))


@pytest.mark.parametrize("lots", [3, 1])
def test_rsq_of_tokens_that_weigh_the_same_is_gptq_to_the_bit(lots, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(rsq, "LEAST", 1.0)
    monkeypatch.setattr(calibrate, "windows_at_once", lambda _window, _width: lots)
    one, other = fresh(rotated=True), fresh(rotated=True)
    for loaded, method in ((one, "rsq"), (other, "gptq")):
        quantize_weights(
            loaded, weight_spec(text_file, method=method), {}, Store(tmp_path / method), r3=True, r4=True
        )
    assert same_weights(one, other)
    monkeypatch.undo()
    monkeypatch.setattr(calibrate, "windows_at_once", lambda _window, _width: lots)
    weighed = fresh(rotated=True)
    quantize_weights(
        weighed, weight_spec(text_file, method="rsq"), {}, Store(tmp_path / "w"), r3=True, r4=True
    )
    assert not same_weights(weighed, other)


def kronecker(weight: Tensor, rows: Tensor, hessian: Tensor, spec: WeightSpec) -> Tensor:
    """Codes of one head's `weight` (size, in) by Optimal Brain Quantization of the whole Hessian, every
    number after the other in the order of reading, its inverse shrunk a number a step; float64."""
    own = []
    for matrix in (rows.double(), hessian.double()):
        own.append(matrix + spec.damping * matrix.diagonal().mean() * torch.eye(len(matrix)))
    inverse, left = torch.linalg.inv(torch.kron(*own)), weight.double().flatten()
    made, width = torch.zeros_like(left), weight.shape[1]
    for n in range(len(left)):
        if n % width == 0:
            scale = left[n : n + width].abs().max() / 7
        made[n] = (left[n] / scale).round().clamp(-8, 7)
        left -= (left[n] - made[n] * scale) / inverse[n, n] * inverse[n]
        inverse = inverse - torch.outer(inverse[:, n], inverse[n]) / inverse[n, n]
    return made.reshape(weight.shape)


def test_row_by_row_is_gptq_of_the_whole_hessian_of_a_head():
    weight, hessian = gaussian(3, 8, 20), hessian_of(20)
    rows = torch.stack([hessian_of(8, seed=n, mix=2.0) for n in range(3)])
    found = aespa.row_by_row(weight, hessian, rows, UNCLIPPED)
    expected = torch.cat([kronecker(w, g, hessian, UNCLIPPED) for w, g in zip(weight, rows, strict=True)])
    assert found.scale.shape == (24, 1) and (found.codes.double() == expected).double().mean() > 0.97


@pytest.mark.parametrize("grid", [WeightSpec().quantizer, QuantSpec(granularity="per_group", group_size=10)])
def test_rows_that_do_not_interact_are_gptq_s(grid):
    """G of the identity: each row for itself, every one in its place, with groups of inputs, too; and so are
    values whose tokens each see themselves alone, and linears that have no heads."""
    spec, weight, hessian = WeightSpec(quantizer=grid), gaussian(48, 20), hessian_of(20)
    about = Attention(torch.eye(8).expand(4, -1, -1), hessian.expand(2, -1, -1), torch.randperm(48))
    expected = gptq.quantize(weight, Seen(hessian), spec)
    for found in (
        aespa.quantize(weight, Seen(hessian, None, about), spec),
        aespa.quantize(weight, Seen(hessian), spec),
    ):
        # One product of 48 rows rounds otherwise than one of 4.
        assert (
            found.codes == expected.codes
        ).double().mean() > 0.99 and found.codes.shape == expected.codes.shape
        torch.testing.assert_close(found.scale, expected.scale)


def objectives(weight: Tensor, made: Tensor, about: Seen) -> tuple[float, float]:
    """Of q and k the sum of tr(G dW H dW^T) over heads, of v that of tr(dW H dW^T), in float64."""
    size, wrong = about.attention.scores.shape[-1], (made - weight).double()
    count = len(about.attention.scores) * size
    scores = torch.einsum(
        "hai,hab,ij,hbj->", wrong[:count].unflatten(0, (-1, size)), about.attention.scores.double(),
        about.hessian.double(), wrong[:count].unflatten(0, (-1, size)),
    )  # fmt: skip
    values = wrong[count:].unflatten(0, (-1, size))
    return float(scores), float(
        torch.einsum("hai,hij,haj->", values, about.attention.values.double(), values)
    )


@pytest.mark.parametrize("told", [aespa.Look], indirect=True)
def test_scores_and_values_move_less_than_by_gptq(told, text_file, tmp_path):
    """On the layers of the tiny model, whose heads are told the truth: on average over models and layers."""
    gone = []
    for seed in range(3):
        loaded, spec = fresh(), weight_spec(text_file, method="told").with_(sample=seed)
        weights = [torch.cat([linear(layer, name).weight.clone() for name in QKV]) for layer in loaded.layers]
        quantize_weights(loaded, spec, {}, Store(tmp_path / str(seed)), r4=False)
        for weight, about in zip(weights, told.of[-4 * LAYERS :: 4], strict=True):
            made = [each.quantize(weight, about, WeightSpec()) for each in (aespa, gptq)]
            ours, plain = (objectives(weight, dequantize(m, weight.shape), about) for m in made)
            gone.append([one / other for one, other in zip(ours, plain, strict=True)])
    scores, values = torch.tensor(gone).mean(0)
    assert scores < 0.9 and values < 0.97, (scores, values)


# ---- in a model


@pytest.mark.parametrize("method", ["rsq", "aespa"])
def test_kept_and_streamed_are_the_same_and_nothing_stays_behind(method, tmp_path, text_file, monkeypatch):
    spec = recipe(folder_of(tmp_path / "m"), text_file, "4-4-4", weights=method)
    one = build.build(spec, Store(tmp_path / "kept"))
    assert one.loaded.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.loaded.model.modules())
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    other = build.build(spec, Store(tmp_path / "streamed"))
    assert other.loaded.checkpoint is not None
    for number in range(LAYERS):
        kept, streamed = one.codes[number], other.codes[number]
        assert all(torch.equal(kept[name].codes, streamed[name].codes) for name in kept)


@pytest.mark.parametrize("method", ["rsq", "aespa"])
def test_a_stopped_run_goes_on_at_its_layer(method, text_file, store, tmp_path, monkeypatch):
    spec = weight_spec(text_file, method=method)
    stop_after_a_layer(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        quantize_weights(fresh(), spec, {}, store, r4=False)
    monkeypatch.undo()
    resumed, whole = fresh(), fresh()
    quantize_weights(resumed, spec, {}, store, r4=False)
    quantize_weights(whole, spec, {}, Store(tmp_path / "one go"), r4=False)
    assert all(torch.equal(w, linears(whole)[name]) for name, w in linears(resumed).items())


@pytest.mark.parametrize("case", ["mixtral", "phi3", "qwen2_moe"])
def test_what_each_takes(case, tmp_path, text_file, store):
    """Experts by plain GPTQ beside aespa's heads; RSQ where q, k and v are one linear."""
    loaded = load(family_folder(case, tmp_path / "m"), "float32")
    surgery.prepare(loaded)
    method = "rsq" if case == "phi3" else "aespa"
    found = quantize_weights(loaded, weight_spec(text_file, method=method), {}, store, r4=False)
    assert set(found[0]) == set(loaded.roles.linears(loaded.layers[0]))


@pytest.mark.parametrize("case", ["mixtral", "olmoe"])
def test_what_cannot_be_told_is_refused_before_anything_is_kept(case, tmp_path, text_file, store):
    loaded = load(family_folder(case, tmp_path / "m"), "float32")
    said = (
        f"^rsq does not take a {loaded.family}: the tokens that an expert reads are not told apart; use gptq$"
    )
    with pytest.raises(ValueError, match=said):
        quantize_weights(loaded, weight_spec(text_file, method="rsq"), {}, store, r4=False)
    assert not store.list()


@pytest.mark.parametrize("method", [rsq, aespa])
def test_a_hessian_is_needed(method):
    name = method.__name__.rpartition(".")[2]
    with pytest.raises(
        ValueError, match=rf"{name}\.seen must have the Hessian of the layer's inputs; got None"
    ):
        method.quantize(gaussian(4, 8), None, WeightSpec())
