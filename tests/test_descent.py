"""The steps of the accelerated refinement: each against what it approximates."""

import pytest
import torch
from torch import Tensor

from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import fake_quantize
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import RotationSpec
from dfrot_lab.rotate import descent
from dfrot_lab.rotate.steps import polar

FINE = QuantSpec(bits=8, scheme="asymmetric")
"""Errors so small that a first-order step is nearly the whole step."""


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def everything(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(len(x)), weights[:, None]


def problem(tokens: int = 500, channels: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    x = gaussian(tokens, channels) * torch.linspace(0.5, 2, channels, dtype=torch.float64)
    return (
        x,
        torch.where(torch.arange(tokens) < 5, 100.0, 1.0).double(),
        rotations.make(RotationSpec(kind="RO"), channels),
    )


def test_a_move_is_a_procrustes_step_to_first_order():
    x, weights, R = problem()
    metric = descent.metric(x, weights)
    exact = polar((x * weights[:, None]).T @ fake_quantize(x @ R, FINE))
    move = descent.move(x, *everything(x, weights), metric, metric.into(R), FINE)
    found = metric.V @ descent.turn(metric.into(R), move, 1.0)
    assert rotations.distance(exact, R) > 1e-4, "nothing to do: the test is vacuous"
    assert rotations.distance(found, exact) < 0.1 * rotations.distance(
        exact, R
    )  # the metric is damped a little


def test_a_move_is_the_same_whichever_side_is_turned_into_the_frame():
    x, weights, R = problem(tokens=40)
    metric = descent.metric(x, weights)
    index, column = everything(x, weights)
    many = descent.move(x, index, column, metric, metric.into(R), FINE)
    few = sum(
        descent.move(x, index[part], column[part], metric, metric.into(R), FINE) for part in index.split(20)
    )
    torch.testing.assert_close(few, many, rtol=0, atol=1e-12)
    assert torch.equal(many, -many.T)


@pytest.mark.parametrize("angle", [0.01, 0.3, 1.0, 3.0])
def test_a_turn_is_the_matrix_exponential(angle):
    skew = gaussian(12, 12)
    skew = skew - skew.T
    skew *= angle / float(torch.linalg.matrix_norm(skew, 2))
    R = rotations.make(RotationSpec(kind="RO"), 12)
    found = descent.turn(R, skew, 0.5)
    assert (
        float(torch.linalg.matrix_norm(found - torch.linalg.matrix_exp(-0.5 * skew) @ R, 2))
        < 4 * descent.TURN_ERROR
    )
    singular = torch.linalg.svdvals(found)
    assert float((singular - 1).abs().max()) < 4 * descent.TURN_ERROR


@pytest.mark.parametrize("spread", [(0.9, 1.1), (0.3, 1.5), (0.5, 20.0)])
def test_orthonormal_is_the_polar_factor_without_an_svd(spread):
    u, v = rotations.make(RotationSpec(kind="RO"), 16), rotations.make(RotationSpec(kind="RO", seed=1), 16)
    found = descent.orthonormal(u @ torch.diag(torch.linspace(*spread, 16, dtype=torch.float64)) @ v)
    torch.testing.assert_close(found, u @ v, rtol=0, atol=1e-6)
    assert rotations.orthogonality_error(found) < 1e-6


def test_orthonormal_of_what_is_not_finite_ends():
    assert not descent.orthonormal(torch.full((4, 4), torch.nan)).isfinite().any()


@pytest.mark.parametrize(("tokens", "massive"), [(20_000, 40), (900, 3), (10, 10), (10, 0)])
def test_parts_hold_all_massive_rows_and_every_other_row_once(tokens, massive):
    mask = torch.arange(tokens) < massive
    weights = torch.where(mask, 1e4, 1.0)
    found = descent.parts(mask, weights)
    others = torch.cat([index[massive:] for index, _ in found])
    assert sorted(others.tolist()) == list(range(massive, tokens))
    for index, weight in found:
        assert index[:massive].tolist() == list(range(massive))
        assert float(weight[:massive].sum()) == 1e4 * massive
        if len(index) > massive:
            assert float(weight[massive:].sum()) == pytest.approx(tokens - massive)
