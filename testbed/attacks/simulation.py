"""What clients would send, simulated from the outputs on samples that the adversary owns.

The last layer's gradient has a closed form, ``(p - onehot(y)) h^T`` per sample, so that a synthetic
batch is a choice of samples, and costs no forward or backward pass of the model. NumPy only.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.attacks.base import Head, Observations, Outputs

Floats = NDArray[np.floating[Any]]


def simulate_head(
    outputs: Outputs,
    head: Head | None,
    batches: NDArray[np.int64],
    learning_rate: float,
    targets: NDArray[np.float32] | None = None,
) -> Observations:
    """Observe updates of clients that hold the given samples.

    Parameters
    ----------
    outputs
        On n samples, with their labels.
    head
        The last layer; may be None for a single local step.
    batches
        int64 [S, E, B]: positions among the n samples for each of E local steps. The features
        stay as they are; the last layer alone moves from step to step.
    learning_rate
        Of the local steps.
    targets
        float32 [S, E, B, C], or None: label distributions in place of the samples' own labels.

    Returns
    -------
    Observations
        Of S updates, float32.

    Raises
    ------
    ValueError
        The outputs have no labels, or several steps are asked for without a head.
    """
    if outputs.labels is None:
        raise ValueError("clients cannot be simulated with inputs that have no labels")
    simulations, steps, size = batches.shape
    posterior, features = outputs.posterior, outputs.features
    if steps == 1:
        chosen = batches[:, 0]
        weight, bias = head_gradient(
            posterior[chosen],
            features[chosen],
            outputs.labels[chosen],
            None if targets is None else targets[:, 0],
        )
        return _observations(weight, bias, 1, size)
    if head is None:
        raise ValueError("simulating several local steps needs the last layer's weights")
    w = np.broadcast_to(head.weight, (simulations, *head.weight.shape)).copy()
    b = np.broadcast_to(head.bias, (simulations, len(head.bias))).copy()
    weight, bias = np.zeros_like(w), np.zeros_like(b)
    for step in range(steps):
        chosen = batches[:, step]
        h = features[chosen]
        logits = np.matmul(h, w.swapaxes(1, 2)) + b[:, None, :]
        dw, db = head_gradient(
            softmax(logits),
            h,
            outputs.labels[chosen],
            None if targets is None else targets[:, step],
        )
        weight += dw
        bias += db
        w -= learning_rate * dw
        b -= learning_rate * db
    return _observations(weight, bias, steps, steps * size)


def head_gradient(
    posterior: NDArray[np.float64],
    features: NDArray[np.float64],
    labels: NDArray[np.int64],
    targets: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the last layer's gradients [S, C, D] and [S, C] of the mean cross entropy.

    Parameters
    ----------
    posterior, features
        float64 [S, B, C] and [S, B, D].
    labels
        int64 [S, B].
    targets
        float32 [S, B, C], or None: label distributions in place of the labels.
    """
    if targets is None:
        residual = posterior.copy()
        index = labels[..., None]
        np.put_along_axis(residual, index, np.take_along_axis(residual, index, -1) - 1, -1)
    else:
        residual = posterior - targets
    weight = np.matmul(residual.swapaxes(1, 2), features) / labels.shape[1]
    return weight, residual.mean(axis=1)


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the softmax over the last axis."""
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: NDArray[np.float64] = odds / odds.sum(axis=-1, keepdims=True)
    return shares


def _observations(weight: Floats, bias: Floats, steps: int, labels: int) -> Observations:
    # As an update has them: the weight gradient in single precision, its sums in double.
    single = weight.astype(np.float32)
    return Observations(
        row_sums=single.sum(axis=2, dtype=np.float64).astype(np.float32),
        bias_gradient=bias.astype(np.float32),
        weight_gradient=single,
        labels=np.full(len(single), labels),
        keys=np.arange(len(single)),
        local_steps=steps,
    )
