"""The vectorised decoding against the paper's loop."""

import numpy as np
import pytest
import torch
from definition import decode_by_loop, decode_released_by_loop, has_near_tie
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from testbed.attacks.decoding import decode, decode_released

CLASSES = st.integers(1, 12)


def exact(numerator):
    """Values on a grid of 1/8: all arithmetic on them is exact, and ties are common."""
    return st.integers(-numerator, numerator).map(lambda value: value / 8)


@st.composite
def gridded_updates(draw):
    rows, classes = draw(st.integers(1, 4)), draw(CLASSES)
    grid = hnp.arrays(np.float64, (rows, classes), elements=exact(40))
    # Steps of a power of two divide exactly; 0 and positive ones are the degenerate cases.
    impact = hnp.arrays(
        np.float64, rows, elements=st.sampled_from([-4.0, -1, -0.5, -0.125, 0, 0.5])
    )
    labels = hnp.arrays(np.int64, rows, elements=st.integers(0, 60))
    return (
        draw(grid),
        draw(impact),
        draw(grid.filter(lambda a: a.shape == (rows, classes))),
        draw(labels),
    )


@given(gridded_updates())
def test_equals_the_loop_exactly_ties_included(update):
    row_sums, impact, offset, labels = update
    counts = decode(row_sums, impact, offset, labels)
    for row in range(len(labels)):
        expected = decode_by_loop(row_sums[row], impact[row], offset[row], labels[row])
        assert counts[row].tolist() == expected.tolist()


@given(st.integers(2, 40), st.floats(-5, -1e-3), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_equals_the_loop_on_any_values_without_near_ties(classes, impact, labels, seed):
    rng = np.random.default_rng(seed)
    row_sums, offset = rng.normal(size=(2, classes)) * rng.choice([0.01, 1.0, 100.0])
    value = row_sums - offset - impact * (row_sums < 0)
    assume(not has_near_tie(value, impact, np.zeros_like(value), labels))
    raw = np.sort(row_sums)
    assume((np.diff(raw) > 1e-9).all())
    counts = decode(row_sums[None], np.array([impact]), offset[None], np.array([labels]))[0]
    assert counts.tolist() == decode_by_loop(row_sums, impact, offset, labels).tolist()


@given(gridded_updates())
def test_counts_are_natural_numbers_that_sum_to_the_labels(update):
    counts = decode(*update)
    assert (counts >= 0).all()
    assert counts.sum(axis=1).tolist() == update[3].tolist()


@given(gridded_updates())
def test_torch_gives_the_same_counts_as_numpy(update):
    expected = decode(*update)
    found = decode(*(torch.from_numpy(array.copy()) for array in update))
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == expected.tolist()


@given(st.integers(2, 20), st.floats(-5, -1e-3), st.integers(0, 200), st.integers(0, 2**32 - 1))
def test_permuting_classes_and_offsets_permutes_the_counts(classes, impact, labels, seed):
    rng = np.random.default_rng(seed)
    row_sums, offset = rng.normal(size=(2, classes))
    value = row_sums - offset - impact * (row_sums < 0)
    assume(not has_near_tie(value, impact, np.zeros_like(value), labels))
    order = rng.permutation(classes)
    m, n = np.array([impact]), np.array([labels])
    plain = decode(row_sums[None], m, offset[None], n)[0]
    permuted = decode(row_sums[None, order], m, offset[None, order], n)[0]
    assert plain[order].tolist() == permuted.tolist()


def test_one_calibration_serves_all_updates():
    rng = np.random.default_rng(0)
    row_sums, labels = rng.normal(size=(7, 5)), np.full(7, 20)
    impact, offset = np.array([-0.3]), rng.normal(size=(1, 5))
    shared = decode(row_sums, impact, offset, labels)
    repeated = decode(row_sums, np.repeat(impact, 7), np.repeat(offset, 7, axis=0), labels)
    assert (shared == repeated).all()


def test_the_sign_is_taken_before_the_offset_is_removed():
    # Without its offset class 1 is the smallest, but only class 0 has a negative gradient.
    counts = decode(
        np.array([[-1.0, 2.0]]), np.array([-1.0]), np.array([[0.0, 9.0]]), np.array([1])
    )
    assert counts.tolist() == [[1, 0]]


def test_more_negative_classes_than_labels_takes_the_most_negative():
    counts = decode(
        np.array([[-1.0, -3.0, -2.0, 6.0]]), np.array([-1.0]), np.zeros((1, 4)), np.array([2])
    )
    assert counts.tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize("impact", [-1e-300, -1e-12, -1e12, np.nan, np.inf, -np.inf])
def test_extreme_impacts_still_give_counts_that_sum_to_the_labels(impact):
    row_sums = np.array([[-1e6, 1e6, 3.0, -2e-9]])
    counts = decode(row_sums, np.array([impact]), np.zeros((1, 4)), np.array([1000]))
    assert (counts >= 0).all()
    assert counts.sum() == 1000


def test_a_million_labels_take_no_longer_than_one():
    # The loop would take a million turns; the water filling has none.
    row_sums = np.random.default_rng(1).normal(size=(3, 1000))
    counts = decode(row_sums, np.full(3, -0.01), np.zeros((3, 1000)), np.full(3, 10**6))
    assert counts.sum(axis=1).tolist() == [10**6] * 3
    level = row_sums + 0.01 * counts
    assert (level.max(axis=1) - level.min(axis=1) <= 0.01 + 1e-9).all()


# An impact for each class


@st.composite
def steps_by_class(draw):
    row_sums, _, offset, labels = draw(gridded_updates().filter(lambda u: u[0].shape[1] > 1))
    impacts = st.sampled_from([-4.0, -1, -0.5, -0.125])
    return row_sums, draw(hnp.arrays(np.float64, row_sums.shape, elements=impacts)), offset, labels


@given(steps_by_class())
def test_an_impact_per_class_equals_the_loop_exactly_ties_included(update):
    row_sums, impact, offset, labels = update
    counts = decode(row_sums, impact, offset, labels)
    torch_counts = decode(*(torch.from_numpy(array.copy()) for array in update))
    assert torch_counts.tolist() == counts.tolist()
    for row in range(len(labels)):
        expected = decode_by_loop(row_sums[row], impact[row], offset[row], labels[row])
        assert counts[row].tolist() == expected.tolist()


@given(st.integers(2, 30), st.integers(0, 500), st.integers(0, 2**32 - 1))
def test_an_impact_per_class_fills_up_to_one_level(classes, labels, seed):
    rng = np.random.default_rng(seed)
    value = rng.normal(size=(3, classes)) * rng.choice([1e-3, 1.0, 1e6])
    step = 10.0 ** rng.uniform(-4, 1, size=(3, classes))
    counts = decode(np.abs(value), -step, np.zeros((3, classes)), np.full(3, labels))
    assert counts.sum(axis=1).tolist() == [labels] * 3
    following = np.abs(value) + counts * step
    taken = np.where(counts > 0, following - step, -np.inf)
    assert (taken.max(axis=1) <= following.min(axis=1) * (1 + 1e-12)).all()


def test_equal_impacts_per_class_are_one_impact():
    rng = np.random.default_rng(2)
    row_sums, offset, labels = rng.normal(size=(20, 7)), rng.normal(size=(1, 7)), np.full(20, 40)
    shared = decode(row_sums, np.array([-0.3]), offset, labels)
    by_class = decode(row_sums, np.full((1, 7), -0.3), offset, labels)
    assert (shared == by_class).all()


def test_a_million_labels_with_an_impact_per_class():
    rng = np.random.default_rng(1)
    row_sums, step = rng.normal(size=(3, 1000)), rng.uniform(0.001, 0.1, size=(3, 1000))
    counts = decode(row_sums, -step, np.zeros((3, 1000)), np.full(3, 10**6))
    assert counts.sum(axis=1).tolist() == [10**6] * 3
    following = row_sums + step * counts
    assert ((following - step).max(axis=1) <= following.min(axis=1) + 1e-9).all()


# Breaching's decoding


@given(gridded_updates())
def test_the_released_decoding_equals_breaching_s_loop(update):
    row_sums, impact, _, labels = update
    impact = np.minimum(impact, 0)
    counts = decode_released(row_sums, impact, labels)
    torch_counts = decode_released(
        *(torch.from_numpy(array.copy()) for array in (row_sums, impact, labels))
    )
    assert torch_counts.tolist() == counts.tolist()
    for row in range(len(labels)):
        expected = decode_released_by_loop(row_sums[row], impact[row], labels[row])
        assert counts[row].tolist() == expected.tolist()


def test_the_released_decoding_gives_one_class_all_that_remain():
    row_sums, impact, labels = np.array([[-3.0, -2.5, 5.5]]), np.array([-1.0]), np.array([9])
    assert decode_released(row_sums, impact, labels).tolist() == [[8, 1, 0]]
    assert decode(row_sums, impact, np.zeros((1, 3)), labels).tolist() == [[5, 4, 0]]
