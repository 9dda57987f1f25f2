"""The last layer's bias gradient and the row sums of its weight gradient, told from each other.

A sample's gradients are ``(p - y) h^T`` and ``p - y``, so that row sums are the bias gradient times
the mass of the features, ``sum_d h_d``, as far as samples have the same mass. What a defence does
to single entries averages out over the D entries of a row: where it hides the bias gradient, the
row sums still tell it.
"""

import numpy as np
from numpy.typing import NDArray

from testbed.attacks.base import Observations
from testbed.defenses.base import Known
from testbed.defenses.observed import bias_gradient, with_last_layer
from testbed.defenses.scale import centred

Floats = NDArray[np.float64]

# Row sums that are negative by less than this many standard deviations of the noise may as well be
# positive; but not by more than this part of what a label takes from its row.
_DEVIATIONS, _PART = 2.0, 0.1

_KEPT = 0.1


def row_sums(observations: Observations) -> Floats:
    """Return the row sums, float64 [N, C]."""
    return np.asarray(observations.row_sums, np.float64)


def balanced(gradient: Floats) -> Floats:
    """Return what sums to 0 over the classes, float64 [N, C], near to a gradient that does not.

    For errors whose variance grows with the magnitude of an entry, as that of stochastic rounding:
    positive entries shrink and negative ones grow, or the other way round, by one factor. Zeros
    stay, and no sign changes.
    """
    size = np.abs(gradient)
    total, whole = gradient.sum(axis=1, keepdims=True), size.sum(axis=1, keepdims=True)
    part = np.divide(total, whole, out=np.zeros_like(total), where=whole > 0)
    return np.asarray(gradient - part * size)


def filled_from_rows(bias: Floats, rows: Floats, *, keep_empty: bool) -> Floats:
    """Return a bias gradient [N, C] with the entries that were left out, exact zeros, filled in.

    By the row sums, divided by their ratio to the entries that are there; what the sum over the
    classes, 0, then still lacks is shared out evenly.

    Parameters
    ----------
    keep_empty
        Whether entries stay 0 where the row sum is 0 too: attacks that divide a row by its entry
        take that for a class without a gradient.
    """
    missing = bias == 0
    if keep_empty:
        missing &= rows != 0
    square = (bias**2).sum(axis=1, keepdims=True)
    known = (rows * bias).sum(axis=1, keepdims=True)
    mass = np.divide(known, square, out=np.zeros_like(square), where=square > 0)
    guess = np.divide(rows, mass, out=np.zeros_like(rows), where=missing & (mass != 0))
    guess += bias
    lacking = -guess.sum(axis=1, keepdims=True) / np.maximum(missing.sum(axis=1, keepdims=True), 1)
    return np.asarray(guess + np.where(missing, lacking, 0.0))


def merged(
    observations: Observations, known: Known, bias_variance: Floats, row_variance: Floats
) -> Observations:
    """Return observations whose bias gradient is the mean of itself and of what the rows tell.

    Weighted by precision; row sums tell it as far as samples have the same mass. Left as it is
    where the mass is not known, and where the weight gradient shows: attacks that divide the one
    by the other look for features, which are lost where one is made of the other.

    Parameters
    ----------
    bias_variance, row_variance
        float64 [N, C]: of the defence's errors in each.
    """
    bias, rows = bias_gradient(observations), row_sums(observations)
    if bias is None or observations.weight_gradient is not None or not known.mass:
        return observations
    told = rows / known.mass
    variance = row_variance / known.mass**2 + (known.spread * told) ** 2
    whole = variance + bias_variance
    weight = np.divide(variance, whole, out=np.ones_like(whole), where=whole > 0)
    bias = weight * bias + (1 - weight) * told
    bias -= bias.mean(axis=1, keepdims=True)
    return with_last_layer(observations, known.tensors, bias=bias, row_sums=rows)


def denoised(
    observations: Observations,
    known: Known,
    deviation: Floats | float,
    of_weight: Floats | float | None = None,
) -> Observations:
    """Return observations with as little as may be of independent noise on every entry.

    The nearest that sum to 0 over the classes; then `merged`; and row sums that noise may have made
    negative are 0, since a negative one shows that a class is present.

    Parameters
    ----------
    deviation, of_weight
        Standard deviation of the noise on each entry of the bias, and of the weight where it is
        another one; a number, or float64 [N].
    """
    observations = centred(observations, known.tensors)
    rows = row_sums(observations)
    updates, classes = rows.shape
    features = (known.tensors.weight.stop - known.tensors.weight.start) // classes
    of_bias = np.broadcast_to(np.asarray(deviation, np.float64), updates)[:, None]
    of_rows = deviation if of_weight is None else of_weight
    of_rows = np.broadcast_to(np.asarray(of_rows, np.float64), updates)[:, None] * features**0.5
    observations = merged(
        observations,
        known,
        np.broadcast_to(of_bias**2, rows.shape),
        np.broadcast_to(of_rows**2, rows.shape),
    )
    weight = observations.weight_gradient
    if weight is not None:
        # As James and Stein (1961) shrink a noisy mean.
        square = (np.asarray(weight, np.float64) ** 2).sum(axis=(1, 2))[:, None]
        noise = of_rows**2 * classes
        kept = np.maximum(
            1 - np.divide(noise, square, out=np.ones_like(square), where=square > 0), _KEPT
        )
        return with_last_layer(
            observations, known.tensors, weight=np.asarray(weight, np.float64) * kept[:, :, None]
        )
    impact = -np.minimum(rows, 0).sum(axis=1) / np.maximum(np.asarray(observations.labels), 1)
    limit = np.minimum(_DEVIATIONS * of_rows, _PART * impact[:, None])
    rows = np.where((rows < 0) & (rows > -limit), 0.0, rows)
    return with_last_layer(observations, known.tensors, row_sums=rows)
