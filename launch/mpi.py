"""The mpirun of this machine: which one it is, of whose MPI, and what keeps it here."""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from testbed.errors import UserError


def find_mpirun(environment: Mapping[str, str]) -> str | None:
    """Return the mpirun of ``MPIRUN``, or of this Python's environment, or of the path.

    Parameters
    ----------
    environment
        Environment variables; ``PATH`` is the path.

    Raises
    ------
    UserError
        MPIRUN names none.
    """
    path, chosen = environment.get("PATH", ""), environment.get("MPIRUN")
    if chosen:
        found = shutil.which(chosen, path=path)
        if found is None:
            raise UserError(f"MPIRUN={chosen}: there is no such program")
        return found
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("mpirun", path=path)


def family(text: str) -> str:
    """Return whose MPI this is, by what it says of its version; empty if it is none of these."""
    for name, marks in (
        ("Open MPI", ("Open MPI", "OpenRTE", "PRRTE")),
        ("Intel MPI", ("Intel(R) MPI",)),
        ("MVAPICH", ("MVAPICH",)),
        ("MPICH", ("MPICH", "HYDRA")),
    ):
        if any(mark in text for mark in marks):
            return name
    return ""


def kept_here(whose: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what keeps an mpirun to this machine also within a job of Slurm.

    It would take the job's nodes, and as many ranks as the job has tasks.

    Parameters
    ----------
    whose
        As of `family`.
    environment
        Environment variables, which tell whether this is within a job.
    """
    if "SLURM_JOB_ID" not in environment:
        return {}
    if whose == "Open MPI":  # 5, and 4
        names = ("PRTE_MCA_ras", "PRTE_MCA_plm", "OMPI_MCA_ras", "OMPI_MCA_plm")
        return dict.fromkeys(names, "^slurm")
    if whose in ("MPICH", "MVAPICH"):
        return {"HYDRA_RMK": "user", "HYDRA_LAUNCHER": "fork"}
    return {}
