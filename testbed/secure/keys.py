"""What a client draws for one round of secure aggregation, and what it announces of it."""

import hashlib
from dataclasses import dataclass

from testbed.secure.masks import public_key
from testbed.secure.shamir import BYTES, PRIME, polynomial


@dataclass(frozen=True, repr=False)
class ClientKeys:
    """A client's secrets of one round; everything follows from a seed.

    Attributes
    ----------
    pair_secret
        The private key, with which it agrees with each other client on a mask.
    self_secret
        The key of the mask that is its own.
    public
        32 bytes: the public key of `pair_secret`.
    commitment
        16 bytes: a hash of `self_secret`, which tells whether it was reconstructed rightly.
    pair_polynomial, self_polynomial
        The t coefficients that share the two secrets among the cohort.
    """

    pair_secret: int
    self_secret: int
    public: bytes
    commitment: bytes
    pair_polynomial: tuple[int, ...]
    self_polynomial: tuple[int, ...]


def client_keys(seed: int, threshold: int) -> ClientKeys:
    """Return the keys of a client for a round.

    Parameters
    ----------
    seed
        An unsigned 64-bit number of this client in this round: real clients draw their secrets from
        the machine's entropy, here runs can be repeated.
    threshold
        t, how many of the cohort reconstruct a secret.
    """
    coefficients = BYTES * (threshold - 1)
    drawn = hashlib.shake_256(b"secure aggregation" + seed.to_bytes(8, "little")).digest(
        2 * (BYTES + coefficients)
    )
    pair_secret = int.from_bytes(drawn[:BYTES], "little") % PRIME
    self_secret = int.from_bytes(drawn[BYTES : 2 * BYTES], "little") % PRIME
    rest = drawn[2 * BYTES :]
    return ClientKeys(
        pair_secret=pair_secret,
        self_secret=self_secret,
        public=public_key(pair_secret),
        commitment=commitment(self_secret),
        pair_polynomial=polynomial(pair_secret, threshold, rest[:coefficients]),
        self_polynomial=polynomial(self_secret, threshold, rest[coefficients:]),
    )


def commitment(self_secret: int) -> bytes:
    """Return the 16 bytes that bind a client to the key of its own mask."""
    secret = self_secret.to_bytes(BYTES, "little")
    return hashlib.blake2b(secret, digest_size=16, person=b"commitment").digest()
