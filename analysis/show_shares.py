"""What is in the files of a set of shares, and how far they are: one description of all."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.open_set import OpenSet
from analysis.share_notes import name_shares, share_notes
from analysis.shares import ShareSet, find_sets
from analysis.show import aligned, count_devices, describe_scenarios, list_packages, number, show
from testbed.results.placed import describe_hosts

if TYPE_CHECKING:
    from testbed.results.reader import Results


def show_all(files: Sequence[str | Path]) -> list[str]:
    """Return a description of each run: of a file, or of several shares of an experiment.

    Raises
    ------
    UserError
        A file cannot be read.
    """
    return [
        show(one.files[0]) if len(one.members) == 1 else _show_set(one) for one in find_sets(files)
    ]


def _show_set(one: ShareSet) -> str:
    with OpenSet(one) as opened:
        facts = [
            ("files", one.name if len({*one.files, one.name}) > len(one.files) else "see below"),
            ("shares", f"{len(one.members)} of {one.count - _without_scenarios(one)}"),
            ("state", _state(one)),
            *(("", note) for note in share_notes([one])),
            *_provenance(one, opened.files),
            *_placement(opened.files),
        ]
        width = max(len(name) for name, _ in facts)
        return "\n".join(
            [
                opened.files[0].title or "(untitled)",
                *(f"  {name.ljust(width)}  {value}" for name, value in facts),
                "",
                "shares",
                *aligned(_line(one, *pair) for pair in enumerate(opened.files)),
                "",
                *describe_scenarios(opened.scenarios),
                "",
            ]
        )


def _without_scenarios(one: ShareSet) -> int:
    """Return how many shares are empty, since there are fewer scenarios."""
    known = one.members[0].scenarios
    return max(0, one.count - known) if known else 0


def _state(one: ShareSet) -> str:
    committed = sum(member.committed for member in one.members)
    planned = sum(member.planned for member in one.members)
    far = f"{committed} of {planned} rounds"
    if one.missing:
        return f"incomplete: shares are missing ({far} of those that are there)"
    # Rounded down: 100 % is said of nothing that lacks a round.
    far += f", {100 * committed // planned if planned else 100} %"
    if all(member.complete for member in one.members):
        return f"complete ({far})"
    return f"incomplete: still being written, or runs were stopped ({far})"


def _provenance(one: ShareSet, files: Sequence["Results"]) -> list[tuple[str, str]]:
    def text(name: str) -> Callable[["Results"], str]:
        return lambda results: str(results.attributes.get(name, ""))

    def software(results: "Results") -> str:
        return " ".join(text(name)(results) for name in ("software", "software_version")).strip()

    created = sorted(text("created")(results) or "unknown" for results in files)
    times = list(dict.fromkeys([created[0], created[-1]]))
    told = [
        ("software", software),
        ("commit", text("git_commit")),
        ("MPI", lambda results: text("mpi_library")(results) or "none (a single process)"),
        ("packages", lambda results: list_packages(text("dependencies")(results))),
    ]
    facts = [("created", " to ".join(times))]
    for name, tell in told:
        found: dict[str, list[int]] = {}
        for member, results in zip(one.members, files, strict=True):
            found.setdefault(tell(results) or "unknown", []).append(member.place)
        for line, (value, places) in enumerate(found.items()):
            where = f" ({name_shares(places, one.count)})" if len(found) > 1 else ""
            facts.append(("" if line else name, value + where))
    return facts


def _placement(files: Sequence["Results"]) -> list[tuple[str, str]]:
    ranks = [rank for results in files for rank in results.ranks]
    return [
        ("ranks", f"{describe_hosts(ranks)}, over all shares"),
        ("devices", count_devices(ranks)),
    ]


def _line(one: ShareSet, place: int, results: "Results") -> list[str]:
    member, ranks = one.members[place], results.ranks
    state = "complete" if member.complete else "incomplete"
    slurm = str(results.attributes.get("slurm_job", ""))
    hosts = list(dict.fromkeys(rank.host for rank in ranks))
    where = hosts[0] if len(hosts) == 1 else number(len(hosts), "host")
    events = [f"Slurm job {slurm}"] if slurm else []
    if len(results.starts) > 1:
        events.append(f"started {len(results.starts)} times")
    if results.losses:
        events.append(f"lost {number(len(results.losses), 'rank')}")
    return [
        f"{member.place}/{member.count}",
        str(results.path if one.name in one.files else results.path.name),
        state,
        f"{member.committed}/{member.planned} rounds",
        f"{number(len(ranks), 'rank')} on {where}",
        ", ".join(events),
    ]
