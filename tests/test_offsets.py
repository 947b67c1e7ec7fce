"""Offsets: their closed form against planted rows and the theory of levels; the plane map; the smooth range."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from dfrot_lab.maths import offsets, rotations, theory
from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import RotationSpec

ASYM4, FREE4 = QuantSpec(scheme="asymmetric"), QuantSpec(scheme="free")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows: int, channels: int, seed: int = 0) -> Tensor:
    return rotations.make(RotationSpec(kind="RO", seed=seed), channels)[:rows]


# ---- the closed form


@pytest.mark.parametrize("channels", [1, 2, 64, 576, 4096])
def test_the_expected_highest_is_the_mean_of_drawn_maxima(channels):
    drawn = gaussian(2_000_000 // channels, channels).amax(1)
    spread = float(drawn.std()) / math.sqrt(len(drawn))
    assert offsets.expected_highest(channels) == pytest.approx(float(drawn.mean()), abs=4 * spread)


@pytest.mark.parametrize("channels", [64, 576, 4096])
@pytest.mark.parametrize("offset", [0.0, 0.5, -1.0, 2.0, 3.0, -4.0, 6.0, 10.0])
@pytest.mark.parametrize(
    "quantizer", [ASYM4, FREE4, ASYM4.with_(bits=3), ASYM4.with_(bits=6)], ids=lambda q: q.name
)
def test_the_closed_form_is_within_6_percent_of_planted_rows(channels, offset, quantizer):
    rows = offset * 0.7 + 0.7 * gaussian(200_000 // channels, channels)
    measured = float(squared_error(rows, quantizer).mean())
    assert offsets.expected_error(offset * 0.7, 0.7, channels, quantizer) == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("offset", [0.0, 1.0, 2.5, 4.0, 8.0])
def test_the_closed_form_is_within_6_percent_of_the_theory_of_levels(offset):
    expected = theory.error_of_levels([offset], [576], 1.0, ASYM4)
    assert offsets.expected_error(offset, 1.0, 576) == pytest.approx(expected, rel=0.06)


def test_an_offset_costs_nothing_up_to_its_free_share_and_then_something():
    """Nothing is the same bits, where the range holds 0 in any case; a free range never pays."""
    nu = offsets.expected_highest(576)
    least = offsets.expected_error(0.0, 1.0, 576)
    assert offsets.expected_error(0.999 * nu, 1.0, 576) == pytest.approx(least, rel=1e-6)
    assert offsets.expected_error(1.5 * nu, 1.0, 576) == pytest.approx(least * 1.25**2, rel=0.02)
    assert offsets.expected_error(1.5 * nu, 1.0, 576, FREE4) == pytest.approx(least, rel=1e-6)
    edge = offsets.free_share(576)
    assert edge == pytest.approx(nu**2 / (1 + nu**2)) and 0.9 < edge < 0.92
    assert offsets.free_share(4096) > edge


def test_what_the_offset_takes_is_taken_from_the_error():
    """E = (1 - s) E_0 for rows of one energy, measured."""
    noise = gaussian(400, 576)
    whole = float(squared_error(noise, ASYM4).mean())
    for share in (0.2, 0.5, 0.85):
        rows = math.sqrt(share) + math.sqrt(1 - share) * noise
        assert float(offsets.offset_share(rows).mean()) == pytest.approx(share, abs=0.01)
        assert float(squared_error(rows, ASYM4).mean()) == pytest.approx((1 - share) * whole, rel=0.03)


def test_the_share_of_an_offset():
    rows = torch.tensor([[2.0, 2.0], [1.0, -1.0], [3.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(offsets.offset_share(rows), torch.tensor([1.0, 0.0, 0.8, 0.0]).double())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: offsets.expected_error(0, 0, 8), r"offsets\.sigma must be finite and > 0; got 0"),
        (lambda: offsets.expected_error(math.inf, 1, 8), r"offsets\.offset must be finite; got inf"),
        (lambda: offsets.expected_error(0, 1, 0), r"offsets\.channels must be a whole number >= 1; got 0"),
        (lambda: offsets.expected_error(0, 1, 8, QuantSpec()), r"offsets\.quantizer must be asymmetric or free, .* got sym4"),
        (lambda: offsets.expected_error(0, 1, 8, ASYM4.with_(clip_ratio=0.9)), r"offsets\.quantizer .* got asym4-c0\.9"),
        (lambda: offsets.expected_error(0, 1, 8, ASYM4.with_(bits=16)), r"offsets\.quantizer .* got none"),
        (lambda: offsets.flat_rows(1), r"offsets\.channels must be a whole number >= 2; got 1"),
        (lambda: offsets.plane(torch.ones(2), torch.ones(2), 1.0), r"offsets\.mixture must be in \[0, 1\); got 1"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_the_rule_and_the_value(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# ---- the plane map


@pytest.mark.parametrize("channels", [2, 7, 64, 576])
def test_flat_rows_are_orthonormal_and_flat(channels):
    rows = offsets.flat_rows(channels)
    torch.testing.assert_close(rows @ rows.T, torch.eye(2).double(), rtol=0, atol=1e-14)
    assert float(rows[0].amax() - rows[0].amin()) == 0.0
    spread = rows[1].abs().amax() / rows[1].abs().amin()
    assert float(spread) == pytest.approx(1) if channels % 2 == 0 else float(spread) < 1.5


@given(channels=st.integers(2, 40), count=st.integers(0, 2), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_carried_is_a_rotation_that_takes_rows_to_rows(channels, count, seed):
    before, after = orthonormal(count, channels, seed), orthonormal(count, channels, seed + 1)
    R = offsets.carried(torch.eye(channels, dtype=torch.float64), before, after)
    assert rotations.orthogonality_error(R) < 1e-12
    torch.testing.assert_close(before @ R, after, rtol=0, atol=1e-12)
    x = gaussian(5, channels, seed=seed)
    torch.testing.assert_close(offsets.carried(x, before, after), x @ R, rtol=0, atol=1e-11)
    aside = torch.cat([before, after])
    rest = x - x @ torch.linalg.pinv(aside) @ aside if count else x
    torch.testing.assert_close(offsets.carried(rest, before, after), rest, rtol=0, atol=1e-10)


def test_carrying_rows_to_themselves_changes_nothing_and_nothing_is_changed_in_place():
    x, rows = gaussian(4, 8), orthonormal(2, 8)
    kept = rows.clone()
    torch.testing.assert_close(offsets.carried(x, rows, rows), x, rtol=0, atol=1e-14)
    offsets.carried(x, rows, orthonormal(2, 8, 3))
    assert torch.equal(rows, kept)


def test_a_plane_is_spanned_by_the_mean_and_the_spike():
    mean, spike = gaussian(6), gaussian(6, seed=1)
    unit = [mean / mean.norm(), spike / spike.norm() * torch.sign(mean @ spike)]
    for mixture in (0.0, 0.3, 0.95):
        u, rest = offsets.plane(mean, spike, mixture)
        expected = (1 - mixture) * unit[0] + mixture * unit[1]
        torch.testing.assert_close(u, expected / expected.norm(), rtol=0, atol=1e-12)
        assert abs(float(u @ rest)) < 1e-12 and float(rest.norm()) == pytest.approx(1)
        assert torch.linalg.matrix_rank(torch.stack([u, rest, mean, spike]), rtol=1e-9) == 2
        torch.testing.assert_close(
            offsets.plane(mean, -7 * spike, mixture), torch.stack([u, rest]), rtol=0, atol=1e-12
        )


def test_a_plane_of_what_is_not_there():
    mean, none = gaussian(6), torch.zeros(6)
    unit = (mean / mean.norm())[None]
    torch.testing.assert_close(offsets.plane(mean, none, 0.5), unit)
    torch.testing.assert_close(offsets.plane(none, mean, 0.5), unit)
    torch.testing.assert_close(offsets.plane(mean, -3 * mean, 0.5), unit)
    assert offsets.plane(none, none, 0.5).shape == (0, 6)


# ---- the smooth range


def test_the_spread_and_its_slope_are_those_of_autograd():
    rows, weights = gaussian(5, 12).requires_grad_(), torch.arange(5, dtype=torch.float64)
    centred = rows - rows.mean(1, keepdim=True)
    expected = (weights * torch.linalg.vector_norm(centred, 8, dim=1).square()).sum()
    found, slope = offsets.spread(rows.detach(), weights)
    assert found == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(slope, torch.autograd.grad(expected, rows)[0], rtol=1e-10, atol=1e-12)


def test_an_offset_adds_nothing_to_the_spread_and_rows_without_one_are_no_trouble():
    rows, weights = gaussian(3, 16), torch.ones(3)
    assert offsets.spread(rows + 5, weights)[0] == pytest.approx(offsets.spread(rows, weights)[0])
    value, slope = offsets.spread(torch.full((2, 16), 3.0), torch.ones(2))
    assert value < 1e-6 and bool((slope == 0).all())
