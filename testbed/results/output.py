"""The names of a results file while it is written, and who may write it."""

import errno
import fcntl
import os
import re
import struct
from pathlib import Path
from typing import IO

from testbed.errors import UserError
from testbed.results.opening import PARTIAL

# The command that locks an open file, and its argument: struct flock with 64-bit offsets.
_OWNED: int | None = getattr(fcntl, "F_OFD_SETLK", None)
_WHOLE_FILE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


def partial_path(path: Path) -> Path:
    """Return the name that a results file has while it is being written."""
    return path.with_name(path.name + PARTIAL)


def unborn_path(path: Path) -> Path:
    """Return the name that a results file has before it can be read."""
    return path.with_name(path.name + ".creating")


def compact_path(path: Path) -> Path:
    """Return the name of a copy without unused space, which takes the results file's place."""
    return path.with_name(path.name + ".compact")


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise `UserError` where a results file could not be created."""
    check_folder(path)
    partial = partial_path(path)
    if partial.exists():
        with open_to_write(partial) as file:
            if not hold(file.fileno()):
                raise being_written(partial)
    if overwrite:
        return
    if path.exists():
        raise UserError(
            f"{path}: the file exists: choose another name, or pass --overwrite to replace it"
        )
    if partial.exists():
        raise UserError(
            f"{partial}: the file exists: it was left by a run that was stopped; go on with it by "
            "`resume`, choose another name, or pass --overwrite to discard its rounds"
        )


def check_folder(path: Path) -> None:
    """Raise `UserError` where no results file of that name could be."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist: create it first")
    if path.is_dir():
        raise UserError(f"{path}: this is a folder, expected the name of a results file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: the folder {path.parent} cannot be written to")
    partial = partial_path(path)
    if partial.is_dir():
        raise UserError(f"{partial}: this is a folder: choose another name for the results")
    for name in (path, partial):
        if name.exists() and not name.is_file():
            raise UserError(f"{name}: this is a device, a pipe or a socket: choose another name")


def open_to_write(partial: Path) -> IO[bytes]:
    """Open an unfinished file as it is, or raise `UserError`."""
    try:
        return partial.open("r+b")
    except OSError as error:
        raise UserError(f"{partial}: the file cannot be written to: {error.strerror}") from None


def being_written(partial: Path) -> UserError:
    """Return the error of a file that another process is writing."""
    return UserError(
        f"{partial}: a run is writing this file: wait until it is done, or choose another name"
    )


def hold(descriptor: int) -> bool:
    """Lock an open file until it is closed; return whether nobody else holds it.

    A record lock, which also works between the nodes of a cluster; where it meets the locks of HDF5
    itself, see `testbed.results.filesystem.locks_meet`. Of the open file where the system has such
    locks (Linux): the older ones, of the process, are lost when it closes any other descriptor of
    the file, as HDF5 does.
    """
    try:
        if _OWNED is None:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            fcntl.fcntl(descriptor, _OWNED, _WHOLE_FILE)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def claim(path: Path) -> IO[bytes]:
    """Open a file that this process is to write, locked; created where there is none.

    A link or a pipe of that name is removed: what a link leads to is somebody else's, and a pipe
    would be waited for.

    Raises
    ------
    UserError
        Another process has it.
    """
    while True:
        if path.is_symlink() or path.is_fifo():
            path.unlink(missing_ok=True)
        lock = path.open("ab")
        if not hold(lock.fileno()):
            lock.close()
            raise being_written(path)
        if has_name(lock.fileno(), path):
            return lock
        lock.close()


def has_name(descriptor: int, path: Path) -> bool:
    """Return whether an open file still has its name, and no other one has taken it."""
    try:
        named = path.stat()
    except OSError:
        return False
    opened = os.fstat(descriptor)
    return (named.st_ino, named.st_dev) == (opened.st_ino, opened.st_dev)


def reason(error: Exception) -> str:
    """Return what an error of HDF5 or the system says, in a few words."""
    system = re.search("error message = '([^']*)'", str(error))
    if system:
        return system[1]
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]
