"""Methods: what each makes, by its row and by its recipe; and what a method may look at, against gradients by
hand and against what is captured without it.
"""

from pathlib import Path

import pytest
import torch
from conftest import CHANNELS, LAYERS, save_tiny, tiny_model
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import rotations
from dfrot_lab.model import corpus, loading, surgery
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.base import MethodSpec
from dfrot_lab.recipe.specs import (
    CaptureSpec,
    CorpusSpec,
    ModelSpec,
    Recipe,
    RefineSpec,
    RotationSpec,
    recipe_of,
)
from dfrot_lab.rotate import transforms
from dfrot_lab.rotate.dfrot import refined
from dfrot_lab.rotate.transforms import Context, Transforms

WINDOW = 12


def recipe(model: ModelSpec, text: Path, rotation: MethodSpec | None = None) -> Recipe:
    return recipe_of(
        "4-4-16",
        model=model,
        corpus=CorpusSpec(name=str(text)),
        rotation=rotation or RotationSpec(),
        window=WINDOW,
    )


def half(context: Context, tokens: int = WINDOW, skip: int = 0) -> CaptureSpec:
    """Tokens of the calibration half of the recipe's text, as a method's own spec names them."""
    text = context.recipe.corpus.with_(split="calibration")
    return CaptureSpec(model=context.recipe.model, corpus=text, tokens=tokens, skip=skip)


@pytest.fixture
def context(tiny_spec: ModelSpec, text_file: Path, store: Store) -> Context:
    return Context(recipe(tiny_spec, text_file), store)


# ---- the table of methods


def test_every_row_has_the_spec_of_its_method():
    found = ["NR", "RO", "RH", "RHT2", "GSR", "DFRot", "Offset", "Offset+", "KLT", "DartQuant"]
    found += [
        "DartQuant + massive",
        "KurTail",
        "KurTail + massive",
        "SpinQuant",
        "OSTQuant R1",
        "SmoothQuant",
        "OptRot",
        "DuQuant R1",
        "DuQuant",
        "FlatQuant",
        "AWQ",
        "OS+",
    ]
    assert registry.rows() == found
    for row in registry.rows():
        spec = registry.spec_of(row, seed=3)
        assert isinstance(spec, MethodSpec) and spec.name == row
        module = registry.load(registry.METHODS, spec.method)
        assert isinstance(spec, module.SPEC)
        assert MethodSpec.of(spec.plain()) == spec
        assert spec.first_seed == (None if row in ("NR", "GSR", "SmoothQuant", "AWQ", "OS+") else 3)
    assert registry.spec_of("NR", seed=3) == registry.spec_of("NR"), "nothing is random in it"
    own = CaptureSpec(tokens=64)
    assert registry.spec_of("DFRot", seed=3, capture=own) == RefineSpec(
        capture=own, init=RotationSpec(seed=3)
    )


def test_an_unknown_row_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"a rotation must be one of NR, RO, RH, .*, OS\+; got 'SpinQuant2'"):
        registry.spec_of("SpinQuant2")


@pytest.mark.parametrize("method", registry.WEIGHTS)
def test_every_weight_quantizer_says_whether_it_is_calibrated(method: str):
    module = registry.load(registry.WEIGHTS, method)
    assert module.CALIBRATED is (method != "rtn") and callable(module.quantize)
    assert registry.drifts(method) is (method in ("gptaq", "qep"))


# ---- what methods make


def made(context: Context, rotation: MethodSpec) -> Transforms:
    return transforms.fit(context.recipe.with_(rotation=rotation), context)


@pytest.mark.parametrize(
    "spec", [RotationSpec(kind="RO", seed=2), RotationSpec(block=16)], ids=lambda s: s.name
)
def test_random_makes_the_rotation_of_its_spec(context: Context, spec: RotationSpec):
    found = made(context, spec)
    assert torch.equal(found.R1, rotations.make(spec, CHANNELS))
    assert (found.R2, found.r3, found.r4) == ("hadamard", True, True)
    assert not found.gains and not found.clips


def test_nr_is_no_rotation_anywhere(context: Context):
    found = made(context, RotationSpec(kind="NR"))
    assert (found.R1, found.R2, found.r3, found.r4) == (None, None, False, False)


def test_dfrot_makes_the_refinement_of_its_own_capture(context: Context):
    spec = RefineSpec(capture=half(context, tokens=64), steps=2)
    found, own = made(context, spec), refined(spec, context.store)
    assert torch.equal(found.R1, own.R)
    assert (found.R2, found.r3, found.r4) == ("hadamard", True, True)


# ---- what a method may look at


def test_the_model_is_untied_and_its_norms_fused(tmp_path: Path, text_file: Path, store: Store):
    spec = save_tiny(tmp_path / "tied", tied=True)
    found = Context(recipe(spec, text_file), store).model
    plain = loading.load_model(spec)
    assert surgery.is_tied(plain) and not surgery.is_tied(found)
    for layer in found.layers:
        for _, norm, _ in found.roles.feeds:
            assert bool((layer.get_submodule(norm).weight == 1).all())
    ids = torch.arange(20)[None]
    torch.testing.assert_close(found.model(ids).logits, plain.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_given_model_is_the_one_looked_at(context: Context):
    given = tiny_model()
    assert Context(context.recipe, context.store, given).model is given
    assert context.model is context.model


def test_rows_and_text_are_those_of_the_spec(context: Context):
    spec = half(context, skip=1)
    found, own = context.rows(spec), capture(spec, context.store)
    assert found.key == own.key and torch.equal(found.all_rows(), own.all_rows())
    text, tokenizer = spec.corpus, context.model.tokenizer
    ids = context.text(spec)
    assert torch.equal(ids, corpus.token_blocks(text, tokenizer, blocks=2, window=WINDOW)[1:])
    assert ids[0].tolist() == found.ids


def test_what_a_method_looks_at_is_of_the_recipes_model_whatever_its_spec_says(context: Context):
    spec = half(context)
    other = spec.with_(model=ModelSpec())
    assert context.rows(other).key == context.rows(spec).key
    assert context.sensitivities(other).keys() == context.sensitivities(spec).keys()
    assert len([a for a in context.store.list() if a.kind == "sensitivity"]) == 1


def squared_slopes(loaded: LoadedModel, ids: Tensor, layer: int, norm: str) -> Tensor:
    """Squared derivatives (tokens, channels) of the mean next-token loss of each window by what is added to a
    norm's output, all windows in a row.
    """
    found = []
    for window in ids:
        added = torch.zeros(1, len(window), loaded.channels, dtype=torch.float64, requires_grad=True)
        module = loaded.layers[layer].get_submodule(norm)
        handle = module.register_forward_hook(lambda _module, _args, output, added=added: output + added)
        with torch.enable_grad():
            logits = loaded.model(window[None], use_cache=False).logits[0, :-1].double()
            loss = torch.nn.functional.cross_entropy(logits, window[1:])
        handle.remove()
        found.append(torch.autograd.grad(loss, added)[0][0])
    return torch.cat(found).square()


def test_sensitivities_are_the_mean_squared_gradients(tiny_spec: ModelSpec, text_file: Path, store: Store):
    loaded = tiny_model(dtype=torch.float64)
    surgery.prepare(loaded)
    context = Context(recipe(tiny_spec, text_file), store, loaded)
    ids = context.text(half(context, tokens=2 * WINDOW)).reshape(2, WINDOW)

    def mean(squares: Tensor) -> Tensor:
        return squares.mean(0)

    found = {s: sum(parts) / 2 for s, parts in transforms._squared_gradients(loaded, ids, mean).items()}
    sites = {f"layers.{i}.{name}": (i, norm) for i in range(LAYERS) for name, norm, _ in loaded.roles.feeds}
    assert set(found) == set(sites)
    for site, (layer, norm) in sites.items():
        expected = squared_slopes(loaded, ids, layer, norm).mean(0).float()
        assert found[site].dtype == torch.float32 and expected.min() < 0.5 * expected.max()
        torch.testing.assert_close(found[site], expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


def test_row_sensitivities_are_the_rows_squared_gradients_in_the_capture_s_order(
    tiny_spec: ModelSpec, text_file: Path, store: Store
):
    loaded = tiny_model(dtype=torch.float64)
    surgery.prepare(loaded)
    context = Context(recipe(tiny_spec, text_file), store, loaded)
    spec = half(context, tokens=2 * WINDOW)
    ids = context.text(spec).reshape(2, WINDOW)
    parts = transforms._squared_gradients(loaded, ids, lambda squares: squares.sum(1))
    whole = context.row_sensitivities(spec)
    assert set(whole) == set(context.rows(spec).sites) == set(parts)
    for layer in range(LAYERS):
        for name, norm, _ in loaded.roles.feeds:
            site = f"layers.{layer}.{name}"
            for found, of in ((torch.cat(parts[site]), ids), (whole[site], ids.reshape(1, -1))):
                expected = squared_slopes(loaded, of, layer, norm).sum(1).float()
                assert found.shape == (2 * WINDOW,) and expected.min() < 0.5 * expected.max()
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


def test_sensitivities_are_kept_and_leave_the_model_as_it_was(context: Context):
    spec = half(context)
    ids = context.text(spec)
    before = context.model.model(ids).logits
    first = context.sensitivities(spec)
    assert torch.equal(context.model.model(ids).logits, before)
    modules = context.model.model.modules()
    assert not any(m._forward_hooks for m in modules)
    assert all(p.grad is None for p in context.model.model.parameters())
    again = Context(context.recipe, context.store).sensitivities(spec)
    assert all(torch.equal(first[site], again[site]) for site in first)
    [kept] = [a for a in context.store.list() if a.kind == "sensitivity"]
    other = context.sensitivities(half(context, skip=1))
    assert not torch.equal(first["layers.0.input_norm"], other["layers.0.input_norm"])
    kinds = [a.key for a in context.store.list() if a.kind == "sensitivity"]
    assert len(kinds) == 2 and kept.key in kinds
