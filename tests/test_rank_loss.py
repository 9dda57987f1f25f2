"""Ranks that die or hang: with ULFM the others take over, and the results are the same bits."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import chaos
import pytest
from launching import (
    PATIENCE,
    assert_same_results,
    command,
    environment,
    finish,
    has_ulfm,
    kill_tree,
    run_testbed,
    under_mpirun,
    wait_until,
    write_experiment,
)

from testbed.results.reader import open_results

HOST = socket.gethostname()


@pytest.fixture
def failing(tmp_path):
    """Return a function that writes an experiment whose model fails on one rank."""
    shutil.copy(Path(__file__).with_name("failing_model.py"), tmp_path)

    def write(fault, *, rank=2, after=6, name="e.yaml", **changes):
        arguments = {"fault": fault, "rank": rank, "after": after}
        content = {
            "model": {"name": "failing_model:Failing", "init": "torch", "arguments": arguments},
            "federation": {"rounds": 12, "clients": 4, "batch_size": 8},
            "results": {"commit_seconds": 0, "checkpoint_seconds": 0},
            **changes,
        }
        return write_experiment(tmp_path / name, **content)

    return write


def tolerant(experiment, output, ranks, *options, cwd):
    """Run an experiment under an mpirun that survives the loss of ranks."""
    line = [sys.executable, "-m", "testbed", "run", str(experiment), "-o", str(output), *options]
    words = under_mpirun([*line, "--on-rank-loss", "continue"], ranks, "--with-ft", "ulfm")
    return finish(words, cwd=cwd)


STATES = {
    "federation": {
        "rounds": 12,
        "clients": 4,
        "population": 7,
        "batch_size": 8,
        "server": {"optimizer": "momentum"},
    },
    "defenses": [{"name": "top_k", "theta": 0.9, "error_feedback": True}],
}
SUMS = {"defenses": [{"name": "secure_aggregation", "protocol": "reduction"}]}
PROBE = {"federation": {"rounds": 12, "clients": 3, "batch_size": 8, "fresh_model": True}}


@pytest.mark.mpi
@pytest.mark.ulfm
@pytest.mark.parametrize(
    ("changes", "ranks"),
    [({}, 4), (STATES, 4), (SUMS, 4), (PROBE, 3), (STATES, 2)],
    ids=["training", "client states", "sums", "probe", "the only client rank"],
)
def test_survivors_take_over_a_rank_that_dies_while_it_computes(failing, tmp_path, changes, ranks):
    victim = ranks // 2
    experiment = failing("kill", rank=victim, **changes)
    done = tolerant(experiment, "r.h5", ranks, cwd=tmp_path)
    assert done.status == 0, done.err
    left = ranks - 1
    assert f"rank {victim} on {HOST} has died" in done.err
    assert f"going on with {left} rank{'s' * (left > 1)}" in done.err
    whole = failing("none", name="whole.yaml", **changes)
    assert run_testbed("run", whole, "-o", "whole.h5", cwd=tmp_path).status == 0
    with open_results(tmp_path / "r.h5") as results:
        (loss,) = results.losses
        assert (loss.rank, loss.host, loss.reason) == (victim, HOST, "killed")
        assert 0 <= loss.round < 12
        assert 0 < loss.seconds < PATIENCE
    assert_same_results(tmp_path / "r.h5", tmp_path / "whole.h5")


@pytest.mark.mpi
@pytest.mark.ulfm
def test_a_rank_that_hangs_is_named_after_the_deadline_and_then_taken_for_lost(failing, tmp_path):
    experiment = failing("stop", **STATES)
    done = tolerant(experiment, "r.h5", 3, "--deadline", "8", cwd=tmp_path)
    assert done.status == 0, done.err
    assert f"rank 2 on {HOST} does not answer" in done.err
    whole = failing("none", name="whole.yaml", **STATES)
    assert run_testbed("run", whole, "-o", "whole.h5", cwd=tmp_path).status == 0
    assert_same_results(tmp_path / "r.h5", tmp_path / "whole.h5")
    with open_results(tmp_path / "r.h5") as results:
        assert [(loss.rank, loss.reason) for loss in results.losses] == [(2, "stuck")]


@pytest.mark.mpi
def test_a_rank_that_hangs_ends_the_run_where_nothing_else_is_asked(failing, tmp_path):
    line = command("run", failing("stop"), "-o", "r.h5", "--deadline", "5", ranks=3)
    done = finish(line, cwd=tmp_path)
    assert done.status not in (0, 2)
    assert f"rank 2 on {HOST} gave no answer within 5 s; what is committed is readable" in done.err
    assert "Traceback" not in done.err
    with open_results(tmp_path / "r.h5") as results:
        assert 0 < results.scenarios[0].committed < 12
    # It goes on, without the fault: by a rank number that there is not.
    resumed = run_testbed("resume", "r.h5", cwd=tmp_path)
    assert resumed.status == 0, resumed.err


@pytest.mark.mpi
@pytest.mark.ulfm
def test_ranks_that_only_wait_are_not_taken_for_stuck(failing, tmp_path):
    """Of four ranks only two have clients, and the root is slower than the deadline."""
    (tmp_path / "slow_attack.py").write_text(
        "import time\n"
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from testbed.attacks.llg import LLG\n"
        "@dataclass(frozen=True)\n"
        "class Slow(LLG):\n"
        "    name: ClassVar = 'slow'\n"
        "    def infer(self, observations, calibration):\n"
        "        time.sleep(7)\n"
        "        return super().infer(observations, calibration)\n"
    )
    experiment = failing(
        "none",
        attacks=["llg", {"name": "slow_attack:Slow"}],
        federation={"rounds": 2, "clients": 2, "batch_size": 8},
    )
    done = tolerant(experiment, "r.h5", 4, "--deadline", "6", cwd=tmp_path)
    assert done.status == 0, done.err
    with open_results(tmp_path / "r.h5") as results:
        assert results.complete
        assert results.losses == []


@pytest.mark.mpi
@pytest.mark.ulfm
def test_a_lost_rank_ends_the_run_by_default_with_its_name(failing, tmp_path):
    line = [sys.executable, "-m", "testbed", "run", str(failing("kill")), "-o", "r.h5"]
    done = finish(under_mpirun(line, 3, "--with-ft", "ulfm"), cwd=tmp_path)
    assert done.status not in (0, 2)
    assert f"rank 2 on {HOST} died; what is committed is readable" in done.err
    assert "Traceback" not in done.err


@pytest.mark.mpi
@pytest.mark.ulfm
def test_a_run_that_ends_has_a_status_even_if_one_rank_is_left(failing, tmp_path):
    """Of the last rank that aborts, mpirun --with-ft ulfm says 0."""
    line = [sys.executable, "-m", "testbed", "run", str(failing("kill", rank=1)), "-o", "r.h5"]
    done = finish(under_mpirun(line, 2, "--with-ft", "ulfm"), cwd=tmp_path)
    assert done.status == 1, done.err
    assert f"rank 1 on {HOST} died; what is committed is readable" in done.err
    assert (tmp_path / "r.h5.partial").exists()


@pytest.mark.mpi
@pytest.mark.ulfm
def test_a_rank_that_dies_before_all_have_started_does_not_keep_the_others_for_ever(
    failing, tmp_path
):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "if os.environ.get('OMPI_COMM_WORLD_RANK') == '1':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    line = [sys.executable, "-m", "testbed", "run", str(failing("none")), "-o", "r.h5"]
    words = under_mpirun([*line, "--on-rank-loss", "continue"], 3, "--with-ft", "ulfm")
    env = {**environment(), "PYTHONPATH": str(tmp_path), "TESTBED_START_SECONDS": "10"}
    done = finish(words, cwd=tmp_path, env=env)
    assert done.status != 0
    assert "in wait_for_all_ranks_to_start" in done.err
    assert list(tmp_path.glob("r.h5*")) == []


@pytest.mark.mpi
def test_without_fault_tolerance_the_option_is_refused_with_the_reason(failing, tmp_path):
    experiment = failing("none")
    line = ("run", experiment, "-o", "r.h5", "--on-rank-loss", "continue")
    done = run_testbed(*line, ranks=2, cwd=tmp_path)
    assert done.status == 2
    errors = [text for text in done.err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert "mpirun --with-ft ulfm" in errors[0]
    reason = "without fault tolerance" if has_ulfm() else "ends all ranks when one dies"
    assert reason in errors[0]
    alone = run_testbed(*line, cwd=tmp_path)
    assert alone.status == 2
    assert "a single process has no other rank to lose" in alone.err
    assert not list(tmp_path.glob("r.h5*"))


@pytest.mark.mpi
@pytest.mark.ulfm
@pytest.mark.parametrize("victims", [(1,), (1, 2, 3)])
def test_ranks_may_die_before_the_first_round(failing, tmp_path, victims):
    """As they begin to load the data and to build the models."""
    experiment = failing("none", **STATES)
    line = [sys.executable, "-m", "testbed", "run", str(experiment), "-o", "r.h5"]
    words = under_mpirun([*line, "--on-rank-loss", "continue"], 4, "--with-ft", "ulfm")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys, threading, time\n"
        "rank = os.environ.get('OMPI_COMM_WORLD_RANK', '-1')\n"
        "def watch():\n"
        "    while 'testbed.startup' not in sys.modules:\n"
        "        time.sleep(0.002)\n"
        "    open(f'ready{rank}', 'w').close()\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"  # and no further, until it is killed
        f"if int(rank) in {victims}:\n"
        "    threading.Thread(target=watch, daemon=True).start()\n"
    )
    env = {**environment(), "PYTHONPATH": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            words, cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        ready = [tmp_path / f"ready{victim}" for victim in victims]
        wait_until(lambda: all(path.exists() for path in ready), process=process, pause=0.005)
        ranks = chaos.ranks_of(process.pid)
        for victim in victims:
            os.kill(ranks[victim], signal.SIGKILL)
        status = process.wait(timeout=PATIENCE)
    finally:
        kill_tree(process.pid)
    said = (tmp_path / "log").read_text()
    assert status == 0, said
    with open_results(tmp_path / "r.h5") as results:
        assert results.complete
        assert sorted(loss.rank for loss in results.losses) == list(victims)


@pytest.mark.mpi
@pytest.mark.ulfm
def test_a_rank_may_die_when_all_is_done(failing, tmp_path):
    """As its interpreter ends, where MPI_Finalize of the others would wait for it for ever."""
    finished = tolerant(failing("end"), "r.h5", 3, cwd=tmp_path)
    assert finished.status == 0, finished.err
    with open_results(tmp_path / "r.h5") as results:
        assert results.complete
