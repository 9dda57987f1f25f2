"""One stream of random numbers per draw, independent of other draws and of the rank."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for. The values are part of the results: never renumber them."""

    PARTS = 0
    SKEW = 1
    BATCH = 2
    MODEL = 3
    LOCAL = 4
    ATTACK = 5
    DUMMY = 6
    STATISTICS = 7
    AUXILIARY = 8
    PRETRAINING = 9
    PARTITION = 10
    SAMPLING = 11
    DROPOUT = 12
    DEFENSE = 13
    RESPONSES = 14
    SECRETS = 15


def stream(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    """Return the generator of one draw.

    Parameters
    ----------
    seed
        The experiment's seed.
    purpose
        What is drawn.
    key
        Scenario, round, client: as many as the draw depends on.
    """
    return np.random.Generator(np.random.PCG64(_sequence(seed, purpose, key)))


def seed64(seed: int, purpose: Purpose, *key: int) -> int:
    """Return one unsigned 64-bit integer, for generators other than NumPy's."""
    return int(_sequence(seed, purpose, key).generate_state(1, np.uint64)[0])


def _sequence(seed: int, purpose: Purpose, key: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(int(purpose), *key))
