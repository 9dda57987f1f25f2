"""Finds and opens an HDF5 file for reading, whatever its writer is doing or did."""

import time
from pathlib import Path

import h5py

from testbed.errors import UserError
from testbed.heaps import check_heaps
from testbed.results.filesystem import locks_meet

PARTIAL = ".partial"
_ATTEMPTS, _PAUSE_SECONDS = 5, 0.05


def locate(path: Path) -> Path:
    """Return the file that a name stands for: itself, or with or without ``.partial``."""
    partial = path.with_name(path.name + PARTIAL) if path.name else path
    final = path.with_name(path.name.removesuffix(PARTIAL)) if path.name else path
    for candidate in (path, partial, final):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise UserError(f"{path}: this is a folder, expected a results file")
    raise UserError(f"{path}: no such file, nor {partial.name}")


def open_file(path: Path) -> h5py.File:
    """Open an HDF5 file for reading, by SWMR where a writer has it open or died while it had.

    HDF5 locks it meanwhile as its settings say, but not where that would meet the writer's lock.
    """
    _check(path)
    locking = False if locks_meet(path) else None
    for attempt in range(_ATTEMPTS):
        try:
            return h5py.File(path, "r", locking=locking)
        except OSError as error:
            if "already open for write" in str(error):
                break
            # A file that is just growing may say that it is longer than it is.
            if "truncated" not in str(error) or attempt == _ATTEMPTS - 1:
                raise _cannot_open(path, error) from None
            time.sleep(_PAUSE_SECONDS)
    try:
        return h5py.File(path, "r", swmr=True, locking=locking)
    except OSError as error:
        raise _cannot_open(path, error) from None


def _check(path: Path) -> None:
    try:
        check_heaps(path)
    except OSError as error:
        raise _cannot_open(path, error) from None
    except ValueError as error:
        if "signature" in str(error):
            raise _cannot_open(path, OSError(str(error))) from None
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: the file is truncated or damaged ({reason}): copy it again, or, where a run was "
        "writing it, begin again with `run --overwrite`"
    )


def _cannot_open(path: Path, error: OSError) -> UserError:
    reason = str(error)
    if isinstance(error, PermissionError):
        return UserError(f"{path}: no permission to read the file")
    if "lock file" in reason:
        return UserError(
            f"{path}: the file is locked: a run holds it open without SWMR, or the file system "
            "does not support locks; wait for the run, or set HDF5_USE_FILE_LOCKING=FALSE"
        )
    if "signature not found" in reason:
        return UserError(f"{path}: this is no HDF5 file, expected a results file of this testbed")
    if "not already open for SWMR" in reason:
        return UserError(
            f"{path}: a writer without SWMR has the file open, or was killed while it had; if no "
            f"run writes it, clear its flags with: h5clear -s {path}"
        )
    if "truncated" in reason or "checksum" in reason:
        return _damaged(path, reason)
    return UserError(f"{path}: HDF5 cannot open the file: {reason}")
