"""``launch slurm``: a run, or a sweep in shares, as a Slurm job."""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.asked import Asked, add_run, read_run
from launch.words import Command
from testbed.errors import UserError

# Of what sbatch says, and what helps.
_FIXES = (
    ("invalid partition", "--partition takes one of: {partitions}"),
    (
        "account",
        "--account takes one that you belong to: `sacctmgr show associations user=$USER` lists "
        "them where the site keeps accounts",
    ),
    ("qos", "--qos takes one that your account has: `sacctmgr show qos` lists all"),
    (
        "node configuration is not available",
        "no partition has so many nodes with so many CPUs and GPUs: `sinfo -o '%P %D %c %G %l'` "
        "shows what there is",
    ),
    ("time limit", "--time is more than the partition allows: `sinfo -o '%P %l'` shows how much"),
    ("unable to contact slurm", "the controller does not answer: `scontrol ping` tells"),
)


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


def add_slurm(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command line of this module."""
    parser = commands.add_parser(
        "slurm",
        help="submit an experiment to Slurm, as one job or as an array of shares of its sweep",
        description="Submit slurm/run.sbatch, or slurm/sweep.sbatch with --array. The job saves "
        "itself before its time is up and queues again until it is done; the same line goes on.",
    )
    add_run(parser)
    count = parser.add_argument_group("resources, of each job")
    count.add_argument("--nodes", type=int, default=1, metavar="N", help="(default: 1)")
    count.add_argument(
        "--ntasks-per-node",
        type=int,
        metavar="N",
        help="ranks on each node (default: one per GPU, or without GPUs one per core)",
    )
    count.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="(default: 0)")
    count.add_argument("--cpus-per-task", type=int, metavar="N", help="(default: compute.threads)")
    count.add_argument("--time", metavar="D-HH:MM:SS", help="limit (default: the partition's)")
    count.add_argument("--array", type=int, metavar="N", help="so many jobs, each with a share")
    where = parser.add_argument_group("where and how")
    where.add_argument("--partition", metavar="NAME")
    where.add_argument("--account", metavar="NAME")
    where.add_argument("--qos", metavar="NAME")
    where.add_argument(
        "--with",
        dest="launcher",
        choices=("srun", "mpirun"),
        help="what starts the ranks (default: as slurm/env.sh says)",
    )
    where.add_argument(
        "--warning",
        type=int,
        default=120,
        metavar="SECONDS",
        help="before the time is up the run saves itself (default: 120)",
    )
    where.add_argument(
        "--max-requeues", type=int, metavar="N", help="(default: as slurm/env.sh says)"
    )
    where.add_argument(
        "--sbatch", action="append", default=[], metavar="ARGUMENT", help="one more for sbatch"
    )
    where.add_argument("--follow", action="store_true", help="show how far it is, to its end")
    parser.set_defaults(command=_slurm)


def _slurm(options: argparse.Namespace) -> int:
    asked = read_run(options)
    if asked.problem:
        print(f"note: as seen from here, {asked.problem}", file=sys.stderr)
    resources = choose_resources(options, asked)
    command = slurm_command(options, asked, resources, find_scripts(os.environ))
    print(command, flush=True)
    if options.dry_run:
        return 0
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch here: submit from a login node of a Slurm cluster, or use "
            "`python -m launch local`"
        )
    job = submit(command)
    shares = options.array or 1
    print(f"job {job}; results: {shown_output(asked.output, options.array)}", flush=True)
    if not options.follow:
        return 0
    from launch.follow import follow

    return follow(job, [share_output(asked.output, i, options.array) for i in range(shares)])


def find_scripts(environment: Mapping[str, str]) -> Path:
    """Return the repository's root, where ``slurm/`` is.

    Raises
    ------
    UserError
        It is not beside this package, and TESTBED_ROOT does not name it.
    """
    root = Path(environment.get("TESTBED_ROOT") or Path(__file__).parent.parent).resolve()
    if not (root / "slurm/run.sbatch").is_file():
        raise UserError(
            f"{root}: there is no slurm/run.sbatch here: install from a clone with `pip install "
            "-e`, or set TESTBED_ROOT to one"
        )
    return root


def choose_resources(options: argparse.Namespace, asked: Asked) -> Resources:
    """Return what a job asks for; what was not said is computed.

    Raises
    ------
    UserError
        A number is wrong, or cannot be computed.
    """
    least = {"nodes": 1, "ntasks_per_node": 1, "cpus_per_task": 1, "gpus_per_node": 0, "array": 1}
    for name, lowest in (*least.items(), ("warning", 1), ("max_requeues", 0)):
        found = getattr(options, name)
        if found is not None and found < lowest:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {found}: expected at least {lowest}")
    threads = options.cpus_per_task or asked.threads
    if threads < asked.threads:
        raise UserError(
            f"--cpus-per-task {threads}: each rank computes with {asked.threads} threads "
            "(compute.threads)"
        )
    tasks = options.ntasks_per_node or options.gpus_per_node or _cores_per_node(options) // threads
    if tasks < 1:
        raise UserError(f"a node of the partition has fewer than {threads} CPUs: lower the threads")
    if options.array and options.array > asked.scenarios:
        raise UserError(
            f"--array {options.array}: the sweep has {asked.scenarios} scenarios, one for each "
            "element at most"
        )
    chosen = Resources(options.nodes, tasks, threads, options.gpus_per_node)
    if asked.most_ranks is not None and chosen.ranks > asked.most_ranks:
        print(
            f"note: {chosen.ranks} ranks, and {asked.most_ranks} of them would have work: a round "
            f"has {asked.most_ranks - 1} clients",
            file=sys.stderr,
        )
    return chosen


def _cores_per_node(options: argparse.Namespace) -> int:
    """Return how many CPUs every node of the partition has."""
    hint = "say how many ranks each node has: --ntasks-per-node"
    if shutil.which("sinfo") is None:
        raise UserError(f"without sinfo the nodes' CPUs are not known: {hint}")
    words = ["sinfo", "-h", "-o", "%P %c"]
    said = Command(words + (["-p", options.partition] if options.partition else [])).finish()
    found: dict[str, int] = {}
    for line in said.stdout.splitlines():
        name, _, count = line.partition(" ")
        if name.endswith("*") or options.partition:
            cores = int(re.sub(r"\D.*", "", count) or 0)  # 48+ where nodes differ
            found[name] = min(cores, found.get(name, cores))
    if not found:
        raise UserError(
            f"{options.partition or 'the default partition'}: sinfo does not know it or its nodes "
            f"({said.stderr.strip() or 'no answer'}): {hint}"
        )
    return min(found.values())


def slurm_command(
    options: argparse.Namespace, asked: Asked, resources: Resources, root: Path
) -> Command:
    """Return the command line that submits a run.

    Parameters
    ----------
    options
        As the command line has them.
    asked, resources
        What is to be run, on what.
    root
        The folder with ``slurm/``.
    """
    words = ["sbatch", "--parsable", f"--job-name={asked.output.stem}"]
    words += [f"--nodes={resources.nodes}", f"--ntasks-per-node={resources.ntasks_per_node}"]
    words += [f"--cpus-per-task={resources.cpus_per_task}"]
    if resources.gpus_per_node:
        words += [f"--gpus-per-node={resources.gpus_per_node}"]
    for name in ("time", "partition", "account", "qos"):
        value = getattr(options, name)
        words += [f"--{name}={value}"] if value else []
    words += [f"--signal=B:USR1@{options.warning}"]
    settings = {"TESTBED_ROOT": str(root)}
    if options.launcher:
        settings["TESTBED_LAUNCHER"] = options.launcher
    if options.max_requeues is not None:
        settings["TESTBED_MAX_REQUEUES"] = str(options.max_requeues)
    if asked.tolerant:
        if options.launcher == "srun":
            raise UserError(
                "--on-rank-loss continue: srun ends all ranks when one dies: use --with mpirun"
            )
        settings["TESTBED_LAUNCHER"] = "mpirun"
        settings["TESTBED_MPIRUN_ARGUMENTS"] = "--with-ft ulfm"
    script = "run.sbatch"
    if options.array:
        script = "sweep.sbatch"
        words += [f"--array=0-{options.array - 1}"]
        settings["SHARES"] = str(options.array)
    words += [*options.sbatch, str(root / "slurm" / script)]
    return Command([*words, *asked.words, "-o", str(asked.output)], settings)


def share_output(output: Path, index: int, shares: int | None) -> Path:
    """Return the results file of a share, as slurm/sweep.sbatch names it."""
    if not shares:
        return output
    return output.with_name(f"{output.name.removesuffix('.h5')}_{index}of{shares}.h5")


def shown_output(output: Path, shares: int | None) -> str:
    """Return the name, or the pattern, of the results."""
    if not shares:
        return str(output)
    return str(share_output(output, 0, shares)).replace(f"_0of{shares}.h5", f"_*of{shares}.h5")


def submit(command: Command) -> str:
    """Submit a job and return its number.

    Raises
    ------
    UserError
        Slurm does not take it: with what it says, and what helps.
    """
    said = command.finish()
    if said.returncode != 0:
        text = said.stderr.strip() or said.stdout.strip() or f"status {said.returncode}"
        raise UserError(f"{text}\n{_fix(text)}".strip())
    # JOB, or JOB;CLUSTER
    found = re.fullmatch(r"(\d+)(;\S+)?", said.stdout.strip().splitlines()[-1])
    if found is None:
        raise UserError(f"sbatch says {said.stdout!r}, expected the number of a job")
    if said.stderr.strip():
        print(said.stderr.strip(), file=sys.stderr)
    return found[1]


def _fix(text: str) -> str:
    for sign, fix in _FIXES:
        if sign in text.lower():
            if "{partitions}" in fix:
                known = Command(["sinfo", "-h", "-o", "%R"]).finish().stdout.split()
                fix = fix.format(partitions=", ".join(sorted(set(known))) or "unknown")
            return fix
    return ""
