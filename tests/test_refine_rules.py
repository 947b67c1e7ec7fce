"""What a refinement does with its spec: the rule that says which rows weigh gamma, the clip of its quantizer,
and the released code's test of a step.
"""

import math

import pytest
import torch
from again import assert_near
from conftest import byte_tokenizer, save_tiny
from test_forward import rounded
from transformers import AutoModelForCausalLM

from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, RefineSpec, RotationSpec
from dfrot_lab.rotate import steps
from dfrot_lab.rotate.dfrot import refined
from dfrot_lab.rotate.steps import half_step, losses_of, refine, row_weights

SEMICOLON = byte_tokenizer()(";").input_ids[0]
"""A token of every line of the text, made massive by some rules and not by others."""
ASYM4 = QuantSpec(scheme="asymmetric")


def test_refined_weighs_the_rows_that_its_own_rule_marks(tmp_path, store, text_file):
    """The first losses are those of the start, so they can be had by hand, rule by rule."""
    model, milder = save_tiny(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        milder.model.embed_tokens.weight[SEMICOLON, 3] += 100  # above 8 times the others', below 1000 medians
    milder.save_pretrained(model.source)
    corpus = CorpusSpec(name=str(text_file), split="calibration")
    spec = RefineSpec(capture=CaptureSpec(model=model, corpus=corpus, tokens=96), steps=1, variant="as_paper")
    recorded = capture(spec.capture, store)
    rows, start = recorded.all_rows(), rotations.make(RotationSpec(), 64).float()
    error, seen = squared_error(rows @ start, ASYM4).double(), set()
    for rule in ("ratio_8", "sun", "nr_error_8.5", "nr_error_9.5"):
        mask = massive.find(recorded, rule).flatten()
        first = refined(spec.with_(rule=rule), store).history.iloc[0]
        seen.add(float(first["massive"]))
        assert first["massive"] == pytest.approx(float(error[mask].mean()), rel=1e-5)
        assert first["ordinary"] == pytest.approx(float(error[~mask].mean()), rel=1e-5)
        weights = torch.where(mask, 100.0**2, 1.0)
        assert first["objective"] == pytest.approx(float((weights * error).mean()), rel=1e-5)
    assert len(seen) >= 2, "all rules mark the same rows here: nothing was told apart"


@pytest.mark.parametrize("clip", [1.0, 0.8, 0.5])
def test_half_a_step_rounds_with_the_quantizer_s_clip(clip):
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    mask, R = torch.arange(40) % 9 == 0, rotations.make(RotationSpec(), 64)
    quantizer, weights = ASYM4.with_(clip_ratio=clip), row_weights(mask, 3.0)
    product, losses = half_step(x, R, weights, mask, quantizer)
    turned = x @ R.float()
    low, high = (
        clip * turned.amin(1, keepdim=True).clamp(max=0),
        clip * turned.amax(1, keepdim=True).clamp(min=0),
    )
    step = (high - low) / 15
    zero = torch.round(-low / step)
    eta = step * ((torch.round(turned / step) + zero).clamp(0, 15) - zero)
    assert clip < 1 or torch.allclose(eta, rounded(turned, 4))
    assert_near(product, (x * torch.where(mask, 9.0, 1.0)[:, None]).double().T @ eta.double())
    error = (turned - eta).square().sum(1).double()
    wanted = {
        "objective": (error * weights).mean(),
        "ordinary": error[~mask].mean(),
        "massive": error[mask].mean(),
    }
    for found in (losses, losses_of(x, R, weights, mask, quantizer)):
        assert found == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=1e-5)


@pytest.mark.parametrize(
    ("norms", "kept"),
    [
        ([1000, 900, 800, 700], 4),
        ([1000, 1099.8, 1199.6, 1299.4], 4),  # it may rise by almost 100 at every step
        ([1000, 1099.8, 1000, 1099.95], 3),  # and not by more than 99.9
        ([1000, 1100.5, 900, 800], 1),
    ],
)
def test_the_released_test_of_a_step_lets_the_error_rise_by_99_9(monkeypatch, norms, kept):
    """On the weighted Frobenius norm, from the step before it and not from the best one; then it ends."""
    rows, left = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), iter(norms)
    half = steps.half_step

    def scripted(rows, *others):
        objective = next(left) ** 2 / len(rows)
        return half(rows, *others)[0], {"objective": objective, "ordinary": 0.0, "massive": 0.0}

    monkeypatch.setattr(steps, "half_step", scripted)
    spec = RefineSpec(variant="as_released", steps=3, init=RotationSpec(kind="RO"), quantizer=QuantSpec())
    history = refine(rows, spec, torch.zeros(50, dtype=torch.bool)).history
    assert [math.sqrt(o * 50) for o in history["objective"]] == pytest.approx(norms[:kept])
