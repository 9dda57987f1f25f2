"""What a Slurm job asks for: nodes, ranks, CPUs, GPUs and time."""

import argparse
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from launch.asked import Asked
from launch.submit import known_partitions
from launch.words import Command
from testbed.errors import UserError

# Slurm looks once a minute whether a warning is due, and may give it as much earlier.
_EARLY = 60


# Options of sbatch that do not go together with the line, by their beginnings, and why.
_REFUSED = {
    r"--exp(?!ort=(?i:all)(,|$))": "the job needs TESTBED_ROOT and more of this line: leave it out",
    r"--wai(t$|t=|$)|-W": "use --follow, which shows how far the job is",
    r"--wr": "the job is that of slurm/: leave it out",
}


@dataclass(frozen=True)
class Resources:
    """What a job asks for.

    Attributes
    ----------
    nodes, ntasks_per_node
        How many, and of ranks on each.
    cpus_per_task
        Of each rank.
    gpus_per_node
        How many; 0 for none.
    """

    nodes: int
    ntasks_per_node: int
    cpus_per_task: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        """How many there are in all."""
        return self.nodes * self.ntasks_per_node


def add_resources(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `choose_resources` looks at."""
    count = parser.add_argument_group("resources, of each job")
    count.add_argument("--nodes", type=int, default=1, metavar="N", help="(default: 1)")
    count.add_argument(
        "--ntasks-per-node",
        type=int,
        metavar="N",
        help="ranks on each node (default: one per GPU, or without GPUs one per core, and no more "
        "than have work)",
    )
    count.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="(default: 0)")
    count.add_argument("--cpus-per-task", type=int, metavar="N", help="(default: compute.threads)")
    count.add_argument("--time", metavar="D-HH:MM:SS", help="limit (default: the partition's)")
    count.add_argument(
        "--array", type=_share_count, metavar="N", help="so many jobs, each with a share"
    )


def _share_count(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        range_ = re.fullmatch(r"0-(\d+)(%\d+)?", text)  # as sbatch's own option has it
        fit = int(range_[1]) + 1 if range_ else 16
        some = f" --sbatch=--array={text}" if range_ and range_[2] else ""
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected how many: --array {fit}{some}"
        ) from None


def check_numbers(options: argparse.Namespace) -> None:
    """Raise `UserError` where what the command line says cannot be."""
    least = {"nodes": 1, "ntasks_per_node": 1, "cpus_per_task": 1, "gpus_per_node": 0, "array": 1}
    for name, lowest in (*least.items(), ("warning", 1), ("max_requeues", 0)):
        found = getattr(options, name)
        if found is not None and found < lowest:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {found}: expected at least {lowest}")
    limit = read_time(options.time or "")
    if limit is not None and limit <= options.warning + _EARLY:
        text = (
            f"--time {options.time}: Slurm warns --warning {options.warning} seconds before the "
            f"time is up, or up to {_EARLY} earlier: the job {{would}} be told so at its start; "
            "take a longer --time, or a shorter --warning"
        )
        if limit <= options.warning:
            raise UserError(text.format(would="would"))
        print(f"note: {text.format(would='may')}", file=sys.stderr)
    for argument in options.sbatch:
        try:
            words = shlex.split(argument)
        except ValueError as error:
            raise UserError(f"--sbatch={argument}: {error}") from None
        if not (words and words[0].startswith("-")):
            raise UserError(f"--sbatch={argument}: expected an option, as in --sbatch=--mem=32G")
    words = sbatch_words(options)
    for pattern, why in _REFUSED.items():
        found = next((word for word in words if re.match(pattern, word)), None)
        if found:
            raise UserError(f"--sbatch={found}: {why}")
    array = next((word for word in words if re.match(r"--a(r|$)|-a", word)), None)
    if array and not options.array:
        raise UserError(
            f"--sbatch={array}: of how many shares are the elements? Say so by --array N, too"
        )


def sbatch_words(options: argparse.Namespace) -> list[str]:
    """Return the words that are added for sbatch."""
    return [word for argument in options.sbatch for word in shlex.split(argument)]


def read_time(text: str) -> int | None:
    """Return the seconds of a time limit in sbatch's notations; None where it is none of them.

    Source: sbatch(1), --time.
    """
    days, dash, rest = text.rpartition("-")
    fields = rest.split(":")
    most = 3
    if not all(field.isdecimal() for field in (fields if not dash else [days, *fields])):
        return None
    if len(fields) > most:
        return None
    numbers = [int(field) for field in fields]
    if dash:  # D-HH, D-HH:MM, D-HH:MM:SS
        numbers += [0] * (most - len(numbers))
        numbers[0] += 24 * int(days)
    elif len(numbers) == 1:  # minutes
        numbers.append(0)
    seconds = 0
    for number in numbers:
        seconds = 60 * seconds + number
    return seconds or None  # 0 is no limit


def choose_resources(
    options: argparse.Namespace, asked: Asked, environment: Mapping[str, str]
) -> Resources:
    """Return what a job asks for; what was not said is computed.

    Parameters
    ----------
    options
        As the command line has them.
    asked
        What is to be run.
    environment
        Of this process, which sbatch looks at too.

    Raises
    ------
    UserError
        A number does not fit the experiment, or cannot be computed.
    """
    if options.array and options.array > asked.scenarios:
        raise UserError(
            f"--array {options.array}: the sweep has {asked.scenarios} scenarios, and each job "
            "of an array takes one at least"
        )
    threads = options.cpus_per_task or asked.threads
    if threads < asked.threads:
        raise UserError(
            f"--cpus-per-task {threads}: each rank computes with {asked.threads} threads "
            "(compute.threads)"
        )
    tasks = options.ntasks_per_node or options.gpus_per_node
    if not tasks:
        cores = _cores_per_node(find_partition(options, environment))
        tasks = cores // threads
        if tasks < 1:
            raise UserError(
                f"each rank has {threads} CPUs, and a node of the partition {cores}: lower "
                "compute.threads, or --cpus-per-task"
            )
        if asked.most_ranks is not None:
            tasks = min(tasks, -(-asked.most_ranks // options.nodes))
    chosen = Resources(options.nodes, tasks, threads, options.gpus_per_node)
    if asked.most_ranks is not None and chosen.ranks > asked.most_ranks:
        print(
            f"note: {chosen.ranks} ranks, and {asked.most_ranks} of them would have work: a round "
            f"has {_clients(asked.most_ranks - 1)}",
            file=sys.stderr,
        )
    return chosen


def _clients(count: int) -> str:
    return "1 client" if count == 1 else f"{count} clients"


def find_partition(options: argparse.Namespace, environment: Mapping[str, str]) -> str:
    """Return the partition that sbatch will take; empty for the default one."""
    found: str = options.partition or environment.get("SBATCH_PARTITION", "")
    words = sbatch_words(options)
    for word, after in pairwise([*words, ""]):
        # sbatch takes any beginning of an option that only one has.
        match = re.fullmatch(r"-p(.*)|--part[a-z]*(?:=(.*))?", word)
        if match:
            found = match[1] or match[2] or after
    return found


def _cores_per_node(partition: str) -> int:
    """Return how many cores every node of the partition has; hardware threads are none."""
    hint = "say how many ranks each node has, by --ntasks-per-node"
    if shutil.which("sinfo") is None:
        raise UserError(f"without sinfo the nodes' CPUs are not known: {hint}")
    words = ["sinfo", "-h", "-o", "%P %c %X %Y"]
    said = Command(words + (["-p", partition] if partition else [])).finish()
    found: list[int] = []
    for line in said.stdout.splitlines():
        # PARTITION CPUS SOCKETS CORES-PER-SOCKET, as in 48+ where nodes differ: that is the least.
        match = re.fullmatch(r"\s*(\S+) +(\d+)\S* +(\d+)\S* +(\d+)\S*\s*", line)
        if match and (match[1].endswith("*") or partition):
            found.append(min(int(match[2]), int(match[3]) * int(match[4])))
    if not found and partition and said.returncode == 0:
        raise UserError(
            f"partition {partition}: sinfo does not list it, expected one of: {known_partitions()}"
        )
    if not found:
        reason = said.stderr.strip() or "it lists no default partition: name one with --partition"
        raise UserError(f"sinfo does not tell how many CPUs a node has: {reason}; or {hint}")
    return min(found)
