"""How fine the instrument is: planted deviations come back, the cheapest design is the cheapest."""

import math

import numpy as np
import pytest

from dfrot_lab.maths import statistics
from dfrot_lab.study import measuring


@pytest.mark.parametrize("between, within", [(0.05, 0.02), (0.01, 0.06), (0.0, 0.03)])
def test_planted_deviations_come_back(between, within):
    rng = np.random.default_rng(0)
    values = 0.3 + between * rng.standard_normal((4000, 1)) + within * rng.standard_normal((4000, 3))
    found = measuring.deviations(values)
    assert found[0] ** 2 == pytest.approx(between**2, abs=1e-4)
    assert found[1] == pytest.approx(within, rel=0.03)


def test_deviations_are_those_of_a_plain_loop():
    values = np.array([[1.0, 2.0, 4.0], [0.0, 1.0, 5.0], [9.0, 8.0, 7.0]])
    within = np.mean([row.var(ddof=1) for row in values])
    between = np.var([row.mean() for row in values], ddof=1) - within / 3
    assert measuring.deviations(values) == pytest.approx((math.sqrt(between), math.sqrt(within)))


def test_of_one_window_or_one_build_no_deviation_is_said():
    between, within = measuring.deviations(np.array([[1.0], [2.0], [4.0]]))
    assert between == pytest.approx(np.std([1, 2, 4], ddof=1)) and math.isnan(within)
    between, within = measuring.deviations(np.array([[1.0, 2.0, 4.0]]))
    assert math.isnan(between) and within == pytest.approx(np.std([1, 2, 4], ddof=1))


def test_windows_that_differ_more_than_builds_leave_no_deviation_between_builds():
    assert measuring.deviations(np.array([[0.0, 2.0], [2.0, 0.0], [0.0, 2.0]]))[0] == 0


@pytest.mark.parametrize("build, window", [(0.0, 10.0), (100.0, 1.0), (50.0, 15.0)])
def test_the_cheapest_design_resolves_what_is_asked_and_no_other_is_cheaper(build, window):
    between, within, half = 0.02, 0.03, 0.01
    found = measuring.cheapest(between, within, half, build, window)
    minutes = {}
    for windows in range(1, measuring.MOST_WINDOWS + 1):
        deviation = math.sqrt(between**2 + within**2 / windows)
        builds = statistics.builds_for(deviation, half)
        minutes[builds, windows] = builds * (build + windows * window) / 60
    assert found["minutes on 2 cores"] == min(minutes.values())
    assert minutes[found["builds needed"], found["windows in each"]] == found["minutes on 2 cores"]


def test_dear_builds_want_more_windows_each_than_cheap_ones():
    dear, cheap = (
        measuring.cheapest(0.01, 0.05, 0.01, build, 1.0)["windows in each"] for build in (500, 0.1)
    )
    assert dear > cheap
