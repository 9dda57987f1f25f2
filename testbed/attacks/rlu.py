"""RLU: counts from the logits of samples of other classes (Chen and Vikalo, ICML 2024)."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import override

from testbed.attacks.base import (
    Adversary,
    Array,
    Assumption,
    Attack,
    Calibration,
    Knowledge,
    LabelCounts,
    Observations,
    Observed,
)
from testbed.attacks.estimation import last_models
from testbed.attacks.ilrg import finite, like, softmax
from testbed.attacks.registry import register
from testbed.attacks.rounding import largest_remainder

Floats = NDArray[np.floating[Any]]

_PAPER = "Chen and Vikalo, ICML 2024 (OpenReview E41gvBG4s6)"

# The published code simulates so often, each but the last time after an exchange, or until no logit
# is further off.
_SIMULATIONS, _CLOSE = 5, 0.1

# The published code takes its learning-rate decay, 0.1 by default, for the momentum.
_RELEASED_MOMENTUM = 0.1


@register
@dataclass(frozen=True)
class RLU(Attack):
    """Takes the posterior that the model wrongly gives each class for the batch's mean posterior.

    In ``lambda_i = N (pbar_i - b_i)``, pbar is estimated as ``softmax(mu)``, where mu_i is the mean
    logit of class i over auxiliary samples of the other classes. Negative counts become 0.
    """

    name: ClassVar[str] = "rlu"
    title: ClassVar[str] = "RLU"
    knowledge: ClassVar[Knowledge] = Knowledge.AUXILIARY
    source: ClassVar[str] = _PAPER
    observes: ClassVar = frozenset({Observed.BIAS_GRADIENT})
    assumes: ClassVar = frozenset({Assumption.ONE_STEP})
    calibrated_by: ClassVar = ()
    calibration_arrays: ClassVar = {"mu": (("class",), "f8")}

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        return {"mu": wrong_logits(adversary)[None]}

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        bias = finite(observations.bias_gradient) / observations.local_steps
        scores = _estimate(softmax(like(calibration["mu"], bias)), bias, observations.labels)
        return LabelCounts(largest_remainder(scores, observations.labels), scores)


@register
@dataclass(frozen=True)
class RLUPath(Attack):
    """RLU for several local steps: simulates how the logits move, as the labels move them.

    The first estimate is RLU's with the model that the client ended with. From it, the logits mu
    are moved step by step, ``-rate (softmax(mu) - lambda/N) |O|^2`` with the mean feature ``O =
    mean_c Wg[c] / b_c``; where they end off the end model's, E labels at once go over from the
    class that ends the most too high to the one that ends the most too low, up to four times. The
    last estimate is made with the mean posterior over the simulated steps.

    Attributes
    ----------
    momentum
        Of the clients' local steps: step t then has the weight ``(1 - momentum^(E - t)) / (1 -
        momentum)`` in the update.
    variant
        ``released`` has what the published code does otherwise. It compares the simulated logits
        with one component of the end model's, the (E - 1)th (the last class where there are fewer)
        in place of the whole vector, and before the last step; takes 0.1 for the momentum in the
        weights and none in the simulation; and rounds each estimate to the nearest integers, which
        the shared rule then scales to N.
    """

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    variant: Literal["corrected", "released"] = "corrected"

    name: ClassVar[str] = "rlu_path"
    title: ClassVar[str] = "RLU (simulated path)"
    knowledge: ClassVar[Knowledge] = Knowledge.AUXILIARY
    source: ClassVar[str] = _PAPER
    observes: ClassVar = frozenset(
        {Observed.WEIGHT_GRADIENT, Observed.BIAS_GRADIENT, Observed.UPDATE}
    )
    assumes: ClassVar = frozenset({Assumption.SEVERAL_STEPS})
    calibrated_by: ClassVar = ()
    calibration_arrays: ClassVar = {
        "mu": (("class",), "f8"),
        "mu_after": (("client", "class"), "f8"),
        "learning_rate": ((), "f8"),
    }

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        return {
            "mu": wrong_logits(adversary)[None],
            "learning_rate": np.array([adversary.learning_rate]),
        }

    @override
    def calibrate_updates(self, adversary: Adversary, observations: Observations) -> Calibration:
        ends = last_models(adversary, observations)
        return {"mu_after": np.stack([wrong_logits(end) for end in ends])}

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        steps, labels = observations.local_steps, np.asarray(observations.labels)
        bias = finite(np.asarray(observations.bias_gradient)) / steps
        weight = finite(np.asarray(observations.weight_gradient)) / steps
        start, end = finite(calibration["mu"]), finite(calibration["mu_after"])
        if steps == 1:
            scores = _estimate(softmax(start), bias, labels)
            return LabelCounts(self._fit(scores, labels), scores)
        moved = calibration["learning_rate"][:, None] * _square(weight, bias)[:, None]
        weights = self._weights(steps)
        counts = self._rounded(_estimate(weights.mean() * softmax(end), bias, labels), labels)
        path, last = self._simulate(start, counts, labels, moved, steps)
        for _ in range(_SIMULATIONS - 1):
            changed = _exchange(counts, self._error(last, end, steps), steps)
            if changed is None:
                break
            counts = changed
            path, last = self._simulate(start, counts, labels, moved, steps)
        scores = _estimate(path, bias, labels)
        return LabelCounts(self._fit(scores, labels), scores)

    def _weights(self, steps: int) -> Floats:
        """Return the weight [E] of each step in the update."""
        released = self.variant == "released"
        momentum = _RELEASED_MOMENTUM if released else self.momentum
        weights: Floats = (1 - momentum ** np.arange(steps, 0, -1)) / (1 - momentum)
        return weights

    def _simulate(
        self, start: Floats, counts: Floats, labels: NDArray[Any], moved: Floats, steps: int
    ) -> tuple[Floats, Floats]:
        """Return the weighted mean posterior over the steps, and the logits to compare, [N, C]."""
        released = self.variant == "released"
        momentum = 0.0 if released else self.momentum
        size = labels[:, None] / steps
        shares = np.round(counts / steps) / size if released else counts / labels[:, None]
        logits = np.broadcast_to(start, counts.shape)
        before, velocity, path = logits, np.zeros_like(counts), np.zeros_like(counts)
        weights = self._weights(steps)
        for weight in weights:
            posterior = softmax(logits)
            path = path + (weights.mean() if released else weight) * posterior
            velocity = momentum * velocity + moved * (posterior - shares)
            before, logits = logits, logits - velocity
        return path / steps, before if released else logits

    def _error(self, simulated: Floats, end: Floats, steps: int) -> Floats:
        if self.variant == "released":
            place = min(steps, end.shape[1]) - 1
            end = end[:, place : place + 1]
        error: Floats = simulated - end
        return error

    def _rounded(self, scores: Floats, labels: NDArray[Any]) -> Floats:
        if self.variant == "released":
            return np.round(scores)
        counts: Floats = largest_remainder(scores, labels).astype(np.float64)
        return counts

    def _fit(self, scores: Floats, labels: NDArray[Any]) -> NDArray[np.int64]:
        whole = np.round(scores) if self.variant == "released" else scores
        counts: NDArray[np.int64] = largest_remainder(whole, labels)
        return counts


def wrong_logits(adversary: Adversary) -> Floats:
    """Return the mean logit [C] of each class over the auxiliary samples of the other classes."""
    outputs, head = adversary.on_auxiliary(), adversary.head()
    if outputs.labels is None:
        raise ValueError("the logits of wrong classes need the labels of the samples")
    logits = finite(outputs.features) @ finite(head.weight).T + finite(head.bias)
    wrong = 1.0 - np.eye(logits.shape[1])[outputs.labels]
    # A class that all samples belong to has its own logits for want of others.
    wrong[:, ~wrong.any(axis=0)] = 1.0
    mean: Floats = (wrong * logits).sum(axis=0) / wrong.sum(axis=0)
    return mean


def _estimate(posterior: Array, bias: Array, labels: Array) -> Array:
    """Return ``posterior - b``, without negative entries, scaled to N, [N, C]."""
    xp = array_namespace(bias)
    positive = xp.clip(posterior - bias, min=0.0)
    total = xp.sum(positive, axis=1, keepdims=True)
    some = total > 0
    even = xp.full_like(positive, 1 / bias.shape[1])
    shares = xp.where(some, positive / xp.where(some, total, xp.ones_like(total)), even)
    return xp.astype(labels, xp.float64)[:, None] * shares


def _square(weight: Floats, bias: Floats) -> Floats:
    """Return |O|^2 [N], O the mean over classes of the weight gradient over the bias gradient."""
    known = bias != 0
    features = np.where(known, 1 / np.where(known, bias, 1.0), 0.0)[:, None, :] @ weight
    mean = features[:, 0] / np.maximum(known.sum(axis=1), 1)[:, None]
    square: Floats = (mean**2).sum(axis=1)
    return square


def _exchange(counts: Floats, error: Floats, steps: int) -> Floats | None:
    """Move E labels in every update whose simulated logits end far off; None where none does."""
    far = np.abs(error).max(axis=1) >= _CLOSE
    high = np.where((error >= 0) & (counts >= steps), error, -np.inf)
    low = np.where(error < 0, -error, -np.inf)
    far &= np.isfinite(high.max(axis=1)) & np.isfinite(low.max(axis=1))
    if not far.any():
        return None
    rows = np.flatnonzero(far)
    changed = counts.copy()
    changed[rows, high[rows].argmax(axis=1)] -= steps
    changed[rows, low[rows].argmax(axis=1)] += steps
    return changed
