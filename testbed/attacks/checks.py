"""What an attack has to answer: a wrong answer would be scored as a success, or as a failure."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.attacks.base import Answer, Attack, Calibration, CalibrationArrays, Observations
from testbed.errors import UserError

_AXES = ("client", "class", "feature", "buffer")
_DTYPES = ("float64", "uint64")
_TOLERANCE = 1e-6


def check_declaration(name: str, arrays: CalibrationArrays) -> None:
    """Raise `UserError` where the calibration's arrays are declared wrongly."""
    for array, (axes, dtype) in arrays.items():
        good = all(
            axis > 0 if isinstance(axis, int) else axis in _AXES[place > 0 :]
            for place, axis in enumerate(axes)
        )
        if not good or np.dtype(dtype).name not in _DTYPES:
            raise UserError(
                f"attack {name!r}: calibration array {array!r} has the axes {axes} and dtype "
                f"{dtype!r}, expected axes among {_AXES} (client first) or whole numbers, and a "
                f"dtype among {_DTYPES}"
            )


def check_calibration(
    label: str, attack: Attack, calibration: Calibration, lengths: Mapping[str, int]
) -> None:
    """Raise `UserError` where a calibration is not what its attack declares.

    Parameters
    ----------
    label, attack
        Whose it is.
    calibration
        What `calibrate` and `calibrate_updates` returned together.
    lengths
        Of the axes ``client``, ``class``, ``feature`` and ``buffer``.
    """
    declared = attack.arrays()
    if calibration.keys() != declared.keys():
        raise UserError(
            f"attack {label!r}: the calibration has the arrays {sorted(calibration)}, but "
            f"{sorted(declared)} are declared in calibration_arrays"
        )
    for name, values in calibration.items():
        axes = declared[name][0]
        shape = tuple(axis if isinstance(axis, int) else lengths[axis] for axis in axes)
        expected = shape if axes[:1] == ("client",) else (1, *shape)
        if np.shape(values) != expected:
            raise UserError(
                f"attack {label!r}: calibration array {name!r} has shape {np.shape(values)}, "
                f"expected {expected}: a leading axis of length 1 or one entry per client, then "
                f"{axes or 'nothing'}"
            )


def check_answer(label: str, attack: Attack, inferred: object, observations: Observations) -> None:
    """Raise `UserError` where an answer is no answer of the declared kind to these updates."""
    answer = getattr(inferred, "answer", None)
    if answer is not attack.answers:
        raise UserError(
            f"attack {label!r}: infer returned {type(inferred).__name__}, but the attack declares "
            f"that it answers {attack.answers.value}"
        )
    values = inferred.values  # type: ignore[attr-defined]
    expected = observations.row_sums.shape
    if not isinstance(values, np.ndarray) or values.shape != expected:
        found = getattr(values, "shape", type(values).__name__)
        raise UserError(
            f"attack {label!r}: infer returned {found}, expected {answer.value} {expected}"
        )
    _CHECKS[answer](label, values, observations)


def _check_counts(label: str, counts: NDArray[Any], observations: Observations) -> None:
    if counts.dtype.kind not in "iu":
        raise UserError(
            f"attack {label!r}: infer returned {counts.dtype} counts, expected integers: round "
            "scores with testbed.attacks.rounding.largest_remainder"
        )
    wrong = (counts < 0).any(axis=1) | (counts.sum(axis=1) != observations.labels)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"attack {label!r}: infer returned the counts {counts[row].tolist()}, expected "
            f"natural numbers that sum to the update's {observations.labels[row]} labels"
        )


def _check_presence(label: str, presence: NDArray[Any], _: Observations) -> None:
    if presence.dtype != np.bool_:
        raise UserError(
            f"attack {label!r}: infer returned {presence.dtype} for presence, expected bool"
        )


def _check_distribution(label: str, shares: NDArray[Any], _: Observations) -> None:
    sums = shares.sum(axis=1) if shares.dtype.kind == "f" else np.full(len(shares), np.nan)
    wrong = (shares < 0).any(axis=1) | ~(np.abs(sums - 1) <= _TOLERANCE)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"attack {label!r}: infer returned the shares {shares[row].tolist()}, expected "
            "floating-point numbers, none negative, that sum to 1"
        )


_CHECKS = {
    Answer.COUNTS: _check_counts,
    Answer.PRESENCE: _check_presence,
    Answer.DISTRIBUTION: _check_distribution,
}
