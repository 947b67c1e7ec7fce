"""Intervals of a statistic over windows, and of differences on the same windows."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats


def perplexity(losses: np.ndarray, axis: int = -1) -> Any:
    """exp of the mean loss in nats."""
    return np.exp(losses.mean(axis))


def bootstrap(statistic: Callable[..., Any], *samples: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap 95% interval of a statistic of paired samples (windows,); nan for fewer than 2."""
    if len(samples[0]) < 2:
        return float("nan"), float("nan")
    options: dict[str, Any] = {"paired": True, "vectorized": True, "method": "percentile", "rng": 0}
    interval = stats.bootstrap(samples, statistic, n_resamples=9999, **options).confidence_interval
    return float(interval.low), float(interval.high)


def difference(a: np.ndarray, b: np.ndarray, axis: int) -> Any:
    """Perplexity of losses `a` minus that of `b`."""
    return perplexity(a, axis) - perplexity(b, axis)


def closed_share(ro: np.ndarray, ro_kept: np.ndarray, rh: np.ndarray, rh_kept: np.ndarray, axis: int) -> Any:
    """The share of the perplexity gap between RO and RH that keeping massive tokens out closes: 1 is all."""
    return 1 - difference(ro_kept, rh_kept, axis) / difference(ro, rh, axis)
