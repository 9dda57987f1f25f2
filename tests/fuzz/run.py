"""Fuzzing by hand: ``python tests/fuzz/run.py --minutes 10 [--format idx] [--seed N]``.

Prints a table; inputs that fail are kept, each with a report that says how to repeat it. Exit
status 1 where there was one.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from campaign import Failure, Tally, fuzz
from formats import NAMES

_COLUMNS = ("format", "inputs", "accepted", "refused", "failed", "seconds")


def main() -> int:
    options = _parser().parse_args()
    names = options.format or NAMES
    keep = options.keep or Path(tempfile.mkdtemp(prefix="fuzz-failures-"))
    if options.only is not None:
        span = {"start": options.only, "stop": options.only + 1}
    else:
        span = {"seconds": 60 * options.minutes / len(names)}
    print(f"seed {options.seed}; inputs that fail are kept in {keep}", flush=True)
    print(_line(_COLUMNS), flush=True)
    failed = 0
    for name in names:
        tally = fuzz(name, options.seed, keep=keep, **span)
        print(_line(_row(tally)), flush=True)
        _print_failures(tally)
        failed += len(tally.failures)
    return 1 if failed else 0


def _print_failures(tally: Tally) -> None:
    """Print the first failure of each kind, and how many are like it."""
    kinds: dict[str, list[Failure]] = {}
    for failure in tally.failures:
        kinds.setdefault(failure.kind, []).append(failure)
    for alike in kinds.values():
        print(alike[0], file=sys.stderr)
        if others := [str(one.number) for one in alike[1:]]:
            print(f"like it: inputs {', '.join(others)}", file=sys.stderr)
        print(file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=10, help="of all formats together")
    length.add_argument("--only", type=int, metavar="NUMBER", help="a single input, to repeat it")
    parser.add_argument("--format", action="append", choices=NAMES, help="may be repeated")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="(default: the time)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for inputs that fail")
    return parser


def _row(tally: Tally) -> tuple[str, ...]:
    counts = [tally.outcomes[name] for name in ("accepted", "refused", "failed")]
    return (tally.format, *map(str, (tally.tried, *counts)), f"{tally.seconds:.0f}")


def _line(cells: tuple[str, ...]) -> str:
    return "  ".join([cells[0].ljust(16), *(cell.rjust(9) for cell in cells[1:])])


if __name__ == "__main__":
    sys.exit(main())
