import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from testbed.data import DISTRIBUTIONS, Sampler, draw_labels, draw_skew


def assert_uniform(counts: NDArray[np.int64]) -> None:
    """Chi-square test at 1e-6, the critical value by Wilson and Hilferty's approximation."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    spread = 2 / (9 * freedom)
    critical = freedom * (1 - spread + 4.753 * spread**0.5) ** 3
    assert ((counts - expected) ** 2 / expected).sum() < critical


def test_chi_square_finds_a_small_bias() -> None:
    counts = np.full(10, 4000)
    assert_uniform(counts)
    counts[3] += 500
    with pytest.raises(AssertionError):
        assert_uniform(counts)


@given(classes=st.integers(2, 200), seed=st.integers(0, 2**32))
def test_skew_is_two_different_classes(classes: int, seed: int) -> None:
    a, b = draw_skew(classes, np.random.default_rng(seed))
    assert a != b
    assert 0 <= a < classes
    assert 0 <= b < classes
    assert (type(a), type(b)) == (int, int)


def test_skew_is_uniform_over_ordered_pairs() -> None:
    rng = np.random.default_rng(5)
    pairs = list(itertools.permutations(range(5), 2))
    drawn = [pairs.index(draw_skew(5, rng)) for _ in range(20_000)]
    assert_uniform(np.bincount(drawn, minlength=len(pairs)))


@pytest.mark.parametrize("classes", [0, 1])
def test_no_skew_without_two_classes(classes: int) -> None:
    with pytest.raises(ValueError, match="two different classes"):
        draw_skew(classes, np.random.default_rng(0))


@given(
    batch_size=st.integers(0, 300),
    classes=st.integers(2, 120),
    distribution=st.sampled_from(["balanced", "unbalanced"]),
    seed=st.integers(0, 2**32),
)
def test_labels(batch_size: int, classes: int, distribution: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = draw_skew(classes, rng)
    labels = draw_labels(distribution, batch_size, classes, rng, (a, b))
    assert labels.shape == (batch_size,)
    assert labels.dtype == np.int64
    assert ((labels >= 0) & (labels < classes)).all()
    if distribution == "unbalanced":
        half, quarter = batch_size // 2, batch_size // 4
        assert (labels[:half] == a).all()
        assert (labels[half : half + quarter] == b).all()


def test_balanced_labels_are_uniform_and_independent() -> None:
    rng = np.random.default_rng(1)
    drawn = np.array([draw_labels("balanced", 8, 10, rng) for _ in range(4000)])
    assert_uniform(np.bincount(drawn.ravel(), minlength=10))
    # Of neighbours within a batch, every pair is as frequent.
    pairs = 10 * drawn[:, ::2] + drawn[:, 1::2]
    assert_uniform(np.bincount(pairs.ravel(), minlength=100))


@pytest.mark.parametrize(
    ("batch_size", "rest"), [(1, 1), (2, 1), (3, 2), (7, 3), (8, 2), (128, 32)]
)
def test_the_rest_of_an_unbalanced_batch_is_uniform_over_all(batch_size: int, rest: int) -> None:
    rng = np.random.default_rng(batch_size)
    counts = np.zeros(10, np.int64)
    draws = 20_000 // rest
    for _ in range(draws):
        counts += np.bincount(draw_labels("unbalanced", batch_size, 10, rng, (7, 2)), minlength=10)
    counts[7] -= draws * (batch_size // 2)
    counts[2] -= draws * (batch_size // 4)
    assert counts.sum() == draws * rest
    assert_uniform(counts)


@pytest.mark.parametrize("distribution", ["natural", "Balanced", ""])
def test_other_distributions(distribution: str) -> None:
    with pytest.raises(ValueError, match=repr(distribution)):
        draw_labels(distribution, 8, 10, np.random.default_rng(0), (0, 1))


def test_unbalanced_needs_a_skew() -> None:
    with pytest.raises(ValueError, match="skew"):
        draw_labels("unbalanced", 8, 10, np.random.default_rng(0), None)


LABELS = np.random.default_rng(2).permutation(np.repeat(np.arange(5), [40, 5, 100, 30, 25]))
PART = np.sort(np.random.default_rng(3).permutation(200)[:150])


@given(
    distribution=st.sampled_from(DISTRIBUTIONS),
    batch_size=st.integers(1, 400),
    seed=st.integers(0, 2**32),
)
def test_batches_stay_in_the_part(distribution: str, batch_size: int, seed: int) -> None:
    sampler = Sampler(LABELS, PART, 5)
    first = sampler.draw(distribution, batch_size, np.random.default_rng(seed), (1, 3))
    again = sampler.draw(distribution, batch_size, np.random.default_rng(seed), (1, 3))
    assert first.tolist() == again.tolist()
    assert first.shape == (batch_size,)
    assert first.dtype == np.int64
    assert np.isin(first, PART).all()


@given(
    distribution=st.sampled_from(["balanced", "unbalanced"]),
    batch_size=st.integers(1, 130),
    seed=st.integers(0, 2**32),
)
def test_batches_have_the_drawn_labels(distribution: str, batch_size: int, seed: int) -> None:
    sampler = Sampler(LABELS, PART, 5)
    drawn = LABELS[sampler.draw(distribution, batch_size, np.random.default_rng(seed), (4, 0))]
    labels = draw_labels(distribution, batch_size, 5, np.random.default_rng(seed), (4, 0))
    assert drawn.tolist() == labels.tolist()


def test_samples_are_uniform_within_a_class() -> None:
    sampler = Sampler(LABELS, PART, 5)
    rng = np.random.default_rng(4)
    drawn = np.concatenate([sampler.draw("balanced", 128, rng) for _ in range(1000)])
    for label in range(5):
        members = PART[LABELS[PART] == label]
        counts = np.bincount(drawn, minlength=200)[members]
        assert counts.sum() == (LABELS[drawn] == label).sum()
        assert_uniform(counts)


def test_natural_batches_are_uniform_over_the_part() -> None:
    sampler = Sampler(LABELS, PART, 5)
    rng = np.random.default_rng(6)
    drawn = np.concatenate([sampler.draw("natural", 128, rng) for _ in range(500)])
    assert_uniform(np.bincount(drawn, minlength=200)[PART])


def test_part_without_a_class() -> None:
    sampler = Sampler(LABELS, PART[LABELS[PART] != 3], 5)
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no sample of class 3"):
        sampler.draw("balanced", 8, rng)
    assert not (LABELS[sampler.draw("natural", 500, rng)] == 3).any()


def test_empty_part() -> None:
    with pytest.raises(ValueError, match="without samples"):
        Sampler(LABELS, PART[:0], 5)


def test_unknown_distribution() -> None:
    with pytest.raises(ValueError, match="'typo'"):
        Sampler(LABELS, PART, 5).draw("typo", 8, np.random.default_rng(0))
