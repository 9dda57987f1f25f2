"""Label counts from the bias gradient and the model's posteriors on auxiliary samples.

``lambda = N (pbar - b)`` for every batch, with pbar its mean posterior and b the mean bias gradient
of its local steps. The attacks differ in what they say of pbar: the same for every batch, or a
mixture of what the model answers on each class. None needs to know of the features.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray
from typing_extensions import override

from testbed.attacks.auxiliary import ClassMeans, class_means
from testbed.attacks.base import (
    Adversary,
    Array,
    Assumption,
    Attack,
    Calibration,
    Knowledge,
    LabelCounts,
    Observations,
    Observed,
)
from testbed.attacks.estimation import (
    column,
    given,
    last_models,
    mean_bias_gradient,
    non_negative_solution,
    step_fractions,
)
from testbed.attacks.registry import register
from testbed.attacks.rounding import largest_remainder

Floats = NDArray[np.float64]

# 1 - p+ + p- is what a label takes from its class's entry; near 0, where the model is sure, it
# would blow up what noise is in the gradient.
_LEAST_STEP = 1e-3


@dataclass(frozen=True)
class _Counts(Attack):
    """What all of them share: statistics of auxiliary outputs, shares of labels, one rounding."""

    knowledge: ClassVar[Knowledge] = Knowledge.AUXILIARY
    observes: ClassVar = frozenset({Observed.BIAS_GRADIENT})
    calibrated_by: ClassVar = ()

    @abstractmethod
    def _statistics(self, means: ClassMeans) -> Mapping[str, Floats]:
        """Return the calibration's arrays for one model, without their leading axis."""

    @abstractmethod
    def _shares(self, bias: Array, calibration: Mapping[str, Array]) -> Array:
        """Return each class's share of the labels [N, C], before rounding."""

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        statistics = self._statistics(class_means(adversary.on_auxiliary()))
        return {name: values[None] for name, values in statistics.items()}

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        bias = mean_bias_gradient(observations)
        known = {name: given(values, bias) for name, values in calibration.items()}
        scores = column(observations.labels, bias) * self._shares(bias, known)
        return LabelCounts(largest_remainder(scores, observations.labels), scores)


@dataclass(frozen=True)
class _Interpolated(_Counts):
    """The statistics are averaged along the way from the model before to the model after.

    They are taken to change linearly from local step to local step, as Dimitrov et al. (TMLR 2022)
    have it for ZLG.
    """

    observes: ClassVar = frozenset({Observed.BIAS_GRADIENT, Observed.UPDATE})

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        return {}

    @override
    def calibrate_updates(self, adversary: Adversary, observations: Observations) -> Calibration:
        first = self._statistics(class_means(adversary.on_auxiliary()))
        way = float(step_fractions(adversary.local_steps).mean())
        mean = {
            name: np.empty((len(observations.keys), *values.shape))
            for name, values in first.items()
        }
        for row, later in enumerate(last_models(adversary, observations)):
            last = self._statistics(class_means(later.on_auxiliary()))
            for name, values in first.items():
                mean[name][row] = values + way * (last[name] - values)
        return mean


@register
@dataclass(frozen=True)
class AuxMean(_Counts):
    """Every batch is taken to have the mean posterior of class-balanced auxiliary samples."""

    name: ClassVar[str] = "aux_mean"
    title: ClassVar[str] = "AuxMean"
    source: ClassVar[str] = "identity of the bias gradient; cf. Chen and Vikalo, ICML 2024"
    calibration_arrays: ClassVar = {"posterior": (("class",), "f8")}

    @override
    def _statistics(self, means: ClassMeans) -> Mapping[str, Floats]:
        return {"posterior": means.mean_posterior}

    @override
    def _shares(self, bias: Array, calibration: Mapping[str, Array]) -> Array:
        return calibration["posterior"] - bias


@register
@dataclass(frozen=True)
class AuxMeanInterpolated(_Interpolated, AuxMean):
    """AuxMean, its mean posterior interpolated along the local steps."""

    name: ClassVar[str] = "aux_mean_interpolated"
    title: ClassVar[str] = "AuxMean, interpolated"
    calibration_arrays: ClassVar = {"posterior": (("client", "class"), "f8")}


@register
@dataclass(frozen=True)
class AuxLS(_Counts):
    """A batch's mean posterior is the mixture of the classes' own: non-negative least squares.

    With P[c, i] the mean posterior of class i over the auxiliary samples of class c, solved for the
    shares s: ``(P^T - I) s = b`` and ``sum s = 1``.
    """

    name: ClassVar[str] = "aux_ls"
    title: ClassVar[str] = "AuxLS"
    source: ClassVar[str] = "one step of Ramakrishna and Dan, AISec 2022 (soft labels)"
    calibration_arrays: ClassVar = {"posterior": (("class", "class"), "f8")}

    @override
    def _statistics(self, means: ClassMeans) -> Mapping[str, Floats]:
        return {"posterior": means.posterior}

    @override
    def _shares(self, bias: Array, calibration: Mapping[str, Array]) -> Array:
        rows, classes = bias.shape
        sums = np.ones((1, classes))
        posteriors = np.broadcast_to(calibration["posterior"], (rows, classes, classes))
        shares = np.empty((rows, classes))
        for row, posterior in enumerate(posteriors):
            system = np.concatenate([posterior.T - np.eye(classes), sums])
            shares[row] = non_negative_solution(system, np.append(bias[row], 1.0))
        return shares


@register
@dataclass(frozen=True)
class AuxLSInterpolated(_Interpolated, AuxLS):
    """AuxLS, its class-wise posteriors interpolated along the local steps."""

    name: ClassVar[str] = "aux_ls_interpolated"
    title: ClassVar[str] = "AuxLS, interpolated"
    calibration_arrays: ClassVar = {"posterior": (("client", "class", "class"), "f8")}


@register
@dataclass(frozen=True)
class PosNeg(_Counts):
    """A class's mean posterior depends on whether a sample is of the class: one equation per class.

    With p+ the mean posterior of a class over its own auxiliary samples and p- over the others':
    ``lambda = N (p- - b) / (1 - p+ + p-)``.
    """

    name: ClassVar[str] = "pos_neg"
    title: ClassVar[str] = "PosNeg"
    source: ClassVar[str] = "Zhang et al. 2023 (OpenReview cJ7XuW5JaH)"
    calibration_arrays: ClassVar = {
        "positive": (("class",), "f8"),
        "negative": (("class",), "f8"),
    }

    @override
    def _statistics(self, means: ClassMeans) -> Mapping[str, Floats]:
        own = np.diagonal(means.posterior).copy()
        others = means.present.sum() - means.present
        total = means.posterior[means.present].sum(axis=0) - np.where(means.present, own, 0)
        negative = np.where(others > 0, total / np.maximum(others, 1), own)
        return {"positive": own, "negative": negative}

    @override
    def _shares(self, bias: Array, calibration: Mapping[str, Array]) -> Array:
        positive, negative = calibration["positive"], calibration["negative"]
        step = array_namespace(bias).clip(1 - positive + negative, min=_LEAST_STEP)
        return (negative - bias) / step


@register
@dataclass(frozen=True)
class PosNegInterpolated(_Interpolated, PosNeg):
    """PosNeg, its posteriors interpolated along the local steps."""

    name: ClassVar[str] = "pos_neg_interpolated"
    title: ClassVar[str] = "PosNeg, interpolated"
    calibration_arrays: ClassVar = {
        "positive": (("client", "class"), "f8"),
        "negative": (("client", "class"), "f8"),
    }


@register
@dataclass(frozen=True)
class ScaleFree(_Counts):
    """AuxMean for a gradient of unknown scale: as large as leaves no class a negative count.

    ``lambda = N (pbar - k b)`` with k the smallest of ``pbar_c / b_c`` over the classes with a
    positive entry: the scale at which the first of them vanishes. Clipping, which only scales, then
    hides nothing, if a class is indeed absent.
    """

    name: ClassVar[str] = "scale_free"
    title: ClassVar[str] = "Scale-free"
    source: ClassVar[str] = "AuxMean, adapted to clipping"
    assumes: ClassVar = frozenset({Assumption.ABSENT_CLASS})
    calibration_arrays: ClassVar = {"posterior": (("class",), "f8")}

    @override
    def _statistics(self, means: ClassMeans) -> Mapping[str, Floats]:
        return {"posterior": means.mean_posterior}

    @override
    def _shares(self, bias: Array, calibration: Mapping[str, Array]) -> Array:
        xp = array_namespace(bias)
        posterior = calibration["posterior"]
        positive = bias > 0
        ratio = posterior / xp.where(positive, bias, xp.ones_like(bias))
        ratio = xp.where(positive, ratio, xp.full_like(bias, xp.inf))
        scale = xp.min(ratio, axis=1, keepdims=True)
        return posterior - xp.where(xp.isfinite(scale), scale, xp.zeros_like(scale)) * bias
