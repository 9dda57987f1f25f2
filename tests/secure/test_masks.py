"""Masks: the same from both sides, uniform, and gone when they are taken off."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from primes import is_probable_prime

from testbed.secure import masks
from testbed.secure.masks import add_mask, agree, public_key, subtract_mask

KEYS = st.integers(0, 2**128 - 1)


def mask(key, size, dtype=np.uint64):
    vector = np.zeros(size, dtype)
    add_mask(vector, key)
    return vector


@given(KEYS, KEYS)
def test_both_sides_agree_on_the_same_key(one, other) -> None:
    key = agree(one, public_key(other))
    assert key == agree(other, public_key(one))
    assert 0 <= key < 2**128


def test_the_group_has_a_large_prime_order() -> None:
    order = (masks._GROUP - 1) // 2
    assert is_probable_prime(masks._GROUP)
    assert is_probable_prime(order)
    assert pow(masks._GENERATOR, order, masks._GROUP) == 1


def test_each_pair_has_a_key_of_its_own() -> None:
    privates = range(2**100, 2**100 + 20)
    keys = {agree(a, public_key(b)) for a in privates for b in privates if a <= b}
    assert len(keys) == 20 * 21 // 2


@given(KEYS, st.sampled_from([np.uint32, np.uint64]), st.integers(0, 50), st.integers(0, 2**32))
def test_a_mask_that_is_taken_off_leaves_the_vector(key, dtype, size, seed) -> None:
    top = np.iinfo(dtype).max
    vector = np.random.default_rng(seed).integers(top, size=size, dtype=dtype, endpoint=True)
    before = vector.copy()
    add_mask(vector, key)
    assert size < 4 or not np.array_equal(vector, before)
    subtract_mask(vector, key)
    assert np.array_equal(vector, before)


@pytest.mark.parametrize("size", [1, 2, 1 << 14, (1 << 14) + 1, 50_001])
def test_a_mask_is_one_stream_whatever_its_length_and_width(size) -> None:
    whole = np.random.Philox(key=5).random_raw(50_001)
    assert np.array_equal(mask(5, size), whole[:size])
    halves = np.stack([whole & 0xFFFFFFFF, whole >> 32], axis=1).ravel()
    assert np.array_equal(mask(5, size, np.uint32), halves[:size])


def test_masks_of_neighbouring_keys_have_no_entry_in_common() -> None:
    drawn = np.concatenate([mask(key, 1000) for key in (0, 1, 2, 2**64, 2**127, 2**128 - 1)])
    assert len(np.unique(drawn)) == len(drawn)
