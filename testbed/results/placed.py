"""What the placement of a run's ranks comes to: hosts, and what ranks share."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # NumPy is not needed here: `launch doctor` has no package.
    from testbed.results.records import Rank


def describe_hosts(ranks: Sequence["Rank"]) -> str:
    """Return how many ranks there are on which hosts: ``4 ranks on 2 hosts: n1 (2), n2 (2)``."""
    hosts = Counter(rank.host for rank in ranks)
    names = [f"{host} ({count})" for host, count in hosts.items()]
    if len(names) > 8:
        names = [*names[:4], f"{len(names) - 8} more", *names[-4:]]
    return f"{_number(len(ranks), 'rank')} on {_number(len(hosts), 'host')}: {', '.join(names)}"


def describe_sharing(ranks: Sequence["Rank"], threads: int | None = None) -> list[str]:
    """Return one line for each GPU, and for each host's CPUs, that are too few for its ranks.

    Parameters
    ----------
    ranks
        All of them, in order.
    threads
        For arithmetic, of each rank; None leaves CPUs out.
    """
    lines = []
    gpus: dict[tuple[str, str], list[int]] = {}
    hosts: dict[str, list[int]] = {}
    for number, rank in enumerate(ranks):
        hosts.setdefault(rank.host, []).append(number)
        if rank.gpu:
            gpus.setdefault((rank.host, rank.gpu), []).append(number)
    for (host, gpu), sharing in gpus.items():
        if len(sharing) > 1:
            name = ranks[sharing[0]].device.partition(" ")[2]
            lines.append(f"ranks {_listed(sharing)} share a GPU of {host} ({name}, {gpu})")
    for host, there in hosts.items():
        cores = {core for number in there for core in read_ranges(ranks[number].cores)}
        if threads and cores and len(there) * threads > len(cores):
            lines.append(
                f"{host}: {_number(len(cores), 'CPU')} for {_number(len(there), 'rank')} of "
                f"{_number(threads, 'thread')}"
            )
    return lines


def write_ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as ranges: ``0-3,8``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def read_ranges(text: str) -> list[int]:
    """Return the numbers of `write_ranges`; none for a text that is something else."""
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            return []
        numbers += range(int(first), min(int(last or first), 1 << 16) + 1)
    return numbers


def _listed(numbers: Sequence[int]) -> str:
    return write_ranges(numbers).replace(",", ", ")


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
