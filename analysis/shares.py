"""Files of runs that share an experiment (``--share i/n``), which are one run to all that reads.

A set of such files is what a job array leaves: ``mnist_0of4.h5`` to ``mnist_3of4.h5``.
"""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from testbed.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from testbed.results.reader import Results

PARTIAL = ".partial"
SUFFIXES = (".h5", ".hdf5")


@dataclass(frozen=True)
class ShareFile:
    """What a results file is a share of, and how far it is.

    Attributes
    ----------
    file
        Its name, as it was given.
    place, count
        ``i/n`` of ``--share``; ``0/1`` for a run of all scenarios.
    run
        The same for all shares of an experiment, wherever each had its data, and for all replays of
        them with the same attacks: JSON of the experiment and the replays. Empty for a file that
        belongs to no other.
    scenarios
        Those of the whole experiment; 0 where the file does not tell.
    committed, planned
        Rounds.
    complete
        Whether its run has ended with all of them.
    """

    file: str
    place: int
    count: int
    run: str
    scenarios: int
    committed: int
    planned: int
    complete: bool


@dataclass(frozen=True)
class ShareSet:
    """Shares of one experiment, no two of them the same; or a single file.

    Attributes
    ----------
    name
        What tables call it: the file of a single one; a pattern of the files' names, as
        ``mnist_*of4.h5``, where these have the form; else the first file.
    stem
        What names of its figures begin with.
    members
        The files, in the order of the shares.
    """

    name: str
    stem: str
    members: tuple[ShareFile, ...]

    @property
    def files(self) -> list[str]:
        """Names of the files, in the order of the shares."""
        return [member.file for member in self.members]

    @property
    def count(self) -> int:
        """Into how many shares the experiment was divided; 1 for a run of all scenarios."""
        return self.members[0].count

    @property
    def missing(self) -> list[int]:
        """The shares that are not there, of those that have a scenario."""
        there = {member.place for member in self.members}
        known = self.members[0].scenarios
        last = min(self.count, known) if known else self.count
        return [place for place in range(last) if place not in there]

    def __deepcopy__(self, memo: object) -> "ShareSet":
        """Return the set itself: frames copy what is attached to them whenever they are used."""
        return self


def share_file(file: str, results: "Results") -> ShareFile:
    """Return what an open results file is a share of."""
    told = results.attributes
    place, _, count = str(told.get("share", "")).partition("/")
    experiment, run = str(told.get("experiment", "")), ""
    # Before version 1.2 nothing is said of shares.
    known = place.isdecimal() and count.isdecimal() and int(place) < int(count) <= 1 << 20
    if known and "experiment" in told:
        run = json.dumps([_lasting(experiment), _replays(str(told.get("replays", "[]")))])
    return ShareFile(
        file=file,
        place=int(place) if known else 0,
        count=int(count) if known else 1,
        run=run,
        scenarios=_size(experiment) if known and int(count) > 1 else 0,
        committed=sum(scenario.committed for scenario in results.scenarios),
        planned=sum(scenario.rounds for scenario in results.scenarios),
        complete=results.complete,
    )


def find_sets(files: Iterable[str | Path]) -> list[ShareSet]:
    """Open files, and return what sets of shares they are; `UserError` where one is unreadable."""
    from testbed.results.reader import open_results

    found = []
    for file in files:
        with open_results(file) as results:
            found.append(share_file(str(file), results))
    return share_sets(found)


def share_sets(files: Iterable[ShareFile]) -> list[ShareSet]:
    """Return which files belong together, in the order of the first file of each set.

    Those whose names differ in ``IofN`` alone do, and so do others where no share is there twice:
    as in a run and a copy of it, a second one begins another set.
    """
    named: list[list[ShareFile]] = []
    for file in files:
        pattern = _pattern(file)
        for group in named if pattern else ():
            if pattern == _pattern(group[0]) and _belongs(file, group):
                group.append(file)
                break
        else:
            named.append([file])
    joined: list[list[ShareFile]] = []
    for group in named:
        for other in joined:
            if all(_belongs(file, other) for file in group):
                other += group
                break
        else:
            joined.append([*group])
    sets: list[ShareSet] = []
    for group in joined:
        members = tuple(sorted(group, key=lambda file: file.place))
        name = members[0].file
        patterns = {_pattern(file) for file in members}
        if len(members) > 1 and len(patterns) == 1 and None not in patterns:
            name = str(patterns.pop())
        taken = {one.name for one in sets}
        sets.append(ShareSet(members[0].file if name in taken else name, _stem(members), members))
    return sets


def join_shares(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Return a frame in which all shares of an experiment are of one file, named after the set.

    Parameters
    ----------
    frame
        As `analysis.load` returns it.

    Returns
    -------
    pandas.DataFrame
        With the same index, the scenarios of a file in the order of their numbers. The frame
        itself where no two files share an experiment.
    """
    sets: Sequence[ShareSet] = frame.attrs.get("sets", ())
    file = frame["file"].replace({file: one.name for one in sets for file in one.files})
    if file.equals(frame["file"]):
        return frame
    place = file.map({one.name: number for number, one in enumerate(sets)})
    return frame.assign(file=file).iloc[np.lexsort((frame["scenario"], place))]


def _belongs(file: ShareFile, group: Sequence[ShareFile]) -> bool:
    """Return whether a file is a share of the same run as others, and none of them."""
    same = (file.run, file.count) == (group[0].run, group[0].count)
    return bool(file.run) and same and file.place not in {one.place for one in group}


def name_parts(file: ShareFile) -> tuple[str, str] | None:
    """Return what stands in a share's name before and behind ``IofN``; None without that."""
    name, suffix = _split(file.file)
    found = re.fullmatch(rf"(.*?)0*{file.place}of0*{file.count}", name)
    return (found[1], suffix) if found and file.count > 1 else None


def _pattern(file: ShareFile) -> str | None:
    parts = name_parts(file)
    name = parts and f"{parts[0]}*of{file.count}{parts[1]}"
    return str(Path(file.file).with_name(name)) if name else None


def _stem(members: Sequence[ShareFile]) -> str:
    names = [_split(member.file)[0] for member in members]
    if len(members) == 1:
        return names[0]
    parts = [name_parts(member) for member in members]
    stems = {part[0] for part in parts if part is not None}
    if len(stems) == 1 and None not in parts:
        common = stems.pop()
    else:
        alike = takewhile(lambda letters: len({*letters}) == 1, zip(*names, strict=False))
        common = "".join(letters[0] for letters in alike)
        if any(name[len(common) : len(common) + 1].isdecimal() for name in names):
            common = common.rstrip("0123456789")
    return common.rstrip("_-. ") or names[0]


def _split(file: str) -> tuple[str, str]:
    """Return the name of a results file without its suffix, and that one."""
    name = Path(file).name.removesuffix(PARTIAL)
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix), suffix


def _replays(text: str) -> object:
    """Return the attacks of the replays that a file has gone through."""
    try:
        return [replay["attacks"] for replay in json.loads(text)]
    except (ValueError, TypeError, KeyError, RecursionError):
        return text


@functools.cache
def _lasting(experiment: str) -> str:
    """Return an experiment without what may differ from start to start of a run, as JSON."""
    from testbed.begun import MOVABLE
    from testbed.sweep import parse_yaml

    try:
        content = parse_yaml(experiment, "experiment")
        for key in MOVABLE:
            section, _, name = key.rpartition(".")
            part = content.get(section) if section else content
            if isinstance(part, dict):
                part.pop(name, None)
        return json.dumps(content)
    except (UserError, AttributeError, RecursionError, TypeError, ValueError):
        return experiment


@functools.cache
def _size(experiment: str) -> int:
    """Return how many scenarios an experiment has; 0 where its text does not tell."""
    from testbed.sweep import expand, parse_yaml

    try:
        return len(expand(parse_yaml(experiment, "experiment").get("sweep") or {}, "experiment"))
    except (UserError, AttributeError, RecursionError):
        return 0
