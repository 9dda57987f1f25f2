"""The round benchmark: what a federated round costs beyond its arithmetic. Not a test: run it.

    python tests/benchmarks/rounds.py --data MNIST_FOLDER [--quick] [--device cuda]

MNIST, 8 clients, batches of 8, one local step, no evaluation; the paper's CNN (13,426 parameters,
54 KB per update), then an MLP of 11.1 million parameters (44 MB per update). `contenders` says what
is compared: (a) a plain torch loop in one process, (b) a minimal mpi4py program, and the testbed,
without attacks (round 0 is attacked, and does not count), with four attacks on every update of
every round, and with all attacks in closed form. ``1+2`` is a root and two workers; ``1`` one
process. ``x none`` is the rate relative to the testbed's own without attacks: 1 where they hide
behind the clients' work.

The contenders take turns, repetition after repetition, so that a busy machine slows all of them;
each run measures a window of rounds after a warm-up (`measure`). Rounds per second are best and
median over the repetitions, CPU time and memory medians. ``x loop`` and ``x mpi`` are medians over
the repetitions of the ratio to (a), and to (b) with as many ranks, of the same repetition: above 1
is faster for rounds, dearer for CPU. On a busy machine the CPU ratios are the steadier ones; (b)
spins while it waits, (b) ``patient`` naps as the testbed does.

The last table is the testbed's own account, from its results file: how the root's time of a round
divides, and what one client's work takes.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import Result, cores, facts, run_contender

from testbed.results.schema import PHASES

ATTACKS = {
    "": (),
    "4 attacks": ("random", "llg", "llg_star", "llg_plus"),
    # All that need no solver, no simulation and no optimisation, and apply to one local step.
    "closed form": (
        *("random", "uniform", "prior", "oracle", "llg", "llg_star", "llg_plus", "idlg"),
        *("idlg_presence", "gradinversion", "gradinversion_presence", "ebi", "llbg", "llbg_plus"),
        *("zlg", "zlg_plus", "aux_mean", "pos_neg", "scale_free", "ilrg", "rlu", "lmmse"),
    ),
}
# Of the warm-up and of what counts.
ROUNDS = {"cnn": (20, 200), "mlp": (2, 8)}
QUICK_ROUNDS = {"cnn": (3, 12), "mlp": (1, 3)}
COLUMNS = (*(phase for phase in PHASES if phase != "evaluate"), "client_seconds")


@dataclass(frozen=True)
class Contender:
    """A program, its number of workers (0: one process, no MPI), and which `ATTACKS` it runs."""

    program: str
    workers: int
    attacks: str = ""

    @property
    def ranks(self) -> int:
        """Number of MPI ranks; 0 for a process without MPI."""
        return self.workers + 1 if self.workers else 0

    def __str__(self) -> str:
        name = {"loop": "(a) torch loop", "minimal": "(b) mpi4py", "patient": "(b) patient"}
        ranks = f"1+{self.workers}" if self.workers else "1"
        attacked = f", {self.attacks}" if self.attacks else ""
        return f"{name.get(self.program, self.program)}, {ranks}{attacked}"


def contenders(workers: Sequence[int]) -> list[Contender]:
    """Return who is compared, for numbers of workers."""
    chosen = [Contender("loop", 0)]
    chosen += [Contender(name, n) for n in workers for name in ("minimal", "patient")]
    return chosen + [Contender("testbed", n, attacks) for n in (0, *workers) for attacks in ATTACKS]


def compare(options: argparse.Namespace, model: str) -> dict[Contender, list[Result]]:
    """Run all contenders on a model, in turns; return their results in order of repetitions."""
    warmup, rounds = (QUICK_ROUNDS if options.quick else ROUNDS)[model]
    results: dict[Contender, list[Result]] = {c: [] for c in contenders(options.workers)}
    for repetition in range(options.repetitions):
        for contender, found in results.items():
            if sys.stderr.isatty():
                print(f"\r{model} {repetition + 1}: {contender} ...\033[K", end="", file=sys.stderr)
            task = {
                "contender": contender.program,
                "model": model,
                "data": str(options.data),
                "device": options.device,
                "warmup": warmup,
                "rounds": rounds,
                "attacks": ATTACKS[contender.attacks],
            }
            found.append(run_contender(task, contender.ranks))
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return results


def report(model: str, results: dict[Contender, list[Result]]) -> str:
    """Return the tables of a model."""
    head = f"{'rounds/s: best':>14}{'median':>8}{'x loop':>8}{'x mpi':>7}"
    head += f"{'x none':>8}{'CPU ms/round':>15}{'x loop':>8}{'x mpi':>7}{'MB (PSS)':>10}"
    lines = [f"{model:<28}{head}"]
    for contender, found in results.items():
        loop = results[Contender("loop", 0)]
        mpi = results.get(Contender("minimal", contender.workers), [])
        none = results[Contender("testbed", contender.workers)] if contender.attacks else []
        speed = [result.rounds_per_second for result in found]
        line = f"{contender!s:<28}{max(speed):>14.2f}{statistics.median(speed):>8.2f}"
        line += _ratio(found, loop, _speed, 8) + _ratio(found, mpi, _speed, 7)
        line += _ratio(found, none, _speed, 8)
        line += f"{statistics.median(map(_cpu, found)):>15.1f}"
        line += _ratio(found, loop, _cpu, 8) + _ratio(found, mpi, _cpu, 7)
        lines.append(line + f"{statistics.median(result.pss_mb for result in found):>10.0f}")
    lines += ["", f"{'ms per round':<28}" + "".join(f"{name:>15}" for name in COLUMNS)]
    for contender, found in results.items():
        if contender.program == "testbed":
            phases = [[result.phases[name] for result in found] for name in COLUMNS]
            lines.append(
                f"{contender!s:<28}" + "".join(f"{statistics.median(v):>15.2f}" for v in phases)
            )
    return "\n".join(lines)


def _speed(result: Result) -> float:
    return result.rounds_per_second


def _cpu(result: Result) -> float:
    return result.cpu_ms


def _ratio(
    found: Sequence[Result], base: Sequence[Result], value: Callable[[Result], float], width: int
) -> str:
    ratios = [value(one) / value(other) for one, other in zip(found, base, strict=False)]
    return f"{statistics.median(ratios):>{width}.2f}" if ratios else f"{'-':>{width}}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables."""
    given = os.environ.get("TESTBED_TEST_DATA")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(given) / "mnist" if given else None,
        required=given is None,
        help="folder with MNIST's files (default: $TESTBED_TEST_DATA/mnist)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=tuple(ROUNDS), default=list(ROUNDS))
    parser.add_argument("--workers", nargs="+", type=int, metavar="N", help="default: 2 8")
    parser.add_argument("--repetitions", type=int, help="default: 3")
    parser.add_argument(
        "--quick", action="store_true", help="one repetition of few rounds, 2 workers: a minute"
    )
    options = parser.parse_args(arguments)
    options.data = options.data.resolve()
    options.workers = options.workers or ([2] if options.quick else [2, 8])
    options.repetitions = options.repetitions or (1 if options.quick else 3)
    print(f"{facts()}\n{options.device}, {options.repetitions} repetitions", flush=True)
    if max(options.workers) + 1 > cores():
        print(f"more ranks than cores ({cores()}): the ratios say more than the rates", flush=True)
    for model in options.models:
        print(f"\n{report(model, compare(options, model))}", flush=True)


if __name__ == "__main__":
    main()
