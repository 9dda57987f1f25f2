"""Updates as integers modulo 2^m, whose sum is exact and does not depend on the order."""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

ModulusBits = Literal[32, 64]
Encoded: TypeAlias = NDArray[np.uint32] | NDArray[np.uint64]

# Entries that are worked on at once: the intermediate values stay in the cache.
_CHUNK = 1 << 14


@dataclass(frozen=True)
class FixedPoint:
    """Fixed-point numbers for a weighted sum that cannot overflow.

    Entry x of weight w is ``w * round(x * 2^F) mod 2^m``, in two's complement. What is rounded is
    clipped to ``(2^(m - 1) - 1) // total_weight`` in magnitude, so that no sum of up to that weight
    leaves the range.

    Attributes
    ----------
    modulus_bits
        m, 32 or 64.
    fraction_bits
        F, from 0 to m - 2.
    total_weight
        The most weight that is ever summed: that of the whole cohort.

    Raises
    ------
    ValueError
        F is out of range, or the weight leaves no room for any value but 0.
    """

    modulus_bits: ModulusBits
    fraction_bits: int
    total_weight: int

    def __post_init__(self) -> None:
        if not 0 <= self.fraction_bits <= self.modulus_bits - 2:
            raise ValueError(
                f"found {self.fraction_bits} fraction bits of {self.modulus_bits}; "
                f"expected 0 to {self.modulus_bits - 2}"
            )
        if not 1 <= self.total_weight < 2 ** (self.modulus_bits - 1):
            raise ValueError(
                f"found a total weight of {self.total_weight}; "
                f"expected 1 to 2^{self.modulus_bits - 1} - 1"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of encoded entries, uint32 or uint64."""
        return np.dtype(f"u{self.modulus_bits // 8}")

    @property
    def limit(self) -> float:
        """Return the largest magnitude that is not clipped, in the update's own unit."""
        return math.ldexp(self._bound, -self.fraction_bits)

    @property
    def _bound(self) -> float:
        exact = (2 ** (self.modulus_bits - 1) - 1) // self.total_weight
        nearest = float(exact)
        return nearest if nearest <= exact else math.nextafter(nearest, 0.0)

    def zeros(self, size: int) -> Encoded:
        """Return the empty sum of vectors of a size [P]."""
        return np.zeros(size, self.dtype)

    def encode(self, vector: NDArray[np.float32], weight: int, out: Encoded) -> int:
        """Write a vector times its weight as integers; return how many entries were clipped.

        NaN is written as 0 and counts as clipped.

        Parameters
        ----------
        vector
            float32 [P].
        weight
            Of this vector, from 0 to the total weight.
        out
            uint32 or uint64 [P], as `dtype` says.

        Raises
        ------
        ValueError
            The weight is out of range, or ``out`` has another type or length.
        """
        if not 0 <= weight <= self.total_weight:
            raise ValueError(f"found a weight of {weight}; expected 0 to {self.total_weight}")
        self._check(out, vector.size)
        bound, clipped = self._bound, 0
        for start in range(0, vector.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            # Exact: a single times a power of two fits a double.
            scaled = vector[part].astype(np.float64)
            scaled *= 2.0**self.fraction_bits
            np.rint(scaled, out=scaled)
            inside = int(np.count_nonzero(np.abs(scaled) <= bound))
            if inside < scaled.size:
                clipped += scaled.size - inside
                scaled[np.isnan(scaled)] = 0.0
                np.clip(scaled, -bound, bound, out=scaled)
            out[part] = (scaled.astype(np.int64) * weight).astype(self.dtype)
        return clipped

    def add(self, total: Encoded, encoded: Encoded) -> None:
        """Add a vector [P] to a sum [P] in place, modulo 2^m: the plain sum, without masks.

        Raises
        ------
        ValueError
            One of them has another type, or their lengths differ.
        """
        self._check(total, encoded.size)
        self._check(encoded, total.size)
        np.add(total, encoded, out=total)

    def decode(self, total: Encoded, weight: int) -> NDArray[np.float32]:
        """Return the weighted mean behind a sum, float32 [P].

        Where nothing was clipped it is off by at most 2^-(F + 1) per entry, and float32 rounding.

        Parameters
        ----------
        total
            uint32 or uint64 [P]: the sum of encoded vectors.
        weight
            The weight of those that are in the sum.

        Raises
        ------
        ValueError
            The weight is out of range, or the sum has another type.
        """
        if not 1 <= weight <= self.total_weight:
            raise ValueError(f"found a weight of {weight}; expected 1 to {self.total_weight}")
        self._check(total, total.size)
        signed = total.view(np.dtype(f"i{self.modulus_bits // 8}"))
        mean = signed / (float(weight) * 2.0**self.fraction_bits)
        return np.asarray(mean, np.float32)

    def _check(self, encoded: Encoded, size: int) -> None:
        if encoded.dtype != self.dtype or encoded.shape != (size,):
            raise ValueError(
                f"found integers {encoded.dtype}{list(encoded.shape)}; "
                f"expected {self.dtype}[{size}]"
            )
