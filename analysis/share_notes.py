"""What must be known of sets of shares to read a table or a figure: which of them are missing."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from analysis.shares import PARTIAL, ShareSet, name_parts
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
        notes += _lacking(one, which)
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


def _lacking(one: ShareSet, which: str) -> list[str]:
    if one.count == 1:
        return []
    notes = []
    missing, known = one.missing, one.members[0].scenarios
    if missing:
        note = f"{name_shares(missing, one.count)}{which} {_is(missing)} not among the files"
        if known:
            lost = sum(len(range(place, known, one.count)) for place in missing)
            note += f", with {lost} of the {known} scenarios"
        there = _there(one)
        note += f" ({', '.join(there)} {'is' if len(there) == 1 else 'are'} there)" if there else ""
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


def _there(one: ShareSet) -> list[str]:
    """Return the names of files of missing shares that lie beside the others; a few of them."""
    first = one.members[0]
    parts = name_parts(first)
    if parts is None:
        return []
    names = [f"{parts[0]}{place}of{one.count}{parts[1]}" for place in one.missing]
    both = [Path(first.file).with_name(name + end) for name in names for end in ("", PARTIAL)]
    found = [path.name for path in both if path.is_file()]
    return found if len(found) <= 4 else [*found[:3], f"{len(found) - 3} more"]


def _is(places: Sequence[int]) -> str:
    return "is" if len(places) == 1 else "are"
