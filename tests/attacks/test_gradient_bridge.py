"""The gradient bridge: exact where the Jacobian is the same for all samples, blind to the head."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from global_models import CLASSES, Federation, infer, perceptron, success
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from testbed.attacks import Observations
from testbed.attacks.gradient_bridge import GradientBridge, bridge

BOTH = [GradientBridge(), GradientBridge(counting="least_squares")]


def linear_shift(width: int) -> nn.Module:
    """Build a network of which one bias alone is trained below the head, without activation."""
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.Identity(), nn.Linear(width, CLASSES)
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    module[1].weight.requires_grad_(requires_grad=False)
    return module


def test_residual_is_the_heads_bias_gradient_where_all_samples_share_a_jacobian():
    federation = Federation(linear_shift(16))
    observations, _ = federation.draw(6)
    residual = federation.calibrate(GradientBridge(), observations)["residual"]
    np.testing.assert_allclose(residual, observations.bias_gradient, atol=1e-5)


@pytest.mark.parametrize("attack", BOTH, ids=str)
def test_counts_are_exact_where_all_samples_also_share_a_posterior(attack):
    module = linear_shift(16)
    with torch.no_grad():  # features are the bias that is trained, whatever the input
        module[1].weight.zero_()
    federation = Federation(module)
    observations, truth = federation.draw(20)
    inferred = federation.run(attack, observations)
    np.testing.assert_array_equal(inferred.counts, truth)
    np.testing.assert_allclose(inferred.scores, truth, atol=1e-3)


def test_fewer_features_than_classes_do_not_determine_it():
    federation = Federation(linear_shift(6))
    observations, _ = federation.draw(6)
    residual = federation.calibrate(GradientBridge(), observations)["residual"]
    assert np.abs(residual - observations.bias_gradient).max() > 0.05
    federation.run(GradientBridge(), observations)


@pytest.mark.parametrize("attack", BOTH, ids=str)
@pytest.mark.parametrize(("local_steps", "least"), [(1, 0.9), (4, 0.85)])
def test_success_without_the_head(attack, local_steps, least):
    federation = Federation(perceptron(), local_steps=local_steps)
    observations, truth = federation.draw(20)
    assert success(federation.run(attack, observations).counts, truth) > least


@pytest.mark.parametrize("norm", [False, True])
def test_the_last_layers_part_is_not_looked_at(norm):
    federation = Federation(perceptron(norm=norm), local_steps=2)
    observations, _ = federation.draw(5)
    withheld = observations.update.copy()
    for update in withheld:
        federation.model.weight_gradient(update)[...] = np.nan
        federation.model.bias_gradient(update)[...] = 1e9
    whole = federation.run(GradientBridge(), observations)
    rest = federation.run(GradientBridge(), federation.observe(withheld))
    np.testing.assert_array_equal(whole.scores, rest.scores)
    # Nor are the BatchNorm statistics, which come last.
    withheld[:, federation.flat.layout.parameters :] = np.nan
    assert withheld.shape[1] == federation.flat.layout.parameters + (48 if norm else 0)
    rest = federation.run(GradientBridge(), federation.observe(withheld))
    np.testing.assert_array_equal(whole.scores, rest.scores)


@given(st.integers(2, 7), st.integers(8, 20), st.integers(0, 2**32 - 1))
def test_bridge_is_the_constrained_least_squares_solution(classes, parameters, seed):
    rng = np.random.default_rng(seed)
    jacobian = rng.normal(size=(classes, parameters)).astype(np.float32)
    updates = rng.normal(size=(2, parameters)).astype(np.float32)
    below = rng.permutation(np.arange(parameters) < max(classes, parameters // 2))
    a = jacobian[:, below].T.astype(np.float64)
    for found, update in zip(bridge(jacobian, updates, below), updates, strict=True):
        # With a multiplier for the constraint.
        system = np.block([[a.T @ a, np.ones((classes, 1))], [np.ones((1, classes)), 0.0]])
        expected = np.linalg.solve(system, np.append(a.T @ update[below], 0))[:classes]
        assert abs(found.sum()) < 1e-8
        np.testing.assert_allclose(
            np.linalg.norm(a @ found - update[below]),
            np.linalg.norm(a @ expected - update[below]),
            rtol=1e-3,
        )


def test_bridge_over_several_blocks():
    rng = np.random.default_rng(1)
    jacobian = rng.normal(size=(3, 150_000)).astype(np.float32)
    delta = np.array([[0.5, -0.2, -0.3]])
    update = (delta @ jacobian).astype(np.float32)
    below = rng.random(150_000) < 0.5
    update[:, ~below] = 7
    np.testing.assert_allclose(bridge(jacobian, update, below), delta, atol=1e-6)


def arrays(counts, posterior):
    """Return observations and a calibration of clients with the mean posteriors of each class."""
    shares = counts / counts.sum(axis=1, keepdims=True)
    classes = counts.shape[1]
    observations = Observations(
        np.zeros((len(counts), classes)),
        None,
        None,
        counts.sum(axis=1),
        np.arange(len(counts)),
        update=np.zeros((len(counts), 3), np.float32),
    )
    return observations, {
        "posterior": posterior[None],
        "residual": shares @ (posterior - np.eye(classes)),
    }


def test_counting():
    rng = np.random.default_rng(2)
    counts = rng.integers(0, 5, size=(20, 6))
    counts[:, 0] += 1
    uneven = np.full((6, 6), 0.1) + 0.4 * np.eye(6)
    even = np.full((6, 6), 1 / 6)
    for posterior, attack, exact in [
        (even, GradientBridge(), True),
        (even, GradientBridge(counting="least_squares"), True),
        (uneven, GradientBridge(), False),
        (uneven, GradientBridge(counting="least_squares"), True),
    ]:
        observations, calibration = arrays(counts, posterior)
        found = infer(attack, observations, calibration).counts
        assert np.array_equal(found, counts) == exact
    tensors = replace(
        observations,
        row_sums=torch.from_numpy(observations.row_sums),
        labels=torch.from_numpy(observations.labels),
    )
    for attack in BOTH:
        on_torch = attack.infer(tensors, calibration).counts
        np.testing.assert_array_equal(
            on_torch.numpy(), attack.infer(observations, calibration).counts
        )
        per_update = {
            "posterior": np.repeat(calibration["posterior"], 20, axis=0),
            "residual": calibration["residual"],
        }
        np.testing.assert_array_equal(
            attack.infer(observations, per_update).counts, on_torch.numpy()
        )


@pytest.mark.parametrize("attack", BOTH, ids=str)
def test_missing_classes(attack):
    federation = Federation(perceptron(), missing=[0, 4])
    observations, truth = federation.draw(10)
    assert success(federation.run(attack, observations).counts, truth) > 0.8


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e30])
@pytest.mark.parametrize("attack", BOTH, ids=str)
def test_updates_that_say_nothing(attack, value):
    federation = Federation(perceptron())
    observations, _ = federation.draw(2)
    update = observations.update.copy()
    update[0] = value
    inferred = federation.run(attack, federation.observe(update))
    other = federation.run(attack, observations)
    np.testing.assert_allclose(inferred.scores[1], other.scores[1])


@pytest.mark.parametrize("attack", BOTH, ids=str)
def test_diverged_models(attack):
    federation = Federation(perceptron())
    observations, _ = federation.draw(2)
    calibration = federation.calibrate(attack, observations)
    nothing = {name: np.full_like(values, np.nan) for name, values in calibration.items()}
    infer(attack, observations, nothing)
    jacobian = np.full((3, 5), np.nan, np.float32)
    assert not bridge(jacobian, np.ones((2, 5), np.float32), np.ones(5, bool)).any()
