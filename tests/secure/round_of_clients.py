"""A whole round of secure aggregation, as the testbed's ranks would run it."""

import numpy as np
from numpy.typing import NDArray

from testbed.secure import Aggregator, Encoded, SecureRound, write_message


def seeds_of(round_: SecureRound, seed: int = 0) -> list[int]:
    drawn = np.random.default_rng(seed).integers(2**64, size=len(round_.cohort), dtype=np.uint64)
    return [int(number) for number in drawn]


def random_vectors(round_: SecureRound, seed: int = 0) -> dict[int, Encoded]:
    rng = np.random.default_rng([seed, 1])
    top = 2**round_.modulus_bits
    return {
        client: rng.integers(top, size=round_.size, dtype=np.uint64).astype(round_.dtype)
        for client in round_.survivors
    }


def messages_of(
    round_: SecureRound, vectors: dict[int, Encoded], seed: int = 0
) -> dict[int, NDArray[np.uint8]]:
    messages = {}
    for client in round_.survivors:
        messages[client] = np.zeros(round_.message_bytes, np.uint8)
        write_message(round_, seeds_of(round_, seed), client, vectors[client], messages[client])
    return messages


def aggregate(round_: SecureRound, messages: dict[int, NDArray[np.uint8]]) -> Encoded:
    server = Aggregator(round_)
    for client, message in messages.items():
        server.add(client, message)
    return server.finish()


def plain_sum(round_: SecureRound, vectors: dict[int, Encoded]) -> Encoded:
    """Return the sum in Python's integers, then modulo 2^m."""
    exact = sum((v.astype(object) for v in vectors.values()), np.zeros(round_.size, object))
    return (exact % 2**round_.modulus_bits).astype(round_.dtype)
