"""SIGKILL of a whole job, at any moment: every committed round can be read."""

import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from launching import command, environment, finish, kill_tree, write_experiment

MOMENTS = 12


def start(tmp_path, name, ranks=3):
    experiment = write_experiment(
        tmp_path / "experiment.yaml",
        federation={"rounds": 100_000, "clients": 2, "batch_size": 4},
        results={"observations": "last_layer", "commit_seconds": 0},
    )
    return subprocess.Popen(
        command("run", experiment, "-o", tmp_path / name, "--progress", "none", ranks=ranks),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def wait_for(condition, seconds, process):
    """Wait for a condition while a process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


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
def test_every_committed_round_is_readable_after_a_kill(moment, tmp_path):
    process = start(tmp_path, "r.h5")
    partial = tmp_path / "r.h5.partial"
    try:
        wait_for(partial.exists, 60, process)
        # A kill while the file is being declared leaves none, and nothing was committed then.
        delay = 0.3 + random.Random(moment).uniform(0, 2)
        time.sleep(delay)
    finally:
        kill_tree(process.pid)
        process.wait()
    rounds = check_rounds(tmp_path / "r.h5")
    assert rounds > 0
    shown = finish([sys.executable, "-m", "analysis", "show", str(tmp_path / "r.h5")])
    assert shown.status == 0, shown.err
    assert str(rounds) in shown.out


def test_a_growing_file_is_read_round_by_round(tmp_path):
    process = start(tmp_path, "r.h5")
    try:
        wait_for((tmp_path / "r.h5.partial").exists, 60, process)
        time.sleep(1.0)
        seen = [check_rounds(tmp_path / "r.h5") for _ in range(15)]
        table = finish([sys.executable, "-m", "analysis", "table", str(tmp_path / "r.h5")])
        assert process.poll() is None
    finally:
        kill_tree(process.pid)
        process.wait()
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]
    assert table.status == 0, table.err
    assert json.dumps("llg")[1:-1] in table.out.lower()
