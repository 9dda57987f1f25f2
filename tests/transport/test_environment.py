"""How a process was started, told from its environment variables."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from testbed.errors import UserError
from testbed.transport.environment import (
    check_world,
    connect,
    is_leader,
    start_seconds,
    was_launched,
)
from testbed.transport.local import LocalTransport

OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "PMIX_RANK": "2"}
MPICH = {"PMI_SIZE": "4", "PMI_RANK": "2"}
# Within a job of four tasks: a step that srun started, and the batch script's own shell.
JOB = {"SLURM_JOB_ID": "9", "SLURM_NTASKS": "4"}
SRUN = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
BATCH_SHELL = {**JOB, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
SINGLE_OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "size", "message"),
    [
        # One world for all that were started.
        (OPEN_MPI, 4, ""),
        (MPICH, 4, ""),
        ({**SRUN, **OPEN_MPI}, 4, ""),
        ({**SRUN, "PMIX_RANK": "2"}, 4, ""),
        # One process on purpose.
        ({}, 1, ""),
        (BATCH_SHELL, 1, ""),
        (JOB, 1, ""),
        (SINGLE_OPEN_MPI, 1, ""),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, 1, ""),
        ({**SRUN, **SINGLE_OPEN_MPI}, 1, ""),  # mpirun -n 1 within a step of several tasks
        # Several processes that do not know of each other.
        (OPEN_MPI, 1, "mpirun started 4 processes, but each of them sees a world of one rank"),
        (MPICH, 1, "mpirun started 4 processes, but each of them sees a world of one rank"),
        ({**BATCH_SHELL, **OPEN_MPI}, 1, "mpirun started 4 processes"),
        (SRUN, 1, "srun started 4 single processes instead of one run of 4 ranks"),
        ({**SRUN, "PMIX_RANK": "2"}, 1, "srun started 4 single processes"),
        # Not numbers.
        ({"OMPI_COMM_WORLD_SIZE": "x"}, 1, ""),
        ({"SLURM_STEP_NUM_TASKS": "4(x2)"}, 1, ""),
        ({"SLURM_STEP_NUM_TASKS": ""}, 1, ""),
    ],
)
def test_world(environment: Mapping[str, str], size: int, message: str) -> None:
    if not message:
        check_world(environment, size)
        return
    with pytest.raises(UserError) as caught:
        check_world(environment, size)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_messages_name_the_fix() -> None:
    with pytest.raises(UserError, match="python -m mpi4py --mpi-lib-version"):
        check_world(OPEN_MPI, 1)
    with pytest.raises(UserError, match="srun --mpi=pmix"):
        check_world(SRUN, 1)


@pytest.mark.parametrize(
    ("environment", "launched"),
    [
        ({}, False),
        (JOB, False),
        (SRUN, False),
        (BATCH_SHELL, False),
        ({"OMPI_MCA_btl": "tcp"}, False),
        (OPEN_MPI, True),
        (SINGLE_OPEN_MPI, True),
        (MPICH, True),
        ({"PMI_RANK": "0"}, True),
        ({"PMIX_RANK": "0"}, True),
    ],
)
def test_was_launched(environment: Mapping[str, str], launched: bool) -> None:
    assert was_launched(environment) == launched


@pytest.mark.parametrize(
    ("environment", "leads"),
    [
        ({}, True),
        (JOB, True),
        (BATCH_SHELL, True),
        (OPEN_MPI, False),
        (SINGLE_OPEN_MPI, True),
        (MPICH, False),
        (SRUN, False),
        ({**SRUN, "SLURM_PROCID": "0"}, True),
        # Slurm's number is that of the daemon where mpirun starts its daemons by srun.
        ({"SLURM_PROCID": "1", "OMPI_COMM_WORLD_RANK": "0"}, True),
        ({"SLURM_PROCID": "0", "OMPI_COMM_WORLD_RANK": "3"}, False),
        ({"SLURM_PROCID": "0", "PMI_RANK": "3"}, False),
    ],
)
def test_exactly_one_rank_speaks_for_the_job(environment: Mapping[str, str], leads: bool) -> None:
    assert is_leader(environment) == leads


def test_single_process_connects_without_mpi() -> None:
    code = "from testbed.transport.environment import connect\nimport sys\n"
    code += "print(type(connect({})).__name__, 'mpi4py' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.split() == ["LocalTransport", "False"]


def test_singletons_of_srun_are_refused_without_mpi() -> None:
    with pytest.raises(UserError, match=r"^srun started 4 single processes"):
        connect(SRUN)


def test_local_transport_is_a_world_of_one() -> None:
    transport = connect(BATCH_SHELL)
    assert isinstance(transport, LocalTransport)
    assert (transport.rank, transport.size, transport.workers) == (0, 1, 1)
    assert transport.is_root
    assert transport.library == ""
    assert transport.broadcast("x") == "x"
    assert transport.gather("x") == ["x"]


@pytest.mark.parametrize(
    ("given", "seconds"), [("10", 10), ("0", 300), ("00", 300), ("", 300), ("-1", 300), ("x", 300)]
)
def test_the_time_for_ranks_to_start_is_never_none_at_all(given: str, seconds: int) -> None:
    assert start_seconds({"TESTBED_START_SECONDS": given}) == seconds
    assert start_seconds({}) == 300
