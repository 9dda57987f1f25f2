"""What is tried out in a process of its own: it may crash there, or hang.

Run as a script: ``checks_probes.py NAME [FOLDER]``. It prints what it has found as JSON, in a line.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# A probe whose doctor is gone ends by itself.
_MOST_SECONDS = 600


def mpi() -> dict[str, Any]:
    """Return the version of the MPI library that mpi4py loads, which is not started."""
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    return {"version": MPI.Get_library_version(), "shrink": hasattr(MPI.Comm, "Shrink")}


def hello() -> dict[str, Any]:
    """Return the size of this rank's world, in which all ranks have met, and share memory."""
    # As a run does: Open MPI's UCX prints an error for every window where it has no network.
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    node = MPI.Intracomm(world.Split_type(MPI.COMM_TYPE_SHARED))
    window = MPI.Win.Allocate_shared(1 << 20 if node.rank == 0 else 0, 1, comm=node)
    window.Free()
    return {"hello": world.rank, "met": world.allreduce(1), "host": platform.node()}


def torch() -> dict[str, Any]:
    """Return what PyTorch is built for, and each GPU on which it can really compute."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    gpus = []
    for index in range(torch.cuda.device_count() if available else 0):
        name, error = "", ""
        try:
            name = torch.cuda.get_device_name(index)
            if float(torch.ones(8, device=f"cuda:{index}").sum()) != 8:
                error = "computes wrongly"
        except RuntimeError as caught_error:
            error = str(caught_error).partition("\n")[0]
        gpus.append({"name": name, "error": error})
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda or "",
        "hip": torch.version.hip or "",
        "available": available,
        "gpus": gpus,
        "warning": " ".join(str(warning.message) for warning in caught).partition("\n")[0],
    }


def hdf5(folder: str = "") -> dict[str, Any]:
    """Return the versions, and whether a file in a folder can be created and switched to SWMR."""
    import h5py

    found = {"h5py": h5py.__version__, "hdf5": h5py.version.hdf5_version, "error": "", "swmr": ""}
    if not folder:
        return found
    with _file_in(folder) as path:
        try:
            file = h5py.File(path, "w", libver=("v110", "v110"))
        except OSError as error:
            found["error"] = str(error).partition("\n")[0]
            return found
        with file:
            file.create_dataset("x", data=[1.0], chunks=(1,), maxshape=(None,))
            try:
                file.swmr_mode = True
            except (OSError, RuntimeError, ValueError) as error:
                found["swmr"] = str(error).partition("\n")[0]
    return found


def folder(name: str) -> dict[str, Any]:
    """Return whether a folder can be written to, how much is free, and which locks work there.

    A lock works where a second process is refused it.
    """
    found: dict[str, Any] = {"error": "", "free": 0, "posix": "", "flock": ""}
    if not Path(name).is_dir():
        found["error"] = "this is a file" if Path(name).exists() else "there is no such folder"
        return found
    found["free"] = shutil.disk_usage(name).free
    try:
        # A file for each kind of lock: network file systems may make one kind of the other.
        for kind, lock in (("posix", fcntl.lockf), ("flock", fcntl.flock)):
            with _file_in(name) as path:
                found[kind] = refusal(path, lock)
    except OSError as error:
        found["error"] = error.strerror or str(error)
    return found


def refusal(path: Path, lock: Callable[[int, int], None]) -> str:
    """Return why a second process is not refused a lock on a file; empty if it is.

    Parameters
    ----------
    path
        An existing file.
    lock
        Locks a descriptor as `fcntl.lockf` and `fcntl.flock` do.
    """
    with path.open("r+b") as file:
        try:
            lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.strerror or str(error)
        child = os.fork()
        if child == 0:
            code = 0
            try:
                with path.open("r+b") as again:
                    lock(again.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                code = error.errno or 0
            finally:
                os._exit(code if 0 < code < 256 else 255)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (errno.EACCES, errno.EAGAIN):
        return ""
    return "two processes get the same lock" if code == 255 else os.strerror(code)


@contextlib.contextmanager
def _file_in(folder: str) -> Iterator[Path]:
    descriptor, name = tempfile.mkstemp(prefix=".testbed-doctor-", dir=folder)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


if __name__ == "__main__":
    signal.alarm(_MOST_SECONDS)
    functions: tuple[Callable[..., dict[str, Any]], ...] = (mpi, hello, torch, hdf5, folder)
    probe = {function.__name__: function for function in functions}[sys.argv[1]]
    print(json.dumps(probe(*sys.argv[2:])), flush=True)
