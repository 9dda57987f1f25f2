"""Writes a data set into one HDF5 file, which `testbed.data.packed` reads."""

import contextlib
import datetime as dt
import os
from pathlib import Path

import numpy as np

import testbed
from testbed.data.lazy import LazyDataset
from testbed.data.packed import ENCODING, VERSION
from testbed.errors import UserError

_CHUNK_BYTES = 1 << 20


def pack(data: LazyDataset, path: Path, *, source: str, overwrite: bool = False) -> None:
    """Write a data set into one HDF5 file; as long as it is not whole, it has another name.

    Images are read and written bit by bit: no memory is needed for all of them. They are stored as
    they are, with checksums, without compression.

    Parameters
    ----------
    data
        What to write.
    path
        The file; `testbed.data.packed.open_packed` has its layout.
    source
        Where the data come from, for whoever reads the file.
    overwrite
        Whether a file of that name is replaced.

    Raises
    ------
    UserError
        If the file exists and is not to be replaced, or cannot be written, or if images cannot be
        read.
    """
    # The process's number: two that pack at a time do not write the same file.
    partial = path.parent / f"{path.name}.{os.getpid()}.partial"
    try:
        if path.is_dir():
            raise UserError(f"{path}: this is a folder; expected the name of a file to write")
        if not path.parent.is_dir():
            raise UserError(f"{path.parent}: no such folder; make it, or choose another place")
        if path.exists() and not overwrite:
            raise UserError(f"{path}: exists; choose another name, or replace it with --overwrite")
        _write(data, partial, source)
        partial.replace(path)
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path}: cannot be written: {error.object!a} is not UTF-8; rename the folder that "
            "is called so"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
        raise UserError(
            f"{path}: cannot be written ({reason}); expected a place with room for "
            f"{len(data.labels) * data.image_bytes} bytes"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _write(data: LazyDataset, path: Path, source: str) -> None:
    import h5py

    count = len(data.labels)
    with h5py.File(path, "w") as file:
        file.attrs["encoding-type"] = ENCODING
        file.attrs["encoding-version"] = VERSION
        file.attrs["name"] = data.name
        file.attrs["variant"] = data.variant
        file.attrs["classes"] = data.classes
        file.attrs["scale"] = data.scale
        if data.test_start is not None:
            file.attrs["test_start"] = data.test_start
        file.attrs["source"] = source
        file.attrs["created"] = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        file.attrs["software"] = f"label-leakage-testbed {testbed.__version__}"
        file.create_dataset("labels", data=data.labels)
        if data.users is not None:
            file.create_dataset("users", data=data.users)
        if data.class_names is not None:
            # Not an attribute: those may have 64 kB.
            names = np.array(data.class_names, object)
            file.create_dataset("class_names", data=names, dtype=h5py.string_dtype())
        images = file.create_dataset(
            "images",
            shape=(count, *data.shape),
            dtype=data.dtype,
            chunks=(min(count, max(1, _CHUNK_BYTES // data.image_bytes)), *data.shape),
            fletcher32=True,
        )
        for start, block in data.blocks():
            images[start : start + len(block)] = block
    with path.open("rb") as written:
        os.fsync(written.fileno())
