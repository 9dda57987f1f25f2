"""Breaking secure aggregation: exact for as many clients as features, and not beyond."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from global_models import infer, success
from torch import nn

from testbed.attacks import Head, Observations, Planted
from testbed.attacks.checks import check_calibration, check_declaration
from testbed.attacks.secure_sums import BreakingSecureAggregation, embeddings, plant
from testbed.data import load

CLASSES, FEATURES, BATCH = 10, 24, 8


@dataclass
class Malicious:
    """A server that knows what it planted; the rest of an adversary is not asked for."""

    said: Planted

    def planted(self) -> Planted:
        return self.said


def cohort(users, *, gamma=0.0, local_steps=1, shifts=None, seed=0):
    """Return what the server sees of a real cohort, what it planted, and the true counts."""
    rng = np.random.default_rng(seed)
    data = load("digits", None)
    images = torch.from_numpy(data.images).float() * data.scale
    labels = torch.from_numpy(data.labels)
    torch.default_generator.manual_seed(seed)
    module = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, FEATURES),
        nn.BatchNorm1d(FEATURES),
        nn.Linear(FEATURES, CLASSES),
    )
    norm, head = module[2], module[3]
    shifts = embeddings(users, FEATURES, rng) if shifts is None else shifts
    weights = rng.uniform(0.5, 2, users) / users
    known = Head(
        head.weight.detach().numpy().astype(float), head.bias.detach().numpy().astype(float)
    )
    total, truth = torch.zeros(CLASSES, FEATURES), np.zeros((users, CLASSES), np.int64)
    for user in range(users):
        with torch.no_grad():
            norm.weight.fill_(gamma)
            norm.bias.copy_(torch.from_numpy(shifts[user]))
        for _ in range(local_steps):
            batch = torch.from_numpy(rng.choice(len(labels), BATCH))
            loss = nn.functional.cross_entropy(module(images[batch]), labels[batch])
            (gradient,) = torch.autograd.grad(loss, [head.weight])
            total += weights[user] * gradient
            truth[user] += np.bincount(data.labels[batch], minlength=CLASSES)
    summed = np.broadcast_to(total.numpy(), (users, CLASSES, FEATURES))
    observations = Observations(
        row_sums=summed.sum(axis=2),
        bias_gradient=None,
        weight_gradient=summed,
        labels=np.full(users, BATCH * local_steps),
        keys=np.arange(users),
        local_steps=local_steps,
    )
    return observations, plant(known, shifts, weights), truth


def run(observations, planted):
    attack = BreakingSecureAggregation()
    calibration = attack.calibrate_updates(Malicious(planted), observations.restricted(attack))
    check_declaration(attack.name, attack.arrays())
    lengths = {"client": len(observations.keys), "class": CLASSES, "feature": FEATURES}
    check_calibration(attack.name, attack, calibration, lengths)
    return infer(attack, observations, calibration)


@pytest.mark.parametrize("users", [1, 5, FEATURES])
@pytest.mark.parametrize("gamma", [0.0, 1e-5])
def test_exact_up_to_as_many_clients_as_features(users, gamma):
    observations, planted, truth = cohort(users, gamma=gamma)
    np.testing.assert_array_equal(run(observations, planted).counts, truth)


def test_exact_with_independent_features_that_are_not_orthogonal():
    shifts = np.random.default_rng(3).normal(size=(12, FEATURES))
    observations, planted, truth = cohort(12, shifts=shifts)
    np.testing.assert_array_equal(run(observations, planted).counts, truth)


def test_exact_on_sums_of_steps_that_leave_the_planted_values_alone():
    observations, planted, truth = cohort(6, local_steps=3)
    np.testing.assert_array_equal(run(observations, planted).counts, truth)


def test_more_clients_than_features_mix():
    observations, planted, truth = cohort(2 * FEATURES)
    found = success(run(observations, planted).counts, truth)
    assert found < 0.9


def test_features_of_the_samples_own_spoil_it():
    exact, planted, truth = cohort(10)
    spoilt, _, _ = cohort(10, gamma=1.0)
    assert success(run(exact, planted).counts, truth) == 1
    assert success(run(spoilt, planted).counts, truth) < 0.95


def test_what_is_planted_is_what_the_model_answers():
    _, planted, _ = cohort(4)
    torch.default_generator.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, FEATURES), nn.BatchNorm1d(FEATURES), nn.Linear(24, 10))
    with torch.no_grad():
        logits = module[2](torch.from_numpy(planted.embeddings).float())
    np.testing.assert_allclose(planted.posterior, logits.softmax(dim=1).numpy(), atol=1e-6)


@pytest.mark.parametrize("users", [3, FEATURES])
def test_embeddings_are_orthogonal(users):
    planted = embeddings(users, FEATURES, np.random.default_rng(0))
    np.testing.assert_allclose(planted @ planted.T, FEATURES * np.eye(users), atol=1e-9)


def test_more_embeddings_than_features_are_different():
    planted = embeddings(50, FEATURES, np.random.default_rng(0))
    assert planted.shape == (50, FEATURES)
    assert len(np.unique(planted, axis=0)) == 50


def test_the_sum_has_to_be_of_those_planted():
    observations, planted, _ = cohort(4)
    with pytest.raises(ValueError, match="planted in 4 clients, but the sum has 3"):
        run(observations.rows(slice(3)), planted)


def test_torch_and_numpy_agree():
    observations, planted, _ = cohort(7)
    attack = BreakingSecureAggregation()
    calibration = attack.calibrate_updates(Malicious(planted), observations)
    tensors = replace(
        observations,
        weight_gradient=torch.from_numpy(observations.weight_gradient.copy()),
        labels=torch.from_numpy(observations.labels),
    )
    found = attack.infer(tensors, calibration)
    expected = attack.infer(observations, calibration)
    np.testing.assert_array_equal(found.counts.numpy(), expected.counts)
    np.testing.assert_allclose(found.scores.numpy(), expected.scores)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_sums_that_say_nothing(value):
    observations, planted, _ = cohort(3)
    strange = np.full_like(observations.weight_gradient, value)
    run(replace(observations, weight_gradient=strange), planted)


def test_a_client_without_weight_gets_an_answer():
    observations, planted, truth = cohort(3)
    nothing = replace(planted, weights=planted.weights * np.array([1, 0, 1]))
    inferred = run(observations, nothing)
    np.testing.assert_array_equal(inferred.counts[[0, 2]], truth[[0, 2]])
