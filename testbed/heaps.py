"""Looks for what makes the HDF5 library loop for ever, before it is given a file.

Texts of variable length, as most attributes are, lie in "global heap collections", the one part of
a file of ours without checksums. The library (2.0.0, and those before) goes through a collection
object by object; the object of index 0, which is the free space, with a size of 0 keeps it where it
is. Nothing can interrupt it then. Found by tests/fuzz: one in 300 files with damaged bytes.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# Signature, version 1, and three bytes that are reserved.
_COLLECTION = b"GCOL\x01\0\0\0"
_HEADER = 16
# Of the address and length fields, by version of the superblock: where it says how long they are.
_FIELDS = {0: 13, 1: 13, 2: 9, 3: 9}
_BLOCK = 1 << 22
_MOST_BYTES = 1 << 24


def check_heaps(path: Path) -> None:
    """Raise `ValueError` where a file is none that the HDF5 library can be given.

    Reads the file once, bit by bit; `OSError` where that is not possible.
    """
    with path.open("rb") as file:
        start = file.read(16)
        if not start.startswith(_SIGNATURE):
            raise ValueError("file signature not found")
        fields = _FIELDS.get(start[8]) if len(start) == 16 else None
        if fields is None or start[fields : fields + 2] != b"\x08\x08":
            raise ValueError("its superblock is truncated, or none that this testbed writes")
        size, walked = os.fstat(file.fileno()).st_size, 0
        for place in _collections(file):
            walked += _walk(file, place)
            if walked > size:
                raise ValueError("its heaps lie one in another")


def _collections(file: IO[bytes]) -> Iterator[int]:
    """Yield where in the file something begins like a collection."""
    position, block, overlap = 0, b"", len(_COLLECTION) - 1
    while True:
        file.seek(position + len(block))
        more = file.read(_BLOCK)
        if not more:
            return
        # What spans two blocks begins in the last bytes of the first.
        kept = block[-overlap:]
        position += len(block) - len(kept)
        block = kept + more
        found = block.find(_COLLECTION)
        while found >= 0:
            yield position + found
            found = block.find(_COLLECTION, found + 1)


def _walk(file: IO[bytes], place: int) -> int:
    """Go through a collection as the library does, and return how long it is."""
    file.seek(place + len(_COLLECTION))
    (size,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
    if not _HEADER <= size <= _MOST_BYTES:
        raise ValueError(f"a heap of {size} bytes")
    content = file.read(size - _HEADER)
    at = 0
    while at + _HEADER <= len(content):
        index, length = struct.unpack_from("<H6xQ", content, at)
        # The free space counts its own header.
        step = length if index == 0 else _HEADER + -(-length // 8) * 8
        if not _HEADER <= step <= len(content) - at:
            raise ValueError(f"a heap with an object of {length} bytes")
        at += step
    return int(size)
