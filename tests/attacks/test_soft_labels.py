"""Soft labels of one sample: exact with a bias, nearly always found without."""

import numpy as np
import pytest
import torch
from closed_form import SEEDS, Federation, observe
from hypothesis import assume, given
from hypothesis import strategies as st

from testbed.attacks import Assumption, Knowledge, attacks, make_attack
from testbed.attacks.assumptions import Facts, broken_assumptions
from testbed.attacks.checks import check_answer, check_calibration, check_declaration
from testbed.attacks.simulation import softmax
from testbed.data import load

NAMES = ("soft_labels", "soft_labels_no_bias")
PRIORS = ("smoothing", "mixup")


def infer(name, observed, weight, bias, **options):
    """Return the checked shares."""
    attack = make_attack(name, options)
    shown = observed.restricted(attack)
    answer = attack.infer(shown, {"weight": weight[None], "bias": bias[None]})
    check_answer(name, attack, answer, shown)
    return answer.shares


def soft_label(rng, classes, prior):
    first, second = rng.choice(classes, size=2, replace=False)
    hot = np.eye(classes)
    if prior == "smoothing":
        eps = rng.uniform(0, 0.3)
        return (1 - eps) * hot[first] + eps / classes
    share = rng.uniform(0.05, 0.95)
    return share * hot[first] + (1 - share) * hot[second]


def one_sample(label, features, weight, bias):
    """Return the gradients of the cross entropy with a soft label."""
    residual = softmax(weight @ features + bias) - label
    return np.outer(residual, features), residual


@given(SEEDS, st.integers(2, 15), st.sampled_from([0.1, 1.0, 3.0]))
def test_with_a_bias_any_label_vector_is_recovered(seed, classes, sharpness):
    rng = np.random.default_rng(seed)
    weight, bias = rng.normal(size=(classes, 6)) * sharpness, rng.normal(size=classes)
    # Features of either sign, and labels of no particular form.
    label, features = rng.dirichlet(np.ones(classes)), rng.normal(size=6)
    update = one_sample(label, features, weight, bias)
    assume(np.abs(update[1]).max() > 1e-3)
    found = infer("soft_labels", observe(*update, 1), weight, bias)
    np.testing.assert_allclose(found[0], label, atol=1e-4)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("sharpness", [0.3, 2.0])
def test_without_a_bias_it_is_found_nearly_always(prior, sharpness):
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(60):
        classes = int(rng.integers(5, 25))
        weight, bias = rng.normal(size=(classes, 8)) * sharpness, rng.normal(size=classes)
        label = soft_label(rng, classes, prior)
        update = one_sample(label, rng.normal(size=8), weight, bias)
        observed = observe(update[0], None, 1)
        found = infer("soft_labels_no_bias", observed, weight, bias, prior=prior)
        errors.append(np.abs(found[0] - label).max())
    assert np.mean(np.array(errors) < 0.01) >= 0.95
    assert np.median(errors) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_of_two_samples_a_wrong_label_vector_is_found(name):
    rng = np.random.default_rng(0)
    errors = {1: [], 2: []}
    for samples, found in errors.items():
        for _ in range(40):
            weight, bias = rng.normal(size=(10, 8)), rng.normal(size=10)
            labels = np.eye(10)[rng.choice(10, samples, replace=False)]
            updates = [one_sample(label, rng.normal(size=8), weight, bias) for label in labels]
            mean = (sum(parts) / samples for parts in zip(*updates, strict=True))
            shares = infer(name, observe(*mean, samples), weight, bias)
            found.append(np.abs(shares[0] - labels.mean(axis=0)).max())
    assert max(errors[1]) < 1e-3
    assert np.median(errors[2]) > 0.1
    facts = Facts(classes=10, features=8, bias=True, statistics=0, batch_size=2)
    assert Assumption.ONE_LABEL.value in broken_assumptions(make_attack(name, {}), facts)


@pytest.mark.parametrize("prior", PRIORS)
def test_without_a_bias_two_classes_are_too_few(prior):
    """Of two entries none differs from the rest: a scale with equal ones fits perfectly."""
    weight, bias = np.eye(2), np.zeros(2)
    update = one_sample(np.array([1.0, 0.0]), np.array([1.0, 2.0]), weight, bias)
    found = infer("soft_labels_no_bias", observe(*update, 1), weight, bias, prior=prior)
    np.testing.assert_allclose(found, [[0.5, 0.5]], atol=1e-3)
    np.testing.assert_allclose(
        infer("soft_labels", observe(*update, 1), weight, bias), [[1, 0]], atol=1e-6
    )
    facts = Facts(classes=2, features=2, bias=False, statistics=0, batch_size=1)
    attack = make_attack("soft_labels_no_bias", {"prior": prior})
    assert broken_assumptions(attack, facts) == {"at least five classes": "2 classes"}


def test_the_wrong_prior_finds_another_label():
    rng = np.random.default_rng(1)
    weight, bias = rng.normal(size=(10, 8)), rng.normal(size=10)
    label = 0.6 * np.eye(10)[3] + 0.4 * np.eye(10)[7]
    observed = observe(one_sample(label, rng.normal(size=8), weight, bias)[0], None, 1)
    right = infer("soft_labels_no_bias", observed, weight, bias, prior="mixup")
    wrong = infer("soft_labels_no_bias", observed, weight, bias, prior="smoothing")
    assert np.abs(right[0] - label).max() < 1e-4
    assert np.abs(wrong[0] - label).max() > 0.05


def test_a_hard_label_is_found_under_either_prior():
    rng = np.random.default_rng(2)
    weight, bias = rng.normal(size=(12, 8)), rng.normal(size=12)
    observed = observe(one_sample(np.eye(12)[5], rng.normal(size=8), weight, bias)[0], None, 1)
    for prior in PRIORS:
        found = infer("soft_labels_no_bias", observed, weight, bias, prior=prior)
        np.testing.assert_allclose(found[0], np.eye(12)[5], atol=1e-4)


@pytest.mark.parametrize("trained", [0, 60])
def test_autograd_on_digits(trained):
    dataset = load("digits", None)
    images = torch.from_numpy(dataset.images).float() * dataset.scale
    targets = torch.from_numpy(dataset.labels)
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 40), torch.nn.Tanh(), torch.nn.Linear(40, 10)
    )
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
    rng = np.random.default_rng(0)
    for _ in range(trained):
        batch = torch.from_numpy(rng.integers(900, len(images), size=32))
        loss = torch.nn.functional.cross_entropy(module(images[batch]), targets[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    last = module[-1]
    weight, bias = (part.detach().double().numpy() for part in (last.weight, last.bias))
    for prior in PRIORS:
        labels, updates = [], []
        for index in range(20):
            label = soft_label(rng, 10, prior)
            target = torch.from_numpy(label).float()[None]
            loss = torch.nn.functional.cross_entropy(module(images[index : index + 1]), target)
            updates.append(
                [part.numpy() for part in torch.autograd.grad(loss, [last.weight, last.bias])]
            )
            labels.append(label)
        observed = observe(*map(np.stack, zip(*updates, strict=True)), 1)
        found = infer("soft_labels", observed, weight, bias)
        np.testing.assert_allclose(found, labels, atol=1e-4)
        found = infer("soft_labels_no_bias", observed, weight, bias, prior=prior)
        assert (np.abs(found - labels).max(axis=1) < 0.01).mean() >= 0.95
        alone = infer("soft_labels_no_bias", observed.rows(slice(3, 4)), weight, bias, prior=prior)
        np.testing.assert_array_equal(alone[0], found[3])


def test_a_sum_of_local_steps_is_taken_as_its_mean():
    rng = np.random.default_rng(3)
    weight, bias = rng.normal(size=(6, 4)), rng.normal(size=6)
    update = one_sample(soft_label(rng, 6, "smoothing"), rng.normal(size=4), weight, bias)
    for name in NAMES:
        one = infer(name, observe(*update, 1), weight, bias)
        four = infer(name, observe(*(4 * part for part in update), 4, 4), weight, bias)
        np.testing.assert_allclose(four, one, atol=1e-6)


def test_tensors_give_the_same_shares():
    observed, _ = Federation().round(clients=4, batch_size=2)
    weight, bias = np.random.default_rng(5).normal(size=(5, 7)), np.arange(5.0)
    expected = infer("soft_labels", observed, weight, bias)
    names = ("row_sums", "bias_gradient", "weight_gradient", "labels", "keys")
    tensors = {name: torch.from_numpy(np.array(getattr(observed, name))) for name in names}
    calibration = {"weight": weight[None], "bias": bias[None]}
    found = make_attack("soft_labels", {}).infer(type(observed)(**tensors), calibration)
    np.testing.assert_allclose(found.shares.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_has_a_valid_answer(name):
    federation = Federation(local_steps=2)
    observed, _ = federation.round(clients=3, batch_size=8)
    attack, adversary = make_attack(name, {}), federation.adversary(name, 8)
    calibration = attack.calibrate(adversary)
    check_calibration(name, attack, calibration, {"client": 3, "class": 5, "feature": 7})
    shown = observed.restricted(attack)
    check_answer(name, attack, attack.infer(shown, calibration), shown)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e37, 1e-45])
@pytest.mark.parametrize("where", ["weight", "bias", "both", "head"])
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_degenerate_input_has_a_valid_answer(name, value, where, classes):
    rng = np.random.default_rng(4)
    weight, bias = rng.normal(size=(classes, 4)), rng.normal(size=classes)
    gradients = list(one_sample(np.eye(classes)[1], rng.normal(size=4), weight, bias))
    if where in ("weight", "both"):
        gradients[0][:] = value
    if where in ("bias", "both"):
        gradients[1][:] = value
    if where == "head":
        weight[0], bias[:] = value, value
    for prior in PRIORS if name == "soft_labels_no_bias" else [None]:
        options = {} if prior is None else {"prior": prior}
        infer(name, observe(*gradients, 1), weight, bias, **options)


def test_declarations():
    for name in NAMES:
        attack = attacks()[name]
        check_declaration(name, attack.calibration_arrays)
        assert attack.knowledge is Knowledge.MODEL
    assert attacks()["soft_labels"].assumes == {Assumption.ONE_LABEL}
    assert attacks()["soft_labels_no_bias"].assumes == {
        Assumption.ONE_LABEL,
        Assumption.FIVE_CLASSES,
    }
