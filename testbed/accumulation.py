"""A client's updates added up over the rounds, for attackers who wait.

Error feedback sends later what it held back, and unbiased noise averages out. The sum of a client's
updates is an update of all their local steps, and its labels are those of all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.attacks.base import Observations
from testbed.round import Round

_SUMMED = ("row_sums", "bias", "weight", "counts")


@dataclass
class _Sum:
    row_sums: NDArray[np.float64]
    bias: NDArray[np.float64] | None
    weight: NDArray[np.float64] | None
    counts: NDArray[np.int64]
    believed: int = 0
    steps: int = 0


class Accumulated:
    """Sums of each client's observations since the first round.

    Parameters
    ----------
    weights
        Whether some attack looks at the last layer's weight gradients.
    """

    def __init__(self, *, weights: bool) -> None:
        self._weights = weights
        self._sums: dict[int, _Sum] = {}
        self._rows: dict[int, int] = {}

    def add(self, record: Round, identities: NDArray[Any], believed: NDArray[np.int64]) -> None:
        """Add a round's updates, those that came and were finite.

        Parameters
        ----------
        record
            Of the round.
        identities, believed
            [observed]: whose each update is, and how many labels the server takes it to have.
        """
        self._rows = {}
        for row in np.flatnonzero(record.seen):
            identity = int(identities[row])
            self._rows[int(row)] = identity
            total = self._sums.get(identity)
            if total is None:
                classes = record.row_sums.shape[1]
                total = self._sums[identity] = _Sum(
                    np.zeros(classes),
                    None if record.bias is None else np.zeros(classes),
                    self._no_weight(record),
                    np.zeros(classes, np.int64),
                )
            total.row_sums += record.row_sums[row]
            if total.bias is not None and record.bias is not None:
                total.bias += record.bias[row]
            if total.weight is not None and record.weight is not None:
                total.weight += record.weight[row]
            total.counts += record.counts[row]
            total.believed += int(believed[row])
            total.steps += int(record.steps[row])

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the sums as arrays: of n clients, in the order in which they were first seen.

        ``identities``, ``believed``, ``steps`` int64 [n]; ``counts`` int64 [n, C]; ``row_sums``
        and, where there are any, ``bias`` float64 [n, C] and ``weight`` float64 [n, C, D].
        """
        sums = list(self._sums.values())
        arrays = {
            "identities": np.array(list(self._sums), np.int64),
            "believed": np.array([one.believed for one in sums], np.int64),
            "steps": np.array([one.steps for one in sums], np.int64),
        }
        for name in _SUMMED:
            values = [getattr(one, name) for one in sums]
            if sums and values[0] is not None:
                arrays[name] = np.stack(values)
        return arrays

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `state` returned.

        `KeyError` or `ValueError` if that makes no sense.
        """
        numbers = [state[name].tolist() for name in ("identities", "believed", "steps")]
        sums: dict[int, _Sum] = {}
        for place, (identity, believed, steps) in enumerate(zip(*numbers, strict=True)):
            parts = {name: state[name][place].copy() for name in _SUMMED if name in state}
            sums[identity] = _Sum(
                parts["row_sums"],
                parts.get("bias"),
                parts.get("weight"),
                parts["counts"],
                believed,
                steps,
            )
        self._sums, self._rows = sums, {}

    def _no_weight(self, record: Round) -> NDArray[np.float64] | None:
        if record.weight is None or not self._weights:
            return None
        return np.zeros(record.weight.shape[1:])

    def counts(self, record: Round, observed: int) -> NDArray[np.int32]:
        """Return the label counts behind the sums of this round's clients, int32 [observed, C]."""
        counts = np.full((observed, record.counts.shape[1]), -1, np.int32)
        for row, identity in self._rows.items():
            counts[row] = self._sums[identity].counts
        return counts

    def observations(self, seen: NDArray[np.int64]) -> list[Observations]:
        """Return the sums of this round's clients, those of equally many local steps together.

        ``seen`` says which of the round's updates are attacked.
        """
        groups: dict[int, list[int]] = {}
        for row in seen:
            groups.setdefault(self._sums[self._rows[int(row)]].steps, []).append(int(row))
        return [self._group(np.array(rows), steps) for steps, rows in sorted(groups.items())]

    def _group(self, rows: NDArray[np.int64], steps: int) -> Observations:
        sums = [self._sums[self._rows[int(row)]] for row in rows]

        def stacked(name: str) -> NDArray[np.float32] | None:
            values = [getattr(one, name) for one in sums]
            if any(value is None for value in values):
                return None
            return np.stack(values).astype(np.float32)

        row_sums = stacked("row_sums")
        assert row_sums is not None
        observations = Observations(
            row_sums=row_sums,
            bias_gradient=stacked("bias"),
            weight_gradient=stacked("weight"),
            labels=np.array([one.believed for one in sums]),
            keys=rows,
            local_steps=steps,
        )
        # Every attack is given the same arrays; none may change what the next one sees.
        for array in vars(observations).values():
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
        return observations
