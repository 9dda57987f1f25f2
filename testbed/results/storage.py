"""How a results file that is being written comes into being, and gets safely onto the disk.

Two ways. With SWMR, HDF5 orders its writes to the file so that it is consistent at every moment;
that rests on the order of writes of the file system. Elsewhere, rounds are written to a working
file, of which each commit makes a copy that takes the name that readers look for.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol

import h5py

from testbed.errors import UserError
from testbed.results.filesystem import has_write_order
from testbed.results.output import has_name, hold, partial_path, reason, unborn_path

# Files that HDF5 2 writes as `latest` cannot be read by 1.14.
LIBVER = ("v110", "v110")
# HDF5 raises either where the disk is full.
FAILURES = (OSError, RuntimeError)
# Copies may take one part in so many of a run.
_SHARE = 10


class Storage(Protocol):
    """A results file that is being written."""

    @property
    def file(self) -> h5py.File:
        """The file to write to; closed by `close`, and another one after each `commit`."""

    @property
    def pause(self) -> float:
        """Seconds between two commits that would not slow down the run."""

    def order(self) -> None:
        """Make everything written so far get to the disk before anything written later."""

    def commit(self) -> None:
        """Make everything written so far visible to readers, whatever happens from now on."""

    def in_place(self) -> bool:
        """Return whether the file that readers look for is still there, and this run's."""

    def close(self) -> None:
        """Close the file and release the lock on it."""


class SwmrStorage:
    """A file that HDF5 itself keeps readable (single writer, multiple readers)."""

    pause = 0.0

    def __init__(self, file: h5py.File, lock: IO[bytes], path: Path) -> None:
        self.file = file
        self._lock, self._path = lock, path

    def order(self) -> None:
        """See `Storage`."""
        self.file.flush()

    def commit(self) -> None:
        """See `Storage`."""
        # All else is on the disk since `order`.
        self.file["committed_rounds"].flush()

    def in_place(self) -> bool:
        """See `Storage`."""
        return has_name(self._lock.fileno(), partial_path(self._path))

    def close(self) -> None:
        """See `Storage`."""
        try:
            self.file.close()
        finally:
            self._lock.close()


class CopyingStorage:
    """A working file, and a copy of it for readers, which a commit replaces as a whole.

    Parameters
    ----------
    working
        An HDF5 file that is closed. It is removed in the end.
    path
        Name that the results file will have when it is complete.
    check
        Called before the first copy takes its name.
    """

    def __init__(self, working: Path, path: Path, check: Callable[[], None]) -> None:
        self._working, self._path = working, path
        self.pause = 0.0
        self._lock = self._publish(check)
        self.file = self._open()

    def order(self) -> None:
        """See `Storage`: nobody reads the working file."""

    def commit(self) -> None:
        """See `Storage`."""
        started = time.monotonic()
        # What fails is to fail here. Only a file that is closed says that it is consistent.
        self.file.flush()
        self.file.close()
        try:
            lock = self._publish()
        finally:
            self.file = self._open()
        self._lock.close()
        self._lock = lock
        self.pause = _SHARE * (time.monotonic() - started)

    def in_place(self) -> bool:
        """See `Storage`."""
        return has_name(self._lock.fileno(), partial_path(self._path))

    def close(self) -> None:
        """See `Storage`."""
        try:
            self.file.close()
        finally:
            self._lock.close()
            self._working.unlink(missing_ok=True)

    def _open(self) -> h5py.File:
        # No other process knows the file, and such file systems may have no locks.
        return h5py.File(self._working, "r+", libver=LIBVER, locking=False)

    def _publish(self, check: Callable[[], None] | None = None) -> IO[bytes]:
        unborn = unborn_path(self._path)
        try:
            shutil.copyfile(self._working, unborn)
            return _take(unborn, self._path, check)
        except BaseException:
            unborn.unlink(missing_ok=True)
            raise


def begin(
    path: Path,
    fill: Callable[[h5py.File], None],
    check: Callable[[], None],
    mode: str = "auto",
) -> Storage:
    """Create the file that a run writes to, and give it the name that readers look for.

    A file whose writer dies before it is declared cannot be read: it gets its name afterwards, in
    place of any other of that name.

    Parameters
    ----------
    path
        Name that the file will have when it is complete.
    fill
        Declares its content.
    check
        Raises `UserError` where the name must not be taken; called at the last moment.
    mode
        ``swmr``, ``flush`` (copies), or ``auto``: copies where the file system has no order of
        writes, or HDF5 cannot do without them.

    Raises
    ------
    UserError
        The file cannot be created, or its name not be taken.
    """
    if mode == "auto" and not has_write_order(path.parent):
        mode = "flush"
    unborn, working = unborn_path(path), path.with_name(path.name + ".working")
    file = None
    try:
        for left in (unborn, working):
            left.unlink(missing_ok=True)
        file = h5py.File(unborn, "x", libver=LIBVER, locking=None if mode != "flush" else False)
        fill(file)
        if mode != "flush":
            try:
                file.swmr_mode = True
            except FAILURES:
                if mode == "swmr":
                    raise
                mode = "flush"
        if mode == "flush":
            file.close()
            unborn.replace(working)
            return CopyingStorage(working, path, check)
        lock = _take(unborn, path, check)
    except BaseException as error:
        if file is not None:
            abandon(file)
        for left in (unborn, working):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)
        if isinstance(error, FAILURES):
            raise UserError(f"{unborn}: cannot create the results file: {reason(error)}") from None
        raise
    return SwmrStorage(file, lock, path)


def abandon(file: h5py.File) -> None:
    """Close a file that could not be written; what HDF5 still has to write is lost.

    HDF5 2.0 fails again in closing such a file, complains of each dataset that Python lets go of,
    and crashes at the end of the program: so let it write to nowhere.
    """
    with contextlib.suppress(Exception):
        descriptor = file.id.get_vfd_handle()
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
    with contextlib.suppress(Exception):
        file.close()


def _take(unborn: Path, path: Path, check: Callable[[], None] | None = None) -> IO[bytes]:
    """Lock a file, get it onto the disk, and give it the name that readers look for."""
    lock = unborn.open("r+b")
    try:
        hold(lock.fileno())
        os.fsync(lock.fileno())
        if check is not None:
            check()
        unborn.replace(partial_path(path))
    except BaseException:
        lock.close()
        raise
    return lock
