"""Methods: what each makes, by its row and by its recipe; and what a method may look at, against gradients by
finite differences and against what is captured without it.
"""

from collections.abc import Callable
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


@pytest.fixture
def context(tiny_spec: ModelSpec, text_file: Path, store: Store) -> Context:
    return Context(recipe(tiny_spec, text_file), store)


# ---- the table of methods


def test_every_row_has_the_spec_of_its_method():
    assert registry.rows() == ["NR", "RO", "RH", "DFRot"]
    for row in registry.rows():
        spec = registry.spec_of(row, seed=3)
        assert isinstance(spec, MethodSpec) and spec.name == row
        module = registry.load(registry.METHODS, spec.method)
        assert isinstance(spec, module.SPEC)
        assert MethodSpec.of(spec.plain()) == spec
        assert spec.first_seed == (None if row == "NR" else 3)
    assert registry.spec_of("NR", seed=3) == registry.spec_of("NR"), "nothing is random in it"
    own = CaptureSpec(tokens=64)
    assert registry.spec_of("DFRot", seed=3, capture=own) == RefineSpec(
        capture=own, init=RotationSpec(seed=3)
    )


def test_an_unknown_row_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="a rotation must be one of NR, RO, RH, DFRot; got 'SpinQuant'"):
        registry.spec_of("SpinQuant")


@pytest.mark.parametrize("method", registry.WEIGHTS)
def test_every_weight_quantizer_says_whether_it_is_calibrated(method: str):
    module = registry.load(registry.WEIGHTS, method)
    assert module.CALIBRATED is (method == "gptq") and callable(module.quantize)


# ---- what methods make


def made(context: Context, rotation: MethodSpec) -> Transforms:
    return transforms.fit(context.recipe.with_(rotation=rotation), context)


@pytest.mark.parametrize(
    "spec", [RotationSpec(kind="RO", seed=2), RotationSpec(block=16)], ids=lambda s: s.name
)
def test_random_makes_the_rotation_of_its_spec(context: Context, spec: RotationSpec):
    found = made(context, spec)
    assert torch.equal(found.R1, rotations.make(spec, CHANNELS))
    assert (found.R2, found.r3, found.r4) == (transforms.HADAMARD, True, True)
    assert not found.gains and not found.clips and found.history is None


def test_nr_is_no_rotation_anywhere(context: Context):
    found = made(context, RotationSpec(kind="NR"))
    assert (found.R1, found.R2, found.r3, found.r4) == (None, None, False, False)


def test_dfrot_makes_the_refinement_of_its_own_capture(context: Context):
    spec = RefineSpec(capture=context._capture_spec(tokens=64), steps=2)
    found, own = made(context, spec), refined(spec, context.store)
    assert torch.equal(found.R1, own.R) and found.history.equals(own.history)
    assert found.seconds == own.seconds and (found.R2, found.r3, found.r4) == (
        transforms.HADAMARD,
        True,
        True,
    )


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


def test_rows_and_text_are_of_the_calibration_half(context: Context, text_file: Path):
    half = CorpusSpec(name=str(text_file), split="calibration")
    found = context.capture()
    assert found.tokens == WINDOW
    own = capture(CaptureSpec(model=context.recipe.model, corpus=half, tokens=WINDOW), context.store)
    assert found.key == own.key and torch.equal(found.all_rows(), own.all_rows())
    assert context.capture(tokens=64, skip=1).tokens == 64
    ids = context.text(3)
    assert torch.equal(ids, corpus.token_blocks(half, context.model.tokenizer, blocks=3, window=WINDOW))
    assert ids[0].tolist() == found.ids


def loss_of(
    loaded: LoadedModel, window: Tensor, norm: torch.nn.Module, change: Callable[[Tensor], Tensor]
) -> float:
    """Mean next-token loss of a window (tokens,) with a norm's output changed, in float64."""
    handle = norm.register_forward_hook(lambda _module, _args, output: change(output))
    try:
        logits = loaded.model(window[None], use_cache=False).logits[0, :-1].double()
    finally:
        handle.remove()
    return float(torch.nn.functional.cross_entropy(logits, window[1:]))


def squared_slope(loaded: LoadedModel, ids: Tensor, layer: int, norm: str, channel: int) -> float:
    """The squared derivative of the loss by one channel of a norm's output, in the mean over all tokens: by
    central differences, a token at a time.
    """
    module, step, slopes = loaded.layers[layer].get_submodule(norm), 1e-4, []
    for window in ids:
        for token in range(len(window)):
            shift = torch.zeros(1, len(window), loaded.channels, dtype=torch.float64)
            shift[0, token, channel] = step
            up, down = (
                loss_of(loaded, window, module, lambda x, s=sign * shift: x + s) for sign in (1.0, -1.0)
            )
            slopes.append((up - down) / (2 * step))
    return float(torch.tensor(slopes, dtype=torch.float64).square().mean())


def test_sensitivities_are_the_mean_squared_gradients(tiny_spec: ModelSpec, text_file: Path, store: Store):
    loaded = tiny_model(dtype=torch.float64)
    surgery.prepare(loaded)
    context = Context(recipe(tiny_spec, text_file), store, loaded)
    found = context.sensitivities(windows=2)
    sites = {f"layers.{i}.{name}": (i, norm) for i in range(LAYERS) for name, norm, _ in loaded.roles.feeds}
    assert set(found) == set(sites)
    for site, (layer, norm) in sites.items():
        squares = found[site]
        assert squares.shape == (CHANNELS,) and squares.dtype == torch.float32
        channels = [int(squares.argmax()), int(squares.argmin()), 5]
        slow = [squared_slope(loaded, context.text(2), layer, norm, channel) for channel in channels]
        assert squares[channels].tolist() == pytest.approx(slow, rel=1e-3)
        assert slow[0] > 2 * slow[1], "all channels alike: the test is vacuous"


def test_sensitivities_are_kept_and_leave_the_model_as_it_was(context: Context):
    ids = context.text(1)
    before = context.model.model(ids).logits
    first = context.sensitivities()
    assert torch.equal(context.model.model(ids).logits, before)
    modules = context.model.model.modules()
    assert not any(m._forward_hooks for m in modules)
    assert not any(p.requires_grad or p.grad is not None for p in context.model.model.parameters())
    again = Context(context.recipe, context.store).sensitivities()
    assert all(torch.equal(first[site], again[site]) for site in first)
    [kept] = [a for a in context.store.list() if a.kind == "sensitivity"]
    two = context.sensitivities(windows=2)
    assert not torch.equal(first["layers.0.input_norm"], two["layers.0.input_norm"])
    kinds = [a.key for a in context.store.list() if a.kind == "sensitivity"]
    assert len(kinds) == 2 and kept.key in kinds
