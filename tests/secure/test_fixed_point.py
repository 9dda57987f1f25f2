"""Fixed-point numbers: exact sums in any order, a bounded error, and no overflow."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from testbed.secure import FixedPoint

SINGLES = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def formats(draw: st.DrawFn) -> FixedPoint:
    bits = draw(st.sampled_from([32, 64]))
    most = 2 ** (bits - 1) - 1
    weight = draw(st.integers(1, 1000) | st.integers(1, most) | st.just(most))
    return FixedPoint(bits, draw(st.integers(0, bits - 2)), weight)


def encoded(numbers, values, weight=1):
    out = numbers.zeros(len(values))
    clipped = numbers.encode(np.array(values, np.float32), weight, out)
    return out, clipped


def signed(numbers, out):
    return [int(x) for x in out.view(np.dtype(f"i{numbers.modulus_bits // 8}"))]


@given(formats(), arrays(np.float32, st.integers(0, 20), elements=SINGLES), st.data())
def test_entries_are_rounded_then_clipped_then_weighted(numbers, vector, data) -> None:
    weight = data.draw(st.integers(0, numbers.total_weight))
    out, clipped = encoded(numbers, vector, weight)
    exact = [round(Fraction(float(x)) * 2**numbers.fraction_bits) for x in vector]
    bound = (2 ** (numbers.modulus_bits - 1) - 1) // numbers.total_weight
    # The bound itself may be no double: the next smaller one takes its place.
    lowest = int(bound * (1 - Fraction(1, 2**52)))
    for value, integer in zip(signed(numbers, out), exact, strict=True):
        if abs(integer) <= lowest:
            assert value == weight * integer
        else:
            assert weight * lowest <= abs(value) <= weight * bound
            assert value * integer >= 0
    assert sum(abs(x) > bound for x in exact) <= clipped <= sum(abs(x) > lowest for x in exact)


@given(formats(), st.data())
def test_the_largest_sum_does_not_overflow(numbers, data) -> None:
    cuts = data.draw(st.lists(st.integers(0, numbers.total_weight), max_size=5))
    ends = [0, *sorted(cuts), numbers.total_weight]
    for sign in (1, -1):
        total, exact = numbers.zeros(2), 0
        for start, stop in pairwise(ends):
            out, clipped = encoded(numbers, [sign * np.inf, sign * 3e38], stop - start)
            assert clipped == 2
            numbers.add(total, out)
            exact += signed(numbers, out)[0]
        assert signed(numbers, total)[0] == exact
        mean = numbers.decode(total, numbers.total_weight)
        assert mean == pytest.approx(sign * numbers.limit, rel=1e-6)


@given(st.integers(0, 2**32), st.randoms())
def test_sums_do_not_depend_on_the_order(seed, random) -> None:
    rng = np.random.default_rng(seed)
    numbers = FixedPoint(32, 16, 100)
    vectors = [encoded(numbers, rng.normal(size=30), int(rng.integers(1, 10)))[0] for _ in range(9)]
    sums = []
    for _ in range(2):
        total = numbers.zeros(30)
        for vector in vectors:
            numbers.add(total, vector)
        sums.append(total)
        random.shuffle(vectors)
    assert np.array_equal(*sums)


@pytest.mark.parametrize(("bits", "fraction"), [(64, 32), (32, 16), (32, 22)])
@pytest.mark.parametrize("size", [100, (1 << 14) + 7])
def test_a_mean_is_off_by_half_a_unit_at_most(bits, fraction, size) -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(0, 0.5, (7, size)).astype(np.float32)
    weights = rng.integers(1, 10, 7)
    numbers = FixedPoint(bits, fraction, 80)
    total = numbers.zeros(size)
    for vector, weight in zip(vectors, weights, strict=True):
        out, clipped = encoded(numbers, vector, int(weight))
        assert clipped == 0
        numbers.add(total, out)
    mean = np.average(vectors.astype(np.float64), axis=0, weights=weights)
    off = np.abs(numbers.decode(total, int(weights.sum())) - mean)
    assert off.max() <= 2.0 ** -(fraction + 1) + 2.0**-24 * np.abs(mean).max()
    # A coarse format is as coarse as it says.
    assert bits == 64 or off.max() > 2.0 ** -(fraction + 5)


def test_what_cannot_be_encoded_is_counted() -> None:
    numbers = FixedPoint(32, 16, 1000)
    assert numbers.limit == pytest.approx(32.768, rel=1e-5)
    out, clipped = encoded(numbers, [np.nan, np.inf, -40, 32.7, -32.7, 0.25], 1000)
    assert clipped == 3
    expected = [0, numbers.limit, -numbers.limit, 32.7, -32.7, 0.25]
    assert numbers.decode(out, 1000) == pytest.approx(expected, abs=2**-17)


def test_negative_entries_are_twos_complements() -> None:
    assert encoded(FixedPoint(32, 0, 10), [-1, 2], 3)[0].tolist() == [2**32 - 3, 6]
    assert encoded(FixedPoint(64, 0, 10), [-1, 2], 3)[0].tolist() == [2**64 - 3, 6]


def test_halves_are_rounded_to_even() -> None:
    out, _ = encoded(FixedPoint(64, 1, 1), [0.25, 0.75, -0.25, 1.25])
    assert signed(FixedPoint(64, 1, 1), out) == [0, 2, 0, 2]


def test_weights_types_and_lengths_out_of_range_are_refused() -> None:
    for bits, fraction, weight in [(32, 31, 1), (64, -1, 1), (32, 1, 0), (32, 1, 2**31)]:
        with pytest.raises(ValueError, match="expected"):
            FixedPoint(bits, fraction, weight)
    numbers, vector = FixedPoint(32, 16, 5), np.ones(3, np.float32)
    with pytest.raises(ValueError, match="weight of 6; expected 0 to 5"):
        numbers.encode(vector, 6, numbers.zeros(3))
    with pytest.raises(ValueError, match="weight of 0; expected 1 to 5"):
        numbers.decode(numbers.zeros(3), 0)
    with pytest.raises(ValueError, match=r"uint64\[3\]; expected uint32\[3\]"):
        numbers.encode(vector, 1, np.zeros(3, np.uint64))
    with pytest.raises(ValueError, match=r"uint32\[4\]; expected uint32\[3\]"):
        numbers.encode(vector, 1, numbers.zeros(4))
    with pytest.raises(ValueError, match=r"uint32\[3\]; expected uint32\[1\]"):
        numbers.add(numbers.zeros(3), numbers.zeros(1))
