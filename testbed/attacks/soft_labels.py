"""Soft labels of a single sample, by its rank-one gradient (Wang et al., ICLR 2024)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray
from typing_extensions import override

from testbed.attacks.base import (
    Adversary,
    Answer,
    Array,
    Assumption,
    Attack,
    Calibration,
    Knowledge,
    LabelDistribution,
    Observations,
    Observed,
)
from testbed.attacks.ilrg import finite, head_arrays, like, softmax
from testbed.attacks.registry import register

Floats = NDArray[np.floating[Any]]

_PAPER = "Wang et al., ICLR 2024"

# Residuals that are tried: a posterior and a label vector differ by 1 at most; below the smallest,
# the label vector is the posterior. Neighbours differ by 2 %, which moves logits as far apart as
# 20 by 0.4: less than the minimum is wide.
_RESIDUALS = np.geomspace(1e-6, 1.0, 700)

# The best minima on the grid are searched again on finer ones, each 20 times as fine.
_MINIMA, _ROUNDS, _FINER = 8, 6, np.linspace(-1.0, 1.0, 41)


@dataclass(frozen=True)
class _RankOne(Attack):
    """What both attacks share: the answer is the posterior less the residual."""

    knowledge: ClassVar[Knowledge] = Knowledge.MODEL
    source: ClassVar[str] = _PAPER
    assumes: ClassVar = frozenset({Assumption.ONE_LABEL})
    answers: ClassVar[Answer] = Answer.DISTRIBUTION
    calibrated_by: ClassVar = ()
    calibration_arrays: ClassVar = {
        "weight": (("class", "feature"), "f8"),
        "bias": (("class",), "f8"),
    }

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        return head_arrays(adversary)


@register
@dataclass(frozen=True)
class SoftLabels(_RankOne):
    """Divides the weight by the bias gradient: one sample's feature, so its posterior and label.

    The gradients of one sample are ``Wg = r h^T`` and ``b = r`` with the residual ``r = p - y``, so
    that ``h = Wg[c] / b_c`` for any c, here the c of the largest ``|b_c|``, and
    ``y = softmax(W h + b) - r``.
    """

    name: ClassVar[str] = "soft_labels"
    title: ClassVar[str] = "soft labels"
    observes: ClassVar = frozenset({Observed.WEIGHT_GRADIENT, Observed.BIAS_GRADIENT})

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelDistribution:
        residual = finite(observations.bias_gradient) / observations.local_steps
        rows = finite(observations.weight_gradient) / observations.local_steps
        xp = array_namespace(residual)
        places = xp.arange(residual.shape[1], device=device(residual))
        largest = xp.argmax(xp.abs(residual), axis=1, keepdims=True)
        chosen = xp.astype(places[None, :] == largest, xp.float64)
        divisor = xp.sum(chosen * residual, axis=1, keepdims=True)
        # Without a residual the feature is unknown, and 0 is as good as any.
        divisor = xp.where(divisor == 0, xp.full_like(divisor, xp.inf), divisor)
        features = xp.matmul(chosen[:, None, :], rows)[:, 0, :] / divisor
        weight, bias = (like(calibration[name], residual) for name in ("weight", "bias"))
        logits = xp.matmul(weight, features[:, :, None])[:, :, 0] + bias
        return LabelDistribution(_valid(softmax(logits) - residual))


@register
@dataclass(frozen=True)
class SoftLabelsNoBias(_RankOne):
    """Searches the one unknown scale of a sample's feature for which the label vector is valid.

    Without a bias gradient, ``h = Wg[c] / t`` with an unknown residual t of class c, here the c of
    the largest gradient; the other residuals are ``t a`` with the known ratios ``a = Wg Wg[c] /
    |Wg[c]|^2``. The label vector ``y(t) = softmax(W h + b) - t a`` of the right t has a form that
    no other has, if there are classes enough: at least five are assumed. Of two entries that are
    free to differ, or of three with ``mixup``, nothing tells the right ones.

    Attributes
    ----------
    prior
        The form of label vectors: with ``smoothing`` all entries but the largest are alike, with
        ``mixup`` all but the two largest. The criterion is their variance. It is taken relative
        to t^2, as it vanishes with t whatever the label.
    """

    prior: Literal["smoothing", "mixup"] = "smoothing"

    assumes: ClassVar = frozenset({Assumption.ONE_LABEL, Assumption.FIVE_CLASSES})
    name: ClassVar[str] = "soft_labels_no_bias"
    title: ClassVar[str] = "soft labels (no bias)"
    observes: ClassVar = frozenset({Observed.WEIGHT_GRADIENT})

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelDistribution:
        gradient = finite(np.asarray(observations.weight_gradient)) / observations.local_steps
        weight, bias = finite(calibration["weight"]), finite(calibration["bias"])
        weight = np.broadcast_to(weight, gradient.shape)
        bias = np.broadcast_to(bias, gradient.shape[:2])
        above = 1 if self.prior == "smoothing" else 2
        rows = zip(gradient, weight, bias, strict=True)
        labels = [_search(*row, above) for row in rows]
        return LabelDistribution(_valid(np.stack(labels)))


def _search(gradient: Floats, weight: Floats, bias: Floats, above: int) -> Floats:
    """Return the label vector [C] of one sample."""
    size = np.linalg.norm(gradient, axis=1)
    row = gradient[size.argmax()]
    square = row @ row
    if square == 0:
        labels: Floats = softmax(bias)
        return labels
    ratio, logits = gradient @ row / square, weight @ row
    alike = max(len(bias) - above, min(len(bias), 2))

    def label(t: Floats) -> Floats:
        """Return the label vectors [..., C] of residuals [...]."""
        vectors: Floats = softmax(logits / t[..., None] + bias) - t[..., None] * ratio
        return vectors

    def cost(t: Floats) -> Floats:
        smallest = np.partition(label(t), alike - 1, axis=-1)[..., :alike]
        relative: Floats = smallest.var(axis=-1) / t**2
        return relative

    grid = np.stack([_RESIDUALS, -_RESIDUALS])
    on_grid = np.pad(cost(grid), ((0, 0), (1, 1)), constant_values=np.inf)
    inner = on_grid[:, 1:-1]
    lowest = np.where((inner <= on_grid[:, :-2]) & (inner <= on_grid[:, 2:]), inner, np.inf)
    best = grid.ravel()[lowest.ravel().argsort(kind="stable")[:_MINIMA]]
    width = np.log(_RESIDUALS[1] / _RESIDUALS[0])
    for _ in range(_ROUNDS):
        finer = best[:, None] * np.exp(width * _FINER)
        best = np.take_along_axis(finer, cost(finer).argmin(axis=1)[:, None], axis=1)[:, 0]
        width *= _FINER[1] - _FINER[0]
    return label(best[cost(best).argmin()])


def _valid(labels: Array) -> Array:
    """Return shares [N, C]: not negative, sum 1."""
    xp = array_namespace(labels)
    positive = xp.clip(labels, min=0.0)
    total = xp.sum(positive, axis=1, keepdims=True)
    some = total > 0
    even = xp.full_like(positive, 1 / labels.shape[1])
    return xp.where(some, positive / xp.where(some, total, xp.ones_like(total)), even)
