"""Label smoothing, mixup and randomised response: what is trained on, and how it is undone.

Statistical checks have fixed seeds; each would fail by chance once in 100 000 seeds or less often.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from testbed.defenses import Targets, make_defense
from testbed.defenses.labels import LabelSmoothing, Mixup, RandomisedResponse
from testbed.errors import UserError

CLASSES = 10
# Standard deviations beyond which a normal variable is with a probability of 7e-6.
FAR = 4.5

batches = st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=40).map(np.array)
seeds = st.integers(0, 2**64 - 1)


def one_hot(labels: NDArray[np.int64], classes: int = CLASSES) -> Targets:
    return Targets(np.eye(classes, dtype=np.float32)[labels])


def rng_of(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def numbers(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.arange(len(labels))


def counts_of(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.bincount(labels, minlength=CLASSES).astype(np.float64)


def responses(
    defense: RandomisedResponse,
    labels: NDArray[np.int64],
    *,
    rng: int = 0,
    seed: int = 0,
    samples: NDArray[np.int64] | None = None,
    classes: int = CLASSES,
) -> NDArray[np.int64]:
    chosen = numbers(labels) if samples is None else samples
    targets = defense.transform(one_hot(labels, classes), chosen, rng_of(rng), seed)
    assert (np.sort(targets.probabilities, axis=1)[:, -1] == 1).all()
    assert (targets.probabilities.sum(axis=1) == 1).all()
    found: NDArray[np.int64] = targets.probabilities.argmax(axis=1)
    return found


@given(batches, st.floats(0, 0.99))
def test_smoothing_mixes_every_label_with_the_uniform_one(labels, epsilon):
    smooth = LabelSmoothing(epsilon=epsilon).transform(
        one_hot(labels), numbers(labels), rng_of(0), 0
    )
    rest = epsilon / CLASSES
    expected = np.full((len(labels), CLASSES), rest)
    expected[np.arange(len(labels)), labels] = 1 - epsilon + rest
    assert smooth.probabilities.dtype == np.float32
    np.testing.assert_allclose(smooth.probabilities, expected, rtol=1e-6, atol=1e-9)


def test_smoothing_leaves_mixtures_of_images_as_they_are():
    labels = np.array([3, 1, 3, 9])
    mixed = Mixup(alpha=1.0).transform(one_hot(labels), numbers(labels), rng_of(3), 0)
    smooth = LabelSmoothing(epsilon=0.1).transform(mixed, numbers(labels), rng_of(0), 0)
    np.testing.assert_array_equal(smooth.partner, mixed.partner)
    np.testing.assert_array_equal(smooth.share, mixed.share)
    np.testing.assert_allclose(smooth.probabilities, 0.9 * mixed.probabilities + 0.01, rtol=1e-6)


@given(batches, st.floats(0, 0.99))
def test_the_soft_counts_of_smooth_labels_are_restored(labels, epsilon):
    defense = LabelSmoothing(epsilon=epsilon)
    smooth = defense.transform(one_hot(labels), numbers(labels), rng_of(0), 0)
    soft = smooth.probabilities.sum(axis=0, dtype=np.float64)
    restored = defense.restore(soft[None], np.array([len(labels)]))
    # Rounding to float32 is scaled up with the rest.
    error = 1e-6 * len(labels) / (1 - epsilon)
    np.testing.assert_allclose(restored[0], counts_of(labels), rtol=0, atol=error)


@given(batches, st.floats(1e-3, 1e6), seeds)
def test_mixtures_have_the_counts_of_their_labels(labels, alpha, seed):
    mixed = Mixup(alpha=alpha).transform(one_hot(labels), numbers(labels), rng_of(seed), 0)
    np.testing.assert_allclose(
        mixed.probabilities.sum(axis=0), counts_of(labels), atol=1e-6 * len(labels)
    )


@given(batches, seeds)
def test_every_sample_is_mixed_with_one_other_and_labels_as_images_are(labels, seed):
    own = one_hot(labels).probabilities
    mixed = Mixup(alpha=1.0).transform(Targets(own), numbers(labels), rng_of(seed), 0)
    assert sorted(mixed.partner) == list(range(len(labels)))
    assert mixed.share.dtype == np.float32
    assert len(set(mixed.share.tolist())) == 1
    share = mixed.share[:, None]
    expected = share * own + (1 - share) * own[mixed.partner]
    np.testing.assert_allclose(mixed.probabilities, expected, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_shares_have_the_moments_of_the_beta_distribution(alpha):
    labels, rng = np.array([0, 1]), rng_of(5)
    defense = Mixup(alpha=alpha)
    shares = np.array(
        [defense.transform(one_hot(labels), numbers(labels), rng, 0).share[0] for _ in range(3000)]
    )
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < FAR * np.sqrt(variance / len(shares))
    fourth = stats.beta(alpha, alpha).stats(moments="k") + 3
    spread = variance * np.sqrt((fourth - 1) / len(shares))
    assert abs(shares.var() - variance) < FAR * spread


def test_mixing_twice_is_refused():
    labels = np.array([0, 1])
    once = Mixup(alpha=1.0).transform(one_hot(labels), numbers(labels), rng_of(0), 0)
    with pytest.raises(UserError, match="mixed already"):
        Mixup(alpha=0.5).transform(once, numbers(labels), rng_of(0), 0)


@pytest.mark.parametrize(("epsilon", "classes"), [(0.5, 10), (3.0, 10), (1.0, 2), (2.0, 100)])
@pytest.mark.parametrize("memoise", [True, False])
def test_labels_are_kept_and_changed_with_the_stated_probabilities(epsilon, classes, memoise):
    defense = RandomisedResponse(epsilon=epsilon, memoise=memoise)
    rows = 50_000
    labels = np.full(rows, 1)
    found = responses(defense, labels, rng=1, seed=7, classes=classes)
    kept, other = defense.probabilities(classes)
    assert kept == pytest.approx(np.exp(epsilon) / (np.exp(epsilon) + classes - 1))
    assert kept + (classes - 1) * other == pytest.approx(1)
    assert kept / other == pytest.approx(np.exp(epsilon))
    expected = np.full(classes, rows * other)
    expected[1] = rows * kept
    observed = np.bincount(found, minlength=classes)
    assert stats.chisquare(observed, expected).pvalue > 1e-5


def test_remembered_draws_of_neighbouring_samples_are_independent():
    labels = np.zeros(50_000, np.int64)
    found = responses(RandomisedResponse(epsilon=1.0), labels, seed=11)
    for step in (1, 2, 64):
        table, _, _ = np.histogram2d(found[:-step], found[step:], bins=CLASSES)
        assert stats.chi2_contingency(table).pvalue > 1e-5


def test_remembered_draws_are_those_of_the_published_generator():
    # SplitMix64's first outputs from the state 1234567, as published with it in many libraries.
    outputs = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    defense = RandomisedResponse(epsilon=0.7)
    kept, other = defense.probabilities(CLASSES)
    draws = np.array([output / 2**64 for output in outputs])
    shift = np.where(draws < kept, 0, 1 + (draws - kept) // other).astype(int)
    assert shift.any()
    labels = np.array([4, 7, 0, 9, 2])
    expected = (labels + shift) % CLASSES
    np.testing.assert_array_equal(responses(defense, labels, seed=1234567), expected)


@given(seeds, st.permutations(range(12)), st.integers(1, 12))
def test_a_remembered_response_depends_on_the_sample_and_the_seed_alone(seed, order, size):
    defense = RandomisedResponse(epsilon=0.5)
    labels, samples = np.arange(12) % CLASSES, np.arange(12) * 1000
    alone = responses(defense, labels, rng=0, seed=seed, samples=samples)
    chosen = np.array(order[:size])
    together = responses(defense, labels[chosen], rng=9, seed=seed, samples=samples[chosen])
    np.testing.assert_array_equal(together, alone[chosen])


def test_another_seed_gives_other_responses():
    defense, labels = RandomisedResponse(epsilon=0.5), np.zeros(200, np.int64)
    one, other = (responses(defense, labels, seed=seed) for seed in (1, 2))
    assert (one != other).mean() > 0.5


def test_responses_that_are_not_remembered_are_the_batchs_own():
    defense, labels = RandomisedResponse(epsilon=0.5, memoise=False), np.zeros(200, np.int64)
    first, again, later = (responses(defense, labels, rng=rng) for rng in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != later).mean() > 0.5


@pytest.mark.parametrize("memoise", [True, False])
def test_sums_over_rounds_tell_more_only_where_nothing_is_remembered(memoise):
    assert RandomisedResponse(epsilon=1.0, memoise=memoise).accumulates is not memoise
    assert not LabelSmoothing(epsilon=0.1).accumulates


@given(batches, st.floats(1e-3, 20), st.integers(2, 20))
def test_counts_of_responses_are_scaled_by_no_more_than_the_inverse(labels, epsilon, classes):
    defense = RandomisedResponse(epsilon=epsilon)
    counts = np.bincount(labels % classes, minlength=classes).astype(np.float64)[None]
    restored = defense.restore(counts, np.array([len(labels)]))
    kept, other = defense.probabilities(classes)
    away = counts - len(labels) / classes
    scaled = restored - len(labels) / classes
    assert (np.abs(scaled) >= np.abs(away) * (1 - 1e-9)).all()
    assert (np.abs(scaled) <= np.abs(away) / (kept - other) * (1 + 1e-9) + 1e-9).all()
    np.testing.assert_allclose(restored.sum(), len(labels))


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_restored_counts_of_responses_are_nearer_to_the_truth(epsilon):
    defense = RandomisedResponse(epsilon=epsilon)
    labels = np.repeat(np.arange(CLASSES), [200, 100, 50, 0, 0, 0, 0, 0, 0, 10])
    repeats = 200
    samples = np.arange(repeats * len(labels))
    found = responses(defense, np.tile(labels, repeats), seed=3, samples=samples)
    counts = np.stack([counts_of(batch) for batch in found.reshape(repeats, -1)])
    restored = defense.restore(counts, np.full(repeats, len(labels)))
    kept, other = defense.probabilities(CLASSES)
    inverse = (counts - len(labels) * other) / (kept - other)
    error, plain, unbiased = (
        ((values - counts_of(labels)) ** 2).mean() for values in (restored, counts, inverse)
    )
    assert error < plain
    assert error < 1.1 * unbiased


@given(batches, st.integers(2, 20))
def test_the_expected_counts_of_many_responses_are_restored(labels, classes):
    defense = RandomisedResponse(epsilon=2.0)
    true = 10**12 * np.bincount(labels % classes, minlength=classes).astype(np.float64)
    number = 10**12 * len(labels)
    kept, other = defense.probabilities(classes)
    expected = true * kept + (number - true) * other
    restored = defense.restore(expected[None], np.array([number]))
    np.testing.assert_allclose(restored[0], true, atol=1e-6 * number)


def test_with_a_large_epsilon_every_label_is_kept():
    labels = np.arange(1000) % CLASSES
    np.testing.assert_array_equal(responses(RandomisedResponse(epsilon=700.0), labels), labels)


def test_responses_shift_the_distributions_that_defences_before_left():
    labels = np.arange(60) % CLASSES
    defense = RandomisedResponse(epsilon=0.5)
    smooth = LabelSmoothing(epsilon=0.3).transform(one_hot(labels), numbers(labels), rng_of(0), 0)
    shifted = defense.transform(smooth, numbers(labels), rng_of(0), 5)
    found = responses(defense, labels, seed=5)
    expected = LabelSmoothing(epsilon=0.3).transform(one_hot(found), numbers(labels), rng_of(0), 0)
    np.testing.assert_array_equal(shifted.probabilities, expected.probabilities)


def test_what_was_to_be_trained_on_is_not_changed_in_place():
    labels = np.arange(30) % CLASSES
    for defense in (
        LabelSmoothing(epsilon=0.1),
        Mixup(alpha=1.0),
        RandomisedResponse(epsilon=0.1),
        RandomisedResponse(epsilon=0.1, memoise=False),
    ):
        targets = one_hot(labels)
        defense.transform(targets, numbers(labels), rng_of(0), 0)
        np.testing.assert_array_equal(targets.probabilities, one_hot(labels).probabilities)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("label_smoothing", {"epsilon": 1.0}, "option 'epsilon': found 1.0: .*less than 1"),
        ("label_smoothing", {"epsilon": -0.1}, "option 'epsilon': found -0.1: .*or equal to 0"),
        ("label_smoothing", {}, "option 'epsilon' is missing"),
        ("label_smoothing", {"epsilon": 0.1, "at": "update"}, "option 'at': .*'step'"),
        ("mixup", {"alpha": 0.0}, "option 'alpha': found 0.0"),
        ("mixup", {"alpha": 1.0, "alhpa": 1.0}, "no option 'alhpa': did you mean 'alpha'"),
        ("randomised_response", {"epsilon": 0.0}, "option 'epsilon': found 0.0"),
        ("randomised_response", {"epsilon": float("inf")}, "option 'epsilon': found inf"),
        ("randomised_response", {"epsilon": 1, "memoise": "x"}, "option 'memoise': found 'x'"),
    ],
)
def test_knobs_out_of_range_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_defense(name, options)
