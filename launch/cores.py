"""The cores that ranks on this machine have, and whether they may be bound to them."""

import os
from pathlib import Path

from launch.checks_machine import cpu_limit, cpu_set, physical_cores

_ROOT = Path("/")


def own_cpus() -> list[int]:
    """Return the numbers of the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux has it
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def count_cores(cpus: list[int], system: Path = _ROOT) -> int:
    """Return how many ranks CPUs are enough for: two hardware threads of a core are one.

    Parameters
    ----------
    cpus
        Their numbers.
    system
        Root of the file system, with ``/proc`` and ``/sys``.
    """
    cores = physical_cores(system, cpus) or len(cpus)
    limit = cpu_limit(system)
    return max(1, min(cores, int(limit)) if limit else cores)


def may_bind(cpus: list[int], system: Path = _ROOT) -> bool:
    """Return whether a launcher that binds ranks to cores takes these CPUs, and not others.

    Launchers look at the machine, or at the set of its control group: they do not know of
    taskset(1), and would take the first cores, for each of several runs the same.

    Parameters
    ----------
    cpus, system
        As of `count_cores`.
    """
    known = cpu_set(system) or range(os.cpu_count() or 1)
    return set(cpus) >= set(known)
