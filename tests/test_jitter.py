"""A jitter is a change in the last bit of the embedding: what a 4-bit model then gains or loses is rounding."""

import pytest
import torch
from conftest import FAMILIES, save_tiny, tiny_model

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import checkpoint, loading, noise, stream, surgery
from dfrot_lab.model.checkpoint import EMBEDDING
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe.specs import CorpusSpec, ModelSpec, Recipe, RotationSpec, recipe_of
from dfrot_lab.score import build, perplexity

IDS = torch.arange(60)[None] % 50 + 60


def prepared(seed: int | None, family: str = "llama", **options: object) -> LoadedModel:
    loaded = tiny_model(family, **options)
    surgery.prepare(loaded)
    if seed is not None:
        noise.jitter(loaded, seed)
    return loaded


def weights(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in loaded.model.state_dict().items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_changes_the_embedding_alone_and_each_value_by_about_its_last_bit(family, tied):
    plain, found = (weights(prepared(seed, family, tied=tied)) for seed in (None, 3))
    changed = [name for name, x in plain.items() if not torch.equal(x, found[name])]
    assert changed == ["model.embed_tokens.weight"]
    before, after = plain[changed[0]], found[changed[0]]
    eps = torch.finfo(before.dtype).eps
    relative = (after.double() / before.double() - 1) / eps
    assert relative.std() == pytest.approx(1, abs=0.1) and abs(float(relative.mean())) < 0.05
    assert relative.abs().max() < 6


def test_logits_move_by_about_the_precision_of_the_model():
    plain, one, again, other = (prepared(seed).model(IDS).logits for seed in (None, 1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, plain)
    for found in (one, other):
        moved = float((found - plain).abs().max() / plain.abs().max())
        assert 1e-8 < moved < 1e-5


def test_a_model_of_few_bits_moves_too():
    plain, one, other = (prepared(seed, dtype=torch.bfloat16) for seed in (None, 1, 2))
    before, after, third = (weights(each)["model.embed_tokens.weight"] for each in (plain, one, other))
    assert after.dtype == torch.bfloat16
    assert (before != after).float().mean() > 0.3 and (after != third).float().mean() > 0.3
    assert ((after - before).abs() <= 6 * torch.finfo(torch.bfloat16).eps * before.abs()).all()


@pytest.mark.parametrize("tied", [False, True])
def test_a_streamed_model_has_the_jitter_of_the_kept_one(tied, tmp_path, monkeypatch):
    """Every time the embedding is read anew."""
    spec = save_tiny(tmp_path / "m", tied=tied)
    kept = loading.load_model(spec)
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    streamed = loading.load_model(spec)
    for loaded in (kept, streamed):
        surgery.prepare(loaded)
        noise.jitter(loaded, 5)
    for _ in range(2):
        with stream.part(streamed, EMBEDDING):
            found = streamed.model.get_input_embeddings().weight.clone()
        assert torch.equal(found, kept.model.get_input_embeddings().weight)
    assert torch.equal(stream.through(streamed, [IDS])[0], stream.through(kept, [IDS])[0])


@pytest.fixture
def recipe(tiny_spec: ModelSpec, text_file) -> Recipe:
    text, rotation = CorpusSpec(name=str(text_file)), RotationSpec(kind="RO")
    made = recipe_of("4-4-16", model=tiny_spec, corpus=text, rotation=rotation, windows=2, window=64)
    return made.with_(weights=made.weights.with_(corpus=text, windows=2, window=64))


def test_an_evaluation_with_another_jitter_is_another_by_no_more_than_rounding(recipe, store: Store):
    of = [recipe.with_(weights=recipe.weights.with_(method="rtn"), jitter=jitter) for jitter in (None, 0, 1)]
    found = [perplexity.evaluate(spec, store) for spec in of]
    assert len({result.key for result in found}) == 3
    losses = [tuple(result.losses) for result in found]
    assert len({*losses}) == 3
    assert max(map(max, losses)) - min(map(min, losses)) < 1


@pytest.mark.parametrize(("method", "made"), [("rtn", 1), ("gptq", 3)])
def test_codes_are_shared_by_all_jitters_where_they_are_of_the_weights_alone(recipe, method, made, store):
    recipe = recipe.with_(weights=recipe.weights.with_(method=method))
    built = [build.build(recipe.with_(jitter=jitter), store) for jitter in (None, 1, 2)]
    assert len([path for path in store.root.glob("weights/*") if path.is_dir()]) == made
    codes = [[codes for layer in one.codes for codes in layer.values()] for one in built]
    same = all(torch.equal(a.codes, b.codes) for a, b in zip(*codes[:2], strict=True))
    assert same or method == "gptq"
    embeddings = [one.loaded.model.get_input_embeddings().weight for one in built]
    assert not torch.equal(embeddings[0], embeddings[1]) and not torch.equal(embeddings[1], embeddings[2])
    assert len({build.build_key(recipe.with_(jitter=jitter)) for jitter in (None, 1, 2)}) == 3


def test_recipes_in_a_row_that_differ_in_jitter_are_not_taken_for_one_built_model(recipe, store, tmp_path):
    of = [recipe.with_(weights=recipe.weights.with_(method="rtn"), jitter=jitter) for jitter in (1, 2)]
    together = perplexity.evaluate_all(of, store)
    alone = perplexity.evaluate(of[1], Store(tmp_path / "alone"))
    assert together[1].losses == pytest.approx(alone.losses, rel=1e-12)
