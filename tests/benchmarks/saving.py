"""What it costs to lose nothing: commits, checkpoints, and the loss of a rank. Not a test: run it.

    python tests/benchmarks/saving.py --data MNIST_FOLDER [--quick]

First table: FedAvg on MNIST with error feedback, 8 clients, batches of 8, under mpirun with a root
and two workers; the paper's CNN (13,426 parameters), then an MLP of 11.1 million. ``saving`` is the
root's time in commits and checkpoints, as a part of its time in the rounds, all phases together
(``timings`` of the results file): it is hidden only in part behind the clients' work.

Second: FedSGD on the digits under ``mpirun --with-ft ulfm``, where one of three workers is killed
at a random moment: seconds until the next round was committed, and until the root went on.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import h5py

sys.path.insert(0, str(Path(__file__).parent.parent))

import chaos
from launching import has_ulfm, kill_tree, run_testbed, write_experiment

from testbed.results.schema import PHASES

# Commit and checkpoint every so many seconds; 0: every round.
SETTINGS = {"default": (1.0, 60.0), "every 5 s": (1.0, 5.0), "every round": (0.0, 0.0)}


def saving(folder: Path, data: Path, model: dict, rounds: int) -> None:
    """Print the table of costs of a model."""
    for name, (commit, checkpoint) in SETTINGS.items():
        experiment = write_experiment(
            folder / "saving.yaml",
            data={"name": "mnist", "root": str(data)},
            model=model,
            federation={
                "rounds": rounds,
                "clients": 8,
                "batch_size": 8,
                "algorithm": "fedavg",
                "local_steps": 2,
            },
            attacks=["llg"],
            defenses=[{"name": "top_k", "theta": 0.9, "error_feedback": True}],
            results={"commit_seconds": commit, "checkpoint_seconds": checkpoint},
        )
        output = folder / "saving.h5"
        line = ("run", experiment, "-o", output, "--overwrite")
        done = run_testbed(*line, ranks=3, patience=3600, cwd=Path(__file__).parent)
        assert done.status == 0, done.err
        with h5py.File(output) as file:
            spent = {phase: file[f"scenarios/0000/timings/{phase}"][2:].sum() for phase in PHASES}
        total = sum(spent.values())
        each = 1000 * total / (rounds - 2)
        print(
            f"  {name:12} {each:9.1f} ms/round  saving {100 * spent['write'] / total:5.1f} %  "
            f"wait {100 * spent['wait'] / total:5.1f} %",
            flush=True,
        )


def losses(folder: Path, times: int) -> None:
    """Print how long the loss of a rank holds a run up."""
    rng = random.Random(0)
    until_committed, until_noticed = [], []
    experiment = chaos.write(folder, "fedsgd", commit_seconds=0)
    for number in range(times):
        output = folder / f"loss{number}.h5"
        partial = folder / f"loss{number}.h5.partial"
        words = ("run", experiment, "federation.rounds=5000", "-o", output)
        process = chaos.start(*words, ranks=4, log=folder / "log", tolerant=True)
        try:
            while not partial.exists():
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.01)
            time.sleep(rng.uniform(0.5, 1.5))
            victim = chaos.ranks_of(process.pid)[rng.randint(1, 3)]
            with h5py.File(partial, "r", swmr=True) as file:
                os.kill(victim, signal.SIGKILL)
                began = time.monotonic()
                told = file["losses/loss"]
                while len(told) == 0:
                    time.sleep(0.002)
                    told.refresh()
                # The loss is written with the first round after it.
                until_committed.append(time.monotonic() - began)
                seconds = file["losses/seconds"]
                seconds.refresh()
                until_noticed.append(float(seconds[0]))
        finally:
            kill_tree(process.pid)
    for what, values in (
        ("death to the next committed round", until_committed),
        ("notice to the next round", until_noticed),
    ):
        middle, worst = statistics.median(values), max(values)
        print(f"  {what}: median {middle:.3f} s, worst of {len(values)} {worst:.3f} s", flush=True)


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the MNIST files")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="saving-"))
    try:
        for model, rounds in (("cnn", 100), ("mlp", 8)):
            print(f"saving, {model}", flush=True)
            described = {"name": "cnn"} if model == "cnn" else {"name": "models:MLP"}
            shorter = max(rounds // 4, 4)
            saving(folder, options.data, described, shorter if options.quick else rounds)
        if has_ulfm():
            print("loss of one rank of four", flush=True)
            losses(folder, 3 if options.quick else 20)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
