"""The theory of spikes and noise: its identities to the digit, its predictions against planted tokens, what
it refuses.
"""

import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from dfrot_lab.maths import rotations, theory
from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.maths.theory import PREDICT, error_of_levels, expected_largest, unit_rms
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import RotationSpec
from dfrot_lab.show import figures

error_no_rotation, error_ro, error_rh = PREDICT.values()
SYM4, ASYM4 = QuantSpec(), QuantSpec(scheme="asymmetric")
EVERY_BITS = [
    QuantSpec(bits=bits, scheme="symmetric" if symmetric else "asymmetric")
    for bits in (2, 3, 4, 6, 8)
    for symmetric in (True, False)
]
by_name = {"ids": lambda value: value.name if isinstance(value, QuantSpec) else None}
INF = math.inf


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spikes_everywhere(channels: int, m: float = 1.0) -> torch.Tensor:
    return m * torch.eye(channels, dtype=torch.float64)


# ---- the largest of many


@pytest.mark.parametrize(
    ("channels", "value"),
    [(1, math.sqrt(2 / math.pi)), (2, 2 / math.sqrt(math.pi)), (576, 3.28198), (4096, 3.80230)],
)
def test_expected_largest_has_its_known_values(channels: int, value: float):
    assert expected_largest(channels) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("channels", [8, 64, 576])
def test_expected_largest_agrees_with_draws_and_stays_below_the_textbook(channels: int):
    drawn = torch.randn(4000, channels, generator=generator()).abs().amax(1)
    assert expected_largest(channels) == pytest.approx(
        float(drawn.mean()), abs=4 * float(drawn.std()) / 4000**0.5
    )
    assert expected_largest(channels) < math.sqrt(2 * math.log(channels)) or channels < 64


# ---- the rounding error of one Gaussian number


@pytest.mark.parametrize("level", [0.0, 0.2, -0.5, 3.4])
@pytest.mark.parametrize("sd", [0.01, 0.1, 0.4, 0.99])
def test_rounding_error_agrees_with_its_integral(level: float, sd: float):
    y = np.linspace(level - 9 * sd, level + 9 * sd, 200_001)
    density = np.exp(-(((y - level) / sd) ** 2) / 2) / (sd * math.sqrt(2 * math.pi))
    found = theory.rounding_error(np.array([level]), np.array([sd]))[0]
    assert found == pytest.approx(float(((y - np.round(y)) ** 2 * density).sum() * (y[1] - y[0])), rel=1e-4)


def test_rounding_error_has_its_limits():
    levels = np.array([0.0, 0.3, 2.3, 0.5])
    np.testing.assert_allclose(theory.rounding_error(levels, np.zeros(4)), [0, 0.09, 0.09, 0.25], atol=1e-15)
    np.testing.assert_allclose(theory.rounding_error(levels, np.full(4, 0.999999)), 1 / 12, atol=1e-8)
    np.testing.assert_allclose(theory.rounding_error(levels, np.full(4, 5.0)), 1 / 12, rtol=1e-15)


# ---- identities


@pytest.mark.parametrize("channels", [64, 576])
@pytest.mark.parametrize("seed", range(3))
def test_a_spike_alone_is_lost_under_no_hadamard_when_symmetric(channels: int, seed: int):
    x = spikes_everywhere(channels, m=channels**0.5) @ rotations.make(
        RotationSpec(kind="RH", seed=seed), channels
    )
    for quantizer in (QuantSpec(bits=2), SYM4, QuantSpec(bits=8)):
        assert float(squared_error(x, quantizer).max()) < 1e-24
        assert error_rh(channels**0.5, 0, channels, quantizer) < 1e-24
        assert error_no_rotation(channels**0.5, 0, channels, quantizer) < 1e-24


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_asymmetric_grid_misses_the_two_levels_of_a_spike_by_half_a_step(bits: int):
    quantizer, channels = QuantSpec(bits=bits, scheme="asymmetric"), 576
    error = squared_error(
        spikes_everywhere(channels) @ rotations.make(RotationSpec(kind="RH"), channels), quantizer
    )
    two_levels = error[error > 1e-20]
    assert len(two_levels) >= channels - 1, "all but the channel of a constant Hadamard row"
    assert error_rh(1, 0, channels, quantizer) == pytest.approx(1 / (2**bits - 1) ** 2, rel=1e-9)
    assert float(two_levels.min()) == pytest.approx(error_rh(1, 0, channels, quantizer), rel=1e-9)
    assert float(two_levels.max()) == pytest.approx(error_rh(1, 0, channels, quantizer), rel=1e-9)


@pytest.mark.parametrize("ratio", [0.0, 0.05, 1 / 13, 0.12, 1 / 6, 0.3, 0.4, 0.77, 1.0])
@pytest.mark.parametrize("channels", [64, 576])
def test_two_spikes_without_noise_are_predicted_to_the_digit(ratio: float, channels: int):
    table = theory.measure([channels], [INF], ratios=[ratio], kinds=["RH", "NR"], seeds=range(2), tokens=10)
    np.testing.assert_allclose(table["predicted"], table["measured"], rtol=1e-9, atol=1e-20)


@pytest.mark.parametrize("k", range(7))
def test_two_spikes_are_on_the_grid_at_seven_ratios_and_nowhere_between(k: int):
    assert error_rh(1, 0, 64, SYM4, [(7 - k) / (7 + k)]) < 1e-25
    assert error_rh(1, 0, 64, SYM4, [(7 - k - 0.5) / (7 + k + 0.5)]) > 1e-4


def test_noise_below_half_a_step_is_lost_whole_without_rotation():
    assert error_no_rotation(24, 0.1, 576) == pytest.approx(575 * 0.1**2, rel=1e-12)
    assert error_no_rotation(24, 0.1, 576, ASYM4) == pytest.approx(575 * 0.1**2 + (0.1 * 3.07) ** 2, rel=0.02)


@pytest.mark.parametrize("quantizer", EVERY_BITS, **by_name)
def test_ro_sees_the_length_and_nothing_else(quantizer: QuantSpec):
    same = [
        error_ro(24, 0, 576, quantizer),
        error_ro(0, 1, 576, quantizer),
        error_ro(12, 0.75**0.5, 576, quantizer),
    ]
    same.append(error_ro(12, 0, 576, quantizer, [12, 12, 12]))
    assert same == pytest.approx([same[0]] * 4, rel=1e-9)


def test_a_clean_spike_loses_more_under_rh_than_without_rotation():
    """C sigma^2 (1 + E max^2): the largest noise entry takes the last code, and every level is off by as
    much.
    """
    largest = torch.randn(20_000, 576, generator=generator()).amax(1)
    ratio = error_rh(24, 1e-3, 576) / error_no_rotation(24, 1e-3, 576)
    assert ratio == pytest.approx(1 + float(largest.square().mean()), rel=0.01)


@pytest.mark.parametrize("quantizer", EVERY_BITS, **by_name)
@pytest.mark.parametrize("predict", [error_no_rotation, error_ro, error_rh])
def test_predictions_are_scale_equivariant(predict, quantizer: QuantSpec):
    once = predict(12.0, 0.3, 128, quantizer, [4.0, 1.0])
    for factor in (1e-6, 3.0, 1e6):
        assert predict(12 * factor, 0.3 * factor, 128, quantizer, [4 * factor, factor]) == pytest.approx(
            factor**2 * once, rel=1e-6
        )


@pytest.mark.parametrize("predict", [error_no_rotation, error_ro, error_rh])
def test_a_spike_of_no_height_changes_nothing(predict):
    assert predict(12, 0.3, 128, SYM4, [0.0]) == pytest.approx(predict(12, 0.3, 128), rel=1e-3)
    assert predict(0, 0, 128) == 0


def test_a_rows_levels_may_be_given_in_any_order():
    levels, counts = [3.0, -1.0, 0.5], [1.0, 30.0, 33.0]
    for quantizer in (SYM4, ASYM4):
        found = [
            error_of_levels([levels[i] for i in p], [counts[i] for i in p], 0.2, quantizer)
            for p in ((0, 1, 2), (2, 0, 1), (1, 2, 0))
        ]
        assert found == pytest.approx([found[0]] * 3, rel=1e-12)


# ---- monotone


@pytest.mark.parametrize("kind", theory.PREDICT)
@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_lose_less(kind: str, symmetric: bool):
    """Without rotation no bit helps while the noise stays below half a step: equal, up to rounding."""
    m, sigma = unit_rms(5, 256)
    errors = [
        theory.PREDICT[kind](
            m, sigma, 256, QuantSpec(bits=bits, scheme="symmetric" if symmetric else "asymmetric")
        )
        for bits in range(2, 9)
    ]
    assert all(less < more * (1 + 1e-9) for more, less in itertools.pairwise(errors))
    assert errors[-1] < errors[0] / 10


def test_ro_loses_a_larger_share_of_wider_rows_and_a_cleaner_spike_less_without_rotation():
    ro = [error_ro(0, 1, channels) / channels for channels in (64, 256, 1024, 4096)]
    nr = [error_no_rotation(*unit_rms(snr, 576), 576) for snr in (1, 2, 5, 10, 100, 1000)]
    assert ro == sorted(ro)
    assert nr == sorted(nr, reverse=True)


def test_rh_does_not_gain_from_every_cleaning_of_the_spike():
    """Between snr 22 and 40 the levels go from one code to half way to the next: the error rises."""
    error = [error_rh(*unit_rms(snr, 576), 576) for snr in (5, 22, 42, 400)]
    assert error[0] > error[1] < error[2] > error[3]


# ---- against planted tokens


@pytest.mark.parametrize("quantizer", EVERY_BITS, **by_name)
@pytest.mark.parametrize("kind", theory.PREDICT)
def test_predictions_agree_with_planted_tokens(kind: str, quantizer: QuantSpec):
    """Within 3% over 4 draws of matrix and tokens; the draws themselves scatter by 1% (RO)."""
    table = theory.measure([256], [2, 8, 40], [quantizer], kinds=[kind], seeds=range(4), tokens=100)
    mean = table.groupby("snr")[["predicted", "measured"]].mean()
    np.testing.assert_allclose(mean["predicted"], mean["measured"], rtol=0.03)


@pytest.mark.parametrize("snr", [3, 15])
def test_predictions_agree_with_planted_tokens_of_two_spikes(snr: float):
    table = theory.measure([256], [snr], [SYM4, ASYM4], ratios=[0.1, 0.9], seeds=range(3), tokens=100)
    mean = table.groupby(["rotation", "ratio", "quantizer"])[["predicted", "measured"]].mean()
    np.testing.assert_allclose(mean["predicted"], mean["measured"], rtol=0.05)


def test_the_order_of_the_paper_holds_inside_the_window_and_not_outside():
    low, high = theory.paper_window(576)
    assert (low, high) == pytest.approx((7.3, 22.8), rel=0.01)
    order = {}
    for snr in (0.85 * low, 1.15 * low, 0.9 * high, 1.15 * high):
        error = theory.measure([576], [snr], seeds=range(3), tokens=60).groupby("rotation")["measured"].mean()
        order[snr] = list(error.sort_values(ascending=False).index)
    assert list(order.values()) == [
        ["NR", "RO", "RH"],
        ["RO", "NR", "RH"],
        ["RO", "NR", "RH"],
        ["RO", "RH", "NR"],
    ]


def test_the_rule_of_thumb_is_right_from_3_bits_on_and_not_at_2():
    ratio = {
        bits: theory.uniform_error(expected_largest(576), 576, q) / error_ro(0, 1, 576, q)
        for bits in range(2, 9)
        for q in [QuantSpec(bits=bits)]
    }
    assert ratio.pop(2) > 1.2
    assert list(ratio.values()) == pytest.approx([0.98] * 6, abs=0.02)
    assert theory.uniform_error(7, 12, SYM4) == pytest.approx(1)
    assert theory.uniform_error(7.5, 12, ASYM4) == pytest.approx(1)


# ---- tokens, planted and real


def test_planted_tokens_are_what_was_asked_for_and_repeat():
    x = theory.planted(20, 0.5, 128, 400, generator(1), [6.0])
    assert x.shape == (400, 128)
    assert x.dtype == torch.float64
    found = theory.estimate(x)
    assert found["m"].mean() == pytest.approx(20, abs=0.2)
    assert found["second"].mean() == pytest.approx(6, abs=0.2)
    assert found["channel"].nunique() > 100
    assert torch.equal(x, theory.planted(20, 0.5, 128, 400, generator(1), [6.0]))
    assert theory.estimate(theory.planted(3, 0, 8, 50, generator()))["sigma"].max() == 0


def test_unit_rms_has_its_snr_and_mean_square_one():
    for snr, ratio in ((0.0, 0.0), (3.0, 0.0), (3.0, 0.5), (INF, 1.0)):
        m, sigma = unit_rms(snr, 100, ratio)
        assert (m**2 * (1 + ratio**2)) / 100 + sigma**2 == pytest.approx(1)
        assert math.hypot(m, ratio * m) == pytest.approx(snr * sigma * 10 if snr < INF else 10)


def test_estimate_gives_back_spike_and_noise():
    found = theory.estimate(theory.planted(10, 0.2, 256, 300, generator()))
    assert list(found.columns) == ["channel", "m", "second", "sigma", "snr", "tail"]
    assert (found["m"].mean(), found["sigma"].mean()) == pytest.approx((10, 0.2), rel=0.01)
    assert found["snr"].mean() == pytest.approx(10 / (0.2 * 16), rel=0.01)
    assert found["tail"].mean() == pytest.approx(3, abs=0.1)


def test_predict_takes_the_largest_entries_as_spikes():
    x = theory.planted(20, 0.1, 64, 3, generator(), [5.0, 2.0])
    table = theory.predict(x, spikes=3)
    largest = x[1].abs().sort(descending=True).values
    m, sigma, others = float(largest[0]), float(largest[3:].square().mean() ** 0.5), largest[1:3].tolist()
    assert list(table.columns) == ["NR", "RO", "RH"]
    assert table.loc[1].tolist() == pytest.approx(
        [error(m, sigma, 64, SYM4, others) for error in theory.PREDICT.values()]
    )
    np.testing.assert_allclose(table["NR"], squared_error(x, SYM4).numpy(), rtol=0.2)


def test_measure_is_tidy_and_repeats():
    table = theory.measure(
        [64, 128], [2, INF], [SYM4, ASYM4], ratios=[0, 0.5], kinds=["RH"], seeds=[0, 3], tokens=4
    )
    assert len(table) == 2 * 2 * 2 * 2 * 2
    assert list(table.columns) == [
        "channels",
        "rotation",
        "snr",
        "ratio",
        "quantizer",
        "bits",
        "predicted",
        "seed",
        "measured",
    ]
    pd.testing.assert_frame_equal(
        table,
        theory.measure(
            [64, 128], [2, INF], [SYM4, ASYM4], ratios=[0, 0.5], kinds=["RH"], seeds=[0, 3], tokens=4
        ),
    )
    assert table.drop(columns=["seed", "measured", "predicted"]).drop_duplicates().shape[0] == 16


# ---- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: error_rh(-1, 1, 64), r"theory\.m must be finite and >= 0; got -1"),
        (lambda: error_ro(1, math.nan, 64), r"theory\.sigma must be finite and >= 0; got nan"),
        (
            lambda: error_no_rotation(1, 1, 1),
            r"theory\.channels must be a whole number >= 2 with 1 spikes; got 1",
        ),
        (
            lambda: error_rh(1, 1, 4, SYM4, [0.1, 0.1]),
            r"theory\.channels must be a whole number >= 8 with 3 spikes; got 4",
        ),
        (lambda: error_rh(1, 1, 64, SYM4, [2]), r"theory\.others must be in 0\.\.m = 1; got 2"),
        (
            lambda: error_ro(1, 1, 64, QuantSpec(clip_ratio=0.9)),
            r"theory\.quantizer must be .*per_token, with clip_ratio 1 .*; got .*clip_ratio=0\.9",
        ),
        (
            lambda: error_ro(1, 1, 64, QuantSpec(bits=16)),
            r"theory\.quantizer must be .* fewer than 16 bits; got .*bits=16",
        ),
        (
            lambda: error_ro(1, 1, 64, QuantSpec(scheme="free")),
            r"theory\.quantizer must be symmetric or asymmetric.*; got .*free",
        ),
        (
            lambda: error_ro(1, 1, 64, QuantSpec(granularity="per_tensor")),
            r"theory\.quantizer must be .*per_token.*; got .*per_tensor",
        ),
        (
            lambda: error_of_levels([1.0], [1, 2], 1),
            r"theory\.counts must be one for each of the 1 levels; got 2",
        ),
        (lambda: error_of_levels([1.0], [2], -1), r"theory\.sd must be finite and >= 0; got -1"),
        (lambda: expected_largest(0), r"theory\.channels must be a whole number >= 1; got 0"),
        (lambda: theory.uniform_error(1, 1), r"theory\.channels must be a whole number >= 2; got 1"),
        (lambda: unit_rms(-1, 64), r"theory\.snr must be >= 0; got -1"),
        (lambda: unit_rms(1, 64, 2), r"theory\.ratio must be in 0\.\.1; got 2"),
        (
            lambda: theory.planted(1, 1, 64, 0, generator()),
            r"theory\.tokens must be a whole number >= 1; got 0",
        ),
        (
            lambda: theory.curve([64], [1], kinds=["DFRot"]),
            r"theory\.kinds must be among \('NR', 'RO', 'RH'\); got 'DFRot'",
        ),
        (
            lambda: theory.estimate(torch.ones(5)),
            r"theory\.x must be finite, \(tokens, channels >= 3\); got shape \(5,\)",
        ),
        (
            lambda: theory.predict(torch.ones(1, 8), spikes=4),
            r"theory\.spikes must be a whole number in 1\.\.log2\(channels\); got 4",
        ),
        (
            lambda: theory.paper_window(64, QuantSpec(bits=12)),
            r"theory\.channels must let E\(NR\) fall below E\(RO\) .*; got 64 at sym12",
        ),
    ],
)
def test_bad_input_is_refused_by_name_rule_and_value(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


# ---- figures


def test_prediction_figure_draws_the_table(recwarn):
    curve = theory.curve([64], [1, 2, 4, 8])
    table = pd.concat([curve, theory.measure([64], [2, 8], tokens=4)])
    ax = figures.plot_prediction(table, "snr")
    assert ax.get_legend_handles_labels()[1] == ["NR", "RO", "RH"]
    ro = curve[curve["rotation"] == "RO"]["predicted"] / 64
    np.testing.assert_allclose(ax.lines[1].get_ydata(), ro)
    measured = table[table["measured"].notna()]
    np.testing.assert_allclose(
        sorted(ax.collections[0].get_offsets()[:, 1].compressed()),
        sorted(measured.groupby(["rotation", "snr"])["measured"].mean() / 64),
    )
    assert ax.get_xticks().tolist() == [2, 8]
    assert not recwarn
    plt.close(ax.figure)
