"""The command line: ``python -m testbed run | resume | check | data | list``."""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from testbed import __version__
from testbed.arguments import positive_seconds
from testbed.data_commands import add_data_commands
from testbed.errors import UserError
from testbed.standard_error import LastingError, await_reader, open_closed

_EPILOG = """\
examples:
  testbed check launch/experiments/quickstart.yaml
  testbed run launch/experiments/quickstart.yaml -o results.h5
  mpirun -n 4 python -m testbed run launch/experiments/mnist_batch_size.yaml \\
      data.root=DIR -o mnist.h5
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for a failure, 2 for wrong input."""
    open_closed()
    try:
        return _main(arguments)
    finally:
        await_reader()


def _main(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    # Overrides may stand before and after options, which argparse alone does not allow.
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "overrides" not in options for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    try:
        status: int = options.command(options)
        sys.stdout.flush()
    except UserError as error:
        from testbed.transport.environment import is_leader

        if is_leader():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # What is still buffered has nowhere to go: at exit Python would complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="testbed",
        description="Measure how much the labels of private training data leak from federated "
        "learning.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"testbed {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="run an experiment, alone or under mpirun or srun", allow_abbrev=False
    )
    _add_experiment(run)
    run.add_argument("-o", "--output", required=True, help="results file (HDF5)")
    run.add_argument("--overwrite", action="store_true", help="replace an existing results file")
    run.add_argument(
        "--share",
        type=_share,
        default=(0, 1),
        metavar="I/N",
        help="run every N-th scenario of the sweep from number I on (default: all, 0/1)",
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="go on with an earlier start of the same run; begin it if there is none",
    )
    _add_running(run)
    run.set_defaults(command=_run)

    resume = commands.add_parser(
        "resume",
        help="go on with a run that was stopped or killed, with any number of ranks",
        description="Go on after the last committed round. The finished file is that of a run that "
        "was never interrupted, to the bit, timings aside.",
    )
    resume.add_argument("output", help="results file, with or without .partial")
    resume.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="keys without a part in the results, such as data.root",
    )
    _add_running(resume)
    resume.set_defaults(command=_resume)

    check = commands.add_parser("check", help="print what an experiment would do, without torch")
    _add_experiment(check)
    check.set_defaults(command=_check)

    add_data_commands(commands)

    listing = commands.add_parser("list", help="print the attacks, defences, models or data sets")
    listing.add_argument("kind", choices=("attacks", "defenses", "models", "datasets"))
    listing.set_defaults(command=_list)
    return parser


def _add_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress",
        choices=("auto", "live", "log", "none"),
        default="auto",
        help="a live line, lines in a log, or nothing (default: by where stderr leads)",
    )
    parser.add_argument(
        "--on-rank-loss",
        choices=("end", "continue"),
        default="end",
        help="what a dead client rank does to the run; continue takes mpirun --with-ft ulfm",
    )
    parser.add_argument(
        "--deadline",
        type=positive_seconds,
        metavar="SECONDS",
        help="in which a rank has to deliver an update, or is taken for lost (default: no limit)",
    )


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", type=Path, help="experiment file (YAML)")
    parser.add_argument("--profile", metavar="NAME", help="one of the file's profiles")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="overrides, as in federation.rounds=10",
    )


def _share(text: str) -> tuple[int, int]:
    first, slash, last = text.partition("/")
    if not (slash and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected I/N with 0 <= I < N, as in 0/4")
    return int(first), int(last)


def _run(options: argparse.Namespace) -> int:
    if options.resume and options.overwrite:
        raise UserError("--resume keeps what an earlier start has done, --overwrite discards it")
    return _start(
        options,
        experiment=options.experiment,
        overwrite=options.overwrite,
        profile=options.profile,
        share=options.share,
        resume=options.resume,
    )


def _resume(options: argparse.Namespace) -> int:
    return _start(options, experiment=None, overwrite=False, resume=True)


def _start(options: argparse.Namespace, **settings: Any) -> int:
    from testbed.signals import StopSignal

    # Before the imports that take seconds: a signal that comes early must not kill this rank.
    stop = StopSignal().install()
    from testbed.naming import results_path

    output = results_path(options.output)
    from testbed.run import RunOptions, run
    from testbed.transport.environment import connect

    run_options = RunOptions(
        output=output,
        overrides=options.overrides,
        progress=options.progress,
        on_rank_loss=options.on_rank_loss,
        deadline=options.deadline,
        **settings,
    )
    try:
        with contextlib.redirect_stderr(LastingError(sys.stderr)):
            return run(connect(), run_options, stop)
    finally:
        stop.retire()


def _check(options: argparse.Namespace) -> int:
    from testbed.describe import describe_experiment
    from testbed.experiment import load_experiment

    resolved = load_experiment(options.experiment, options.overrides, options.profile)
    print(describe_experiment(resolved))
    return 0


def _list(options: argparse.Namespace) -> int:
    from testbed.describe import describe_known

    print(describe_known(options.kind))
    return 0


if __name__ == "__main__":
    sys.exit(main())
