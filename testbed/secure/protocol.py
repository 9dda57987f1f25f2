"""Secure aggregation of one round: what clients send, and how the server gets the sum from it.

Client u of the cohort sends (Bonawitz et al., CCS 2017, section 4)::

    y_u = x_u + PRG(b_u) + sum over v > u of PRG(s_uv) - sum over v < u of PRG(s_uv)   (mod 2^m)

over the whole cohort, those included that drop out before they send theirs. Each client has shared
its secrets among the cohort before. The survivors then reveal their shares: of the private key of
each client that dropped out, with which the server computes the masks that have nothing to cancel
with, and of b_u of each survivor. No client ever reveals both of one client.

Real here: the masks and how they cancel, the agreement on s_uv (in a small group, see `masks`), the
sharing and the recovery of secrets, and the bytes of a survivor's message. Simulated:

- The channels between clients. A client computes from the others' seeds what they would send it
  through the server: public keys, and shares that are encrypted. That would be 32 + 32 (n - 1)
  bytes more up and some 64 (n - 1) down per client of a cohort of n, keys, nonces and tags aside.
- The two last steps are one. Which clients drop out is planned, and they do it after keys and
  shares were exchanged and before they send y_u; so a survivor's message carries y_u and the shares
  that it reveals, which really wait until the server has said who survived.
"""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.secure.fixed_point import Encoded, ModulusBits
from testbed.secure.shamir import BYTES

HEADER: np.dtype[Any] = np.dtype(
    [
        ("checksum", "<u4"),
        ("client", "<i4"),
        ("length", "<i8"),
        ("session", "u1", 16),
        ("public", "u1", 32),
    ]
)
"""How a message begins: the checksum is of all that follows it."""


class TooFewSurvivorsError(Exception):
    """Fewer clients than the threshold are left: the sum of the round is lost."""


class MessageError(Exception):
    """A message is not what an honest client of this round sends."""


@dataclass(frozen=True)
class SecureRound:
    """What server and clients know of a round.

    Attributes
    ----------
    cohort
        The n clients that agreed on masks, ascending.
    survivors
        Those of them that send their vector, ascending.
    threshold
        t, how many clients must survive, from 1 to n.
    size
        P, the length of the vectors.
    modulus_bits
        m, 32 or 64: vectors are integers modulo 2^m.
    """

    cohort: tuple[int, ...]
    survivors: tuple[int, ...]
    threshold: int
    size: int
    modulus_bits: ModulusBits = 64

    def __post_init__(self) -> None:
        for clients in (self.cohort, self.survivors):
            if list(clients) != sorted(set(clients)):
                raise ValueError(f"clients must be distinct and ascending: found {clients}")
        if not set(self.survivors) <= set(self.cohort):
            raise ValueError("survivors must be of the cohort")
        if not 1 <= self.threshold <= len(self.cohort):
            raise ValueError(
                f"found a threshold of {self.threshold}; expected 1 to {len(self.cohort)}"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of the vectors, uint32 or uint64."""
        return np.dtype(f"u{self.modulus_bits // 8}")

    @property
    def lost(self) -> bool:
        """Return whether fewer than the threshold survive."""
        return len(self.survivors) < self.threshold

    @property
    def message_bytes(self) -> int:
        """Return the length of each survivor's message: header, vector and a share per client."""
        return HEADER.itemsize + self.dtype.itemsize * self.size + BYTES * len(self.cohort)

    def vector(self, message: NDArray[np.uint8]) -> Encoded:
        """Return the masked vector [P] in a message, a view."""
        start = HEADER.itemsize
        return message[start : start + self.dtype.itemsize * self.size].view(self.dtype)

    def shares(self, message: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the share for each client of the cohort [n, 16] in a message, a view."""
        stop = self.message_bytes
        return message[stop - BYTES * len(self.cohort) : stop].reshape(-1, BYTES)

    def check(self) -> None:
        """Raise TooFewSurvivorsError where the round is lost."""
        if self.lost:
            raise TooFewSurvivorsError(
                f"{len(self.survivors)} of {len(self.cohort)} clients are left, and the sum can "
                f"be unmasked from {self.threshold} on"
            )

    def session(self, publics: Sequence[bytes], commitments: Sequence[bytes]) -> bytes:
        """Return 16 bytes that are equal only where all agree on the round and its keys.

        ``publics`` are of the cohort, ``commitments`` of the survivors. The protocol has it for
        active adversaries, as signatures on the list of survivors.
        """
        said = (self.cohort, self.survivors, self.threshold, self.size, self.modulus_bits)
        state = hashlib.blake2b(repr(said).encode(), digest_size=16, person=b"session")
        for part in (*publics, *commitments):
            state.update(part)
        return state.digest()


def header(message: NDArray[np.uint8]) -> Any:
    """Return the header of a message, a record of `HEADER` that can be written to."""
    return message[: HEADER.itemsize].view(HEADER)[0]


def checksum(message: NDArray[np.uint8]) -> int:
    """Return the CRC-32 that a message should have."""
    return zlib.crc32(message[HEADER["checksum"].itemsize :].data)
