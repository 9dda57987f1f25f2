"""iLRG: counts from class-wise features and posteriors (Ma et al., ICLR 2023)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from array_api_compat import array_namespace, device
from typing_extensions import override

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
from testbed.attacks.registry import register
from testbed.attacks.rounding import largest_remainder

# The published code stands this in for a bias gradient of zero, and lets no quotient of two
# numbers differ from that of their mantissas by more than so many decimal orders.
_ZERO, _ORDERS = 1e-64, 10.0


@register
@dataclass(frozen=True)
class ILRG(Attack):
    """Solves for the counts, as a class's weight gradient over its bias gradient is its feature.

    Where samples of other classes have a small posterior in class c, ``h_c = Wg[c] / b_c`` is the
    mean feature of the samples of class c, and ``P_c = softmax(W h_c + b)`` their posterior. The
    counts then solve ``sum_c lambda_c = N`` and ``sum_c lambda_c (P_c[i] - 1[c = i]) = N b_i``.

    Attributes
    ----------
    variant
        ``corrected`` rounds the least-squares solution by the shared rule. ``released`` rounds as
        the published code does: each entry to the nearest integer, and to 0 where it is negative
        or more than N; where these do not sum to N, the shared rule scales them to it. It also
        divides as that code does, which differs where the bias gradient is zero, or so small that
        the quotient's exponent is cut.
    estimate
        Take ``P_c = 1/C``, the posterior of an untrained model, in place of the class-wise one.
    """

    variant: Literal["corrected", "released"] = "corrected"
    estimate: bool = False

    name: ClassVar[str] = "ilrg"
    title: ClassVar[str] = "iLRG"
    knowledge: ClassVar[Knowledge] = Knowledge.MODEL
    source: ClassVar[str] = "Ma et al., ICLR 2023 (OpenReview FIrQfNSOoTr)"
    observes: ClassVar = frozenset({Observed.WEIGHT_GRADIENT, Observed.BIAS_GRADIENT})
    calibrated_by: ClassVar = ()
    calibration_arrays: ClassVar = {
        "weight": (("class", "feature"), "f8"),
        "bias": (("class",), "f8"),
    }

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        return head_arrays(adversary)

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        gradient = finite(observations.bias_gradient)
        xp = array_namespace(gradient)
        labels = xp.astype(observations.labels, xp.float64)[:, None]
        classes = gradient.shape[1]
        # The features are quotients, the same for a sum over local steps as for a mean.
        if self.estimate:
            shape = (*gradient.shape, classes)
            posterior = xp.full(shape, 1 / classes, dtype=xp.float64, device=device(gradient))
        else:
            weight = like(calibration["weight"], gradient)
            bias = like(calibration["bias"], gradient)
            logits = self._logits(finite(observations.weight_gradient), gradient, weight)
            posterior = softmax(logits + bias[:, None, :])
        # Rows: the sum of the counts, then one equation for each class.
        change = xp.matrix_transpose(posterior) - xp.eye(
            classes, dtype=xp.float64, device=device(gradient)
        )
        system = xp.concat([xp.ones_like(change[:, :1, :]), change], axis=1)
        known = xp.concat([xp.ones_like(labels), gradient / observations.local_steps], axis=1)
        inverse = xp.linalg.pinv(system)
        scores = xp.matmul(inverse, (labels * known)[:, :, None])[:, :, 0]
        if self.variant == "corrected":
            return LabelCounts(largest_remainder(scores, observations.labels), scores)
        rounded = xp.round(xp.clip(scores, min=0.0))
        rounded = xp.where(rounded > labels, xp.zeros_like(rounded), rounded)
        return LabelCounts(largest_remainder(rounded, observations.labels), scores)

    def _logits(self, weight_gradient: Array, bias_gradient: Array, weight: Array) -> Array:
        """Return ``W h_c`` for each class c, [N, C, C]."""
        xp = array_namespace(bias_gradient)
        zero = bias_gradient == 0
        if self.variant == "released":
            divisor = xp.where(zero, xp.full_like(bias_gradient, _ZERO), bias_gradient)
            features = _released_quotient(weight_gradient, divisor[:, :, None])
            return xp.matmul(features, xp.matrix_transpose(weight))
        # A class without a bias gradient says nothing of its feature: take the feature 0.
        # Dividing behind the product saves a pass over all of the weight gradient.
        products = xp.matmul(weight_gradient, xp.matrix_transpose(weight))
        divisor = xp.where(zero, xp.ones_like(bias_gradient), bias_gradient)[:, :, None]
        return xp.where(zero[:, :, None], xp.zeros_like(products), products / divisor)


def _released_quotient(numerator: Array, divisor: Array) -> Array:
    """Divide as the published code does, with a bounded difference of decimal exponents."""
    xp = array_namespace(numerator)
    quotient = numerator / divisor
    size = xp.where(numerator == 0, xp.ones_like(numerator), xp.abs(numerator))
    orders = xp.floor(xp.log10(size)) - xp.floor(xp.log10(xp.abs(divisor)))
    return quotient * 10.0 ** (xp.clip(orders, min=-_ORDERS, max=_ORDERS) - orders)


def head_arrays(adversary: Adversary) -> Calibration:
    """Return the last layer as a calibration: ``weight`` [1, C, D] and ``bias`` [1, C]."""
    head = adversary.head()
    return {"weight": head.weight[None], "bias": head.bias[None]}


def finite(array: Array) -> Array:
    """Return float64 values, with 0 for those that are not finite."""
    xp = array_namespace(array)
    array = xp.astype(array, xp.float64)
    return xp.where(xp.isfinite(array), array, xp.zeros_like(array))


def softmax(logits: Array) -> Array:
    """Return the softmax over the last axis."""
    xp = array_namespace(logits)
    odds = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    return odds / xp.sum(odds, axis=-1, keepdims=True)


def like(array: Array, other: Array) -> Array:
    """Return a calibration array as finite float64 of another array's library, on its device."""
    xp = array_namespace(other)
    return finite(xp.asarray(array, dtype=xp.float64, device=device(other)))
