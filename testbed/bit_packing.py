"""Small numbers of a few bits each, one after the other, without a loop over them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_PLANE = 8
# Numbers at a time: what is at work stays in the cache. A multiple of 8.
_BLOCK = 1 << 16
# Eight numbers are a word, a byte for each. Neighbours move together, then pairs of them, then
# fours: lanes of so many bits, the lower one of two.
_LANES = ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF))


def planes(width: int) -> list[tuple[int, int]]:
    """Return how numbers of ``width`` bits are split: lowest bit and width of each plane, <= 8."""
    return [(low, min(_PLANE, width - low)) for low in range(0, width, _PLANE)]


def pack_bits(numbers: NDArray[np.integer[Any]], width: int, low: int = 0) -> NDArray[np.uint8]:
    """Return ``width`` bits, 1 to 8, of each number, one number after the other.

    Parameters
    ----------
    numbers
        [n], not negative.
    width, low
        How many bits, from which on.

    Returns
    -------
    NDArray[np.uint8]
        ``n * width`` bits, rounded up to bytes; number i has those from ``i * width`` on, the
        lowest first.
    """
    packed = np.empty((-(-numbers.size // 8), width), np.uint8)
    for start in range(0, numbers.size, _BLOCK):
        block = numbers[start : start + _BLOCK]
        words = np.zeros(-(-block.size // 8), "<u8")
        words.view(np.uint8)[: block.size] = (block >> low) & ((1 << width) - 1)
        for lane, mask in _LANES:
            upper = (words >> lane) & mask
            words &= mask
            words |= upper << (width * lane // 8)
        first = start // 8
        packed[first : first + words.size] = words.view(np.uint8).reshape(-1, 8)[:, :width]
    return packed.reshape(-1)[: -(-numbers.size * width // 8)]


def unpack_bits(packed: NDArray[np.uint8], width: int, count: int) -> NDArray[np.uint8]:
    """Return the numbers that `pack_bits` packed, uint8 [count]."""
    words = np.zeros(-(-count // 8), "<u8")
    numbers = words.view(np.uint8)
    for start in range(0, words.size, _BLOCK // 8):
        block = words[start : start + _BLOCK // 8]
        used = np.zeros(block.size * width, np.uint8)
        there = packed[start * width : (start + block.size) * width]
        used[: there.size] = there
        block.view(np.uint8).reshape(-1, 8)[:, :width] = used.reshape(-1, width)
        for lane, _ in reversed(_LANES):
            moved = width * lane // 8
            mask = sum(((1 << moved) - 1) << place for place in range(0, 64, 2 * lane))
            upper = (block >> moved) & mask
            block &= mask
            block |= upper << lane
    return numbers[:count]
