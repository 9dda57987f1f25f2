"""Reads results files: complete, still growing, or left behind by a writer that was killed.

`docs/file-format.md` is the specification. Needs h5py and numpy only. Nothing beyond the committed
rounds of a scenario is ever returned.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import h5py
import numpy as np
from numpy.typing import NDArray

from testbed.errors import UserError, suggest
from testbed.results import checked
from testbed.results.opening import PARTIAL, locate, open_file
from testbed.results.schema import ANSWERS

_ROOT = "testbed-results"
# Root attributes that tell one run from another.
_OWN = {"created", "experiment", "run", "share"}
# A writer may be replacing a chunk at the very moment that it is read.
_ATTEMPTS, _PAUSE_SECONDS = 5, 0.05

_Reader = Callable[[h5py.Group], Any]
_READERS: dict[tuple[str, int], _Reader] = {}


@dataclass(frozen=True)
class Rank:
    """Where a rank computed.

    Attributes
    ----------
    rank, local_rank
        In the world, and on its host.
    host
        Host name.
    device
        ``cpu`` or ``cuda:N NAME``.
    role
        ``server``, ``client`` or ``server+client``.
    cores
        The CPUs of the host that it may run on, as in ``0-3,8``. Empty where that is not known, as
        before version 1.4.
    gpu
        What tells its GPU from all others, whatever numbers the ranks give it. Empty on a CPU, and
        where that is not known.
    """

    rank: int
    host: str
    device: str
    role: str
    local_rank: int
    cores: str = ""
    gpu: str = ""


@dataclass(frozen=True)
class AttackInfo:
    """What an attack was.

    Attributes
    ----------
    name, title, source
        As registered; ``source`` names the publication.
    knowledge
        ``gradients``, ``model``, ``auxiliary``, ``malicious`` or ``truth``.
    options
        Its knobs.
    answers
        ``counts``, ``presence`` or ``distribution``: the name of the array with its answers.
    observes, assumes
        The parts of an update that it looks at, and what it takes for granted.
    broken
        Those of its assumptions that the scenario breaks, and what was found instead.
    not_applicable
        Why it was not run in this scenario; empty where it was.
    target
        Which truth its answers are about: the ``update``'s own labels, or those ``accumulated``
        over all updates of the client so far.
    adapted, adaptation
        Label of the plain attack that it is, as run by someone who knows the defences, and what
        that one does about each; both empty for a plain attack.
    """

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
class Start:
    """One start of the run: the first, or one that went on with the file.

    Attributes
    ----------
    time
        ISO 8601, UTC.
    ranks
        Size of the world.
    hosts
        Their names, separated by commas.
    library
        The MPI library; empty for a run without MPI.
    software
        Versions, as JSON; cut off where it was too long.
    command, slurm_job
        The command line, and the number of the job; empty outside Slurm.
    committed
        Rounds of all scenarios that were there already.
    """

    time: str
    ranks: int
    hosts: str
    library: str
    software: str
    command: str
    slurm_job: str
    committed: int


@dataclass(frozen=True)
class Loss:
    """A rank that was lost while the run went on.

    Attributes
    ----------
    time
        ISO 8601, UTC.
    rank
        Its number in the world as it was at the start.
    host
        Where it was.
    reason
        ``killed`` or ``stuck``.
    start
        During which start, from 0.
    scenario, round
        Where the run was: number of the scenario in the file, and of the round.
    seconds
        Until the round went on.
    """

    time: str
    rank: int
    host: str
    reason: str
    start: int
    scenario: int
    round: int
    seconds: float


class Scenario:
    """One scenario of a results file.

    Attributes
    ----------
    index
        Its number in the file.
    number
        Its number in the order of the sweep: another one where the run did a share of the
        scenarios.
    draws
        The number in the keys of its random streams: of the first scenario that differs in defences
        alone.
    parameters, swept
        All dotted keys of the scenario and their values, and those that the sweep set.
    rounds, clients, classes
        Lengths of the axes; ``rounds`` are those planned.
    members
        Clients of a round: as many as ``clients``, or those whose sum is the one update that the
        server sees of a round, where secure aggregation makes ``clients`` 1.
    privacy
        What an accountant says: ``epsilon``, ``delta`` and what they rest on; empty where there is
        no guarantee.
    committed
        Rounds that can be read.
    attacks
        By label, in the order of the experiment.
    """

    def __init__(self, group: h5py.Group, index: int) -> None:
        self._group = group
        # What was looked at before: axes of arrays, and where the axes are.
        self._axes: dict[str, tuple[str, ...]] = {}
        self._scales: dict[int, str] = {}
        self.index = index
        self.committed = 0
        self.parameters = checked.parsed(group.attrs, "parameters", dict)
        self.swept = checked.parsed(group.attrs, "swept", dict)
        self.number = checked.whole(group.attrs, "number", index)
        self.draws = checked.whole(group.attrs, "draws", self.number)
        self.rounds = checked.length(group, "round")
        self.clients = checked.length(group, "client")
        self.classes = checked.length(group, "class")
        self.members = (
            checked.length(group, "member") if checked.has(group, "member") else self.clients
        )
        if self.clients != 1 and self.members != self.clients:
            raise ValueError(f"{group.name} has {self.members} members and {self.clients} clients")
        self.privacy = checked.parsed(group.attrs, "privacy", dict, "{}")
        for told in (self.parameters, self.swept, self.privacy):
            checked.check_parameters(told)
        infos = cast("dict[str, AttackInfo]", _dispatch(_member(group, "attacks"), "attacks"))
        # HDF5 lists names alphabetically; the experiment's own order is the one to show.
        listed = self.parameters.get("attacks") or ()
        order = [str(item.get("label")) for item in listed if isinstance(item, Mapping)]
        order += sorted(infos.keys() - order)
        self.attacks = {label: infos[label] for label in order if label in infos}

    def has(self, name: str) -> bool:
        """Return whether there is an array of that path, such as ``truth/counts``."""
        with _reading(self._group.file):
            return isinstance(checked.find(self._group, name), h5py.Dataset)

    def array(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return an array by its path within the scenario, committed rounds only.

        Parameters
        ----------
        name
            Such as ``attacks/llg/counts``; the axes are those of the format's page.
        start, stop
            Range of rounds, for arrays too large to hold at once; ignored for arrays without a
            round axis.

        Raises
        ------
        UserError
            There is no such array, its encoding is unknown, or it is damaged.
        """
        file = self._group.file
        with _reading(file):
            dataset = self._find(name)
            if name not in self._axes:
                self._axes[name] = self._check(name, dataset)
            if self._axes[name][:1] != ("round",):
                checked.check_claim(dataset, dataset.nbytes)
                return _read(dataset, slice(None))
            stop = self.committed if stop is None else min(stop, self.committed)
            stop = max(start, stop)
            checked.check_claim(dataset, (stop - start) * dataset.nbytes // len(dataset))
            return _read(dataset, slice(start, stop))

    def blocks(self, entries: int = 4_000_000) -> Iterator[tuple[int, int]]:
        """Yield ranges of committed rounds whose [round, client, class] arrays are of that size."""
        step = max(1, entries // max(1, self.clients * self.classes))
        for start in range(0, self.committed, step):
            yield start, min(start + step, self.committed)

    def _find(self, name: str) -> h5py.Dataset:
        group, dataset = self._group, checked.find(self._group, name)
        if not isinstance(dataset, h5py.Dataset):
            raise self._missing(name)
        if name not in self._axes:
            for part in name.split("/")[:-1]:
                group = group[part]
                _reader(group)
        return dataset

    def _check(self, name: str, dataset: h5py.Dataset) -> tuple[str, ...]:
        """Return the axes of an array that is read for the first time."""
        if "/" not in name:
            checked.length(self._group, name)
            return (name,)
        if not self._scales:
            self._scales = checked.scales(self._group)
        return checked.axes(name, dataset, self._scales)

    def damaged(self, reason: str) -> UserError:
        """Return what to raise where the arrays hold what no run writes."""
        return _damaged(self._group.file, f"scenario {self.index}: {reason}")

    def _missing(self, name: str) -> UserError:
        known: list[str] = []
        self._group.visititems(
            lambda path, item: known.append(path) if isinstance(item, h5py.Dataset) else None
        )
        return UserError(
            f"{self._group.file.filename}: scenario {self.index} has no array {name!r}: "
            + suggest(name, known)
        )


class Results:
    """An open results file; a context manager.

    Attributes
    ----------
    path
        Of the file that was opened, with ``.partial`` where it carries that suffix.
    attributes
        Those of the root group.
    ranks
        Placement of all ranks.
    scenarios
        In the order of the sweep.
    starts, losses
        How often the run was started, and which ranks it lost; empty before version 1.3.
    """

    def __init__(self, file: h5py.File, path: Path) -> None:
        self._file = file
        self.path = path
        with _reading(file):
            content = _dispatch(file, _ROOT)
            self.attributes: dict[str, Any] = content["attributes"]
            self.ranks: Sequence[Rank] = content["ranks"]
            self.scenarios: Sequence[Scenario] = content["scenarios"]
        self.starts: Sequence[Start] = ()
        self.losses: Sequence[Loss] = ()
        self.refresh()

    @property
    def title(self) -> str:
        """Title of the experiment."""
        return str(self.attributes.get("title", ""))

    @property
    def complete(self) -> bool:
        """Whether the run has ended and every planned round is in the file."""
        every = all(scenario.committed == scenario.rounds for scenario in self.scenarios)
        return every and not self.path.name.endswith(PARTIAL)

    def numbered(self, number: int) -> Scenario:
        """Return the scenario of a number in the sweep."""
        return next(one for one in self.scenarios if one.number == number)

    def refresh(self) -> None:
        """Take up what has been committed since; cheap on a complete file."""
        self._follow()
        with _reading(self._file):
            counts = checked.member(self._file, "committed_rounds", h5py.Dataset)
            if counts.shape != (len(self.scenarios),) or counts.dtype.kind != "i":
                raise ValueError(f"{counts.name} is {counts.dtype} of shape {counts.shape}")
            committed = _read(counts, slice(None))
            for scenario, count in zip(self.scenarios, committed.tolist(), strict=True):
                if not 0 <= count <= scenario.rounds:
                    raise ValueError(
                        f"scenario {scenario.index} has {count} committed of "
                        f"{scenario.rounds} rounds"
                    )
                scenario.committed = count
            if checked.has(self._file, "starts"):  # since version 1.3
                self.starts = _dispatch(_member(self._file, "starts"), "starts")
                self.losses = _dispatch(_member(self._file, "losses"), "losses")

    def _follow(self) -> None:
        """Open the file that has the name now, where the writer has put another one in its place.

        Writers do where the file system has no order of writes, and where a run goes on. A file
        that is gone is kept.
        """
        try:
            found = locate(self.path)
            named = found.stat()
        except (UserError, OSError):
            return
        if not self._file:
            return
        self.path = found
        opened = os.fstat(self._file.id.get_vfd_handle())
        if (named.st_ino, named.st_dev) == (opened.st_ino, opened.st_dev):
            return
        found, file = _open(self.path)
        try:
            with _reading(file):
                _reader(file, _ROOT)
                if any(
                    file.attrs[key] != self.attributes.get(key) for key in file.attrs.keys() & _OWN
                ):
                    raise UserError(f"{found}: another run has taken the name: open it again")
                groups = [file[scenario._group.name] for scenario in self.scenarios]
        except BaseException:
            file.close()
            raise
        self._file.close()
        self._file = file
        for scenario, group in zip(self.scenarios, groups, strict=True):
            scenario._group = group

    def close(self) -> None:
        """Close the file; its scenarios can no longer be read."""
        self._file.close()

    def __enter__(self) -> "Results":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_results(path: str | Path) -> Results:
    """Open a results file for reading.

    Parameters
    ----------
    path
        ``NAME``, also while the file is still called ``NAME.partial``.

    Raises
    ------
    UserError
        There is no such file, it is no results file or of a format version that is not known, it
        is damaged, or locked.
    """
    found, file = _open(Path(path))
    try:
        return Results(file, found)
    except BaseException:
        file.close()
        raise


def _open(path: Path) -> tuple[Path, h5py.File]:
    while True:
        found = locate(path)
        try:
            return found, open_file(found)
        except UserError:
            # The run may be complete since a moment ago.
            if found.exists():
                raise


@contextmanager
def _reading(file: h5py.File) -> Iterator[None]:
    """Turn what HDF5 says of a damaged file into one line for the user."""
    try:
        yield
    except UserError:
        raise
    # A damaged file can fail in any way that HDF5 can.
    except Exception as error:
        if not file:
            raise ValueError("the results file is closed") from None
        reason = str(error.args[0] if error.args else type(error).__name__)[:200]
        raise _damaged(file, reason) from error


def _damaged(file: h5py.File, reason: str) -> UserError:
    return UserError(f"{file.filename}: the file is truncated or damaged ({reason}): copy it again")


def _read(dataset: h5py.Dataset, selection: slice) -> NDArray[Any]:
    growing = dataset.file.swmr_mode
    for attempt in range(_ATTEMPTS):
        if growing:
            dataset.id.refresh()
        try:
            return cast("NDArray[Any]", dataset[selection])
        except OSError as error:
            if not growing or attempt == _ATTEMPTS - 1:
                raise OSError(f"{dataset.name}: {error}") from None
            time.sleep(_PAUSE_SECONDS)
    raise AssertionError("unreachable")


def _reads(kind: str, major: int) -> Callable[[_Reader], _Reader]:
    """Register the reader of groups with that ``encoding-type`` and major version."""

    def add(reader: _Reader) -> _Reader:
        _READERS[kind, major] = reader
        return reader

    return add


def _dispatch(group: h5py.Group, expected: str) -> Any:
    """Read a group with the reader of its encoding."""
    return _reader(group, expected)(group)


def _reader(group: h5py.Group, expected: str | None = None) -> _Reader:
    """Return the reader of a group's encoding; `UserError` where that is not known here."""
    name = group.file.filename
    kind, version = group.attrs.get("encoding-type"), group.attrs.get("encoding-version")
    if not isinstance(kind, str) or not isinstance(version, str):
        if group.name == "/":
            raise UserError(
                f"{name}: this is an HDF5 file, but no results file of this testbed (its root has "
                "no attribute encoding-type)"
            )
        raise ValueError(f"the group {group.name} has no encoding-type")
    majors = sorted(known for known_kind, known in _READERS if known_kind == kind)
    if not majors or kind != (expected or kind):
        wanted = repr(expected) if expected else suggest(kind, {known for known, _ in _READERS})
        raise UserError(
            f"{name}: {group.name} has the encoding-type {kind!r}, expected {wanted}: this is no "
            "results file of this testbed, or one of a newer version"
        )
    major = version.partition(".")[0]
    if major not in map(str, majors):
        raise UserError(
            f"{name}: {group.name} ({kind}) is of version {version}, this program reads version "
            f"{', '.join(map(str, majors))}: install a matching label-leakage-testbed"
        )
    return _READERS[kind, int(major)]


@_reads(_ROOT, 1)
def _root(group: h5py.Group) -> dict[str, Any]:
    told = checked.scalars(group.attrs)
    attributes = {key: value for key, value in told.items() if "encoding-" not in key}
    return {
        "attributes": attributes,
        "ranks": _dispatch(_member(group, "ranks"), "ranks"),
        "scenarios": _dispatch(_member(group, "scenarios"), "scenarios"),
    }


@_reads("ranks", 1)
def _ranks(group: h5py.Group) -> list[Rank]:
    text = [_column(group, name, "S") for name in ("host", "device", "role")]
    columns = [_column(group, "rank", "i"), *text, _column(group, "local_rank", "i")]
    # Since version 1.4.
    columns += [_column(group, name, "S") for name in ("cores", "gpu") if checked.has(group, name)]
    return [Rank(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


@_reads("starts", 1)
def _starts(group: h5py.Group) -> list[Start]:
    return [Start(**row) for row in _rows(group, "start", Start)]


@_reads("losses", 1)
def _losses(group: h5py.Group) -> list[Loss]:
    return [Loss(**row) for row in _rows(group, "loss", Loss)]


def _rows(group: h5py.Group, axis: str, kind: type[Start | Loss]) -> list[dict[str, Any]]:
    """Return the rows of a table that grows: as many as its axis is long."""
    length = len(_column(group, axis, "i"))
    kinds = {"str": "S", "int": "i", "float": "f"}
    columns = {
        item.name: _column(group, item.name, kinds[str(getattr(item.type, "__name__", item.type))])
        for item in fields(kind)
    }
    for name, column in columns.items():
        if len(column) < length:
            raise ValueError(f"{group.name}/{name} has {len(column)} rows, expected {length}")
        columns[name] = column[:length]
    lists = (column.tolist() for column in columns.values())
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


@_reads("scenarios", 1)
def _scenarios(group: h5py.Group) -> list[Scenario]:
    names = [f"{index:04d}" for index in range(sum(name.isdecimal() for name in group))]
    scenarios = [_dispatch(_member(group, name), "scenario") for name in names]
    if len({scenario.number for scenario in scenarios}) < len(scenarios):
        raise ValueError(f"{group.name} holds two scenarios of the same number")
    return scenarios


def _member(group: h5py.Group, name: str) -> h5py.Group:
    return checked.member(group, name, h5py.Group)


def _column(group: h5py.Group, name: str, kind: str) -> NDArray[Any]:
    """Return a column of a table; of the kind ``S`` as text."""
    dataset = checked.member(group, name, h5py.Dataset)
    if dataset.ndim != 1 or dataset.dtype.kind != kind:
        raise ValueError(f"{dataset.name} is {dataset.dtype} of shape {dataset.shape}")
    checked.check_claim(dataset, dataset.nbytes)
    values = _read(dataset, slice(None))
    return np.char.decode(values, "ascii") if kind == "S" else values


@_reads("scenario", 1)
def _scenario(group: h5py.Group) -> Scenario:
    return Scenario(group, int(group.name.rpartition("/")[2]))


@_reads("attacks", 1)
def _attacks(group: h5py.Group) -> "dict[str, AttackInfo]":
    return {label: _describe(_member(group, label)) for label in group}


def _describe(group: h5py.Group) -> AttackInfo:
    _dispatch(group, "attack")
    told = group.attrs
    info = AttackInfo(
        **{key: checked.text(told, key) for key in ("name", "title", "knowledge", "source")},
        options=checked.parsed(told, "options", dict),
        # Versions 1.0 and 1.1 said less.
        answers=checked.text(told, "answers", "counts"),
        observes=checked.parsed(told, "observes", list, "[]"),
        assumes=checked.parsed(told, "assumes", list, "[]"),
        broken=checked.parsed(told, "broken_assumptions", dict, "{}"),
        not_applicable=checked.text(told, "not_applicable", ""),
        target=checked.text(told, "target", "update"),
        adapted=checked.text(told, "adapted", ""),
        adaptation=checked.parsed(told, "adaptation", list, "[]"),
    )
    texts = [*info.observes, *info.assumes, *info.adaptation, *info.broken.values()]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{group.name} has lists of something else than text")
    if info.answers not in ANSWERS or info.target not in ("update", "accumulated"):
        raise ValueError(f"{group.name} answers {info.answers!r} about {info.target!r}")
    return info


@_reads("truth", 1)
@_reads("observations", 1)
@_reads("attack", 1)
@_reads("calibration", 1)
@_reads("rounds", 1)
@_reads("updates", 1)
@_reads("timings", 1)
@_reads("attack-timings", 1)
def _arrays(group: h5py.Group) -> h5py.Group:
    return group
