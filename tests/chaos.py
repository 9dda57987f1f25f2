"""Kills runs at random moments, lets them go on, and compares what they leave, bit by bit.

    python tests/chaos.py --runs 100 [--seed N] [--folder DIR]      the long form

Each run of the program is one of `EXPERIMENTS` under one of `FAULTS`, on a random number of ranks,
at a random moment; it is resumed until it is done, on other numbers of ranks, with new faults. One
that is over before its moment has come is run again, so that each is struck at least once. Then
every array must be that of the run that nothing disturbed.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launching import (
    MPIRUN,
    PATIENCE,
    assert_same_results,
    descendants,
    environment,
    kill_tree,
    write_experiment,
)

ATTACKS = ["random", "llg", "llg_star", "llg_plus"]
EXPERIMENTS = {
    "probe": {
        "federation": {"rounds": 50, "clients": 3, "batch_size": 8, "fresh_model": True},
        "sweep": {"federation.batch_size": [4, 16]},
    },
    "fedsgd": {
        "federation": {
            "rounds": 60,
            "clients": 4,
            "batch_size": 8,
            "fresh_model": False,
            "evaluate_every": 15,
            "server": {"optimizer": "adam", "learning_rate": 0.01},
        },
    },
    "fedavg": {
        "federation": {
            "rounds": 60,
            "clients": 4,
            "population": 9,
            "dropout": 0.2,
            "batch_size": 8,
            "algorithm": "fedavg",
            "local_steps": 2,
            "fresh_model": False,
            "server": {"optimizer": "momentum"},
        },
        "defenses": [{"name": "top_k", "theta": 0.9, "error_feedback": True}],
    },
    "secure": {
        "federation": {"rounds": 50, "clients": 3, "batch_size": 8, "fresh_model": False},
        "defenses": [{"name": "secure_aggregation", "protocol": "reduction"}],
    },
    "pretrained": {
        "federation": {"rounds": 20, "clients": 2, "batch_size": 8, "fresh_model": True},
        "pretraining": {"batch_size": 8},
        "sweep": {"pretraining.steps": [0, 20, 60]},
    },
}
# What the issue asks for; the others are there by --all.
ASKED = ("probe", "fedsgd", "fedavg")
# By name, whether it takes fault tolerance.
FAULTS = ("client", "clients", "root", "job", "signal")
STOPPED = 75
# What Open MPI's mpirun says, now and then, in place of starting anything: the folder of one that
# was killed, and had the same process number, may be in the way.
_NOT_STARTED = "listener thread failed to start"
_MOST_MISSED = 8


def write(folder: Path, name: str, **results: object) -> Path:
    """Write one of the experiments into a folder."""
    settings = {"commit_seconds": 0.05, "checkpoint_seconds": 0.2, **results}
    changes = {"attacks": ATTACKS, "results": settings, **EXPERIMENTS[name]}
    return write_experiment(folder / f"{name}.yaml", **changes)


def ranks_of(launcher: int) -> dict[int, int]:
    """Return the processes that an mpirun has started, by rank."""
    found = {}
    for process in descendants(launcher)[1:]:
        with contextlib.suppress(OSError):
            words = (Path("/proc") / str(process) / "environ").read_bytes().split(b"\0")
            for name in (b"OMPI_COMM_WORLD_RANK=", b"PMI_RANK="):
                for word in words:
                    if word.startswith(name):
                        found[int(word.removeprefix(name))] = process
    return found


@dataclass
class Disturbed:
    """A run that was disturbed until it was done.

    Attributes
    ----------
    faults
        What was done to it, in order.
    starts
        How often it was started.
    missed
        How often it was over before it was struck, and began again.
    """

    faults: list[str] = field(default_factory=list)
    starts: int = 0
    missed: int = 0


def start(*arguments: object, ranks: int, log: Path, tolerant: bool) -> subprocess.Popen:
    """Start the testbed under mpirun."""
    launcher = [MPIRUN, *(["--with-ft", "ulfm"] if tolerant else []), "-n", str(ranks)]
    line = [*launcher, sys.executable, "-m", "testbed", *map(str, arguments), "--progress", "none"]
    if tolerant:
        line += ["--on-rank-loss", "continue"]
    with log.open("ab") as out:
        return subprocess.Popen(
            line,
            # Says where every rank is, if it has to be aborted.
            env={**environment(), "PYTHONFAULTHANDLER": "1"},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def strike(process: subprocess.Popen, fault: str, rng: random.Random) -> str:
    """Do something to a run; return what, or nothing where it is not there yet or any more."""
    ranks = ranks_of(process.pid)
    clients = sorted(rank for rank in ranks if rank)
    if 0 not in ranks or not clients:
        return ""
    victims: list[int] = []
    if fault in ("client", "clients"):
        count = 1 if fault == "client" else rng.randint(1, len(clients))
        victims = rng.sample(clients, count)
    elif fault == "root":
        victims = [0]
    if fault == "job":
        kill_tree(process.pid)
        # One that still writes would hold the file against what goes on with it.
        end = time.monotonic() + PATIENCE
        while any(Path(f"/proc/{rank}/exe").exists() for rank in ranks.values()):
            assert time.monotonic() < end
            time.sleep(0.01)
    elif fault == "signal":
        process.send_signal(signal.SIGUSR2)
    for victim in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[victim], signal.SIGKILL)
    return f"{fault} {victims}" if victims else fault


def disturb(
    experiment: Path,
    output: Path,
    rng: random.Random,
    *,
    span: float,
    faults: tuple[str, ...] = FAULTS,
    strikes: int = 2,
    begun: Callable[[Path], bool] = Path.exists,
) -> Disturbed:
    """Run an experiment, strike it at random moments, and resume it until it is done.

    It is struck at least once, or that is an error: where it is over before, it begins again, to be
    struck earlier.

    Parameters
    ----------
    experiment, output
        The experiment and results files.
    rng
        Draws the moments, the faults, and the numbers of ranks.
    span
        Seconds of rounds, within which the moments are.
    faults
        Which of `FAULTS` there are to draw from.
    strikes
        At most so many starts are struck.
    begun
        Says of the unfinished file whether the moment may come.
    """
    done = Disturbed()
    log = output.with_suffix(".log")
    partial = output.with_name(output.name + ".partial")
    while not output.exists() or not done.faults:
        if output.exists():
            assert done.missed < _MOST_MISSED, f"it is always over too early: {log.read_text()}"
            output.unlink()
            done.starts, done.missed, span = 0, done.missed + 1, span / 2
        done.starts += 1
        assert done.starts < 20, f"it does not come to an end: {log.read_text()}"
        fault = rng.choice(faults) if done.starts <= strikes else ""
        tolerant = fault in ("client", "clients")
        ranks = rng.randint(3 if tolerant else 2, 4)
        words = ["resume", output] if partial.exists() else ["run", experiment, "-o", output]
        process = start(*words, ranks=ranks, log=log, tolerant=tolerant)
        try:
            if fault:
                before = partial.stat().st_ino if partial.exists() else None
                end = time.monotonic() + PATIENCE
                while process.poll() is None and time.monotonic() < end:
                    if partial.exists() and partial.stat().st_ino != before and begun(partial):
                        break
                    time.sleep(0.01)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=rng.uniform(0, span))
                struck = strike(process, fault, rng) if process.poll() is None else ""
                if struck:
                    done.faults.append(struck)
            status = process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            for rank in ranks_of(process.pid).values():
                os.kill(rank, signal.SIGABRT)
            time.sleep(2)
            raise AssertionError(f"{fault}: no end: {log.read_text()}") from None
        finally:
            kill_tree(process.pid)
        text = log.read_text()
        if status != 0 and _NOT_STARTED in text:
            log.unlink()
            done.starts -= 1
            continue
        assert status != 2, text
        if fault == "signal" and not output.exists():
            assert status == STOPPED or "Traceback" not in text, text
        if tolerant:
            assert output.exists(), f"status {status} after {done.faults}: {text}"
    return done


def undisturbed(folder: Path, name: str, attempts: int = 3) -> float:
    """Run an experiment as it should be; return how many seconds its rounds take."""
    output = folder / f"{name}.h5"
    partial = folder / f"{name}.h5.partial"
    experiment = write(folder, name)
    process = start(
        "run", experiment, "-o", output, ranks=3, log=folder / f"{name}.log", tolerant=False
    )
    began = ended = time.monotonic()
    while process.poll() is None:
        if not output.exists():
            ended = time.monotonic()
            if not partial.exists():
                began = ended
        time.sleep(0.01)
    said = (folder / f"{name}.log").read_text()
    if process.returncode != 0 and _NOT_STARTED in said and attempts > 1:
        (folder / f"{name}.log").unlink()
        return undisturbed(folder, name, attempts - 1)
    assert process.returncode == 0, said
    return ended - began


def main() -> int:
    """Run the long form."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--all", action="store_true", help="secure sums and pretraining too")
    parser.add_argument("--experiments", help="comma-separated names")
    parser.add_argument("--faults", help="comma-separated names")
    options = parser.parse_args()
    names = tuple(EXPERIMENTS) if options.all else ASKED
    names = tuple(options.experiments.split(",")) if options.experiments else names
    faults = tuple(options.faults.split(",")) if options.faults else FAULTS
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(exist_ok=True, parents=True)
    equal, struck = 0, Counter()
    spans = {name: undisturbed(folder, name) for name in names}
    for number in range(options.runs):
        rng = random.Random(f"{options.seed} {number}")
        name = names[number % len(names)]
        output = folder / f"{name}_{options.seed}_{number}.h5"
        result, detail = "equal", ""
        try:
            run = disturb(folder / f"{name}.yaml", output, rng, span=spans[name], faults=faults)
            detail = f"{run.starts} starts, struck by: {', '.join(run.faults)}"
            struck.update(fault.split()[0] for fault in run.faults)
            struck["starts"] += run.starts
            assert_same_results(folder / f"{name}.h5", output)
            equal += 1
            for path in folder.glob(output.stem + "*"):
                path.unlink()
        except AssertionError as error:
            result, detail = "DIFFERENT", f"{detail} {error}"
        print(f"{number}: {name}: {result}: {detail}", flush=True)
    starts = struck.pop("starts", 0)
    counts = ", ".join(f"{count} {fault}" for fault, count in sorted(struck.items()))
    print(f"{equal} of {options.runs} runs are equal to the undisturbed one")
    print(f"{starts} starts; struck: {counts}")
    return 0 if equal == options.runs else 1


if __name__ == "__main__":
    sys.exit(main())
