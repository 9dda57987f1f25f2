"""Posterior regressions: exact where they must be, and better than what they are to replace."""

from dataclasses import replace

import numpy as np
import pytest
from closed_form import constant_outputs, gradient, observe, random_posterior, server
from global_models import CLASSES, Federation, infer, perceptron, success
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from testbed.attacks import Head, Outputs, make_attack
from testbed.attacks.label_priors import count_labels
from testbed.attacks.posterior_regression import LinearPosteriorRegression, PosteriorRegression
from testbed.attacks.regression_features import (
    FEATURES,
    Auxiliary,
    ClassStatistics,
    class_statistics,
    in_unit,
    row_features,
)
from testbed.attacks.regression_network import _gradients, fit_network
from testbed.attacks.simulation import simulate_head

SMALL = PosteriorRegression(simulations=400, steps=250, forward_batches=60)
BOTH = [LinearPosteriorRegression(simulations=300), SMALL]


def no_norms():
    return np.zeros(0, np.float32)


@pytest.fixture(scope="module")
def trained():
    """A model that classifies 99 % of the clients' samples rightly."""
    return Federation(perceptron(nn.ReLU, 64), training=1500, batch_size=32)


def skewed(clients, size, seed=3):
    """Draw labels [N, 1, B] of which half are of one class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=(clients, 1, size))
    labels[:, :, : size // 2] = rng.integers(CLASSES, size=(clients, 1, 1))
    return labels


# The linear estimate


@pytest.mark.parametrize("prior", ["balanced", "unbalanced", "mixed", "dirichlet"])
def test_linear_estimate_is_exact_where_all_samples_of_a_class_are_alike(prior):
    rng = np.random.default_rng(0)
    posterior, features = random_posterior(rng, 6, 6), rng.normal(size=(6, 4))
    alike = np.repeat(np.arange(6), 3)
    outputs = Outputs(posterior[alike], features[alike], alike)
    adversary = server(outputs, 20, momentum=no_norms)
    labels = rng.integers(6, size=(30, 20))
    pairs = [gradient(posterior[row], features[row], row) for row in labels]
    observed = observe(*map(np.array, zip(*pairs, strict=True)), 20)
    attack = LinearPosteriorRegression(prior=prior)
    inferred = infer(attack, observed, attack.calibrate(adversary))
    counts = count_labels(labels[:, None], 6)
    np.testing.assert_array_equal(inferred.counts, counts)
    np.testing.assert_allclose(inferred.scores, counts, atol=1e-3)


def test_linear_estimate_is_the_regression_on_many_simulated_batches():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(4), 50)
    posterior = random_posterior(rng, 200, 4, 2.0)
    features = rng.uniform(size=(200, 3)) + labels[:, None] / 4
    adversary = server(Outputs(posterior, features, labels), 6, momentum=no_norms)
    calibration = LinearPosteriorRegression(prior="balanced").calibrate(adversary)

    chosen = rng.integers(200, size=(60_000, 6))
    residual = posterior - np.eye(4)[labels]
    bias = residual[chosen].mean(axis=1)
    rows = (residual * features.sum(axis=1)[:, None])[chosen].mean(axis=1)
    shares = count_labels(labels[chosen][:, None], 4) / 6
    design = np.concatenate([bias, rows, np.ones((len(bias), 1))], axis=1)
    fitted = design @ np.linalg.lstsq(design, shares, rcond=None)[0]
    found = (
        bias @ calibration["bias"][0]
        + rows @ calibration["row_sums"][0]
        + calibration["intercept"][0]
    )
    best = ((fitted - shares) ** 2).mean()
    # Better than nothing, as good as the best linear estimate there is.
    assert best < 0.6 * shares.var(axis=0).mean()
    assert ((found - shares) ** 2).mean() == pytest.approx(best, rel=0.02)


def test_linear_estimate_of_several_steps_is_fitted_to_simulated_clients():
    federation = Federation(perceptron(), local_steps=3, batch_size=6)
    observed, counts = federation.draw(12)
    attack = LinearPosteriorRegression(simulations=600)
    assert success(federation.run(attack, observed).counts, counts) > 0.9


def test_linear_estimate_of_several_steps_has_all_columns_of_a_wide_layer():
    rng = np.random.default_rng(7)
    posterior, features = random_posterior(rng, 4, 4), rng.normal(size=(4, 2500))
    alike = np.repeat(np.arange(4), 2)
    outputs = Outputs(posterior[alike], features[alike], alike)
    # The layer all but stays where it is, so that both steps are linear in the labels.
    head = Head(np.zeros((4, 2500)), np.log(posterior[0]))
    outputs = replace(outputs, posterior=np.tile(posterior[0], (8, 1)))
    adversary = server(
        outputs,
        6,
        local_steps=2,
        simulate=lambda chosen: simulate_head(outputs, head, chosen, 1e-9),
    )
    labels = rng.integers(4, size=(10, 12))
    observed = adversary.simulate(2 * labels.reshape(10, 2, 6))
    attack = LinearPosteriorRegression(simulations=60)
    inferred = infer(attack, observed, attack.calibrate(adversary))
    np.testing.assert_array_equal(inferred.counts, count_labels(labels[:, None], 4))


# The learned one


def test_an_untrained_model_tells_the_counts():
    federation = Federation(perceptron(), batch_size=8)
    observed, counts = federation.draw(20)
    attack = PosteriorRegression(simulations=1000, steps=600)
    assert success(federation.run(attack, observed).counts, counts) > 0.96


def test_samples_that_the_model_is_sure_of_are_recovered(trained):
    observed, counts = trained.clients(skewed(25, 32))
    found = {
        name: success(trained.run(make_attack(name, {}), observed).counts, counts)
        for name in ("uniform", "llg", "llg_plus", "aux_ls", "pos_neg", "class_basis", "lmmse")
    }
    learned = success(trained.run(PosteriorRegression(), observed).counts, counts)
    assert learned > max(found.values()) + 0.1


def test_who_knows_of_the_noise_reads_more_from_noisy_updates(trained):
    observed, counts = trained.clients(skewed(25, 32))
    rng = np.random.default_rng(1)
    bias = observed.bias_gradient + 1e-3 * rng.normal(size=observed.bias_gradient.shape)
    weight = observed.weight_gradient + 1e-3 * rng.normal(size=observed.weight_gradient.shape)
    noisy = replace(observed, bias_gradient=bias, weight_gradient=weight)
    plain, adapted = (
        success(trained.run(replace(SMALL, noise=noise), noisy).counts, counts)
        for noise in (0.0, 1e-3)
    )
    assert adapted > plain + 0.05


@pytest.mark.parametrize("local_steps", [1, 3])
def test_a_few_steps_and_batch_norm_do_not_stop_it(local_steps):
    for module in (perceptron(nn.ReLU), perceptron(nn.ReLU, norm=True)):
        federation = Federation(module, training=150, local_steps=local_steps)
        observed, counts = federation.draw(20)
        inferred = federation.run(SMALL, observed)
        uniform = federation.run(make_attack("uniform", {}), observed)
        assert success(inferred.counts, counts) > success(uniform.counts, counts) + 0.15


def test_simulated_gradients_are_those_of_clients(trained):
    adversary = trained.adversary(SMALL)
    auxiliary = Auxiliary.of(adversary)
    chosen = np.random.default_rng(0).integers(200, size=(5, 1, 32))
    ((bias, weight),) = auxiliary.simulate(adversary, chosen)
    real = trained.observe(np.array([trained.model.local_update(batch) for batch in chosen]))
    np.testing.assert_allclose(bias, real.bias_gradient, atol=1e-6)
    expected = in_unit(real.weight_gradient, auxiliary.unit)
    np.testing.assert_allclose(weight, expected, atol=1e-6)
    statistics = class_statistics(auxiliary)
    features = row_features(bias, weight, statistics.in_unit(statistics.unit))
    # In units of its spread, even what depends on the smallest gradients agrees.
    again = row_features(
        real.bias_gradient.astype(np.float64), expected, statistics.in_unit(statistics.unit)
    )
    spread = features.std(axis=(0, 1)) + 1e-6
    assert np.median(np.abs(features - again) / spread) < 1e-3


@pytest.mark.parametrize("attack", BOTH, ids=lambda attack: attack.name)
def test_exact_where_all_samples_have_one_posterior_and_one_feature(attack):
    rng = np.random.default_rng(0)
    outputs = constant_outputs(rng.dirichlet(np.full(5, 5.0)), rng.uniform(0.1, 1, size=6))
    adversary = server(outputs, 8, momentum=no_norms)
    labels = rng.integers(5, size=(30, 1, 8))
    labels[::2, :, :4] = labels[::2, :, :1]
    observed = simulate_head(outputs, None, 3 * labels, 0.1)
    inferred = infer(attack, observed, attack.calibrate(adversary))
    np.testing.assert_array_equal(inferred.counts, count_labels(labels, 5))


@pytest.mark.parametrize("attack", BOTH, ids=lambda attack: attack.name)
@pytest.mark.parametrize("confidence", [0.999, 1.0])
def test_a_converged_model_leaves_the_mean_of_the_prior(attack, confidence):
    labels = np.repeat(np.arange(5), 3)
    posterior = confidence * np.eye(5)[labels] + (1 - confidence) / 5
    outputs = Outputs(posterior, np.random.default_rng(0).uniform(size=(15, 4)), labels)
    calibration = attack.calibrate(server(outputs, 10, momentum=no_norms))
    # All ten labels are of one class, and no gradient tells.
    observed = observe(np.zeros((1, 5, 4)), np.zeros((1, 5)), 10)
    np.testing.assert_allclose(infer(attack, observed, calibration).scores, 2.0, atol=1e-3)


def test_linear_estimate_does_not_know_a_class_without_auxiliary_samples():
    found = []
    for missing in ([], [7]):
        federation = Federation(perceptron(), missing=missing)
        observed, counts = federation.clients(np.full((10, 1, 8), 7))
        inferred = federation.run(LinearPosteriorRegression(), observed)
        found.append(success(inferred.counts, counts))
    assert found[0] > 0.9
    assert found[1] < 0.5


@pytest.mark.parametrize("attack", BOTH, ids=lambda attack: attack.name)
def test_equal_seeds_give_equal_calibrations(trained, attack):
    first = attack.calibrate(trained.adversary(attack, seed=5))
    second = attack.calibrate(trained.adversary(attack, seed=5))
    for name, values in first.items():
        assert values.dtype == np.float64
        np.testing.assert_array_equal(values, second[name])


@pytest.mark.parametrize("attack", BOTH, ids=lambda attack: attack.name)
def test_every_update_is_answered_by_itself(trained, attack):
    observed, _ = trained.clients(skewed(6, 32))
    calibration = trained.calibrate(attack, observed)
    together = infer(attack, observed, calibration)
    alone = [infer(attack, observed.rows(slice(i, i + 1)), calibration) for i in range(6)]
    np.testing.assert_allclose(together.scores, np.concatenate([x.scores for x in alone]), 1e-3)
    # One calibration for each update, as of rounds with fresh models.
    other = attack.calibrate(trained.adversary(attack, seed=9))
    each = {name: np.concatenate([calibration[name], other[name]]) for name in calibration}
    mixed = infer(attack, observed.rows(slice(0, 2)), each)
    second = infer(attack, observed.rows(slice(1, 2)), other)
    np.testing.assert_allclose(mixed.scores, np.vstack([alone[0].scores, second.scores]), 1e-3)


# What may go wrong


@pytest.mark.parametrize("attack", BOTH, ids=lambda attack: attack.name)
@pytest.mark.parametrize("local_steps", [1, 2])
def test_classes_without_samples_are_survived(attack, local_steps):
    federation = Federation(perceptron(), missing=[0, 7], batch_size=6, local_steps=local_steps)
    observed, counts = federation.draw(10)
    assert success(federation.run(attack, observed).counts, counts) > 0.4


@pytest.mark.parametrize("attack", BOTH, ids=lambda attack: attack.name)
@pytest.mark.parametrize("ill", [np.nan, np.inf, -np.inf, 3e38, 0.0])
def test_what_is_not_finite_or_zero_is_answered_validly(trained, attack, ill):
    observed, _ = trained.clients(skewed(3, 32))
    calibration = trained.calibrate(attack, observed)
    weight = observed.weight_gradient.copy()
    weight[1], weight[2, :, 3] = ill, ill
    bias = np.full_like(observed.bias_gradient, ill)
    rows = np.full_like(observed.row_sums, ill)
    broken = replace(observed, weight_gradient=weight, bias_gradient=bias, row_sums=rows)
    infer(attack, broken, calibration)


@pytest.mark.parametrize("attack", BOTH, ids=lambda attack: attack.name)
@pytest.mark.parametrize("ill", [np.nan, np.inf, 1e300, 0.0])
def test_a_diverged_model_is_survived(attack, ill):
    labels = np.repeat(np.arange(4), 5)
    posterior = np.eye(4)[(labels + 1) % 4] if ill == 0 else np.full((20, 4), np.nan)
    outputs = Outputs(posterior, np.full((20, 6), ill), labels)
    adversary = server(outputs, 8, momentum=no_norms)
    calibration = attack.calibrate(adversary)
    assert all(np.isfinite(values).all() for values in calibration.values())
    infer(attack, observe(np.zeros((2, 4, 6)), np.zeros((2, 4)), 8), calibration)


@pytest.mark.parametrize("attack", BOTH, ids=lambda attack: attack.name)
def test_single_samples_and_two_classes(attack):
    rng = np.random.default_rng(2)
    for classes, size in ((10, 1), (2, 5)):
        labels = np.repeat(np.arange(classes), 3)
        posterior = random_posterior(rng, len(labels), classes, 0.3)
        outputs = Outputs(posterior, rng.uniform(size=(len(labels), 4)), labels)
        calibration = attack.calibrate(server(outputs, size, momentum=no_norms))
        drawn = rng.integers(len(labels), size=(20, size))
        pairs = [gradient(posterior[row], outputs.features[row], labels[row]) for row in drawn]
        observed = observe(*map(np.array, zip(*pairs, strict=True)), size)
        inferred = infer(attack, observed, calibration)
        counts = count_labels(labels[drawn][:, None], classes)
        assert success(inferred.counts, counts) > 0.85


def test_auxiliary_samples_need_labels():
    outputs = Outputs(np.full((3, 2), 0.5), np.ones((3, 4)), None)
    with pytest.raises(ValueError, match="labels"):
        Auxiliary.of(server(outputs, momentum=no_norms))


# What is read from gradients


def a_batch(rng, updates, classes, width, size=5):
    """Return bias and weight gradients, [S, C] and [S, C, D], and statistics of the classes."""
    residual = random_posterior(rng, updates * size, classes, 2.0)
    residual -= np.eye(classes)[rng.integers(classes, size=len(residual))]
    residual = residual.reshape(updates, size, classes)
    features = np.maximum(rng.normal(size=(updates, size, width)), 0)
    statistics = ClassStatistics(
        random_posterior(rng, classes, classes),
        rng.uniform(size=(classes, width)),
        rng.uniform(0.5, 1.5, size=width),
    )
    weight = np.einsum("skc,skd->scd", residual, features) / size
    return residual.mean(axis=1), weight.astype(np.float32), statistics


def test_order_statistics_and_normalised_columns_are_their_definitions():
    bias, weight, statistics = a_batch(np.random.default_rng(3), 2, 4, 21)
    found = row_features(bias, weight, statistics)
    assert found.shape == (2, 4, FEATURES)
    own = 1 - np.diagonal(statistics.posterior)
    unit = own.mean() / 4
    for update in range(2):
        for c in range(4):
            row = weight[update, c]
            sorted_row = sorted(row / statistics.scale)
            places = [0, 0, 1, 2, 5, 10, 15, 18, 20]
            values = [bias[update, c], row.sum() / statistics.scale.sum()]
            values += [sorted_row[place] for place in places]
            both = [x for v in values for x in (v / unit, np.arcsinh(30 * v / unit))]
            sums = np.abs(weight[update]).sum(axis=0)
            column = [row[d] / sums[d] if sums[d] else 0.0 for d in range(21)]
            lowest = [row[d] < 0 and weight[update, :, d].argmin() == c for d in range(21)]
            both += [
                np.mean(column),
                np.mean([min(x, 0) for x in column]),
                min(column),
                np.mean(np.square(column)),
                np.mean([x < 0 for x in column]),
                np.mean([x < -0.45 for x in column]),
                np.mean(lowest),
            ]
            np.testing.assert_allclose(found[update, c, : len(both)], both, rtol=2e-4, atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(1, 12))
@settings(max_examples=25)
def test_features_follow_a_permutation_of_the_classes(seed, classes, width):
    rng = np.random.default_rng(seed)
    bias, weight, known = a_batch(rng, 3, classes, width)
    order = rng.permutation(classes)
    permuted = ClassStatistics(
        known.posterior[np.ix_(order, order)], known.features[order], known.scale
    )
    found = row_features(bias[:, order], weight[:, order], permuted)
    expected = row_features(bias, weight, known)[:, order]
    # What is whitened with more directions than there are features has rounding errors in it.
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02 * np.abs(expected).max())


def test_a_small_gradient_shows_beside_a_large_one():
    bias, weight, statistics = a_batch(np.random.default_rng(4), 1, 3, 8)
    sure = np.array([1e-5, -1e-5, 0.0])
    wrong = np.array([0.9, 0.0, -0.9])
    features = np.array([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 1, 1]], float)
    weight[0] = np.outer(wrong, features[0]) + np.outer(sure, features[1])
    found = row_features(bias, weight, statistics)[0]
    pure = found[:, 2 * 11 + 5]
    # Of the eight columns, two are the sure sample's alone.
    np.testing.assert_allclose(pure, [0, 2 / 8, 6 / 8])


def test_wide_layers_are_thinned_alike_everywhere():
    rng = np.random.default_rng(5)
    labels = np.repeat(np.arange(3), 4)
    outputs = Outputs(random_posterior(rng, 12, 3), rng.uniform(size=(12, 2500)), labels)
    adversary = server(outputs, 4, momentum=no_norms)
    auxiliary = Auxiliary.of(adversary)
    ((_, weight),) = auxiliary.simulate(adversary, np.zeros((1, 1, 4), np.int64))
    whole = gradient(outputs.posterior[[0] * 4], outputs.features[[0] * 4], labels[[0] * 4])[0]
    statistics = class_statistics(auxiliary).in_unit(auxiliary.unit)
    assert weight.shape == (1, 3, 834)
    assert statistics.scale.shape == (834,)
    np.testing.assert_allclose(weight, in_unit(whole[None], auxiliary.unit), rtol=1e-5)


# The network


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_gradients_are_differences(seed):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(6, 3, 4))
    target = rng.dirichlet(np.ones(3), 6)
    shapes = {
        "read": (4, 5),
        "read_bias": (5,),
        "own": (5, 5),
        "pooled": (5, 5),
        "hidden_bias": (5,),
        "out": (5,),
    }
    weights = {name: rng.normal(size=shape) for name, shape in shapes.items()}

    def loss(changed):
        read = np.maximum(inputs @ changed["read"] + changed["read_bias"], 0)
        pooled = read.mean(axis=1)[:, None] @ changed["pooled"]
        hidden = np.maximum(read @ changed["own"] + pooled + changed["hidden_bias"], 0)
        odds = np.exp(hidden @ changed["out"])
        shares = odds / odds.sum(axis=1, keepdims=True)
        return np.abs(shares - target).sum(axis=1).mean() / 2

    gradients = _gradients(inputs, target, weights)
    for name, values in weights.items():
        direction = rng.normal(size=values.shape)
        step = 1e-7
        ahead = loss({**weights, name: values + step * direction})
        back = loss({**weights, name: values - step * direction})
        slope = (ahead - back) / (2 * step)
        assert (gradients[name] * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_a_network_learns_shares_and_knows_no_order_of_classes():
    rng = np.random.default_rng(6)
    inputs = rng.normal(size=(2000, 4, 3)).astype(np.float32)
    odds = np.exp(2 * inputs[:, :, 1])
    shares = odds / odds.sum(axis=1, keepdims=True)
    network = fit_network(inputs[:1500], shares[:1500], hidden=16, steps=600, rng=rng)
    found = network.shares(inputs[1500:])
    assert np.abs(found - shares[1500:]).sum(axis=1).mean() / 2 < 0.05
    order = [2, 0, 3, 1]
    permuted = network.shares(inputs[1500:, order])
    np.testing.assert_allclose(permuted, found[:, order], atol=1e-5)
