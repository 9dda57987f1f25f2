"""A user's own images, from a NumPy archive (``numpy.savez``)."""

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from testbed.data.dataset import Dataset, check_counts, check_labels, require_root
from testbed.errors import UserError

# Deflate cannot do better than 1032 to 1; what claims more does not hold what it claims.
_MAX_RATIO = 1040


def load_npz(root: Path | None) -> Dataset:
    """Return the data set that a NumPy archive holds.

    Parameters
    ----------
    root
        The archive: ``images`` (``[n, h, w]`` or ``[n, c, h, w]``; uint8, or float in [0, 1]) and
        ``labels`` (integers from 0, ``[n]``); optionally ``test_images`` and ``test_labels``, and
        ``classes``, an integer (default: the greatest label and one). Pickled content is refused.

    Raises
    ------
    UserError
        If the file is missing, damaged, or its arrays are not as described.
    """
    path = require_root("npz", root, "file")
    with Archive.open(path) as archive:
        _image_shape(archive)
        labels, classes = _labels(archive)
        images = [_images(archive, f"{prefix}images") for prefix in labels]
    for prefix, part in zip(labels, images, strict=True):
        check_counts(path, len(part), len(labels[prefix]))
        if (part.dtype, part.shape[1:]) != (images[0].dtype, images[0].shape[1:]):
            raise UserError(
                f"{path}: '{prefix}images' are {part.dtype} of shape {part.shape[1:]}; expected "
                f"{images[0].dtype} of shape {images[0].shape[1:]} as 'images'"
            )
    return Dataset(
        name="npz",
        images=_join(images),
        labels=np.concatenate(list(labels.values())),
        classes=classes,
        scale=1 / 255 if images[0].dtype == np.uint8 else 1.0,
        test_start=len(images[0]) if len(images) > 1 else None,
    )


def describe_npz(path: Path) -> tuple[int, tuple[int, int, int]]:
    """Return the classes and the image shape (channels, height, width), without the images.

    Raises
    ------
    UserError
        As `load_npz`, as far as the labels and the images' header show it.
    """
    with Archive.open(path) as archive:
        shape = _image_shape(archive)
        return _labels(archive)[1], shape


class Archive:
    """The arrays of an archive, each refused before memory is given to an impossible claim.

    Attributes
    ----------
    path
        Of the archive.
    names
        Of the arrays.
    """

    def __init__(self, path: Path, file: zipfile.ZipFile) -> None:
        self.path = path
        self._file = file
        self.names = {n.removesuffix(".npy") for n in file.namelist() if n.endswith(".npy")}

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator["Archive"]:
        """Open a file, and close it behind the block; `UserError` if either finds it damaged."""
        try:
            with zipfile.ZipFile(path) as file:
                yield cls(path, file)
        # NotImplementedError and RuntimeError: exotic compression, encryption.
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            OSError,
            RuntimeError,
            ValueError,
        ) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"{path}: not a readable NumPy archive ({reason}); expected one that "
                "numpy.savez wrote, without pickled objects"
            ) from error

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and dtype, once they agree with the size of the member."""
        info = self._file.getinfo(f"{name}.npy")
        # Of others nobody knows a bound on how much a little stands for.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"{self.path}: {name!r} is compressed by method {info.compress_type}; expected 0 "
                "or 8, as numpy.savez and numpy.savez_compressed have it: write it again"
            )
        with self._file.open(info) as member:
            shape, dtype = self._read_header(name, member)
            start = member.tell()
        claimed = start + math.prod(shape) * dtype.itemsize
        # NumPy allocates what the header claims before it reads.
        packed = min(info.compress_size, self.path.stat().st_size)
        if claimed != info.file_size or info.file_size > _MAX_RATIO * (packed + 1):
            raise UserError(
                f"{self.path}: {name!r} announces {claimed} bytes, but the archive holds "
                f"{info.file_size} unpacked from {packed}; expected what numpy.savez "
                "writes: write it again"
            )
        return shape, dtype

    def array(self, name: str) -> NDArray[Any]:
        """Return an array of numbers."""
        self.header(name)
        with self._file.open(f"{name}.npy") as member:
            values: NDArray[Any] = npy.read_array(member, allow_pickle=False)
        return values

    def _read_header(self, name: str, member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        try:
            # Later versions are for arrays with fields, and their headers may have any size.
            version = npy.read_magic(member)
            if version != (1, 0):
                raise ValueError(f"format version {version}, expected (1, 0)")
            shape, _, dtype = npy.read_array_header_1_0(member)
        except zipfile.BadZipFile:
            raise
        # NumPy reads the header with Python's own parser, which can fail in many ways.
        except Exception as error:
            reason = " ".join(str(error).split())[:80]
            raise UserError(
                f"{self.path}: the header of {name!r} is damaged ({reason}); expected what "
                "numpy.savez writes: write it again"
            ) from error
        if dtype.hasobject or any(size < 0 for size in shape):
            raise UserError(
                f"{self.path}: {name!r} is an array of {dtype} of shape {shape}; expected numbers"
            )
        return shape, dtype


def _image_shape(archive: Archive) -> tuple[int, int, int]:
    """Check names and the header of the images; return (channels, height, width)."""
    needed = {"images", "labels"}
    if archive.names & {"test_images", "test_labels"}:
        needed |= {"test_images", "test_labels"}
    if missing := needed - archive.names:
        found = ", ".join(map(repr, sorted(archive.names)[:8])) or "nothing"
        raise UserError(
            f"{archive.path}: no array named {' or '.join(sorted(missing))} "
            f"(found: {found[:120]}); expected images and labels, and test_images and test_labels "
            "both or neither"
        )
    return _check_images(archive, "images")


def _check_images(archive: Archive, name: str) -> tuple[int, int, int]:
    shape, dtype = archive.header(name)
    if len(shape) not in (3, 4) or 0 in shape:
        raise UserError(
            f"{archive.path}: {name!r} has the shape {shape}; expected (n, height, width) or "
            "(n, channels, height, width), none of them 0"
        )
    if dtype != np.uint8 and dtype.kind != "f":
        raise UserError(
            f"{archive.path}: {name!r} is of type {dtype}; expected uint8, or float in [0, 1]"
        )
    return shape[1] if len(shape) == 4 else 1, shape[-2], shape[-1]


def _images(archive: Archive, name: str) -> NDArray[np.uint8] | NDArray[np.float32]:
    shape = _check_images(archive, name)
    values = np.ascontiguousarray(archive.array(name)).reshape(-1, *shape)
    if values.dtype == np.uint8:
        return values
    if np.isnan(values).any():
        raise UserError(f"{archive.path}: {name!r} holds NaN; expected values in [0, 1]")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise UserError(
            f"{archive.path}: {name!r} holds values from {low:g} to {high:g}; expected floats in "
            "[0, 1], or uint8"
        )
    return values.astype(np.float32, copy=False)


def _join(parts: list[Any]) -> NDArray[Any]:
    # A single part may be large: not copied.
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _labels(archive: Archive) -> tuple[dict[str, NDArray[np.int64]], int]:
    """Return the labels by prefix, training first, and the number of classes."""
    prefixes = ["", "test_"] if "test_labels" in archive.names else [""]
    parts = {prefix: _integers(archive, f"{prefix}labels", 1) for prefix in prefixes}
    if "classes" in archive.names:
        classes = int(_integers(archive, "classes", 0))
    else:
        classes = 1 + max(int(part.max()) for part in parts.values())
    for part in parts.values():
        check_labels(archive.path, part, max(classes, 0))
    # Every class needs a sample of its own, and tables over classes need memory.
    if not 2 <= classes <= len(parts[""]):
        raise UserError(
            f"{archive.path}: {classes} classes for {len(parts[''])} labels; expected at least 2 "
            "classes and a sample of each: number the labels from 0 without gaps"
        )
    return {prefix: part.astype(np.int64) for prefix, part in parts.items()}, classes


def _integers(archive: Archive, name: str, ndim: int) -> NDArray[Any]:
    shape, dtype = archive.header(name)
    if dtype.kind not in "iu" or len(shape) != ndim or 0 in shape:
        wanted = "integers of shape (n,) with n > 0" if ndim else "one integer"
        raise UserError(f"{archive.path}: {name!r} is {dtype} of shape {shape}; expected {wanted}")
    return archive.array(name)
