"""Defences that leave entries of an update out."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from testbed.attacks.base import Observations
from testbed.defenses.base import Known, NonNegative, Share, Sparsifier, Tensors, Vector
from testbed.defenses.observed import (
    bias_gradient,
    imitated,
    weight_gradient,
    with_last_layer,
)
from testbed.defenses.registry import register
from testbed.defenses.rows import balanced, filled_from_rows, row_sums
from testbed.defenses.scale import scaled

Positions = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class _Sparse(Sparsifier):
    """What is left out of an update is left out of simulated ones, in a client's first round."""

    @override
    def imitate(self, simulated: Observations, rng: np.random.Generator) -> Observations:
        def change(vector: Vector, tensors: Tensors) -> Vector:
            sent = np.zeros_like(vector)
            positions = self.select(vector, tensors, rng)
            sent[positions] = vector[positions] * np.float32(self.factor)
            return sent

        return imitated(simulated, change, self.at)


@dataclass(frozen=True, kw_only=True)
class _ByMagnitude(_Sparse):
    """Leaves out what is small, so that one update has nothing to be undone: it is of either sign.

    The bias gradient alone is made up of few entries, and what it lacks, the row sums tell.
    """

    adaptation: ClassVar[str] = (
        "Learns from simulated updates that lack as much, and reads what the bias gradient lacks "
        "from the row sums; with error feedback, adds up a client's updates over rounds instead."
    )

    @override
    def undo(self, observations: Observations, known: Known) -> Observations:
        """Fill in the bias gradient, unless what was left out before is in it too."""
        bias = bias_gradient(observations)
        if bias is None or self.error_feedback:
            return observations
        seen = observations.weight_gradient is not None
        bias = filled_from_rows(bias, row_sums(observations), keep_empty=seen)
        return with_last_layer(observations, known.tensors, bias=bias)


@register
@dataclass(frozen=True, kw_only=True)
class TopK(_ByMagnitude):
    """Send the entries of the largest magnitude.

    Of n entries, the ``(1 - theta) n`` largest, rounded, and at least one: of the whole update, or
    of each tensor. Of equal magnitudes the first are sent; NaN counts as infinite.

    Attributes
    ----------
    theta
        Share that is left out.
    """

    theta: Share

    name: ClassVar[str] = "top_k"
    title: ClassVar[str] = "Top-k"
    source: ClassVar[str] = "Aji and Heafield, EMNLP 2017; Stich et al., NeurIPS 2018"

    @override
    def select(self, vector: Vector, tensors: Tensors, rng: np.random.Generator) -> Positions:
        return _largest(vector, tensors.bounds(self.scope), 1 - self.theta)


@register
@dataclass(frozen=True, kw_only=True)
class DeepGradientCompression(_ByMagnitude):
    """Top-k whose remainder is kept by the client and sent later, with momentum as an option.

    With a momentum m, the client accumulates ``u = m u + g`` and ``v = v + u`` and sends the
    largest entries of v, where it sets u and v to 0 (momentum correction and factor masking).
    Without, it is top-k with error feedback. There is no warm-up; clipping is a defence of its own.

    Attributes
    ----------
    theta
        Share that is left out.
    momentum
        m.
    """

    theta: Share = 0.99
    momentum: Share = 0.0
    error_feedback: Literal[True] = True

    name: ClassVar[str] = "dgc"
    title: ClassVar[str] = "Deep Gradient Compression"
    source: ClassVar[str] = "Lin et al., ICLR 2018"
    adaptation: ClassVar[str] = (
        "Adds up a client's updates over rounds: what was left out comes later."
    )

    @override
    def select(self, vector: Vector, tensors: Tensors, rng: np.random.Generator) -> Positions:
        return _largest(vector, tensors.bounds(self.scope), 1 - self.theta)


@register
@dataclass(frozen=True, kw_only=True)
class Threshold(_ByMagnitude):
    """Send the entries with a magnitude of at least a threshold, which may be none.

    Attributes
    ----------
    threshold
        In the unit of the gradient. NaN is above every threshold.
    """

    threshold: NonNegative

    name: ClassVar[str] = "threshold"
    title: ClassVar[str] = "Threshold"
    source: ClassVar[str] = "Strom, Interspeech 2015"

    @override
    def select(self, vector: Vector, tensors: Tensors, rng: np.random.Generator) -> Positions:
        return np.flatnonzero(~(np.abs(vector) < self.threshold))


@dataclass(frozen=True, kw_only=True)
class _AtRandom(_Sparse):
    """Leaves entries out whatever they are."""

    adaptation: ClassVar[str] = (
        "Divides by the share that is sent, reads what the bias gradient lacks from the row sums, "
        "and adds up a client's updates over rounds."
    )

    @property
    @override
    def accumulates(self) -> bool:
        return True

    @property
    @abstractmethod
    def sent(self) -> float:
        """The probability of each entry to be sent."""

    @override
    def undo(self, observations: Observations, known: Known) -> Observations:
        """Divide by the share that is sent, and fill in the bias gradient.

        What is sent once is exact, and what the bias gradient lacks, the row sums tell: better than
        to divide by the share, which is right on average alone. A sum of several updates, or of
        steps with a draw each, lacks less than one draw leaves out.
        """
        if self.error_feedback:
            return observations
        number = len(observations.row_sums)
        bare = scaled(observations, np.full(number, 1 / self.factor), known.tensors)
        whole = scaled(bare, np.full(number, 1 / self.sent), known.tensors)
        seen = observations.weight_gradient is not None
        rows = row_sums(whole) if seen else balanced(row_sums(whole))
        weight, bias = weight_gradient(bare, known.tensors), bias_gradient(bare)
        if bias is not None:
            shown = bias[..., None] if weight is None else weight
            expected = (self._expected(1, shown) + self._expected(2, shown)) / 2
            once = (_kept(shown) < expected) | (observations.local_steps == 1)
            exact = filled_from_rows(bias, rows, keep_empty=seen)
            bias = np.where(once[:, None], exact, bias / self.sent)
        return with_last_layer(whole, known.tensors, bias=bias, row_sums=rows)

    def _expected(self, draws: int, shown: NDArray[np.float64]) -> float:
        """Return what `_kept` is on average after that many draws."""
        lost = (1 - self.sent) ** draws
        return float((1 - lost) / (1 - lost ** shown.shape[1]))


@register
@dataclass(frozen=True, kw_only=True)
class RandomK(_AtRandom):
    """Send entries that are drawn without regard to what they are.

    Of n entries, ``(1 - theta) n``, rounded up or down at random, so that each is sent with the
    probability ``1 - theta`` precisely: of the whole update, or of each tensor.

    Attributes
    ----------
    theta
        Share that is left out.
    unbiased
        Whether what is sent is divided by ``1 - theta``.
    """

    theta: Share
    unbiased: bool = False

    name: ClassVar[str] = "random_k"
    title: ClassVar[str] = "Random-k"
    source: ClassVar[str] = "Konecny et al. 2016; Stich et al., NeurIPS 2018"

    @property
    @override
    def sent(self) -> float:
        return 1 - self.theta

    @property
    @override
    def factor(self) -> float:
        return 1 / self.sent if self.unbiased else 1.0

    @override
    def select(self, vector: Vector, tensors: Tensors, rng: np.random.Generator) -> Positions:
        bounds = tensors.bounds(self.scope)
        chosen = []
        for start, stop in pairwise(bounds):
            size = int(stop - start)
            exact = self.sent * size
            number = min(math.floor(exact) + int(rng.random() < exact % 1), size)
            chosen.append(start + np.sort(rng.choice(size, number, replace=False, shuffle=False)))
        return np.concatenate(chosen)


@register
@dataclass(frozen=True, kw_only=True)
class GradientDropout(_AtRandom):
    """Leave each entry out with the same probability, by itself; the scope makes no difference.

    Attributes
    ----------
    p
        The probability.
    rescale
        Whether what is sent is divided by ``1 - p``.
    """

    p: Share
    rescale: bool = False

    name: ClassVar[str] = "gradient_dropout"
    title: ClassVar[str] = "Gradient dropout"
    source: ClassVar[str] = "Tseng et al. 2020 (arXiv 2012.00316)"

    @property
    @override
    def sent(self) -> float:
        return 1 - self.p

    @property
    @override
    def factor(self) -> float:
        return 1 / self.sent if self.rescale else 1.0

    @override
    def select(self, vector: Vector, tensors: Tensors, rng: np.random.Generator) -> Positions:
        return np.flatnonzero(rng.random(vector.size, np.float32) >= np.float32(self.p))


@register
@dataclass(frozen=True, kw_only=True)
class ReferenceCompression(Sparsifier):
    """The LLG reference code's "compression", which does not compress gradients: it mixes up lists.

    It ranks the C classes by ``|g_c|``, the row sums of the last layer's weight, and leaves out the
    whole parameter tensor number i where class i is among the ``int(C theta)`` smallest; tensors
    from number C on are always sent. Whether the last layer is sent thus depends on the labels
    alone that happen to have the numbers of its tensors. It is here to repeat the paper's results.
    In the reference, theta = 0 leaves everything out (an index of -1); here, nothing.

    It is not imitated on simulated updates, which are those of a last layer without its number.

    Attributes
    ----------
    theta
        Share of the classes.
    """

    theta: Share

    name: ClassVar[str] = "reference_compression"
    title: ClassVar[str] = "Reference code's mistaken compression"
    source: ClassVar[str] = "code of Wainakh et al., PoPETs 2022(2)"
    adaptation: ClassVar[str] = (
        "Where one of the last layer's two tensors is missing, puts the other in its place."
    )

    @override
    def select(self, vector: Vector, tensors: Tensors, rng: np.random.Generator) -> Positions:
        rows = vector[tensors.weight].reshape(tensors.classes, -1).sum(axis=1, dtype=np.float64)
        smallest = np.argsort(np.abs(rows), kind="stable")[: int(tensors.classes * self.theta)]
        sent = np.ones(vector.size, bool)
        for number in smallest[smallest < len(tensors.names)]:
            sent[tensors.offsets[number] : tensors.offsets[number + 1]] = False
        return np.flatnonzero(sent)

    @override
    def undo(self, observations: Observations, known: Known) -> Observations:
        """Put the bias gradient in place of a missing weight gradient, and the other way round.

        Row sums are about the bias gradient times the sum of the features, which is not known here.
        It is taken for 1 where the weight is missing. Where the bias is, it is the row sums times
        the largest factor that leaves no class a negative count, as in the attack ``scale_free``.
        """
        bias, weight = bias_gradient(observations), weight_gradient(observations, known.tensors)
        if bias is None:
            return observations
        rows = np.asarray(observations.row_sums, np.float64)
        positive = rows > 0
        ratio = known.posterior / np.where(positive, rows / observations.local_steps, 1.0)
        scale = np.where(positive, ratio, np.inf).min(axis=1, keepdims=True)
        guess = rows * np.where(np.isfinite(scale), scale, 1.0)
        no_weight, no_bias = np.all(rows == 0, axis=1), np.all(bias == 0, axis=1)
        if weight is not None:
            even = np.broadcast_to(bias[..., None] / weight.shape[2], weight.shape)
            weight = np.where(no_weight[:, None, None], even, weight)
        return with_last_layer(
            observations,
            known.tensors,
            weight=weight,
            bias=np.where(no_bias[:, None], guess, bias),
            row_sums=np.where(no_weight[:, None], bias, rows),
        )


def _largest(vector: Vector, bounds: NDArray[np.int64], share: float) -> Positions:
    """Return the positions of the share of each part with the largest magnitudes, ascending."""
    magnitude = np.abs(vector)
    np.nan_to_num(magnitude, copy=False, nan=np.inf, posinf=np.inf)
    chosen = []
    for start, stop in pairwise(bounds):
        part = magnitude[start:stop]
        number = max(round(share * part.size), 1) if part.size else 0
        if number == part.size:
            chosen.append(np.arange(start, stop))
            continue
        least = np.partition(part, part.size - number)[part.size - number]
        sent = np.greater(part, least)
        missing = number - int(np.count_nonzero(sent))
        sent[np.flatnonzero(part == least)[:missing]] = True
        chosen.append(start + np.flatnonzero(sent))
    return np.concatenate(chosen)


def _kept(gradient: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of entries that are not 0, in columns that are not all 0, float64 [N]."""
    there = gradient != 0
    columns = np.maximum(there.any(axis=1).sum(axis=1), 1)
    share: NDArray[np.float64] = there.sum(axis=(1, 2)) / (columns * there.shape[1])
    return share
