"""Simulated updates and class means, against their definitions."""

import numpy as np
import pytest

from testbed.attacks import Outputs
from testbed.attacks.auxiliary import class_means
from testbed.attacks.base import Head
from testbed.attacks.simulation import head_gradient, simulate_head, softmax

CLASSES, FEATURES, SAMPLES = 4, 6, 15
RNG = np.random.default_rng(5)
HEAD = Head(RNG.normal(size=(CLASSES, FEATURES)), RNG.normal(size=CLASSES))
H = RNG.random((SAMPLES, FEATURES))
LABELS = np.sort(np.arange(SAMPLES) % CLASSES)
OUTPUTS = Outputs(softmax(H @ HEAD.weight.T + HEAD.bias), H, LABELS)


def steps_by_definition(batches, rate):
    weight, bias = HEAD.weight.copy(), HEAD.bias.copy()
    total_w, total_b = np.zeros_like(weight), np.zeros_like(bias)
    for chosen in batches:
        dw, db = np.zeros_like(weight), np.zeros_like(bias)
        for k in chosen:
            odds = np.exp(weight @ H[k] + bias)
            residual = odds / odds.sum()
            residual[LABELS[k]] -= 1
            dw += np.outer(residual, H[k]) / len(chosen)
            db += residual / len(chosen)
        total_w, total_b = total_w + dw, total_b + db
        weight, bias = weight - rate * dw, bias - rate * db
    return total_w, total_b


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_updates_are_the_sums_of_the_steps_gradients(steps):
    batches = RNG.integers(SAMPLES, size=(3, steps, 4))
    seen = simulate_head(OUTPUTS, HEAD, batches, 0.3)
    for row, batch in enumerate(batches):
        weight, bias = steps_by_definition(batch, 0.3)
        np.testing.assert_allclose(seen.weight_gradient[row], weight, atol=1e-6)
        np.testing.assert_allclose(seen.bias_gradient[row], bias, atol=1e-6)
        np.testing.assert_allclose(seen.row_sums[row], weight.sum(axis=1), atol=1e-5)
    assert seen.local_steps == steps
    assert seen.labels.tolist() == [4 * steps] * 3
    np.testing.assert_allclose(seen.row_sums.sum(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(seen.bias_gradient.sum(axis=1), 0, atol=1e-6)


def test_one_step_needs_no_head_and_several_do():
    batches = np.zeros((1, 1, 2), np.int64)
    assert simulate_head(OUTPUTS, None, batches, 0.1).row_sums.shape == (1, CLASSES)
    with pytest.raises(ValueError, match="last layer's weights"):
        simulate_head(OUTPUTS, None, np.zeros((1, 2, 2), np.int64), 0.1)
    with pytest.raises(ValueError, match="no labels"):
        simulate_head(Outputs(OUTPUTS.posterior, H, None), HEAD, batches, 0.1)


def test_the_inputs_are_left_as_they_are():
    posterior = OUTPUTS.posterior[None].copy()
    before = posterior.copy()
    head_gradient(posterior, H[None], LABELS[None])
    np.testing.assert_array_equal(posterior, before)


def test_means_of_each_class():
    means = class_means(OUTPUTS)
    mass = H.sum(axis=1)
    for c in range(CLASSES):
        mine = c == LABELS
        np.testing.assert_allclose(means.posterior[c], OUTPUTS.posterior[mine].mean(axis=0))
        np.testing.assert_allclose(means.features[c], H[mine].mean(axis=0))
        np.testing.assert_allclose(means.mass[c], mass[mine].mean())
        weighted = (OUTPUTS.posterior * mass[:, None])[mine].mean(axis=0)
        np.testing.assert_allclose(means.weighted[c], weighted)
    assert means.present.all()
    np.testing.assert_allclose(means.mean_posterior, means.posterior.mean(axis=0))


def test_a_class_without_samples_has_the_mean_of_the_others():
    kept = LABELS != 2
    means = class_means(Outputs(OUTPUTS.posterior[kept], H[kept], LABELS[kept]))
    whole = class_means(OUTPUTS)
    assert means.present.tolist() == [True, True, False, True]
    np.testing.assert_allclose(means.posterior[2], whole.posterior[[0, 1, 3]].mean(axis=0))
    np.testing.assert_allclose(means.mean_posterior, whole.posterior[[0, 1, 3]].mean(axis=0))
    np.testing.assert_allclose(means.mass[2], whole.mass[[0, 1, 3]].mean())
    with pytest.raises(ValueError, match="labels"):
        class_means(Outputs(OUTPUTS.posterior, H, None))
