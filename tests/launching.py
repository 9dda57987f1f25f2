"""Starts the real program, alone or under a real mpirun, and looks at what it left."""

import atexit
import contextlib
import functools
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import yaml

from testbed.__main__ import main

MPIRUN = str(Path(sys.executable).with_name("mpirun"))
if not Path(MPIRUN).exists():
    MPIRUN = "mpirun"
# Seconds after which something that has not come is taken for something that never comes: only what
# hangs is waited for that long, so that it fits the slowest machine.
PATIENCE = 300
# Whether the test that runs is marked as one that does: conftest.py says so.
may_start_ranks = True
# That a run takes over.
_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Finished:
    """A program that has ended."""

    status: int
    out: str
    err: str
    seconds: float


@functools.cache
def launcher():
    """Return what `mpirun --version` says: of Open MPI, or of Hydra, which is MPICH's."""
    return subprocess.run([MPIRUN, "--version"], capture_output=True, text=True, check=True).stdout


def is_open_mpi():
    """Return whether mpirun is Open MPI's."""
    return "Open MPI" in launcher()


def has_ulfm():
    """Return whether mpirun is that of an Open MPI which survives the loss of ranks."""
    info = str(Path(MPIRUN).with_name("ompi_info")) if "/" in MPIRUN else "ompi_info"
    if not is_open_mpi() or not shutil.which(info):
        return False
    said = subprocess.run([info, "--parsable"], capture_output=True, text=True, check=True).stdout
    return "ft_mpi_support:yes" in said


@functools.cache
def scratch():
    """Return a folder for what launchers keep for themselves, and leave behind when killed.

    There an mpirun that has the process number of a killed one does not start.
    """
    folder = tempfile.mkdtemp(prefix="mpi-")  # a short name, for there will be sockets in it
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def environment():
    """Return an environment in which mpirun starts any number of ranks, as root too."""
    # Threads are the testbed's own affair: whatever a user has set, or has not.
    inherited = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    return {
        **inherited,
        "TMPDIR": scratch(),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":OVERSUBSCRIBE",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        # The same for Open MPI 4.
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
    }


def command(*arguments, ranks=None):
    """Return the command line of the testbed, under mpirun where ranks are given."""
    line = [sys.executable, "-m", "testbed", *map(str, arguments)]
    return under_mpirun(line, ranks) if ranks else line


def under_mpirun(line, ranks, *options):
    """Return a command line that starts another one as ranks."""
    assert may_start_ranks, "tests that start ranks are marked: pytest.mark.mpi (or ranks)"
    return [MPIRUN, *options, "-n", str(ranks), *line]


def marking(folder):
    """Return an attack that tells `wait_for_rounds` of rounds, in a run that is started there."""
    shutil.copy(Path(__file__).with_name("marking_attack.py"), folder)
    return {"name": "marking_attack:Marking"}


def wait_until(condition, *, process=None, log=None, pause=0.02):
    """Wait until a condition holds, while a process runs that may write a log."""
    end = time.monotonic() + PATIENCE
    while True:
        # Before the condition, which the process may fulfil as its last act.
        ended, late = process is not None and process.poll() is not None, time.monotonic() > end
        if condition():
            return
        said = log.read_text() if log else ""
        assert not ended, f"it ended by itself: {said}"
        assert not late, f"it never came: {said}"
        time.sleep(pause)


def wait_for_rounds(process, folder, log="log"):
    """Wait until a run has done with its first round: the results file is there before it."""
    begun = folder / "begun"
    wait_until(begun.exists, process=process, log=folder / log if log else None)


def run_testbed(*arguments, ranks=None, cwd=None, patience=PATIENCE):
    """Run the testbed to its end. A hang is a failure of the test: it is killed, and raises."""
    return finish(command(*arguments, ranks=ranks), cwd=cwd, patience=patience)


def run_here(*arguments, cwd="."):
    """Run the testbed in this process: where the test is of results or of messages.

    Modules that an experiment finds in the folder ``cwd`` are forgotten afterwards, and signals are
    handled as before.
    """
    before, paths = set(sys.modules), list(sys.path)
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    out, err = io.StringIO(), io.StringIO()
    started = time.monotonic()
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            status = main([*map(str, arguments)])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.path[:] = paths
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).parent == Path(cwd).resolve():
                del sys.modules[name]
        importlib.invalidate_caches()
    return Finished(status, out.getvalue(), err.getvalue(), time.monotonic() - started)


def finish(line: Sequence[str], cwd=None, env=None, patience=PATIENCE):
    """Run a program to its end."""
    started = time.monotonic()
    process = subprocess.Popen(
        line,
        cwd=cwd,
        env=env or environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        out, err = process.communicate()
        raise AssertionError(
            f"no end within {patience} s: {' '.join(line)}\n{err.decode(errors='replace')}"
        ) from None
    seconds = time.monotonic() - started
    return Finished(
        process.returncode, out.decode(errors="replace"), err.decode(errors="replace"), seconds
    )


def descendants(pid):
    """Return the process ids of a process and all its descendants."""
    children = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def kill_tree(pid):
    """Send SIGKILL to a process and all its descendants, the launcher first."""
    for victim in descendants(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)


def write_experiment(path, **changes):
    """Write a small experiment on the digits; keyword arguments replace or add top-level keys."""
    content = {
        "title": "a test",
        "seed": 7,
        "data": {"name": "digits"},
        "model": {"name": "cnn"},
        "federation": {"rounds": 6, "clients": 3, "batch_size": 8},
        "attacks": ["random", "llg", "llg_star", "llg_plus"],
    }
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path


def zipped(scenarios):
    """Return a sweep that walks through scenarios, mappings with the same keys."""
    keys = scenarios[0].keys()
    return {"zip": [{key: [scenario[key] for scenario in scenarios] for key in keys}]}


def result_arrays(path):
    """Return every array of a results file that the ranks and the clock must not change."""
    found = {}

    def visit(name, item):
        placed = name.startswith(("ranks/", "starts/", "losses/")) or "/timings/" in name
        if isinstance(item, h5py.Dataset) and not placed:
            found[name] = item[()]

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def assert_same_results(first, second):
    """Assert that two results files hold the same bits, timings and placement aside."""
    one, two = result_arrays(first), result_arrays(second)
    assert one.keys() == two.keys()
    different = [name for name in one if one[name].tobytes() != two[name].tobytes()]
    assert different == []
    assert any(np.size(array) > 1 for array in one.values())
