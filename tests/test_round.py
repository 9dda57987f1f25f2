"""What the root keeps of an update."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from small_run import plan_of

from testbed.round import Round, norm_of
from testbed.update import UpdateLayout

Vector = NDArray[np.float32]

LAYOUT = UpdateLayout(parameters=12, buffers=3, classes=2, features=4, weight=1, bias=9)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
VECTORS = arrays.arrays(np.float32, st.integers(0, 50), elements=FINITE)
HUGE = np.float32(3e38)


@given(VECTORS)
def test_norm_of_finite_numbers_however_large_or_small(values: Vector) -> None:
    exact = float(np.sqrt(np.square(values, dtype=np.float64).sum()))
    assert norm_of(values) == pytest.approx(exact, rel=1e-6, abs=0)


@given(VECTORS, st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_a_vector_with_something_that_is_no_number_has_no_norm(
    values: Vector, odd: float, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(values)))
    assert np.isnan(norm_of(np.insert(values, place, np.float32(odd))))


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1e25])
def test_the_norm_of_a_large_model_keeps_its_digits(scale: float) -> None:
    values = np.random.default_rng(0).normal(size=3_000_001).astype(np.float32) * np.float32(scale)
    exact = float(np.linalg.norm(values.astype(np.float64)))
    assert norm_of(values) == pytest.approx(exact, rel=1e-7)


def observed(update: Vector, layout: UpdateLayout = LAYOUT) -> tuple[Round, bool]:
    record = Round(plan_of(), layout, 0, keep_weights=True, keep_updates=True)
    return record, record.observe(1, update, layout)


@given(arrays.arrays(np.float32, LAYOUT.size, elements=st.floats(-1e6, 1e6, width=32)))
def test_parts_of_an_update(update: Vector) -> None:
    record, finite = observed(update)
    assert finite
    assert record.seen.tolist() == [False, True]
    weight = update[1:9].reshape(2, 4)
    np.testing.assert_allclose(record.row_sums[1], weight.sum(axis=1, dtype=float), rtol=1e-6)
    assert record.bias is not None
    assert record.weight is not None
    assert record.update is not None
    assert record.statistics is not None
    np.testing.assert_array_equal(record.bias[1], update[9:11])
    np.testing.assert_array_equal(record.weight[1], weight)
    np.testing.assert_array_equal(record.update[1], update)
    np.testing.assert_array_equal(record.statistics[1], update[12:])
    assert record.norm[1] == pytest.approx(np.linalg.norm(update[:12].astype(float)), rel=1e-6)
    for kept in (record.row_sums, record.bias, record.weight, record.update, record.norm):
        assert np.isnan(kept[0]).all()


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 9, 11, 12, 14])
def test_nothing_is_observed_of_an_update_that_is_not_finite(place: int, odd: float) -> None:
    update = np.ones(LAYOUT.size, np.float32)
    update[place] = odd
    record, finite = observed(update)
    assert not finite
    assert not record.seen.any()
    assert record.bias is not None
    for kept in (record.row_sums, record.bias, record.norm):
        assert np.isnan(kept).all()


def test_what_single_precision_cannot_hold_is_not_observed_as_infinite() -> None:
    outside = np.zeros(LAYOUT.size, np.float32)
    outside[[0, 11]] = HUGE  # both finite, and their norm is beyond
    record, finite = observed(outside)
    assert finite
    assert record.norm[1] == np.finfo(np.float32).max
    inside = np.zeros(LAYOUT.size, np.float32)
    inside[1:3] = HUGE  # of one class
    record, finite = observed(inside)
    assert not finite


def test_a_layer_without_bias_and_a_model_without_buffers() -> None:
    layout = replace(LAYOUT, buffers=0, bias=None)
    record, finite = observed(np.ones(layout.size, np.float32), layout)
    assert finite
    assert record.bias is None
    assert record.statistics is None
