"""What can go wrong with the results file while the real program runs: an error, nothing lost."""

import contextlib
import ctypes
import fcntl
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from launching import (
    PATIENCE,
    assert_same_results,
    command,
    descendants,
    environment,
    finish,
    kill_tree,
    run_here,
    run_testbed,
    wait_until,
    write_experiment,
)

from testbed.results.reader import open_results
from testbed.results.writer import partial_path


def errors(text):
    """Return the lines of errors, after having made sure that there is no traceback."""
    assert "Traceback" not in text, text
    lines = [line.strip("\0 ") for line in text.splitlines()]  # mpirun leaves some before them
    found = [line for line in lines if line.startswith("error:")]
    assert found, text
    return found


def committed(path):
    """Read every committed round of the only scenario, and return their number."""
    with open_results(path) as results:
        (scenario,) = results.scenarios
        assert (scenario.array("truth/counts").sum(axis=2) == 8).all()
        for attack in scenario.attacks:
            assert (scenario.array(f"attacks/{attack}/counts").sum(axis=2) == 8).all()
        return scenario.committed


def start(tmp_path, output, mode, rounds):
    """Start a run whose rounds take a tenth of a second or more, on any machine."""
    experiment = write_experiment(
        tmp_path / "experiment.yaml",
        federation={"rounds": rounds, "clients": 2, "batch_size": 8},
        model={"name": "slow_model:Slow", "init": "torch"},
        results={"commit_seconds": 0, "mode": mode},
    )
    line = command("run", experiment, "--progress", "none", "-o", output, ranks=2)
    slowly = {"PYTHONPATH": str(Path(__file__).parent), "SECONDS_PER_STEP": "0.05"}
    return subprocess.Popen(
        line,
        env={**environment(), **slowly},
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def wait_for_rounds(run, path):
    wait_until(lambda: partial_path(path).exists() and committed(path) > 0, process=run)


def writer_of(run, path):
    """Return the process that has the results file open."""
    for pid in descendants(run.pid):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if link.readlink().name.startswith(f"{path.name}."):
                    return pid
    raise AssertionError("no process writes the file")


@pytest.mark.mpi
@pytest.mark.parametrize("mode", ["swmr", "flush"])
def test_a_disk_that_fills_up_ends_the_run_which_goes_on_when_there_is_room(tmp_path, mode):
    path = tmp_path / "r.h5"
    with start(tmp_path, path, mode, rounds=80) as run:
        try:
            wait_for_rounds(run, path)
            # A limit on the size of files stands for a disk that is full.
            size = partial_path(path).stat().st_size
            resource.prlimit(writer_of(run, path), resource.RLIMIT_FSIZE, (size, size))
            _, err = run.communicate(timeout=PATIENCE)
        finally:
            if run.poll() is None:
                kill_tree(run.pid)
    (error,) = errors(err)
    assert "error: rank 0 of 2 on " in error
    assert f"{partial_path(path)}: cannot write to the results file: File too large; " in error
    assert run.returncode == 2
    before = committed(path)
    assert 0 < before < 80
    rest = run_here("resume", path, "--progress", "none")
    assert rest.status == 0, rest.err
    whole = tmp_path / "whole.h5"
    run_here("run", tmp_path / "experiment.yaml", "--progress", "none", "-o", whole)
    assert_same_results(path, whole)
    with open_results(path) as results:
        assert [start.ranks for start in results.starts] == [2, 1]
        assert results.starts[1].committed == before
    assert {file.name for file in tmp_path.iterdir()} == {"experiment.yaml", "whole.h5", "r.h5"}


def drop_rights():
    """Make the program that is started next respect permissions, though root starts it."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        if libc.prctl(24, capability, 0, 0, 0) != 0:  # PR_CAPBSET_DROP
            raise OSError(ctypes.get_errno(), "prctl")


def start_without_rights(*arguments):
    return subprocess.run(
        command(*arguments),
        env=environment(),
        preexec_fn=drop_rights if os.geteuid() == 0 else None,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_a_folder_that_is_read_only_is_an_error_before_anything_is_done(tmp_path):
    experiment = write_experiment(tmp_path / "experiment.yaml")
    folder = tmp_path / "results"
    folder.mkdir(mode=0o555)
    done = start_without_rights("run", experiment, "-o", folder / "r.h5")
    assert errors(done.stderr) == [
        f"error: {folder / 'r.h5'}: the folder {folder} cannot be written to"
    ]
    assert done.returncode == 2
    assert list(folder.iterdir()) == []


def test_an_unfinished_file_that_is_read_only_is_an_error(tmp_path):
    experiment = write_experiment(tmp_path / "experiment.yaml")
    partial = partial_path(tmp_path / "r.h5")
    partial.write_bytes(b"mine")
    partial.chmod(0o444)
    done = start_without_rights("run", experiment, "--overwrite", "-o", tmp_path / "r.h5")
    assert errors(done.stderr) == [
        f"error: {partial}: the file cannot be written to: Permission denied"
    ]
    assert done.returncode == 2
    assert partial.read_bytes() == b"mine"


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """Return a folder with an experiment and an unfinished file of it, r.h5.partial."""
    folder = tmp_path_factory.mktemp("unfinished")
    experiment = write_experiment(folder / "experiment.yaml")
    done = run_here("run", experiment, "-o", folder / "r.h5", "--progress", "none")
    assert done.status == 0, done.err
    (folder / "r.h5").rename(partial_path(folder / "r.h5"))
    return folder


@pytest.mark.parametrize("verb", ["run", "resume"])
def test_a_file_that_another_process_writes_is_left_alone(unfinished, verb):
    experiment, path = unfinished / "experiment.yaml", unfinished / "r.h5"
    content = partial_path(path).read_bytes()
    line = [verb, path] if verb == "resume" else [verb, experiment, "--overwrite", "-o", path]
    with partial_path(path).open("r+b") as lock:
        fcntl.lockf(lock.fileno(), fcntl.LOCK_EX)
        done = run_testbed(*line)
    (error,) = errors(done.err)
    assert f"{partial_path(path)}: a run is writing this file" in error
    assert done.status == 2
    assert partial_path(path).read_bytes() == content
    assert {file.name for file in unfinished.iterdir()} == {"experiment.yaml", "r.h5.partial"}


@pytest.mark.parametrize("program", [("testbed", "resume"), ("analysis", "show")])
def test_a_file_that_hdf5_has_locked_is_an_error(unfinished, program):
    path = unfinished / "r.h5"
    with partial_path(path).open("r+b") as lock:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX)  # as HDF5 does without SWMR
        done = finish([sys.executable, "-m", *program, str(path)])
    (error,) = errors(done.err)
    assert f"{partial_path(path)}: the file is locked" in error
    assert done.status == 2


@pytest.mark.mpi
@pytest.mark.parametrize("mode", ["swmr", "flush"])
def test_a_folder_that_is_taken_away_ends_the_run(tmp_path, mode):
    folder = tmp_path / "results"
    folder.mkdir()
    with start(tmp_path, folder / "r.h5", mode, rounds=100_000) as run:
        try:
            wait_for_rounds(run, folder / "r.h5")
            folder.rename(tmp_path / "moved")
            _, err = run.communicate(timeout=PATIENCE)
        finally:
            if run.poll() is None:
                kill_tree(run.pid)
    (error,) = errors(err)
    assert f"{folder / 'r.h5'}.partial: the file is gone: " in error
    assert run.returncode == 2
    assert not folder.exists()
    assert committed(tmp_path / "moved" / "r.h5") > 0
