"""How much of the gap between RO and RH is gone with tokens kept out, from losses that are made here."""

import numpy as np
import pytest

from dfrot_lab.maths.tables import COLUMNS, SHARE
from dfrot_lab.recipe.specs import RotationSpec, recipe_of
from dfrot_lab.score.perplexity import EvalResult
from dfrot_lab.study.keepout import closed_share


def builds(losses: list[float], kind: str = "RO", keep_out: str | None = None) -> list[EvalResult]:
    """Evaluations of two windows around each build's mean loss."""
    spec = recipe_of("16-4-16", rotation=RotationSpec(kind=kind), keep_out=keep_out)
    around = [np.array([loss - 0.1, loss + 0.1]) for loss in losses]
    return [EvalResult(spec.with_(sample=n), each, 1.0, "", {}) for n, each in enumerate(around)]


def share(ro: list[float], ro_kept: list[float], rh: list[float], rh_kept: list[float]) -> list[dict]:
    kept = builds(ro_kept, keep_out="nr_error_9.5"), builds(rh_kept, "RH", "nr_error_9.5")
    return closed_share(builds(ro), kept[0], builds(rh, "RH"), kept[1])


@pytest.mark.parametrize(
    ("ro_kept", "rh_kept", "expected"),
    [(2.8, 2.0, 0.0), (2.4, 2.4, 1.0), (2.3, 1.9, 0.5), (3.6, 2.0, -1.0), (2.0, 2.1, 1.125)],
    ids=["nothing", "all", "half", "wider than before", "turned round"],
)
def test_the_share_of_known_losses(ro_kept, rh_kept, expected):
    """RO at 2.8 nats and RH at 2.0, in every build: a gap of 0.8."""
    [row] = share([2.8] * 3, [ro_kept] * 3, [2.0] * 3, [rh_kept] * 3)
    assert row["value"] == pytest.approx(expected, abs=1e-12)
    assert row["ci95"] == pytest.approx([expected, expected], abs=1e-9)
    assert (row["metric"], row["rotation"], row["keep_out"], row["builds"]) == (SHARE, "RO", True, 3)
    assert (row["verdict"], row["by_build"]) == (None, None) and tuple(row) == COLUMNS


def test_the_share_s_interval_is_that_of_leaving_out_a_build_at_a_time():
    rng, level = np.random.default_rng(2), np.random.default_rng(3).normal(3, 0.3, 6)
    four = [(level + shift + rng.normal(0, 0.02, 6)).tolist() for shift in (0.8, 0.3, 0.0, -0.05)]
    [row] = share(*four)

    def of(chosen: list[int]) -> float:
        ro, ro_kept, rh, rh_kept = (np.mean([part[b] for b in chosen]) for part in four)
        return float(1 - (ro_kept - rh_kept) / (ro - rh))

    left = np.array([of([b for b in range(6) if b != out]) for out in range(6)])
    error = (5 / 6 * np.square(left - left.mean()).sum()) ** 0.5
    assert row["value"] == pytest.approx(of([*range(6)]))
    assert row["ci95"] == pytest.approx([row["value"] + sign * 2.5706 * error for sign in (-1, 1)], rel=1e-4)
    assert row["ci95"][1] - row["ci95"][0] < 0.3, "what builds share, their level, is not in it"


def test_a_gap_that_is_not_twice_its_uncertainty_has_no_share():
    """The gap of 6 builds that differ by 0.05 either way has an interval of half width 0.0575 nats."""
    wide = [0.05, -0.05] * 3
    for gap, rows in ((0.1, 0), (0.114, 0), (0.116, 1), (0.2, 1), (-0.116, 1), (-0.1, 0)):
        ro = [2 + gap + each for each in wide]
        assert len(share(ro, [2.0] * 6, [2.0] * 6, [2.0] * 6)) == rows, gap


def test_one_build_has_no_share():
    assert share([2.8], [2.4], [2.0], [2.0]) == []
