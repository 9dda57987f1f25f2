"""Reads results files: complete, still growing, or left behind by a writer that was killed.

`docs/file-format.md` is the specification. Needs h5py and numpy only. Nothing beyond the committed
rounds of a scenario is ever returned.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import h5py
import numpy as np
from numpy.typing import NDArray

from testbed.errors import UserError, suggest
from testbed.results.opening import PARTIAL, locate, open_file

_ROOT = "testbed-results"
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
    """

    rank: int
    host: str
    device: str
    role: str
    local_rank: int


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
        self.index = index
        self.committed = 0
        self.parameters: dict[str, Any] = json.loads(group.attrs["parameters"])
        self.swept: dict[str, Any] = json.loads(group.attrs["swept"])
        self.number = int(group.attrs.get("number", index))
        self.draws = int(group.attrs.get("draws", self.number))
        self.rounds = len(group["round"])
        self.clients = len(group["client"])
        self.classes = len(group["class"])
        self.members = len(group["member"]) if "member" in group else self.clients
        self.privacy: dict[str, Any] = json.loads(group.attrs.get("privacy", "{}"))
        infos = cast("dict[str, AttackInfo]", _dispatch(group["attacks"], "attacks"))
        # HDF5 lists names alphabetically; the experiment's own order is the one to show.
        listed = self.parameters.get("attacks") or ()
        order = [item.get("label") for item in listed if isinstance(item, Mapping)]
        order += sorted(infos.keys() - order)
        self.attacks = {label: infos[label] for label in order if label in infos}

    def has(self, name: str) -> bool:
        """Return whether there is an array of that path, such as ``truth/counts``."""
        with _reading(self._group.file):
            return isinstance(self._group.get(name), h5py.Dataset)

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
            if not self._has_rounds(dataset):
                return _read(dataset, slice(None))
            stop = self.committed if stop is None else min(stop, self.committed)
            return _read(dataset, slice(start, max(start, stop)))

    def blocks(self, entries: int = 4_000_000) -> Iterator[tuple[int, int]]:
        """Yield ranges of committed rounds whose [round, client, class] arrays are of that size."""
        step = max(1, entries // max(1, self.clients * self.classes))
        for start in range(0, self.committed, step):
            yield start, min(start + step, self.committed)

    def _find(self, name: str) -> h5py.Dataset:
        *path, last = name.split("/")
        group = self._group
        for part in path:
            if part not in group:
                raise self._missing(name)
            group = group[part]
            _reader(group)
        if not isinstance(group.get(last), h5py.Dataset):
            raise self._missing(name)
        return group[last]

    def _missing(self, name: str) -> UserError:
        known: list[str] = []
        self._group.visititems(
            lambda path, item: known.append(path) if isinstance(item, h5py.Dataset) else None
        )
        return UserError(
            f"{self._group.file.filename}: scenario {self.index} has no array {name!r}: "
            + suggest(name, known)
        )

    def _has_rounds(self, dataset: h5py.Dataset) -> bool:
        axis = self._group["round"]
        if dataset == axis:
            return True
        if dataset.is_scale:
            return False
        scales = dataset.dims[0].values()
        if not scales:
            raise ValueError(f"{dataset.name} has an axis without a dimension scale")
        return axis in scales


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
    """

    def __init__(self, file: h5py.File, path: Path) -> None:
        self._file = file
        self.path = path
        with _reading(file):
            content = _dispatch(file, _ROOT)
            self.attributes: dict[str, Any] = content["attributes"]
            self.ranks: Sequence[Rank] = content["ranks"]
            self.scenarios: Sequence[Scenario] = content["scenarios"]
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
        """Take up the rounds that have been committed since; cheap on a complete file."""
        with _reading(self._file):
            committed = _read(self._file["committed_rounds"], slice(None))
            for scenario, count in zip(self.scenarios, committed.tolist(), strict=True):
                if not 0 <= count <= scenario.rounds:
                    raise ValueError(
                        f"scenario {scenario.index} has {count} committed of "
                        f"{scenario.rounds} rounds"
                    )
                scenario.committed = count
        final = self.path.with_name(self.path.name.removesuffix(PARTIAL))
        if not self.path.exists() and final.exists():
            self.path = final

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
    found = locate(Path(path))
    file = open_file(found)
    try:
        return Results(file, found)
    except BaseException:
        file.close()
        raise


@contextmanager
def _reading(file: h5py.File) -> Iterator[None]:
    """Turn what HDF5 says of a damaged file into one line for the user."""
    try:
        yield
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        if not file:
            raise ValueError("the results file is closed") from None
        reason = str(error.args[0]) if error.args else type(error).__name__
        raise UserError(
            f"{file.filename}: the file is truncated or damaged ({reason}): copy it again"
        ) from error


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
    attributes = {key: value for key, value in group.attrs.items() if "encoding-" not in key}
    return {
        "attributes": attributes,
        "ranks": _dispatch(group["ranks"], "ranks"),
        "scenarios": _dispatch(group["scenarios"], "scenarios"),
    }


@_reads("ranks", 1)
def _ranks(group: h5py.Group) -> list[Rank]:
    text = [np.char.decode(group[name][:], "ascii") for name in ("host", "device", "role")]
    columns = [group["rank"][:], *text, group["local_rank"][:]]
    return [Rank(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


@_reads("scenarios", 1)
def _scenarios(group: h5py.Group) -> list[Scenario]:
    names = sorted((name for name in group if name.isdecimal()), key=int)
    return [_dispatch(group[name], "scenario") for name in names]


@_reads("scenario", 1)
def _scenario(group: h5py.Group) -> Scenario:
    return Scenario(group, int(group.name.rpartition("/")[2]))


@_reads("attacks", 1)
def _attacks(group: h5py.Group) -> "dict[str, AttackInfo]":
    return {label: _describe(group[label]) for label in group}


def _describe(group: h5py.Group) -> AttackInfo:
    _dispatch(group, "attack")
    attributes = {key: group.attrs[key] for key in ("name", "title", "knowledge", "source")}
    told = group.attrs  # versions 1.0 and 1.1 said less
    return AttackInfo(
        **attributes,
        options=json.loads(told["options"]),
        answers=told.get("answers", "counts"),
        observes=json.loads(told.get("observes", "[]")),
        assumes=json.loads(told.get("assumes", "[]")),
        broken=json.loads(told.get("broken_assumptions", "{}")),
        not_applicable=told.get("not_applicable", ""),
        target=told.get("target", "update"),
        adapted=told.get("adapted", ""),
        adaptation=json.loads(told.get("adaptation", "[]")),
    )


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
