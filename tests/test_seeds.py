"""Streams of random numbers: apart for different draws, the same for the same draw, for good."""

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from testbed.seeds import Purpose, seed64, stream

SEEDS = st.integers(0, 2**128 - 1)
PURPOSES = st.sampled_from(Purpose)
# Numbers of scenarios, rounds and clients.
KEYS = st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 3), max_size=4)
DRAWS = st.tuples(SEEDS, PURPOSES, KEYS)


def first_numbers(seed: int, purpose: Purpose, key: list[int]) -> list[int]:
    numbers = stream(seed, purpose, *key).integers(0, 2**64, size=4, dtype=np.uint64)
    return [int(number) for number in numbers]


@given(DRAWS, DRAWS)
def test_different_draws_have_different_streams(
    one: tuple[int, Purpose, list[int]], other: tuple[int, Purpose, list[int]]
) -> None:
    assume(one != other)
    assert first_numbers(*one) != first_numbers(*other)
    assert seed64(one[0], one[1], *one[2]) != seed64(other[0], other[1], *other[2])


def test_neighbours_have_different_streams() -> None:
    draws = [
        (seed, purpose, key)
        for seed in (0, 1)
        for purpose in Purpose
        for key in ([], [0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0])
    ]
    assert len({tuple(first_numbers(*draw)) for draw in draws}) == len(draws)
    assert len({seed64(seed, purpose, *key) for seed, purpose, key in draws}) == len(draws)


@given(DRAWS, DRAWS)
def test_a_draw_does_not_depend_on_what_was_drawn_before(
    one: tuple[int, Purpose, list[int]], other: tuple[int, Purpose, list[int]]
) -> None:
    alone = first_numbers(*one)
    first_numbers(*other)
    assert first_numbers(*one) == alone
    assert 0 <= seed64(one[0], one[1], *one[2]) < 2**64


def test_purposes_keep_their_numbers() -> None:
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "PARTS": 0,
        "SKEW": 1,
        "BATCH": 2,
        "MODEL": 3,
        "LOCAL": 4,
        "ATTACK": 5,
        "DUMMY": 6,
        "STATISTICS": 7,
        "AUXILIARY": 8,
        "PRETRAINING": 9,
        "PARTITION": 10,
        "SAMPLING": 11,
        "DROPOUT": 12,
        "DEFENSE": 13,
        "RESPONSES": 14,
        "SECRETS": 15,
    }


def test_numbers_are_those_of_every_version() -> None:
    # Results of experiments depend on these: a change of them is a change of the file format.
    assert first_numbers(0, Purpose.PARTS, []) == GOLDEN_PARTS
    assert first_numbers(7, Purpose.BATCH, [1, 2, 3]) == GOLDEN_BATCH
    assert seed64(0, Purpose.MODEL, 0, 0) == GOLDEN_MODEL
    assert seed64(2**64 + 1, Purpose.ATTACK, 3, 4, 2**32 - 1) == GOLDEN_ATTACK
    assert stream(1, Purpose.SKEW, 0, 0).integers(10, size=5).tolist() == GOLDEN_SKEW
    assert stream(1, Purpose.DUMMY, 0).random(2, np.float32).tolist() == GOLDEN_DUMMY


GOLDEN_PARTS = [
    17394127715520444142,
    5835390491061343638,
    13324868866364183597,
    2316967971845170257,
]
GOLDEN_BATCH = [1807342076730605149, 4829966631423322940, 2928550888186682362, 17604823846680380788]
GOLDEN_MODEL = 12316853675961987140
GOLDEN_ATTACK = 12642763931583973252
GOLDEN_SKEW = [3, 9, 0, 1, 7]
GOLDEN_DUMMY = [0.06416350603103638, 0.9550051689147949]
