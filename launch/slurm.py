"""``launch slurm``: a run, or a sweep in shares, as a Slurm job."""

import argparse
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from launch.asked import Asked, add_run, read_run, share_output, shown_output
from launch.resources import (
    Resources,
    add_resources,
    check_numbers,
    choose_resources,
    sbatch_words,
)
from launch.submit import submit
from launch.words import Command
from testbed.errors import UserError


def add_slurm(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command line of this module."""
    parser = commands.add_parser(
        "slurm",
        # sbatch's --gpus and --ntasks are other things than these options that begin like them.
        allow_abbrev=False,
        help="submit an experiment to Slurm, as one job or as an array of shares of its sweep",
        description="Submit slurm/run.sbatch, or slurm/sweep.sbatch with --array. The job saves "
        "itself before its time is up and queues again until it is done; the same line goes on.",
    )
    add_run(parser)
    add_resources(parser)
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
        "--sbatch",
        action="append",
        default=[],
        metavar="ARGUMENT",
        help="more for sbatch, as in --sbatch=--mem=32G",
    )
    where.add_argument("--follow", action="store_true", help="show how far it is, to its end")
    parser.set_defaults(command=_slurm)


def _slurm(options: argparse.Namespace) -> int:
    check_numbers(options)
    asked = read_run(options, options.array)
    results = shown_output(asked.output, options.array)
    if asked.complete:
        print(f"{results}: the run is complete", file=sys.stderr)
        return 0
    for line in asked.problem:
        print(f"note: as seen from here, {line}", file=sys.stderr)
    root = find_scripts(os.environ)
    command = slurm_command(
        options, asked, choose_resources(options, asked, os.environ), root, os.environ
    )
    print(command, flush=True)
    if options.dry_run:
        return 0
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch here: submit from a login node of a Slurm cluster, or use "
            "`python -m launch local`"
        )
    for name in list(os.environ):
        # Of the job that this is called in: sbatch would hand them down to the new one.
        if name.startswith(("SLURM_RESTART", "SLURM_ARRAY")):
            del os.environ[name]
    job = submit(command)
    log = log_name(options, asked, job, os.environ)
    where = f"; log: {log}" if log else ""
    print(f"job {job}; results: {shlex.quote(str(results))}{where}", flush=True)
    if not options.follow:
        return 0
    from launch.follow import follow

    shares = range(options.array or 1)
    return follow(job, [share_output(asked.output, i, options.array) for i in shares])


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


def slurm_command(
    options: argparse.Namespace,
    asked: Asked,
    resources: Resources,
    root: Path,
    environment: Mapping[str, str],
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
    environment
        Of this process; sbatch hands it down to the job.

    Raises
    ------
    UserError
        What is asked for does not go together.
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
    exported = environment.get("SBATCH_EXPORT", "ALL")
    if "ALL" not in exported.upper().split(","):
        # Some sites' default, under which the job would get none of these.
        nothing = exported.upper() in ("NONE", "NIL")
        settings["SBATCH_EXPORT"] = "ALL" if nothing else f"ALL,{exported}"
    if options.launcher:
        settings["TESTBED_LAUNCHER"] = options.launcher
    if options.max_requeues is not None:
        settings["TESTBED_MAX_REQUEUES"] = str(options.max_requeues)
    if asked.tolerant:
        if options.launcher == "srun":
            raise UserError(
                "--on-rank-loss continue: srun ends all ranks when one dies: use --with mpirun"
            )
        settings["TESTBED_LAUNCHER"] = "mpirun"  # with --with-ft ulfm, as slurm/job.sh sees to
    script = "run.sbatch"
    if options.array:
        script = "sweep.sbatch"
        words += [f"--array=0-{options.array - 1}"]
        settings["TESTBED_SHARES"] = str(options.array)
    words += sbatch_words(options)
    words.append(str(root / "slurm" / script))
    return Command([*words, *asked.words, "-o", str(asked.output)], settings)


def log_name(
    options: argparse.Namespace, asked: Asked, job: str, environment: Mapping[str, str]
) -> str:
    """Return the name, or the pattern, of what jobs print; empty where another was asked for."""
    if "SBATCH_OUTPUT" in environment:
        return ""
    # sbatch takes any beginning of an option that only one has.
    if any(re.match(r"-[oJD]|--(ou|jo|chd)", word) for word in sbatch_words(options)):
        return ""
    element = "_*" if options.array else ""
    return f"{asked.output.stem}-{job}{element}.out"
