"""What closed-form attacks share: arrays of any library, the identity, the path of local steps.

For every batch, ``lambda = N (pbar - b / E)``: the label counts are the mean posterior less the
mean bias gradient of the steps, times the number of labels. The attacks differ in what they take
for the mean posterior.
"""

from collections.abc import Iterator

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from testbed.attacks.base import Adversary, Array, Observations

# Up to here D x D numbers are decomposed in less than half a second.
_NARROW = 1024


def float64(array: Array) -> Array:
    """Return an array in double precision."""
    xp = array_namespace(array)
    return xp.astype(array, xp.float64)


def given(values: Array, like: Array) -> Array:
    """Return a calibration as an array of the library and device of ``like``, float64.

    A diverged model gives calibrations that say nothing: what is not finite counts as 0.
    """
    xp = array_namespace(like)
    values = xp.asarray(values, dtype=xp.float64, device=device(like))
    return xp.where(xp.isfinite(values), values, xp.zeros_like(values))


def column(labels: Array, like: Array) -> Array:
    """Return the numbers of labels as a column, float64 [N, 1], beside ``like`` [N, C]."""
    xp = array_namespace(like)
    return xp.astype(xp.asarray(labels, device=device(like)), xp.float64)[:, None]


def required(part: Array | None, name: str) -> Array:
    """Return a part of the observations.

    Raises
    ------
    ValueError
        It is None: the attack was run without what it declares to observe.
    """
    if part is None:
        raise ValueError(f"the attack needs the updates' {name}, and the observations have none")
    return part


def mean_bias_gradient(observations: Observations) -> Array:
    """Return the bias gradient averaged over the local steps, float64 [N, C]."""
    bias = float64(required(observations.bias_gradient, "bias gradient"))
    return bias / observations.local_steps


def leading_directions(rows: NDArray[np.float64], kept: int) -> NDArray[np.float64]:
    """Return the leading right singular vectors of a matrix, float64 [D, kept].

    Zeros behind the last one there is.

    Parameters
    ----------
    rows
        float64 [n, D]; what is not finite counts as 0.
    kept
        How many.
    """
    rows = np.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0)
    peak = np.abs(rows).max()
    rows = rows / (peak if peak > 0 else 1.0)
    if rows.shape[1] <= max(len(rows), _NARROW):
        _, ascending = np.linalg.eigh(rows.T @ rows)
        vectors = ascending[:, ::-1]
    else:
        vectors = np.linalg.svd(rows, full_matrices=False)[2].T
    directions = np.zeros((rows.shape[1], kept))
    leading = vectors[:, :kept]
    directions[:, : leading.shape[1]] = leading
    return directions


def non_negative_solution(
    system: NDArray[np.float64], side: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the x >= 0 that minimises ``|system x - side|``, float64 [columns].

    The plain least-squares solution, cut at 0, where the solver does not settle.
    """
    from scipy.optimize import nnls

    try:
        solution, _ = nnls(system, side, maxiter=30 * system.shape[1])
    except RuntimeError:
        solution = np.clip(np.linalg.lstsq(system, side)[0], 0.0, None)
    return np.asarray(solution, np.float64)


def step_fractions(local_steps: int) -> NDArray[np.float64]:
    """Return how much of the way each local step's model is from the first to the last, [E]."""
    return np.arange(local_steps) / local_steps


def last_models(adversary: Adversary, observations: Observations) -> Iterator[Adversary]:
    """Yield the adversary at the model that each of the N clients ended with.

    For one local step no gradient was taken there, and the global model is yielded in its place:
    its outputs are known already.
    """
    for update in required(observations.update, "whole update"):
        # A copy: observations are read-only, which torch warns about.
        yield adversary if adversary.local_steps == 1 else adversary.after(np.array(update))
