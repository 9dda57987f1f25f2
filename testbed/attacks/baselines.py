"""What every success rate is to be read against: guesses without the gradient, and the truth."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray
from typing_extensions import override

from testbed.attacks.base import (
    Adversary,
    Attack,
    Calibration,
    Knowledge,
    LabelCounts,
    Observations,
    Observed,
)
from testbed.attacks.estimation import column, float64, given, mean_bias_gradient, required
from testbed.attacks.registry import register
from testbed.attacks.rounding import largest_remainder


@dataclass(frozen=True)
class _Guess(Attack):
    """What the guesses share: each update has a random stream of its own, whoever else is there."""

    knowledge: ClassVar[Knowledge] = Knowledge.GRADIENTS
    observes: ClassVar = frozenset()
    calibrated_by: ClassVar = ()
    calibration_arrays: ClassVar = {"seed": ((), "u8")}

    @abstractmethod
    def _guess(self, labels: int, classes: int, rng: np.random.Generator) -> NDArray[np.int64]: ...

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        return {"seed": np.array([adversary.seed], dtype=np.uint64)}

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        xp = array_namespace(observations.row_sums)
        rows, classes = observations.row_sums.shape
        seeds = np.broadcast_to(calibration["seed"], (rows,))
        counts = np.empty((rows, classes), np.int64)
        for row, (seed, key, labels) in enumerate(
            zip(seeds, observations.keys, observations.labels, strict=True)
        ):
            sequence = np.random.SeedSequence(int(seed), spawn_key=(int(key),))
            generator = np.random.Generator(np.random.PCG64(sequence))
            counts[row] = self._guess(int(labels), classes, generator)
        return LabelCounts(xp.asarray(counts, device=device(observations.row_sums)))


@register
@dataclass(frozen=True)
class RandomGuess(_Guess):
    """Every label is drawn uniformly from the classes."""

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "Random"
    source: ClassVar[str] = "baseline of Wainakh et al., PoPETs 2022(2)"

    @override
    def _guess(self, labels: int, classes: int, rng: np.random.Generator) -> NDArray[np.int64]:
        return rng.multinomial(labels, np.full(classes, 1 / classes))


@register
@dataclass(frozen=True)
class UniformGuess(_Guess):
    """The labels are spread evenly over the classes; chance says which classes get the rest."""

    name: ClassVar[str] = "uniform"
    title: ClassVar[str] = "Uniform"
    source: ClassVar[str] = "baseline"

    @override
    def _guess(self, labels: int, classes: int, rng: np.random.Generator) -> NDArray[np.int64]:
        each, rest = divmod(labels, classes)
        return each + (rng.permutation(classes) < rest).astype(np.int64)


@register
@dataclass(frozen=True)
class PriorGuess(Attack):
    """The labels are those of the auxiliary samples: the best guess without the gradient."""

    name: ClassVar[str] = "prior"
    title: ClassVar[str] = "Prior"
    knowledge: ClassVar[Knowledge] = Knowledge.AUXILIARY
    source: ClassVar[str] = "baseline"
    observes: ClassVar = frozenset()
    calibrated_by: ClassVar = ()
    calibration_arrays: ClassVar = {"prior": (("class",), "f8")}

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        labels = required(adversary.on_auxiliary().labels, "labels of auxiliary samples")
        counts = np.bincount(labels, minlength=adversary.classes)
        return {"prior": counts[None, :] / max(len(labels), 1)}

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        g = float64(observations.row_sums)
        scores = column(observations.labels, g) * given(calibration["prior"], g)
        return LabelCounts(largest_remainder(scores, observations.labels), scores)


@register
@dataclass(frozen=True)
class Oracle(Attack):
    """The truth, from the mean posterior that the client kept: exact unless a defence bends it.

    ``lambda = N (pbar - b / E)`` holds for every batch. The attack is the testbed's self-test, and
    the upper bound of all that estimate pbar.
    """

    name: ClassVar[str] = "oracle"
    title: ClassVar[str] = "Oracle"
    knowledge: ClassVar[Knowledge] = Knowledge.TRUTH
    source: ClassVar[str] = "identity of the last layer's gradient"
    observes: ClassVar = frozenset({Observed.BIAS_GRADIENT})
    calibrated_by: ClassVar = ()

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        bias = mean_bias_gradient(observations)
        posterior = float64(required(observations.posterior, "mean posterior"))
        scores = column(observations.labels, bias) * (posterior - bias)
        return LabelCounts(largest_remainder(scores, observations.labels), scores)
