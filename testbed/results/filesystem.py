"""Whether a file system has the order of writes that SWMR rests on."""

from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
# What one client writes, others may see in another order, or not before the file is closed.
_WITHOUT_ORDER = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "afs", "ncpfs", "vboxsf", "fuse")
)
# These are used by one machine, or coherent.
_ORDERED_FUSE = frozenset(("fuseblk", "fuse.glusterfs", "fuse.ceph", "fuse.lustre"))


def has_write_order(folder: Path, mounts: Path = _MOUNTS) -> bool:
    """Return whether readers see what is written to files of a folder in the order of writing.

    POSIX asks for it; network file systems that cache on each client do without. True where it
    cannot be found out.

    Parameters
    ----------
    folder
        An existing folder.
    mounts
        Table of mounts, as Linux has it.
    """
    kind = file_system(folder, mounts)
    return kind in _ORDERED_FUSE or kind.partition(".")[0] not in _WITHOUT_ORDER


def file_system(folder: Path, mounts: Path = _MOUNTS) -> str:
    """Return the type of the file system that a folder is on, such as ``ext4``; empty if unknown.

    Source: proc_pid_mountinfo(5).
    """
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:  # no Linux
        return ""
    place, found, depth = folder.resolve(), "", -1
    for line in lines:
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not after:
            continue
        mounted = Path(_unescaped(fields[4]))
        # Of those on the same place, the last one covers the others.
        if place.is_relative_to(mounted) and len(mounted.parts) >= depth:
            found, depth = after.split(" ")[0], len(mounted.parts)
    return found


def _unescaped(name: str) -> str:
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        name = name.replace(octal, character)
    return name
