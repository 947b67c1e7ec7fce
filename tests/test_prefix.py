"""Tokens before every window whose keys and values stay float: found as PrefixQuant finds them, held whatever is
quantized, seen by the window's tokens and by nothing that is scored or calibrated.
"""

import math
from collections import Counter
from statistics import median_low

import numpy as np
import pytest
import torch
from conftest import LAYERS, save_tiny, tiny_model
from test_cli import invoke
from test_evaluate import save_lively
from test_families import folder_of as family_folder
from test_rivals_closed import rotated_by
from test_static import with_static
from test_stream import TOKENS, looking, recipe
from torch import Tensor
from transformers import DynamicCache

from dfrot_lab.caches import run as caches
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.export import compressed, gguf, hf
from dfrot_lab.model import checkpoint, corpus, door, hooks, loading, prefix as prefixes, stream, surgery
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe import prefix, static
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import CorpusSpec, PrefixSpec, Recipe, RotationSpec, recipe_of
from dfrot_lab.score import build, found, perplexity, rows, zeroshot
from dfrot_lab.study import leaderboard
from dfrot_lab.weights import calibrate

NEWLINE = 198
RATIO = 1.6  # of a tiny model, whose MLPs see normed rows of like size


def with_prefix(spec: Recipe, **fields: object) -> Recipe:
    own = {"corpus": spec.corpus.with_(split="calibration"), "windows": 6, "window": TOKENS, "ratio": RATIO}
    return spec.with_(prefix=PrefixSpec(**own | fields))


@pytest.fixture
def lively(tmp_path, text_file) -> Recipe:
    save_lively(tmp_path / "lively")
    return recipe(tmp_path / "lively", text_file, "4-4-4", weights="rtn")


def heavy(loaded: LoadedModel, ids: Tensor, ratio: float) -> list[list[list[int]]]:
    """The places of outliers by layer and window, one window at a time."""
    found: list[list[list[int]]] = [[] for _ in loaded.layers]

    def see(site: str, x: Tensor) -> None:
        sizes = [max(map(abs, row)) for row in x[0].tolist()]
        places = [n for n, size in enumerate(sizes) if size > ratio * median_low(sizes)]
        found[int(site.split(".")[1])].append(places)

    with hooks.at_sites(loaded, see, hooks.sites_of(loaded, "down_proj_in")):
        for window in ids:
            loaded.model(window[None])
    return found


# ---- which tokens


@torch.no_grad()
def test_they_are_the_most_frequent_outliers_that_are_not_first_and_the_first_token(tmp_path):
    loaded = loading.load_model(save_lively(tmp_path / "m"))
    ids = torch.randint(0, 40, (6, 24), generator=torch.Generator().manual_seed(1))
    sizes = set()
    for ratio in (1.3, 1.6, 2.0):
        seen = heavy(loaded, ids, ratio)
        many = math.ceil(max(sum(map(len, layer)) / len(ids) for layer in seen))
        counts = Counter(
            int(ids[n, place])
            for layer in seen
            for n, places in enumerate(layer)
            for place in places
            if place
        )
        often = sorted(counts, key=lambda token: (-counts[token], token))[:many]
        expected = [*often, int(torch.mode(ids.flatten()).values)]  # this tokenizer has no first token
        assert prefix.find(loaded, ids, ratio) == expected
        sizes.add(len(expected))
    assert len(sizes) > 1


@torch.no_grad()
def test_the_tokenizers_own_first_token_goes_last(tmp_path):
    loaded = loading.load_model(save_lively(tmp_path / "m"))
    ids = torch.randint(0, 40, (6, 24), generator=torch.Generator().manual_seed(1))
    plain = prefix.find(loaded, ids, 1.6)
    loaded.tokenizer.add_special_tokens({"eos_token": "a"})
    assert prefix.find(loaded, ids, 1.6) == [*plain[:-1], loaded.tokenizer.eos_token_id]
    loaded.tokenizer.add_special_tokens({"bos_token": "b"})
    assert prefix.find(loaded, ids, 1.6) == [*plain[:-1], loaded.tokenizer.bos_token_id]


def planted(counts: list[list[int]]) -> LoadedModel:
    """A model whose down_proj inputs in layer 0 are 1 but for 100 at the places named, window by window."""
    loaded, left = tiny_model(), iter(counts)

    def put(_module: object, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = torch.ones_like(args[0])
        x[0, next(left)] = 100.0
        return (x,)

    loaded.layers[0].mlp.down_proj.register_forward_pre_hook(put)
    loaded.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _module, args: (torch.ones_like(args[0]),)
    )
    return loaded


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([[0]] * 20, [7]),  # a first token alone: the prefix is what texts begin with
        ([[0, 3]] * 20, [13, 7]),
        ([[0, 3, 5]] * 20, [13, 15, 7]),
        ([[0, 3], *[[0]] * 19], [7]),  # one window of 20 is too few
        ([[0, 3], [0, 3], *[[0]] * 18], [13, 7]),
        ([[3], [5], *[[]] * 18], [13, 7]),  # one a window at most, on average
        ([[5], [5, 3], *[[]] * 18], [15, 7]),
    ],
)
@torch.no_grad()
def test_as_many_as_a_window_has_of_those_that_are_outliers_most_often(counts, expected):
    ids = torch.arange(10, 18).expand(20, -1).clone()
    ids[:, 0] = ids[:, 7] = 7
    assert prefix.find(planted(counts), ids, 64.0) == expected


@torch.no_grad()
def test_where_no_token_is_an_outlier_that_is_said(caplog):
    ids = torch.arange(10, 18).expand(20, -1)
    assert prefix.find(planted([[]] * 20), ids, 64.0) == [10]
    assert "no token of 160 has a value above 64 times the median" in caplog.text
    caplog.clear()
    assert prefix.find(planted([[0]] * 20), ids, 64.0) == [10] and not caplog.text


# ---- held


def float_cache(spec: Recipe, store: Store) -> dict[str, Tensor]:
    """Keys (without R3) and values of the prefix in the rotated model of which nothing is quantized."""
    loaded, made = build.rotated(door.resolved(spec).canonical(), store)
    ids, kept = found.prefix_of(door.resolved(spec).canonical(), store), {}
    sites = hooks.sites_of(loaded, "k", "v")
    with surgery.online(loaded, r4=made.r4, function=lambda site, x: kept.update({site: x[0]}), sites=sites):
        loaded.model(ids[None])
    return kept


@pytest.mark.parametrize("bits", ["4-4-4", "4-4-16", "16-4-16"])
@torch.no_grad()
def test_keys_and_values_of_the_prefix_are_full_precisions_and_the_windows_own_are_rounded(
    bits, lively, store
):
    spec = with_prefix(
        recipe_of(bits, weights="rtn", model=lively.model, corpus=lively.corpus, windows=2, window=TOKENS)
    )
    built, kept = build.build(spec, store), float_cache(spec, store)
    tokens = len(built.prefix.ids)
    ids = prefixes.before(build.windows(spec, built.loaded), built.prefix.ids)
    for fake in (True, False):
        seen: dict[str, Tensor] = {}
        with (
            build.quantized(built, spec, fake=fake),
            hooks.at_sites(
                built.loaded,
                lambda site, x, seen=seen: seen.update({site: x}),
                hooks.sites_of(built.loaded, "k", "v"),
            ),
        ):
            built.loaded.model(ids)
        assert len(seen) == 2 * LAYERS
        for site, x in seen.items():
            r3 = site.endswith("k") and spec.keys.bits < 16
            expected = surgery.hadamard(kept[site]) if r3 else kept[site]
            torch.testing.assert_close(x[:, :, :tokens], expected.expand(2, -1, -1, -1), rtol=1e-5, atol=1e-5)
            if spec.keys.bits < 16:
                levels = [len(row.unique()) for row in x[:, :, tokens:].flatten(0, 2)]
                assert max(levels) <= 16 and len(x[0, 0, 0].unique()) > 8


@torch.no_grad()
def test_a_cache_that_groups_over_tokens_groups_the_windows_own(lively, store):
    """KIVI has one range of a channel for 8 tokens: none of them is the prefix's."""
    kivi = QuantSpec(bits=2, scheme="free", granularity="per_group", group_size=8, method="kivi", residual=8)
    spec = with_prefix(lively.with_(keys=kivi, values=kivi))
    built = build.build(spec, store)
    function, sites = build._rounding(built, spec, build._rounded_kinds(spec), None)
    tokens = len(built.prefix.ids)
    for site, kind in (("layers.1.k", "k"), ("layers.1.v", "v")):
        x = torch.randn(2, 2, tokens + TOKENS, 16, generator=torch.Generator().manual_seed(0))
        expected = caches.held(x[:, :, tokens:], kivi, kind)
        assert site in sites and torch.equal(function(site, x)[:, :, tokens:], expected)
        same = torch.equal(caches.held(x, kivi, kind)[:, :, tokens:], expected)
        assert same == (kind == "v")  # which has groups of a token's channels
    assert math.isfinite(perplexity.evaluate(spec, store).divergence)


@torch.no_grad()
def test_nothing_else_of_the_prefix_is_seen(lively, store):
    """What its rows are at every linear may be anything: the window's logits stay, to the bit."""
    spec = with_prefix(lively)
    built = build.build(spec, store)
    ids, tokens = build.windows(spec, built.loaded), len(built.prefix.ids)
    whole = prefixes.before(ids, built.prefix.ids)

    def spoil(_site: str, x: Tensor) -> Tensor:
        return torch.cat([torch.randn_like(x[:, :tokens]) * 9, x[:, tokens:]], 1)

    for fake in (True, False):
        with build.quantized(built, spec, fake=fake):
            clean = built.loaded.model(whole).logits[:, tokens:]
            with hooks.at_sites(built.loaded, spoil, hooks.sites_of(built.loaded, *hooks.NORM_INPUTS)):
                assert torch.equal(built.loaded.model(whole).logits[:, tokens:], clean)
        assert not torch.equal(clean, built.loaded.model(whole).logits[:, tokens:])


@torch.no_grad()
def test_it_is_transformers_own_cache_filled_in_float(lively, store):
    """The window after a cache of the prefix that the float model made, its linears' inputs rounded."""
    act = QuantSpec(scheme="asymmetric")
    spec = with_prefix(
        recipe_of("16-4-16", weights="rtn", model=lively.model, corpus=lively.corpus, windows=2, window=TOKENS,
                  rotation=RotationSpec(kind="NR"))
    )  # fmt: skip
    built = build.build(spec, store)
    ids, tokens = build.windows(spec, built.loaded), len(built.prefix.ids)
    with build.quantized(built, spec):
        ours = built.loaded.model(prefixes.before(ids, built.prefix.ids)).logits[:, tokens:]
    model, cache = built.loaded.model, DynamicCache()
    model(built.prefix.ids.expand(2, -1), past_key_values=cache, use_cache=True)
    function = build.rounded(spec, built.transforms, None)
    sites = hooks.sites_of(built.loaded, *hooks.LINEAR_INPUTS)
    with hooks.at_sites(built.loaded, function, sites):
        theirs = model(ids, past_key_values=cache, use_cache=True).logits
        without = model(ids).logits
    assert act == spec.activations
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - without).abs().max() > 0.1, "the prefix changed nothing: the test is vacuous"


# ---- scored


@pytest.mark.parametrize("rotation", ["NR", "RH"])
@torch.no_grad()
def test_in_full_precision_it_is_the_text_after_the_prefix(rotation, lively, store):
    """The scored tokens are the window's own, each after prefix and window; against either reference."""
    of = {"model": lively.model, "corpus": lively.corpus, "windows": 2, "window": TOKENS}
    plain = recipe_of("16-16-16", rotation=RotationSpec(kind=rotation), **of)
    spec = with_prefix(plain)
    own = with_prefix(plain, reference="prefix")
    one, other, without = (perplexity.evaluate(each, store) for each in (spec, own, plain))
    loaded = loading.load_model(lively.model)
    ids, before = build.windows(spec, loaded), found.prefix_of(door.resolved(spec).canonical(), store)
    logits = loaded.model(prefixes.before(ids, before)).logits[:, len(before) :]
    base = loaded.model(ids).logits
    for n, window in enumerate(ids):
        lost = torch.nn.functional.cross_entropy(logits[n, :-1], window[1:])
        log_p, log_q = (each[n, :-1].log_softmax(-1) for each in (base, logits))
        apart = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        assert one.losses[n] == pytest.approx(float(lost), rel=1e-4)
        assert other.losses[n] == pytest.approx(one.losses[n], rel=1e-6)
        assert one.divergences[n] == pytest.approx(float(apart), rel=1e-3) and apart > 1e-3
    assert abs(other.divergence) < 1e-5 < one.divergence
    assert other.reference_loss == pytest.approx(one.losses.mean(), rel=1e-5)
    assert one.reference_loss == pytest.approx(without.losses.mean(), rel=1e-5)
    assert without.losses.tolist() != one.losses.tolist()


def test_the_two_references_share_a_model_and_no_evaluation(lively, store):
    specs = [
        lively,
        with_prefix(lively),
        with_prefix(lively, reference="prefix"),
        with_prefix(lively, ratio=1.9),
    ]
    named = [build.build_key(spec) for spec in specs]
    assert named[1] == named[2] and len(set(named)) == 3
    results = [perplexity.evaluate(spec, store) for spec in specs[:3]]
    assert results[1].losses.tolist() == results[2].losses.tolist() != results[0].losses.tolist()
    assert results[1].divergence != results[2].divergence
    said = [rows.rows([each])[0]["parameters"] for each in results]
    assert "prefix=" not in said[0] and "reference=prefix" in said[2] and said[1] != said[2]
    again = Recipe.from_yaml(specs[2].to_yaml())
    assert again == specs[2] and again.key == specs[2].key != specs[1].key


@pytest.mark.parametrize("weights", ["rtn", "gptq", "qep"])
def test_a_model_read_layer_by_layer_has_the_same_losses(weights, lively, tmp_path, monkeypatch):
    spec = with_prefix(with_static(lively).with_(weights=lively.weights.with_(method=weights)))
    expected = perplexity.evaluate(spec, Store(tmp_path / "kept"))
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    found = perplexity.evaluate(spec, Store(tmp_path / "streamed"))
    assert found.losses.tolist() == expected.losses.tolist()
    assert found.divergences.tolist() == pytest.approx(expected.divergences.tolist(), rel=1e-5)


@pytest.mark.parametrize("row", leaderboard.ONLINE)
def test_static_scales_and_a_prefix_act_beside_what_turns_every_input(row, lively, tmp_path, monkeypatch):
    turned = rotated_by(row, lively.model, lively.corpus.name).rotation
    spec = with_prefix(with_static(lively)).with_(rotation=turned)
    built = build.build(spec, store := Store(tmp_path / "kept"))
    assert built.transforms.turns and built.transforms.static and len(built.prefix.ids)
    assert (
        built.transforms.static != build.build(spec.with_(rotation=lively.rotation), store).transforms.static
    )
    expected = perplexity.evaluate(spec, store)
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    found = perplexity.evaluate(spec, Store(tmp_path / "streamed"))
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-4)


# ---- what is found and calibrated with it


@torch.no_grad()
def test_static_scales_are_those_of_the_windows_own_rows_after_the_prefix(lively, store):
    spec = with_prefix(with_static(lively))
    built = build.build(spec, store)
    loaded, _ = build.rotated(door.resolved(spec).canonical(), store)
    ids = found._windows(spec.static, loaded)
    whole, tokens = prefixes.before(ids, built.prefix.ids), len(built.prefix.ids)
    sites: dict[str, list[Tensor]] = {}

    def see(site: str, x: Tensor) -> None:
        sites.setdefault(site, []).append(x[:, tokens:])

    where = hooks.sites_of(loaded, *hooks.LINEAR_INPUTS)
    with surgery.online(loaded, r4=True, function=see, sites=where):
        stream.through(loaded, whole.split(1))
    assert built.transforms.static == {
        site: static.best(parts, spec.activations) for site, parts in sites.items()
    }
    without = build.build(with_static(lively), store).transforms.static
    assert built.transforms.static != without


@pytest.mark.parametrize("field", ["clips", "scales"])
def test_clips_and_scales_are_found_after_the_prefix_too(field, lively, store):
    plain = looking(lively, field)
    one, other = (getattr(build.build(each, store).transforms, field) for each in (plain, with_prefix(plain)))
    assert set(one) == set(other)
    assert any(not torch.equal(torch.as_tensor(one[site]), torch.as_tensor(other[site])) for site in one)


@pytest.mark.parametrize("rounded", [False, True])
@torch.no_grad()
def test_weights_are_calibrated_on_the_windows_own_rows_after_the_prefix(rounded, lively, store, monkeypatch):
    """On what the built model has at each site of the calibration windows after the prefix, its rows left out;
    its keys and values in their place."""
    seen: list[Tensor] = []
    whole = calibrate.hessian_of
    monkeypatch.setattr(calibrate, "hessian_of", lambda x: seen.append(x.clone()) or whole(x))
    gptq = lively.with_(weights=lively.weights.with_(method="gptq", rounded=rounded))
    spec = with_prefix(gptq)
    built, count = build.build(spec, store), len(hooks.LINEAR_INPUTS) * LAYERS
    loaded, tokens, of = built.loaded, len(built.prefix.ids), gptq.weights
    ids = corpus.sampled_blocks(of.corpus, loaded.tokenizer, blocks=of.windows, window=TOKENS, sample=None)
    rows: dict[str, Tensor] = {}
    function, sites = build._rounding(built, spec, build._rounded_kinds(spec) if rounded else [], None)
    with (
        surgery.online(loaded, r3=rounded, r4=True, function=function, sites=sites),
        hooks.at_sites(
            loaded,
            lambda site, x: rows.update({site: x[:, tokens:].flatten(0, 1)}),
            hooks.sites_of(loaded, *hooks.LINEAR_INPUTS),
        ),
    ):
        loaded.model(prefixes.before(ids, built.prefix.ids))
    assert len(seen) == count == len(rows)
    for x in rows.values():
        apart = min(float((own - x).norm() / x.norm()) for own in seen if own.shape == x.shape)
        assert apart < (0.05 if rounded else 1e-4)  # a value near a code's edge may fall on either side
    other = build.build(gptq, store)
    assert any(not torch.equal(a.codes, other.codes[0][name].codes) for name, a in built.codes[0].items())
    nearest = [door.resolved(each).canonical() for each in (lively, with_prefix(lively))]
    assert keys.weights(nearest[0], door.prints) == keys.weights(nearest[1], door.prints)


# ---- what is kept, and what is refused


def test_a_damaged_artefact_is_found_again_and_another_models_is_never_taken(
    lively, tmp_path, text_file, store
):
    spec = door.resolved(with_prefix(lively)).canonical()
    first = found.prefix_of(spec, store).tolist()
    [kept] = [artefact for artefact in store.list() if artefact.kind == prefix.KIND]
    (kept.path / "prefix.json").write_text('{"ids": [1], "texts": [""]}')
    assert found.prefix_of(spec, store).tolist() == first
    other = recipe(family_folder("qwen2", tmp_path / "o"), text_file)
    found.prefix_of(door.resolved(with_prefix(other)).canonical(), store)
    assert len([artefact for artefact in store.list() if artefact.kind == prefix.KIND]) == 2


def test_where_it_was_found_does_not_hang_on_rotation_or_grids(lively):
    spec = with_prefix(lively)
    same = [
        spec,
        spec.with_(rotation=RotationSpec(seed=2)),
        spec.with_(activations=QuantSpec(bits=8)),
        spec.with_(windows=1),
    ]
    assert (
        len({keys.content_key(keys.prefix(door.resolved(each).canonical(), door.prints)) for each in same})
        == 1
    )


@pytest.mark.parametrize("export", [hf.export, compressed.export, gguf.export])
def test_no_export_can_carry_it(export, lively, tmp_path, store):
    with pytest.raises(
        ValueError, match=r"Recipe\.prefix must be None to export: keys and values before every"
    ):
        export(with_prefix(lively), tmp_path / "made", store)
    assert not (tmp_path / "made").exists() and not store.list()


def test_tasks_have_no_place_for_it(lively, store):
    with pytest.raises(ValueError, match=r"Recipe\.prefix must be None for tasks"):
        zeroshot.table("row", with_prefix(lively), lively.model, 1, store)


def test_experts_are_refused(tmp_path, text_file, store):
    spec = with_prefix(recipe(family_folder("mixtral", tmp_path / "m"), text_file, "16-4-16"))
    with pytest.raises(ValueError, match="the model must be without experts for a prefix"):
        perplexity.evaluate(spec, store)


def test_a_window_that_fits_alone_and_not_with_it_is_refused(tmp_path, text_file, store):
    model = save_tiny(tmp_path / "m", context=TOKENS)
    spec = with_prefix(recipe(tmp_path / "m", text_file, "16-4-16"), ratio=1.2)
    assert model.source == spec.model.source
    with pytest.raises(
        ValueError, match=rf"window must be at most the model's context of {TOKENS} tokens; got"
    ):
        perplexity.evaluate(spec, store)
    assert perplexity.evaluate(spec.with_(prefix=None), store)


def test_a_text_too_short_is_refused_before_any_work(lively, store):
    with pytest.raises(ValueError, match=r"(window|windows|tokens) must be at most"):
        build.require_texts(with_prefix(lively, windows=10**6), store)


def test_the_command_line_says_it():
    spec = Recipe.from_yaml(invoke("recipe", "RH", "16-4-16", "--prefix", "--window", "256").output)
    assert spec.prefix == PrefixSpec(corpus=CorpusSpec(name="auto", split="calibration"), window=256)
    assert Recipe.from_yaml(invoke("recipe", "RH", "16-4-16").output).prefix is None
