"""Label priors: what the paper's distributions are, and their closed-form variance."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.attacks.label_priors import (
    count_labels,
    draw_counts,
    draw_label_batches,
    share_variance,
)

PRIORS = ["balanced", "unbalanced", "mixed", "dirichlet"]


@given(
    prior=st.sampled_from(PRIORS),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 9)),
    classes=st.integers(1, 6),
    alpha=st.floats(1e-4, 1e3),
)
def test_labels_are_classes(prior, shape, classes, alpha):
    labels = draw_label_batches(prior, shape, classes, np.random.default_rng(0), alpha)
    assert labels.shape == shape
    assert labels.dtype == np.int64
    assert labels.min() >= 0
    assert labels.max() < classes
    again = draw_label_batches(prior, shape, classes, np.random.default_rng(0), alpha)
    np.testing.assert_array_equal(labels, again)
    counts = count_labels(labels, classes)
    for row, found in zip(labels, counts, strict=True):
        expected = Counter(row.ravel().tolist())
        assert found.tolist() == [expected[c] for c in range(classes)]


def test_unbalanced_updates_have_two_dominant_classes_in_all_steps():
    labels = draw_label_batches("unbalanced", (500, 3, 11), 7, np.random.default_rng(1))
    first, second = labels[:, :, :5], labels[:, :, 5:7]
    assert (first == first[:, :1, :1]).all()
    assert (second == second[:, :1, :1]).all()
    assert (first[:, 0, 0] != second[:, 0, 0]).all()
    # Every ordered pair of different classes.
    assert len(set(zip(first[:, 0, 0], second[:, 0, 0], strict=True))) == 42
    rest = np.bincount(labels[:, :, 7:].ravel(), minlength=7)
    assert rest == pytest.approx(np.full(7, rest.sum() / 7), rel=0.1)


def test_every_second_mixed_update_is_unbalanced():
    counts = draw_counts("mixed", 64, 50, 40, np.random.default_rng(2))
    assert (counts[1::2].max(axis=1) >= 32).all()
    assert (counts[::2].max(axis=1) < 16).all()


def test_a_small_concentration_leaves_one_class():
    counts = draw_counts("dirichlet", 30, 10, 200, np.random.default_rng(3), alpha=1e-4)
    assert (counts.max(axis=1) == 30).mean() > 0.95
    assert counts.sum(axis=0) == pytest.approx(np.full(10, 600), rel=0.4)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize(("steps", "size", "classes"), [(1, 8, 10), (1, 1, 3), (3, 13, 4)])
def test_share_variance_is_that_of_the_draws(prior, steps, size, classes):
    shape = 40_000, steps, size
    labels = draw_label_batches(prior, shape, classes, np.random.default_rng(4), alpha=0.7)
    shares = count_labels(labels, classes) / (steps * size)
    variance = share_variance(prior, size, classes, steps, alpha=0.7)
    expected = variance * (np.eye(classes) - 1 / classes)
    np.testing.assert_allclose(np.cov(shares.T), expected, atol=0.03 * expected.max())
