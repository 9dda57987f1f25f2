"""LDIA: the network is what its docstring says, and what it learns beats an even guess."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from closed_form import constant_outputs, server
from global_models import CLASSES, Federation, infer, perceptron
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from testbed.attacks.ldia import LDIA, _backward, _train
from testbed.attacks.simulation import simulate_head

SMALL = LDIA(shadows=60, features=2, hidden=16, epochs=3)


@pytest.fixture(scope="module")
def federation():
    return Federation(perceptron(nn.ReLU))


def distance(shares, counts):
    """Return the mean total variation."""
    true = counts / counts.sum(axis=1, keepdims=True)
    return np.abs(shares - true).sum(axis=1).mean() / 2


def test_better_than_an_even_guess_on_an_untrained_model(federation):
    observations, truth = federation.draw(30)
    shares = federation.run(LDIA(), observations).shares
    even = distance(np.full(truth.shape, 1 / CLASSES), truth)
    assert distance(shares, truth) < 0.35 * even


@pytest.mark.parametrize("options", [{"norm": True}, {"local_steps": 3}], ids=str)
def test_batches_and_steps(options):
    steps = options.pop("local_steps", 1)
    federation = Federation(perceptron(**options), local_steps=steps, batch_size=16)
    observations, truth = federation.draw(20)
    shares = federation.run(LDIA(shadows=400), observations).shares
    even = distance(np.full(truth.shape, 1 / CLASSES), truth)
    assert distance(shares, truth) < 0.6 * even


def test_missing_classes_get_little():
    federation = Federation(perceptron(nn.ReLU), missing=[3, 9])
    observations, _ = federation.draw(20)
    shares = federation.run(LDIA(), observations).shares
    assert shares[:, [3, 9]].mean() < 0.02


def test_labels_of_missing_classes_go_to_others():
    federation = Federation(perceptron(nn.ReLU), missing=[3, 9])
    observations, truth = federation.clients(np.full((10, 1, 8), 3))
    shares = federation.run(LDIA(), observations).shares
    assert distance(shares, truth) > 0.9


def test_close_where_samples_of_a_class_are_alike():
    """An untrained model, as closed forms have it: one posterior and one feature vector."""
    rng = np.random.default_rng(0)
    outputs = constant_outputs(rng.dirichlet(np.full(5, 5.0)), rng.uniform(0.1, 1, size=6))
    adversary = server(
        outputs, 16, simulate=lambda chosen: simulate_head(outputs, None, chosen, 0.1)
    )
    labels = np.array([rng.choice(rng.choice(5, 3, replace=False), 16) for _ in range(30)])
    truth = np.eye(5)[labels].sum(axis=1)
    shares = infer(LDIA(), adversary.simulate(3 * labels[:, None]), LDIA().calibrate(adversary))
    even = distance(np.full(truth.shape, 0.2), truth)
    assert distance(shares.shares, truth) < 0.3 * even
    assert np.abs(shares.shares - truth / 16).max() < 0.25


@pytest.mark.parametrize("features", [2, 16])
def test_directions_beyond_the_auxiliary_samples_do_no_harm(features):
    # Ten samples of 24 features.
    federation = Federation(perceptron(nn.ReLU), per_class=1)
    observations, truth = federation.draw(30)
    shares = federation.run(LDIA(features=features), observations).shares
    assert distance(shares, truth) < 0.75 * distance(np.full(truth.shape, 1 / CLASSES), truth)


def test_inference_is_the_network_it_declares(federation):
    observations, _ = federation.draw(3)
    calibration = federation.calibrate(SMALL, observations)
    inferred = infer(SMALL, observations, calibration)
    c = {name: values[0] for name, values in calibration.items()}
    for row in range(3):
        hidden = c["bias_in"].copy()
        for k in range(CLASSES):
            for j in range(2):
                projected = observations.weight_gradient[row, k] @ c["projection"][:, j]
                hidden += projected * c["weight_in"][k, j]
            hidden += observations.bias_gradient[row, k] * c["weight_in"][k, 2]
        odds = np.exp(np.where(hidden > 0, hidden, 0) @ c["weight_out"] + c["bias_out"])
        np.testing.assert_allclose(inferred.shares[row], odds / odds.sum(), rtol=1e-6)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_gradients_are_those_of_the_divergence(width, hidden, classes, seed):
    rng = np.random.default_rng(seed)
    shapes = [(width, hidden), (hidden,), (hidden, classes), (classes,)]
    parameters = [rng.normal(size=shape) for shape in shapes]
    inputs, shares = rng.normal(size=(6, width)), rng.dirichlet(np.ones(classes), 6)
    tensors = [torch.tensor(values, requires_grad=True) for values in parameters]
    v, a, w, b = tensors
    logits = torch.relu(torch.from_numpy(inputs) @ v + a) @ w + b
    loss = nn.functional.kl_div(
        logits.log_softmax(dim=1), torch.from_numpy(shares), reduction="batchmean"
    )
    expected = torch.autograd.grad(loss, tensors)
    for found, gradient in zip(_backward(parameters, inputs, shares), expected, strict=True):
        np.testing.assert_allclose(found, gradient.numpy(), atol=1e-9)


def test_training_is_adams():
    rng = np.random.default_rng(5)
    inputs, shares = rng.normal(size=(32, 4)), rng.dirichlet(np.ones(3), 32)
    start = _train(inputs, shares, 6, 0, np.random.default_rng(1))
    found = _train(inputs, shares, 6, 4, np.random.default_rng(1))
    tensors = [torch.tensor(values, requires_grad=True) for values in start]
    optimizer = torch.optim.Adam(tensors, lr=1e-3)
    v, a, w, b = tensors
    for _ in range(4):
        optimizer.zero_grad()
        logits = torch.relu(torch.from_numpy(inputs) @ v + a) @ w + b
        nn.functional.kl_div(
            logits.log_softmax(dim=1), torch.from_numpy(shares), reduction="batchmean"
        ).backward()
        optimizer.step()
    for values, tensor in zip(found, tensors, strict=True):
        np.testing.assert_allclose(values, tensor.detach().numpy(), atol=1e-7)


def test_calibrations_depend_on_the_seed_alone(federation):
    observations, _ = federation.draw(1)
    first, again, other = (federation.calibrate(SMALL, observations, s) for s in (1, 1, 2))
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
    assert not np.array_equal(first["weight_in"], other["weight_in"])
    # More shadows than are held at once.
    assert LDIA(shadows=51).calibrate(federation.adversary(SMALL)).keys() == first.keys()


def test_more_directions_than_features(federation):
    observations, _ = federation.draw(2)
    wide = LDIA(shadows=20, features=30, hidden=8, epochs=1)
    projection = federation.calibrate(wide, observations)["projection"][0]
    np.testing.assert_allclose(projection[:, :24].T @ projection[:, :24], np.eye(24), atol=1e-9)
    assert not projection[:, 24:].any()
    federation.run(wide, observations)


def test_torch_and_numpy_agree(federation):
    observations, _ = federation.draw(4)
    calibration = federation.calibrate(SMALL, observations)
    expected = SMALL.infer(observations, calibration).shares
    tensors = replace(
        observations,
        **{
            name: torch.from_numpy(getattr(observations, name).copy())
            for name in ("row_sums", "weight_gradient", "bias_gradient", "labels")
        },
    )
    np.testing.assert_allclose(SMALL.infer(tensors, calibration).shares.numpy(), expected)
    each = {name: np.repeat(values, 4, axis=0) for name, values in calibration.items()}
    np.testing.assert_allclose(SMALL.infer(observations, each).shares, expected)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e30])
def test_updates_that_say_nothing(federation, value):
    observations, _ = federation.draw(2)
    strange = replace(
        observations,
        weight_gradient=np.full_like(observations.weight_gradient, value),
        bias_gradient=np.full_like(observations.bias_gradient, value),
    )
    federation.run(SMALL, strange)


def test_a_calibration_that_is_not_finite_is_an_even_guess(federation):
    observations, _ = federation.draw(2)
    calibration = federation.calibrate(SMALL, observations)
    calibration["weight_in"] = np.full_like(calibration["weight_in"], np.nan)
    np.testing.assert_array_equal(infer(SMALL, observations, calibration).shares, 0.1)


def test_one_auxiliary_sample_for_each_class():
    federation = Federation(perceptron(), per_class=1, batch_size=1)
    observations, _ = federation.draw(3)
    federation.run(SMALL, observations)
