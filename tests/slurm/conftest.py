"""A real Slurm cluster of two nodes on this machine, for the tests of this folder."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import PATIENCE, environment, wait_until

_CLUSTER = Path(__file__).with_name("cluster")
_ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what is here: it takes longest, and waits for most of it."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.timeout(8 * PATIENCE))
    items[:] = [*here, *(item for item in items if item not in set(here))]


@dataclass(frozen=True)
class Job:
    """A job as Slurm has it at the end, or now.

    Attributes
    ----------
    facts
        What ``scontrol show job`` says.
    """

    facts: dict[str, str]

    @property
    def state(self) -> str:
        return self.facts["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.facts["Restarts"])

    @property
    def log(self) -> str:
        path = Path(self.facts["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""


class Cluster:
    """The cluster, as somebody on its login node uses it from a folder."""

    def __init__(self, config: str, folder: Path) -> None:
        self.folder = folder
        self.lost: set[int] = set()
        inherited = {k: v for k, v in environment().items() if not k.startswith(("OMPI", "PRTE"))}
        self.environment = {
            **inherited,
            "SLURM_CONF": config,
            "TESTBED_ROOT": str(_ROOT),
            "TESTBED_VENV": str(Path(sys.executable).parents[1]),
        }

    def call(self, *words: object, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a program to its end."""
        return subprocess.run(
            [str(word) for word in words],
            cwd=self.folder,
            env={**self.environment, **settings},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def submit(self, *words: object, **settings: str) -> str:
        """Submit a job and return its number."""
        said = self.call("sbatch", "--parsable", *words, **settings)
        assert said.returncode == 0, said.stderr
        return said.stdout.strip().partition(";")[0]

    def script(self, name: str) -> Path:
        """Return one of the batch scripts."""
        return _ROOT / "slurm" / name

    def jobs(self, number: str) -> list[Job]:
        """Return a job, or all elements of an array."""
        for attempt in range(5):  # a controller that is busy may not answer
            time.sleep(attempt)
            said = self.call("scontrol", "--oneliner", "show", "job", number)
            if said.returncode == 0:
                break
        assert said.returncode == 0, said.stderr
        lines = said.stdout.splitlines()
        return [Job(dict(part.partition("=")[::2] for part in line.split())) for line in lines]

    def job(self, number: str) -> Job:
        """Return a job."""
        (job,) = self.jobs(number)
        return job

    def wait(self, number: str, *states: str) -> list[Job]:
        """Wait until a job, or all elements of an array, are in one of some states."""
        # Longer than for what hangs: rounds are slow on purpose, and jobs wait in the queue.
        end = time.monotonic() + 3 * PATIENCE
        while True:
            jobs = self.jobs(number)
            if all(job.state in states for job in jobs):
                return jobs
            assert time.monotonic() < end, "\n".join(f"{job.facts}\n{job.log}" for job in jobs)
            time.sleep(0.2)

    def finish(self, number: str) -> list[Job]:
        """Wait until a job is over."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        return self.wait(number, *over)

    def until(self, path: Path, number: str) -> None:
        """Wait until a file is there."""
        end = time.monotonic() + PATIENCE
        while not path.exists():
            assert time.monotonic() < end, self.jobs(number)[0].log
            time.sleep(0.05)

    def cut(self, node: int) -> None:
        """Take a node off the network."""
        self.lost.add(node)
        subprocess.run([_CLUSTER, "cut", str(node)], check=True)

    def mend(self, node: int) -> None:
        """Bring it back, and wait until Slurm has it again."""
        subprocess.run([_CLUSTER, "mend", str(node)], check=True)
        self.lost.discard(node)
        end = time.monotonic() + PATIENCE
        while self.call("sinfo", "-h", "-p", "main", "-o", "%D %t").stdout.split() != ["2", "idle"]:
            assert time.monotonic() < end, self.call("sinfo", "-lN").stdout
            time.sleep(0.5)


@pytest.fixture(scope="session")
def slurm() -> Iterator[str]:
    """Start the cluster; its configuration file."""
    # One at a time: another session's would be taken for a dead one's.
    with (Path(tempfile.gettempdir()) / "testbed-cluster.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield from _started()


def _started() -> Iterator[str]:
    started = subprocess.run([_CLUSTER, "up"], capture_output=True, text=True)
    if started.returncode == 3:
        reason = f"no Slurm cluster can be started here: {started.stderr.strip()}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    assert started.returncode == 0, started.stderr
    said = subprocess.run([_CLUSTER, "env"], capture_output=True, text=True, check=True).stdout
    yield said.strip().partition("=")[2]
    subprocess.run([_CLUSTER, "down"], check=True)


@pytest.fixture
def cluster(slurm: str, tmp_path: Path) -> Iterator[Cluster]:
    """Return the cluster, seen from the test's folder; afterwards no job of it is left."""
    here = Cluster(slurm, tmp_path)
    yield here
    for node in here.lost.copy():  # by a test that failed meanwhile
        here.mend(node)
    here.call("scancel", "--full", "--user=root")
    here.call("scancel", "--signal=KILL", "--full", "--user=root")
    wait_until(lambda: not here.call("squeue", "-h").stdout.strip(), pause=0.2)
    shutil.rmtree(tmp_path, ignore_errors=True)
