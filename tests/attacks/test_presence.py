"""iDLG and GradInversion: exact where one sample or distinct labels make them so."""

import numpy as np
import pytest
from closed_form import SEEDS, attack_once, batches, gradient, observe, random_posterior
from hypothesis import assume, given
from hypothesis import strategies as st

from testbed.attacks import make_attack
from testbed.attacks.metrics import asr


@given(batches(samples=st.just(1)))
def test_idlg_is_exact_for_one_sample(batch):
    posterior, features, labels = batch
    assume(features.sum() > 1e-3)
    assume(posterior[0, labels[0]] < 1 - 1e-3)
    weight, bias = gradient(*batch)
    counts = attack_once("idlg", None, observe(weight, bias, 1))
    assert counts[0].tolist() == np.eye(len(bias), dtype=int)[labels[0]].tolist()


@pytest.mark.parametrize("name", ["idlg_presence", "gradinversion_presence"])
@given(batches(samples=st.just(1)))
def test_presence_is_exact_for_one_sample(name, batch):
    posterior, features, labels = batch
    assume(features.sum() > 1e-3)
    assume(posterior[0, labels[0]] < 1 - 1e-3)
    weight, bias = gradient(*batch)
    found = attack_once(name, None, observe(weight, bias, 1))
    assert found[0].tolist() == (np.arange(len(bias)) == labels[0]).tolist()


def test_idlg_gives_all_labels_to_one_class():
    weight = np.array([[[1.0, 2], [-3, 1], [-1, -1]], [[0, 0], [1, 1], [-1, 0]]])
    assert attack_once("idlg", None, observe(weight, None, [4, 1])).tolist() == [
        [0, 4, 0],
        [0, 0, 1],
    ]


def signed_features(samples, draws=200):
    """Draw batches of distinct labels with features of either sign, as of tanh."""
    rng = np.random.default_rng(0)
    for _ in range(draws):
        labels = rng.choice(10, size=samples, replace=False)
        posterior = random_posterior(rng, samples, 10, 0.1)
        observed = observe(*gradient(posterior, rng.uniform(-1, 1, (samples, 8)), labels), samples)
        yield observed, np.bincount(labels, minlength=10)


def test_features_of_either_sign_break_idlg():
    found = [truth - attack_once("idlg", None, seen)[0] for seen, truth in signed_features(1)]
    assert np.abs(found).any(axis=1).mean() > 0.3
    absent = [
        (attack_once("idlg_presence", None, seen)[0] & (truth == 0)).any()
        for seen, truth in signed_features(4)
    ]
    assert np.mean(absent) > 0.3


def test_features_of_either_sign_break_gradinversion():
    updates = list(signed_features(4))
    present = [attack_once("gradinversion_presence", None, seen)[0] for seen, _ in updates]
    assert np.mean(present) > 0.9
    success = [asr(truth, attack_once("gradinversion", None, seen)[0]) for seen, truth in updates]
    assert np.mean(success) < 0.999


@given(batches())
def test_presence_is_never_wrong_where_features_are_not_negative(batch):
    weight, bias = gradient(*batch)
    present = np.bincount(batch[2], minlength=len(bias)) > 0
    # float32, as the server has it: what should be 0 may be a rounding error below.
    weight[np.abs(weight) < 1e-7] = 0
    observed = observe(weight, bias, len(batch[2]))
    for name in ("idlg_presence", "gradinversion_presence"):
        assert (attack_once(name, None, observed)[0] <= present).all()


def private_features(seed, distinct):
    """Draw a batch in which every sample lights features that no other does."""
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 12))
    samples = int(rng.integers(1, classes + 1))
    labels = rng.permutation(classes)[:samples] if distinct else rng.integers(classes, size=samples)
    features = np.diag(rng.uniform(0.5, 1, samples))
    return random_posterior(rng, samples, classes), features, labels


@given(SEEDS)
def test_gradinversion_is_exact_where_samples_share_no_feature_and_no_label(seed):
    batch = private_features(seed, distinct=True)
    weight, bias = gradient(*batch)
    truth = np.bincount(batch[2], minlength=len(bias))
    observed = observe(weight, bias, len(batch[2]))
    assert attack_once("gradinversion", None, observed)[0].tolist() == truth.tolist()


@given(SEEDS)
def test_gradinversion_finds_repeated_labels_once(seed):
    batch = private_features(seed, distinct=False)
    weight, bias = gradient(*batch)
    truth = np.bincount(batch[2], minlength=len(bias))
    found = attack_once("gradinversion", None, observe(weight, bias, truth.sum()))
    assert found.max() == 1
    # At most, whatever the features; here it is reached.
    assert asr(truth, found[0]) == pytest.approx((truth > 0).sum() / truth.sum())


def test_three_of_four_labels_alike_are_two_that_gradinversion_cannot_find():
    rng = np.random.default_rng(0)
    labels, features = np.array([2, 2, 2, 0]), np.diag([0.5, 0.7, 0.9, 1.0])
    observed = observe(*gradient(random_posterior(rng, 4, 6), features, labels), 4)
    found = attack_once("gradinversion", None, observed)[0]
    assert found[[0, 2]].tolist() == [1, 1]
    assert asr(np.array([1, 0, 3, 0, 0, 0]), found) == 0.5


@given(SEEDS)
def test_gradinversion_presence_is_exact_where_samples_share_no_feature(seed):
    batch = private_features(seed, distinct=False)
    weight, bias = gradient(*batch)
    present = np.bincount(batch[2], minlength=len(bias)) > 0
    observed = observe(weight, bias, len(batch[2]))
    assert attack_once("gradinversion_presence", None, observed)[0].tolist() == present.tolist()


@given(SEEDS, st.integers(1, 40))
def test_gradinversion_is_its_definition(seed, labels):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(3, 6, 4)).astype(np.float32)
    found = attack_once("gradinversion", None, observe(weight, None, labels))
    for row in range(3):
        smallest = [min(float(v) for v in weight[row, c]) for c in range(6)]
        order = sorted(range(6), key=lambda c: smallest[c])
        expected = [0] * 6
        for turn in range(labels):
            expected[order[turn % 6]] += 1
        assert found[row].tolist() == expected


@pytest.mark.parametrize("name", ["idlg_presence", "gradinversion_presence"])
def test_presence_scores_are_larger_for_classes_said_to_be_present(name):
    weight = np.random.default_rng(3).normal(size=(5, 8, 2)) + 0.5
    answer = make_attack(name, {}).infer(observe(weight, None, 3), {})
    assert (answer.scores[answer.presence] > 0).all()
    assert (answer.scores[~answer.presence] <= 0).all()
