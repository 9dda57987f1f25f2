"""A data set in one HDF5 file, as `testbed.data.packing` writes it."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from testbed.data.dataset import Images, check_counts, check_labels, number_users, require_root
from testbed.data.lazy import LazyDataset
from testbed.errors import UserError
from testbed.heaps import check_heaps

if TYPE_CHECKING:
    import h5py

ENCODING = "testbed-dataset"
VERSION = "1.0"
_FIX = "write it again with: testbed data pack"
_BLOCK_BYTES = _MOST_CHUNK_BYTES = 1 << 24
# Deflate cannot do better than 1032 to 1; what claims more does not hold what it claims.
_MAX_RATIO = 1040


def open_packed(root: Path | None) -> LazyDataset:
    """Return the data set that a file of ``testbed data pack`` holds.

    Parameters
    ----------
    root
        The file: root attributes ``encoding-type`` ("testbed-dataset"), ``encoding-version``
        (1.x), ``name``, ``variant``, ``classes``, ``scale``, and ``test_start`` where there is an
        official test split; arrays ``images`` (uint8 or float32 ``[n, c, h, w]``), ``labels``
        (integers ``[n]``), and ``users`` (integers ``[n]``, -1 for nobody, otherwise any numbers
        from 0: they are numbered as in `Dataset`) and ``class_names`` (strings) where these are
        known.

    Raises
    ------
    UserError
        If the file is missing, damaged, or another HDF5 file; on reading the images, if
        ``images * scale`` is not in [0, 1].
    """
    path = require_root("packed", root, "file")
    with _open(path) as file:
        _check_encoding(path, file)
        images = _array(path, file, "images", 4, "uf")
        count, *shape = images.shape
        if images.dtype not in (np.uint8, np.float32):
            raise UserError(
                f"{path}: 'images' is {images.dtype}; expected uint8 or float32; {_FIX}"
            )
        dtype = np.dtype(images.dtype)
        labels = _array(path, file, "labels", 1, "iu")[()].astype(np.int64)
        check_counts(path, count, len(labels))
        classes = _integer(path, file, "classes")
        test_start = _integer(path, file, "test_start") if "test_start" in file.attrs else None
        scale = file.attrs.get("scale")
        users = _users(path, file, len(labels))
        class_names = _class_names(path, file, classes)
        name, variant = (_text(path, file, key) for key in ("name", "variant"))
    check_labels(path, labels, classes)
    if not isinstance(scale, np.floating) or not 0 < scale < math.inf:
        raise UserError(f"{path}: 'scale' is {str(scale)[:40]}; expected a positive number; {_FIX}")
    if test_start is not None and not 0 < test_start < count:
        raise UserError(
            f"{path}: 'test_start' is {test_start}; expected 1..{count - 1}, or none; {_FIX}"
        )
    return LazyDataset(
        name=name,
        labels=labels,
        classes=classes,
        scale=float(scale),
        test_start=test_start,
        shape=(shape[0], shape[1], shape[2]),
        dtype=dtype,
        read=lambda chosen: _read(path, chosen, float(scale)),
        users=None if users is None else number_users(users, test_start),
        class_names=class_names,
        variant=variant,
    )


def holds_dataset(path: Path) -> bool:
    """Return whether a file is one of ``testbed data pack``; False where it cannot be opened."""
    try:
        with _open(path) as file:
            return bool(file.attrs.get("encoding-type") == ENCODING)
    except UserError:
        return False


@contextlib.contextmanager
def _open(path: Path, *, known: bool = False) -> Iterator["h5py.File"]:
    """Open a file; one that is ``known`` has been looked through before."""
    import h5py

    try:
        if not known:
            check_heaps(path)
        # Nobody writes a packed file after its rename: locks, which some clusters lack, are for
        # nothing.
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except UserError:
        raise
    # HDF5 reports damage in many ways, some of them only when the elements are read.
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path}: not a readable HDF5 file ({reason}); expected one that testbed data pack "
            "wrote"
        ) from error


def _check_encoding(path: Path, file: "h5py.File") -> None:
    found, version = (file.attrs.get(f"encoding-{key}") for key in ("type", "version"))
    if not isinstance(found, str) or found != ENCODING:
        what = f"of the encoding {found[:40]!r}" if isinstance(found, str) else "of another kind"
        members = ", ".join(repr(name[:20]) for name in sorted(file)[:6]) or "nothing"
        raise UserError(
            f"{path}: an HDF5 file {what} (it holds {members}); expected a data set that testbed "
            "data pack wrote"
        )
    if str(version).split(".")[0] != VERSION.split(".")[0]:
        raise UserError(
            f"{path}: written in version {str(version)[:20]} of the format; expected {VERSION}: "
            "update the testbed, or pack the data again"
        )


def _array(path: Path, file: "h5py.File", name: str, ndim: int, kinds: str) -> "h5py.Dataset":
    """Return an array, once its elements are known to be in this file."""
    import h5py

    link = file.get(name, getlink=True)
    item = file.get(name) if isinstance(link, h5py.HardLink) else None
    if not isinstance(item, h5py.Dataset) or item.is_virtual or item.external:
        raise UserError(f"{path}: holds no array {name!r} of its own; {_FIX}")
    if item.dtype.kind not in kinds or item.ndim != ndim or 0 in item.shape:
        raise UserError(
            f"{path}: {name!r} is {item.dtype} of shape {item.shape}; expected {ndim} dimensions, "
            f"none of them 0; {_FIX}"
        )
    chunk = math.prod(item.chunks or ()) * item.dtype.itemsize
    # One piece is unpacked as a whole, however little of it is wanted.
    if chunk > max(_MOST_CHUNK_BYTES, item.nbytes):
        raise UserError(f"{path}: {name!r} has pieces of {chunk} bytes; {_FIX}")
    stored = item.id.get_storage_size()
    if item.nbytes > _MAX_RATIO * stored:
        raise UserError(
            f"{path}: {name!r} announces {item.nbytes} bytes, but the file holds {stored} of it; "
            f"the file is incomplete: {_FIX}"
        )
    return item


def _users(path: Path, file: "h5py.File", count: int) -> NDArray[np.int64] | None:
    if "users" not in file:
        return None
    users = _array(path, file, "users", 1, "iu")[()]
    if len(users) != count or users.min() < -1 or users.max() > np.iinfo(np.int64).max:
        raise UserError(f"{path}: 'users' are not a number of 0 or more, or -1, per image; {_FIX}")
    kept: NDArray[np.int64] = users.astype(np.int64)
    return kept


def _class_names(path: Path, file: "h5py.File", classes: int) -> tuple[str, ...] | None:
    if "class_names" not in file:
        return None
    names = _array(path, file, "class_names", 1, "OS").asstr()[()]
    if len(names) != classes:
        raise UserError(f"{path}: {len(names)} class names for {classes} classes; {_FIX}")
    return tuple(map(str, names))


def _integer(path: Path, file: "h5py.File", name: str) -> int:
    value = file.attrs.get(name)
    if not isinstance(value, np.integer) or value < 1:
        raise UserError(
            f"{path}: {name!r} is {str(value)[:40]}; expected an integer from 1; {_FIX}"
        )
    return int(value)


def _text(path: Path, file: "h5py.File", name: str) -> str:
    value = file.attrs.get(name)
    if not isinstance(value, str):
        raise UserError(f"{path}: {name!r} is {str(value)[:40]}; expected text; {_FIX}")
    return value


def _read(path: Path, chosen: slice | NDArray[np.int64], scale: float) -> Images:
    with _open(path, known=True) as file:
        stored = _array(path, file, "images", 4, "uf")
        if isinstance(chosen, slice):
            images: NDArray[Any] = stored[chosen]
        else:
            # HDF5 is slow at selecting single images: whole pieces, of which some are kept.
            images = np.empty((len(chosen), *stored.shape[1:]), stored.dtype)
            step = max(1, _BLOCK_BYTES * len(stored) // stored.nbytes)
            for start in range(0, len(stored), step):
                here = (chosen >= start) & (chosen < start + step)
                if here.any():
                    images[here] = stored[start : start + step][chosen[here] - start]
    if images.size:
        low, high = float(images.min()), float(images.max())
        if math.isnan(low):
            raise UserError(f"{path}: 'images' holds values that are no numbers; {_FIX}")
        # As much above 1 as a scale or values in single precision can lead to.
        if low < 0 or high * scale > 1 + 4 * np.finfo(np.float32).eps:
            raise UserError(
                f"{path}: 'images' holds values from {low:g} to {high:g}; expected 0 to "
                f"{1 / scale:g}, which 'scale' takes to 1; {_FIX}"
            )
    return images
