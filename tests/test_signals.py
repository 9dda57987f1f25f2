"""Signals: a run that is asked to stop finishes its round, saves, and can go on."""

import fcntl
import os
import shutil
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
from chaos import ranks_of
from launching import (
    MPIRUN,
    PATIENCE,
    assert_same_results,
    command,
    environment,
    is_open_mpi,
    kill_tree,
    marking,
    run_here,
    run_testbed,
    wait_for_rounds,
    wait_until,
    write_experiment,
)

from testbed.results.reader import open_results
from testbed.signals import EXIT_STOPPED

LAUNCHER = Path(__file__).parent.parent / "launch/mpirun"
TRAINING = {
    "clients": 3,
    "population": 5,
    "batch_size": 8,
    "algorithm": "fedavg",
    "local_steps": 2,
}


def written(path, rounds, **results):
    return write_experiment(
        path,
        attacks=[marking(path.parent)],
        federation={**TRAINING, "rounds": rounds},
        defenses=[{"name": "top_k", "theta": 0.9, "error_feedback": True}],
        results={"commit_seconds": 3600, **results},
    )


def started(line, tmp_path, **settings):
    """Start a program, and wait until its rounds have begun."""
    with (tmp_path / "log").open("ab") as log:
        process = subprocess.Popen(
            line,
            cwd=tmp_path,
            env={**environment(), "MPIRUN": MPIRUN, **settings},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    wait_for_rounds(process, tmp_path)
    return process


def committed(path):
    """Return how many rounds of the only scenario can be read."""
    with open_results(path) as results:
        return results.scenarios[0].committed


def stopped(process, tmp_path):
    """Wait for the end of a run that was asked to stop; return how many rounds it left."""
    try:
        status = process.wait(timeout=PATIENCE)
    finally:
        kill_tree(process.pid)
    said = (tmp_path / "log").read_text()
    assert status == EXIT_STOPPED, said
    assert "Traceback" not in said
    assert f"--resume, or: python -m testbed resume {tmp_path / 'r.h5'}\n" in said
    with open_results(tmp_path / "r.h5") as results:
        (scenario,) = results.scenarios
        assert 0 < scenario.committed < scenario.rounds
        assert f" in scenario 0, round {scenario.committed}; " in said
        assert f"{scenario.committed} of {scenario.rounds} rounds are committed; go on" in said
        return scenario.committed


def lives(process):
    """Return whether a process runs, or is stopped; one that nobody has waited for does not."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(") ")[2][0] not in "ZX"


def started_launcher(tmp_path, script, *through):
    """Start the launcher with a program in mpirun's place, and wait until that says "ready".

    ``through`` is what starts it, if not this process.
    """
    program = tmp_path / "mpirun"
    program.write_text(f"#!/usr/bin/env python3\nimport os, signal, time\n{script}")
    program.chmod(0o755)
    process = subprocess.Popen(
        [*through, str(LAUNCHER), "-n", "1", "true"],
        env={**environment(), "MPIRUN": str(program)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


# What the launcher does by itself.

# Ends as a run that was asked to stop.
STOPPABLE = (
    "signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))\n"
    "print('ready', flush=True)\n"
    "while True: time.sleep(1)\n"
)


def test_the_launcher_tells_the_status_of_a_job_that_ends_as_a_signal_comes(tmp_path):
    # The job ends by the signal that the launcher hands on, while more of them come.
    for _ in range(5):
        process = started_launcher(tmp_path, STOPPABLE)
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGHUP)
            time.sleep(0.002)
        assert process.wait(timeout=PATIENCE) == EXIT_STOPPED, process.communicate()
        process.communicate()


def test_the_end_of_a_terminal_is_handed_on_though_nobody_reads_what_is_said(tmp_path):
    with started_launcher(tmp_path, STOPPABLE) as process:
        process.stderr.close()
        process.send_signal(signal.SIGHUP)
        try:
            assert process.wait(timeout=PATIENCE) == EXIT_STOPPED
        finally:
            kill_tree(process.pid)


def test_under_nohup_the_launcher_outlives_its_terminal(tmp_path):
    with started_launcher(tmp_path, STOPPABLE, "nohup") as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)  # it looks for signals five times a second
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == EXIT_STOPPED
        assert "SIGHUP" not in said
        assert "finishing the round (SIGTERM" in said


def test_a_second_sigint_ends_what_has_left_the_group_and_does_not_listen(tmp_path):
    script = (
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.setsid()\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "os.waitpid(child, os.WUNTRACED)\n"
        "open('CHILD', 'w').write(str(child))\n"
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    ).replace("CHILD", str(tmp_path / "child"))
    process = started_launcher(tmp_path, script)
    child = int((tmp_path / "child").read_text())
    assert lives(child)
    process.send_signal(signal.SIGINT)
    assert "finishing the round (SIGINT" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=PATIENCE) == 130
    assert "ended at once" in process.communicate()[1]
    wait_until(lambda: not lives(child))


def test_more_sigints_than_two_do_not_save_what_hangs(tmp_path):
    script = (
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGUSR1)]\n"
        "    open('CHILD', 'w').write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
        "while not (os.path.exists('CHILD') and open('CHILD').read()): time.sleep(0.01)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    ).replace("CHILD", str(tmp_path / "child"))
    for pause in (0.033, 0.04, 0.045, 0.05, 0.06) * 3:
        (tmp_path / "child").unlink(missing_ok=True)
        with started_launcher(tmp_path, script) as process:
            child = int((tmp_path / "child").read_text())
            try:
                while process.poll() is None:  # as from a key that is held
                    os.killpg(process.pid, signal.SIGINT)
                    time.sleep(pause)
                wait_until(lambda child=child: not lives(child))
            finally:
                kill_tree(process.pid)
                if lives(child):
                    os.kill(child, signal.SIGKILL)


def test_a_second_sigint_is_heard_as_soon_as_the_first_was_answered(tmp_path):
    script = (
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    for _ in range(10):
        with started_launcher(tmp_path, script) as process:
            process.send_signal(signal.SIGINT)
            process.stderr.readline()
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(timeout=PATIENCE) == 130
            finally:
                kill_tree(process.pid)


# Open MPI's mpirun forwards both, MPICH's ends all at the second.
@pytest.mark.mpi
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"] if is_open_mpi() else ["SIGUSR1"])
def test_a_signal_to_mpirun_stops_the_run_after_its_round(tmp_path, name):
    experiment = written(tmp_path / "e.yaml", rounds=100_000)
    line = command("run", experiment, "-o", tmp_path / "r.h5", "--progress", "none", ranks=2)
    process = started(line, tmp_path)
    process.send_signal(signal.Signals[name])
    stopped(process, tmp_path)


@pytest.mark.mpi
def test_what_was_stopped_goes_on_and_is_the_same_in_the_end(tmp_path):
    shutil.copy(Path(__file__).with_name("slow_model.py"), tmp_path)
    experiment = written(tmp_path / "e.yaml", rounds=100, checkpoint_seconds=3600)
    override = "model={name: 'slow_model:Slow', init: torch}"
    line = ("run", experiment, override, "--progress", "none")
    words = command(*line, "-o", tmp_path / "r.h5", ranks=3)
    # So slow that it is not over before the signal comes.
    process = started(words, tmp_path, SECONDS_PER_STEP="0.1")
    process.send_signal(signal.SIGUSR1)
    stopped(process, tmp_path)
    assert (tmp_path / "r.h5.checkpoint").exists()
    done = run_testbed("resume", tmp_path / "r.h5", ranks=2, cwd=tmp_path)
    assert done.status == 0, done.err
    assert run_here(*line, "-o", tmp_path / "whole.h5", cwd=tmp_path).status == 0
    assert_same_results(tmp_path / "r.h5", tmp_path / "whole.h5")
    assert not (tmp_path / "r.h5.checkpoint").exists()


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_the_launcher_translates_what_mpirun_does_not_forward(tmp_path, name):
    experiment = written(tmp_path / "e.yaml", rounds=100_000)
    words = command("run", experiment, "-o", tmp_path / "r.h5", "--progress", "none")
    process = started([str(LAUNCHER), "-n", "2", *words], tmp_path)
    process.send_signal(signal.Signals[name])
    stopped(process, tmp_path)
    said = (tmp_path / "log").read_text()
    assert f"finishing the round ({name}, handed on as SIGUSR1); Ctrl-C again" in said
    assert "go on, under mpirun or srun as before, with the same command and --resume" in said


@pytest.mark.mpi
def test_a_second_sigint_to_the_launcher_ends_everything_at_once(tmp_path):
    experiment = written(tmp_path / "e.yaml", rounds=100_000)
    words = command("run", experiment, "results.commit_seconds=0", "-o", tmp_path / "r.h5")
    process = started([str(LAUNCHER), "-n", "2", *words, "--progress", "none"], tmp_path)
    ranks = ranks_of(process.pid)
    assert sorted(ranks) == [0, 1]
    wait_until(lambda: committed(tmp_path / "r.h5"), process=process, log=tmp_path / "log")
    os.kill(ranks[0], signal.SIGSTOP)  # so that it cannot stop by itself
    process.send_signal(signal.SIGINT)
    # Two that come before it was looked for one are one.
    log = tmp_path / "log"
    wait_until(lambda: "finishing the round (SIGINT" in log.read_text(), process=process, log=log)
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(timeout=PATIENCE) == 130
        wait_until(lambda: not any(map(lives, ranks.values())))
    finally:
        kill_tree(process.pid)
        for rank in filter(lives, ranks.values()):
            os.kill(rank, signal.SIGKILL)
    assert "ended at once; what is committed is readable" in (tmp_path / "log").read_text()
    assert committed(tmp_path / "r.h5") > 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_single_process_stops_after_its_round(tmp_path, name):
    experiment = written(tmp_path / "e.yaml", rounds=100_000)
    line = command("run", experiment, "-o", tmp_path / "r.h5", "--progress", "none")
    process = started(line, tmp_path)
    process.send_signal(signal.Signals[name])
    rounds = stopped(process, tmp_path)
    assert f"stopped by {name} in scenario 0, round {rounds};" in (tmp_path / "log").read_text()


def test_a_run_whose_terminal_is_closed_saves_itself(tmp_path):
    experiment = written(tmp_path / "e.yaml", rounds=100_000)
    terminal, line = os.openpty()
    process = subprocess.Popen(
        command("run", experiment, "-o", tmp_path / "r.h5", "--progress", "log"),
        cwd=tmp_path,
        stdin=line,
        stdout=line,
        stderr=line,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(line)
    try:
        wait_for_rounds(process, tmp_path, log=None)
        os.close(terminal)
        assert process.wait(timeout=PATIENCE) == EXIT_STOPPED
    finally:
        kill_tree(process.pid)
    assert committed(tmp_path / "r.h5") > 0
    assert (tmp_path / "r.h5.checkpoint").exists()


def test_a_run_that_nobody_reads_any_more_goes_on(tmp_path):
    experiment = written(tmp_path / "e.yaml", rounds=20)
    line = command("run", experiment, "-o", tmp_path / "r.h5", "--progress", "log")
    with subprocess.Popen(
        line, cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stderr.readline()
        process.stderr.close()
        assert process.wait(timeout=PATIENCE) == 0
    assert committed(tmp_path / "r.h5") == 20


def test_a_second_sigint_stops_a_round_that_does_not_end(tmp_path):
    (tmp_path / "stuck_model.py").write_text(
        "import time, torch\n"
        "class Stuck(torch.nn.Sequential):\n"
        "    calls = 0\n"
        "    def __init__(self):\n"
        "        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
        "    def forward(self, images):\n"
        "        Stuck.calls += self.training\n"
        "        while Stuck.calls > 8:\n"
        "            open('stuck', 'w').close()\n"
        "            time.sleep(0.05)\n"
        "        return super().forward(images)\n"
    )
    experiment = write_experiment(
        tmp_path / "e.yaml", model={"name": "stuck_model:Stuck", "init": "torch"}
    )
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command("run", experiment, "-o", "r.h5", "results.commit_seconds=3600"),
            cwd=tmp_path,
            env=environment(),
            stderr=log,
        )
    wait_until((tmp_path / "stuck").exists, process=process, log=tmp_path / "log")
    try:
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None  # it would finish its round
        # And again: two that come before it was looked for one are one.
        wait_until(
            lambda: process.poll() is not None or process.send_signal(signal.SIGINT), pause=5
        )
        assert process.wait() == 130
    finally:
        kill_tree(process.pid)
    said = (tmp_path / "log").read_text()
    assert "interrupted" in said
    assert "Traceback" not in said
    with open_results(tmp_path / "r.h5") as results:
        assert results.scenarios[0].committed == 2


@pytest.mark.mpi
def test_other_ranks_leave_signals_to_the_root(tmp_path):
    experiment = written(tmp_path / "e.yaml", rounds=100_000)
    line = command("run", experiment, "-o", tmp_path / "r.h5", "--progress", "none", ranks=3)
    process = started(line, tmp_path)
    try:
        ranks = ranks_of(process.pid)
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            os.kill(ranks[1], number)
        time.sleep(1)
        assert process.poll() is None
        os.kill(ranks[0], signal.SIGTERM)  # as Slurm does
        stopped(process, tmp_path)
    finally:
        kill_tree(process.pid)
