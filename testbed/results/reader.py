"""Reads results files: complete, still growing, or left behind by a writer that was killed.

`docs/file-format.md` is the specification. Needs h5py and numpy only. Nothing beyond the committed
rounds of a scenario is ever returned.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import h5py
from numpy.typing import NDArray

from testbed.errors import UserError, suggest
from testbed.results import checked
from testbed.results.encodings import (
    damaged,
    dispatch,
    member,
    read_array,
    reader_of,
    reading,
    reads,
)
from testbed.results.opening import PARTIAL, locate, open_file
from testbed.results.records import AttackInfo, Loss, Rank, Start

_ROOT = "testbed-results"
# Root attributes that tell one run from another.
_OWN = {"created", "experiment", "run", "share"}


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
        infos = cast("dict[str, AttackInfo]", dispatch(member(group, "attacks"), "attacks"))
        # HDF5 lists names alphabetically; the experiment's own order is the one to show.
        listed = self.parameters.get("attacks") or ()
        order = [str(item.get("label")) for item in listed if isinstance(item, Mapping)]
        order += sorted(infos.keys() - order)
        self.attacks = {label: infos[label] for label in order if label in infos}

    def has(self, name: str) -> bool:
        """Return whether there is an array of that path, such as ``truth/counts``."""
        with reading(self._group.file):
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
        with reading(file):
            dataset = self._find(name)
            if name not in self._axes:
                self._axes[name] = self._check(name, dataset)
            if self._axes[name][:1] != ("round",):
                checked.check_claim(dataset, dataset.nbytes)
                return read_array(dataset, slice(None))
            stop = self.committed if stop is None else min(stop, self.committed)
            stop = max(start, stop)
            checked.check_claim(dataset, (stop - start) * dataset.nbytes // len(dataset))
            return read_array(dataset, slice(start, stop))

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
                reader_of(group)
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
        return damaged(self._group.file, f"scenario {self.index}: {reason}")

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
        with reading(file):
            content = dispatch(file, _ROOT)
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
        with reading(self._file):
            counts = checked.member(self._file, "committed_rounds", h5py.Dataset)
            if counts.shape != (len(self.scenarios),) or counts.dtype.kind != "i":
                raise ValueError(f"{counts.name} is {counts.dtype} of shape {counts.shape}")
            committed = read_array(counts, slice(None))
            for scenario, count in zip(self.scenarios, committed.tolist(), strict=True):
                if not 0 <= count <= scenario.rounds:
                    raise ValueError(
                        f"scenario {scenario.index} has {count} committed of "
                        f"{scenario.rounds} rounds"
                    )
                scenario.committed = count
            if checked.has(self._file, "starts"):  # since version 1.3
                self.starts = dispatch(member(self._file, "starts"), "starts")
                self.losses = dispatch(member(self._file, "losses"), "losses")

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
            with reading(file):
                reader_of(file, _ROOT)
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


@reads(_ROOT, 1)
def _root(group: h5py.Group) -> dict[str, Any]:
    told = checked.scalars(group.attrs)
    attributes = {key: value for key, value in told.items() if "encoding-" not in key}
    return {
        "attributes": attributes,
        "ranks": dispatch(member(group, "ranks"), "ranks"),
        "scenarios": dispatch(member(group, "scenarios"), "scenarios"),
    }


@reads("scenarios", 1)
def _scenarios(group: h5py.Group) -> list[Scenario]:
    names = [f"{index:04d}" for index in range(sum(name.isdecimal() for name in group))]
    scenarios = [dispatch(member(group, name), "scenario") for name in names]
    if len({scenario.number for scenario in scenarios}) < len(scenarios):
        raise ValueError(f"{group.name} holds two scenarios of the same number")
    return scenarios


@reads("scenario", 1)
def _scenario(group: h5py.Group) -> Scenario:
    return Scenario(group, int(group.name.rpartition("/")[2]))
