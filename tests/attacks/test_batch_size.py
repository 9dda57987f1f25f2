"""What a server that does not know the batch size learns of it from the gradient."""

import numpy as np
import pytest
import torch
from closed_form import SEEDS, gradient, random_posterior
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from testbed.attacks.batch_size import estimate_labels
from testbed.data import load
from testbed.models.build import build


def updates(seed, samples, classes=10, width=20, steps=1, rows=4, sharpness=0.3):
    """Return float32 sums over local steps of last-layer gradients on samples all different."""
    rng = np.random.default_rng(seed)
    weights, biases = [], []
    for _ in range(rows):
        parts = [
            gradient(
                random_posterior(rng, samples, classes, sharpness),
                rng.uniform(0, 1, (samples, width)),
                rng.integers(classes, size=samples),
            )
            for _ in range(steps)
        ]
        weights.append(sum(w for w, _ in parts))
        biases.append(sum(b for _, b in parts))
    return np.array(weights, np.float32), np.array(biases, np.float32)


@given(SEEDS, st.integers(1, 8), st.booleans())
def test_the_rank_tells_few_distinct_samples_exactly(seed, samples, with_bias):
    weight, bias = updates(seed, samples)
    found = estimate_labels(weight, bias if with_bias else None, 1)
    assert found.dtype == np.int64
    assert found.tolist() == [samples] * 4


@pytest.mark.parametrize(("samples", "steps"), [(1, 5), (2, 3), (4, 2)])
def test_the_rank_of_a_sum_of_steps_tells_all_their_labels(samples, steps):
    weight, bias = updates(1, samples, classes=12, steps=steps)
    assert estimate_labels(weight, bias, steps).tolist() == [samples * steps] * 4


def test_the_features_bound_the_rank_too():
    weight, _ = updates(2, 3, width=3)
    assert (estimate_labels(weight, None, 1) >= 3).all()
    weight, bias = updates(2, 2, width=3)
    assert estimate_labels(weight, bias, 1).tolist() == [2] * 4


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("labels", [16, 64, 256])
def test_the_spread_tells_many_uniform_labels_of_an_untrained_model(labels, steps):
    rng = np.random.default_rng(labels)
    classes = 10
    counts = rng.multinomial(labels, np.full(classes, 1 / classes), size=400)
    bias = (1 / classes - counts / labels) * steps
    weight = rng.normal(size=(400, classes, 20))  # of full rank
    found = estimate_labels(weight.astype(np.float32), bias.astype(np.float32), steps)
    assert (found % steps == 0).all()
    # sum_c b_c^2 is (1 - 1/C) / N on average, so that it is the inverse that is without bias.
    assert 1 / (1 / found).mean() == pytest.approx(labels, rel=0.15)
    assert np.median(found) == pytest.approx(labels, rel=0.25)


def test_unbalanced_labels_look_like_few():
    counts = np.array([[64, 32, 4, 4, 4, 4, 4, 4, 4, 4]])
    weight = np.random.default_rng(0).normal(size=(1, 10, 20)).astype(np.float32)
    bias = (0.1 - counts / 128).astype(np.float32)
    # Not fewer than the rank, though.
    assert estimate_labels(weight, bias, 1).tolist() == [9]


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-3])
def test_a_gradient_without_spread_is_of_1024_labels(scale):
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(3, 10, 20)).astype(np.float32)  # of full rank
    bias = np.tile(np.float32(scale) * np.eye(10, dtype=np.float32)[0], (3, 1))
    assert estimate_labels(weight, bias, 1).tolist() == [1024] * 3
    assert estimate_labels(weight, bias, 4).tolist() == [1024] * 3


def test_row_sums_stand_in_for_a_bias():
    rng = np.random.default_rng(4)
    labels, classes = 20, 30
    counts = rng.multinomial(labels, np.full(classes, 1 / classes), size=1)
    rows = (1 / classes - counts / labels)[:, :, None] * 7.0
    # Features that sum to 7, and noise that fills the rank and cancels in the sums.
    noise = rng.normal(size=(1, classes, 60)) * 1e-2
    weight = rows / 60 + noise - noise.mean(axis=2, keepdims=True)
    found = estimate_labels(weight.astype(np.float32), None, 1)
    bias = rows[:, :, 0] / 7.0
    assert found.tolist() == estimate_labels(weight, bias, 1).tolist()


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, np.inf, 1e38])
@pytest.mark.parametrize("steps", [1, 3])
def test_any_gradient_gives_a_number(value, steps):
    weight = np.full((2, 4, 3), value, np.float32)
    for bias in (None, np.zeros((2, 4), np.float32), np.full((2, 4), value, np.float32)):
        found = estimate_labels(weight, bias, steps)
        assert found.shape == (2,)
        assert ((found >= steps) & (found % steps == 0)).all()


@pytest.mark.parametrize("samples", [1, 2, 4, 8])
def test_exact_on_real_images(data_root, samples):
    dataset = load("mnist", data_root / "mnist")
    rng = np.random.default_rng(samples)
    weights, biases = [], []
    for seed in range(5):
        module = build(
            "cnn",
            shape=dataset.shape,
            classes=10,
            activation="relu",
            arguments={},
            init="torch",
            seed=seed,
        )
        chosen = rng.choice(len(dataset.labels), size=samples, replace=False)
        images = torch.from_numpy(dataset.images[chosen]).float() * dataset.scale
        loss = nn.functional.cross_entropy(module(images), torch.from_numpy(dataset.labels[chosen]))
        last = module.classifier
        weight, bias = torch.autograd.grad(loss, [last.weight, last.bias])
        weights.append(weight.numpy())
        biases.append(bias.numpy())
    found = estimate_labels(np.array(weights), np.array(biases), 1)
    assert found.tolist() == [samples] * 5
