"""Methods: what each makes, by its row and by its recipe; and the model that a method may look at."""

from pathlib import Path

import pytest
import torch
from conftest import CHANNELS, save_tiny, tiny_model

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import rotations
from dfrot_lab.model import loading, surgery
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
    assert not found.gains and not found.clips


def test_nr_is_no_rotation_anywhere(context: Context):
    found = made(context, RotationSpec(kind="NR"))
    assert (found.R1, found.R2, found.r3, found.r4) == (None, None, False, False)


def test_dfrot_makes_the_refinement_of_its_own_capture(context: Context):
    half = context.recipe.corpus.with_(split="calibration")
    spec = RefineSpec(capture=CaptureSpec(model=context.recipe.model, corpus=half, tokens=64), steps=2)
    found, own = made(context, spec), refined(spec, context.store)
    assert torch.equal(found.R1, own.R)
    assert (found.R2, found.r3, found.r4) == (transforms.HADAMARD, True, True)


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
