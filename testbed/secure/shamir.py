"""Shamir's secret sharing: t shares give the secret, fewer say nothing about it.

Shamir, How to share a secret (CACM 1979): the secret is the value at 0 of a random polynomial of
degree t - 1 over a prime field, the shares are its values elsewhere.
"""

from collections.abc import Sequence

PRIME = 2**128 - 159
"""The largest prime below 2^128: secrets and shares take 16 bytes."""

BYTES = 16
"""Of a secret, a share or a coefficient."""


def polynomial(secret: int, threshold: int, randomness: bytes) -> tuple[int, ...]:
    """Return the t coefficients of the polynomial that hides a secret, the secret first.

    Parameters
    ----------
    secret
        From 0 to PRIME - 1.
    threshold
        t, how many shares it takes to reconstruct the secret.
    randomness
        16 uniform bytes for each of the other t - 1 coefficients.
    """
    if not 0 <= secret < PRIME:
        raise ValueError("a secret must be from 0 to PRIME - 1")
    if threshold < 1 or len(randomness) != BYTES * (threshold - 1):
        raise ValueError(
            f"found {len(randomness)} random bytes for t = {threshold}; expected 16 (t - 1)"
        )
    starts = range(0, len(randomness), BYTES)
    drawn = (int.from_bytes(randomness[start : start + BYTES], "little") for start in starts)
    return (secret, *(number % PRIME for number in drawn))


def share(coefficients: Sequence[int], point: int, prime: int = PRIME) -> int:
    """Return the share of who stands at a point, 1 or more."""
    value = 0
    # Points are small, so that one reduction at the end costs less than one per step.
    for coefficient in reversed(coefficients):
        value = value * point + coefficient
    return value % prime


def weights(points: Sequence[int], prime: int = PRIME) -> list[int]:
    """Return what shares at distinct points are multiplied by to give the secret (Lagrange)."""
    found = []
    for point in points:
        numerator, denominator = 1, 1
        for other in points:
            if other != point:
                numerator = numerator * other % prime
                denominator = denominator * (other - point) % prime
        found.append(numerator * pow(denominator, -1, prime) % prime)
    return found


def reconstruct(shares: Sequence[int], weighted: Sequence[int], prime: int = PRIME) -> int:
    """Return the secret behind shares, given the `weights` of their points."""
    return sum(a * b for a, b in zip(shares, weighted, strict=True)) % prime
