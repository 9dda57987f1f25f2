"""How much of the truth an attack found, and what a guess would have found.

NumPy only: the server scores with it while a run goes on, and `analysis` scores a file a year later
on a machine without torch. ``truth`` and ``inferred`` are integer label counts [..., C]; every
metric works over all leading axes and returns float64 [...]. An update that was not attacked has
negative (fill) counts and gets NaN, and so does one without labels.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from testbed.attacks.rounding import largest_remainder

Counts = NDArray[np.integer[Any]]
Scores = NDArray[np.float64]

# Entries of the resampling matrix that exist at once.
_BLOCK = 1_000_000


def asr(truth: Counts, inferred: Counts) -> Scores:
    """Attack success rate: multiset intersection over the number of labels; 1 is best.

    ``sum_c min(t_c, l_c) / N`` (Wainakh et al., PoPETs 2022(2)); also called instance recall.
    """
    return _ratio(_common(truth, inferred), _labels(truth), truth, inferred)


def presence_accuracy(truth: Counts, inferred: Counts) -> Scores:
    """Share of all C classes whose presence or absence is right (LeAcc); flatters for large C."""
    right = ((truth > 0) == (inferred > 0)).sum(axis=-1)
    return _ratio(right, truth.shape[-1], truth, inferred)


def presence_precision(truth: Counts, inferred: Counts) -> Scores:
    """Share of the classes inferred as present that are present; NaN if none was inferred."""
    return _ratio(_hits(truth, inferred), (inferred > 0).sum(axis=-1), truth, inferred)


def presence_recall(truth: Counts, inferred: Counts) -> Scores:
    """Share of the present classes that were inferred as present."""
    return _ratio(_hits(truth, inferred), (truth > 0).sum(axis=-1), truth, inferred)


def presence_f1(truth: Counts, inferred: Counts) -> Scores:
    """Harmonic mean of `presence_precision` and `presence_recall`."""
    size = (truth > 0).sum(axis=-1) + (inferred > 0).sum(axis=-1)
    return _ratio(2 * _hits(truth, inferred), size, truth, inferred)


def count_accuracy(truth: Counts, inferred: Counts) -> Scores:
    """Share of all C classes whose count is right (LnAcc); flatters for large C."""
    return _ratio((truth == inferred).sum(axis=-1), truth.shape[-1], truth, inferred)


def exact(truth: Counts, inferred: Counts) -> Scores:
    """1 where every count is right, else 0."""
    return _ratio((truth == inferred).all(axis=-1), 1, truth, inferred)


def hellinger(truth: Counts, inferred: Counts) -> Scores:
    """Hellinger distance of the two label distributions, in [0, 1]; 0 is best."""
    t, f = _distribution(truth), _distribution(inferred)
    distance = np.sqrt(np.square(np.sqrt(t) - np.sqrt(f)).sum(axis=-1) / 2)
    return _ratio(distance, 1, truth, inferred)


def total_variation(truth: Counts, inferred: Counts) -> Scores:
    """Total variation distance of the two label distributions, in [0, 1]; 0 is best.

    With as many inferred labels as true ones it is ``1 - asr``.
    """
    distance = np.abs(_distribution(truth) - _distribution(inferred)).sum(axis=-1) / 2
    return _ratio(distance, 1, truth, inferred)


def jaccard(truth: Counts, inferred: Counts) -> Scores:
    """Jaccard index of the two multisets: intersection over union; 1 is best."""
    return _ratio(
        _common(truth, inferred), np.maximum(truth, inferred).sum(axis=-1), truth, inferred
    )


METRICS: dict[str, Callable[[Counts, Counts], Scores]] = {
    metric.__name__: metric
    for metric in (
        asr,
        presence_accuracy,
        presence_precision,
        presence_recall,
        presence_f1,
        count_accuracy,
        exact,
        hellinger,
        total_variation,
        jaccard,
    )
}


def expected_random_asr(truth: Counts) -> Scores:
    """Return the expected `asr` of a guess that draws every label uniformly from the C classes.

    The count of a class is then binomial, so this is ``sum_c E[min(t_c, X)] / N`` with
    ``X ~ Binomial(N, 1/C)``, in closed form.

    Parameters
    ----------
    truth
        integer [..., C].

    Returns
    -------
    Scores
        float64 [...].
    """
    labels, classes = _labels(truth), truth.shape[-1]
    valid = _valid(truth)
    expected = np.full(truth.shape[:-1], np.nan)
    for total in np.unique(labels[valid]):
        rows = valid & (labels == total)
        table = _expected_minimum(int(total), classes)
        expected[rows] = table[truth[rows]].sum(axis=-1) / total
    return expected


def expected_uniform_asr(truth: Counts) -> Scores:
    """Return the expected `asr` of the guess that spreads the N labels as evenly as possible.

    Every class gets ``N // C`` labels, and a random subset of ``N % C`` classes one more.

    Parameters
    ----------
    truth
        integer [..., C].

    Returns
    -------
    Scores
        float64 [...].
    """
    labels, classes = _labels(truth)[..., None], truth.shape[-1]
    base, share = labels // classes, (labels % classes) / classes
    hits = (1 - share) * np.minimum(truth, base) + share * np.minimum(truth, base + 1)
    return _ratio(hits.sum(axis=-1), labels[..., 0], truth, truth)


def advantage(score: ArrayLike, baseline: ArrayLike) -> Scores:
    """Return ``(x - u) / (1 - u)``: 0 as good as the baseline, 1 perfect, negative worse.

    NaN where the baseline is 1 already.
    """
    x, u = np.broadcast_arrays(np.asarray(score, np.float64), np.asarray(baseline, np.float64))
    out = np.full(x.shape, np.nan)
    np.divide(x - u, 1 - u, out=out, where=u != 1)
    return out


def oracle_counts(
    posterior: NDArray[np.floating[Any]],
    bias_gradient: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
) -> NDArray[np.int64]:
    """Return what an attack infers that is told the batch's mean posterior.

    The identity behind all count attacks, ``lambda_c = N (pbar_c - b_c)``: exact for one local step
    without defences, so it is the upper bound and the testbed's self-test.

    Parameters
    ----------
    posterior
        floating point [..., C]: mean softmax output over the batch, pbar.
    bias_gradient
        floating point [..., C]: last layer's bias gradient, the mean over the local steps.
    labels
        integer [...]: number of labels N of each update.

    Returns
    -------
    NDArray[np.int64]
        [..., C]; each row sums to N. Rows with a value that is not finite, or with a negative
        number of labels, are -1.
    """
    total = np.asarray(labels, np.int64)
    scores = total[..., None] * (np.float64(posterior) - np.float64(bias_gradient))
    valid = np.isfinite(scores).all(axis=-1) & (total >= 0)
    counts = np.full(scores.shape, -1, np.int64)
    counts[valid] = largest_remainder(scores[valid], total[valid])
    return counts


def bootstrap_interval(
    values: ArrayLike,
    clusters: ArrayLike,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean, resampling whole clusters.

    The updates of one round share a global model, and the attacks on them a calibration: only
    rounds are independent, and resampling single updates would make the interval too narrow.

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
    generator = np.random.Generator(np.random.PCG64(seed))
    step = max(1, _BLOCK // count)
    means = np.empty(resamples)
    for start in range(0, resamples, step):
        block = means[start : start + step]
        drawn = generator.integers(count, size=(len(block), count))
        block[:] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2]) + x[0]
    return float(low), float(high)


@lru_cache(maxsize=256)
def _expected_minimum(total: int, classes: int) -> Scores:
    """Return E[min(t, X)] for t = 0 ... total, with X ~ Binomial(total, 1/classes)."""
    if classes == 1:
        return np.arange(total + 1.0)
    k = np.arange(total)
    log_ratio = np.log(total - k) - np.log(k + 1) - np.log(classes - 1)
    log_mass = np.concatenate([[0.0], np.cumsum(log_ratio)])
    # Relative to the mode, then normalised: (1 - 1/C)^N itself underflows for large N.
    mass = np.exp(log_mass - log_mass.max())
    mass /= mass.sum()
    at_least = np.cumsum(mass[::-1])[::-1]
    return np.concatenate([[0.0], np.cumsum(at_least[1:])])


def _labels(counts: Counts) -> NDArray[np.int64]:
    labels: NDArray[np.int64] = counts.sum(axis=-1, dtype=np.int64)
    return labels


def _valid(counts: Counts) -> NDArray[np.bool_]:
    valid: NDArray[np.bool_] = (counts >= 0).all(axis=-1) & (counts.sum(axis=-1) > 0)
    return valid


def _common(truth: Counts, inferred: Counts) -> Counts:
    common: Counts = np.minimum(truth, inferred).sum(axis=-1)
    return common


def _hits(truth: Counts, inferred: Counts) -> Counts:
    hits: Counts = ((truth > 0) & (inferred > 0)).sum(axis=-1)
    return hits


def _distribution(counts: Counts) -> Scores:
    positive = np.maximum(counts, 0).astype(np.float64)
    shares: Scores = positive / np.maximum(positive.sum(axis=-1, keepdims=True), 1)
    return shares


def _ratio(top: ArrayLike, bottom: ArrayLike, truth: Counts, inferred: Counts) -> Scores:
    """Divide; NaN where an update was not attacked, has no labels, or the denominator is 0."""
    where = _valid(truth) & (inferred >= 0).all(axis=-1) & (np.asarray(bottom) > 0)
    out = np.full(where.shape, np.nan)
    np.divide(top, bottom, out=out, where=where, casting="unsafe")
    return out
