"""What an attack has to answer: a wrong answer would be scored as a success, or as a failure."""

import numpy as np

from testbed.attacks.base import Attack, Calibration, Observations
from testbed.errors import UserError

_AXES = ("class", "feature")
_DTYPES = ("float64", "uint64")


def check_declaration(name: str, attack: type[Attack]) -> None:
    """Raise `UserError` where the calibration's arrays are declared wrongly."""
    for array, (axes, dtype) in attack.calibration_arrays.items():
        unknown = [axis for axis in axes if axis not in _AXES]
        if unknown or np.dtype(dtype).name not in _DTYPES:
            raise UserError(
                f"attack {name!r}: calibration array {array!r} has the axes {axes} and dtype "
                f"{dtype!r}, expected axes among {_AXES} and a dtype among {_DTYPES}"
            )


def check_calibration(label: str, attack: Attack, calibration: Calibration) -> None:
    """Raise `UserError` where a calibration is not what its attack declares."""
    declared = attack.calibration_arrays
    if calibration.keys() != declared.keys():
        raise UserError(
            f"attack {label!r}: calibrate returned {sorted(calibration)}, but declares "
            f"{sorted(declared)} in calibration_arrays"
        )
    for name, values in calibration.items():
        axes = declared[name][0]
        if values.ndim != 1 + len(axes) or values.shape[0] != 1:
            raise UserError(
                f"attack {label!r}: calibration array {name!r} has shape {values.shape}, expected "
                f"a leading axis of length 1, then {axes or 'nothing'}"
            )


def check_counts(label: str, counts: object, observations: Observations) -> None:
    """Raise `UserError` where counts are no label counts of the updates: [N, C], summing to N."""
    expected = observations.row_sums.shape
    if not isinstance(counts, np.ndarray) or counts.shape != expected:
        found = getattr(counts, "shape", type(counts).__name__)
        raise UserError(f"attack {label!r}: infer returned {found}, expected counts {expected}")
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
