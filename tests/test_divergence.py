"""Divergence from full precision: a plain float64 reference, no divergence without quantization in any family,
and a reference that is made once for every window, whoever asks and however often it is stopped.
"""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from again import FLIPPED
from test_evaluate import RH, RO, at, base, save_lively, spec_for  # noqa: F401 a fixture
from test_families import CASES, folder_of
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import checkpoint, door, loading, stream
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.specs import CorpusSpec, ModelSpec, Recipe, recipe_of
from dfrot_lab.score import divergence
from dfrot_lab.score.build import build, quantized
from dfrot_lab.score.perplexity import by_token, evaluate, stored

TOKENS = 40


def plainly(logits: Tensor, reference: Tensor, ids: Tensor) -> Tensor:
    """Loss, divergence and agreement of each token of a window but the last, by their definitions in float64."""
    q, p = (x[:-1].double().log_softmax(-1) for x in (logits, reference))
    loss = torch.nn.functional.nll_loss(q, ids[1:], reduction="none")
    apart = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return torch.stack([loss, apart, (q.argmax(-1) == p.argmax(-1)).double()], -1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return save_lively(tmp_path_factory.mktemp("m") / "m")


@pytest.fixture
def recipe(model: ModelSpec, text_file: Path) -> Recipe:
    """Three windows of 64 tokens at 16-4-16."""
    return spec_for(model, text_file, "16-4-16", rotation=RO)


def kept_references(store: Store) -> list[str]:
    return sorted(found.key for found in store.list() if found.kind == divergence.KIND)


# ---- the measures


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("noise", [0.0, 1e-5, 0.1, 3.0])
@pytest.mark.parametrize("offset", [0.0, 25.0])
def test_they_are_the_definitions_in_float64(scale, noise, offset):
    """Of logits that are large, alike, far apart, or the same but for a constant."""
    draw = torch.Generator().manual_seed(0)
    reference = torch.randn(50, 3000, generator=draw) * scale
    logits = reference + noise * torch.randn(50, 3000, generator=draw) + offset
    ids = torch.randint(0, 3000, (50,), generator=draw)
    wanted = plainly(logits, reference, ids)
    found = divergence.compared(logits[:-1].clone(), reference[:-1].clone(), ids[1:])
    assert found.dtype == torch.float64 and found.shape == (49, 3)
    largest = wanted.abs().clamp(min=1)
    assert float(((found - wanted).abs() / largest).max()) < 1e-6
    assert float(found[:, 1].min()) > -1e-6


def test_a_divergence_is_of_full_precision_to_quantized_and_not_the_other_way_round():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    found = divergence.compared(q.log()[None], p.log()[None], torch.tensor([2]))[0]
    wanted = 0.7 * np.log(0.7 / 0.2) + 0.2 * np.log(0.2 / 0.5) + 0.1 * np.log(0.1 / 0.3)
    assert found.tolist() == pytest.approx([-np.log(0.3), wanted, 0.0], abs=1e-6)


@pytest.mark.parametrize("tokens", [2, 9, 128, 300])
def test_a_window_s_measures_are_those_of_the_model_s_own_logits(model, tokens, store):
    """300 tokens are more than the logits are computed for at once; nothing is asked of the last token."""
    one, other = loading.load_model(model), loading.load_model(model)
    for weight in (layer.mlp.down_proj.weight for layer in other.layers):
        weight.mul_(1.3)
    ids = torch.randint(0, 256, (tokens,), generator=torch.Generator().manual_seed(tokens))
    states = [stream.through(loaded, [ids[None]])[0][0] for loaded in (other, one)]
    found = divergence.measures(one, *states, ids)
    wanted = plainly(other.model(ids[None]).logits[0], one.model(ids[None]).logits[0], ids)
    assert found.dtype == torch.float32 and found.shape == (tokens - 1, 3)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-6)
    assert found[:, 1].mean() > 1e-3, "or the test would see nothing"


@pytest.mark.parametrize("case", CASES)
def test_without_quantization_there_is_no_divergence_in_any_family(case, tmp_path, text_file, store):
    """In float32, the full-precision model's hidden states through the rotated model's own head."""
    spec = recipe_of(
        "16-16-16", model=ModelSpec(source=str(folder_of(case, tmp_path / "m"))), windows=2, window=TOKENS,
        corpus=CorpusSpec(name=str(text_file)), rotation=RO,
    )  # fmt: skip
    found = evaluate(spec, store)
    by = by_token(found, store)
    assert by["divergence"].between(-1e-6, 5e-6).all() and np.abs(found.divergences).max() < 1e-6
    assert found.agreement > 0.98
    np.testing.assert_allclose(found.losses, found.reference_losses, rtol=2e-6)
    rough = evaluate(spec.with_(activations=spec.activations.with_(bits=4)), store)
    assert rough.divergence > 10 * abs(found.divergence), "little where a model is sure of itself"
    assert rough.reference_losses.tolist() == found.reference_losses.tolist()


# ---- what an evaluation keeps


def test_an_evaluation_has_the_measures_of_its_quantized_model(recipe, store):
    found = evaluate(recipe, store)
    plain, built = loading.load_model(recipe.model), build(recipe, store)
    ids = divergence_ids(built.loaded, recipe)
    with quantized(built, recipe), torch.inference_mode():
        logits = torch.cat([built.loaded.model(window[None]).logits for window in ids])
    both = zip(logits, plain.model(ids).logits, ids, strict=True)
    wanted = torch.stack([plainly(*of) for of in both]).mean(1)
    for i, name in enumerate(("losses", "divergences", "agreements")):
        assert getattr(found, name) == pytest.approx(wanted[:, i].numpy(), rel=FLIPPED, abs=0.02 * (i == 2))
    own = [float(plain.model(window[None], labels=window[None]).loss) for window in ids]
    assert found.reference_losses == pytest.approx(own, rel=1e-5)
    means = (found.divergences.mean(), found.agreements.mean(), found.reference_losses.mean())
    assert (found.divergence, found.agreement, found.reference_loss) == pytest.approx(means)
    assert found.divergence > 0 and 0 < found.agreement < 1
    again = stored(recipe, store)
    assert again.divergences.tolist() == found.divergences.tolist()


def divergence_ids(loaded: loading.LoadedModel, recipe: Recipe) -> Tensor:
    from dfrot_lab.score.build import windows, windows_of

    ids = windows(recipe, loaded)
    assert torch.equal(ids, windows_of(recipe, Store()))
    return ids


def test_by_token_is_a_row_a_token(recipe, store):
    found = evaluate(recipe, store)
    table = by_token(found, store)
    assert list(table) == ["window", "position", "token", "next", *divergence.MEASURES]
    assert len(table) == 3 * 63 and set(table["agreement"]) == {0, 1}
    means = table.groupby("window")[["loss", "divergence", "agreement"]].mean().to_numpy().T
    wanted = (found.losses, found.divergences, found.agreements)
    for own, each in zip(means, wanted, strict=True):
        assert own == pytest.approx(each, rel=1e-5)
    inner = table[table["position"] < 62]
    assert inner["next"].tolist() == table[table["position"] > 0]["token"].tolist()
    assert loading.words_of(recipe.model)[0].decode(table[table["window"] == 1]["token"].tolist())


def test_by_token_of_what_is_not_stored(recipe, store):
    found = evaluate(recipe, store)
    with pytest.raises(KeyError, match=r"EvalResult\.key must be that of an evaluation in the store .*; got"):
        by_token(found, Store(store.root / "other"))


# ---- the reference


def test_other_recipes_and_more_windows_walk_only_what_is_new(recipe, store, monkeypatch):
    walked: list[int] = []
    own = divergence.Walk.through
    monkeypatch.setattr(
        divergence.Walk,
        "through",
        lambda walk, *of: walked.extend(len(walk.ids) for _ in [0] if walk.writer) or own(walk, *of),
    )
    evaluate(recipe.with_(windows=2), store)
    first = kept_references(store)
    assert (len(first), sum(walked)) == (2, 2)
    evaluate(recipe.with_(rotation=RH, windows=2), store)
    assert kept_references(store) == first and sum(walked) == 2
    evaluate(recipe, store)
    assert set(first) < set(kept_references(store)) and sum(walked) == 3


def test_full_precision_passes_the_layers_once_and_is_its_own_reference(recipe, store, monkeypatch):
    plain = at(recipe, "16-16-16", rotation=RO.with_(kind="NR"))
    passes: list[int] = []
    own = stream.Walk.through
    monkeypatch.setattr(
        stream.Walk, "through", lambda walk, *of: passes.append(len(walk.ids)) or own(walk, *of)
    )
    found = evaluate(plain, store)
    assert sum(passes) == 3 and found.seconds > 0
    assert found.divergences.tolist() == [0.0] * 3 and found.agreement == 1
    assert found.losses == pytest.approx(found.reference_losses, rel=1e-6)
    others = [at(recipe, "16-16-16", rotation=RO), recipe, plain.with_(set_massive="zero")]
    assert not any(map(divergence.is_full_precision, others))


def test_a_model_read_layer_by_layer_has_the_same_measures(recipe, tmp_path, monkeypatch):
    stores = [Store(tmp_path / name) for name in ("kept", "streamed")]
    bits = [recipe, at(recipe, "16-16-16", rotation=RO.with_(kind="NR"))]
    wanted = [evaluate(spec, stores[0]) for spec in bits]
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    for spec, one in zip(bits, wanted, strict=True):
        other = evaluate(spec, stores[1])
        for name in ("losses", "divergences", "agreements", "reference_losses"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-6, abs=1e-9)
    assert kept_references(stores[0]) == kept_references(stores[1])


def test_another_reference_under_way_is_not_taken_for_this_one(recipe, tmp_path, monkeypatch):
    """Three windows were walked together and stopped; the second of them was made elsewhere since."""
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    monkeypatch.setattr(stream, "SAVE_AFTER", 0)
    loaded, store = loading.load_model(recipe.model), Store(tmp_path / "s")
    ids = divergence_ids(loaded, recipe)
    wanted = [
        divergence.states_of(each) for each in divergence.references(recipe, ids, Store(tmp_path / "w"))
    ]
    run, left = stream.Walk.run, [4]

    def stop(walk: stream.Walk, number: int, x: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return run(walk, number, x)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream.Walk, "run", stop)
        divergence.references(recipe, ids, store)
    assert len(list(store.root.glob(f"{divergence.KIND}/*.partial/walk.safetensors"))) == 1
    middle = sorted(range(3), key=lambda i: key_of(recipe, ids[i]))[1]
    divergence.references(recipe, ids[middle][None], store)
    found = divergence.references(recipe, ids, store)
    for each, states in zip(found, wanted, strict=True):
        torch.testing.assert_close(divergence.states_of(each), states)


def key_of(recipe: Recipe, ids: Tensor) -> str:
    return keys.content_key(keys.reference(recipe.model, ids.tolist(), door.prints))


def partials(store: Store) -> list[str]:
    return [path.name for path in store.root.glob(f"{divergence.KIND}/*.partial")]


def test_a_window_that_is_there_twice_has_one_reference(recipe, store, monkeypatch):
    ids = divergence_ids(loading.load_model(recipe.model), recipe)[[0, 1, 0]]
    for memory in ("", "0"):
        monkeypatch.setenv(checkpoint.MEMORY, memory)
        own = Store(store.root / f"s{memory}")
        found = divergence.references(recipe, ids, own)
        assert [each.key for each in found][::2] == [found[0].key] * 2 and len(kept_references(own)) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
from dfrot_lab.model import stream
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score import perplexity
from dfrot_lab.disk.artefacts import Store
stream.SAVE_AFTER, own, left = 0, stream.Walk.run, [int(sys.argv[3])]
def run(walk, number, x):
    left[0] -= walk.writer is not None
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return own(walk, number, x)
stream.Walk.run = run
perplexity.evaluate(Recipe.from_yaml(Path(sys.argv[1])), Store(Path(sys.argv[2])))
"""


@pytest.mark.parametrize("memory", ["", "0"])
def test_a_killed_reference_goes_on(recipe, memory, tmp_path, monkeypatch):
    monkeypatch.setenv(checkpoint.MEMORY, memory)
    passed: list[int] = []
    own = stream.Walk.run

    def counted(walk: stream.Walk, number: int, x: Tensor) -> Tensor:
        passed.extend([number] * (walk.writer is not None))
        return own(walk, number, x)

    monkeypatch.setattr(stream.Walk, "run", counted)
    wanted, whole = evaluate(recipe, Store(tmp_path / "whole")), len(passed)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-c", KILLED, str(tmp_path / "r.yaml"), str(tmp_path / "s"), "3"]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    passed.clear()
    found = evaluate(recipe, Store(tmp_path / "s"))
    assert found.divergences == pytest.approx(wanted.divergences, rel=FLIPPED)
    assert found.reference_losses == pytest.approx(wanted.reference_losses, rel=1e-6)
    assert len(passed) <= whole - 3 + 1 and not partials(Store(tmp_path / "s"))
