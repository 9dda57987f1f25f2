"""The encodings of an update on the wire: what was left out or has fewer bits takes fewer bytes.

An encoded update is little-endian and has these sections, each padded with zeros to 4 bytes:

1. a header of 16 bytes: how positions are encoded (uint8), how values are (uint8), two zero bytes,
   then the number of values k, of scales, and L (uint32 each; the last two 0 without levels);
2. positions, where not all P entries are sent: k of them, uint32 and ascending, or a bit for each
   entry, lowest bit first, whichever is shorter;
3. values: float32 or float16 [k]; or scales, float32, and then k codes. A code c is stored as
   c + L, in the fewest bits that hold 2L; a sign in one bit, which is 1 for positive. Codes of more
   than 8 bits are split into planes of 8, the lowest bits first, and what is left, each a section.
   Of a plane of w bits, code i has the bits from w i on, lowest first;
4. the float buffers, float32 [S].

One scale serves all values, or there is one for each of the T tensors.
"""

from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.bit_packing import pack_bits, planes, unpack_bits
from testbed.defenses.base import Levels, Tensors

Bytes = NDArray[np.uint8]
Values = NDArray[np.float32] | NDArray[np.float16] | Levels

_HEADER = np.dtype(
    [
        ("positions", "u1"),
        ("values", "u1"),
        ("reserved", "<u2"),
        ("count", "<u4"),
        ("scales", "<u4"),
        ("levels", "<u4"),
    ]
)
# Codes beyond are not exact in float32.
_MOST_LEVELS = 1 << 24


class _Positions(IntEnum):
    ALL = 0
    LIST = 1
    BITMAP = 2


class _Values(IntEnum):
    FLOAT32 = 0
    FLOAT16 = 1
    LEVELS = 2
    SIGNS = 3


def decoded(values: Values, bounds: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return what values stand for, float32 [k].

    Parameters
    ----------
    values
        As a quantiser returns them.
    bounds
        int64 [parts + 1]: where the parts with a scale each begin, and the end.
    """
    if not isinstance(values, Levels):
        return values.astype(np.float32)
    out = values.codes.astype(np.float32)
    # Where a model diverged, scales are anything.
    with np.errstate(over="ignore", invalid="ignore"):
        for scale, (start, stop) in zip(values.scales, pairwise(bounds), strict=True):
            out[start:stop] *= scale
        if values.levels > 1:
            out /= np.float32(values.levels)
    return out


@dataclass(frozen=True)
class Encoding:
    """Encodes the updates of one model.

    Attributes
    ----------
    tensors
        Of an update; P entries.
    buffers
        How many float buffers follow, S.
    """

    tensors: Tensors
    buffers: int

    @property
    def capacity(self) -> int:
        """The most bytes that an encoded update takes."""
        size = self.tensors.size
        # Codes have four planes at most, each of them padded.
        values = 4 * size + 4 * len(self.tensors.names) + 12
        return _HEADER.itemsize + _padded(-(-size // 8)) + values + 4 * self.buffers

    def encode(
        self,
        out: Bytes,
        *,
        positions: NDArray[np.int64] | None,
        values: Values,
        bounds: NDArray[np.int64],
        buffers: NDArray[np.float32],
    ) -> int:
        """Encode an update.

        Parameters
        ----------
        out
            uint8, contiguous: receives the bytes; `capacity` of them are enough for all updates.
        positions
            int64 [k], ascending: which entries are sent; None for all.
        values
            What is sent, [k].
        bounds
            int64 [parts + 1]: where in the values their parts begin, and the end, by the positions
            and the scope of the quantiser; of use for levels alone.
        buffers
            float32 [S].

        Returns
        -------
        int
            How many bytes are used, a multiple of 4.

        Raises
        ------
        ValueError
            The arguments do not fit each other, or ``out`` is too small.
        """
        size = self.tensors.size
        header = np.zeros((), _HEADER)
        sections: list[NDArray[Any]] = [header]
        count = len(values.codes) if isinstance(values, Levels) else len(values)
        if positions is not None:
            header["positions"], section = _pack_positions(positions, size)
            sections.append(section)
        if count != (size if positions is None else len(positions)):
            raise ValueError(f"{count} values for another number of positions")
        header["count"] = count
        if isinstance(values, Levels):
            if not np.array_equal(bounds, self._bounds(positions, len(values.scales), count)):
                raise ValueError("the parts of the values are those of no scope")
            header["values"] = _Values.SIGNS if values.signs_only else _Values.LEVELS
            header["scales"], header["levels"] = len(values.scales), values.levels
            # Each plane is padded by itself.
            sections += [values.scales.astype("<f4"), *_pack_codes(values)]
        else:
            half = values.dtype == np.float16
            header["values"] = _Values.FLOAT16 if half else _Values.FLOAT32
            sections.append(np.ascontiguousarray(values, "<f2" if half else "<f4"))
        if buffers.shape != (self.buffers,):
            raise ValueError(f"{buffers.shape} buffers in place of {self.buffers}")
        sections.append(np.ascontiguousarray(buffers, "<f4"))
        return _join(sections, out)

    def decode(self, data: Bytes, out: NDArray[np.float32]) -> None:
        """Decode an update into a plain one; 0 where nothing was sent.

        Parameters
        ----------
        data
            uint8, contiguous: what `encode` wrote, no more and no less.
        out
            float32 [P + S]: receives the update. Left as it was where the data are not valid.

        Raises
        ------
        ValueError
            The data are no encoded update of this model.
        """
        size = self.tensors.size
        if out.shape != (size + self.buffers,):
            raise ValueError(f"room for {out.shape} in place of {(size + self.buffers,)}")
        reader = _Reader(data)
        header = reader.take(1, _HEADER)[0]
        count, number, levels = (int(header[name]) for name in ("count", "scales", "levels"))
        if header["reserved"] or count > size:
            raise ValueError("the header of an encoded update is damaged")
        positions = _unpack_positions(reader, int(header["positions"]), count, size)
        values = _unpack_values(reader, int(header["values"]), count, number, levels)
        buffers = reader.take(self.buffers, np.dtype("<f4"))
        reader.finish()
        bounds = self._bounds(positions, number, count) if number else self.tensors.offsets
        dense = decoded(values, bounds)
        if positions is None:
            out[:size] = dense
        else:
            out[:size] = 0
            out[positions] = dense
        out[size:] = buffers

    def _bounds(
        self, positions: NDArray[np.int64] | None, parts: int, count: int
    ) -> NDArray[np.int64]:
        """Return where parts with a scale each begin in the values, and the end [parts + 1]."""
        if parts == 1:
            return np.array([0, count])
        if parts != len(self.tensors.names):
            raise ValueError(f"{parts} scales, neither 1 nor one for each tensor")
        offsets = self.tensors.offsets
        return offsets if positions is None else np.searchsorted(positions, offsets)


class _Reader:
    """Takes section after section off encoded bytes."""

    def __init__(self, data: Bytes) -> None:
        self._data = data
        self._place = 0

    def take(self, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the next section as an array of its own type, a view."""
        stop = self._place + count * dtype.itemsize
        end = self._place + _padded(count * dtype.itemsize)
        if end > len(self._data):
            raise ValueError(f"an encoded update ends after {len(self._data)} bytes, before {end}")
        section = self._data[self._place : stop].view(dtype)
        self._place = end
        return section

    def finish(self) -> None:
        """Check that nothing is left."""
        if self._place != len(self._data):
            raise ValueError(f"an encoded update has {len(self._data)} bytes, not {self._place}")


def _join(sections: list[NDArray[Any]], out: Bytes) -> int:
    place = 0
    for section in sections:
        flat = section.reshape(-1).view(np.uint8)
        stop, end = place + flat.size, place + _padded(flat.size)
        if end > len(out):
            raise ValueError(f"no room for an encoded update in {len(out)} bytes")
        out[place:stop] = flat
        out[stop:end] = 0
        place = end
    return place


def _padded(size: int) -> int:
    return -(-size // 4) * 4


def _pack_positions(positions: NDArray[np.int64], size: int) -> tuple[_Positions, NDArray[Any]]:
    inside = not len(positions) or (positions[0] >= 0 and positions[-1] < size)
    if not (inside and np.all(positions[1:] > positions[:-1])):
        raise ValueError(f"positions do not ascend within 0..{size - 1}")
    if len(positions) == size:
        return _Positions.ALL, positions[:0]
    if 4 * len(positions) <= _padded(-(-size // 8)):
        return _Positions.LIST, positions.astype("<u4")
    there = np.zeros(size, bool)
    there[positions] = True
    return _Positions.BITMAP, np.packbits(there, bitorder="little")


def _unpack_positions(
    reader: _Reader, kind: int, count: int, size: int
) -> NDArray[np.int64] | None:
    if kind == _Positions.ALL and count == size:
        return None
    if kind == _Positions.LIST:
        positions = reader.take(count, np.dtype("<u4")).astype(np.int64)
        valid = np.all(positions[1:] > positions[:-1]) and not np.any(positions[-1:] >= size)
    elif kind == _Positions.BITMAP:
        bits = np.unpackbits(reader.take(-(-size // 8), np.dtype("u1")), bitorder="little")
        positions = np.flatnonzero(bits.view(bool))
        valid = len(positions) == count and not bits[size:].any()
    else:
        valid, positions = False, np.zeros(0, np.int64)
    if not valid:
        raise ValueError("the positions of an encoded update are damaged")
    return positions


def _unpack_values(reader: _Reader, kind: int, count: int, scales: int, levels: int) -> Values:
    if kind in (_Values.FLOAT32, _Values.FLOAT16) and not scales and not levels:
        return reader.take(count, np.dtype("<f4" if kind == _Values.FLOAT32 else "<f2"))
    signs = kind == _Values.SIGNS
    if kind not in (_Values.LEVELS, _Values.SIGNS) or not scales:
        raise ValueError(f"an encoded update has values of an unknown kind {kind}")
    if not 1 <= levels <= (1 if signs else _MOST_LEVELS):
        raise ValueError(f"an encoded update has {levels} levels")
    scale = reader.take(scales, np.dtype("<f4"))
    stored = np.zeros(count, np.int32)
    for low, width in planes(_width(levels, signs)):
        plane = reader.take(-(-count * width // 8), np.dtype("u1"))
        stored |= np.left_shift(unpack_bits(plane, width, count), low, dtype=np.int32)
    if signs:
        stored *= 2
    if count and stored.max() > 2 * levels:
        raise ValueError(f"an encoded update has codes beyond its {levels} levels")
    stored -= levels
    return Levels(levels, scale, stored, signs)


def _pack_codes(values: Levels) -> list[NDArray[np.uint8]]:
    codes, levels = values.codes, values.levels
    if not 1 <= levels <= (1 if values.signs_only else _MOST_LEVELS):
        raise ValueError(f"{levels} levels, in place of 1 to {_MOST_LEVELS}, or 1 for signs")
    if codes.size and not -levels <= codes.min() <= codes.max() <= levels:
        raise ValueError(f"codes beyond {levels} levels")
    if values.signs_only and not codes.all():
        raise ValueError("signs that are 0")
    if values.signs_only:
        return [pack_bits((codes > 0).astype(np.uint8), 1)]
    stored = codes + np.int32(levels)
    return [pack_bits(stored, width, low) for low, width in planes(_width(levels, signs=False))]


def _width(levels: int, signs: bool) -> int:
    """Return the number of bits of a code."""
    return 1 if signs else (2 * levels).bit_length()
