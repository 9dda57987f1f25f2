"""Label counts from row sums and the model's mean outputs: ZLG (Geng et al. 2021), interpolated.

Where all samples had the mean posterior and the mean feature sum H, the row sums of a batch's
gradient would be ``g = H (pbar - lambda / N)``: solved for lambda.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import override

from testbed.attacks.auxiliary import class_means
from testbed.attacks.base import (
    Adversary,
    Assumption,
    Attack,
    Calibration,
    Knowledge,
    LabelCounts,
    Observations,
    Observed,
)
from testbed.attacks.estimation import column, float64, given, last_models, step_fractions
from testbed.attacks.registry import register
from testbed.attacks.rounding import largest_remainder

_GENG = "Geng et al. 2021 (arXiv 2110.09074)"
_DIMITROV = "Dimitrov et al., TMLR 2022 (arXiv 2206.12395)"


@dataclass(frozen=True)
class _ZLG(Attack):
    """What all variants share; they differ in the inputs and in the models that are run."""

    assumes: ClassVar = frozenset({Assumption.NON_NEGATIVE_FEATURES})
    calibration_arrays: ClassVar = {"posterior": (("class",), "f8"), "mass": ((), "f8")}

    @abstractmethod
    def _means(self, adversary: Adversary) -> tuple[NDArray[np.float64], float]:
        """Return the mean posterior [C] and the mean feature sum."""

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        posterior, mass = self._means(adversary)
        return {"posterior": posterior[None, :], "mass": np.array([mass])}

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        g = float64(observations.row_sums)
        xp = array_namespace(g)
        posterior = given(calibration["posterior"], g)
        mass = given(calibration["mass"], g)[:, None]
        # Without features there is no gradient either: it then says nothing.
        known = mass != 0
        shares = xp.where(known, g / xp.where(known, mass, xp.ones_like(mass)), xp.zeros_like(g))
        scores = column(observations.labels, g) * (posterior - shares / observations.local_steps)
        return LabelCounts(largest_remainder(scores, observations.labels), scores)


@dataclass(frozen=True)
class _Dummy(_ZLG):
    """The means are those over dummy inputs.

    Attributes
    ----------
    inputs
        Standard normal, all zero, all one, or uniform in [0, 1).
    samples
        How many random inputs; the others are all alike.
    """

    inputs: Literal["normal", "zeros", "ones", "random"] = "normal"
    samples: Annotated[int, Field(ge=1, le=100_000)] = 1000

    knowledge: ClassVar[Knowledge] = Knowledge.MODEL

    @override
    def _means(self, adversary: Adversary) -> tuple[NDArray[np.float64], float]:
        alike = self.inputs in ("zeros", "ones")
        outputs = adversary.on_dummy(self.inputs, 1 if alike else self.samples)
        return outputs.posterior.mean(axis=0), float(outputs.features.sum(axis=1).mean())


@dataclass(frozen=True)
class _Auxiliary(_ZLG):
    """The means are those over auxiliary samples, each class with the same weight."""

    knowledge: ClassVar[Knowledge] = Knowledge.AUXILIARY
    calibrated_by: ClassVar = ()

    @override
    def _means(self, adversary: Adversary) -> tuple[NDArray[np.float64], float]:
        means = class_means(adversary.on_auxiliary())
        return means.mean_posterior, float(means.mass[means.present].mean())


@dataclass(frozen=True)
class _Interpolated(_ZLG):
    """The means are interpolated from the model before to the model after the local steps.

    At each step's place on the way the counts are estimated, and averaged: which is to take the
    mean of the posteriors, and the harmonic mean of the feature sums.
    """

    observes: ClassVar = frozenset({Observed.ROW_SUMS, Observed.UPDATE})
    calibration_arrays: ClassVar = {
        "posterior": (("client", "class"), "f8"),
        "mass": (("client",), "f8"),
    }

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        return {}

    @override
    def calibrate_updates(self, adversary: Adversary, observations: Observations) -> Calibration:
        first, first_mass = self._means(adversary)
        fractions = step_fractions(adversary.local_steps)
        posteriors = np.empty((len(observations.keys), adversary.classes))
        masses = np.empty(len(posteriors))
        for row, later in enumerate(last_models(adversary, observations)):
            last, last_mass = self._means(later)
            posteriors[row] = first + fractions.mean() * (last - first)
            masses[row] = _harmonic_mean(first_mass + fractions * (last_mass - first_mass))
        return {"posterior": posteriors, "mass": masses}


@register
@dataclass(frozen=True)
class ZLG(_Dummy):
    """The model's mean posterior and feature sum on dummy inputs stand for the batch's."""

    name: ClassVar[str] = "zlg"
    title: ClassVar[str] = "ZLG"
    source: ClassVar[str] = _GENG


@register
@dataclass(frozen=True)
class ZLGPlus(_Auxiliary):
    """The model's mean posterior and feature sum on auxiliary samples stand for the batch's."""

    name: ClassVar[str] = "zlg_plus"
    title: ClassVar[str] = "ZLG+"
    source: ClassVar[str] = _GENG


@register
@dataclass(frozen=True)
class ZLGInterpolated(_Interpolated, _Dummy):
    """ZLG whose means follow the client's model from its first to its last local step."""

    name: ClassVar[str] = "zlg_interpolated"
    title: ClassVar[str] = "ZLG, interpolated"
    source: ClassVar[str] = _DIMITROV


@register
@dataclass(frozen=True)
class ZLGInterpolatedPlus(_Interpolated, _Auxiliary):
    """Interpolated ZLG with auxiliary samples in place of dummy inputs."""

    name: ClassVar[str] = "zlg_interpolated_plus"
    title: ClassVar[str] = "ZLG+, interpolated"
    source: ClassVar[str] = _DIMITROV


def _harmonic_mean(masses: NDArray[np.float64]) -> float:
    """Return the harmonic mean; 0, which says nothing, where one of them is 0 or not finite."""
    if not np.isfinite(masses).all() or (masses == 0).any():
        return 0.0
    inverse = float((1 / masses).mean())
    return 1 / inverse if inverse else 0.0
