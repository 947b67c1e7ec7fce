"""A clip ratio for each site: the one of least error, found on the rotated model, used wherever it is rounded."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_families import folder_of as family_folder
from test_gptq import fresh
from test_stream import TOKENS, folder_of, looking, recipe
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths.quantizers import fake_quantize
from dfrot_lab.model import checkpoint, hooks, surgery
from dfrot_lab.observe import clips
from dfrot_lab.observe.capture import token_blocks
from dfrot_lab.recipe.grids import ACTIVATIONS, QuantSpec
from dfrot_lab.recipe.specs import CorpusSpec, Recipe
from dfrot_lab.score import build, perplexity, rows


@pytest.fixture
def clipped(tmp_path, text_file) -> Recipe:
    return with_clips(recipe(folder_of(tmp_path / "m"), text_file, "4-4-4", weights="rtn"))


with_clips = partial(looking, field="clips")


def inputs(loaded, ids: Tensor, *, r4: bool) -> dict[str, Tensor]:
    """What every linear reads (tokens, channels), by site."""
    found: dict[str, Tensor] = {}

    def note(site: str, x: Tensor) -> None:
        found[site] = x.reshape(-1, x.shape[-1]).clone()

    with surgery.online(loaded, r4=r4, function=note, sites=hooks.sites_of(loaded, *hooks.LINEAR_INPUTS)):
        loaded.model(ids)
    return found


@pytest.mark.parametrize("scheme", ["asymmetric", "free", "symmetric"])
@torch.no_grad()
def test_it_is_the_ratio_of_least_error_at_every_site(scheme):
    """By a slow loop over sites and ratios, R4 acting."""
    loaded, quantizer = fresh(rotated=True), QuantSpec(bits=3, scheme=scheme)
    ids = torch.arange(2 * 48).reshape(2, 48) * 7 % 90 + 32
    online = {"r4": True}
    found = clips.find(loaded, ids, quantizer, lambda **how: surgery.online(loaded, **online, **how))
    seen = [inputs(loaded, each[None], r4=True) for each in ids]
    assert set(found) == set(seen[0]) == set(hooks.sites_of(loaded, *hooks.LINEAR_INPUTS))
    assert len({*found.values()}) > 1 and max(found.values()) < 1
    for site, ratio in found.items():
        x = torch.cat([each[site][:: clips.EVERY] for each in seen])
        lost = [
            float((x - fake_quantize(x, quantizer.with_(clip_ratio=r))).double().square().sum())
            for r in clips.RATIOS
        ]
        assert min(lost) == pytest.approx(lost[clips.RATIOS.index(ratio)], rel=1e-6)


def test_the_built_model_has_them_and_they_are_kept(clipped, store):
    built = build.build(clipped, store)
    ids = token_blocks(clipped.clips, built.loaded)
    unclipped = build.build(clipped.with_(clips=None, weights=clipped.weights.with_(quantizer=W16)), store)
    expected = clips.find(
        unclipped.loaded,
        ids,
        clipped.activations,
        lambda **how: surgery.online(unclipped.loaded, r4=True, **how),
    )
    assert built.transforms.clips == expected and not unclipped.transforms.clips
    [kept] = [artefact for artefact in store.list() if artefact.kind == clips.KIND]
    assert kept.json("clips") == expected
    assert build.build(clipped, store).transforms.clips == expected


W16 = QuantSpec(bits=16, granularity="per_channel")


@torch.no_grad()
def by_both(built: build.Built, spec: Recipe, ids: Tensor) -> dict[bool, Tensor]:
    """The logits of a quantized model in floats on rounded values (True), and by integer products (False)."""
    logits = {}
    for fake in (True, False):
        with build.quantized(built, spec, fake=fake):
            logits[fake] = built.loaded.model(ids).logits
    return logits


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@torch.no_grad()
def test_integer_products_are_clipped_as_rounded_values_are(family, tmp_path, text_file, store):
    """Also where experts quantize their own tokens of what a norm sends to all."""
    made = folder_of(tmp_path / "m") if family == "llama" else family_folder(family, tmp_path / "m")
    spec = with_clips(recipe(made, text_file, "4-4-4", weights="rtn"))
    built = build.build(spec, store)
    ids = build.windows(spec, built.loaded)
    logits = by_both(built, spec, ids)
    plain = replace(built, transforms=replace(built.transforms, clips={}))
    with build.quantized(plain, spec):
        without = built.loaded.model(ids).logits
    apart = (logits[True] - logits[False]).abs().mean()
    assert apart < 0.05 * (logits[True] - without).abs().mean()


def test_a_model_read_layer_by_layer_has_the_same_losses(clipped, tmp_path, monkeypatch):
    expected = perplexity.evaluate(clipped, Store(tmp_path / "kept"))
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    found = perplexity.evaluate(clipped, Store(tmp_path / "streamed"))
    assert found.losses.tolist() == expected.losses.tolist()


def test_rows_with_and_without_are_not_built_nor_kept_as_one(clipped, store):
    plain = clipped.with_(clips=None)
    found = perplexity.evaluate_all([plain, clipped, plain], store)
    assert found[0].losses.tolist() == found[2].losses.tolist() != found[1].losses.tolist()
    row = rows.rows([found[1]])[0]
    assert "clips=(" in row["parameters"] and f"tokens={TOKENS}" in row["parameters"]
    assert "clips" not in rows.rows([found[0]])[0]["parameters"]
    again = Recipe.from_yaml(clipped.to_yaml())
    assert again == clipped and again.key == clipped.key != plain.key


def test_what_clips_nothing_has_none(clipped):
    unrounded = clipped.with_(activations=ACTIVATIONS.with_(bits=16))
    assert unrounded.canonical() == unrounded.with_(clips=None).canonical()


def test_a_clip_of_all_and_one_of_each_are_one_too_many(clipped):
    with pytest.raises(
        ValueError, match=r"Recipe\.clips must be None with activations that have a clip_ratio"
    ):
        clipped.with_(activations=ACTIVATIONS.with_(clip_ratio=0.9))


def test_a_text_too_short_is_refused_before_any_work(clipped, store):
    long = clipped.clips.with_(corpus=CorpusSpec(name=clipped.corpus.name), tokens=100_000_000)
    with pytest.raises(ValueError, match=r"(window|windows|tokens) must be at most"):
        build.require_texts(clipped.with_(clips=long), store)
    assert not [artefact for artefact in store.list() if artefact.kind == clips.KIND]
