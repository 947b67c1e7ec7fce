"""Refinement: each variant against a loop written from the paper or from the released code, its guards, and a
run that was stopped and goes on.
"""

import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from again import REFINED, assert_same_refinement, sharing, stop_at_second
from hypothesis import given, settings, strategies as st
from scipy.linalg import orthogonal_procrustes
from test_evaluate import save_lively
from torch import Tensor

from dfrot_lab.disk import rotation_files
from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import fake_quantize, squared_error
from dfrot_lab.model import door
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import (
    MASSIVE_RULES,
    ROW_RULES,
    CaptureSpec,
    CorpusSpec,
    ModelSpec,
    RefineSpec,
    RotationSpec,
)
from dfrot_lab.rotate import descent, dfrot as module, steps
from dfrot_lab.rotate.dfrot import refined, stored
from dfrot_lab.rotate.steps import Refined, State, half_step, losses_of, polar, refine, row_weights

SYM4, ASYM4 = QuantSpec(), QuantSpec(scheme="asymmetric")
HISTORY = ["step", "objective", "ordinary", "massive", "best", "distance"]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def planted(tokens: int = 400, channels: int = 32, massive: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normalised rows of which the first `massive` are a spike and small values, and their mask."""
    x = gaussian(tokens, channels, seed=seed) * torch.linspace(0.5, 2, channels, dtype=torch.float64)
    x[:massive] *= 0.1
    x[:massive, 3] += 20
    x[: massive // 3, 7] -= 6  # a second massive channel in some of them, as in a real model
    x = x / x.square().mean(1, keepdim=True).sqrt()
    return x, torch.arange(tokens) < massive


def bumpy(seed: int = 0) -> tuple[Tensor, Tensor]:
    """So few rows and channels that a step often raises the error (min-max scales are not the argmin of Eq.
    7).
    """
    return planted(tokens=30, channels=8, massive=4, seed=seed)


def orthogonal(channels: int, seed: int = 0) -> Tensor:
    return rotations.make(RotationSpec(kind="RO", seed=seed), channels)


# ---- procrustes


@given(seed=st.integers(0, 10_000), channels=st.integers(1, 12), tokens=st.integers(20, 40))
@settings(max_examples=40, deadline=None)
def test_procrustes_is_scipys(seed, channels, tokens):
    a, b = gaussian(tokens, channels, seed=seed), gaussian(tokens, channels, seed=seed + 1)
    expected, _ = orthogonal_procrustes(a.numpy(), b.numpy())
    torch.testing.assert_close(polar(a.T @ b), torch.from_numpy(expected), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_procrustes_recovers_a_planted_rotation(dtype):
    a, R = gaussian(200, 24).to(dtype), orthogonal(24, seed=4)
    found = polar(a.double().T @ (a @ R.to(dtype)).double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, R, rtol=0, atol=1e-5 if dtype is torch.float32 else 1e-12)


def test_procrustes_is_no_worse_than_any_other_rotation():
    a, b = gaussian(100, 8), gaussian(100, 8, seed=1)
    least = torch.linalg.norm(a @ polar(a.T @ b) - b)
    assert all(torch.linalg.norm(a @ orthogonal(8, seed) - b) > least for seed in range(50))


@pytest.mark.parametrize("rank", [0, 3])
def test_polar_of_a_singular_matrix_is_still_orthogonal(rank):
    product = gaussian(8, rank) @ gaussian(rank, 8)
    assert rotations.orthogonality_error(polar(product)) < 1e-12


# ---- half step


@pytest.mark.parametrize("quantizer", [SYM4, ASYM4, QuantSpec(scheme="free")], ids=lambda q: q.name)
@pytest.mark.parametrize("gamma", [1.0, 7.0, math.inf])
def test_half_step_equals_a_slow_loop(quantizer, gamma):
    x, mask = planted(tokens=steps.ROWS_AT_ONCE + 300, channels=8, massive=50)
    mask = mask.roll(steps.ROWS_AT_ONCE - 20)  # massive rows on both sides of the border of two blocks
    x = x.roll(steps.ROWS_AT_ONCE - 20, dims=0)
    R = orthogonal(8)
    product, losses = half_step(x, R, row_weights(mask, gamma), mask, quantizer)
    expected, error, weight = torch.zeros(8, 8, dtype=torch.float64), [], []
    for row, heavy in zip(x, mask.tolist(), strict=True):
        eta = fake_quantize((row @ R)[None], quantizer)[0]
        weight.append((1 if heavy else 0) if gamma == math.inf else (gamma**2 if heavy else 1))
        expected += weight[-1] * torch.outer(row, eta)
        error.append(float((row @ R - eta).square().sum()))
    torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-9)
    errors, weights = torch.tensor(error, dtype=torch.float64), torch.tensor(weight, dtype=torch.float64)
    assert losses == pytest.approx(
        {
            "objective": float((errors * weights).mean()),
            "ordinary": float(errors[~mask].mean()),
            "massive": float(errors[mask].mean()),
        },
        rel=1e-10,
    )


def test_scaling_massive_rows_by_gamma_is_weighting_them_by_its_square():
    """Eq. 3, which holds because Q is scale-equivariant: the same product, so the same R, and the same
    objective.
    """
    x, mask = planted()
    R, gamma = orthogonal(32), 13.0
    weighted, losses = half_step(x, R, row_weights(mask, gamma), mask, ASYM4)
    scaled, scaled_losses = half_step(
        torch.where(mask[:, None], gamma * x, x), R, torch.ones(len(x)), mask, ASYM4
    )
    torch.testing.assert_close(weighted, scaled, rtol=1e-9, atol=1e-9)
    assert losses["objective"] == pytest.approx(scaled_losses["objective"], rel=1e-9)


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric", "free"])
def test_rows_that_share_one_scale_share_it_over_all_parts(scheme):
    x, mask = planted(tokens=2 * steps.ROWS_AT_ONCE, channels=8, massive=50)
    x[:50] *= 9  # in the first part alone: its range is the whole's
    R, weights, quantizer = (
        orthogonal(8),
        row_weights(mask, 7.0),
        QuantSpec(scheme=scheme, granularity="per_tensor"),
    )
    eta = fake_quantize(x @ R, quantizer)
    product, losses = half_step(x, R, weights, mask, quantizer)
    torch.testing.assert_close(product, x.T @ (eta * weights[:, None]), rtol=1e-10, atol=1e-9)
    error = (x @ R - eta).square().sum(1)
    assert losses["ordinary"] == pytest.approx(float(error[~mask].mean()), rel=1e-10)
    assert losses_of(x, R, weights, mask, quantizer) == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize("quantizer", [SYM4, ASYM4, QuantSpec(scheme="free")], ids=lambda q: q.name)
def test_losses_are_those_of_a_half_step(quantizer):
    x, mask = planted(tokens=steps.ROWS_AT_ONCE + 300, channels=8, massive=50)
    R, weights = orthogonal(8), row_weights(mask, 7.0)
    expected = half_step(x, R, weights, mask, quantizer)[1]
    assert losses_of(x, R, weights, mask, quantizer) == pytest.approx(expected, rel=1e-12)


def test_the_rows_are_left_as_they_were():
    x, mask = planted()
    before = x.clone()
    half_step(x, orthogonal(32), row_weights(mask, 5.0), mask, ASYM4)
    assert torch.equal(x, before)


# ---- as the paper


def paper_loop(x: Tensor, mask: Tensor, R: Tensor, gamma: float, steps: int) -> Tensor:
    """Algorithm 1 as printed: massive rows scaled by gamma (Eq. 3), asymmetric min-max Q (Eq. 5, 7), R = U
    V^T (Eq. 6, 8).
    """
    x = torch.where(mask[:, None], gamma * x, x)
    for _ in range(steps):
        rotated = x @ R
        low, high = rotated.amin(1, keepdim=True), rotated.amax(1, keepdim=True)
        scale = (high - low) / 15
        zero = -torch.round(low / scale)
        eta = scale * ((torch.round(rotated / scale) + zero).clamp(0, 15) - zero)
        u, _, vt = torch.linalg.svd(x.T @ eta)
        R = u @ vt
    return R


@pytest.mark.parametrize("gamma", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("kind", ["RH", "RO"])
def test_as_paper_is_algorithm_1(gamma, kind):
    x, mask = planted()
    init = RotationSpec(kind=kind, seed=2)
    found = refine(x, RefineSpec(variant="as_paper", init=init, gamma=gamma, steps=6), mask)
    expected = paper_loop(x, mask, rotations.make(init, 32), gamma, steps=6)
    torch.testing.assert_close(found.R, expected, rtol=0, atol=1e-7)
    assert rotations.distance(found.R, rotations.make(init, 32)) > 0.05, "nothing moved: the test is vacuous"


def test_float32_rows_lead_to_the_same_refinement_for_a_few_steps():
    x, mask = planted()
    spec = RefineSpec(variant="as_paper", gamma=10, steps=3)
    assert rotations.distance(refine(x.float(), spec, mask).R, refine(x, spec, mask).R) < 0.02


def test_the_history_says_what_each_step_reached():
    x, mask = planted()
    spec = RefineSpec(variant="as_paper", gamma=10, steps=8)
    found = refine(x, spec, mask)
    assert list(found.history.columns) == HISTORY
    assert found.history["step"].tolist() == list(range(9))
    start = rotations.make(spec.init, 32)
    for row in (0, 3, 8):
        R = paper_loop(x, mask, start, 10, steps=row)
        error = squared_error(x @ R, ASYM4)
        expected = [
            float((error * torch.where(mask, 100.0, 1.0)).mean()),
            float(error[~mask].mean()),
            float(error[mask].mean()),
        ]
        assert found.history.loc[row, ["objective", "ordinary", "massive"]].tolist() == pytest.approx(
            expected, rel=1e-5
        )
        assert found.history.loc[row, "distance"] == pytest.approx(rotations.distance(R, start), abs=1e-6)
    assert found.history["best"].tolist() == found.history["objective"].cummin().tolist()


# ---- as released


def released_loop(
    x: Tensor, mask: Tensor, start: Tensor, gamma: float, steps: int, rounded: Callable[[Tensor], Tensor]
) -> Tensor:
    """The released optimiser's logic: `steps` outer rounds of one Procrustes step each, and in every round
    the accept test starts afresh.

    It turns rows that `start` has turned already, and what it passes through QR, the step and then all steps
    together, is the turn since then. A round's bound is the error it starts from + 100, of which the new
    error must be 0.1 short. So a step may raise the error by up to 99.9.
    """
    rows = torch.where(mask[:, None], gamma * (x @ start), x @ start)
    total = torch.eye(x.shape[1], dtype=x.dtype)
    for _ in range(steps):
        a = rows @ total
        bound = torch.norm(a - rounded(a)) + 100
        u, _, vt = torch.linalg.svd(a.T @ rounded(a))
        step = torch.linalg.qr(u @ vt)[0]
        loss = torch.norm(a @ step - rounded(a @ step))
        if loss <= bound and bound - loss > 0.1:
            total = total @ step
        total = torch.linalg.qr(total)[0]
    return start @ total


def symmetric(a: Tensor) -> Tensor:
    """Rows to the values of 16 codes about 0, as the released optimiser's own quantizer."""
    scale = a.abs().amax(1, keepdim=True) / 7
    return scale * torch.round(a / scale).clamp(-8, 7)


def asymmetric(a: Tensor) -> Tensor:
    """Rows to the values of 16 codes over a range that includes 0, as the released evaluation's quantizer."""
    low, high = a.amin(1, keepdim=True).clamp(max=0), a.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = torch.round(-low / scale)
    return scale * (torch.clamp(torch.round(a / scale) + zero, 0, 15) - zero)


def up_to_signs(R: Tensor, like: Tensor) -> Tensor:
    """R with the signs of its columns chosen to fit: QR picks them; no symmetric error depends on them."""
    return R * torch.where((R * like).sum(0) < 0, -1.0, 1.0)


@pytest.mark.parametrize("gamma", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("scale", [1.0, 1e8], ids=["steps accepted", "rises refused"])
def test_as_released_is_the_released_loop(gamma, scale):
    """Signs and all. At a scale of 1e8 any rise of the Frobenius error is above 100 and is refused; at 1 none
    is.
    """
    x, mask = bumpy()
    x = x * scale
    spec = RefineSpec(variant="as_released", quantizer=SYM4, gamma=gamma, steps=12)
    found = refine(x, spec, mask).R
    expected = released_loop(x, mask, rotations.make(spec.init, 8), gamma, 12, symmetric)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 10.0, 100.0])
def test_as_released_is_the_released_loop_with_an_asymmetric_quantizer(gamma):
    """Every column's sign is the loop's at every step: an asymmetric error hangs on it."""
    x, mask = planted()
    spec = RefineSpec(variant="as_released", quantizer=ASYM4, gamma=gamma, steps=12)
    found = refine(x, spec, mask).R
    expected = released_loop(x, mask, rotations.make(spec.init, 32), gamma, 12, asymmetric)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_as_released_flips_a_small_turn_as_a_whole():
    """QR turns the sign of every column whose pivot is positive: all columns of a turn that is near none. So
    R is minus the paper's, whose symmetric error is the same; of a whole R about half would be flipped.
    """
    x, mask = planted()
    one, paper = (
        refine(x, RefineSpec(variant=variant, quantizer=ASYM4, gamma=1, steps=1), mask).R
        for variant in ("as_released", "as_paper")
    )
    flipped = (one * paper).sum(0) < 0
    assert int(flipped.sum()) >= 31
    torch.testing.assert_close(up_to_signs(one, paper), paper, rtol=0, atol=1e-10)


def test_as_released_may_raise_the_error_and_refuses_it_at_a_large_scale():
    x, mask = bumpy()
    spec = RefineSpec(variant="as_released", quantizer=SYM4, gamma=10, steps=30)
    accepted, refused = (
        refine(x, spec, mask).history["objective"],
        refine(1e8 * x, spec, mask).history["objective"],
    )
    assert len(accepted) == 31 and (accepted.diff() > 0).any()
    assert 1 < len(refused) < 31 and not (refused.diff() > 0).any()


def test_as_released_reports_the_losses_of_the_asymmetric_quantizer():
    x, mask = bumpy()
    more = refine(x, RefineSpec(variant="as_released", quantizer=ASYM4, steps=8), mask)
    error = squared_error(x @ more.R, ASYM4) * torch.where(mask, 100.0**2, 1.0)
    assert more.history["objective"].iloc[-1] == pytest.approx(float(error.mean()), rel=1e-5)


def test_as_released_takes_no_infinite_gamma():
    with pytest.raises(
        ValueError, match=r"RefineSpec\.gamma must be finite with variant as_released; got inf"
    ):
        RefineSpec(variant="as_released", quantizer=SYM4, gamma=math.inf)


# ---- guarded


@pytest.mark.parametrize("gamma", [1.0, 100.0])
@pytest.mark.parametrize("quantizer", [SYM4, ASYM4], ids=lambda q: q.name)
@pytest.mark.parametrize("seed", range(3))
def test_guarded_keeps_the_best_r_of_the_papers_steps(gamma, quantizer, seed):
    x, mask = bumpy(seed)
    spec = RefineSpec(
        variant="guarded", gamma=gamma, quantizer=quantizer, steps=40, init=RotationSpec(kind="RH", seed=seed)
    )
    found, paper = refine(x, spec, mask), refine(x, spec.with_(variant="as_paper"), mask)
    pd.testing.assert_frame_equal(found.history, paper.history, rtol=REFINED, atol=REFINED)
    assert (found.history["objective"].diff() > 0).any(), (
        "no step was worse than the one before: the guard had nothing to do"
    )
    objective = float((squared_error(x @ found.R, quantizer) * torch.where(mask, gamma**2, 1.0)).mean())
    assert objective == pytest.approx(found.history["objective"].min(), rel=1e-9)
    assert objective <= found.history["objective"][0]
    assert objective < float(
        (squared_error(x @ paper.R, quantizer) * torch.where(mask, gamma**2, 1.0)).mean()
    )


def test_guarded_returns_the_start_where_every_step_is_worse():
    """Rows that the start puts on the grid exactly: nothing is better, and the guard keeps it."""
    start = rotations.make(RotationSpec(kind="RH"), 16)
    spec = RefineSpec(variant="guarded", steps=5, quantizer=SYM4)
    found = refine(torch.eye(16, dtype=torch.float64) * 4, spec, torch.ones(16, dtype=torch.bool))
    assert float(found.history["objective"][0]) < 1e-20
    assert found.history["objective"].min() < 1e-20
    assert float(squared_error(torch.eye(16, dtype=torch.float64) * 4 @ found.R, SYM4).max()) < 1e-20
    assert rotations.distance(found.R, start) < 1e-6


@pytest.mark.parametrize("variant", ["accelerated", "guarded", "as_paper", "as_released"])
def test_orthogonal_to_1e_5_after_100_steps(variant):
    x, mask = planted()
    found = refine(x.float(), RefineSpec(variant=variant, quantizer=SYM4, steps=100), mask)
    assert found.R.dtype == torch.float64
    assert rotations.orthogonality_error(found.R) < 1e-5
    assert found.history["step"].iloc[-1] == 100


# ---- accelerated


@pytest.mark.parametrize("gamma", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("kind", ["RH", "RO"])
@pytest.mark.parametrize("seed", range(2))
def test_accelerated_ends_no_higher_than_the_papers_100_steps(gamma, kind, seed):
    x, mask = planted(tokens=3000, channels=64, massive=20, seed=seed)
    spec = RefineSpec(gamma=gamma, init=RotationSpec(kind=kind, seed=seed))
    found, paper = refine(x.float(), spec, mask), refine(x, spec.with_(variant="guarded"), mask)
    assert found.history["objective"].min() <= 1.001 * paper.history["objective"].min()
    assert found.history["step"].tolist() == [0, 20, 40, 60, 80, 100]
    objective = float((squared_error(x @ found.R, spec.quantizer) * row_weights(mask, gamma)).mean())
    assert objective == pytest.approx(found.history["objective"].min(), rel=1e-4)


def test_accelerated_goes_back_where_a_check_finds_no_gain(monkeypatch):
    """A step ten times too long: it must shorten itself, and never return worse than the start."""
    x, mask = planted()
    monkeypatch.setattr(steps, "LENGTH", 5.0)
    found = refine(x, RefineSpec(gamma=10), mask, state=State(R := orthogonal(32), R, [], length=5.0))
    assert (found.history["objective"].diff() > 0).any(), "no check was worse: the test is vacuous"
    assert found.history["best"].iloc[-1] < found.history["objective"].iloc[0]
    error = squared_error(x @ found.R, ASYM4) * row_weights(mask, 10.0)
    assert float(error.mean()) == pytest.approx(found.history["best"].iloc[-1], rel=1e-6)


def test_accelerated_fits_the_massive_rows_alone_at_infinite_gamma():
    x, mask = planted()
    found = refine(x, RefineSpec(gamma=math.inf), mask)
    assert found.history["massive"].iloc[-1] < 0.5 * found.history["massive"].iloc[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_accelerated_is_the_same_on_one_thread_and_two(threads):
    """To the tolerance that a descent over rounded values allows: the objective to 1%."""
    x, mask = planted(tokens=3000, channels=64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = refine(x.float(), RefineSpec(gamma=10), mask).history["best"].iloc[-1]
        torch.set_num_threads(3 - threads)
        other = refine(x.float(), RefineSpec(gamma=10), mask).history["best"].iloc[-1]
    finally:
        torch.set_num_threads(before)
    assert found == pytest.approx(other, rel=0.01)


# ---- gamma


def test_gamma_infinite_fits_the_massive_rows_alone():
    """60 rows like any other are called massive: planted spikes, whose codes are nearly all alike, would
    leave most of R to rounding.
    """
    x, mask = planted()[0], torch.arange(400) >= 340
    spec = RefineSpec(variant="as_paper", gamma=math.inf, steps=8)
    found, alone = (
        refine(x, spec, mask),
        refine(x[mask], spec.with_(gamma=1), torch.ones(int(mask.sum()), dtype=torch.bool)),
    )
    torch.testing.assert_close(found.R, alone.R, rtol=0, atol=REFINED)
    assert found.history["objective"].tolist() == pytest.approx(
        (alone.history["objective"] * 60 / 400).tolist(), rel=1e-5
    )


@pytest.mark.parametrize("seed", range(3))
def test_gamma_lowers_the_massive_error_and_pays_with_the_rest(seed):
    x, mask = planted(seed=seed)
    error = {
        g: squared_error(x @ refine(x, RefineSpec(gamma=g, steps=60), mask).R, ASYM4) for g in (1.0, 100.0)
    }
    assert error[100.0][mask].mean() < 0.7 * error[1.0][mask].mean()
    assert error[100.0][~mask].mean() > error[1.0][~mask].mean()


def test_row_weights():
    mask = torch.tensor([True, False, True])
    assert row_weights(mask, 3.0).tolist() == [9, 1, 9]
    assert row_weights(mask, math.inf).tolist() == [1, 0, 1]


@pytest.mark.parametrize("rule", ROW_RULES)
def test_without_a_mask_the_rule_finds_the_massive_rows(rule):
    x, _ = planted()
    mask = massive.rows_rule(x, rule)
    assert 0 < int(mask.sum()) < len(x)
    spec = RefineSpec(rule=rule, steps=3)
    assert_same_refinement(refine(x, spec), refine(x, spec, mask))


# ---- bad input, sameness


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_named(bad):
    x, mask = planted()
    x[7, 5] = bad
    with pytest.raises(ValueError, match=r"rows must be finite to be refined on; row 7 has NaN or Inf"):
        refine(x, RefineSpec(steps=2), mask)


def test_infinite_gamma_needs_a_massive_row():
    x, mask = planted()
    with pytest.raises(
        ValueError, match=r"RefineSpec\.gamma must be finite where rule ratio_8 finds no massive row; got inf"
    ):
        refine(x, RefineSpec(gamma=math.inf, steps=2), torch.zeros_like(mask))


def test_rules_that_need_the_residual_need_a_mask():
    for rule in set(MASSIVE_RULES) - set(ROW_RULES):
        with pytest.raises(ValueError, match=rf"rule must be one of .* for rows alone .*; got '{rule}'"):
            refine(planted()[0], RefineSpec(rule=rule, steps=2))


def test_a_start_of_the_wrong_size_is_refused(tmp_path):
    rotation_files.save(orthogonal(16), tmp_path / "R1.safetensors", None)
    init = RotationSpec(kind="file", path=str(tmp_path / "R1.safetensors"))
    with pytest.raises(ValueError, match=r"rotation\.shape must be \(32, 32\); got \(16, 16\)"):
        refine(planted()[0], RefineSpec(init=init, steps=2), planted()[1])


def test_no_massive_rows_refine_the_plain_objective():
    x, mask = planted()
    found = refine(x, RefineSpec(steps=5), torch.zeros_like(mask))
    assert found.history["massive"].isna().all()
    assert found.history["objective"].tolist() == pytest.approx(found.history["ordinary"].tolist())


@pytest.mark.parametrize("variant", ["accelerated", "guarded", "as_released"])
def test_same_spec_same_r(variant):
    x, mask = planted()
    spec = RefineSpec(variant=variant, quantizer=SYM4, steps=15)
    torch.manual_seed(5)
    first = refine(x, spec, mask)
    torch.manual_seed(6)
    assert_same_refinement(first, refine(x, spec, mask))
    assert (
        rotations.distance(first.R, refine(x, spec.with_(steps=14), mask).R) > 1e3 * REFINED
        or variant == "guarded"
    )


# ---- stopped and resumed


@pytest.mark.parametrize(
    ("variant", "rows_of_history"), [("accelerated", 2), ("guarded", 20), ("as_paper", 20)]
)
def test_a_stopped_run_goes_on_from_its_checkpoint_to_the_same_r(variant, rows_of_history):
    x, mask = planted()
    spec = RefineSpec(variant=variant, steps=57)
    kept: list[State] = []
    with pytest.raises(KeyboardInterrupt):
        refine(x, spec, mask, checkpoint=stop_at_second(kept))
    assert len(kept[-1].history) == rows_of_history
    assert_same_refinement(refine(x, spec, mask, state=kept[-1]), refine(x, spec, mask))


def spec_of(model: ModelSpec, text: Path, **fields: object) -> RefineSpec:
    recorded = CaptureSpec(model=model, corpus=CorpusSpec(name=str(text), split="calibration"), tokens=64)
    return RefineSpec(capture=recorded, **fields)


@pytest.fixture
def lively(tmp_path: Path, in_float64: None) -> ModelSpec:
    """A model whose rows fix R, refined on in float64: of a tiny model's rows, most of which are alike, any
    rounding makes another R.
    """
    return save_lively(tmp_path / "lively")


def identity(spec: RefineSpec) -> dict[str, object]:
    """What a refinement is stored under."""
    return keys.identity(door.resolved(spec), door.prints)


def assert_same(a: Refined, b: Refined) -> None:
    assert torch.equal(a.R, b.R)
    pd.testing.assert_frame_equal(a.history, b.history, check_exact=True, check_dtype=False, check_like=True)


def test_refined_computes_once_and_returns_the_refinement_of_its_capture(
    lively: ModelSpec, text_file: Path, store: Store
):
    spec = spec_of(lively, text_file, steps=5)
    first = refined(spec, store)
    recorded = capture(spec.capture, store)
    assert_same_refinement(
        first, refine(recorded.all_rows().double(), spec, massive.find(recorded, spec.rule).flatten())
    )
    [artefact] = [a for a in store.list() if a.kind == "refine"]
    written = (artefact.path / "manifest.json").stat().st_mtime_ns
    again = refined(spec, store)
    assert torch.equal(again.R, first.R) and again.history.equals(first.history)
    assert (artefact.path / "manifest.json").stat().st_mtime_ns == written
    assert artefact.names == ["R1", "history"]  # the checkpoint is gone
    assert list(first.history.columns) == HISTORY


def test_stored_finds_what_was_refined_and_computes_nothing(tiny_spec, text_file, store):
    spec = spec_of(tiny_spec, text_file, steps=2, gamma=math.inf)
    assert stored(spec, store) is None and store.list() == []
    first = refined(spec, store)
    found = stored(spec, store)
    assert_same(first, found)
    assert stored(spec.with_(gamma=10.0), store) is None
    elsewhere = spec.capture.model.with_(device="cpu")  # what auto stands for here
    assert_same(first, stored(spec.with_(capture=spec.capture.with_(model=elsewhere)), store))


def test_refining_says_what_is_odd_about_its_rule(tiny_spec, text_file, store, caplog):
    massive._warn_once.cache_clear()
    spec = spec_of(tiny_spec, text_file, steps=1)
    spec = spec.with_(capture=spec.capture.with_(tokens=128))
    refined(spec, store)
    said = massive.doubt(capture(spec.capture, store), spec.rule)
    assert said is not None and [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [said]


@pytest.mark.parametrize("variant", ["accelerated", "guarded", "as_released"])
def test_refined_goes_on_after_an_interrupt(lively, text_file, store, tmp_path, monkeypatch, caplog, variant):
    # Momentum makes a million times more of a rounding in 20 steps, and with massive rows of weight 10,000
    # its frame, made again, is off by 1e-9.
    less = {"steps": 25, "gamma": 1} if variant == "accelerated" else {"steps": 45}
    spec = spec_of(lively, text_file, variant=variant, quantizer=SYM4, **less)
    save, saved = module._save_state, []

    def save_and_stop(writer, state):
        save(writer, state)
        saved.append(len(state.history))
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_save_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        refined(spec, store)
    monkeypatch.undo()
    with caplog.at_level(logging.INFO):
        resumed = refined(spec, store)
    if variant == "guarded":
        assert saved == [10, 20]
        assert "going on with refinement at step 19 of 45" in caplog.text
    if variant == "accelerated":
        assert "going on with refinement at step 20 of 25" in caplog.text
    assert_same_refinement(resumed, refined(spec, sharing(store, tmp_path / "one go", "capture")))


KILLED = """
import os, signal, sys
from pathlib import Path
from dfrot_lab.rotate import dfrot
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec, RefineSpec
from dfrot_lab.disk.artefacts import Store
root, model, text = sys.argv[1:]
save, sample = dfrot._save_state, dfrot.sample_rows
dfrot.sample_rows = lambda *arguments: (sample(*arguments)[0].double(), sample(*arguments)[1])
def save_and_die(writer, state):
    save(writer, state)
    os.kill(os.getpid(), signal.SIGKILL)
dfrot._save_state = save_and_die
text = CorpusSpec(name=text, split="calibration")
recorded = CaptureSpec(model=ModelSpec(source=model), corpus=text, tokens=64)
dfrot.refined(RefineSpec(capture=recorded, steps=25, variant="guarded"), Store(Path(root)))
"""


@pytest.mark.skipif(os.name != "posix", reason="kills as POSIX has them")
def test_refined_goes_on_after_kill_9(lively, text_file, store, tmp_path, caplog):
    command = [sys.executable, "-c", KILLED, str(store.root), lively.source, str(text_file)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    spec = spec_of(lively, text_file, steps=25, variant="guarded")
    with caplog.at_level(logging.INFO):
        resumed = refined(spec, store)
    assert "going on with refinement at step 9 of 25" in caplog.text
    assert_same_refinement(resumed, refined(spec, sharing(store, tmp_path / "one go", "capture")))


# ---- a sample of the rows


def places_of(x: Tensor) -> Callable[[Tensor | None], Tensor]:
    return lambda places: x if places is None else x[places]


@pytest.mark.parametrize("count", [1, 7, 50, 400])
def test_a_sample_is_that_many_of_the_rows_in_their_order(count):
    x, mask = planted()
    rows, chosen = module.sample_rows(places_of(x), mask, RefineSpec(rows=count))
    assert rows.shape == (count, x.shape[1]) and chosen.shape == (count,)
    places = [int((x == row).all(1).nonzero().item()) for row in rows]  # every row of x occurs once
    assert places == sorted(set(places))
    assert torch.equal(chosen, mask[places])
    if count == 400:
        assert torch.equal(rows, x)


def test_a_sample_depends_on_the_seed_of_the_start_alone():
    x, mask = planted()
    torch.manual_seed(5)
    first, _ = module.sample_rows(places_of(x), mask, RefineSpec(rows=50, init=RotationSpec(seed=3)))
    torch.manual_seed(6)
    same, _ = module.sample_rows(
        places_of(x), mask, RefineSpec(rows=50, init=RotationSpec(kind="RO", seed=3), gamma=5)
    )
    other, _ = module.sample_rows(places_of(x), mask, RefineSpec(rows=50, init=RotationSpec(seed=4)))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_without_a_number_all_rows_are_taken():
    x, mask = planted()
    rows, chosen = module.sample_rows(places_of(x), mask, RefineSpec())
    assert rows is x and chosen is mask


def test_refined_on_a_sample_is_the_refinement_of_that_sample(lively, text_file, store):
    spec = spec_of(lively, text_file, steps=5, rows=100)
    recorded = capture(spec.capture, store)
    rows, mask = module.sample_rows(recorded.all_rows, massive.find(recorded, spec.rule).flatten(), spec)
    found = refined(spec, store)
    assert_same_refinement(found, refine(rows, spec, mask))
    assert rotations.distance(found.R, refined(spec.with_(rows=None), store).R) > 0.01
    all_of_them = refined(spec.with_(rows=4 * 64), store)
    assert_same_refinement(all_of_them, refined(spec.with_(rows=None), store))


def test_more_rows_than_the_capture_has_are_refused(tiny_spec, text_file, store):
    with pytest.raises(
        ValueError, match=r"RefineSpec\.rows must be at most the 256 rows of the capture; got 257"
    ):
        refined(spec_of(tiny_spec, text_file, rows=257), store)
    assert [a.kind for a in store.list()] == ["capture"]


# ---- seconds


def test_seconds_are_measured_once_and_come_from_the_store(tiny_spec, text_file, store):
    spec = spec_of(tiny_spec, text_file, steps=5)
    first = refined(spec, store)
    assert 0 < first.seconds < 60
    assert refined(spec, store).seconds == refined(spec, Store(store.root)).seconds == first.seconds


def test_seconds_are_nan_where_they_were_not_measured(tiny_spec, text_file, store):
    """As in what was refined before they were: the artefact has no such note. And so for rows that were
    given.
    """
    spec = spec_of(tiny_spec, text_file, steps=2)
    rows = capture(spec.capture, store).all_rows()
    bare = refine(rows, spec, torch.zeros(len(rows), dtype=torch.bool))
    assert math.isnan(bare.seconds)

    def without_note(writer: Writer) -> None:
        writer.save_tensors("R1", {"R1": bare.R})
        writer.save_json("history", bare.history.to_dict("records"))

    store.get_or_make("refine", identity(spec), without_note)
    found = refined(spec, store)
    assert math.isnan(found.seconds) and torch.equal(found.R, bare.R)


# ---- identity


def test_a_start_from_a_file_is_known_by_its_bytes(tiny_spec, text_file, store, tmp_path):
    """The file at the same path with another matrix is another refinement, not the stored one."""
    path = tmp_path / "start.safetensors"
    rotation_files.save(orthogonal(64, seed=0), path, None)
    spec = spec_of(
        tiny_spec, text_file, steps=1, variant="as_paper", init=RotationSpec(kind="file", path=str(path))
    )
    first, first_key = refined(spec, store), identity(spec)
    rotation_files.save(orthogonal(64, seed=1), path, None)
    second = refined(spec, store)
    assert identity(spec) != first_key
    assert rotations.distance(first.R, second.R) > 0.5


def test_another_calibration_text_at_the_same_path_is_another_refinement(tiny_spec, text_file):
    spec = spec_of(tiny_spec, text_file)
    before = identity(spec)
    text_file.write_text("other words\n" + text_file.read_text())
    assert identity(spec) != before


def test_a_turn_however_long_does_not_overflow():
    skew = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    assert descent.turn(torch.eye(2, dtype=torch.float64), skew, 1e200).shape == (2, 2)
