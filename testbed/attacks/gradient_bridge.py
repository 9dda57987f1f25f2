"""Labels from the gradients below a withheld last layer (GDBR, Zhang, Chow and Li, 2024)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray
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
    Observed,
)
from testbed.attacks.class_basis import mixture
from testbed.attacks.registry import register
from testbed.attacks.rounding import largest_remainder

Floats = NDArray[np.float64]

# Parameters that are multiplied at once in double precision.
_BLOCK = 1 << 16
# Relative to the largest, singular values below this one are none.
_RANK = 1e-3


@register
@dataclass(frozen=True)
class GradientBridge(Attack):
    """Rebuilds the withheld head's bias gradient from the gradients of the layers below.

    By the chain rule a sample's gradient below the head is ``sum_c (p_c - y_c) dz_c/dtheta``.
    With the logits' mean Jacobian A over auxiliary samples in place of each sample's own, the
    batch's is ``A delta``, where delta, the mean of ``p - y``, is what the head's bias gradient
    would be: least squares over all parameters below the head, with entries of delta that sum to
    0, give it back, and ``N (pbar - delta)`` are the counts. The last layer's part of an update is
    not looked at. For several local steps, A is that of the model before them.

    Measured on MNIST (CNN, FCNN): all layers do as well as the nearest one, and better than
    biases alone; equal weight for every tensor is worse. With BatchNorm a sample's gradient depends
    on its batch and the chain rule holds for no single Jacobian: success is lower.

    Attributes
    ----------
    counting
        How delta becomes counts: with the mean posterior of all classes (``mean``), or by
        non-negative least squares on those of each class, better on skewed labels once the model
        is trained, and worse on balanced ones.
    """

    counting: Literal["mean", "least_squares"] = "mean"

    name: ClassVar[str] = "gradient_bridge"
    title: ClassVar[str] = "Gradient bridge"
    knowledge: ClassVar[Knowledge] = Knowledge.AUXILIARY
    source: ClassVar[str] = "after Zhang et al., 2024 (arXiv 2412.12640); derived here"
    observes: ClassVar = frozenset({Observed.UPDATE})
    assumes: ClassVar = frozenset({Assumption.FEATURES_FOR_CLASSES})
    calibrated_by: ClassVar = ()
    calibration_arrays: ClassVar = {
        "posterior": (("class", "class"), "f8"),
        "residual": (("client", "class"), "f8"),
    }

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        return {"posterior": class_means(adversary.on_auxiliary()).posterior[None]}

    @override
    def calibrate_updates(self, adversary: Adversary, observations: Observations) -> Calibration:
        jacobian = adversary.logit_gradients()
        updates = np.asarray(observations.update)
        below = _below_the_head(adversary, updates.shape[1])[: jacobian.shape[1]]
        solved = bridge(jacobian, updates[:, : jacobian.shape[1]], below)
        return {"residual": solved / observations.local_steps}

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        xp = array_namespace(observations.row_sums)
        where = device(observations.row_sums)
        if self.counting == "mean":
            residual = xp.asarray(calibration["residual"], dtype=xp.float64, device=where)
            posterior = xp.asarray(calibration["posterior"], dtype=xp.float64, device=where)
            shares = xp.mean(posterior, axis=1) - residual
        else:
            shares = xp.asarray(_least_squares(calibration), device=where)
        labels = xp.astype(observations.labels, xp.float64)
        scores = shares * labels[:, None]
        return LabelCounts(largest_remainder(scores, observations.labels), scores)


def bridge(
    jacobian: NDArray[np.float32], updates: NDArray[np.float32], below: NDArray[np.bool_]
) -> Floats:
    """Return the combinations of logit gradients, entries summing to 0, nearest to each update.

    Parameters
    ----------
    jacobian
        float32 [C, P]: mean gradient of each logit.
    updates
        float32 [N, P].
    below
        bool [P]: which parameters are compared.

    Returns
    -------
    Floats
        [N, C]; zeros where a gradient is not finite.
    """
    classes = len(jacobian)
    gram, products = np.zeros((classes, classes)), np.zeros((len(updates), classes))
    good = np.isfinite(updates[:, below]).all(axis=1)
    if not np.isfinite(jacobian[:, below]).all():
        return products
    for start in range(0, len(below), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(below)))
        block = block[below[block]]
        a = jacobian[:, block].astype(np.float64)
        gram += a @ a.T
        products[good] += updates[good][:, block].astype(np.float64) @ a.T
    # Onto the vectors whose entries sum to 0, where the normal equations are solved.
    centre = np.eye(classes) - 1 / classes
    inverse = np.linalg.pinv(centre @ gram @ centre, rcond=_RANK**2, hermitian=True)
    solved: Floats = products @ centre @ inverse @ centre
    return solved


def _below_the_head(adversary: Adversary, length: int) -> NDArray[np.bool_]:
    below = np.ones(length, np.float32)
    adversary.weight_gradient(below)[...] = 0
    bias = adversary.bias_gradient(below)
    if bias is not None:
        bias[...] = 0
    return below > 0


def _least_squares(calibration: Calibration) -> Floats:
    """Return the shares s >= 0, summing to 1, for which ``(P^T - I) s`` is nearest to delta."""
    residual, posterior = calibration["residual"], np.nan_to_num(calibration["posterior"])
    columns = posterior - np.eye(posterior.shape[-1])
    if len(columns) == 1:
        return mixture(columns[0], residual)
    return np.concatenate([mixture(own, residual[i : i + 1]) for i, own in enumerate(columns)])
