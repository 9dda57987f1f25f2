"""Numeric variables of MATLAB files, version 5, read without trusting what they say.

SciPy's reader is written in C and crashes on damaged files. The format: a header of 128 bytes, then
elements, each a tag (type and length) and its data, padded to 8 bytes. A variable is an element of
type 14, plain or as a zlib stream in one of type 15; in it are elements for flags, shape, name and
values, the last perhaps in a narrower type than the variable's.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_TYPES = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
}  # fmt: skip
_CLASSES = {
    1: "cell", 2: "struct", 3: "object", 4: "char", 5: "sparse", 6: "double", 7: "single",
    8: "int8", 9: "uint8", 10: "int16", 11: "uint16", 12: "int32", 13: "uint32", 14: "int64",
    15: "uint64",
}  # fmt: skip
_NUMPY = {"double": "f8", "single": "f4"} | {
    f"{sign}int{bits}": f"{sign or 'i'}{bits // 8}"
    for sign in ("", "u")
    for bits in (8, 16, 32, 64)
}
_COMPLEX = 0x0800
# Deflate cannot do better than 1032 to 1; what claims more does not hold what it claims.
_MAX_RATIO = 1040
# Flags, shape and name of any variable that is of interest here.
_BEGINNING = 1 << 12


@dataclass(frozen=True)
class Variable:
    """A variable of a file.

    Attributes
    ----------
    shape
        As MATLAB has it: the first index varies fastest.
    kind
        MATLAB's class: ``uint8``, ``double``, ``char`` and so on.
    is_complex
        Whether it has an imaginary part, which is not read.
    """

    shape: tuple[int, ...]
    kind: str
    is_complex: bool
    _body: bytes
    _packed: bool
    _order: str

    def stored_type(self) -> np.dtype[Any]:
        """Return the type that the values are stored in; `ValueError` where it is none."""
        return self._values()[0]

    def values(self) -> NDArray[Any]:
        """Return the values in the variable's own type, of its shape.

        Raises
        ------
        ValueError
            The file is damaged, or the variable is no array of numbers.
        """
        if self.kind not in _NUMPY:
            raise ValueError(f"{self.kind} is no type of numbers")
        stored, data = self._values()
        count = int(np.prod(self.shape, dtype=object))
        if len(data) != count * stored.itemsize:
            raise ValueError(f"{len(data)} bytes for {count} numbers of {stored.itemsize}")
        flat = np.frombuffer(data, stored).astype(_NUMPY[self.kind], copy=False)
        return flat.reshape(self.shape, order="F")

    def _values(self) -> tuple[np.dtype[Any], memoryview]:
        body = _inflated(self._body, None) if self._packed else self._body
        *_, (kind, data) = _parts(memoryview(body), self._order, 4)
        if kind not in _TYPES:
            raise ValueError(f"values of the unknown type {kind}")
        return np.dtype(_TYPES[kind]).newbyteorder("<" if self._order == "<" else ">"), data


def read_variables(path: Path) -> dict[str, Variable]:
    """Return the variables of a file by name; their values are not unpacked yet.

    Raises
    ------
    ValueError
        It is not a MATLAB file of version 5, or damaged.
    OSError
        It cannot be read.
    """
    content = path.read_bytes()
    mark = content[126:128]
    if len(content) < _HEADER or mark not in (b"IM", b"MI"):
        raise ValueError("no header of a MATLAB file")
    order = "<" if mark == b"IM" else ">"
    (version,) = struct.unpack_from(f"{order}H", content, 124)
    if version >> 8 != 1:
        raise ValueError(f"version {version >> 8} of the format")
    found: dict[str, Variable] = {}
    for kind, data in _elements(memoryview(content)[_HEADER:], order):
        packed = kind == _COMPRESSED
        if not packed and kind != _MATRIX:
            continue
        name, variable = _variable(bytes(data), order, packed=packed)
        found[name] = variable
    return found


def _variable(body: bytes, order: str, *, packed: bool) -> tuple[str, Variable]:
    start = _inflated(body, _BEGINNING) if packed else body[:_BEGINNING]
    (_, flags), (_, sizes), (_, name) = _parts(memoryview(start), order, 3)
    if len(flags) < 4 or len(sizes) % 4:
        raise ValueError("a variable without flags or shape")
    (word,) = struct.unpack_from(f"{order}I", flags)
    shape = tuple(int(size) for size in np.frombuffer(sizes, f"{order}i4"))
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"a variable of shape {shape}")
    kind = _CLASSES.get(word & 0xFF, f"type {word & 0xFF}")
    text = bytes(name).decode("ascii", "replace")
    return text, Variable(shape, kind, bool(word & _COMPLEX), body, packed, order)


def _inflated(body: bytes, most: int | None) -> bytes:
    """Return the content of the variable in a zlib stream, or its beginning."""
    limit = most if most is not None else _MAX_RATIO * len(body) + 64
    try:
        content = zlib.decompressobj().decompress(body, limit + 8)
    except zlib.error as error:
        raise ValueError(f"a compressed variable: {error}") from None
    if len(content) < 8:
        raise ValueError("a compressed variable without content")
    return content[8:]


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Yield type and data of the elements one after the other."""
    place = 0
    while place < len(data):
        kind, part, place = _element(data, place, order)
        yield kind, part


def _parts(data: memoryview, order: str, number: int) -> list[tuple[int, memoryview]]:
    """Return type and data of the first elements within a variable."""
    parts, place = [], 0
    for _ in range(number):
        kind, part, place = _element(data, place, order)
        parts.append((kind, part))
    return parts


def _element(data: memoryview, place: int, order: str) -> tuple[int, memoryview, int]:
    if place + 8 > len(data):
        raise ValueError("it ends within an element")
    kind, length = struct.unpack_from(f"{order}II", data, place)
    if kind >> 16:  # up to four bytes, which stand where the length would
        length, kind, start = kind >> 16, kind & 0xFFFF, place + 4
        stop, end = start + length, place + 8
        if length > 4:
            raise ValueError("a small element of more than four bytes")
    else:
        start, stop = place + 8, place + 8 + length
        end = stop if kind == _COMPRESSED else place + 8 + -(-length // 8) * 8
    if stop > len(data):
        raise ValueError("it ends within an element")
    return kind, data[start:stop], end
