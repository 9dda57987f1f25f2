"""Arrays and a description in one file that is replaced as a whole and checked on reading.

For what a run needs to go on: it is rewritten often, read rarely, and must not be believed if it is
damaged. Layout: the magic line; a SHA-256 of all that follows, 32 bytes; the length of the
description, uint64 little endian; the description, JSON in UTF-8; the arrays, one after the other,
little endian, each at a multiple of 64 bytes from the start of the file. The description is
``{"kind": ..., "content": ..., "arrays": [[name, dtype, shape], ...]}``. Nothing in it is executed.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.errors import UserError

_MAGIC = b"label-leakage-testbed container 1\n"
_DIGEST = 32
_ALIGNMENT = 64
_DTYPES = ("<f4", "<f8", "<i4", "<i8", "|u1")


@dataclass(frozen=True)
class Container:
    """What such a file holds.

    Attributes
    ----------
    kind
        What it is for.
    content
        Values that JSON can say.
    arrays
        By name; of little-endian float32, float64, int32, int64, or uint8.
    """

    kind: str
    content: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]


def write_container(path: Path, container: Container) -> None:
    """Write a file, or replace it: after a kill at any moment, the old or the new one is there.

    Raises
    ------
    UserError
        It cannot be written; the old file is as it was.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in container.arrays.items()}
    for name, array in arrays.items():
        if array.dtype.str not in _DTYPES:
            raise ValueError(f"{name}: a container has no place for {array.dtype}")
    described = {
        "kind": container.kind,
        "content": container.content,
        "arrays": [[name, array.dtype.str, array.shape] for name, array in arrays.items()],
    }
    text = json.dumps(described).encode()
    new = path.with_name(path.name + ".new")
    try:
        if new.is_symlink() or new.is_fifo():
            new.unlink()  # what a link leads to is somebody else's, and pipes are waited for
        with new.open("wb") as file:
            digest = hashlib.sha256()
            file.write(_MAGIC + bytes(_DIGEST))
            for part in _parts(text, arrays):
                digest.update(part)
                file.write(part)
            file.seek(len(_MAGIC))
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        # Not Path.is_dir, which raises where the folder cannot be searched.
        folder = next((name for name in (new, path) if os.path.isdir(name)), None)  # noqa: PTH112
        fix = "" if folder is None else ": remove the folder of that name, and `resume`"
        raise UserError(f"{folder or path}: cannot be written: {error.strerror}{fix}") from None


def read_container(path: Path, kind: str) -> Container:
    """Read a file of that kind.

    The arrays are read-only.

    Raises
    ------
    UserError
        It cannot be read, is damaged, or is something else.
    """
    try:
        if path.exists() and not path.is_file():  # pipes are waited for, and devices never end
            raise UserError(f"{path}: cannot be read: it is no regular file")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not data.startswith(_MAGIC):
        raise UserError(f"{path}: found no {kind} of this testbed, or of another version of it")
    body = memoryview(data)[len(_MAGIC) + _DIGEST :]
    if hashlib.sha256(body).digest() != data[len(_MAGIC) : len(_MAGIC) + _DIGEST]:
        raise UserError(f"{path}: truncated or damaged ({kind}): the checksum is wrong")
    try:
        container = _parse(data)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: the content makes no sense ({kind}): {error}") from None
    if container.kind != kind:
        raise UserError(f"{path}: found {container.kind!r}, expected {kind!r}")
    return container


def _parts(text: bytes, arrays: Mapping[str, NDArray[Any]]) -> Iterator[bytes | memoryview]:
    """Yield everything behind the digest."""
    position = len(_MAGIC) + _DIGEST
    yield len(text).to_bytes(8, "little")
    yield text
    position += 8 + len(text)
    for array in arrays.values():
        padding = -position % _ALIGNMENT
        yield bytes(padding)
        if array.size:
            yield array.reshape(-1).view(np.uint8).data
        position += padding + array.nbytes


def _parse(data: bytes) -> Container:
    position = len(_MAGIC) + _DIGEST
    length = int.from_bytes(data[position : position + 8], "little")
    position += 8
    described = json.loads(data[position : position + length])
    position += length
    if not isinstance(described, dict) or not isinstance(described.get("content"), dict):
        raise ValueError("its description is no mapping")
    arrays: dict[str, NDArray[Any]] = {}
    for name, dtype, shape in described["arrays"]:
        if dtype not in _DTYPES or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"array {name!r} has the type {dtype!r} and the shape {shape!r}")
        position += -position % _ALIGNMENT
        count = math.prod(shape)
        nbytes = count * np.dtype(dtype).itemsize
        if position + nbytes > len(data):
            raise ValueError(f"array {name!r} is longer than the file")
        values = np.frombuffer(data, dtype, count, position) if count else np.zeros(0, dtype)
        arrays[str(name)] = values.reshape(shape)
        position += nbytes
    return Container(str(described["kind"]), described["content"], arrays)
