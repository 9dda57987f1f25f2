"""Runs an attack on a round's updates: the same way live and in a replay. NumPy only."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.attacks.base import Attack, Calibration, Observations
from testbed.attacks.checks import check_answer

# Attacks work on at most this many values of the observations at once.
_CHUNK = 1 << 24


def infer_in_chunks(
    label: str, attack: Attack, observations: Observations, calibration: Calibration
) -> NDArray[Any]:
    """Return an attack's checked answers.

    Parameters
    ----------
    label, attack
        Which attack.
    observations
        Of N updates of one round, restricted to what the attack declares to look at.
    calibration
        What `Attack.arrays` declares, with a leading axis of length 1 or, for arrays with the axis
        ``client``, N.

    Returns
    -------
    NDArray
        int64 counts, bool presence, or float64 shares, [N, C].

    Raises
    ------
    UserError
        The attack's answer is no answer; see `testbed.attacks.checks`.
    """
    updates, classes = observations.row_sums.shape
    each = [name for name, (axes, _) in attack.arrays().items() if axes[:1] == ("client",)]
    weight = observations.weight_gradient
    step = max(1, _CHUNK // (classes if weight is None else weight[0].size))
    answers = []
    for start in range(0, updates, step):
        chosen = slice(start, start + step)
        part = observations.rows(chosen)
        known = {**calibration, **{name: calibration[name][chosen] for name in each}}
        inferred = attack.infer(part, known)
        check_answer(label, attack, inferred, part)
        answers.append(inferred.values)
    return np.concatenate(answers)
