"""What can be told from a few builds: a mean with its interval, a verdict, and what would have been found.

A build is one draw of all that is random at once: rotation seed, calibration sample, rounding jitter, and the
windows that are scored. So the builds' values are independent, their mean has one t interval, and that
interval holds every one of those sources (Student 1908; for models scored on several draws: Bouthillier et
al., "Accounting for variance in machine learning benchmarks", 2021)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL, POWER = 0.95, 0.8  # of an interval; how often a difference of the `smallest` size would be found
BETTER, WORSE, UNKNOWN = "better", "worse", "cannot tell"


@dataclass(frozen=True)
class Estimate:
    """The mean of independent values, one a build; its standard error (nan for one value); their number."""

    mean: float
    error: float
    builds: int

    @property
    def df(self) -> int:
        """Degrees of freedom of the standard error."""
        return self.builds - 1

    def _quantile(self, share: float) -> float:
        from scipy import stats  # half a second, which a dry run need not wait

        return float(stats.t.ppf(share, self.df)) if self.df else math.nan

    @property
    def ci95(self) -> tuple[float, float]:
        """The 95% t interval of the mean; nan for one value."""
        half = self._quantile((1 + LEVEL) / 2) * self.error
        return self.mean - half, self.mean + half

    @property
    def smallest(self) -> float:
        """The smallest difference that such a design finds (its interval leaves 0 out) four times of five."""
        return (self._quantile((1 + LEVEL) / 2) + self._quantile(POWER)) * self.error

    @property
    def verdict(self) -> str:
        """`better` or `worse` (less is better) where the interval leaves 0 out, else `cannot tell`."""
        low, high = self.ci95
        return BETTER if high < 0 else WORSE if low > 0 else UNKNOWN


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """The mean of `values` (builds,), one a build, with its uncertainty. ValueError: no value."""
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"estimate.values must be (builds,), at least one; got shape {found.shape}")
    error = found.std(ddof=1) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return Estimate(float(found.mean()), float(error), len(found))


def jackknife(parts: np.ndarray, function: Callable[..., float]) -> Estimate:
    """`function` of the builds' mean `parts` (quantities, builds), such as a ratio of two of them, and its
    uncertainty by leaving out one build at a time (Tukey 1958). The mean is the plain one."""
    whole = float(function(*parts.mean(1)))
    count = parts.shape[1]
    if count == 1:
        return Estimate(whole, math.nan, 1)
    left = [float(function(*np.delete(parts, b, 1).mean(1))) for b in range(count)]
    spread = np.square(np.array(left) - np.mean(left)).sum()
    return Estimate(whole, math.sqrt((count - 1) / count * spread), count)


def builds_for(deviation: float, wanted: float, most: int = 10_000) -> int:
    """How many builds give an interval of half width `wanted`, if one build's value has this standard
    `deviation` (both in the same unit); `most` where more would be needed."""
    from scipy import stats

    for count in range(2, most):
        if stats.t.ppf((1 + LEVEL) / 2, count - 1) * deviation / math.sqrt(count) <= wanted:
            return count
    return most
