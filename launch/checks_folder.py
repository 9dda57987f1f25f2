"""The folder that results go to, HDF5 on it, and what has to be seen by all nodes."""

import sys
from collections.abc import Mapping
from pathlib import Path

from launch.checks import Finding, Programs
from launch.checks_machine import gib
from testbed.results.filesystem import file_system, has_write_order

_LEAST_FREE = 2**30
# File systems of one machine, and those that nodes share.
_LOCAL = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay", "apfs")
)
_SHARED = frozenset(
    ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "panfs", "wekafs")
)
_SHARED_FUSE = frozenset(("fuse.glusterfs", "fuse.ceph", "fuse.lustre", "fuse.juicefs"))


def examine_folder(programs: Programs, folder: Path) -> list[Finding]:
    """Look at a folder: whether it can be written to, its locks, and HDF5 on it."""
    found, reason = programs.probe("folder", str(folder), seconds=8)
    error = found.get("error", reason)
    if error:
        fix = "name another folder, or create this one: python -m launch doctor FOLDER"
        text = f"{folder} cannot be written to: {error}"
        return [Finding("files", "folder", "missing", text, fix), *_hdf5(programs, None)]
    kind = file_system(folder) or "of unknown type"
    findings = [free_finding(folder, kind, found["free"])]
    findings.append(locks_finding(found["posix"], found["flock"]))
    return [*findings, *_hdf5(programs, folder)]


def free_finding(folder: Path, kind: str, free: int) -> Finding:
    """Return the finding of a folder that can be written to.

    Parameters
    ----------
    folder, kind
        And the type of its file system.
    free
        In bytes.
    """
    found = f"{folder.resolve()} ({kind}) can be written to, {gib(free)} free"
    if free >= _LEAST_FREE:
        return Finding("files", "folder", "ok", found)
    fix = "make room; `testbed check FILE.yaml` says how large a run's results will be"
    return Finding("files", "folder", "note", found, fix)


def locks_finding(posix: str, flock: str) -> Finding:
    """Return the finding of locks, by why each kind does not work; empty where it does.

    POSIX locks keep two runs from writing the same file, flock(2) is what HDF5 itself uses.
    """
    if not posix and not flock:
        return Finding("files", "locks", "ok", "POSIX locks and flock(2) work between processes")
    broken, fix = [], "mount it with locks (Lustre: -o flock; NFS: rpc.statd)"
    if posix:
        broken.append(f"POSIX locks ({posix}): nothing keeps two runs from writing the same file")
    if flock:
        broken.append(f"flock(2) ({flock}), which HDF5 uses")
        fix += ", or export HDF5_USE_FILE_LOCKING=FALSE"
    return Finding("files", "locks", "note", f"do not work: {'; '.join(broken)}", fix)


def _hdf5(programs: Programs, folder: Path | None) -> list[Finding]:
    found, reason = programs.probe("hdf5", *([str(folder)] if folder else []), seconds=10)
    if not found:
        fix = "pip install '.[run]' in the repository"
        text = f"h5py cannot be imported ({reason})"
        if reason.startswith("no "):
            fix = "put the environment and the folder on a faster file system, or try --patience 5"
            return [Finding("files", "HDF5", "note", f"h5py: {reason}", fix)]
        return [Finding("files", "HDF5", "missing", text, fix)]
    versions = Finding("files", "HDF5", "ok", f"{found['hdf5']}, by h5py {found['h5py']}")
    findings = [versions, *locking_findings(programs.environment)]
    if not folder:
        return findings
    if found["error"]:
        fix = "export HDF5_USE_FILE_LOCKING=FALSE, or name another folder"
        text = f"no file can be created in {folder}: {found['error']}"
        return [*findings, Finding("files", "results", "missing", text, fix)]
    return [*findings, mode_finding(has_write_order(folder), found["swmr"])]


def locking_findings(environment: Mapping[str, str]) -> list[Finding]:
    """Return what HDF5 has been told about locks, where it has."""
    name = "HDF5_USE_FILE_LOCKING"
    value = environment.get(name)
    if value is None:
        return []
    known = ("TRUE", "1", "FALSE", "0", "BEST_EFFORT")
    if value.upper() not in known:
        fix = f"export {name}=FALSE, or unset {name}"
        found = f"{name}={value}, expected one of {', '.join(known)}"
        return [Finding("files", "HDF5's locks", "note", found, fix)]
    return [Finding("files", "HDF5's locks", "ok", f"{name}={value}")]


def mode_finding(ordered: bool, refused: str) -> Finding:
    """Return how a run would write its results with ``results.mode: auto``.

    Parameters
    ----------
    ordered
        Whether the file system keeps the order of writes.
    refused
        Why HDF5 does not switch to SWMR; empty where it does.
    """
    if ordered and not refused:
        return Finding("files", "results", "ok", "written with SWMR, readable at any moment")
    reason = refused or "this file system does not keep the order of writes"
    found = f"written in flush mode, readable at any moment, at a higher cost per commit: {reason}"
    return Finding("files", "results", "note", found)


def examine_nodes(folder: Path, nodes: int, mounts: Path | None = None) -> list[Finding]:
    """Look at what several nodes have to see alike; a machine has as many as Slurm has, or one.

    Parameters
    ----------
    folder
        An existing folder, for results.
    nodes
        How many nodes may take part.
    mounts
        Table of mounts, where it is not the system's.
    """
    given = {} if mounts is None else {"mounts": mounts}
    found = "not used: nothing is fetched at run time"
    findings = [Finding("nodes", "network", "ok", found)]
    for what, place in (("results", folder.resolve()), ("environment", Path(sys.prefix))):
        findings.append(sharing_finding(what, place, file_system(place, **given), nodes))
    found = "data sets (data.root) and weights must be where all nodes see them, as results are"
    return [*findings, Finding("nodes", "data", "ok", found)]


def sharing_finding(what: str, place: Path, kind: str, nodes: int) -> Finding:
    """Return whether all nodes see a folder, by the type of its file system."""
    named = f"{place} ({kind or 'of unknown type'})"
    if kind in _SHARED | _SHARED_FUSE:
        return Finding("nodes", what, "ok", f"{named} is on a network file system")
    if nodes < 2:
        return Finding("nodes", what, "ok", f"{named}, seen by this machine")
    fix = f"unless you know that all nodes see {place}: use a folder on a network file system"
    if kind in _LOCAL:
        found = f"{named} looks local to this machine, and Slurm has {nodes} nodes"
    else:
        found = f"{named}: not known whether all {nodes} nodes see it"
    return Finding("nodes", what, "note", found, fix)
