"""What regressions from an update to label shares share: ridge regression and the simplex."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from testbed.attacks.base import Array, Outputs

Floats = NDArray[np.float64]

# Ridge strengths that are tried, per sample and in units of a standardised feature's variance.
_STRENGTHS = np.logspace(-5, 3, 25)
# A feature that varies less than this, relative to its size, is rounding noise of float32.
_CONSTANT = 1e-6


@dataclass(frozen=True)
class Ridge:
    """A linear map from features to targets: ``features @ coefficients + intercept``.

    Attributes
    ----------
    coefficients
        float64 [F, T].
    intercept
        float64 [T].
    strength
        The ridge strength that was chosen, per sample; NaN where nothing could be fitted.
    """

    coefficients: Floats
    intercept: Floats
    strength: float


def fit_ridge(features: Floats, targets: Floats, second: NDArray[np.bool_]) -> Ridge:
    """Fit a ridge regression on standardised features, of the strength that serves strangers best.

    The strength is chosen by how well each of two halves predicts the other: where they are made
    of different samples, errors in what is known of a class count, which cross-validation within
    the same samples does not see. Those of the whole are half as large, and so is its strength.

    Parameters
    ----------
    features
        float64 [n, F].
    targets
        float64 [n, T].
    second
        bool [n]: which belong to the second half; neither is empty.

    Returns
    -------
    Ridge
        Constant in features that hardly vary or are not finite; where none is left, the mean of
        the targets.
    """
    width = features.shape[1]
    finite = np.isfinite(features).all(axis=0)
    known = np.where(finite, features, 0.0)
    center, scale = known.mean(axis=0), known.std(axis=0)
    varies = scale > _CONSTANT * np.abs(center)
    mean = targets.mean(axis=0)
    if not varies.any():
        return Ridge(np.zeros((width, targets.shape[1])), mean, float("nan"))
    center, scale = center[varies], scale[varies]
    z, y = (known[:, varies] - center) / scale, targets - mean
    errors = np.zeros(len(_STRENGTHS))
    for half in (second, ~second):
        fit = _path(z[half], y[half])
        for place, strength in enumerate(_STRENGTHS):
            errors[place] += ((y[~half] - z[~half] @ fit(strength)) ** 2).sum()
    strength = _STRENGTHS[np.argmin(errors)] / 2
    coefficients = np.zeros((width, targets.shape[1]))
    coefficients[varies] = _path(z, y)(strength) / scale[:, None]
    return Ridge(coefficients, mean - center @ coefficients[varies], float(strength))


def _path(z: Floats, y: Floats) -> Callable[[float], Floats]:
    """Return what gives the coefficients [F, T] for a strength, without an intercept."""
    left, singular, right = np.linalg.svd(z, full_matrices=False)
    projected = left.T @ y

    def fit(strength: float) -> Floats:
        shrunk = singular / (singular**2 + len(z) * strength)
        coefficients: Floats = right.T @ (shrunk[:, None] * projected)
        return coefficients

    return fit


def labels_of(outputs: Outputs) -> NDArray[np.int64]:
    """Return the labels of auxiliary samples.

    Raises
    ------
    ValueError
        The outputs have no labels.
    """
    if outputs.labels is None:
        raise ValueError("clients cannot be simulated with inputs that have no labels")
    return outputs.labels


def project_shares(values: Array) -> Array:
    """Return the nearest points of the probability simplex.

    The sort-based projection of Duchi et al., ICML 2008, figure 1.

    Parameters
    ----------
    values
        float64 [N, C], of any library that follows the array API standard.

    Returns
    -------
    Array
        float64 [N, C]: not negative, rows sum to 1. A row that is not finite becomes uniform.
    """
    xp = array_namespace(values)
    finite = xp.all(xp.isfinite(values), axis=1, keepdims=True)
    values = xp.where(finite, values, xp.zeros_like(values))
    classes = values.shape[1]
    # Rows shifted by a constant have the same projection; large values would lose their sum.
    values = values - xp.max(values, axis=1, keepdims=True)
    falling = xp.sort(values, axis=1, descending=True)
    ranks = xp.arange(1, classes + 1, dtype=values.dtype, device=device(values))
    threshold = (xp.cumulative_sum(falling, axis=1) - 1.0) / ranks
    positive = xp.sum(xp.astype(falling > threshold, xp.int64), axis=1, keepdims=True)
    chosen = xp.take_along_axis(threshold, positive - 1, axis=1)
    return xp.clip(values - chosen, min=0.0)
