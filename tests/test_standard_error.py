import array
import contextlib
import fcntl
import os
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from launching import PATIENCE, command, environment, finish, under_mpirun, write_experiment

from testbed.standard_error import await_reader

# Seconds: longer than it takes mpirun to end a job, and than the wait for a reader.
MOMENT, WAIT = 0.8, 1.8


def unread(descriptor):
    """Return the number of bytes in a pipe."""
    count = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, count)
    return count[0]


def wait_for_words(process, pipe):
    """Wait until a program has written something, and return a time before that."""
    last = time.monotonic()
    while True:
        before, ended = time.monotonic(), process.poll() is not None
        if unread(pipe):
            return last
        last = before
        assert not ended
        time.sleep(0.01)


def waits(process, since):
    """Return whether a program that has written something since then still waits for its reader."""
    time.sleep(MOMENT)
    ended = process.poll() is not None
    return not ended or time.monotonic() - since > WAIT  # a busy machine: nothing is known


@contextlib.contextmanager
def standard_error():
    """Put a pipe in the place of standard error, and return the end to read from."""
    kept = os.dup(2)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    try:
        yield reading
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(reading)


def test_a_reader_that_is_late_is_waited_for():
    with standard_error() as pipe:
        os.write(2, b"the last word")
        reader = threading.Timer(0.2, os.read, (pipe, 100))
        started = time.monotonic()
        reader.start()
        await_reader(patience=PATIENCE)
        assert 0.1 < time.monotonic() - started < PATIENCE / 2
        assert unread(pipe) == 0
        reader.join()


def test_a_reader_that_never_comes_is_not_waited_for_longer():
    with standard_error() as pipe:
        os.write(2, b"the last word")
        started = time.monotonic()
        await_reader(patience=0.2)
        assert 0.2 <= time.monotonic() - started < PATIENCE / 2
        assert unread(pipe) == 13


def test_a_reader_that_has_gone_is_not_waited_for():
    with standard_error() as pipe:
        os.write(2, b"the last word")
        nobody, other = os.pipe()
        os.dup2(nobody, pipe)  # closes the end to read from
        started = time.monotonic()
        await_reader(patience=PATIENCE)
        assert time.monotonic() - started < PATIENCE / 2
        os.close(nobody)
        os.close(other)


@pytest.mark.parametrize("place", ["a file", "nothing"])
def test_where_nobody_reads_nothing_is_waited_for(place, tmp_path):
    program = "import os, time, testbed.standard_error as e; t = time.monotonic()\n"
    program += f"e.await_reader({PATIENCE}); os._exit(time.monotonic() - t > {PATIENCE / 2})"
    line = [sys.executable, "-c", program]
    with (tmp_path / "err").open("wb") as file:
        if place == "nothing":
            line = ["bash", "-c", 'exec "$@" 2>&-', "bash", *line]
        assert subprocess.run(line, stderr=file, check=False).returncode == 0


def test_a_usage_error_is_read_before_the_program_ends():
    line = [sys.executable, "-m", "testbed", "run"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, env=environment()) as process:
        since = wait_for_words(process, process.stderr)
        assert waits(process, since)
        assert b"the following arguments are required" in process.stderr.read()
        assert process.wait() == 2


@pytest.mark.mpi
@pytest.mark.parametrize("end", ["abort", "leave"])
def test_mpirun_does_not_end_a_job_before_the_message_has_been_read(end, tmp_path):
    where = "    " if end == "abort" else ""  # every rank leaves; one aborts for all
    (tmp_path / "ending.py").write_text(
        "import sys\n"
        "from testbed.transport.environment import connect\n"
        "transport = connect()\n"
        "transport.gather(None)\n"
        "if transport.is_root:\n"
        "    print('the last word', file=sys.stderr)\n"
        f"{where}transport.{end}(3)\n"
        "transport.gather(None)\n"
    )
    fifo = tmp_path / "err"
    os.mkfifo(fifo)
    line = ["bash", "-c", f'exec "$@" 2>>{fifo}', "bash", sys.executable, "ending.py"]
    reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with subprocess.Popen(
        under_mpirun(line, 3),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        env={**environment(), "PYTHONPATH": str(Path.cwd())},
    ) as process:
        since = wait_for_words(process, reading)
        assert waits(process, since)
        assert b"the last word" in os.read(reading, 10_000)
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 3
    os.close(reading)


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_stop_a_run(closed, tmp_path):
    experiment = write_experiment(tmp_path / "e.yaml")
    line = ["bash", "-c", f'exec "$@" {closed}', "bash", *command("run", experiment, "-o", "r.h5")]
    assert finish(line, cwd=tmp_path).status == 0
    assert (tmp_path / "r.h5").exists()
    assert list(tmp_path.glob("r.h5.*")) == []
