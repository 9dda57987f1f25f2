import itertools
import math
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
        "instance_precision": 2 / 4,
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


def test_guessing_too_many_or_too_few_labels_earns_nothing():
    truth = np.array([3, 1, 0])
    assert metrics.asr(truth, np.array([3, 1, 0])) == 1
    assert metrics.asr(truth, np.array([3, 3, 2])) == 4 / 8
    assert metrics.asr(truth, np.array([1, 0, 0])) == 1 / 4
    assert metrics.instance_precision(truth, np.array([1, 0, 0])) == 1
    assert metrics.instance_precision(truth, np.array([3, 3, 2])) == 4 / 8
    assert np.isnan(metrics.instance_precision(truth, np.array([0, 0, 0])))


def test_presence_has_the_metrics_of_presence_alone():
    truth = np.array([[3, 1, 0, 0], [2, 2, 0, 0], [1, 1, 1, 1]])
    presence = np.array([[1, 0, 1, 0], [-1, -1, -1, -1], [0, 0, 0, 0]], np.int8)
    found = metrics.score("presence", truth, presence, np.array([4, -1, 4]))
    assert list(found) == list(metrics.METRICS)
    nan = float("nan")
    for name, expected in {
        "presence_accuracy": [2 / 4, nan, 0],
        "presence_precision": [1 / 2, nan, nan],
        "presence_recall": [1 / 2, nan, 0],
        "presence_f1": [1 / 2, nan, 0],
    }.items():
        assert found.pop(name) == pytest.approx(expected, nan_ok=True), name
    assert set(metrics.scored_by("presence")) & set(found) == set()
    assert all(np.isnan(values).all() for values in found.values())


def test_a_distribution_is_compared_as_it_is_and_counted_rounded():
    truth = np.array([[3, 1, 0, 0], [3, 1, 0, 0], [3, 1, 0, 0]])
    shares = np.array([[0.6, 0.3, 0.1, 0], [np.nan] * 4, [0.75, 0.25, 0, 0]])
    found = metrics.score("distribution", truth, shares, np.array([4, -1, 8]))
    # 2.4, 1.2, 0.4 of four labels: the missing one goes to the first of the largest remainders.
    nan = float("nan")
    assert found["asr"] == pytest.approx([4 / 4, nan, 4 / 8], nan_ok=True)
    assert found["total_variation"] == pytest.approx([0.15, nan, 0], nan_ok=True)
    distance = math.sqrt(1 - math.sqrt(0.75 * 0.6) - math.sqrt(0.25 * 0.3))
    assert found["hellinger"] == pytest.approx([distance, nan, 0], nan_ok=True, abs=1e-9)
    assert set(metrics.scored_by("distribution")) == set(metrics.METRICS)


@given(pairs())
def test_counts_are_scored_by_every_metric(pair):
    truth, inferred = pair
    found = metrics.score("counts", truth, inferred, truth.sum())
    assert found == {name: metric(truth, inferred) for name, metric in metrics.METRICS.items()}


@pytest.mark.parametrize(("classes", "total"), [(1, 3), (2, 5), (3, 4), (4, 3), (5, 2)])
def test_expected_random_f1_is_the_mean_over_every_guess(classes, total):
    guesses = np.array(
        [
            np.bincount(guess, minlength=classes)
            for guess in itertools.product(range(classes), repeat=total)
        ]
    )
    for labels in itertools.combinations_with_replacement(range(classes), total):
        truth = np.bincount(labels, minlength=classes)
        every = metrics.presence_f1(np.broadcast_to(truth, guesses.shape), guesses)
        assert metrics.expected_random_f1(truth) == pytest.approx(every.mean(), abs=1e-13)


@pytest.mark.parametrize(("classes", "total"), [(1, 3), (3, 2), (3, 6), (5, 3), (4, 4)])
def test_expected_uniform_f1_is_the_mean_over_every_set_of_classes(classes, total):
    held = min(classes, total)
    guesses = np.zeros((math.comb(classes, held), classes), int)
    for guess, chosen in zip(guesses, itertools.combinations(range(classes), held), strict=True):
        guess[list(chosen)] = 1
    for labels in itertools.combinations_with_replacement(range(classes), total):
        truth = np.bincount(labels, minlength=classes)
        every = metrics.presence_f1(np.broadcast_to(truth, guesses.shape), guesses)
        assert metrics.expected_uniform_f1(truth) == pytest.approx(every.mean())


def test_expected_f1_of_many_classes_agrees_with_sampled_guesses():
    generator = np.random.default_rng(0)
    truth = generator.multinomial(128, generator.dirichlet(np.full(100, 0.3)))
    drawn = generator.multinomial(128, np.full(100, 0.01), size=20_000)
    sampled = metrics.presence_f1(np.broadcast_to(truth, drawn.shape), drawn)
    error = sampled.std() / math.sqrt(len(sampled))
    assert abs(metrics.expected_random_f1(truth) - sampled.mean()) < 4 * error
    assert metrics.expected_random_f1(truth) < metrics.expected_uniform_f1(truth)


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


@pytest.mark.parametrize(("true", "guessed"), [(4, 2), (2, 4), (3, 3), (5, 1), (1, 6)])
@pytest.mark.parametrize("metric", ["asr", "presence_f1"])
def test_a_guess_knows_no_more_of_the_size_than_the_attacks(metric, true, guessed):
    classes = 3
    drawn = [np.bincount(g, minlength=classes) for g in itertools.product(range(3), repeat=guessed)]
    base, rest = divmod(guessed, classes)
    spread = [
        np.full(classes, base) + np.isin(range(classes), extra)
        for extra in itertools.combinations(range(classes), rest)
    ]
    expected = metrics.GUESSES[metric]
    for labels in itertools.combinations_with_replacement(range(classes), true):
        truth = np.bincount(labels, minlength=classes)
        for name, guesses in (("random", drawn), ("uniform", spread)):
            every = [metrics.METRICS[metric](truth, guess).item() for guess in guesses]
            found = expected[name](truth, np.array(guessed))
            assert found == pytest.approx(np.mean(every)), name


def test_random_baselines_of_the_paper():
    # Balanced MNIST batches; measured with the reference implementation (standard error .01).
    generator = np.random.default_rng(0)
    for size, measured in [(1, 0.10), (8, 0.45), (32, 0.71), (128, 0.85)]:
        truth = generator.multinomial(size, np.full(10, 0.1), size=2000)
        assert metrics.expected_random_asr(truth).mean() == pytest.approx(measured, abs=0.025)


def test_expected_random_of_many_labels_and_classes_is_sane():
    generator = np.random.default_rng(0)
    truth = generator.multinomial(10_000, np.full(1000, 1e-3), size=(20, 5))
    expected = metrics.expected_random_asr(truth)
    sampled = metrics.asr(truth, generator.multinomial(10_000, np.full(1000, 1e-3), size=(20, 5)))
    assert expected.mean() == pytest.approx(sampled.mean(), abs=0.002)


def test_baselines_of_updates_without_truth_are_nan():
    truth = np.array([[2, 1], [-1, -1], [0, 0]])
    for baseline in (
        baseline for guesses in metrics.GUESSES.values() for baseline in guesses.values()
    ):
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
