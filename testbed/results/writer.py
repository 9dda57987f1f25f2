"""Writes the results file: everything declared first, then round after round, safe against kills.

The whole schema is created up front and the file switched to SWMR, in which HDF5 orders its writes
so that the file on disk is consistent at every moment. `committed_rounds` is written last: what it
counts is there.
"""

import contextlib
import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from testbed.errors import UserError
from testbed.results.chunks import copy_all, datasets, unpacked_bytes
from testbed.results.declaring import declare, scenario_name
from testbed.results.events import add_row, loss_row, start_row
from testbed.results.output import check_output, compact_path, partial_path, reason
from testbed.results.records import Loss, Rank, ScenarioHeader
from testbed.results.resuming import copy_rounds, take_over, unfinished
from testbed.results.room import reserve
from testbed.results.schema import PAGE_BYTES, chunk_shape
from testbed.results.storage import FAILURES, SLACK, abandon, begin, create

__all__ = [
    "ResultsWriter",
    "Rows",
    "check_output",
    "partial_path",
]

_PENDING_BYTES = 1 << 26
# A dataset's share of the file's structure.
_OVERHEAD = 1500
# A complete file may be larger by these factors than what is stored in it: always, and where it is
# not larger than it would be without compression.
_WASTE = (1.02, 1.25)
# Of each chunk in the index of an array.
_INDEX_BYTES = 24

Rows = Mapping[str, "NDArray[Any] | float | int"]


class ResultsWriter:
    """The one writer of a results file.

    Parameters
    ----------
    path
        Final name of the file; until `complete` it carries the suffix ``.partial``.
    attributes
        Attributes of the root group.
    ranks, scenarios
        Headers of all ranks and scenarios, in order.
    overwrite
        Whether files of that name may be replaced.
    commit_seconds
        Time between two commits; rounds are kept in memory until then. Longer where a commit takes
        more than a tenth of it.
    mode
        How the file is kept readable: ``swmr``, ``flush`` or ``auto``; see
        `testbed.results.storage.begin`.
    resuming
        Whether to go on with an unfinished file; see `resume`.

    Raises
    ------
    UserError
        The file cannot be created.
    """

    def __init__(
        self,
        path: Path,
        *,
        attributes: Mapping[str, str],
        ranks: Sequence[Rank],
        scenarios: Sequence[ScenarioHeader],
        overwrite: bool = False,
        commit_seconds: float = 1.0,
        mode: str = "auto",
        resuming: bool = False,
    ) -> None:
        self.path = path
        self._scenarios = scenarios
        self._commit_seconds = commit_seconds
        self._pending: list[tuple[int, int, Rows]] = []
        self._pending_bytes = 0
        self._losses: list[Loss] = []
        self._failed = False
        self._attributes, self._ranks = attributes, ranks
        self._committed = [0] * len(scenarios)

        def fill(file: h5py.File, old: h5py.File | None = None) -> None:
            declare(file, attributes, ranks, scenarios)
            if old is not None:
                self._committed = take_over(old, file)
            add_row(file, "starts", start_row(attributes, ranks, sum(self._committed)))

        if resuming:
            with unfinished(path) as old:
                copy = partial(copy_rounds, old), partial_path(path).stat().st_size
                self._storage = begin(path, partial(fill, old=old), lambda: None, mode, copy)
        else:
            check_output(path, overwrite=overwrite)
            # Once more at the end: a run may have begun meanwhile.
            check = partial(check_output, path, overwrite=overwrite)
            self._storage = begin(path, fill, check, mode)
        self._start = len(self._storage.file["starts/start"]) - 1
        self._next = list(self._committed)
        self._committed_at = time.monotonic()

    @classmethod
    def resume(
        cls,
        path: Path,
        *,
        attributes: Mapping[str, str],
        ranks: Sequence[Rank],
        scenarios: Sequence[ScenarioHeader],
        commit_seconds: float = 1.0,
        mode: str = "auto",
    ) -> "ResultsWriter":
        """Go on with the file that a writer left which was stopped or killed at any moment.

        What is committed is copied into a new file, which then takes the old one's place: until
        that moment the old one stays as it is.

        Parameters
        ----------
        path
            Final name of the file.
        attributes, ranks
            Of the new start. The root attributes of the first one stay; those of the new one go
            into the table ``starts``.
        scenarios, commit_seconds, mode
            As for a new file: the scenarios must be those that it was begun with.

        Raises
        ------
        UserError
            There is no unfinished file, another process writes it, it is damaged, it is of another
            run or another version, or there is no room for the copy.
        """
        return cls(
            path,
            attributes=attributes,
            ranks=ranks,
            scenarios=scenarios,
            commit_seconds=commit_seconds,
            mode=mode,
            resuming=True,
        )

    def committed(self, scenario: int) -> int:
        """Return how many rounds of a scenario are on disk."""
        return self._committed[scenario]

    def recorded(self, scenario: int) -> int:
        """Return how many rounds of a scenario have been appended, on disk or not."""
        return self._next[scenario]

    def append(self, scenario: int, round_: int, rows: Rows) -> None:
        """Add a round: for each path, the row of that array; absent paths keep their fill value.

        Rounds of a scenario are appended in order; they are on disk after the next commit.
        """
        unknown = rows.keys() - self._scenarios[scenario].arrays.keys()
        if unknown:
            raise KeyError(f"arrays that were not declared: {sorted(unknown)}")
        expected, rounds = self._next[scenario], self._scenarios[scenario].lengths["round"]
        if round_ != expected or round_ >= rounds:
            raise ValueError(
                f"scenario {scenario}: round {round_} of {rounds}, expected round {expected}: "
                "rounds must be appended in order"
            )
        self._next[scenario] = round_ + 1
        self._pending.append((scenario, round_, rows))
        self._pending_bytes += sum(np.asarray(row).nbytes for row in rows.values())
        pause = max(self._commit_seconds, self._storage.pause)
        full = self._pending_bytes > _PENDING_BYTES
        if time.monotonic() - self._committed_at >= pause or (full and not self._storage.pause):
            self.commit()
        elif full:
            with self._writing():
                self._write_pending()

    def record_loss(self, loss: Loss) -> None:
        """Note that a rank was lost; on disk when this returns, with all rounds so far."""
        self._losses.append(loss)
        self.commit()

    def commit(self) -> None:
        """Write all rounds that have been appended, then count them as committed.

        Raises
        ------
        UserError
            The disk is full, or fails otherwise. What was committed before stays readable.
        """
        storage = self._storage
        if self._next != self._committed or self._losses:
            with self._writing():
                self._write_pending()
                for loss in self._losses:
                    add_row(storage.file, "losses", loss_row(loss, self._start))
                storage.order()
                storage.file["committed_rounds"][...] = self._next
                storage.commit()
            self._losses.clear()
            self._committed = list(self._next)
        self._committed_at = time.monotonic()

    def _write_pending(self) -> None:
        for scenario, block in self._blocks().items():
            self._write(scenario, block)
        self._pending.clear()
        self._pending_bytes = 0

    def _blocks(self) -> dict[int, list[tuple[int, Rows]]]:
        """Return the rounds that are to be written, by scenario."""
        blocks: dict[int, list[tuple[int, Rows]]] = {}
        for scenario, round_, rows in self._pending:
            blocks.setdefault(scenario, []).append((round_, rows))
        return blocks

    def _most_bytes(self) -> int:
        """Return by how much the file may grow by what is to be written."""
        size = SLACK
        for scenario, block in self._blocks().items():
            header = self._scenarios[scenario]
            for path, spec in header.arrays.items():
                numbers = [number for number, rows in block if path in rows]
                if not numbers:
                    continue
                shape = tuple(header.lengths[axis] for axis in spec.axes)
                itemsize = np.dtype(spec.dtype).itemsize
                chunks = chunk_shape(shape, itemsize)
                parts = [-(-length // part) for length, part in zip(shape, chunks, strict=True)]
                touched = len({number // chunks[0] for number in numbers})
                size += touched * math.prod(parts[1:]) * (math.prod(chunks) * itemsize + PAGE_BYTES)
                size += _OVERHEAD + 2 * PAGE_BYTES + _INDEX_BYTES * touched * math.prod(parts[1:])
        return size

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        partial_, storage = partial_path(self.path), self._storage
        reserved = False
        try:
            # HDF5 would write on, to a file without a name.
            if not storage.in_place():
                raise FileNotFoundError(partial_)
            reserve(storage.file.id.get_vfd_handle(), self._most_bytes())
            reserved = True
            yield
        except FAILURES as error:
            self._failed = True
            if reserved:
                storage.abandon()
            if not storage.in_place():
                raise UserError(
                    f"{partial_}: the file is gone: it or its folder was removed or renamed while "
                    "the run was writing it; where it was renamed, `resume` goes on under its new "
                    "name (with its .checkpoint beside it), else begin again with `run`"
                ) from None
            raise UserError(
                f"{partial_}: cannot write to the results file: {reason(error)}; rounds committed "
                "before stay readable, and `resume` goes on from there"
            ) from None

    def complete(self) -> None:
        """Commit, close the file and give it its final name.

        Commits that write a chunk again leave its old place in the file unused, as SWMR does not
        reuse space. Where that is much, or more than compression has saved, the file is first
        copied into a compact one.
        """
        self.commit()
        partial_ = partial_path(self.path)
        with self._writing():
            file = self._storage.file
            found = datasets(file)
            stored = sum(dataset.id.get_storage_size() for dataset in found)
            stored += _OVERHEAD * len(found)
            allowed = max(_WASTE[0] * stored, min(_WASTE[1] * stored, unpacked_bytes(found)))
            wasted = partial_.stat().st_size > allowed
            compact = self._compact(stored) if wasted else None
            self._storage.close()
            # One after the other: there is never an unfinished file beside the complete one.
            if compact is not None:
                compact.replace(partial_)
            # What the run could go on from is removed next.
            with partial_.open("rb") as whole:
                os.fsync(whole.fileno())
            partial_.replace(self.path)

    def close(self) -> None:
        """Close an incomplete file, which keeps its name; nothing happens after `complete`.

        Rounds that have been appended are committed, if that is still possible.
        """
        # What ended the run is what the user has to hear of.
        with contextlib.suppress(Exception):
            if self._storage.file and not self._failed:
                self.commit()
        with contextlib.suppress(Exception):
            self._storage.close()

    def _compact(self, size: int) -> Path | None:
        """Return a copy without unused space, or None where there is no room for one."""
        compact = compact_path(self.path)
        target = None
        try:
            fill = partial(
                declare, attributes=self._attributes, ranks=self._ranks, scenarios=self._scenarios
            )
            target = create(compact, fill, size, paged=False)
            copy_all(self._storage.file, target)
            target.flush()
            target.close()
        except FAILURES:
            if target:
                abandon(target)
            compact.unlink(missing_ok=True)
            return None
        return compact

    def _write(self, scenario: int, block: Sequence[tuple[int, Rows]]) -> None:
        header = self._scenarios[scenario]
        group = self._storage.file[scenario_name(scenario)]
        for path, spec in header.arrays.items():
            if not any(path in rows for _, rows in block):
                continue
            shape = tuple(header.lengths[axis] for axis in spec.axes[1:])
            dataset = group[path]
            # What is never written takes no room: many arrays have rows in attacked rounds alone.
            present = [(number, rows[path]) for number, rows in block if path in rows]
            for run in _runs(present):
                values = np.empty((len(run), *shape), spec.dtype)
                for index, (_, row) in enumerate(run):
                    values[index] = row
                dataset[run[0][0] : run[-1][0] + 1] = values
            # Left to the closing of the dataset, an error of the disk would go unheard, and the
            # rounds would be counted as committed.
            dataset.flush()


def _runs(rows: Sequence[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """Yield numbered rows, ascending, in runs of consecutive numbers."""
    for _, run in itertools.groupby(enumerate(rows), lambda pair: pair[1][0] - pair[0]):
        yield [row for _, row in run]
