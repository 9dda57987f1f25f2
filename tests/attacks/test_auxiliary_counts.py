"""Attacks on the bias gradient with auxiliary posteriors: each exact where its model of pbar is."""

import numpy as np
import pytest
import scipy.optimize
from closed_form import (
    SEEDS,
    Federation,
    attack_once,
    constant_outputs,
    gradient,
    observe,
    random_posterior,
    server,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from testbed.attacks import Outputs, make_attack
from testbed.attacks.metrics import asr

PLAIN = ("aux_mean", "aux_ls", "pos_neg")
ALL = (*PLAIN, "scale_free")


def batch_of(rng, class_posterior, classes, samples, steps=1):
    """Observe a batch whose samples have their class's posterior, and features of any sign."""
    labels = rng.integers(classes, size=(steps, samples))
    parts = [
        gradient(class_posterior[step], rng.normal(size=(samples, 2)), step) for step in labels
    ]
    weight, bias = sum(w for w, _ in parts), sum(b for _, b in parts)
    observed = observe(weight, bias, steps * samples, local_steps=steps)
    return observed, np.bincount(labels.ravel(), minlength=classes)


def outputs_of(class_posterior, per_class=2):
    labels = np.repeat(np.arange(len(class_posterior)), per_class)
    return Outputs(class_posterior[labels], np.ones((len(labels), 2)), labels)


@pytest.mark.parametrize("name", PLAIN)
@given(seed=SEEDS, steps=st.integers(1, 3))
def test_exact_where_the_posterior_is_constant(name, seed, steps):
    rng = np.random.default_rng(seed)
    classes, samples = int(rng.integers(2, 10)), int(rng.integers(1, 40))
    same = np.tile(random_posterior(rng, 1, classes), (classes, 1))
    observed, counts = batch_of(rng, same, classes, samples, steps)
    found = attack_once(name, server(outputs_of(same)), observed)
    assert found[0].tolist() == counts.tolist()


@pytest.mark.parametrize("name", ["aux_ls", "pos_neg"])
@given(seed=SEEDS, confidence=st.floats(0.05, 0.95))
def test_exact_where_the_posterior_depends_on_own_or_other(name, seed, confidence):
    rng = np.random.default_rng(seed)
    classes, samples = int(rng.integers(2, 10)), int(rng.integers(1, 40))
    other = (1 - confidence) / (classes - 1)
    posterior = np.full((classes, classes), other)
    np.fill_diagonal(posterior, confidence)
    # Where p+ is nearly 1 and p- nearly 0, nothing of the label is left in the gradient.
    assume(1 - confidence + other > 0.05)
    observed, counts = batch_of(rng, posterior, classes, samples)
    found = attack_once(name, server(outputs_of(posterior)), observed)
    assert found[0].tolist() == counts.tolist()


@given(SEEDS)
def test_aux_ls_is_exact_where_the_posterior_is_constant_in_each_class(seed):
    rng = np.random.default_rng(seed)
    classes, samples = int(rng.integers(2, 10)), int(rng.integers(1, 40))
    posterior = random_posterior(rng, classes, classes, 2.0)
    system = np.concatenate([posterior.T - np.eye(classes), np.ones((1, classes))])
    assume(np.linalg.svd(system, compute_uv=False)[-1] > 1e-2)
    observed, counts = batch_of(rng, posterior, classes, samples)
    found = attack_once("aux_ls", server(outputs_of(posterior)), observed)
    assert found[0].tolist() == counts.tolist()


def test_mean_and_pos_neg_are_not_exact_where_classes_differ():
    rng = np.random.default_rng(0)
    posterior = random_posterior(rng, 6, 6, 2.0)
    success = {name: [] for name in PLAIN}
    for _ in range(40):
        observed, counts = batch_of(rng, posterior, 6, 30)
        for name, values in success.items():
            found = attack_once(name, server(outputs_of(posterior)), observed)
            values.append(asr(counts, found[0]))
    assert np.mean(success["aux_ls"]) == 1
    assert np.mean(success["aux_mean"]) < 0.95
    assert np.mean(success["pos_neg"]) < 0.98


@pytest.mark.parametrize("name", PLAIN)
def test_a_batch_that_the_model_is_sure_of_is_taken_for_an_even_one(name):
    """The auxiliary samples are not classified as surely: their posteriors are not the batch's."""
    posterior = np.full((5, 5), 0.1) + 0.5 * np.eye(5)
    adversary = server(outputs_of(posterior))
    labels = np.full(10, 2)
    like_them = observe(*gradient(posterior[labels], np.ones((10, 2)), labels), 10)
    sure = observe(*gradient(np.eye(5)[labels], np.ones((10, 2)), labels), 10)
    assert attack_once(name, adversary, sure).tolist() == [[2] * 5]
    if name != "aux_mean":
        assert attack_once(name, adversary, like_them).tolist() == [[0, 0, 10, 0, 0]]


# Scale-free


@given(SEEDS, st.integers(-12, 12))
def test_scale_free_does_not_see_the_scale(seed, exponent):
    rng = np.random.default_rng(seed)
    posterior = random_posterior(rng, 6, 6)
    adversary = server(outputs_of(posterior))
    observed, _ = batch_of(rng, posterior, 6, 12)
    bias = observed.bias_gradient * np.float32(2.0**exponent)
    scaled = observe(observed.weight_gradient, bias, 12)
    plain = attack_once("scale_free", adversary, observed)
    assert attack_once("scale_free", adversary, scaled).tolist() == plain.tolist()


@given(SEEDS, st.floats(1e-3, 1e3))
def test_scale_free_is_exact_at_any_scale_where_a_class_is_absent(seed, factor):
    rng = np.random.default_rng(seed)
    same = np.tile(random_posterior(rng, 1, 5), (5, 1))
    observed, counts = batch_of(rng, same, 5, int(rng.integers(1, 20)))
    assume((counts == 0).any())
    scaled = observe(observed.weight_gradient, observed.bias_gradient * factor, observed.labels)
    found = attack_once("scale_free", server(outputs_of(same)), scaled)
    assert found[0].tolist() == counts.tolist()


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_scale_free_takes_the_scarcest_class_for_absent(factor):
    adversary = server(constant_outputs(np.full(5, 0.2), np.ones(2)))
    for counts in ([5, 3, 2, 2, 0], [4, 3, 2, 2, 1]):
        bias = 0.2 - np.array(counts) / 12
        found = attack_once("scale_free", adversary, observe(np.zeros((5, 2)), bias * factor, 12))
        # Right for the first alone: the second gradient is the same but for its scale.
        assert found.tolist() == [[5, 3, 2, 2, 0]]


def test_clipping_defeats_aux_mean_and_not_scale_free():
    federation = Federation(seed=9, classes=5)
    observed, counts = federation.round(40, 6)
    clipped = observe(observed.weight_gradient, observed.bias_gradient * 0.1, 6)
    adversary = federation.adversary("scale_free", 6)
    success = {
        name: asr(counts, attack_once(name, adversary, clipped)).mean()
        for name in ("scale_free", "aux_mean")
    }
    assert success["scale_free"] > success["aux_mean"] + 0.2


# Real models


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh])
@pytest.mark.parametrize("name", PLAIN)
def test_an_untrained_model_hides_little_whatever_its_activation(name, activation):
    federation = Federation(seed=10, activation=activation)
    observed, counts = federation.round(40, 16)
    found = attack_once(name, federation.adversary(name, 16), observed)
    assert asr(counts, found).mean() > 0.9


def test_statistics_are_means_over_the_auxiliary_samples():
    adversary = Federation(seed=11, missing=[3]).adversary("pos_neg", 8)
    outputs = adversary.on_auxiliary()
    p, y = outputs.posterior, outputs.labels
    own = {c: p[y == c].mean(axis=0) for c in (0, 1, 2, 4)}
    found = {name: make_attack(name, {}).calibrate(adversary) for name in ALL}
    pbar = np.mean(list(own.values()), axis=0)
    np.testing.assert_allclose(found["aux_mean"]["posterior"], [pbar])
    np.testing.assert_allclose(found["scale_free"]["posterior"], [pbar])
    rows = [own.get(c, pbar) for c in range(5)]
    np.testing.assert_allclose(found["aux_ls"]["posterior"], [rows])
    positive = [own.get(c, pbar)[c] for c in range(5)]
    negative = [np.mean([own[k][c] for k in own if k != c]) for c in range(5)]
    np.testing.assert_allclose(found["pos_neg"]["positive"], [positive])
    np.testing.assert_allclose(found["pos_neg"]["negative"], [negative])
    # Nothing tells its own samples of the missing class from others.
    assert found["pos_neg"]["positive"][0, 3] == pytest.approx(negative[3])


def test_one_class_with_auxiliary_samples_is_enough_to_answer():
    outputs = outputs_of(random_posterior(np.random.default_rng(1), 4, 4))
    kept = outputs.labels == 2
    few = Outputs(outputs.posterior[kept], outputs.features[kept], outputs.labels[kept])
    observed = observe(np.zeros((4, 2)), np.array([0.1, -0.3, 0.1, 0.1]), 8)
    for name in ALL:
        assert attack_once(name, server(few), observed).sum() == 8


# Interpolated along the local steps


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("steps", [1, 4])
def test_statistics_are_averaged_along_the_way(name, steps):
    federation = Federation(seed=12, local_steps=steps, rate=2.0)
    observed, _ = federation.round(3, 8)
    attack = make_attack(f"{name}_interpolated", {})
    adversary = federation.adversary(attack.name, 8)
    plain = make_attack(name, {})
    first = plain.calibrate(adversary)
    assert attack.calibrate(adversary) == {}
    found = attack.calibrate_updates(adversary, observed.restricted(attack))
    for row in range(3):
        last = plain.calibrate(adversary.after(observed.update[row].copy()))
        for array, values in first.items():
            way = [(1 - a) * values[0] + a * last[array][0] for a in np.arange(0, 1, 1 / steps)]
            np.testing.assert_allclose(found[array][row], np.mean(way, axis=0))
    if steps == 1:
        expected = attack_once(name, adversary, observed)
        assert attack_once(attack.name, adversary, observed).tolist() == expected.tolist()


@pytest.mark.parametrize("name", PLAIN)
def test_interpolation_follows_the_client_where_one_model_does_not(name):
    federation = Federation(seed=13, local_steps=10, rate=2.0)
    observed, counts = federation.round(30, 8)
    adversary = federation.adversary("aux_mean", 8)
    before = asr(counts, attack_once(name, adversary, observed)).mean()
    after = asr(counts, attack_once(f"{name}_interpolated", adversary, observed)).mean()
    assert after > before + 0.03


def test_a_solver_that_does_not_settle_is_replaced(monkeypatch):
    def never(*_args, **_options):
        raise RuntimeError("Maximum number of iterations reached.")

    rng = np.random.default_rng(2)
    posterior = random_posterior(rng, 5, 5)
    observed, counts = batch_of(rng, posterior, 5, 30)
    monkeypatch.setattr(scipy.optimize, "nnls", never)
    # Least squares without the sign finds the same where there is no noise.
    assert attack_once("aux_ls", server(outputs_of(posterior)), observed)[0].tolist() == (
        counts.tolist()
    )


def test_a_model_that_is_sure_of_everything_leaves_a_valid_answer():
    sure = constant_outputs(np.array([1.0, 0.0, 0.0]), np.ones(2))
    observed = observe(np.zeros((3, 2)), np.array([0.2, -0.1, -0.1]), 10)
    for name in ALL:
        assert attack_once(name, server(sure), observed).sum() == 10
