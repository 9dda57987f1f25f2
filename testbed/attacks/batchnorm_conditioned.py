"""Label counts from BatchNorm statistics, one update at a time. Attacks of our own.

BatchNorm makes what a sample leaves in deeper layers depend on the other samples of its batch, but
only through the statistics that normalise, and these the server is told. It runs its auxiliary
samples through the model, normalised by the very statistics that a client sent. Then nothing is
approximate: the batch's means and mean squares of every channel are the means of its samples'
moments, and its last-layer gradients the means of its samples' gradients. Such a sum over samples
has moments in closed form, given the label shares l:

    E[x | l] = M l,    Cov[x | l] = k S,    k = 1 / N + (sum of l_c^2) / n

with the class means M and the covariance S within classes, both estimated from the auxiliary
samples, n of a class, so that the second part of k is the error of M. The estimate is the most
likely l >= 0 with sum 1, under a normal prior of variance v about equal shares. How uneven the
shares are, v, is not known beforehand: the estimates for several values are averaged with the
evidence that the update itself has for each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from testbed.attacks.base import (
    Adversary,
    Assumption,
    Attack,
    Calibration,
    Knowledge,
    LabelCounts,
    Normalised,
    Observations,
    Observed,
)
from testbed.attacks.estimation import non_negative_solution, required
from testbed.attacks.registry import register
from testbed.attacks.regression_statistics import labels_of, project_shares
from testbed.attacks.rounding import largest_remainder

Floats = NDArray[np.float64]

# Values of v, from multinomial scatter to a single class.
_UNEVENNESS = 8
# How much heavier than the other equations that of the sum of shares is.
_EXACT = 1e3
# Directions in which classes differ less than this, of the largest, carry no information.
_FLAT = 1e-9
# A channel scatters within classes by at least this part of how it varies between them.
_EXACTNESS = 1e-3
# The least share of correlations that is taken for chance.
_LEAST = 1e-4


@dataclass(frozen=True)
class _Conditioned(Attack):
    """Moments of auxiliary samples that are normalised as the client's batch was."""

    knowledge: ClassVar[Knowledge] = Knowledge.AUXILIARY
    assumes: ClassVar = frozenset({Assumption.KNOWN_MOMENTUM})
    source: ClassVar[str] = "this testbed"
    calibrated_by: ClassVar = ()
    calibration_arrays: ClassVar = {
        "per_class": ((), "f8"),
        "precision": (("client", "class", "class"), "f8"),
        "projection": (("client", "class"), "f8"),
    }

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        labels = labels_of(adversary.on_auxiliary())
        return {"per_class": np.array([len(labels) / len(np.unique(labels))])}

    @override
    def calibrate_updates(self, adversary: Adversary, observations: Observations) -> Calibration:
        statistics = required(observations.statistics, "BatchNorm statistics")
        classes = adversary.classes
        precision = np.zeros((len(statistics), classes, classes))
        projection = np.zeros((len(statistics), classes))
        for i, row in enumerate(statistics):
            seen = adversary.normalised(row)
            samples, batch = self._terms(seen, observations.rows(slice(i, i + 1)))
            if np.isfinite(samples).all() and np.isfinite(batch).all():
                precision[i], projection[i] = class_evidence(
                    samples, batch, labels_of(seen.outputs), classes
                )
        return {"precision": precision, "projection": projection}

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        rows = zip(
            np.asarray(calibration["precision"], np.float64),
            np.asarray(calibration["projection"], np.float64),
            np.asarray(observations.labels),
            np.broadcast_to(calibration["per_class"], len(observations.keys)),
            strict=True,
        )
        shares = np.stack([label_shares(*evidence) for evidence in rows])
        scores = shares * np.asarray(observations.labels)[:, None]
        return LabelCounts(largest_remainder(scores, observations.labels), scores)

    def _terms(self, seen: Normalised, _: Observations) -> tuple[Floats, Floats]:
        """Return what adds up over samples: of each of ours [n, F], and the batch's mean [F]."""
        return seen.moments, seen.batch


@register
@dataclass(frozen=True)
class ConditionedStatistics(_Conditioned):
    """Given a batch's BatchNorm statistics, they are exact means of per-sample moments."""

    name: ClassVar[str] = "batchnorm_conditioned"
    title: ClassVar[str] = "Conditioned statistics"
    observes: ClassVar = frozenset({Observed.STATISTICS})


@register
@dataclass(frozen=True)
class ConditionedJoint(_Conditioned):
    """Conditioned statistics and last-layer gradients, which leak early, in one estimate."""

    name: ClassVar[str] = "batchnorm_conditioned_joint"
    title: ClassVar[str] = "Conditioned gradients and statistics"
    observes: ClassVar = frozenset({Observed.ROW_SUMS, Observed.BIAS_GRADIENT, Observed.STATISTICS})

    @override
    def _terms(self, seen: Normalised, observations: Observations) -> tuple[Floats, Floats]:
        moments, batch = super()._terms(seen, observations)
        residual = seen.outputs.posterior.copy()
        labels = labels_of(seen.outputs)
        residual[np.arange(len(labels)), labels] -= 1
        mass = seen.outputs.features.sum(axis=1, keepdims=True)
        bias = required(observations.bias_gradient, "bias gradient")
        gradients = np.concatenate([bias[0], observations.row_sums[0]]) / observations.local_steps
        return (
            np.hstack([moments, residual, residual * mass]),
            np.concatenate([batch, gradients]),
        )


def class_evidence(
    samples: Floats, batch: Floats, labels: NDArray[np.int64], classes: int
) -> tuple[Floats, Floats]:
    """Return what a batch's means say of its label shares, as normal equations.

    The correlations within classes are shrunk towards none by the oracle approximating rule (Chen
    et al., "Shrinkage Algorithms for MMSE Covariance Estimation", IEEE Transactions on Signal
    Processing 2010).

    Parameters
    ----------
    samples
        float64 [n, F]: of auxiliary samples.
    batch
        float64 [F]: the same, the mean over a batch.
    labels
        int64 [n].
    classes
        C.

    Returns
    -------
    precision
        float64 [C, C]: ``M S^-1 M^T``, M the class means about their own mean. Zero for a class
        without samples.
    projection
        float64 [C]: ``M S^-1 (x - mean)``.
    """
    size = np.bincount(labels, minlength=classes)
    present = size > 0
    member = np.eye(classes)[labels]
    means = member.T @ samples / np.maximum(size, 1)[:, None]
    inside = samples - means[labels]
    freedom = int(len(labels) - present.sum())
    between = means[present].std(axis=0)
    # Of one sample per class, what scatters within classes is unknown: as much as between them.
    # No channel is trusted without bound, though it may hardly vary within classes.
    least = between if freedom == 0 else _EXACTNESS * between
    scale = np.maximum(np.sqrt((inside**2).sum(axis=0) / max(freedom, 1)), least)
    # What does not vary at all is rounding noise, or buffers that are no statistics.
    kept = scale > np.finfo(np.float32).eps * np.abs(samples).max(axis=0)
    if not kept.any():
        return np.zeros((classes, classes)), np.zeros(classes)
    inside, scale = inside[:, kept] / scale[kept], scale[kept]
    freedom = max(freedom, 1)
    correlation = inside.T @ inside / freedom
    np.fill_diagonal(correlation, 1.0)
    shrinkage = _oracle_shrinkage(correlation, freedom)
    correlation = (1 - shrinkage) * correlation + shrinkage * np.eye(len(scale))
    center = means[present][:, kept].mean(axis=0)
    contrast = np.where(present[:, None], (means[:, kept] - center) / scale, 0.0)
    weighted = np.linalg.solve(correlation, contrast.T)
    return contrast @ weighted, ((batch[kept] - center) / scale) @ weighted


def _oracle_shrinkage(correlation: Floats, freedom: int) -> float:
    """Return how much of a correlation matrix [F, F] is to be taken for chance."""
    width = len(correlation)
    square = float((correlation**2).sum())
    chance = (1 - 2 / width) * square + width**2
    found = (freedom + 1 - 2 / width) * (square - width)
    # Never none: what is exactly collinear has no inverse.
    return float(np.clip(chance / found, _LEAST, 1.0)) if found > 0 else 1.0


def label_shares(precision: Floats, projection: Floats, labels: int, per_class: float) -> Floats:
    """Return the estimate of the label shares [C].

    Parameters
    ----------
    precision, projection
        Of `class_evidence`.
    labels
        N: how many labels the update has.
    per_class
        Auxiliary samples of a class, n.
    """
    classes = len(projection)
    variances, axes = np.linalg.eigh(precision)
    telling = variances > _FLAT * max(float(variances.max()), 0.0)
    if not telling.any() or not np.isfinite(projection).all():
        return np.full(classes, 1 / classes)
    signal = variances[telling]
    seen = (projection @ axes[:, telling]) / np.sqrt(signal)
    unevenness = np.geomspace(1 / labels, 1, _UNEVENNESS) if labels > 1 else np.ones(1)
    noise = 1 / labels + (1 / classes + unevenness) / per_class
    spread = signal * (unevenness / classes)[:, None] + noise[:, None]
    log_evidence = -0.5 * (np.log(spread) + seen**2 / spread).sum(axis=1)
    weights = np.exp(log_evidence - log_evidence.max())
    weights /= weights.sum()
    solve = _solver(precision, projection)
    estimates = [
        weight * solve(noise_of, v / classes)
        for weight, noise_of, v in zip(weights, noise, unevenness, strict=True)
        if weight > _FLAT
    ]
    shares: Floats = project_shares(np.sum(estimates, axis=0)[None])[0]
    return shares


def _solver(precision: Floats, projection: Floats) -> Callable[[float, float], Floats]:
    """Return what finds the most likely shares, for the noise k and the prior's variance."""
    classes = len(projection)

    def solve(noise: float, variance: float) -> Floats:
        factor = np.linalg.cholesky(precision / noise + np.eye(classes) / variance)
        target = factor.T @ np.full(classes, 1 / classes)
        target += np.linalg.solve(factor, projection / noise)
        heavy = _EXACT * np.abs(factor).max()
        system = np.vstack([factor.T, np.full((1, classes), heavy)])
        return non_negative_solution(system, np.append(target, heavy))

    return solve
