"""Label counts from the bias gradient alone: EBI and LLBG.

One more sample of a class takes ``1 / B`` from its entry, whatever the features and so whatever the
activation; LLG's decoding then counts how often.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from array_api_compat import array_namespace
from pydantic import Field
from typing_extensions import override

from testbed.attacks.auxiliary import class_means
from testbed.attacks.base import (
    Adversary,
    Array,
    Attack,
    Calibration,
    Knowledge,
    LabelCounts,
    Observations,
    Observed,
)
from testbed.attacks.decoding import decode
from testbed.attacks.estimation import column, float64, given, required
from testbed.attacks.registry import register

# A class that the model is sure of would take every label: its step is kept above this share.
_LEAST_STEP = 1e-3

_LLBG = "Gat and Sharif, AISec 2024"


@dataclass(frozen=True)
class _BiasDecoding(Attack):
    """What EBI and LLBG share: LLG's decoding of the bias gradient."""

    observes: ClassVar = frozenset({Observed.BIAS_GRADIENT})
    calibrated_by: ClassVar = ()

    @abstractmethod
    def _impact(self, bias: Array, labels: Array, steps: int, calibration: Calibration) -> Array:
        """Return what one more label adds to a class's entry, [N, 1] or [N, C]."""

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        bias = float64(required(observations.bias_gradient, "bias gradient"))
        labels = column(observations.labels, bias)
        impact = self._impact(bias, labels, observations.local_steps, calibration)
        return LabelCounts(
            decode(bias, impact, array_namespace(bias).zeros_like(bias), observations.labels)
        )


@register
@dataclass(frozen=True)
class EBI(_BiasDecoding):
    """LLG on the bias gradient: the impact is the sum of its negative entries over the labels."""

    name: ClassVar[str] = "ebi"
    title: ClassVar[str] = "EBI"
    knowledge: ClassVar[Knowledge] = Knowledge.GRADIENTS
    source: ClassVar[str] = 'Geiping, breaching 2022 ("bias-corrected")'

    @override
    def _impact(self, bias: Array, labels: Array, steps: int, calibration: Calibration) -> Array:
        xp = array_namespace(bias)
        return xp.sum(xp.clip(bias, max=0.0), axis=1, keepdims=True) / labels


@register
@dataclass(frozen=True)
class LLBG(_BiasDecoding):
    """EBI with the impact that theory gives: a label takes ``1 / B`` less the model's confidence.

    The paper also lowers all entries by E / C before the second step. A constant decides nothing
    there, and it is left out.

    Attributes
    ----------
    confidence
        The model's mean confidence in a sample's own class: 0 stands for an untrained model; the
        paper's LLBG with a constant has 0.5, 0.7 and 0.9.
    """

    confidence: Annotated[float, Field(ge=0, lt=1)] = 0.0

    name: ClassVar[str] = "llbg"
    title: ClassVar[str] = "LLBG"
    knowledge: ClassVar[Knowledge] = Knowledge.GRADIENTS
    source: ClassVar[str] = _LLBG

    @override
    def _impact(self, bias: Array, labels: Array, steps: int, calibration: Calibration) -> Array:
        return (self.confidence - 1) * steps / labels


@register
@dataclass(frozen=True)
class LLBGPlus(_BiasDecoding):
    """LLBG with each class's confidence as the model has it on the class's auxiliary samples."""

    name: ClassVar[str] = "llbg_plus"
    title: ClassVar[str] = "LLBG+"
    knowledge: ClassVar[Knowledge] = Knowledge.AUXILIARY
    source: ClassVar[str] = _LLBG
    calibration_arrays: ClassVar = {"confidence": (("class",), "f8")}

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        means = class_means(adversary.on_auxiliary())
        return {"confidence": np.diagonal(means.posterior)[None, :].copy()}

    @override
    def _impact(self, bias: Array, labels: Array, steps: int, calibration: Calibration) -> Array:
        share = 1 - given(calibration["confidence"], bias)
        return -array_namespace(bias).clip(share, min=_LEAST_STEP) * steps / labels
