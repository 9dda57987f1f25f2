"""What is to be run, as `launch local` and `launch slurm` are told it."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.arguments import positive_seconds


@dataclass(frozen=True)
class Asked:
    """A run of an experiment.

    Attributes
    ----------
    words
        Arguments of ``testbed run`` without the output, the experiment first.
    output
        The results file.
    threads
        For arithmetic, of each rank.
    scenarios
        How many there are in the sweep.
    most_ranks
        How many ranks can have work at a time; None where any number can.
    problem
        Why it would not run as it is on this machine, in lines; none if it would. Another machine
        may have the data.
    tolerant
        Whether it is to go on when it loses ranks.
    """

    words: Sequence[str]
    output: Path
    threads: int
    scenarios: int
    most_ranks: int | None
    problem: Sequence[str]
    tolerant: bool


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `read_run` looks at."""
    parser.add_argument("experiment", type=Path, help="experiment file (YAML)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides, as in federation.rounds=10"
    )
    parser.add_argument("--profile", metavar="NAME", help="one of the file's profiles")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="results file (default: named like the experiment, in the current folder); a run that "
        "was begun goes on",
    )
    parser.add_argument(
        "--on-rank-loss",
        choices=("end", "continue"),
        default="end",
        help="what a dead client rank does to the run; continue takes an Open MPI with ULFM",
    )
    parser.add_argument(
        "--deadline",
        type=positive_seconds,
        metavar="SECONDS",
        help="in which a rank has to deliver an update, or is taken for lost (default: no limit)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")


def read_run(options: argparse.Namespace) -> Asked:
    """Return what is to be run.

    Raises
    ------
    UserError
        The experiment is wrong, or the name for its results.
    """
    # Not above: `launch doctor` says what is missing, and can do without packages.
    from testbed.errors import UserError
    from testbed.experiment import load_experiment
    from testbed.naming import check_new_name, results_path
    from testbed.plan import make_plan
    from testbed.results.output import check_folder

    resolved = load_experiment(options.experiment, options.overrides, options.profile)
    plans = make_plan(resolved)
    given = options.output
    output = results_path(f"{options.experiment.stem}.h5" if given is None else given)
    check_new_name(output, options.experiment)
    problem: list[str] = []
    try:
        resolved.require_data()
        check_folder(output)
    except UserError as error:
        problem += error.args
    words = [str(options.experiment), *options.overrides]
    if options.profile:
        words += ["--profile", options.profile]
    if options.on_rank_loss != "end":
        words += ["--on-rank-loss", options.on_rank_loss]
    if options.deadline:
        words += ["--deadline", f"{options.deadline:g}"]
    # Repetitions with models of their own are under way side by side, rounds of a training are not.
    trains = [plan.clients for plan in plans if not plan.fresh_model]
    return Asked(
        words=words,
        output=output,
        threads=resolved.experiment.compute.threads,
        scenarios=len(plans),
        most_ranks=1 + max(trains) if len(trains) == len(plans) else None,
        problem=problem,
        tolerant=options.on_rank_loss == "continue",
    )
