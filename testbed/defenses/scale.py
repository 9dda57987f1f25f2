"""What an attacker restores of a gradient by its closed form: its scale, and sums that are 0."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.attacks.base import Observations
from testbed.defenses.base import Tensors

Floats = NDArray[np.floating[Any]]

_ROUNDS = 10


def scale_estimate(observations: Observations, posterior: NDArray[np.float64]) -> Floats:
    """Return by how much each gradient may have been shrunk, float64 [N], at least 1.

    The mean gradient ``b`` of the last layer's bias is ``pbar - lambda / N``, so that a positive
    entry is at most the mean posterior of its class, and equal to it where the class is absent.
    Of a shrunk gradient ``b / k`` the factor is therefore at most the smallest ``pbar_c / b_c``
    over positive entries, as the attack ``scale_free`` takes it. With a mean posterior that is not
    quite the batch's, that is the one that errs most; the factor is then fitted to all classes that
    it leaves less than half a label, until these are the same.

    Parameters
    ----------
    observations
        Of N updates. Without a bias gradient, or where it is not finite, the answer is 1.
    posterior
        float64 [C]: mean posterior, pbar.
    """
    if observations.bias_gradient is None:
        return np.ones(len(observations.row_sums))
    bias = np.asarray(observations.bias_gradient, dtype=np.float64) / observations.local_steps
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        ratio = np.where(bias > 0, posterior / bias, np.inf).min(axis=1)
    usable = np.isfinite(ratio) & np.isfinite(bias).all(axis=1)
    factors = np.maximum(np.where(usable, ratio, 1.0), 1.0)
    half = 0.5 / np.maximum(np.asarray(observations.labels, np.float64), 1)[:, None]
    bias = np.where(usable[:, None], bias, 0.0)
    for _ in range(_ROUNDS):
        absent = posterior - factors[:, None] * bias < half
        square = (absent * bias**2).sum(axis=1)
        product = (absent * posterior * bias).sum(axis=1)
        fitted = np.divide(product, square, out=np.zeros_like(square), where=square > 0)
        factors = np.maximum(factors, fitted)
    return factors


def scaled(observations: Observations, factors: Floats, tensors: Tensors) -> Observations:
    """Return observations whose gradients are multiplied by a factor each, float [N].

    Of whole updates, the buffers behind the gradient stay as they are.
    """

    def times(values: Any) -> Any:
        if values is None:
            return None
        array = np.asarray(values)
        return array * factors.astype(array.dtype).reshape(-1, *[1] * (array.ndim - 1))

    update = observations.update
    if update is not None:
        update = np.array(update)
        update[:, : tensors.size] *= factors.astype(update.dtype)[:, None]
    return replace(
        observations,
        row_sums=times(observations.row_sums),
        bias_gradient=times(observations.bias_gradient),
        weight_gradient=times(observations.weight_gradient),
        norm=times(observations.norm),
        update=update,
    )


def centred(observations: Observations, tensors: Tensors) -> Observations:
    """Return the nearest observations whose last layer's gradients sum to 0 over the classes.

    Every sample's does, since posterior and label distribution both sum to 1: what is left of
    independent noise has ``(C - 1) / C`` of its variance. The norm stays as it was.
    """

    def centre(values: Any) -> Any:
        if values is None:
            return None
        array = np.asarray(values)
        return array - array.mean(axis=1, keepdims=True)

    update = observations.update
    if update is not None:
        update = np.array(update)
        for place in (tensors.weight, tensors.bias):
            if place is not None:
                part = update[:, place].reshape(len(update), tensors.classes, -1)
                update[:, place] = centre(part).reshape(len(update), -1)
    return replace(
        observations,
        row_sums=centre(observations.row_sums),
        bias_gradient=centre(observations.bias_gradient),
        weight_gradient=centre(observations.weight_gradient),
        update=update,
    )
