"""The arrays of a results file: their axes, types and fill values, known before the first round.

`docs/file-format.md` is the specification. SWMR files can get no new object once they are open to
readers, so everything is declared from the plan.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FILE_ENCODING = ("testbed-results", "1.4")
# Of each dataset, beside its values: header, attributes, index of chunks; measured, rounded up.
STRUCTURE_BYTES = 2000
# Of a position on an axis.
_AXIS_BYTES = 8
# A kill can cut a write between two pages of memory. A chunk that is written again, in its place
# where its size is the same, must therefore fit into one, with checksum and what gzip may add; and
# smaller ones would waste less, since SWMR does not reuse places, but compress less.
PAGE_BYTES = 4096
_CHUNK_BYTES = 4000
# HDF5 allows no chunk of 4 GiB, and a reader holds whole ones.
_MOST_CHUNK_BYTES = 1 << 24
# Arrays with rows of attacked rounds alone.
_OF_ATTACKED = ("truth/", "observations/", "attacks/")
PHASES = ("publish", "wait", "aggregate", "attack", "evaluate", "write")

Calibrations = Mapping[str, tuple[tuple[str | int, ...], str]]

# What an attack answers: the array's name and type.
ANSWERS = {"counts": "<i4", "presence": "|i1", "distribution": "<f8"}
# What an attack knows, from little to all; `testbed.attacks.Knowledge` says what each means.
KNOWLEDGE = ("gradients", "model", "auxiliary", "malicious", "truth")
_ANONYMOUS = "length_"

# What the labels of attacks end in that stand beside a plain one.
ADAPTED, ACCUMULATED = "+adapted", "+rounds"


@dataclass(frozen=True)
class ArraySpec:
    """One array of a scenario; its first axis is always ``round``.

    Attributes
    ----------
    axes
        Names of the axes: ``round``, ``client``, ``member``, ``class``, ``feature``, ``buffer``,
        ``parameter``; ``length_N`` is an axis of length N without a meaning of its own.
    dtype
        NumPy dtype string.
    compressed
        Whether gzip pays: it does not for full-precision gradients.
    """

    axes: tuple[str, ...]
    dtype: str
    compressed: bool = True

    @property
    def fill(self) -> Any:
        """The value of what was never written."""
        kind = np.dtype(self.dtype).kind
        return {"f": np.nan, "i": -1, "u": 0}[kind]


def scenario_arrays(
    *,
    bias: bool,
    weight: bool,
    attacks: Mapping[str, tuple[str, Calibrations]],
    statistics: bool = False,
    update: bool = False,
    member: bool = False,
    accumulated: bool = False,
    varying: bool = False,
) -> dict[str, ArraySpec]:
    """Return the arrays of a scenario by path.

    Parameters
    ----------
    bias
        Whether the last layer has one.
    weight
        Whether the last layer's weight gradients are kept.
    attacks
        For each attack's label, what it answers (a key of `ANSWERS`), and the arrays of its
        calibration.
    statistics
        Whether BatchNorm's statistics are kept.
    update
        Whether whole updates are kept.
    member
        Whether the server sees only the sum of the round's clients, so that what is known of each
        client has an axis of its own.
    accumulated
        Whether some attack is on sums over the rounds.
    varying
        Whether updates differ in their local steps, so that calibrations are each update's own.
    """
    per_class = ("round", "client", "class")
    arrays = {
        "truth/counts": ArraySpec(per_class, "<i4"),
        "truth/posterior": ArraySpec(per_class, "<f4"),
        "observations/labels": ArraySpec(per_class[:2], "<i4"),
        "observations/row_sums": ArraySpec(per_class, "<f4"),
        "observations/norm": ArraySpec(per_class[:2], "<f4"),
    }
    if accumulated:
        arrays["truth/accumulated"] = ArraySpec(per_class, "<i4")
    if bias:
        arrays["observations/bias_gradient"] = ArraySpec(per_class, "<f4")
    if weight:
        arrays["observations/weight_gradient"] = ArraySpec(
            (*per_class, "feature"), "<f4", compressed=False
        )
    if statistics:
        arrays["observations/statistics"] = ArraySpec(
            ("round", "client", "buffer"), "<f4", compressed=False
        )
        arrays["observations/statistics_sent"] = ArraySpec(("round", "buffer"), "<f4")
    if update:
        arrays["observations/update"] = ArraySpec(
            ("round", "client", "parameter"), "<f4", compressed=False
        )
    for label, (answer, calibration) in attacks.items():
        arrays[f"attacks/{label}/{answer}"] = ArraySpec(per_class, ANSWERS[answer])
        for name, (axes, dtype) in calibration.items():
            named = [f"{_ANONYMOUS}{axis}" if isinstance(axis, int) else axis for axis in axes]
            # Clients have taken part in different numbers of rounds.
            each = varying or label.endswith(ACCUMULATED)
            if each and named[:1] != ["client"]:
                named.insert(0, "client")
            arrays[f"attacks/{label}/calibration/{name}"] = ArraySpec(
                ("round", *named), np.dtype(dtype).newbyteorder("<").str
            )
        arrays[f"timings/attacks/{label}"] = ArraySpec(("round",), "<f8")
    for name in ("loss", "accuracy"):
        arrays[f"rounds/{name}"] = ArraySpec(("round",), "<f8")
    per_client = ("round", "member" if member else "client")
    arrays["updates/identity"] = ArraySpec(per_client, "<i4")
    arrays["updates/local_steps"] = ArraySpec(per_client, "<i4")
    arrays["updates/arrived"] = ArraySpec(per_client, "|u1")
    if member:
        arrays["updates/clipped"] = ArraySpec(per_client, "<i4")
    arrays["updates/loss"] = ArraySpec(per_client, "<f8")
    arrays["updates/bytes_on_wire"] = ArraySpec(per_client, "<i8")
    arrays["updates/finite"] = ArraySpec(per_client, "|u1")
    for name in PHASES:
        arrays[f"timings/{name}"] = ArraySpec(("round",), "<f8")
    arrays["timings/client_seconds"] = ArraySpec(per_client, "<f8")
    arrays["timings/client_rank"] = ArraySpec(per_client, "<i4")
    return arrays


def used_lengths(arrays: Mapping[str, ArraySpec], lengths: Mapping[str, int]) -> dict[str, int]:
    """Return the lengths of those axes that some array has."""
    used = {axis for spec in arrays.values() for axis in spec.axes}
    anonymous = sorted(axis for axis in used if axis.startswith(_ANONYMOUS))
    return {axis: length for axis, length in lengths.items() if axis in used} | {
        axis: int(axis.removeprefix(_ANONYMOUS)) for axis in anonymous
    }


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return chunks of many small rounds, or of some clients of a large one.

    As equal ones as may be, since the last one takes as much of the file as the others.
    """
    row = max(1, math.prod(shape[1:]) * itemsize)
    if row <= _CHUNK_BYTES or len(shape) == 1:
        return (_even(shape[0], max(1, _CHUNK_BYTES // row)), *shape[1:])
    client = row // shape[1]
    return (1, _even(shape[1], max(1, _MOST_CHUNK_BYTES // client)), *shape[2:])


def _even(length: int, most: int) -> int:
    """Return the length of equal parts of at most ``most``."""
    return -(-length // -(-length // most))


def uncompressed_bytes(
    arrays: Mapping[str, ArraySpec], lengths: Mapping[str, int], attacked: int
) -> int:
    """Return what a scenario takes in the file at most: arrays without compression, and axes.

    Parameters
    ----------
    arrays
        Of the scenario.
    lengths
        Length of each axis.
    attacked
        How many rounds are attacked: of the others, some arrays have no rows.
    """
    lengths = used_lengths(arrays, lengths)
    values = _AXIS_BYTES * sum(lengths.values())
    for path, spec in arrays.items():
        shape, size = tuple(lengths[axis] for axis in spec.axes), np.dtype(spec.dtype).itemsize
        chunks = chunk_shape(shape, size)
        if chunks[0] == 1 and path.startswith(_OF_ATTACKED):
            shape = (attacked, *shape[1:])
        pairs = zip(shape, chunks, strict=True)
        number = math.prod(-(-length // max(part, 1)) for length, part in pairs)
        values += number * chunk_room(size * math.prod(chunks))
    return values + STRUCTURE_BYTES * (len(arrays) + len(lengths))


def chunk_room(size: int) -> int:
    """Return what a chunk of so many bytes takes in the file at most."""
    # With its checksum, a large one takes whole pages.
    return size if size <= _CHUNK_BYTES else PAGE_BYTES * -(-(size + 4) // PAGE_BYTES)
