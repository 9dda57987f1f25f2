"""Label Leakage from Gradients: LLG, LLG* and LLG+ (Wainakh et al., PoPETs 2022).

In the last layer's weight gradient, the row sum of a class is about ``offset + impact * count``
(property 2); where features are not negative, a negative row sum shows that the class is present
(property 1). The variants differ in what the impact and the offset are estimated from.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from array_api_compat import array_namespace, device
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
    Outputs,
)
from testbed.attacks.decoding import decode, decode_released
from testbed.attacks.estimation import column, float64
from testbed.attacks.registry import register

_PAPER = "Wainakh et al., PoPETs 2022(2)"


@dataclass(frozen=True)
class _LLG(Attack):
    """What all variants share."""

    source: ClassVar[str] = _PAPER
    assumes: ClassVar = frozenset({Assumption.NON_NEGATIVE_FEATURES})
    calibrated_by: ClassVar[tuple[str, ...]] = ()


@register
@dataclass(frozen=True)
class LLG(_LLG):
    """LLG with the shared gradients alone: the impact is estimated from the negative row sums.

    Attributes
    ----------
    variant
        The paper's decoding, or breaching's ("wainakh-simple"), whose second step is wrong: see
        `testbed.attacks.decoding.decode_released`.
    """

    variant: Literal["corrected", "released"] = "corrected"

    name: ClassVar[str] = "llg"
    title: ClassVar[str] = "LLG"
    knowledge: ClassVar[Knowledge] = Knowledge.GRADIENTS

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        """Infer with ``m = (1 + 1/C) / N * (sum of the negative row sums)`` and no offset."""
        g = float64(observations.row_sums)
        xp = array_namespace(g)
        negative = xp.sum(xp.clip(g, max=0.0), axis=1)
        impact = negative * (1 + 1 / g.shape[1]) / column(observations.labels, g)[:, 0]
        if self.variant == "released":
            return LabelCounts(decode_released(g, impact, observations.labels))
        return LabelCounts(decode(g, impact, xp.zeros_like(g), observations.labels))


@dataclass(frozen=True)
class _CalibratedLLG(_LLG):
    """What LLG* and LLG+ share: impact and offset come from the global model.

    Attributes
    ----------
    scaling
        How they apply to an update of E local steps, which is a sum over the steps. In the model
        behind the attack a sum has the same impact and E times the offset: ``consistent``. The
        paper's code divides the impact by E and leaves the offset alone: ``reference``.
    """

    scaling: Literal["consistent", "reference"] = "consistent"

    calibration_arrays: ClassVar = {"impact": ((), "f8"), "offset": (("class",), "f8")}

    @abstractmethod
    def _outputs(self, adversary: Adversary) -> Outputs: ...

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        outputs = self._outputs(adversary)
        pure = _pure_row_sums(outputs)
        classes = adversary.classes
        own = np.trace(pure)
        impact = own / (classes * adversary.batch_size) * (1 + 1 / classes)
        offset = (pure.sum(axis=0) - np.diagonal(pure)) / max(classes - 1, 1)
        return {"impact": np.array([impact]), "offset": offset[None, :]}

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        g = float64(observations.row_sums)
        xp = array_namespace(g)
        impact = xp.asarray(calibration["impact"], dtype=g.dtype, device=device(g))
        offset = xp.asarray(calibration["offset"], dtype=g.dtype, device=device(g))
        if self.scaling == "reference":
            impact = impact / observations.local_steps
        else:
            offset = offset * observations.local_steps
        return LabelCounts(decode(g, impact, offset, observations.labels))


@register
@dataclass(frozen=True)
class LLGStar(_CalibratedLLG):
    """LLG with the model: impact and offset come from dummy inputs.

    Attributes
    ----------
    dummy
        The inputs: all zero, all one, or uniform in [0, 1).
    samples
        How many random inputs stand for a class-pure batch; the others are all alike.
    """

    dummy: Literal["zeros", "ones", "random"] = "zeros"
    samples: Annotated[int, Field(ge=1, le=100_000)] = 100

    name: ClassVar[str] = "llg_star"
    title: ClassVar[str] = "LLG*"
    knowledge: ClassVar[Knowledge] = Knowledge.MODEL
    calibrated_by: ClassVar = ("dummy", "samples")

    @override
    def _outputs(self, adversary: Adversary) -> Outputs:
        return adversary.on_dummy(self.dummy, self.samples if self.dummy == "random" else 1)


@register
@dataclass(frozen=True)
class LLGPlus(_CalibratedLLG):
    """LLG with the model and auxiliary samples of every class."""

    name: ClassVar[str] = "llg_plus"
    title: ClassVar[str] = "LLG+"
    knowledge: ClassVar[Knowledge] = Knowledge.AUXILIARY

    @override
    def _outputs(self, adversary: Adversary) -> Outputs:
        return adversary.on_auxiliary(pure=True)


def _pure_row_sums(outputs: Outputs) -> NDArray[np.float64]:
    """Return the expected row sums of class-pure batches, [class of the batch, class of the row].

    The last layer's gradient of one sample is ``(p - onehot(y)) h^T``, so the mean over batches
    drawn from the samples of a class is the mean over these samples: no backward pass is run, and
    no batch need be drawn. Without labels (dummy inputs) every class is given the same inputs.
    """
    if outputs.labels is None:
        mass = outputs.features.sum(axis=1)
        mean = (outputs.posterior * mass[:, None]).mean(axis=0)
        return np.asarray(mean[None, :] - np.eye(len(mean)) * mass.mean())
    means = class_means(outputs)
    return means.weighted - np.diag(means.mass)
