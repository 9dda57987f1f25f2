"""Labels from signs and orders in the weight gradient: iDLG and GradInversion.

Where features are not negative, a sample adds to the rows of the classes that it is not of, and
takes from its own: rows with negative entries belong to classes in the batch.
"""

from dataclasses import dataclass
from typing import ClassVar

from array_api_compat import array_namespace, device
from typing_extensions import override

from testbed.attacks.base import (
    Answer,
    Array,
    Assumption,
    Attack,
    Calibration,
    Knowledge,
    LabelCounts,
    LabelPresence,
    Observations,
    Observed,
)
from testbed.attacks.decoding import ranks
from testbed.attacks.estimation import float64, required
from testbed.attacks.registry import register

_IDLG = "Zhao et al. 2020 (arXiv 2001.02610)"
_GRADINVERSION = "Yin et al., CVPR 2021 (arXiv 2104.07586)"


@dataclass(frozen=True)
class _Uncalibrated(Attack):
    """What the attacks here share."""

    knowledge: ClassVar[Knowledge] = Knowledge.GRADIENTS
    assumes: ClassVar = frozenset({Assumption.NON_NEGATIVE_FEATURES})
    calibrated_by: ClassVar = ()


@register
@dataclass(frozen=True)
class IDLG(_Uncalibrated):
    """The class with the smallest row sum: of a single sample's gradient only its label's falls.

    All labels of an update are inferred to be that class.
    """

    name: ClassVar[str] = "idlg"
    title: ClassVar[str] = "iDLG"
    source: ClassVar[str] = _IDLG
    assumes: ClassVar = frozenset({Assumption.ONE_LABEL, Assumption.NON_NEGATIVE_FEATURES})

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        g = observations.row_sums
        xp = array_namespace(g)
        classes = xp.arange(g.shape[1], device=device(g))[None, :]
        chosen = classes == xp.argmin(g, axis=1, keepdims=True)
        return LabelCounts(xp.astype(chosen, xp.int64) * observations.labels[:, None])


@register
@dataclass(frozen=True)
class IDLGPresence(_Uncalibrated):
    """Every class with a negative row sum: no class outside the batch has one."""

    name: ClassVar[str] = "idlg_presence"
    title: ClassVar[str] = "iDLG, presence"
    source: ClassVar[str] = f"{_IDLG}, extended to batches by Ma et al., ICLR 2023"
    answers: ClassVar = Answer.PRESENCE

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelPresence:
        g = float64(observations.row_sums)
        return LabelPresence(g < 0, -g)


@dataclass(frozen=True)
class _RowMinimum(_Uncalibrated):
    """What GradInversion's two answers share: the smallest entry of each class's row."""

    observes: ClassVar = frozenset({Observed.WEIGHT_GRADIENT})

    def _minimum(self, observations: Observations) -> Array:
        weight = required(observations.weight_gradient, "weight gradient")
        return float64(array_namespace(weight).min(weight, axis=2))


@register
@dataclass(frozen=True)
class GradInversionLabels(_RowMinimum):
    """The N classes with the smallest entries: one feature is enough to give a class away.

    The labels are taken to be distinct. Where there are more than classes, every class gets
    floor(N / C) of them, and those left over go by the order.
    """

    name: ClassVar[str] = "gradinversion"
    title: ClassVar[str] = "GradInversion"
    source: ClassVar[str] = _GRADINVERSION
    assumes: ClassVar = frozenset({Assumption.DISTINCT_LABELS, Assumption.NON_NEGATIVE_FEATURES})

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        smallest = self._minimum(observations)
        xp = array_namespace(smallest)
        labels, classes = observations.labels[:, None], smallest.shape[1]
        extra = ranks(smallest) < labels % classes
        return LabelCounts(labels // classes + xp.astype(extra, xp.int64))


@register
@dataclass(frozen=True)
class GradInversionPresence(_RowMinimum):
    """Every class with a negative entry in its row: samples of other classes only add to it."""

    name: ClassVar[str] = "gradinversion_presence"
    title: ClassVar[str] = "GradInversion, presence"
    source: ClassVar[str] = f"{_GRADINVERSION}, extended by Ma et al., ICLR 2023"
    answers: ClassVar = Answer.PRESENCE

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelPresence:
        smallest = self._minimum(observations)
        return LabelPresence(smallest < 0, -smallest)
