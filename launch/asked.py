"""What is to be run, as `launch local` and `launch slurm` are told it."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.arguments import positive_seconds
from testbed.errors import UserError

if TYPE_CHECKING:
    from testbed.experiment import ResolvedExperiment


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
    complete
        Whether all of it is done, and in its results file, or in those of all shares.
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
    complete: bool
    problem: Sequence[str]
    tolerant: bool


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `read_run` looks at."""
    parser.add_argument("experiment", type=Path, help="experiment file (YAML)")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # or argparse calls it required
        metavar="key=value",
        help="overrides, as in federation.rounds=10",
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
    # For who is used to `testbed run`: what was begun goes on anyway.
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)


def read_run(options: argparse.Namespace, shares: int | None = None) -> Asked:
    """Return what is to be run.

    Parameters
    ----------
    options
        As the command line has them.
    shares
        Into how many the sweep is cut, each with a results file of its own; None for one file.

    Raises
    ------
    UserError
        The experiment is wrong, or lacks a place of data; or the name for its results is, or has
        those of another run.
    """
    # Not above: `launch doctor` says what is missing, and can do without packages.
    from testbed.begun import find_same
    from testbed.experiment import load_experiment
    from testbed.naming import check_new_name, results_path
    from testbed.plan import make_plan

    resolved = load_experiment(options.experiment, options.overrides, options.profile)
    plans = make_plan(resolved)
    given = options.output
    output = results_path(f"{options.experiment.stem}.h5" if given is None else given)
    check_new_name(output, options.experiment)
    begun = [
        find_same(share_output(output, index, shares), resolved, (index, shares or 1))
        for index in range(min(shares or 1, len(plans)))
    ]
    complete = all(one is not None and one.complete for one in begun)
    if not complete:
        resolved.require_data()
    words = [str(options.experiment), *options.overrides]
    if options.profile:
        words += ["--profile", options.profile]
    if options.on_rank_loss != "end":
        words += ["--on-rank-loss", options.on_rank_loss]
    if options.deadline:
        words += ["--deadline", repr(options.deadline)]
    # Repetitions with models of their own are under way side by side, rounds of a training are not.
    trains = [plan.clients for plan in plans if not plan.fresh_model]
    return Asked(
        words=words,
        output=output,
        threads=resolved.experiment.compute.threads,
        scenarios=len(plans),
        most_ranks=1 + max(trains) if len(trains) == len(plans) else None,
        complete=complete,
        problem=[] if complete else _problem(resolved, output),
        tolerant=options.on_rank_loss == "continue",
    )


def _problem(resolved: "ResolvedExperiment", output: Path) -> list[str]:
    from testbed.data.dataset import kind_of
    from testbed.results.output import check_folder

    found: list[str] = []
    for key, root in resolved.roots():
        try:
            if not kind_of(root):
                found.append(f"{key}={root} does not exist: expected the data there")
        except UserError as error:
            found += error.args
    try:
        check_folder(output)
    except UserError as error:
        found += error.args
    return found


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
