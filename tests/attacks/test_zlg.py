"""ZLG against its formula, and where constant outputs make it exact."""

import numpy as np
import pytest
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
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from testbed.attacks import make_attack
from testbed.attacks.metrics import asr
from testbed.attacks.rounding import largest_remainder

PLAIN = ("zlg", "zlg_plus")
INTERPOLATED = ("zlg_interpolated", "zlg_interpolated_plus")


@pytest.mark.parametrize("name", PLAIN)
@given(seed=SEEDS, steps=st.integers(1, 4), sign=st.sampled_from([1, -1]))
def test_exact_where_all_samples_have_the_same_outputs(name, seed, steps, sign):
    rng = np.random.default_rng(seed)
    classes, samples = int(rng.integers(2, 10)), int(rng.integers(1, 30))
    q, h = random_posterior(rng, 1, classes)[0], sign * rng.uniform(0.1, 1, 4)
    labels = rng.integers(classes, size=(steps, samples))
    same = np.tile(q, (samples, 1)), np.tile(h, (samples, 1))
    parts = [gradient(*same, step) for step in labels]
    total = sum(w for w, _ in parts)
    observed = observe(total, None, steps * samples, local_steps=steps)
    counts = attack_once(name, server(constant_outputs(q, h)), observed)
    assert counts[0].tolist() == np.bincount(labels.ravel(), minlength=classes).tolist()


@pytest.mark.parametrize("inputs", ["normal", "zeros", "ones", "random"])
def test_dummy_inputs_are_run_through_the_model(inputs):
    federation = Federation(seed=4)
    observed, _ = federation.round(6, 8)
    adversary = federation.adversary("zlg", 8)
    outputs = adversary.on_dummy(inputs, 40 if inputs in ("normal", "random") else 1)
    found = make_attack("zlg", {"inputs": inputs, "samples": 40}).calibrate(adversary)
    pbar = [np.mean([p[c] for p in outputs.posterior]) for c in range(5)]
    mass = np.mean([h.sum() for h in outputs.features])
    np.testing.assert_allclose(found["posterior"], [pbar])
    np.testing.assert_allclose(found["mass"], [mass])
    scores = 8 * np.array(pbar) - 8 * observed.row_sums.astype(float) / mass
    counts = attack_once("zlg", adversary, observed, inputs=inputs, samples=40)
    assert counts.tolist() == largest_remainder(scores, observed.labels).tolist()


def test_auxiliary_classes_weigh_the_same_however_many_samples_they_have():
    federation = Federation(seed=5, missing=[1])
    adversary = federation.adversary("zlg_plus", 8)
    outputs = adversary.on_auxiliary()
    kept = [0, 2, 3, 4]
    found = make_attack("zlg_plus", {}).calibrate(adversary)
    means = [outputs.posterior[outputs.labels == c].mean(axis=0) for c in kept]
    masses = [outputs.features[outputs.labels == c].sum(axis=1).mean() for c in kept]
    np.testing.assert_allclose(found["posterior"], [np.mean(means, axis=0)])
    np.testing.assert_allclose(found["mass"], [np.mean(masses)])


@pytest.mark.parametrize("name", INTERPOLATED)
@pytest.mark.parametrize("steps", [1, 5])
def test_interpolation_averages_the_counts_at_each_step_s_place(name, steps):
    federation = Federation(seed=6, local_steps=steps, rate=2.0)
    observed, _ = federation.round(4, 8)
    adversary = federation.adversary(name, 8)
    plain = make_attack(name.replace("_interpolated", ""), {})
    first = plain.calibrate(adversary)
    labels, expected = 8 * steps, []
    for row in range(4):
        last = plain.calibrate(adversary.after(observed.update[row].copy()))
        estimates = []
        for a in np.arange(0, 1, 1 / steps):
            p = (1 - a) * first["posterior"][0] + a * last["posterior"][0]
            mass = (1 - a) * first["mass"][0] + a * last["mass"][0]
            g = observed.row_sums[row].astype(float)
            estimates.append(labels * p - labels / steps * g / mass)
        expected.append(np.mean(estimates, axis=0))
    attack = make_attack(name, {})
    shown = observed.restricted(attack)
    answer = attack.infer(shown, attack.calibrate_updates(adversary, shown))
    np.testing.assert_allclose(answer.scores, expected, rtol=1e-9, atol=1e-9)
    if steps == 1:
        same = attack_once(plain.name, adversary, observed)
        assert answer.counts.tolist() == same.tolist()


@pytest.mark.parametrize("name", INTERPOLATED)
@given(seed=SEEDS, steps=st.integers(2, 6))
def test_exact_where_the_posterior_moves_steadily_and_one_model_is_not(name, seed, steps):
    rng = np.random.default_rng(seed)
    (first, last), h = random_posterior(rng, 2, 5), rng.uniform(0.1, 1, 4)
    labels = rng.integers(5, size=(steps, 20))
    parts = [
        gradient(np.tile(first + k / steps * (last - first), (20, 1)), np.tile(h, (20, 1)), step)
        for k, step in enumerate(labels)
    ]
    observed = observe(
        sum(w for w, _ in parts), None, 20 * steps, local_steps=steps, update=np.zeros(1)
    )
    end = server(constant_outputs(last, h))
    adversary = server(constant_outputs(first, h), local_steps=steps, after=lambda _: end)
    counts = np.bincount(labels.ravel(), minlength=5)
    assert attack_once(name, adversary, observed)[0].tolist() == counts.tolist()
    if np.abs(last - first).max() > 0.1:
        plain = attack_once(name.replace("_interpolated", ""), adversary, observed)
        assert plain[0].tolist() != counts.tolist()


def test_features_of_either_sign_break_it():
    success = []
    for activation in (nn.Sigmoid, nn.Tanh):
        federation = Federation(seed=8, activation=activation)
        observed, counts = federation.round(60, 8)
        adversary = federation.adversary("zlg_plus", 8)
        success.append(asr(counts, attack_once("zlg_plus", adversary, observed)).mean())
    assert success[0] > success[1] + 0.1


@pytest.mark.parametrize("name", PLAIN)
def test_without_features_the_posterior_is_all_there_is(name):
    q = np.array([0.5, 0.25, 0.25])
    observed = observe(np.random.default_rng(0).normal(size=(3, 2)), None, 8)
    counts = attack_once(name, server(constant_outputs(q, np.zeros(2))), observed)
    assert counts.tolist() == [[4, 2, 2]]


def test_a_feature_sum_that_crosses_zero_on_the_way_says_nothing():
    start = constant_outputs(np.array([0.5, 0.5]), np.array([1.0]))
    end = constant_outputs(np.array([0.5, 0.5]), np.array([-1.0]))
    adversary = server(start, local_steps=2, after=lambda _: server(end))
    observed = observe(np.ones((2, 1)), None, 4, local_steps=2, update=np.zeros(3, np.float32))
    found = make_attack("zlg_interpolated", {}).calibrate_updates(adversary, observed)
    assert found["mass"].tolist() == [0.0]
