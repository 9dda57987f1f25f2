import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.attacks import metrics


def counts(labels: st.SearchStrategy, classes: int) -> st.SearchStrategy[np.ndarray]:
    return labels.map(lambda drawn: np.bincount(drawn, minlength=classes))


@st.composite
def pairs(draw):
    """Two count vectors with the same number of labels."""
    classes, total = draw(st.integers(2, 12)), draw(st.integers(1, 40))
    label = st.lists(st.integers(0, classes - 1), min_size=total, max_size=total)
    return draw(counts(label, classes)), draw(counts(label, classes))


def test_every_metric_of_a_batch_worked_out_by_hand():
    truth = np.array([3, 1, 0, 0])
    inferred = np.array([1, 1, 2, 0])
    expected = {
        "asr": 2 / 4,
        "presence_accuracy": 3 / 4,
        "presence_precision": 2 / 3,
        "presence_recall": 2 / 2,
        "presence_f1": 4 / 5,
        "count_accuracy": 2 / 4,
        "exact": 0,
        "hellinger": math.sqrt(((math.sqrt(0.75) - math.sqrt(0.25)) ** 2 + 0.5) / 2),
        "total_variation": (2 + 2) / 4 / 2,
        "jaccard": 2 / 6,
    }
    assert set(expected) == set(metrics.METRICS)
    for name, value in expected.items():
        assert metrics.METRICS[name](truth, inferred) == pytest.approx(value), name


@given(pairs())
def test_success_is_the_multiset_intersection(pair):
    truth, inferred = pair
    labels = Counter(np.repeat(np.arange(len(truth)), truth).tolist())
    guessed = Counter(np.repeat(np.arange(len(truth)), inferred).tolist())
    asr = metrics.asr(truth, inferred)
    assert asr == pytest.approx((labels & guessed).total() / labels.total())
    assert metrics.jaccard(truth, inferred) == pytest.approx(
        (labels & guessed).total() / (labels | guessed).total()
    )
    assert metrics.total_variation(truth, inferred) == pytest.approx(1 - asr)
    precision = metrics.presence_precision(truth, inferred)
    recall = metrics.presence_recall(truth, inferred)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    assert metrics.presence_f1(truth, inferred) == pytest.approx(f1)
    assert metrics.exact(truth, inferred) == (truth == inferred).all()


@given(pairs())
def test_metrics_are_bounded_and_perfect_on_the_truth(pair):
    truth, inferred = pair
    for name, metric in metrics.METRICS.items():
        assert -1e-12 <= metric(truth, inferred) <= 1 + 1e-12
        perfect = 0 if name in ("hellinger", "total_variation") else 1
        assert metric(truth, truth) == pytest.approx(perfect, abs=1e-7)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_leading_axes_and_fill_values(name):
    generator = np.random.default_rng(1)
    truth = generator.multinomial(9, np.full(5, 0.2), size=(4, 3)).astype(np.int32)
    inferred = generator.multinomial(9, np.full(5, 0.2), size=(4, 3)).astype(np.int32)
    inferred[1, 2] = truth[2, 0] = inferred[2, 0] = -1
    result = metrics.METRICS[name](truth, inferred)
    assert result.dtype == np.float64
    assert np.isnan(result).sum() == 2
    assert np.isnan(result[1, 2])
    assert np.isnan(result[2, 0])
    for index in [(0, 0), (3, 2)]:
        assert result[index] == metrics.METRICS[name](truth[index], inferred[index])


def test_large_counts_of_a_small_type_do_not_overflow():
    truth = np.array([200, 200], np.uint8)
    assert metrics.asr(truth, np.array([100, 300])) == 300 / 400


@pytest.mark.parametrize(("classes", "total"), [(1, 3), (2, 5), (3, 4), (4, 3)])
def test_expected_random_is_the_mean_over_every_guess(classes, total):
    guesses = np.array(
        [
            np.bincount(guess, minlength=classes)
            for guess in itertools.product(range(classes), repeat=total)
        ]
    )
    for labels in itertools.combinations_with_replacement(range(classes), total):
        truth = np.bincount(labels, minlength=classes)
        every = metrics.asr(np.broadcast_to(truth, guesses.shape), guesses)
        assert metrics.expected_random_asr(truth) == pytest.approx(every.mean(), abs=1e-14)


@pytest.mark.parametrize(("classes", "total"), [(1, 3), (3, 2), (3, 6), (5, 7), (4, 6)])
def test_expected_uniform_is_the_mean_over_every_even_spread(classes, total):
    base, rest = divmod(total, classes)
    guesses = np.full((math.comb(classes, rest), classes), base)
    for guess, extra in zip(guesses, itertools.combinations(range(classes), rest), strict=True):
        guess[list(extra)] += 1
    for labels in itertools.combinations_with_replacement(range(classes), total):
        truth = np.bincount(labels, minlength=classes)
        every = metrics.asr(np.broadcast_to(truth, guesses.shape), guesses)
        assert metrics.expected_uniform_asr(truth) == pytest.approx(every.mean())


def test_random_baselines_of_the_paper():
    # Balanced MNIST batches; measured with the reference implementation (standard error .01).
    generator = np.random.default_rng(0)
    for size, measured in [(1, 0.10), (8, 0.45), (32, 0.71), (128, 0.85)]:
        truth = generator.multinomial(size, np.full(10, 0.1), size=2000)
        assert metrics.expected_random_asr(truth).mean() == pytest.approx(measured, abs=0.025)


def test_expected_random_of_many_labels_and_classes_is_quick_and_sane():
    generator = np.random.default_rng(0)
    truth = generator.multinomial(10_000, np.full(1000, 1e-3), size=(20, 5))
    start = time.perf_counter()
    expected = metrics.expected_random_asr(truth)
    assert time.perf_counter() - start < 2
    sampled = metrics.asr(truth, generator.multinomial(10_000, np.full(1000, 1e-3), size=(20, 5)))
    assert expected.mean() == pytest.approx(sampled.mean(), abs=0.002)


def test_baselines_of_updates_without_truth_are_nan():
    truth = np.array([[2, 1], [-1, -1], [0, 0]])
    for baseline in (metrics.expected_random_asr, metrics.expected_uniform_asr):
        assert np.isnan(baseline(truth)).tolist() == [False, True, True]


def test_advantage():
    assert metrics.advantage([0.9, 0.4, 0.7, 1.0], [0.8, 0.4, 0.85, 1.0]).tolist() == (
        pytest.approx([0.5, 0.0, -1.0, np.nan], nan_ok=True)
    )
    assert metrics.advantage(1.0, 0.3) == 1


def softmax(logits: np.ndarray) -> np.ndarray:
    weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weight / weight.sum(axis=-1, keepdims=True)


@settings(max_examples=30)
@given(st.integers(1, 200), st.integers(2, 100), st.integers(0, 2**32 - 1))
def test_oracle_recovers_every_batch_from_a_single_precision_gradient(size, classes, seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=(3, size))
    posterior = softmax(generator.normal(scale=3, size=(3, size, classes)))
    onehot = np.eye(classes)[labels]
    bias = (posterior - onehot).mean(axis=1).astype(np.float32)
    found = metrics.oracle_counts(posterior.mean(axis=1).astype(np.float32), bias, np.full(3, size))
    assert found.dtype == np.int64
    assert np.array_equal(found, onehot.sum(axis=1))


def test_oracle_leaves_out_what_is_not_finite():
    posterior = np.full((2, 2, 4), 0.25)
    bias = np.zeros((2, 2, 4))
    bias[0, 1, 2] = np.nan
    found = metrics.oracle_counts(posterior, bias, np.array([[4, 4], [8, -1]]))
    assert found.tolist() == [[[1] * 4, [-1] * 4], [[2] * 4, [-1] * 4]]


def test_bootstrap_interval_covers_as_often_as_it_says():
    generator = np.random.default_rng(3)
    covered = []
    for _ in range(200):
        rounds = generator.normal(0.5, 0.1, size=40)
        values = (rounds[:, None] + generator.normal(0, 0.02, size=(40, 5))).ravel()
        low, high = metrics.bootstrap_interval(values, np.repeat(np.arange(40), 5), resamples=300)
        covered.append(low <= 0.5 <= high)
    assert 0.88 <= np.mean(covered) <= 0.99


def test_bootstrap_resamples_clusters_and_not_values():
    values = np.repeat(np.arange(10) / 10, 50)
    wide = metrics.bootstrap_interval(values, np.repeat(np.arange(10), 50))
    narrow = metrics.bootstrap_interval(values, np.arange(500))
    assert wide[1] - wide[0] > 4 * (narrow[1] - narrow[0])
    assert wide[0] < values.mean() < wide[1]


def test_bootstrap_weighs_clusters_by_their_size():
    values, clusters = np.array([1.0] + [0.0] * 9), np.array([0] + [1] * 9)
    # Three outcomes: the first twice (mean 1), both (0.1; half of all), the second twice (0).
    assert metrics.bootstrap_interval(values, clusters, level=0.4) == pytest.approx((0.1, 0.1))


def test_bootstrap_of_degenerate_samples():
    nan = float("nan")
    assert metrics.bootstrap_interval([0.1] * 30, np.arange(30)) == (0.1, 0.1)
    assert metrics.bootstrap_interval([0.1, nan, 0.1], [0, 1, 2]) == (0.1, 0.1)
    for values, clusters in [([], []), ([0.5, 0.7], [3, 3]), ([0.5, nan], [0, 1])]:
        assert np.isnan(metrics.bootstrap_interval(values, clusters)).all()


def test_bootstrap_is_repeatable_and_works_in_blocks(monkeypatch):
    values, clusters = np.random.default_rng(0).random(90), np.arange(90) // 3
    whole = metrics.bootstrap_interval(values, clusters)
    assert whole == metrics.bootstrap_interval(values, clusters)
    assert whole != metrics.bootstrap_interval(values, clusters, seed=1)
    monkeypatch.setattr(metrics, "_BLOCK", 300)
    assert whole == metrics.bootstrap_interval(values, clusters)
