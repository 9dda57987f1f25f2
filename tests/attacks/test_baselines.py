"""The guesses that ignore the gradient, and the oracle that ignores nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
from closed_form import Federation, attack_once, batches, gradient, observe
from hypothesis import given
from hypothesis import strategies as st

from testbed.attacks import Knowledge, Observations, Outputs, attacks, make_attack
from testbed.attacks.metrics import asr


def guess(name, seed, rows, classes, labels, first_key=0):
    attack = make_attack(name, {})
    observed = Observations(
        np.zeros((rows, classes)), None, None, np.full(rows, labels), np.arange(rows) + first_key
    )
    return attack.infer(observed, attack.calibrate(SimpleNamespace(seed=seed))).counts


@given(st.integers(1, 20), st.integers(1, 60), st.integers(0, 2**64 - 1))
def test_uniform_differs_by_one_label_at_most(classes, labels, seed):
    counts = guess("uniform", seed, 5, classes, labels)
    assert counts.sum(axis=1).tolist() == [labels] * 5
    assert set(np.unique(counts)) <= {labels // classes, -(-labels // classes)}


def test_every_class_has_the_same_chance_of_the_rest():
    counts = guess("uniform", 4, 6000, 10, 23)
    extra = (counts - 2).mean(axis=0)
    assert np.abs(extra - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / 6000)


def test_uniform_depends_on_seed_and_client_alone():
    counts = guess("uniform", 11, 6, 10, 5)
    assert (counts[2:] == guess("uniform", 11, 4, 10, 5, first_key=2)).all()
    assert (counts != guess("uniform", 12, 6, 10, 5)).any()
    assert len({tuple(row) for row in counts}) > 1


def auxiliary(labels, classes):
    outputs = Outputs(
        np.full((len(labels), classes), 1 / classes), np.ones((len(labels), 2)), np.array(labels)
    )
    return SimpleNamespace(classes=classes, on_auxiliary=lambda: outputs)


def test_prior_has_the_shares_of_the_auxiliary_labels():
    adversary = auxiliary([0, 1, 1, 1, 3, 3, 3, 3], 5)
    observed = observe(np.zeros((3, 5, 2)), None, [8, 16, 3])
    counts = attack_once("prior", adversary, observed)
    # 3 labels are 0.375, 1.125 and 1.5 by share: the largest remainders decide.
    assert counts.tolist() == [[1, 3, 0, 4, 0], [2, 6, 0, 8, 0], [0, 1, 0, 2, 0]]


def test_prior_is_worse_than_uniform_where_labels_are_skewed_otherwise():
    adversary = auxiliary([0] * 16 + [1, 2, 3, 4], 5)
    truth = np.array([[0, 2, 10, 4, 4], [2, 0, 0, 18, 0]])
    observed = observe(np.zeros((2, 5, 2)), None, 20)
    found = attack_once("prior", adversary, observed)
    assert found.tolist() == [[16, 1, 1, 1, 1]] * 2
    assert asr(truth, found).tolist() == [4 / 20, 3 / 20]
    assert asr(truth, guess("uniform", 0, 2, 5, 20)).tolist() == [14 / 20, 6 / 20]


@given(batches(lowest=-1.0))
def test_oracle_is_exact_for_every_batch(batch):
    posterior, _, labels = batch
    weight, bias = gradient(*batch)
    observed = observe(weight, bias, len(labels), posterior=posterior.mean(axis=0))
    counts = attack_once("oracle", None, observed)
    assert counts[0].tolist() == np.bincount(labels, minlength=len(bias)).tolist()


@pytest.mark.parametrize("steps", [1, 4])
def test_oracle_is_exact_for_real_updates_given_the_mean_posterior_along_their_steps(steps):
    federation = Federation(seed=1, local_steps=steps)
    observed, counts = federation.round(20, 9)
    np.testing.assert_array_equal(attack_once("oracle", None, observed), counts)


def test_oracle_fails_where_a_defence_bends_the_gradient():
    observed, counts = Federation(seed=2).round(20, 9)
    clipped = observe(
        observed.weight_gradient, observed.bias_gradient * 0.3, 9, posterior=observed.posterior
    )
    assert asr(counts, attack_once("oracle", None, clipped)).mean() < 0.95


def test_what_the_baselines_know():
    known = {name: attacks()[name].knowledge for name in ("random", "uniform", "prior", "oracle")}
    assert list(known.values()) == [
        Knowledge.GRADIENTS,
        Knowledge.GRADIENTS,
        Knowledge.AUXILIARY,
        Knowledge.TRUTH,
    ]
