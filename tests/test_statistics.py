"""What a few builds tell: intervals against scipy and by hand, and, with windows, seeds and jitters whose part
in the variance is known, how often an interval holds the truth and a verdict is false, or missed.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from dfrot_lab.maths.statistics import LEVEL, POWER, Estimate, builds_for, estimate, jackknife
from dfrot_lab.model.corpus import places

TIMES, WINDOWS = 4000, 3  # simulated comparisons of each kind; windows of a build
Draw = Callable[..., np.ndarray]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---- one estimate
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builds", [2, 3, 6, 24])
def test_an_interval_is_the_t_interval_of_the_builds(builds):
    values = rng(builds).normal(0.3, 2.0, builds)
    found = estimate(values)
    error = stats.sem(values)
    assert (found.builds, found.df) == (builds, builds - 1)
    assert (found.mean, found.error) == pytest.approx((values.mean(), error))
    assert found.ci95 == pytest.approx(stats.t.interval(0.95, builds - 1, values.mean(), error))


def test_an_interval_is_what_a_table_of_t_says():
    """Of 1, 2 and 3: mean 2, standard error 1 / sqrt(3), and t(0.975, 2) = 4.303."""
    found = estimate([1, 2, 3])
    assert (found.mean, found.error) == pytest.approx((2, 0.57735), rel=1e-5)
    assert found.ci95 == pytest.approx((-0.4841, 4.4841), abs=1e-4)
    assert found.smallest == pytest.approx((4.30265 + 1.06066) * 0.57735, rel=1e-4)


def test_one_build_has_a_value_and_nothing_to_tell_from():
    found = estimate([1.5])
    assert (found.mean, found.builds, found.df, found.verdict) == (1.5, 1, 0, "cannot tell")
    assert all(map(math.isnan, (found.error, *found.ci95, found.smallest)))


@pytest.mark.parametrize("values", [[], 1.0, [[1.0, 2.0]]], ids=["none", "a number", "a table"])
def test_what_is_no_value_a_build_is_refused(values):
    rule = r"estimate\.values must be \(builds,\), at least one; got shape \("
    with pytest.raises(ValueError, match=rule):
        estimate(values)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([-1.0, -1.1, -0.9], "better"),
        ([1.0, 1.1, 0.9], "worse"),
        ([-1.0, 1.1, 0.1], "cannot tell"),
        ([1.0, 3.0], "cannot tell"),  # 12.7 errors wide
        ([0.0, 0.0], "cannot tell"),  # the very same model
        ([-1.0, -1.0], "better"),
        ([math.nan, 1.0], "cannot tell"),
    ],
)
def test_less_is_better_and_an_interval_with_0_in_it_tells_nothing(values, verdict):
    assert estimate(values).verdict == verdict


def test_turned_round_a_comparison_says_the_opposite():
    values, opposite = rng().normal(0.4, 1, (500, 6)), {"better": "worse", "worse": "better"}
    found = [estimate(each).verdict for each in values]
    turned = [estimate(-each).verdict for each in values]
    assert turned == [opposite.get(verdict, verdict) for verdict in found]
    assert {*found} == {"worse", "better", "cannot tell"}


def test_the_smallest_is_in_the_unit_of_the_values_and_shrinks_with_builds():
    values = rng().normal(0, 1, 6)
    assert estimate(10 * values).smallest == pytest.approx(10 * estimate(values).smallest)
    assert estimate(values + 7).smallest == pytest.approx(estimate(values).smallest)
    smallest = [Estimate(0, 1 / math.sqrt(builds), builds).smallest for builds in (2, 3, 6, 24, 1000)]
    assert smallest == sorted(smallest, reverse=True)
    assert smallest[-1] * math.sqrt(1000) == pytest.approx(1.960 + 0.842, rel=2e-3)  # the normal's


# ---- the jackknife, and how many builds
# ------------------------------------------------------------------------------------------------------------


def test_the_jackknife_of_a_mean_is_its_estimate():
    values = rng().normal(3, 1, (1, 7))
    found, plain = jackknife(values, lambda mean: mean), estimate(values[0])
    assert (found.mean, found.error, found.builds) == pytest.approx((plain.mean, plain.error, plain.builds))


def test_the_jackknife_of_a_ratio_is_a_plain_loop_s():
    """By Tukey's pseudo-values: their standard error."""
    parts = rng(1).normal([[5], [3]], 0.5, (2, 9))
    pseudo = []
    for left in range(9):
        others = [[x for b, x in enumerate(part) if b != left] for part in parts]
        ratio = sum(others[0]) / sum(others[1])
        pseudo.append(9 * sum(parts[0]) / sum(parts[1]) - 8 * ratio)
    found = jackknife(parts, lambda a, b: a / b)
    assert found.mean == pytest.approx(parts[0].mean() / parts[1].mean())
    assert found.error == pytest.approx(stats.sem(pseudo))
    assert found.builds == 9


def test_the_jackknife_of_one_build_has_no_interval():
    found = jackknife(np.array([[6.0], [3.0]]), lambda a, b: a / b)
    assert (found.mean, found.builds, found.verdict) == (2, 1, "cannot tell")
    assert math.isnan(found.error)


@pytest.mark.parametrize("wanted", [9.0, 1.0, 0.5, 0.2])
def test_builds_for_an_interval_are_the_first_number_that_has_it(wanted):
    halves = {n: np.diff(stats.t.interval(0.95, n - 1, scale=1 / math.sqrt(n)))[0] / 2 for n in range(2, 150)}
    first = next(n for n, half in halves.items() if half <= wanted)
    assert builds_for(1, wanted) == builds_for(10, 10 * wanted) == first


def test_builds_for_less_than_can_be_had_are_the_most():
    assert builds_for(1, 1e-6, most=50) == 50
    assert builds_for(0, 1e-6) == 2


# ---- simulations: what is told of many comparisons, the truth of which is known
# ------------------------------------------------------------------------------------------------------------


def told(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`estimate` of each row of (comparisons, builds), all at once: means, lower and upper ends."""
    builds = values.shape[1]
    half = Estimate(0, 1, builds).ci95[1] * values.std(1, ddof=1) / math.sqrt(builds)
    return values.mean(1), values.mean(1) - half, values.mean(1) + half


def covered(values: np.ndarray, truth: float | np.ndarray = 0.0) -> float:
    """How often the interval of a row of (comparisons, builds) holds the truth."""
    _, low, high = told(values)
    return float(((low <= truth) & (truth <= high)).mean())


def normal(source: np.random.Generator, *shape: int) -> np.ndarray:
    return source.normal(size=shape)


def lognormal(sigma: float) -> Draw:
    """Skewed to the right, of mean 0 and variance 1: by 1.75 with a sigma of 0.5, by 6.2 with 1."""

    def draw(source: np.random.Generator, *shape: int) -> np.ndarray:
        mean, variance = math.exp(sigma**2 / 2), (math.exp(sigma**2) - 1) * math.exp(sigma**2)
        return (source.lognormal(sigma=sigma, size=shape) - mean) / math.sqrt(variance)

    return draw


def comparisons(builds: int, parts: tuple[float, float, float], draw: Draw = normal) -> np.ndarray:
    """Differences between two rows whose truth is 0, (TIMES, builds): `parts` are the standard deviations of a
    window, drawn by `draw`, of a seed and of a jitter. A build has windows, seed and jitter of its own."""
    window, seed, jitter = parts
    source = rng(builds)
    windows = draw(source, TIMES, builds, WINDOWS).mean(2)
    seeds, jitters = normal(source, 2, TIMES, builds)
    return window * windows + seed * seeds + jitter * jitters


MIXTURES = {
    "windows alone": (1.0, 0.0, 0.0),
    "seeds alone": (0.0, 1.0, 0.0),
    "jitters alone": (0.0, 0.0, 1.0),
    "mostly windows": (1.0, 0.3, 0.1),
    "mostly seeds": (0.5, 1.0, 0.3),
    "all alike": (math.sqrt(WINDOWS), 1.0, 1.0),
}
mixtures = pytest.mark.parametrize("parts", MIXTURES.values(), ids=MIXTURES)
many_builds = pytest.mark.parametrize("builds", [3, 4, 6, 12, 24])


def test_the_simulations_tell_what_estimate_tells():
    values = comparisons(6, MIXTURES["all alike"])[:50]
    found = [estimate(each) for each in values]
    assert np.allclose(np.array(told(values)).T, [(each.mean, *each.ci95) for each in found])


@many_builds
@mixtures
def test_intervals_hold_the_truth_19_times_of_20(builds, parts):
    assert 0.93 <= covered(comparisons(builds, parts)) <= 0.97
    assert 0.93 <= covered(comparisons(builds, parts) + 3, 3) <= 0.97


@many_builds
@pytest.mark.parametrize(
    ("sigma", "parts"),
    [(0.5, MIXTURES["windows alone"]), (0.5, MIXTURES["mostly windows"]), (1, MIXTURES["all alike"])],
    ids=["windows alone", "mostly windows", "very skewed"],
)
def test_intervals_hold_the_truth_where_windows_are_skewed(builds, sigma, parts):
    assert 0.93 <= covered(comparisons(builds, parts, lognormal(sigma))) <= 0.97


@pytest.mark.parametrize("count", [4, 5, 7, 148])
@pytest.mark.parametrize("builds", [3, 6, 24])
def test_intervals_hold_a_text_s_own_mean_once_its_windows_are_used_up(builds, count):
    """Builds then share windows. What is left of the text is little or nothing: intervals are too wide."""
    source, at = rng(count), np.array([places(count, WINDOWS, build) for build in range(builds)])
    assert (len(np.unique(at)) < at.size) == (count < builds * WINDOWS)
    text = normal(source, TIMES, count)
    values = text[:, at].mean(2) + 0.3 * normal(source, TIMES, builds)
    assert covered(values, text.mean(1)) >= 0.93


@many_builds
@mixtures
def test_a_verdict_on_nothing_is_false_at_most_once_in_20(builds, parts):
    """As often `better` as `worse`; to chance three standard deviations of TIMES comparisons."""
    _, low, high = told(comparisons(builds, parts))
    chance = 3 * math.sqrt((1 - LEVEL) * LEVEL / TIMES)
    assert np.mean(high < 0) + np.mean(low > 0) <= 1 - LEVEL + chance
    assert min(np.mean(high < 0), np.mean(low > 0)) >= (1 - LEVEL) / 2 - chance


@many_builds
@mixtures
def test_a_difference_of_the_smallest_size_is_found_four_times_of_five(builds, parts):
    """With few builds a little less often: 77% of 3, 79% of 6 by the noncentral t distribution."""
    window, seed, jitter = parts
    error = math.sqrt((window**2 / WINDOWS + seed**2 + jitter**2) / builds)
    smallest = Estimate(0, error, builds).smallest
    _, low, high = told(comparisons(builds, parts) + smallest)
    exact = stats.nct.sf(stats.t.ppf(0.975, builds - 1), builds - 1, smallest / error)
    assert exact == pytest.approx(POWER, abs=0.04)
    assert np.mean(low > 0) == pytest.approx(exact, abs=0.025)
    assert np.mean(high < 0) < 0.001


def test_an_interval_over_the_windows_of_one_build_holds_too_little():
    """The fault that builds mend: 18 windows of one seed and jitter do not know that there are others."""
    source = rng(9)
    values = 0.3 * normal(source, TIMES, 18) + normal(source, TIMES, 1)
    assert covered(values) < 0.2
