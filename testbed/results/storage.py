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
from testbed.results.filesystem import has_write_order, locks_meet
from testbed.results.output import (
    claim,
    compact_path,
    has_name,
    partial_path,
    reason,
    unborn_path,
)
from testbed.results.room import release, reserve
from testbed.results.schema import PAGE_BYTES

# Files that HDF5 2 writes as `latest` cannot be read by 1.14.
LIBVER = ("v110", "v110")
# A kill can cut a write between two pages of memory: nothing small is to lie across them. That
# takes a tenth more room.
_PAGED = {"fs_strategy": "page", "fs_page_size": PAGE_BYTES}
# HDF5 raises either where the disk is full.
FAILURES = (OSError, RuntimeError)
# What switching to SWMR, or a commit, may write beside the arrays, in bytes.
SLACK = 1 << 16
# Copies may take one part in so many of a run.
_SHARE = 10

_abandoned: list[h5py.File] = []


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

    def abandon(self) -> None:
        """Keep HDF5 from writing any more, after it has failed to write."""

    def close(self) -> None:
        """Close the file and release the lock on it."""


class SwmrStorage:
    """A file that HDF5 itself keeps readable (single writer, multiple readers)."""

    pause = 0.0

    def __init__(self, file: h5py.File, lock: IO[bytes], path: Path) -> None:
        self.file = file
        self._lock, self._path = lock, path
        self._abandoned = False

    def order(self) -> None:
        """See `Storage`."""
        self.file.flush()

    def commit(self) -> None:
        """See `Storage`."""
        # All else is on the disk since `order`.
        self.file["committed_rounds"].flush()

    def in_place(self) -> bool:
        """See `Storage`."""
        # Closed by `close`: what fails behind it is told as it is.
        return self._lock.closed or has_name(self._lock.fileno(), partial_path(self._path))

    def abandon(self) -> None:
        """See `Storage`."""
        self._abandoned = True
        abandon(self.file)

    def close(self) -> None:
        """See `Storage`."""
        try:
            if not self._abandoned:
                self.file.close()
        finally:
            with contextlib.suppress(OSError, ValueError):
                release(self._lock.fileno())
            self._lock.close()


class CopyingStorage:
    """A working file, and a copy of it for readers, which a commit replaces as a whole.

    Parameters
    ----------
    working
        An HDF5 file that is closed. It is removed in the end.
    lock
        On the working file.
    path
        Name that the results file will have when it is complete.
    check
        Called before the first copy takes its name.
    """

    def __init__(
        self, working: Path, lock: IO[bytes], path: Path, check: Callable[[], None]
    ) -> None:
        self._working, self._path, self._working_lock = working, path, lock
        self.pause = 0.0
        self._abandoned = False
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
        # Closed by `close`: what fails behind it is told as it is.
        return self._lock.closed or has_name(self._lock.fileno(), partial_path(self._path))

    def abandon(self) -> None:
        """See `Storage`."""
        self._abandoned = True
        abandon(self.file)

    def close(self) -> None:
        """See `Storage`."""
        if self._working_lock.closed:
            return  # the working file may be another run's by now
        try:
            if not self._abandoned:
                self.file.close()
        finally:
            self._lock.close()
            self._working.unlink(missing_ok=True)
            self._working_lock.close()

    def _open(self) -> h5py.File:
        # No other process knows the file, and such file systems may have no locks.
        return h5py.File(self._working, "r+", libver=LIBVER, locking=False)

    def _publish(self, check: Callable[[], None] | None = None) -> IO[bytes]:
        unborn = unborn_path(self._path)
        lock = claim(unborn)
        try:
            shutil.copyfile(self._working, unborn)
            _take(lock, self._path, check)
        except BaseException:
            unborn.unlink(missing_ok=True)
            lock.close()
            raise
        return lock


def begin(
    path: Path,
    fill: Callable[[h5py.File], None],
    check: Callable[[], None],
    mode: str = "auto",
    copy: tuple[Callable[[h5py.File], None], int] | None = None,
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
    copy
        Adds what is large, and how large that is at most, in bytes.

    Raises
    ------
    UserError
        The file cannot be created, or its name not be taken.
    """
    if mode == "auto" and not has_write_order(path.parent):
        mode = "flush"
    unborn, working = unborn_path(path), path.with_name(path.name + ".working")
    file = None
    lock = _claim(unborn)
    try:
        for left in (working, compact_path(path)):
            _discard(left)
        room = SLACK + (copy[1] if copy else 0)
        # Elsewhere as readers do: HDF5 refuses a file that a process opens in both ways.
        locking = False if mode == "flush" or locks_meet(path.parent) else None
        file = create(unborn, fill, room, locking=locking)
        if copy:
            copy[0](file)
            file.flush()
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
            return CopyingStorage(working, lock, path, check)
        _take(lock, path, check)
    except BaseException as error:
        if file:
            abandon(file)
        for left in (unborn, working):
            with contextlib.suppress(OSError):
                if has_name(lock.fileno(), left):
                    left.unlink()
        lock.close()
        if isinstance(error, FAILURES):
            needs = f"; it may need {copy[1] / 1e6:.1f} MB beside the old one" if copy else ""
            raise UserError(
                f"{unborn}: cannot create the results file: {_why(error)}{needs}"
            ) from None
        raise
    return SwmrStorage(file, lock, path)


def create(
    path: Path,
    fill: Callable[[h5py.File], None],
    room: int,
    *,
    paged: bool = True,
    locking: bool | None = None,
) -> h5py.File:
    """Create a file, and make sure that it can grow by so many bytes.

    It is declared in memory: HDF5 does not survive a disk that is full.
    """
    more = _PAGED if paged else {}
    with h5py.File(path, "w", driver="core", backing_store=False, libver=LIBVER, **more) as image:
        fill(image)
        image.flush()
        path.write_bytes(image.id.get_file_image())
    file = h5py.File(path, "r+", libver=LIBVER, locking=locking)
    try:
        reserve(file.id.get_vfd_handle(), room)
    except OSError:
        file.close()
        raise
    return file


def abandon(file: h5py.File) -> None:
    """Let go of a file that could not be written.

    HDF5 2.0 fails again for each dataset of such a file that Python lets go of, says so in many
    lines, and crashes when the file is closed: so what it still has to write goes nowhere, and the
    file is never closed.
    """
    _abandoned.append(file)
    with contextlib.suppress(Exception):
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, file.id.get_vfd_handle())
        os.close(nowhere)


def _why(error: Exception) -> str:
    # Of a file system that `locks_meet` does not know, or by the variable, which overrides it.
    if "unable to lock file" in str(error):
        return f"HDF5 cannot lock it ({reason(error)}): set HDF5_USE_FILE_LOCKING=FALSE"
    return reason(error)


def _claim(path: Path) -> IO[bytes]:
    try:
        return claim(path)
    except OSError as error:
        raise UserError(f"{path}: cannot create the results file: {reason(error)}") from None


def _discard(path: Path) -> None:
    """Remove what a dead writer may have left, but nothing that another one is writing."""
    if path.is_symlink() or path.exists():
        with claim(path):
            path.unlink()


def _take(lock: IO[bytes], path: Path, check: Callable[[], None] | None = None) -> None:
    """Get a locked file onto the disk, and give it the name that readers look for."""
    os.fsync(lock.fileno())
    if check is not None:
        check()
    unborn_path(path).replace(partial_path(path))
