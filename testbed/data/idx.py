"""MNIST, from its official IDX files, plain or compressed with gzip."""

import gzip
import io
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from testbed.data.dataset import Dataset, check_counts, check_labels, kind_of, require_root
from testbed.errors import UserError

_CHUNK = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_UBYTE = 0x08
_TYPES = {
    0x09: "signed byte",
    0x0B: "16-bit integer",
    0x0C: "32-bit integer",
    0x0D: "32-bit float",
    0x0E: "64-bit float",
}


def load_mnist(root: Path | None) -> Dataset:
    """Return MNIST, uint8 ``[n, 1, 28, 28]``: the training images, then the test images.

    Parameters
    ----------
    root
        The folder with the four files (``train-images-idx3-ubyte`` and so on, with or without
        ``.gz``; ``train-images.idx3-ubyte`` is accepted too). Other data sets in the same four
        files, with 28x28 images and 10 classes, are read as well.

    Raises
    ------
    UserError
        If the folder or a file is missing, damaged, or at odds with another one.
    """
    folder = require_root("mnist", root, "folder")
    images, labels, test_start = read_splits(
        folder, ("train", "t10k"), 10, hint="set data.root to the folder with the four MNIST files"
    )
    return Dataset(
        name="mnist",
        images=images[:, None],
        labels=labels,
        classes=10,
        scale=1 / 255,
        test_start=test_start,
        class_names=tuple("0123456789"),
    )


def read_splits(
    folder: Path, stems: tuple[str, str], classes: int, *, first: int = 0, hint: str
) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
    """Read the four IDX files of a data set with 28x28 images.

    Parameters
    ----------
    folder
        Where they are.
    stems
        What the names of the training and of the test files begin with.
    classes
        The number of classes.
    first
        The label of the first class in the files.
    hint
        What to do where a file is missing.

    Returns
    -------
    images
        uint8 ``[n, 28, 28]``, training images first.
    labels
        int64 ``[n]``, from 0.
    test_start
        The number of training images.

    Raises
    ------
    UserError
        If a file is missing, damaged, or at odds with another one.
    """
    paths = {
        (stem, kind): _find(folder, f"{stem}-{kind}", f"idx{ndim}-ubyte", hint)
        for stem in stems
        for kind, ndim in (("images", 3), ("labels", 1))
    }
    images, labels = [], []
    for stem in stems:
        images.append(read_idx(paths[stem, "images"], (None, 28, 28)))
        labels.append(read_idx(paths[stem, "labels"], (None,)))
        check_counts(paths[stem, "labels"], len(images[-1]), len(labels[-1]))
        check_labels(paths[stem, "labels"], labels[-1], classes, first)
    return (
        np.concatenate(images),
        np.concatenate(labels).astype(np.int64) - first,
        len(images[0]),
    )


def read_idx(path: Path, expected: tuple[int | None, ...]) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes.

    Never reads more than the size that the header announces and one byte, nor allocates more than
    the file really holds, whatever the header announces.

    Parameters
    ----------
    path
        The file; gzip is recognised by its content.
    expected
        The array's shape, None where any positive size will do.

    Returns
    -------
    NDArray[np.uint8]
        An array of that shape.

    Raises
    ------
    UserError
        If the file cannot be read or is not such a file, whole and without anything after it.

    Notes
    -----
    The format is specified on the MNIST page (LeCun, Cortes, Burges): two zero bytes, the element
    type, the number of dimensions, each size as a big-endian 32-bit integer, the elements.
    """
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == _GZIP_MAGIC
            file.seek(0)
            if not compressed:
                return _read(file, path, expected)
            with gzip.GzipFile(fileobj=file) as unpacked:
                return _read(unpacked, path, expected)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path}: damaged gzip data ({error}); expected the official file: download it again"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); expected a readable IDX file"
        ) from error


def _read(
    stream: io.BufferedIOBase, path: Path, expected: tuple[int | None, ...]
) -> NDArray[np.uint8]:
    magic = stream.read(4)
    wanted = bytes((0, 0, _UBYTE, len(expected)))
    if len(magic) < 4 or magic[:2] != b"\0\0":
        found = f"begins with {magic.hex(' ')}" if magic else "is empty"
        raise UserError(
            f"{path}: {found}; expected an IDX file, which begins with {wanted.hex(' ')}, "
            "plain or compressed with gzip"
        )
    if magic[2] != _UBYTE:
        name = _TYPES.get(magic[2], "unknown")
        raise UserError(
            f"{path}: holds elements of IDX type 0x{magic[2]:02x} ({name}); "
            f"expected 0x{_UBYTE:02x} (unsigned byte)"
        )
    if magic[3] != len(expected):
        raise UserError(
            f"{path}: holds an array of {magic[3]} dimensions; expected {len(expected)} "
            "(are images and labels mixed up?)"
        )
    header = stream.read(4 * len(expected))
    if len(header) < 4 * len(expected):
        raise UserError(f"{path}: ends inside its header; expected the whole file: get it again")
    shape = tuple(int(size) for size in np.frombuffer(header, ">u4"))
    if shape[0] == 0 or any(e is not None and s != e for s, e in zip(shape, expected, strict=True)):
        raise UserError(
            f"{path}: holds an array of {_sizes(shape)}; expected {_sizes(expected)} with n > 0"
        )
    return _payload(stream, path, math.prod(shape)).reshape(shape)


def _payload(stream: io.BufferedIOBase, path: Path, announced: int) -> NDArray[np.uint8]:
    # In pieces: a single read would allocate what a hostile header announces.
    data = bytearray()
    while len(data) <= announced:
        piece = stream.read(min(_CHUNK, announced + 1 - len(data)))
        if not piece:
            break
        data += piece
    if len(data) < announced:
        raise UserError(
            f"{path}: truncated: {len(data)} bytes of data, but its header announces {announced}; "
            "get the file again"
        )
    if len(data) > announced:
        raise UserError(
            f"{path}: more data than the {announced} bytes that its header announces; "
            "expected nothing after them: get the file again"
        )
    return np.frombuffer(data, np.uint8)


def _sizes(shape: tuple[int | None, ...]) -> str:
    return " x ".join("n" if size is None else str(size) for size in shape)


def _find(folder: Path, stem: str, suffix: str, hint: str) -> Path:
    names = [f"{stem}{dot}{suffix}{gz}" for dot in "-." for gz in ("", ".gz")]
    for name in names:
        if kind_of(folder / name) == "file":
            return folder / name
    raise UserError(f"{folder}: no file {stem}-{suffix} (looked for {', '.join(names)}); {hint}")
