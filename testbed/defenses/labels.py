"""Defences that train on other labels than the samples have.

The truth that attacks are scored against stays the samples' own labels.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import pydantic
from numpy.typing import NDArray
from typing_extensions import override

from testbed.defenses.base import LabelDefense, Share, Targets
from testbed.defenses.registry import register
from testbed.errors import UserError

Counts = NDArray[np.float64]

# Where the inverse and the Beta distribution are still numbers.
Budget = Annotated[float, pydantic.Field(ge=1e-6, le=700)]
Shape = Annotated[float, pydantic.Field(ge=1e-3, le=1e6)]

# Of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): the increment, and its mixing function's
# shifts and multipliers.
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MIX = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
_LAST_SHIFT = np.uint64(31)

# The responses' noise counts for as much more than it is on average. Measured: with 1, balanced
# labels lose up to 0.04 of success at epsilon 1; with more, unbalanced ones gain less.
_CAUTION = 1.3


@register
@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(LabelDefense):
    """Moves a share of every label to all classes alike: ``y' = (1 - epsilon) y + epsilon / C``.

    The counts behind the gradient are ``(1 - epsilon) lambda + N epsilon / C``, which is inverted.

    Attributes
    ----------
    epsilon
        The share, in [0, 1).
    """

    epsilon: Share

    name: ClassVar[str] = "label_smoothing"
    title: ClassVar[str] = "Label smoothing"
    source: ClassVar[str] = "Szegedy et al., CVPR 2016"
    adaptation: ClassVar[str] = (
        "Subtracts the uniform share from the counts, and scales up what is left."
    )

    @override
    def transform(
        self, targets: Targets, samples: NDArray[np.int64], rng: np.random.Generator, seed: int
    ) -> Targets:
        own = targets.probabilities
        smooth = (1 - self.epsilon) * own + self.epsilon / own.shape[1]
        return replace(targets, probabilities=smooth.astype(np.float32))

    @override
    def restore(self, counts: Counts, labels: NDArray[np.int64]) -> Counts:
        uniform = labels[:, None] * (self.epsilon / counts.shape[1])
        restored: Counts = (counts - uniform) / (1 - self.epsilon)
        return restored


@register
@dataclass(frozen=True, kw_only=True)
class Mixup(LabelDefense):
    """Trains on mixtures of two samples of the batch: ``lam x_i + (1 - lam) x_j``, labels alike.

    One ``lam ~ Beta(alpha, alpha)`` per batch, and j a random permutation of i, as in the authors'
    code. Every sample is then mixed in twice, with weights lam and 1 - lam, so that the batch's
    label distributions sum to ``lam n + (1 - lam) n = n``: exactly the counts of its labels.
    It hides nothing from an attack on counts, which only sees other posteriors.

    Attributes
    ----------
    alpha
        Of the Beta distribution, in [0.001, 1e6]: small for mixtures that are almost one of the
        two, 1 for a uniform weight, large for halves.
    """

    alpha: Shape

    name: ClassVar[str] = "mixup"
    title: ClassVar[str] = "mixup"
    source: ClassVar[str] = "Zhang et al., ICLR 2018"

    @override
    def transform(
        self, targets: Targets, samples: NDArray[np.int64], rng: np.random.Generator, seed: int
    ) -> Targets:
        if targets.partner is not None:
            raise UserError(
                "defence 'mixup': found samples that are mixed already, expected it once in a list"
                " of defences; remove one of them"
            )
        own = targets.probabilities
        share = rng.beta(self.alpha, self.alpha)
        partner = rng.permutation(len(own))
        mixed = share * own + (1 - share) * own[partner]
        return Targets(
            mixed.astype(np.float32), partner, np.full(len(own), share, dtype=np.float32)
        )


@register
@dataclass(frozen=True, kw_only=True)
class RandomisedResponse(LabelDefense):
    """Keeps a label with probability p and else takes one of the others, all alike.

    ``p = e^epsilon / (e^epsilon + C - 1)`` and ``q = (1 - p) / (C - 1)`` for each other label make
    one draw epsilon-differentially private for the label. Behind the gradient are counts of mean
    ``(p - q) lambda + N q``; their inverse is unbiased, with an error that grows as 1/(p - q).

    A label distribution that an earlier defence left is shifted cyclically over the classes, which
    moves a single label as described. List this one first: only then is the promise kept.

    Attributes
    ----------
    epsilon
        Of the label's privacy, in [1e-6, 700].
    memoise
        Whether a client draws once per sample and remembers: epsilon then holds for any number of
        rounds. Else it draws anew in every batch, each of which costs another epsilon, and the
        error averages out over rounds.
    """

    epsilon: Budget
    memoise: bool = True

    name: ClassVar[str] = "randomised_response"
    title: ClassVar[str] = "Randomised response"
    source: ClassVar[str] = "Warner 1965; Ghazi et al., NeurIPS 2021"
    adaptation: ClassVar[str] = (
        "Subtracts from the counts what other labels turn into, and scales up what is left."
    )

    @property
    @override
    def accumulates(self) -> bool:
        return not self.memoise

    def probabilities(self, classes: int) -> tuple[float, float]:
        """Return p, that a label is kept, and q, of each other label."""
        other = float(np.exp(-self.epsilon))
        whole = 1 + (classes - 1) * other
        return 1 / whole, other / whole

    @override
    def transform(
        self, targets: Targets, samples: NDArray[np.int64], rng: np.random.Generator, seed: int
    ) -> Targets:
        own = targets.probabilities
        rows, classes = own.shape
        draws = _remembered(samples, seed) if self.memoise else rng.random(rows)
        kept, other = self.probabilities(classes)
        # From p on, each other label has an interval of length q.
        beyond = np.clip(np.floor((draws - kept) / other), 0, classes - 2)
        shift = np.where(draws < kept, 0, 1 + beyond.astype(np.int64))
        from_class = (np.arange(classes) - shift[:, None]) % classes
        return replace(targets, probabilities=np.take_along_axis(own, from_class, axis=1))

    @override
    def restore(self, counts: Counts, labels: NDArray[np.int64]) -> Counts:
        """Scale the counts away from even ones: by up to 1/(p - q), the unbiased inverse.

        By as much less as the responses' noise makes up more of what they differ by (as James and
        Stein shrink a noisy mean), and never less than 1, the counts as they are.
        """
        classes = counts.shape[1]
        kept, other = self.probabilities(classes)
        # p - q, without the loss of digits.
        difference = -np.expm1(-self.epsilon) * kept
        total = labels[:, None].astype(np.float64)
        away = counts - total / classes
        square = (away**2).sum(axis=1, keepdims=True)
        noise = total * (kept * (1 - kept) + (classes - 1) * other * (1 - other))
        signal = 1 - np.divide(
            _CAUTION * noise, square, out=np.ones_like(square), where=square > _CAUTION * noise
        )
        restored: Counts = total / classes + away * np.maximum(signal / difference, 1)
        return restored


def _remembered(samples: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """Return one number in [0, 1) per sample, float64 [B], by its index and the seed alone.

    Output number ``index + 1`` of SplitMix64, whose state advances by addition, so that any
    output is had without those before it.
    """
    state = np.uint64(seed) + (samples.astype(np.uint64) + np.uint64(1)) * _INCREMENT
    for shift, multiplier in _MIX:
        state = (state ^ (state >> shift)) * multiplier
    state ^= state >> _LAST_SHIFT
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
