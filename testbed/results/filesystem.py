"""What a file system does with the order of writes, which SWMR rests on, and with locks."""

from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
# What one client writes, others may see in another order, or not before the file is closed.
_WITHOUT_ORDER = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "afs", "ncpfs", "vboxsf", "fuse")
)
# These are used by one machine, or coherent.
_ORDERED_FUSE = frozenset(("fuseblk", "fuse.glusterfs", "fuse.ceph", "fuse.lustre"))
# Coherent, but flock(2) becomes a record lock of the whole file.
_ONE_KIND_OF_LOCKS = frozenset(("lustre",))


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


def locks_meet(place: Path, mounts: Path = _MOUNTS) -> bool:
    """Return whether HDF5's own lock on a file may meet the one that its writer holds.

    HDF5 locks by flock(2), `testbed.results.output` by records. Local file systems tell the two
    apart, and so do CephFS, BeeGFS, GFS2 and OCFS2; GPFS leaves the first to each node. The clients
    of Lustre, NFS, SMB, AFS and 9P make one of the other. Little is lost without HDF5's lock: it
    also marks a file of this program that is open for writing, in the file itself.

    Parameters
    ----------
    place
        The file, or its folder.
    mounts
        Table of mounts, as Linux has it.
    """
    return file_system(place, mounts) in _ONE_KIND_OF_LOCKS or not has_write_order(place, mounts)


def file_system(folder: Path, mounts: Path = _MOUNTS) -> str:
    """Return the type of the file system of a folder or file, as ``ext4``; empty if unknown.

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
