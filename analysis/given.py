"""Updates from elsewhere, as arrays: checked, and put together as attacks are shown them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from testbed.attacks import Head, Observations, Outputs
from testbed.attacks.assumptions import Facts
from testbed.attacks.simulation import softmax
from testbed.errors import UserError

_MOST_LABELS = 1_000_000
Floats = NDArray[np.float64]

# Of a gradient of the cross entropy the entries of all classes add up to 0, but for rounding.
_MOST_REMAINDER = 0.01


@dataclass(frozen=True)
class Given:
    """Checked arrays of N updates, and what the attacker knows beside them.

    Attributes
    ----------
    observations
        As a run would make them: single precision, row sums added up in double.
    facts
        What decides about the attacks' assumptions.
    learning_rate
        Of the clients.
    head, auxiliary
        The model's last layer, and its outputs on samples of the attacker's own, or None.
    doubts
        Why an update may be no gradient of the cross entropy, in words.
    """

    observations: Observations
    facts: Facts
    learning_rate: float
    head: Head | None
    auxiliary: Outputs | None
    doubts: tuple[str, ...]


def take(
    weight_gradient: ArrayLike,
    *,
    batch_size: int,
    bias_gradient: ArrayLike | None = None,
    local_steps: int = 1,
    learning_rate: float | None = None,
    model_weights: ArrayLike | None = None,
    model_bias: ArrayLike | None = None,
    auxiliary_features: ArrayLike | None = None,
    auxiliary_labels: ArrayLike | None = None,
    auxiliary_posterior: ArrayLike | None = None,
) -> Given:
    """Check arrays and put them together; see `analysis.attack_update`.

    Raises
    ------
    UserError
        They do not fit together, or are no finite numbers.
    """
    weight = _updates("weight gradient", weight_gradient, 2)
    count, classes, features = weight.shape
    if classes < 2:
        raise UserError(f"weight gradient: found {classes} class, expected at least 2")
    bias = None
    if bias_gradient is not None:
        bias = _updates("bias gradient", bias_gradient, 1)
        if bias.shape != (count, classes):
            raise UserError(
                f"bias gradient: found {bias.shape[0]} x {bias.shape[1]} (updates x classes), "
                f"expected {count} x {classes}, as in the weight gradient"
            )
    for name, number in (("batch size", batch_size), ("local steps", local_steps)):
        if not is_whole(number) or number < 1:
            raise UserError(f"{name}: found {number!r}, expected a whole number from 1 on")
    if batch_size * local_steps > _MOST_LABELS:
        raise UserError(f"batch size: found {batch_size}, expected at most {_MOST_LABELS} labels")
    if learning_rate is not None:
        _check_rate(learning_rate)
    if learning_rate is None and local_steps > 1:
        raise UserError("learning rate: missing; for several local steps it has to be known")
    head = _head(model_weights, model_bias, (classes, features), biased=bias is not None)
    auxiliary = _auxiliary(
        auxiliary_features, auxiliary_labels, auxiliary_posterior, head, (classes, features)
    )
    facts = Facts(
        classes=classes,
        features=features,
        bias=bias is not None,
        statistics=0,
        batch_size=int(batch_size),
        local_steps=int(local_steps),
        lowest_feature=None if auxiliary is None else float(auxiliary.features.min()),
    )
    return Given(
        _observations(weight, bias, facts),
        facts,
        # Of a single step, nothing depends on its rate.
        1.0 if learning_rate is None else float(learning_rate),
        head,
        auxiliary,
        tuple(
            f"update {row}: {doubt}"
            for row in range(count)
            if (doubt := _doubt(weight[row], None if bias is None else bias[row]))
        ),
    )


def is_whole(number: object) -> bool:
    """Return whether something is a whole number, and no truth value."""
    return (
        isinstance(number, (int, float, np.integer, np.floating))
        and not isinstance(number, bool)
        and float(number).is_integer()
    )


def _check_rate(rate: object) -> None:
    if not isinstance(rate, (int, float, np.integer, np.floating)) or not 0 < rate < np.inf:
        raise UserError(f"learning rate: found {rate!r}, expected a positive number")


def gradient_of(before: ArrayLike, after: ArrayLike, learning_rate: float) -> Floats:
    """Return the sum of the gradients that plain gradient descent went from weights to weights by.

    Parameters
    ----------
    before
        Of any shape.
    after
        Of the same shape, or of N updates: with a leading axis.
    learning_rate
        Of the steps.

    Raises
    ------
    UserError
        The shapes do not fit, or the arrays hold no finite numbers.
    """
    start, end = numbers("weights before", before), numbers("weights after", after)
    if start.shape not in (end.shape, end.shape[1:]):
        raise UserError(
            f"weights before and after: found shapes {start.shape} and {end.shape}, expected the "
            "same (or the latter with a leading axis, for several updates)"
        )
    _check_rate(learning_rate)
    gradient: Floats = (start - end) / learning_rate
    return gradient


def numbers(name: str, given: ArrayLike) -> Floats:
    """Return finite numbers in double precision; raise `UserError` where there are others."""
    try:
        array = np.asarray(given)
    except (ValueError, TypeError, RuntimeError) as error:
        # Rows of different lengths, or a tensor that is on a GPU or part of a graph.
        raise UserError(f"{name}: {str(error).splitlines()[0]}") from None
    if array.dtype.kind not in "fiu":
        raise UserError(f"{name}: found an array of {array.dtype}, expected real numbers")
    if array.size == 0:
        raise UserError(f"{name}: found an empty array of shape {array.shape}")
    # Single precision is what attacks are shown: nothing may overflow there.
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32)).all()
    if not finite:
        raise UserError(f"{name}: found NaN, infinity, or a number beyond single precision")
    return array.astype(np.float64)


def _updates(name: str, given: ArrayLike, axes: int) -> Floats:
    array = numbers(name, given)
    if array.ndim not in (axes, axes + 1):
        one = "C, D" if axes == 2 else "C"
        raise UserError(
            f"{name}: found an array of shape {array.shape}, expected [{one}], or [N, {one}] for "
            "several updates"
        )
    return array if array.ndim > axes else array[None]


def _shaped(name: str, given: ArrayLike, axes: str, shape: tuple[int, ...]) -> Floats:
    array = numbers(name, given)
    if array.shape != shape:
        raise UserError(
            f"{name}: found an array of shape {array.shape}, expected {axes} = {list(shape)}"
        )
    return array


def _observations(weight: Floats, bias: Floats | None, facts: Facts) -> Observations:
    single = weight.astype(np.float32)
    row_sums = single.sum(axis=2, dtype=np.float64)
    observations = Observations(
        row_sums=numbers("row sums of the weight gradient", row_sums).astype(np.float32),
        bias_gradient=None if bias is None else bias.astype(np.float32),
        weight_gradient=single,
        labels=np.full(len(single), facts.labels, np.int64),
        keys=np.arange(len(single)),
        local_steps=facts.local_steps,
    )
    for array in vars(observations).values():
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    return observations


def _head(
    weights: ArrayLike | None, bias: ArrayLike | None, shape: tuple[int, int], *, biased: bool
) -> Head | None:
    if weights is None:
        if bias is not None:
            raise UserError("model bias: given without the model weights")
        return None
    if bias is None and biased:
        raise UserError("model bias: missing; there is one, since there is a bias gradient")
    weight = _shaped("model weights", weights, "[C, D]", shape)
    if bias is None:
        return Head(weight, np.zeros(shape[0]))
    return Head(weight, _shaped("model bias", bias, "[C]", shape[:1]))


def _auxiliary(
    features: ArrayLike | None,
    labels: ArrayLike | None,
    posterior: ArrayLike | None,
    head: Head | None,
    shape: tuple[int, int],
) -> Outputs | None:
    if features is None and labels is None and posterior is None:
        return None
    if features is None or labels is None:
        missing = "features" if features is None else "labels"
        raise UserError(f"auxiliary {missing}: missing; features and labels belong together")
    classes, width = shape
    y = numbers("auxiliary labels", labels)
    if y.ndim != 1 or (y != np.rint(y)).any() or y.min() < 0 or y.max() >= classes:
        raise UserError(
            f"auxiliary labels: found shape {y.shape}, values from {y.min():g} to {y.max():g}; "
            f"expected [n] whole numbers from 0 to {classes - 1}, the classes of the weight "
            "gradient"
        )
    h = _shaped("auxiliary features", features, "[n, D]", (len(y), width))
    if posterior is not None:
        p = _shaped("auxiliary posterior", posterior, "[n, C]", (len(y), classes))
        if p.min() < 0 or np.abs(p.sum(axis=1) - 1).max() > 1e-3:
            raise UserError(
                "auxiliary posterior: expected softmax outputs: none negative, rows sum to 1"
            )
    elif head is not None:
        p = softmax(h @ head.weight.T + head.bias)
    else:
        raise UserError("auxiliary posterior: missing; only the model weights could replace it")
    return Outputs(p, h, y.astype(np.int64))


def _doubt(weight: Floats, bias: Floats | None) -> str:
    """Return why an update may be no gradient of the cross entropy; empty where it may."""
    size = np.abs(weight).sum()
    if size == 0:
        return "it is zero and tells nothing"
    remainder = float(np.abs(weight.sum(axis=0)).sum() / size)
    if bias is not None and bias.any():
        remainder = max(remainder, float(abs(bias.sum()) / np.abs(bias).sum()))
    if remainder <= _MOST_REMAINDER:
        return ""
    across = float(np.abs(weight.sum(axis=1)).sum() / size)
    reason = "it may be of another loss, hold weight decay or momentum, or have been defended"
    if across <= _MOST_REMAINDER:
        reason = "over the other axis they do cancel: is the array transposed, [D, C]?"
    return (
        f"gradients of the cross entropy cancel over the classes, of these {remainder:.2g} of "
        f"their size remains: {reason}"
    )
