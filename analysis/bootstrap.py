"""Intervals of means over updates that share global models."""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Entries of the resampling matrix that exist at once.
_BLOCK = 1_000_000
_FEW = 20


def bootstrap_interval(
    values: ArrayLike,
    clusters: ArrayLike,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return an interval of a mean by whole clusters: percentile bootstrap, or Student's t.

    The updates of one round share a global model, and the attacks on them a calibration: only
    rounds are independent, and resampling single updates would make the interval too narrow. Of
    fewer than 20 clusters the bootstrap is too narrow as well (of five it covers 83 %, not 95 %):
    there the interval is that of the clusters' means, weighted by their sizes, with the quantile
    of Student's distribution.

    Parameters
    ----------
    values
        floating point [n]; NaN are left out.
    clusters
        integer [n]: the cluster (round) of each value.
    level
        Coverage.
    resamples
        Number of bootstrap samples.
    seed
        Of the resampling; equal arguments give equal intervals.

    Returns
    -------
    tuple[float, float]
        Low and high; ``(nan, nan)`` with fewer than two clusters.
    """
    x, cluster = np.asarray(values, np.float64).ravel(), np.asarray(clusters).ravel()
    cluster, x = cluster[~np.isnan(x)], x[~np.isnan(x)]
    names, index = np.unique(cluster, return_inverse=True)
    count = len(names)
    if count < 2:
        return float("nan"), float("nan")
    # Deviations from one of the values: a constant sample gives its value without rounding.
    sums = np.bincount(index, weights=x - x[0], minlength=count)
    sizes = np.bincount(index, minlength=count)
    if count < _FEW:
        mean = float(sums.sum() / sizes.sum())
        off = sums - mean * sizes
        error = np.sqrt(count / (count - 1) * (off @ off)) / sizes.sum()
        half = float(_quantile(count - 1, (1 + level) / 2) * error)
        middle = float(mean + x[0])
        return (middle - half, middle + half)
    means = np.concatenate(
        [
            sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
            for drawn in _draws(count, resamples, seed)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2]) + x[0]
    return float(low), float(high)


@lru_cache(maxsize=64)
def _quantile(freedom: int, probability: float) -> float:
    from scipy.special import stdtrit  # an order of magnitude sooner imported than scipy.stats

    return float(stdtrit(freedom, probability))


def _draws(count: int, resamples: int, seed: int) -> Iterable[NDArray[np.int64]]:
    """Return which of ``count`` clusters each bootstrap sample holds, in blocks."""
    step = max(1, _BLOCK // count)
    if resamples <= step:
        # Most tables ask for the same draws hundreds of times.
        return [_drawn_once(count, resamples, seed)]
    generator = np.random.Generator(np.random.PCG64(seed))
    return (
        generator.integers(count, size=(min(step, resamples - start), count))
        for start in range(0, resamples, step)
    )


@lru_cache(maxsize=4)
def _drawn_once(count: int, resamples: int, seed: int) -> NDArray[np.int64]:
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.integers(count, size=(resamples, count))
