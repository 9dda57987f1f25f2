"""What must be known of sets of shares to read a table or a figure: which of them are missing."""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from analysis.shares import PARTIAL, ShareFile, ShareSet, name_parts
from testbed.errors import UserError
from testbed.results.placed import write_ranges


def share_notes(sets: Sequence[ShareSet]) -> list[str]:
    """Return which shares are missing, incomplete, or there twice; none where all is well.

    Parameters
    ----------
    sets
        As `analysis.shares.share_sets` returns them.
    """
    notes = []
    for one in sets:
        which = f" of {Path(one.name).name}" if len(sets) > 1 else ""
        notes += _lacking(one, which, sets)
    for one, other in combinations(sets, 2):
        if not one.members[0].run or one.members[0].run != other.members[0].run:
            continue
        if one.count != other.count:
            ways = [f"in {n} shares" if n > 1 else "as a whole" for n in (one.count, other.count)]
            notes.append(
                f"the same experiment is there {ways[0]}, {one.name}, and {ways[1]}, {other.name}: "
                "two runs"
            )
        elif one.count > 1:
            twice = [m.place for m in one.members if m.place in {n.place for n in other.members}]
            notes.append(
                f"{name_shares(twice, one.count)} {_is(twice)} there twice, in {one.name} and in "
                f"{other.name}: two runs"
            )
    return notes


def titled(title: str, sets: Sequence[ShareSet]) -> str:
    """Return a figure's title, with the notes on its shares beneath it."""
    notes = share_notes(sets)
    return "\n".join([title or "(untitled)", *notes]) if notes else title


def name_shares(places: Sequence[int], count: int) -> str:
    """Return shares in words: ``shares 0, 2-3 of 0-7``."""
    numbers = write_ranges(places).replace(",", ", ")
    return f"share{'' if len(places) == 1 else 's'} {numbers} of 0-{count - 1}"


def _lacking(one: ShareSet, which: str, sets: Sequence[ShareSet]) -> list[str]:
    if one.count == 1:
        return []
    notes = []
    missing, known = one.missing, one.members[0].scenarios
    if missing:
        note = f"{name_shares(missing, one.count)}{which} {_is(missing)} not among the files"
        if known:
            lost = sum(len(range(place, known, one.count)) for place in missing)
            note += f", with {lost} of the {known} scenarios"
        for why, names in _instead(one, sets).items():
            shown = names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]
            note += f" ({', '.join(shown)} {_is(names)} {why})"
        notes.append(note)
    unfinished = [member for member in one.members if not member.complete]
    if unfinished:
        places = [member.place for member in unfinished]
        committed = sum(member.committed for member in unfinished)
        planned = sum(member.planned for member in unfinished)
        notes.append(
            f"{name_shares(places, one.count)}{which} {_is(places)} incomplete, with {committed} "
            f"of {planned} rounds"
        )
    return notes


def _instead(one: ShareSet, sets: Sequence[ShareSet]) -> dict[str, list[str]]:
    """Return what to say of the files that have the names of missing shares, and their names."""
    read = {Path(member.file).resolve(): member for other in sets for member in other.members}
    said: dict[str, list[str]] = {}
    for path in _there(one):
        other = read.get(path.resolve())
        if other is None:
            why = "there"
        elif other.run == one.members[0].run:
            why = name_shares([other.place], other.count)
        else:
            why = f"of another run: {_difference(other, one.members[0])}"
        said.setdefault(why, []).append(path.name)
    return said


def _there(one: ShareSet) -> list[Path]:
    """Return the files that have the names of missing shares, and lie beside the others."""
    first = one.members[0]
    parts = name_parts(first)
    if parts is None:
        return []
    names = [f"{parts[0]}{place}of{one.count}{parts[1]}" for place in one.missing]
    both = [Path(first.file).with_name(name + end) for name in names for end in ("", PARTIAL)]
    return [path for path in both if path.is_file()]


def _difference(other: ShareFile, one: ShareFile) -> str:
    """Return what tells a file from one of a set that it has the name for."""
    from testbed.begun import first_difference
    from testbed.experiment import parse_experiment

    try:
        there, here = (
            parse_experiment(json.loads(file.run)[0], name=file.file) for file in (other, one)
        )
    except (UserError, ValueError):
        return "its experiment cannot be read here"
    difference = first_difference(there, here, now="in the others")
    return difference or "not all of them are replays with the same attacks"


def _is(places: Sequence[object]) -> str:
    return "is" if len(places) == 1 else "are"
