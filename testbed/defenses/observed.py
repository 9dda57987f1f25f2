"""What attackers who adapt share: the last layer within what they observe.

What scales and centres them as a whole is in `testbed.defenses.scale`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.attacks.base import Observations
from testbed.defenses.base import Known, Scope, Tensors, Vector, When
from testbed.defenses.scale import scale_estimate, scaled

Floats = NDArray[np.float64]

_BLOCK = 1 << 16
# Relative: what float32 and a later float16 leave of a norm that was clipped to the bound.
_NORM_TOLERANCE = 1e-3


def euclidean_norm(vector: NDArray[np.floating[Any]]) -> float:
    """Return the Euclidean norm, summed in double precision without a copy of the vector."""
    flat = vector.reshape(-1)
    total = 0.0
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK].astype(np.float64)
        total += float(block @ block)
    return math.sqrt(total)


def weight_gradient(observations: Observations, tensors: Tensors) -> Floats | None:
    """Return the last layer's weight gradient, float64 [N, C, D], or None where it is not seen."""
    if observations.weight_gradient is not None:
        return np.asarray(observations.weight_gradient, np.float64)
    if observations.update is None:
        return None
    flat = np.asarray(observations.update)[:, tensors.weight]
    return flat.reshape(len(flat), tensors.classes, -1).astype(np.float64)


def bias_gradient(observations: Observations) -> Floats | None:
    """Return the last layer's bias gradient, float64 [N, C], or None where it is not seen."""
    bias = observations.bias_gradient
    return None if bias is None else np.asarray(bias, np.float64)


def with_last_layer(
    observations: Observations,
    tensors: Tensors,
    *,
    weight: Floats | None = None,
    bias: Floats | None = None,
    row_sums: Floats | None = None,
) -> Observations:
    """Return the observations with other gradients of the last layer, wherever they show.

    Parameters
    ----------
    weight, bias, row_sums
        float64 [N, C, D], [N, C] and [N, C]; what is None stays as it is, but for the row sums of
        a weight that is given. Parts that the observations do not have are left out.
    """
    if row_sums is None and weight is not None:
        row_sums = weight.sum(axis=2)
    given = {"row_sums": row_sums, "bias_gradient": bias, "weight_gradient": weight}
    changes: dict[str, Any] = {
        name: _as(values, old)
        for name, values in given.items()
        if values is not None and (old := getattr(observations, name)) is not None
    }
    if observations.update is not None:
        update = np.array(observations.update)
        if weight is not None:
            update[:, tensors.weight] = _as(weight.reshape(len(weight), -1), update)
        if bias is not None and tensors.bias is not None:
            update[:, tensors.bias] = _as(bias, update)
        changes["update"] = update
    return replace(observations, **changes)


def filled(gradient: Floats) -> Floats:
    """Return a gradient [N, C, ...] with what was left out filled in, as far as it is known.

    Gradients of a cross entropy sum to 0 over the classes: what is missing of a column is the
    negative sum of what is there. Each missing entry, an exact 0, gets an equal part of it.
    """
    missing = gradient == 0
    number = missing.sum(axis=1, keepdims=True)
    with np.errstate(over="ignore", invalid="ignore"):
        part = -gradient.sum(axis=1, keepdims=True) / np.maximum(number, 1)
    return np.where(missing, part, gradient)


def unclipped(
    observations: Observations, known: Known, *, bound: float, scope: Scope
) -> Observations:
    """Return the observations scaled back by an estimate of what clipping divided them by.

    What has a norm below the bound was not clipped and is left alone; where the norm is not known,
    it counts as clipped. Else the factor is `testbed.defenses.scale.scale_estimate`: too large
    where every class is present. Without a bias gradient, row sums stand in for it, divided by the
    mass of the features where the attacker knows it. Tensor by tensor, bias and weight have a
    factor each (`tensor_factors`), and what belongs to other layers stays as it is, as does the
    norm.

    Of several local steps whose gradients were clipped each, this judges the sum; the norm of
    clipped ones that do not oppose each other is above the bound.
    """
    if scope == "update":
        shown = observations
        if observations.bias_gradient is None:
            shown = _by_rows(observations, known)
        factors = _factors(shown, observations.norm, known, bound)
        return scaled(observations, factors, known.tensors)
    of_bias, of_weight = tensor_factors(observations, known, bound=bound)
    return multiplied(observations, known.tensors, of_bias, of_weight)


def tensor_factors(
    observations: Observations, known: Known, *, bound: float, deviation: float = 0.0
) -> tuple[Floats, Floats]:
    """Return what clipping divided the last layer's bias and its weight by, float64 [N] each.

    The bias as in `unclipped`; the weight so that its row sums are the bias gradient times the mass
    of the features, where the attacker knows it, and else as in `unclipped` for itself.

    Parameters
    ----------
    deviation
        Standard deviation of noise that came on top, on each entry.
    """
    weight, bias = weight_gradient(observations, known.tensors), bias_gradient(observations)
    norm = observations.norm
    if weight is not None:
        square = (weight**2).sum(axis=(1, 2)) - deviation**2 * weight[0].size
        norm = np.sqrt(np.maximum(square, 0))
    of_weight = _factors(_by_rows(observations, known), norm, known, bound)
    if bias is None:
        return np.ones(len(of_weight)), of_weight
    square = np.maximum((bias**2).sum(axis=1) - deviation**2 * bias.shape[1], 0)
    of_bias = _factors(observations, np.sqrt(square), known, bound)
    if known.mass:
        rows = np.asarray(observations.row_sums, np.float64)
        shared = (rows * bias).sum(axis=1) / known.mass
        matched = np.divide(square * of_bias, shared, out=np.zeros_like(shared), where=shared > 0)
        of_weight = np.where(matched > 0, np.maximum(matched, 1.0), of_weight)
    return of_bias, of_weight


def multiplied(
    observations: Observations, tensors: Tensors, of_bias: Floats, of_weight: Floats
) -> Observations:
    """Return the observations with the last layer's gradients times a factor each, float64 [N]."""
    weight, bias = weight_gradient(observations, tensors), bias_gradient(observations)
    return with_last_layer(
        observations,
        tensors,
        weight=None if weight is None else weight * of_weight[:, None, None],
        bias=None if bias is None else bias * of_bias[:, None],
        row_sums=np.asarray(observations.row_sums, np.float64) * of_weight[:, None],
    )


def _by_rows(observations: Observations, known: Known) -> Observations:
    rows = np.asarray(observations.row_sums, np.float64)
    return replace(observations, bias_gradient=rows / known.mass if known.mass else rows)


def imitated(
    simulated: Observations, change: Callable[[Vector, Tensors], Vector], at: When
) -> Observations:
    """Return simulated observations [S, ...] with the last layer changed as a vector of its own.

    A defence that treats the whole update as one is approximated by what it would do to an update
    of the last layer alone. The norms become those of this layer, since adapted attackers compare
    them with bounds. Where each local step's gradient is changed, all are taken for their mean.

    Parameters
    ----------
    simulated
        With the weight gradient.
    change
        Returns what is shared in place of the float32 [C * D + C] it is given, of which it may
        change the entries.
    at
        Whether it is done to each local step's gradient, or to the update.

    Raises
    ------
    ValueError
        The weight gradient is None.
    """
    if simulated.weight_gradient is None:
        raise ValueError("imitating a defence takes the weight gradients of simulated updates")
    steps = simulated.local_steps if at == "step" else 1
    weight = np.array(simulated.weight_gradient, np.float32)
    bias = simulated.bias_gradient
    bias = None if bias is None else np.array(bias, np.float32)
    tensors = _last_layer(weight, has_bias=bias is not None)
    norm = np.empty(len(weight))
    for row in range(len(weight)):
        parts = [weight[row].reshape(-1)] + ([] if bias is None else [bias[row]])
        mean: Vector = np.concatenate(parts)
        mean /= steps
        vector = change(mean.copy(), tensors)
        for _ in range(1, steps):
            vector += change(mean.copy(), tensors)
        norm[row] = euclidean_norm(vector)
        weight[row] = vector[tensors.weight].reshape(weight[row].shape)
        if bias is not None:
            bias[row] = vector[tensors.bias]
    return replace(
        simulated,
        row_sums=weight.sum(axis=2, dtype=np.float64).astype(np.float32),
        bias_gradient=bias,
        weight_gradient=weight,
        norm=norm,
    )


def _last_layer(weight: NDArray[np.float32], *, has_bias: bool) -> Tensors:
    """Return the tensors of updates of a last layer with the weight gradients [S, C, D]."""
    _, classes, features = weight.shape
    entries = classes * features
    bias = slice(entries, entries + classes) if has_bias else None
    names, ends = ("weight", "bias"), [0, entries, entries + classes]
    count = 1 + has_bias
    return Tensors(
        names[:count], np.array(ends[: count + 1], np.int64), slice(0, entries), bias, classes
    )


def _factors(shown: Observations, norm: Any, known: Known, bound: float) -> Floats:
    factors = np.asarray(scale_estimate(shown, known.posterior), np.float64)
    if norm is None:
        return factors
    return np.where(np.asarray(norm) < bound * (1 - _NORM_TOLERANCE), 1.0, factors)


def _as(values: Floats, like: Any) -> NDArray[np.floating[Any]]:
    with np.errstate(over="ignore"):
        return values.astype(np.asarray(like).dtype)
