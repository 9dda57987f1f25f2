"""Writes the results file: everything declared first, then round after round, safe against kills.

The whole schema is created up front and the file switched to SWMR, in which HDF5 orders its writes
so that the file on disk is consistent at every moment. `committed_rounds` is written last: what it
counts is there.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from testbed.errors import UserError
from testbed.results.opening import PARTIAL
from testbed.results.schema import FILE_ENCODING, ArraySpec, chunk_shape

_PENDING_BYTES = 1 << 26
# A dataset's share of the file's structure.
_OVERHEAD = 1500

Rows = Mapping[str, "NDArray[Any] | float | int"]


@dataclass(frozen=True)
class AttackHeader:
    """The attributes of an attack's group."""

    name: str
    title: str
    knowledge: str
    source: str
    options: Mapping[str, Any]
    answers: str = "counts"
    observes: Sequence[str] = ()
    assumes: Sequence[str] = ()
    broken: Mapping[str, str] = field(default_factory=dict)
    not_applicable: str = ""
    target: str = "update"
    adapted: str = ""
    adaptation: Sequence[str] = ()


@dataclass(frozen=True)
class ScenarioHeader:
    """What is known of a scenario before its first round."""

    swept: Mapping[str, Any]
    parameters: Mapping[str, Any]
    model_parameters: int
    model_buffers: int
    last_layer: str
    lengths: Mapping[str, int]
    arrays: Mapping[str, ArraySpec]
    attacks: Mapping[str, AttackHeader]
    privacy: Mapping[str, Any] = field(default_factory=dict)
    number: int | None = None
    draws: int | None = None


@dataclass(frozen=True)
class RankHeader:
    """Where a rank computes."""

    host: str
    device: str
    role: str
    local_rank: int


def partial_path(path: Path) -> Path:
    """Return the name that a results file has while it is being written."""
    return path.with_name(path.name + PARTIAL)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise `UserError` where a results file could not be created."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist: create it first")
    if path.is_dir():
        raise UserError(f"{path}: this is a folder, expected the name of a results file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: the folder {path.parent} cannot be written to")
    partial = partial_path(path)
    if partial.is_dir():
        raise UserError(f"{partial}: this is a folder: choose another name for the results")
    if partial.exists():
        with partial.open("r+b") as file:
            if not _hold(file.fileno()):
                raise UserError(f"{partial}: a run is writing this file: choose another name")
    if overwrite:
        return
    if path.exists():
        raise UserError(f"{path}: the file exists: choose another name, or pass --overwrite")
    if partial.exists():
        raise UserError(
            f"{partial}: the file exists: it was left by a run that was stopped; choose another "
            "name, or pass --overwrite to discard its rounds"
        )


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
        Time between two commits; rounds are kept in memory until then.
    """

    def __init__(
        self,
        path: Path,
        *,
        attributes: Mapping[str, str],
        ranks: Sequence[RankHeader],
        scenarios: Sequence[ScenarioHeader],
        overwrite: bool = False,
        commit_seconds: float = 1.0,
    ) -> None:
        check_output(path, overwrite=overwrite)
        self.path = path
        self._scenarios = scenarios
        self._commit_seconds = commit_seconds
        self._pending: list[tuple[int, int, Rows]] = []
        self._pending_bytes = 0
        self._next = [0] * len(scenarios)
        self._attributes, self._ranks = attributes, ranks
        partial = partial_path(path)
        # A file whose writer dies before SWMR begins cannot be read: it gets its name afterwards.
        unborn = path.with_name(path.name + ".creating")
        try:
            unborn.unlink(missing_ok=True)
            # libver: files that HDF5 2 writes as `latest` cannot be read by 1.14.
            self._file = h5py.File(unborn, "x", libver=("v110", "v110"))
        except OSError as error:
            raise UserError(f"{unborn}: cannot create the results file: {error}") from None
        try:
            self._declare(self._file)
            self._file.swmr_mode = True
            self._lock = unborn.open("r+b")
            _hold(self._lock.fileno())
            check_output(path, overwrite=overwrite)  # again: a run may have begun meanwhile
            unborn.replace(partial)
        except BaseException as error:
            with contextlib.suppress(Exception):
                self._file.close()
            unborn.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise UserError(
                    f"{unborn}: cannot create the results file: {_first_line(error)}"
                ) from None
            raise
        self._committed_at = time.monotonic()

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
        due = time.monotonic() - self._committed_at >= self._commit_seconds
        if due or self._pending_bytes > _PENDING_BYTES:
            self.commit()

    def commit(self) -> None:
        """Write all rounds that have been appended, then count them as committed."""
        by_scenario: dict[int, list[tuple[int, Rows]]] = {}
        for scenario, round_, rows in self._pending:
            by_scenario.setdefault(scenario, []).append((round_, rows))
        try:
            for scenario, block in by_scenario.items():
                self._write(scenario, block)
            self._file.flush()
            for scenario, block in by_scenario.items():
                self._file["committed_rounds"][scenario] = block[-1][0] + 1
            self._file["committed_rounds"].flush()
        except (OSError, RuntimeError) as error:  # HDF5 raises either where the disk is full
            raise UserError(
                f"{partial_path(self.path)}: cannot write to the results file: "
                f"{_first_line(error)}; rounds committed before stay readable"
            ) from None
        self._pending.clear()
        self._pending_bytes = 0
        self._committed_at = time.monotonic()

    def complete(self) -> None:
        """Commit, close the file and give it its final name.

        Commits that write a chunk again leave its old place in the file unused, as SWMR does not
        reuse space. Where that is much, the file is first copied into a compact one.
        """
        self.commit()
        self._lock.close()
        partial = partial_path(self.path)
        stored = sum(dataset.id.get_storage_size() for dataset in _datasets(self._file))
        wasted = partial.stat().st_size > 1.25 * stored + _OVERHEAD * len(_datasets(self._file))
        compact = self._compact() if wasted else None
        self._file.close()
        if compact is None:
            partial.replace(self.path)
        else:
            compact.replace(self.path)
            partial.unlink()

    def close(self) -> None:
        """Close an incomplete file, which keeps its name; nothing happens after `complete`.

        Rounds that have been appended are committed, if that is still possible.
        """
        if self._file:
            # What ended the run is what the user has to hear of.
            with contextlib.suppress(Exception):
                self.commit()
            with contextlib.suppress(Exception):
                self._file.close()
        self._lock.close()

    def _compact(self) -> Path | None:
        """Return a copy without unused space, or None where there is no room for one."""
        compact = self.path.with_name(self.path.name + ".compact")
        try:
            with h5py.File(compact, "w", libver=("v110", "v110")) as target:
                self._declare(target)
                _copy_chunks(self._file, target)
        except OSError:
            compact.unlink(missing_ok=True)
            return None
        return compact

    def _write(self, scenario: int, block: Sequence[tuple[int, Rows]]) -> None:
        header = self._scenarios[scenario]
        group = self._file[_scenario_name(scenario)]
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

    def _declare(self, root: h5py.File) -> None:
        ranks = self._ranks
        _encode(root, FILE_ENCODING[0])
        root.attrs.update(self._attributes)
        _scale(root, "scenario", len(self._scenarios))
        committed = root.create_dataset(
            "committed_rounds", data=np.zeros(len(self._scenarios), "<i8")
        )
        committed.dims[0].attach_scale(root["scenario"])

        table = root.create_group("ranks")
        _encode(table, "ranks")
        _scale(table, "rank", len(ranks))
        columns = {
            "host": np.array([rank.host.encode() for rank in ranks], dtype="S"),
            "device": np.array([rank.device.encode() for rank in ranks], dtype="S"),
            "role": np.array([rank.role.encode() for rank in ranks], dtype="S"),
            "local_rank": np.array([rank.local_rank for rank in ranks], dtype="<i4"),
        }
        for name, column in columns.items():
            table.create_dataset(name, data=column).dims[0].attach_scale(table["rank"])

        _encode(root.create_group("scenarios"), "scenarios")
        for index, header in enumerate(self._scenarios):
            group = root.create_group(_scenario_name(index))
            number = index if header.number is None else header.number
            group.attrs["number"] = number
            group.attrs["draws"] = number if header.draws is None else header.draws
            self._declare_scenario(group, header)

    @staticmethod
    def _declare_scenario(group: h5py.Group, header: ScenarioHeader) -> None:
        _encode(group, "scenario")
        group.attrs["swept"] = json.dumps(dict(header.swept))
        group.attrs["parameters"] = json.dumps(dict(header.parameters))
        group.attrs["model_parameters"] = header.model_parameters
        group.attrs["model_buffers"] = header.model_buffers
        group.attrs["last_layer"] = header.last_layer
        group.attrs["privacy"] = json.dumps(dict(header.privacy))
        for axis, length in header.lengths.items():
            _scale(group, axis, length)
        for path, spec in header.arrays.items():
            shape = tuple(header.lengths[axis] for axis in spec.axes)
            dataset = group.create_dataset(
                path,
                shape,
                spec.dtype,
                chunks=chunk_shape(shape, np.dtype(spec.dtype).itemsize),
                fillvalue=spec.fill,
                compression="gzip" if spec.compressed else None,
                compression_opts=1 if spec.compressed else None,
                shuffle=spec.compressed,
                fletcher32=True,
            )
            for position, axis in enumerate(spec.axes):
                dataset.dims[position].attach_scale(group[axis])
        for name in ("truth", "observations", "attacks", "rounds", "updates", "timings"):
            _encode(group[name], name)
        _encode(group["timings/attacks"], "attack-timings")
        for label, attack in header.attacks.items():
            described = group[f"attacks/{label}"]
            _encode(described, "attack")
            described.attrs["name"] = attack.name
            described.attrs["title"] = attack.title
            described.attrs["knowledge"] = attack.knowledge
            described.attrs["source"] = attack.source
            described.attrs["options"] = json.dumps(dict(attack.options))
            described.attrs["answers"] = attack.answers
            described.attrs["observes"] = json.dumps(list(attack.observes))
            described.attrs["assumes"] = json.dumps(list(attack.assumes))
            described.attrs["broken_assumptions"] = json.dumps(dict(attack.broken))
            described.attrs["not_applicable"] = attack.not_applicable
            described.attrs["target"] = attack.target
            described.attrs["adapted"] = attack.adapted
            described.attrs["adaptation"] = json.dumps(list(attack.adaptation))
            if "calibration" in described:
                _encode(described["calibration"], "calibration")


def _runs(rows: Sequence[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """Yield numbered rows, ascending, in runs of consecutive numbers."""
    for _, run in itertools.groupby(enumerate(rows), lambda pair: pair[1][0] - pair[0]):
        yield [row for _, row in run]


def _datasets(file: h5py.File) -> list[h5py.Dataset]:
    found: list[h5py.Dataset] = []

    def visit(_: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            found.append(item)

    file.visititems(visit)
    return found


def _copy_chunks(source: h5py.File, target: h5py.File) -> None:
    """Copy the values of all datasets; chunks as they are, still compressed."""
    for dataset in _datasets(source):
        copy = target[dataset.name]
        if dataset.chunks is None:
            copy[...] = dataset[...]
            continue
        for index in range(dataset.id.get_num_chunks()):
            offset = dataset.id.get_chunk_info(index).chunk_offset
            mask, chunk = dataset.id.read_direct_chunk(offset)
            copy.id.write_direct_chunk(offset, chunk, mask)


def _hold(descriptor: int) -> bool:
    """Lock a file for this process until it is closed; return whether no other one holds it.

    A POSIX lock, which also works between the nodes of a cluster, and does not meet the locks of
    HDF5 itself, which are of the other kind.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _scenario_name(index: int) -> str:
    return f"scenarios/{index:04d}"


def _encode(group: h5py.Group, kind: str) -> None:
    group.attrs["encoding-type"] = kind
    group.attrs["encoding-version"] = FILE_ENCODING[1]


def _scale(group: h5py.Group, name: str, length: int) -> None:
    group.create_dataset(name, data=np.arange(length, dtype="<i8")).make_scale(name)
