"""What this machine gives to a process: CPUs, memory, shared memory, open files."""

import os
import resource
import shutil
from pathlib import Path

from launch.checks import Finding
from testbed.results.placed import read_ranges

_GIB = 2**30
_LEAST_SHARED = 1 * _GIB
_LEAST_FILES = 1024


def examine_machine(system: Path = Path("/")) -> list[Finding]:
    """Look at CPUs, memory, shared memory, and how many files may be open.

    Parameters
    ----------
    system
        Root of the file system, with ``/proc``, ``/sys`` and ``/dev/shm``.
    """
    return [_cpus(system), _memory(system), _shared(system / "dev/shm"), _files()]


def _cpus(system: Path) -> Finding:
    if hasattr(os, "sched_getaffinity"):  # Linux has it
        own = sorted(os.sched_getaffinity(0))
    else:
        own = list(range(os.cpu_count() or 1))
    found = f"{len(own)} of {os.cpu_count()} may be used"
    cores = physical_cores(system, own)
    if cores and cores < len(own):
        found += f", hyperthreads of {cores} cores"
    limit = cpu_limit(system)
    if limit and limit < len(own):
        found += f"; the control group limits them to {limit:g} at a time"
        fix = "start no more ranks than that, or ask for more: --cpus-per-task, docker run --cpus"
        return Finding("machine", "CPUs", "note", found, fix)
    return Finding("machine", "CPUs", "ok", found)


def physical_cores(system: Path, cpus: list[int]) -> int:
    """Return how many cores CPUs are the hyperthreads of; 0 where the system does not tell."""
    cores = set()
    for cpu in cpus:
        siblings = system / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            cores.add(siblings.read_text())
        except OSError:
            return 0
    return len(cores)


def cpu_limit(system: Path) -> float:
    """Return how many CPUs' time the control groups give, 0 where they have no limit.

    Source: Linux, cgroup-v2, cpu.max; and sched-bwc, cpu.cfs_quota_us, which is v1.
    """
    limits = [text.partition(" ")[::2] for text in _limits(system, "cpu.max")]
    quotas = _limits(system, "cpu.cfs_quota_us", "cpu")
    # Not strict: a group may go away between the two.
    limits += zip(quotas, _limits(system, "cpu.cfs_period_us", "cpu"), strict=False)
    found = [
        int(quota) / int(period)
        for quota, period in limits
        if quota.isdigit() and period.isdigit()  # max, and -1, are none
    ]
    return min(found, default=0.0)


def cpu_set(system: Path) -> list[int]:
    """Return the CPUs of this process's control group, none where it has no set of its own.

    Source: Linux, cgroup-v2, cpuset.cpus.effective.
    """
    return read_ranges(next(iter(_limits(system, "cpuset.cpus.effective")), ""))


def memory_limit(system: Path) -> int:
    """Return how many bytes the control groups give, 0 where they have no limit."""
    return min((int(text) for text in _limits(system, "memory.max") if text.isdigit()), default=0)


def _limits(system: Path, name: str, controller: str = "") -> list[str]:
    """Return a limit of this process's control group, and of all that it is in.

    Parameters
    ----------
    system
        Root of the file system.
    name
        Of the limit's file.
    controller
        Of version 1, where each has groups of its own; none for version 2.
    """
    try:
        groups = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for _, controllers, group in (line.split(":", 2) for line in groups):
        if controller not in controllers.split(","):
            continue
        top = system / "sys/fs/cgroup" / controller
        own = top / group.lstrip("/")
        for folder in (own, *own.parents):
            if (folder / name).is_file():
                found.append((folder / name).read_text().strip())
            if folder == top:
                break
    return found


def _memory(system: Path) -> Finding:
    try:
        lines = (system / "proc/meminfo").read_text().splitlines()
    except OSError:
        return Finding("machine", "memory", "note", "not known: this is no Linux")
    sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
    found = f"{gib(sizes['MemTotal'])}, {gib(sizes.get('MemAvailable', 0))} of it available"
    limit = memory_limit(system)
    if limit and limit < sizes["MemTotal"]:
        found += f"; the control group limits it to {gib(limit)}"
    return Finding("machine", "memory", "ok", found)


def _shared(folder: Path) -> Finding:
    what = str(Path("/") / folder.relative_to(folder.parents[1]))
    try:
        size = shutil.disk_usage(folder)
    except OSError:
        found = "there is none: MPI keeps what ranks of a host share in its session folder"
        return Finding("machine", what, "note", found)
    return shared_finding(what, size.total, size.free)


def shared_finding(what: str, total: int, free: int) -> Finding:
    """Return the finding of the memory in which ranks of a host share data sets; in bytes."""
    found = f"{gib(total)}, {gib(free)} of it free"
    if free >= _LEAST_SHARED:
        return Finding("machine", what, "ok", found)
    found += (
        ": each data set is there once for all ranks of a host, and where it does not fit, they "
        "end with a bus error"
    )
    fix = f"docker run --shm-size 8g, or as root: mount -o remount,size=8G {what}"
    return Finding("machine", what, "note", found, fix)


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return files_finding(soft, hard)


def files_finding(soft: int, hard: int) -> Finding:
    """Return the finding of how many files a process may have open, and how many at most."""
    if soft == resource.RLIM_INFINITY or soft >= _LEAST_FILES:
        found = "without limit" if soft == resource.RLIM_INFINITY else f"{soft} per process"
        return Finding("machine", "open files", "ok", found)
    most = _LEAST_FILES if hard == resource.RLIM_INFINITY else min(hard, _LEAST_FILES)
    found = f"{soft} per process: a launcher needs some for each rank of a host"
    fix = f"ulimit -n {most}" if most > soft else "ask the site for a higher limit (ulimit -Hn)"
    return Finding("machine", "open files", "note", found, fix)


def gib(size: int) -> str:
    """Return a size in bytes as text."""
    return f"{size / _GIB:.1f} GiB"
