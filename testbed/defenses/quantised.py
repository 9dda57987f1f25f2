"""Defences that send entries of an update with fewer bits."""

from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar

import numpy as np
import pydantic
from numpy.typing import NDArray
from typing_extensions import override

from testbed.attacks.base import Observations
from testbed.defenses.base import Known, Levels, Quantiser, Tensors, Vector
from testbed.defenses.observed import bias_gradient, euclidean_norm, imitated, with_last_layer
from testbed.defenses.registry import register
from testbed.defenses.rows import balanced, merged, row_sums
from testbed.defenses.scale import centred
from testbed.encoding import decoded

_CENTRES = "Projects the last layer's weight onto gradients that sum to 0 over the classes"
_READS = "Reads the bias gradient from the row sums, in which rounding averages out"
# Entries at a time: what is at work stays in the cache.
_BLOCK = 1 << 16
_LARGEST_FLOAT16 = np.float32(np.finfo(np.float16).max)


@dataclass(frozen=True, kw_only=True)
class _Quantised(Quantiser):
    """What an update loses, simulated ones lose too."""

    @override
    def imitate(self, simulated: Observations, rng: np.random.Generator) -> Observations:
        def change(vector: Vector, tensors: Tensors) -> Vector:
            bounds = tensors.bounds(self.scope)
            return decoded(self.quantise(vector, bounds, rng), bounds)

        return imitated(simulated, change, self.at)


@dataclass(frozen=True, kw_only=True)
class _Stochastic(_Quantised):
    """Rounds each magnitude, in units of a level, up or down at random: right on average.

    What is not finite makes its part NaN.
    """

    adaptation: ClassVar[str] = f"{_READS}, and adds up a client's updates over rounds."

    @property
    @override
    def accumulates(self) -> bool:
        return True

    @abstractmethod
    def _scale(self, part: Vector) -> float:
        """Return what the largest level of a part stands for, no less than all its magnitudes."""

    @abstractmethod
    def _levels(self) -> int:
        """Return L."""

    @override
    def quantise(
        self, values: Vector, bounds: NDArray[np.int64], rng: np.random.Generator
    ) -> Levels:
        levels = self._levels()
        with np.errstate(over="ignore"):  # the server sees that it is not finite
            scales = np.array([self._scale(values[i:j]) for i, j in pairwise(bounds)], np.float32)
        codes = np.zeros(values.size, np.int32)
        for scale, (start, stop) in zip(scales, pairwise(bounds), strict=True):
            if scale > 0 and np.isfinite(scale):
                for first in range(start, stop, _BLOCK):
                    block = slice(first, min(first + _BLOCK, stop))
                    codes[block] = _rounded(values[block], scale, levels, rng)
        scales[~np.isfinite(scales)] = np.nan
        return Levels(levels, scales, codes)

    @override
    def undo(self, observations: Observations, known: Known) -> Observations:
        """Balance the row sums, in which rounding averages out, and read the bias gradient there.

        A level is no higher than the smallest entry that shows. Where the weight gradient shows,
        all stays as it is: of what attacks make of it, an entry that is 0 is best left so.
        """
        if observations.weight_gradient is not None:
            return observations
        rows = balanced(row_sums(observations))
        plain = with_last_layer(observations, known.tensors, row_sums=rows)
        bias = bias_gradient(plain)
        if bias is None:
            return plain
        if not known.mass:
            bias = bias - bias.mean(axis=1, keepdims=True)
            return with_last_layer(plain, known.tensors, bias=bias, row_sums=rows)
        level = np.where(bias != 0, np.abs(bias), np.inf).min(axis=1, keepdims=True)
        level = np.where(np.isfinite(level), level, 1.0)
        beyond = np.minimum(np.abs(rows / known.mass), level / 2)
        variance = beyond * (level - beyond)
        return merged(plain, known, variance, variance * abs(known.mass))


@register
@dataclass(frozen=True, kw_only=True)
class QSGD(_Stochastic):
    """Stochastic levels of the Euclidean norm, of the whole update or of each tensor.

    Attributes
    ----------
    levels
        How many beside 0, for each sign.
    """

    levels: Annotated[int, pydantic.Field(ge=1, le=32767)]

    name: ClassVar[str] = "qsgd"
    title: ClassVar[str] = "QSGD"
    source: ClassVar[str] = "Alistarh et al., NeurIPS 2017"

    @override
    def _scale(self, part: Vector) -> float:
        return euclidean_norm(part)

    @override
    def _levels(self) -> int:
        return self.levels


@register
@dataclass(frozen=True, kw_only=True)
class TernGrad(_Stochastic):
    """-1, 0 or 1 times the largest magnitude, stochastic; without the paper's clipping."""

    name: ClassVar[str] = "terngrad"
    title: ClassVar[str] = "TernGrad"
    source: ClassVar[str] = "Wen et al., NeurIPS 2017"

    @override
    def _scale(self, part: Vector) -> float:
        return float(np.abs(part).max(initial=0.0))

    @override
    def _levels(self) -> int:
        return 1


@register
@dataclass(frozen=True, kw_only=True)
class SignSGD(_Quantised):
    """Signs times the mean magnitude, of the whole update or of each tensor; 0 counts as positive.

    With error feedback it is EF-signSGD.
    """

    name: ClassVar[str] = "signsgd"
    title: ClassVar[str] = "signSGD, scaled"
    source: ClassVar[str] = "Bernstein et al., ICML 2018; Karimireddy et al., ICML 2019"
    adaptation: ClassVar[str] = (
        f"{_CENTRES}: where few are negative, these are the larger ones. No magnitude comes back."
    )

    @override
    def quantise(
        self, values: Vector, bounds: NDArray[np.int64], rng: np.random.Generator
    ) -> Levels:
        scales = np.zeros(len(bounds) - 1, np.float32)
        for part, (start, stop) in enumerate(pairwise(bounds)):
            if stop > start:
                scales[part] = np.abs(values[start:stop]).mean(dtype=np.float64)
        codes = np.where(values < 0, np.int32(-1), np.int32(1))
        return Levels(1, scales, codes, signs_only=True)

    @override
    def undo(self, observations: Observations, known: Known) -> Observations:
        """Project the weight gradient onto what sums to 0 over the classes; magnitudes are lost.

        The bias gradient's few signs tell more as they are.
        """
        projected = centred(observations, known.tensors)
        return with_last_layer(projected, known.tensors, bias=bias_gradient(observations))


@register
@dataclass(frozen=True, kw_only=True)
class Float16(_Quantised):
    """Half precision. Finite values beyond its range become the largest within; inf and NaN stay.

    An attacker has nothing to undo: what is lost is below a thousandth of each entry. The scope
    makes no difference.
    """

    name: ClassVar[str] = "float16"
    title: ClassVar[str] = "Half precision"
    source: ClassVar[str] = "Micikevicius et al., ICLR 2018"

    @override
    def quantise(
        self, values: Vector, bounds: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float16]:
        half = np.clip(values, -_LARGEST_FLOAT16, _LARGEST_FLOAT16).astype(np.float16)
        infinite = np.isinf(values)
        half[infinite] = values[infinite]
        return half


def _rounded(
    values: Vector, scale: np.float32, levels: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return values in units of ``scale / levels``, rounded at random, within -L..L."""
    height = np.abs(values) / scale
    height *= levels
    lower = np.floor(height)
    lower += rng.random(values.size, np.float32) < height - lower
    # In float32 the largest may be a little above L.
    np.minimum(lower, levels, out=lower)
    return np.copysign(lower, values)
