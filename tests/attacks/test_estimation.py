"""What closed-form attacks share: directions of wide layers, and least squares without a sign."""

import time
from itertools import combinations

import numpy as np
import pytest
from closed_form import SEEDS
from hypothesis import given
from hypothesis import strategies as st

from testbed.attacks.estimation import leading_directions, non_negative_solution

# More rows than columns, fewer, and a last layer so wide that no D x D numbers are made.
SHAPES = [(200, 30), (20, 30), (50, 3000)]


def of_rank(shape, rank, seed=0):
    """Return rows with known right singular vectors [D, rank], the values halving."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(length, rank)))[0] for length in shape)
    return left * 0.5 ** np.arange(rank) @ right.T, right


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_directions_are_the_leading_right_singular_vectors(shape):
    rows, right = of_rank(shape, 12)
    found = leading_directions(rows, 5)
    signs = np.sign((found * right[:, :5]).sum(axis=0))
    np.testing.assert_allclose(found * signs, right[:, :5], atol=1e-6)
    # In any unit.
    again = leading_directions(1e200 * rows, 5)
    np.testing.assert_allclose(np.abs(again), np.abs(found), atol=1e-6)


def test_directions_of_a_wide_layer_are_quick():
    rows, _ = of_rank((50, 3000), 50)
    start = time.process_time()
    leading_directions(rows, 16)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("shape", [(9, 4), (5, 3000)], ids=str)
def test_more_directions_than_there_are_become_zeros(shape):
    rows, right = of_rank(shape, min(shape))
    found = leading_directions(rows, 8)
    assert not found[:, min(shape) :].any()
    kept = found[:, : min(shape)]
    np.testing.assert_allclose(np.abs((kept * right).sum(axis=0)), 1, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_directions_behind_the_rank_have_no_part_in_the_rows(shape):
    rows, right = of_rank(shape, 3)
    found = leading_directions(rows, 6)
    np.testing.assert_allclose(np.abs((found[:, :3] * right).sum(axis=0)), 1, atol=1e-6)
    np.testing.assert_allclose(rows @ found[:, 3:], 0, atol=1e-6)


@pytest.mark.parametrize("width", [4, 3000])
def test_what_is_not_finite_counts_as_nothing(width):
    rows = np.random.default_rng(1).normal(size=(6, width))
    broken = rows.copy()
    rows[0, 1] = rows[2, 3] = rows[5, 0] = 0
    broken[0, 1], broken[2, 3], broken[5, 0] = np.nan, np.inf, -np.inf
    np.testing.assert_array_equal(leading_directions(broken, 3), leading_directions(rows, 3))
    for value in (np.nan, 0.0):
        assert np.isfinite(leading_directions(np.full((6, width), value), 3)).all()


def by_supports(system, side):
    """Return the least squares over all choices of positive entries."""
    columns = system.shape[1]
    best, least = np.zeros(columns), np.linalg.norm(side)
    for size in range(1, columns + 1):
        for chosen in map(list, combinations(range(columns), size)):
            part = np.linalg.lstsq(system[:, chosen], side)[0]
            misfit = np.linalg.norm(system[:, chosen] @ part - side)
            if (part >= 0).all() and misfit < least:
                best, least = np.zeros(columns), misfit
                best[chosen] = part
    return best


@given(SEEDS, st.integers(1, 4), st.integers(0, 3))
def test_the_solution_without_negative_entries_is_the_best_of_all_supports(seed, columns, more):
    rng = np.random.default_rng(seed)
    system, side = rng.normal(size=(columns + more, columns)), rng.normal(size=columns + more)
    found = non_negative_solution(system, side)
    assert (found >= 0).all()
    expected = by_supports(system, side)
    scale = 1 / np.linalg.svd(system, compute_uv=False)[-1]
    np.testing.assert_allclose(found, expected, atol=1e-6 * max(scale, 1.0))
