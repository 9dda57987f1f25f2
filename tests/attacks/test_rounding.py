from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from testbed.attacks.rounding import largest_remainder

score = st.floats(-1e6, 1e6, allow_nan=False)
rows = st.integers(1, 8).flatmap(
    lambda c: st.lists(
        st.tuples(st.lists(score, min_size=c, max_size=c), st.integers(0, 300)),
        min_size=1,
        max_size=5,
    )
)


def hamilton(scores: list[int], total: int) -> list[int]:
    """Textbook definition in exact arithmetic."""
    shares = [Fraction(s * total, sum(scores)) for s in scores]
    counts = [int(s) for s in shares]
    order = sorted(range(len(scores)), key=lambda c: (counts[c] - shares[c], c))
    for c in order[: total - sum(counts)]:
        counts[c] += 1
    return counts


@given(rows)
def test_rows_sum_to_their_totals_and_stay_within_one_of_the_share(batch):
    scores = np.array([row for row, _ in batch])
    totals = np.array([total for _, total in batch])
    counts = largest_remainder(scores, totals)
    assert counts.dtype == np.int64
    assert (counts.sum(axis=1) == totals).all()
    positive = np.where(scores > 0, scores, 0)
    some = positive.sum(axis=1) > 0
    share = positive[some] / positive[some].sum(axis=1, keepdims=True) * totals[some, None]
    assert (np.abs(counts[some] - share) < 1 + 1e-9).all()
    assert (counts[some][positive[some] == 0] == 0).all()


@given(st.lists(st.integers(0, 64), min_size=1, max_size=6).filter(any), st.integers(0, 64))
def test_agrees_with_exact_arithmetic_where_the_factor_is_exact(scores, total):
    # Powers of two as sums: the quotients are exact in float64, ties included.
    scores = [*scores, 512 - sum(scores)]
    assert largest_remainder(np.array([scores], float), np.array([total]))[0].tolist() == (
        hamilton(scores, total)
    )


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8).filter(any))
def test_counts_that_fit_are_returned_as_they_are(counts):
    scores = np.array([counts], float)
    assert largest_remainder(scores, scores.sum(axis=1).astype(int))[0].tolist() == counts


@given(rows, st.randoms())
def test_rows_do_not_influence_each_other(batch, random):
    scores = np.array([row for row, _ in batch])
    totals = np.array([total for _, total in batch])
    order = list(range(len(batch)))
    random.shuffle(order)
    assert np.array_equal(
        largest_remainder(scores, totals)[order], largest_remainder(scores[order], totals[order])
    )


@pytest.mark.parametrize(
    ("scores", "total", "expected"),
    [
        ([1.0, 1.0, 1.0], 4, [2, 1, 1]),
        ([0.0, 1.0, 1.0], 3, [0, 2, 1]),
        ([-5.0, 2.0, 1.0], 3, [0, 2, 1]),
        ([0.0, 0.0, 0.0], 5, [2, 2, 1]),
        ([-1.0, -2.0, 0.0], 2, [1, 1, 0]),
        ([np.nan, 3.0, 1.0], 4, [0, 3, 1]),
        ([np.nan, np.nan], 3, [2, 1]),
        ([np.inf, 1.0, np.inf], 3, [2, 0, 1]),
        ([-np.inf, 1.0, 1.0], 2, [0, 1, 1]),
        ([1e308, 1e308, 1e308], 6, [2, 2, 2]),
        ([5e-324, 0.0, 5e-324], 4, [2, 0, 2]),
        ([0.4, 0.4, 0.2], 0, [0, 0, 0]),
    ],
)
def test_ties_and_degenerate_rows(scores, total, expected):
    assert largest_remainder(np.array([scores]), np.array([total]))[0].tolist() == expected


@given(rows)
def test_torch_gives_what_numpy_gives(batch):
    scores = np.array([row for row, _ in batch])
    totals = np.array([total for _, total in batch])
    counts = largest_remainder(torch.from_numpy(scores), torch.from_numpy(totals))
    assert counts.dtype == torch.int64
    assert np.array_equal(counts.numpy(), largest_remainder(scores, totals))


def test_single_precision_scores_are_rounded_in_double():
    scores = np.array([[0.1, 0.2, 0.7]], np.float32)
    expected = largest_remainder(scores.astype(float), np.array([1_000_003]))
    assert np.array_equal(largest_remainder(scores, np.array([1_000_003])), expected)
