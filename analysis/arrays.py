"""Reads single arrays from NumPy's files; nothing in them is ever unpickled."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.data.npz import Archive
from testbed.errors import UserError, suggest

_NPY, _ZIP = b"\x93NUMPY", b"PK"


def read_array(given: str) -> NDArray[Any]:
    """Return an array of numbers.

    Parameters
    ----------
    given
        ``FILE.npy``, ``FILE.npz`` with a single array, or ``FILE.npz:NAME``.

    Raises
    ------
    UserError
        There is no such file or array, it is damaged, or it holds no numbers.
    """
    path, name = Path(given), ""
    if not path.exists() and ".npz:" in given:
        stem, _, name = given.rpartition(":")
        path = Path(stem)
    if not path.is_file():
        found = "this is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {found}, expected an array in a .npy or .npz file")
    try:
        array = _load(path, name)
    except UserError:
        raise
    # NumPy reads the header with Python's own parser, which can fail in many ways.
    except Exception as error:
        reason = str(error).partition("\n")[0][:120] or type(error).__name__
        if "allow_pickle" in reason or "Python objects" in reason:
            reason = "it holds Python objects, not numbers: save it as an array of floats"
        raise UserError(f"{path}: cannot read the array: {reason}") from None
    if array.dtype.kind not in "fiu":
        raise UserError(f"{given}: found an array of {array.dtype}, expected real numbers")
    return array


def _load(path: Path, name: str) -> NDArray[Any]:
    with path.open("rb") as file:
        start = file.read(len(_NPY))
        if start == _NPY:
            # Mapped, a header that promises more than there is fails before memory is claimed.
            # Copied, since the file may be written to later.
            return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
        if not start.startswith(_ZIP):
            raise UserError(f"{path}: this is no .npy or .npz file")
    with Archive.open(path) as archive:
        names = sorted(archive.names)
        if not name and len(names) != 1:
            raise UserError(
                f"{path}: there are {len(names)} arrays: name one as {path}:NAME "
                f"({', '.join(names)[:200] or 'none'})"
            )
        chosen = name or names[0]
        if chosen not in names:
            raise UserError(f"{path}: there is no array {chosen!r}: {suggest(chosen, names)}")
        return archive.array(chosen)
