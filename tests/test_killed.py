"""SIGKILL of a whole job, at any moment: every committed round can be read."""

import csv
import random
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from launching import (
    command,
    environment,
    finish,
    is_open_mpi,
    kill_tree,
    wait_until,
    write_experiment,
)

from analysis.__main__ import main as analysis

pytestmark = pytest.mark.mpi

# All where the MPI is the one that is used most, a few under another.
MOMENTS = 8 if is_open_mpi() else 4


def start(tmp_path, name, ranks=2):
    experiment = write_experiment(
        tmp_path / "experiment.yaml",
        federation={"rounds": 100_000, "clients": 2, "batch_size": 4},
        results={"observations": "last_layer", "commit_seconds": 0},
    )
    with (tmp_path / "log").open("wb") as log:
        return subprocess.Popen(
            command("run", experiment, "-o", tmp_path / name, "--progress", "none", ranks=ranks),
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def committed(partial):
    """Return how many rounds a file that is being written says it has."""
    try:
        with h5py.File(partial, "r", swmr=True) as file:
            return int(file["committed_rounds"][0])
    except (OSError, KeyError):  # not yet there, or not yet declared
        return 0


def check_rounds(path):
    """Read every committed round, and check what must hold in each. Return their number."""
    from testbed.results.reader import open_results

    with open_results(path) as results:
        assert not results.complete
        (scenario,) = results.scenarios
        rounds = scenario.committed
        counts = scenario.array("truth/counts")
        assert counts.shape[0] == rounds
        assert (counts.sum(axis=2) == 4).all()
        for attack in scenario.attacks:
            assert (scenario.array(f"attacks/{attack}/counts").sum(axis=2) == 4).all()
        weights = scenario.array("observations/weight_gradient")
        assert np.isfinite(weights).all()
        sums = weights.sum(axis=3, dtype=np.float64).astype(np.float32)
        assert (sums == scenario.array("observations/row_sums")).all()
        assert (scenario.array("updates/finite") == 1).all()
        assert np.isfinite(scenario.array("timings/attack")).all()
        return rounds


# Fixed beforehand; the moments are spread over the first two seconds of rounds.
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_every_committed_round_is_readable_after_a_kill(moment, tmp_path, capsys):
    process = start(tmp_path, "r.h5")
    partial = tmp_path / "r.h5.partial"
    try:
        wait_until(lambda: committed(partial), process=process, log=tmp_path / "log")
        time.sleep(random.Random(moment).uniform(0, 2))
    finally:
        kill_tree(process.pid)
        process.wait()
    rounds = check_rounds(tmp_path / "r.h5")
    assert rounds > 0
    assert analysis(["show", str(tmp_path / "r.h5")]) == 0
    assert str(rounds) in capsys.readouterr().out


def test_a_growing_file_is_read_round_by_round(tmp_path):
    process = start(tmp_path, "r.h5")
    try:
        partial = tmp_path / "r.h5.partial"
        wait_until(lambda: committed(partial), process=process, log=tmp_path / "log")
        seen = [check_rounds(tmp_path / "r.h5")]
        while len(seen) < 15 or seen[-1] == seen[0]:
            seen.append(check_rounds(tmp_path / "r.h5"))
        line = [
            sys.executable,
            "-m",
            "analysis",
            "table",
            str(tmp_path / "r.h5"),
            "--format",
            "csv",
        ]
        table = finish(line)
        assert process.poll() is None
    finally:
        kill_tree(process.pid)
        process.wait()
    assert seen == sorted(seen)
    assert table.status == 0, table.err
    rows = {row["attack"]: row for row in csv.DictReader(table.out.splitlines())}
    assert rows.keys() == {"random", "llg", "llg_star", "llg_plus"}
    assert all(int(row["rounds"]) >= seen[-1] and float(row["mean"]) > 0 for row in rows.values())
