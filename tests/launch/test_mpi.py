"""The mpirun of this machine: which one it is, and that it stays on this machine."""

import os
import platform
import sys

import pytest
from fakes import script
from launching import environment, finish, launcher, under_mpirun

from launch.mpi import family, find_mpirun, kept_here
from testbed.errors import UserError

# A job of one task, on a machine that is not this one.
JOB = {
    "SLURM_JOBID": "7",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "elsewhere",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_NODELIST": "elsewhere",
    "SLURM_NTASKS": "1",
    "SLURM_TASKS_PER_NODE": "1",
}


def test_mpirun_is_the_one_that_was_chosen_or_that_of_this_python(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    elsewhere = script(tmp_path, "mpirun", "exit")
    beside = tmp_path / "bin/mpirun"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    there = {"PATH": str(tmp_path)}
    for nothing in ({}, {"PATH": str(tmp_path / "nothing")}):
        assert find_mpirun(nothing) is None
    assert find_mpirun(there) == find_mpirun({**there, "MPIRUN": ""}) == str(elsewhere)
    script(tmp_path / "bin", "mpirun", "exit")
    assert find_mpirun(there) == find_mpirun({}) == str(beside)
    assert find_mpirun({**there, "MPIRUN": "mpirun"}) == str(elsewhere)
    assert find_mpirun({"MPIRUN": str(elsewhere)}) == str(elsewhere)
    with pytest.raises(UserError, match=r"MPIRUN=.*/absent: there is no such program"):
        find_mpirun({**there, "MPIRUN": str(tmp_path / "absent")})


def test_an_mpi_is_known_by_what_it_says():
    for text, name in (
        ("Open MPI v5.0.11", "Open MPI"),
        ("mpirun (Open MPI) 4.1.4", "Open MPI"),
        ("MPICH 5.0.2", "MPICH"),
        ("HYDRA build details:\n    Version: 4.2", "MPICH"),
        ("CRAY MPICH version 8.1.27.26 (ANL base 3.4a2)", "MPICH"),
        ("Intel(R) MPI Library 2021.9 for Linux* OS", "Intel MPI"),
        ("MVAPICH2 Version: 2.3.7", "MVAPICH"),
        ("lam 7", ""),
    ):
        assert family(text) == name


def test_outside_of_jobs_nothing_has_to_be_said():
    for name in ("Open MPI", "MPICH", "MVAPICH", "Intel MPI", ""):
        assert kept_here(name, {}) == {}
    assert set(kept_here("Open MPI", JOB)) > {"OMPI_MCA_ras", "PRTE_MCA_ras"}
    assert kept_here("MPICH", JOB) == kept_here("MVAPICH", JOB)


@pytest.mark.mpi
def test_within_a_job_ranks_start_on_this_machine(tmp_path):
    script(tmp_path, "srun", "exit 1")  # by which they would be started on the other
    path = f"{tmp_path}:{os.environ['PATH']}"
    env = {**environment(), **JOB, "PATH": path, **kept_here(family(launcher()), JOB)}
    done = finish(under_mpirun([sys.executable, "-m", "platform", "terse"], 2), env=env)
    assert done.status == 0, done.err
    assert done.out.splitlines() == 2 * [platform.platform(terse=True)]
