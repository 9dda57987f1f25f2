"""Masks that hide a vector and cancel in the sum, and the agreement of two clients on one."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.secure.fixed_point import Encoded

KEY_BYTES = 16
"""Of the key of a mask."""

PUBLIC_BYTES = 32
"""Of a public key."""

# A safe prime that is 7 modulo 8: the squares, of which 4 is one, are a group of prime order.
_GROUP = 2**256 - 36113
_GENERATOR = 4

# Entries of a mask that are drawn at once: they stay in the cache.
_CHUNK = 1 << 14


def public_key(private: int) -> bytes:
    """Return the 32 bytes that a client announces so that others can agree on a key with it."""
    return pow(_GENERATOR, private, _GROUP).to_bytes(PUBLIC_BYTES, "little")


def agree(private: int, public: bytes) -> int:
    """Return the 128-bit key of the mask that two clients share, from one's view.

    Diffie and Hellman's agreement in integers, hashed: the same from both sides. The group has 256
    bits, at some 40 us each, so that a hundred clients agree within half a second per round; that
    is too small to be safe. A deployment takes X25519 or a group of 2048 bits, which in Python
    would cost 1 to 3 ms each, a hundred times in every client's message.
    """
    agreed = pow(int.from_bytes(public, "little"), private, _GROUP)
    digest = hashlib.blake2b(agreed.to_bytes(PUBLIC_BYTES, "little"), digest_size=KEY_BYTES)
    return int.from_bytes(digest.digest(), "little")


def add_mask(vector: Encoded, key: int) -> None:
    """Add the mask of a key to a vector in place.

    Parameters
    ----------
    vector
        uint32 or uint64 [P].
    key
        From 0 to 2^128 - 1. The mask is the stream of Philox4x64-10 with that key: uniform, and
        the same on every machine. A deployment takes a cipher, such as AES in counter mode.
    """
    _combine(np.add, vector, key)


def subtract_mask(vector: Encoded, key: int) -> None:
    """Subtract the mask of a key from a vector, uint32 or uint64 [P], in place."""
    _combine(np.subtract, vector, key)


def _combine(operation: np.ufunc, vector: NDArray[Any], key: int) -> None:
    stream = np.random.Philox(key=key)
    each = 8 // vector.dtype.itemsize
    for start in range(0, vector.size, _CHUNK):
        part = vector[start : start + _CHUNK]
        words = stream.random_raw(-(-part.size // each)).astype("<u8", copy=False)
        mask = words.view(np.dtype(f"<u{vector.dtype.itemsize}"))[: part.size]
        operation(part, mask, out=part)
