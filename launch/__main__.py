"""The command line: ``python -m launch local | slurm | doctor``."""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.local import add_local
from launch.slurm import add_slurm
from testbed.errors import UserError

_EPILOG = """\
examples:
  python -m launch local -n 4 launch/experiments/mnist_batch_size.yaml data.root=DIR
  python -m launch slurm launch/experiments/mnist_batch_size.yaml data.root=DIR \\
      --nodes 4 --ntasks-per-node 4 --gpus-per-node 4 --time 8:00:00 --follow
  python -m launch doctor
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Returns
    -------
    status
        0, 1 for a failure, 2 for wrong input; of ``local`` that of the run, which takes this
        process's place.
    """
    parser = argparse.ArgumentParser(
        prog="launch",
        description="Start runs of the testbed, and look at what is there to start them with. "
        "What is started is printed first.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_local(commands)
    add_slurm(commands)
    doctor = commands.add_parser(
        "doctor", help="what is here: MPI, ULFM, Slurm, GPUs, HDF5, locks; and what is missing"
    )
    doctor.add_argument(
        "folder", nargs="?", type=Path, default=Path(), help="where results would go (default: .)"
    )
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.add_argument(
        "--patience",
        type=_patience,
        default=1,
        metavar="FACTOR",
        help="wait longer than the usual 20 s, where file systems are slow: 1 to 30 (default: 1)",
    )
    doctor.set_defaults(command=_doctor)
    # Overrides may stand before and after options, which argparse alone does not allow.
    options, rest = parser.parse_known_args(
        _joined(sys.argv[1:] if arguments is None else arguments)
    )
    if any(word.startswith("-") or "overrides" not in options for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    try:
        status: int = options.command(options)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "launch").partition(".")[0] in ("analysis", "launch", "testbed"):
            raise
        print(
            f"error: {sys.executable} has no module {error.name}: take the Python of the "
            "environment that the testbed is installed in, or pip install '.[run]' in the "
            "repository; `python -m launch doctor` says what is missing",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:
        # What is still buffered has nowhere to go: at exit Python would complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _joined(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with ``--sbatch --mem=3G`` as one word, or argparse sees two options."""
    words: list[str] = []
    for word in arguments:
        if words and words[-1] == "--sbatch" and word.startswith("-"):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _patience(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 1 <= float(text) <= 30:
            return float(text)
    raise argparse.ArgumentTypeError(f"found {text!r}: expected a number from 1 to 30")


def _doctor(options: argparse.Namespace) -> int:
    from launch.doctor import doctor

    return doctor(options.folder, json=options.json, patience=options.patience)


if __name__ == "__main__":
    sys.exit(main())
