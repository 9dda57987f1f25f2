"""How much of the truth an attack found, and what a guess would have found.

NumPy only: `analysis` scores a file a year later on a machine without torch. ``truth`` and
``inferred`` are label counts [..., C]; every metric works over all leading axes and returns float64
[...]. An update that was not attacked has negative (fill) counts and gets NaN, and so does one
without labels. `score` takes the other kinds of answers too.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from testbed.attacks.rounding import largest_remainder

Counts = NDArray[np.integer[Any]]
Shares = NDArray[np.floating[Any]]
Scores = NDArray[np.float64]


def asr(truth: Counts, inferred: Counts) -> Scores:
    """Attack success rate: multiset intersection over the larger number of labels; 1 is best.

    With as many inferred labels as true ones it is ``sum_c min(t_c, l_c) / N``, the rate of Wainakh
    et al., PoPETs 2022(2), also called instance recall. Where the number of labels has to be
    guessed as well, a guess of too many earns nothing.
    """
    size = np.maximum(_labels(truth), _labels(inferred))
    return _ratio(_common(truth, inferred), size, truth, inferred)


def instance_precision(truth: Counts, inferred: Counts) -> Scores:
    """Share of the inferred labels that are right; NaN if none was inferred."""
    return _ratio(_common(truth, inferred), _labels(inferred), truth, inferred)


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


def hellinger(truth: Counts, inferred: Counts | Shares) -> Scores:
    """Hellinger distance of the two label distributions, in [0, 1]; 0 is best."""
    t, f = _distribution(truth), _distribution(inferred)
    distance = np.sqrt(np.square(np.sqrt(t) - np.sqrt(f)).sum(axis=-1) / 2)
    return _ratio(distance, 1, truth, inferred)


def total_variation(truth: Counts, inferred: Counts | Shares) -> Scores:
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
        instance_precision,
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
# Those that an answer of that kind is scored by as it is, without being turned into counts.
_OF_PRESENCE = (presence_accuracy, presence_precision, presence_recall, presence_f1)
_OF_SHARES = (hellinger, total_variation)


def scored_by(answers: str) -> tuple[str, ...]:
    """Return the names of the metrics that an attack gets whose answers are of that kind."""
    return tuple(_named(_OF_PRESENCE) if answers == "presence" else METRICS)


def score(
    answers: str, truth: Counts, values: NDArray[Any], labels: NDArray[np.integer[Any]]
) -> dict[str, Scores]:
    """Return every metric of an attack's answers, of whatever kind they are.

    Parameters
    ----------
    answers
        ``counts``; ``presence``, which has a presence metric or none; or ``distribution``, whose
        distances are those of the shares themselves, while the metrics of counts and presence are
        those of the shares rounded to ``labels``.
    truth
        integer [..., C].
    values
        [..., C]: as a results file has them, with its fill values for what was not attacked.
    labels
        integer [...]: how many labels the attack took the update to have.

    Returns
    -------
    dict[str, Scores]
        For each of `METRICS` float64 [...].
    """
    if answers == "counts":
        return {name: metric(truth, values) for name, metric in METRICS.items()}
    if answers == "presence":
        nothing = np.full(truth.shape[:-1], np.nan)
        known = _named(_OF_PRESENCE)
        return {name: known[name](truth, values) if name in known else nothing for name in METRICS}
    counts = _rounded(np.asarray(values, np.float64), np.asarray(labels, np.int64))
    own = _named(_OF_SHARES)
    return {
        name: own[name](truth, values) if name in own else metric(truth, counts)
        for name, metric in METRICS.items()
    }


def expected_random_asr(truth: Counts, labels: Counts | None = None) -> Scores:
    """Return the expected `asr` of a guess that draws every label uniformly from the C classes.

    The count of a class is then binomial, so this is ``sum_c E[min(t_c, X)] / max(N, M)`` with
    ``X ~ Binomial(M, 1/C)``, in closed form.

    Parameters
    ----------
    truth
        integer [..., C]; N labels each.
    labels
        integer [...]: how many labels are guessed, M, positive: what the server takes the update
        to have. The true N where None.

    Returns
    -------
    Scores
        float64 [...].
    """
    true, classes = _labels(truth), truth.shape[-1]
    guessed = true if labels is None else np.asarray(labels)
    valid = _valid(truth) & (guessed > 0)
    expected = np.full(truth.shape[:-1], np.nan)
    for total in np.unique(guessed[valid]):
        rows = valid & (guessed == total)
        table = _expected_minimum(int(total), classes)
        hits = table[np.minimum(truth[rows], total)].sum(axis=-1)
        expected[rows] = hits / np.maximum(true[rows], total)
    return expected


def expected_uniform_asr(truth: Counts, labels: Counts | None = None) -> Scores:
    """Return the expected `asr` of the guess that spreads M labels as evenly as possible.

    Every class gets ``M // C`` labels, and a random subset of ``M % C`` classes one more.

    Parameters
    ----------
    truth, labels
        See `expected_random_asr`.

    Returns
    -------
    Scores
        float64 [...].
    """
    true, classes = _labels(truth), truth.shape[-1]
    guessed = true if labels is None else np.asarray(labels)
    base, share = guessed[..., None] // classes, (guessed[..., None] % classes) / classes
    hits = (1 - share) * np.minimum(truth, base) + share * np.minimum(truth, base + 1)
    size = np.where(guessed > 0, np.maximum(true, guessed), 0)
    return _ratio(hits.sum(axis=-1), size, truth, truth)


def expected_random_f1(truth: Counts, labels: Counts | None = None) -> Scores:
    """Return the expected `presence_f1` of a guess that draws M labels uniformly.

    Given how many classes a guess holds, d, every set of d classes is as likely, so that it hits
    ``d k / C`` of the k present ones; d has the occupancy distribution.

    Parameters
    ----------
    truth, labels
        See `expected_random_asr`.

    Returns
    -------
    Scores
        float64 [...].
    """
    classes = truth.shape[-1]
    guessed = _labels(truth) if labels is None else np.asarray(labels)
    present = (truth > 0).sum(axis=-1)
    valid = _valid(truth) & (guessed > 0)
    expected = np.full(truth.shape[:-1], np.nan)
    held = np.arange(classes + 1)
    for total in np.unique(guessed[valid]):
        rows = valid & (guessed == total)
        k = np.arange(1, classes + 1)[:, None]
        table = (2 * held * k / classes / (k + held)) @ _occupancy(int(total), classes)
        expected[rows] = table[present[rows] - 1]
    return expected


def expected_uniform_f1(truth: Counts, labels: Counts | None = None) -> Scores:
    """Return the expected `presence_f1` of the guess that spreads M labels as evenly as possible.

    It holds all classes where there are as many labels, else a random set of M classes.

    Parameters
    ----------
    truth, labels
        See `expected_random_asr`.

    Returns
    -------
    Scores
        float64 [...].
    """
    classes = truth.shape[-1]
    guessed = _labels(truth) if labels is None else np.asarray(labels)
    held, present = np.clip(guessed, 0, classes), (truth > 0).sum(axis=-1)
    return _ratio(2 * held * present / classes, held + present, truth, truth)


# What a guess without information is expected to score, by metric. Like every attack it knows the
# number of labels that the server takes an update to have.
GUESSES: Mapping[str, Mapping[str, Callable[[Counts, Counts | None], Scores]]] = {
    "asr": {"random": expected_random_asr, "uniform": expected_uniform_asr},
    "presence_f1": {"random": expected_random_f1, "uniform": expected_uniform_f1},
}


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
    return _rounded(total[..., None] * (np.float64(posterior) - np.float64(bias_gradient)), total)


@lru_cache(maxsize=256)
def _occupancy(total: int, classes: int) -> Scores:
    """Return the probability that ``total`` uniform draws hold d classes, for d = 0 ... C."""
    held = np.arange(classes + 1)
    mass = np.zeros(classes + 1)
    mass[0] = 1
    # Behind so many draws a class is missing with a probability of less than exp(-40).
    for _ in range(min(total, math.ceil(classes * (math.log(classes) + 40)))):
        again = mass * held / classes
        again[1:] += mass[:-1] * (classes - held[:-1]) / classes
        mass = again
    return mass


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


def _distribution(weights: Counts | Shares) -> Scores:
    positive = np.maximum(weights, 0).astype(np.float64)
    total = positive.sum(axis=-1, keepdims=True)
    shares: Scores = positive / np.where(total > 0, total, 1)
    return shares


def _rounded(scores: Scores, totals: NDArray[np.int64]) -> NDArray[np.int64]:
    """Round rows to counts that sum to their totals; -1 where something is missing."""
    valid = np.isfinite(scores).all(axis=-1) & (totals >= 0)
    counts = np.full(scores.shape, -1, np.int64)
    counts[valid] = largest_remainder(scores[valid], totals[valid])
    return counts


def _named(
    metrics: Iterable[Callable[..., Scores]],
) -> dict[str, Callable[..., Scores]]:
    return {metric.__name__: metric for metric in metrics}


def _ratio(top: ArrayLike, bottom: ArrayLike, truth: Counts, inferred: NDArray[Any]) -> Scores:
    """Divide; NaN where an update was not attacked, has no labels, or the denominator is 0."""
    where = _valid(truth) & (inferred >= 0).all(axis=-1) & (np.asarray(bottom) > 0)
    out = np.full(where.shape, np.nan)
    np.divide(top, bottom, out=out, where=where, casting="unsafe")
    return out
