"""RLU against the published answers, its definition in loops, and where it is exact."""

from pathlib import Path

import numpy as np
import pytest
import torch
from closed_form import (
    SEEDS,
    Federation,
    attack_once,
    constant_outputs,
    gradient,
    observe,
    random_posterior,
)
from hypothesis import given
from hypothesis import strategies as st

from testbed.attacks import Assumption, Head, Knowledge, Observed, Outputs, attacks, make_attack
from testbed.attacks.adversary import AuxiliarySamples, GlobalModel
from testbed.attacks.checks import check_answer, check_calibration, check_declaration
from testbed.attacks.metrics import asr
from testbed.attacks.restricted import RestrictedAdversary
from testbed.attacks.rlu import wrong_logits
from testbed.attacks.rounding import largest_remainder
from testbed.attacks.simulation import softmax
from testbed.data import load
from testbed.models.flat import FlatModel
from testbed.models.last_layer import find_last_layer

ORACLE = Path(__file__).parent / "oracle"
VARIANTS = ("corrected", "released")


class Owner:
    """An adversary with outputs on samples, and a last layer that is the same for all clients."""

    learning_rate, local_steps = 0.5, 1

    def __init__(self, features, labels, weight, bias):
        self.outputs = Outputs(softmax(features @ weight.T + bias), features, labels)
        self.weight, self.bias = weight, bias

    def on_auxiliary(self):
        return self.outputs

    def head(self):
        return Head(self.weight, self.bias)

    def after(self, _update):
        return self


@pytest.mark.parametrize("size", [8, 32, 128])
def test_answers_are_the_published_ones(size):
    with np.load(ORACLE / f"ilrg_rlu_mnist_b{size}.npz") as stored:
        cases = dict(stored)
    np.testing.assert_allclose(softmax(cases["rlu_mu"]), cases["rlu_shift"], rtol=1e-12)
    attack = make_attack("rlu", {})
    for i, mu in enumerate(cases["rlu_mu"]):
        observed = observe(cases["grad_w"][i], cases["grad_b"][i], size).restricted(attack)
        answer = attack.infer(observed, {"mu": mu[None]})
        np.testing.assert_array_equal(answer.counts[0], cases["rlu"][i])
        np.testing.assert_array_equal(np.round(answer.scores[0]), cases["rlu"][i])
        # One step: here it never fails.
        np.testing.assert_array_equal(answer.counts[0], cases["counts"][i])


def test_tensors_give_the_same_counts():
    observed, calibration = random_path(np.random.default_rng(3), 2)
    attack = make_attack("rlu", {})
    expected = attack.infer(observed, calibration)
    names = ("row_sums", "bias_gradient", "labels", "keys")
    tensors = {name: torch.from_numpy(np.array(getattr(observed, name))) for name in names}
    found = attack.infer(
        type(observed)(**tensors, weight_gradient=None, local_steps=2), calibration
    )
    np.testing.assert_array_equal(found.counts.numpy(), expected.counts)
    np.testing.assert_allclose(found.scores.numpy(), expected.scores, rtol=1e-12)


@given(SEEDS)
def test_wrong_logits_are_means_over_samples_of_other_classes(seed):
    rng = np.random.default_rng(seed)
    classes, samples = int(rng.integers(2, 6)), int(rng.integers(2, 12))
    weight, bias = rng.normal(size=(classes, 3)), rng.normal(size=classes)
    # Classes may lack samples.
    features, labels = rng.normal(size=(samples, 3)), rng.integers(classes, size=samples)
    found = wrong_logits(Owner(features, labels, weight, bias))
    for i in range(classes):
        others = [h for h, y in zip(features, labels, strict=True) if y != i] or list(features)
        assert found[i] == pytest.approx(np.mean([weight[i] @ h + bias[i] for h in others]))


@pytest.mark.parametrize("name", ["rlu", "rlu_path"])
@given(seed=SEEDS, samples=st.integers(1, 50))
def test_one_step_is_exact_for_a_posterior_that_does_not_depend_on_the_input(name, seed, samples):
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 10))
    posterior = random_posterior(rng, 1, classes)
    features = rng.normal(size=(1, 4))
    outputs = constant_outputs(posterior[0], features[0])
    owner = Owner(
        outputs.features, outputs.labels % classes, np.zeros((classes, 4)), np.log(posterior[0])
    )
    labels = rng.integers(classes, size=samples)
    update = gradient(np.tile(posterior, (samples, 1)), np.tile(features, (samples, 1)), labels)
    observed = observe(*update, samples, update=np.zeros(3))
    counts = attack_once(name, owner, observed)
    np.testing.assert_array_equal(counts[0], np.bincount(labels, minlength=classes))


@pytest.mark.parametrize("name", ["rlu", "rlu_path"])
def test_logits_of_wrong_classes_hide_the_classes_that_the_model_knows(name):
    """Every class has the same logits where it is wrong, and other ones where it is right."""
    posterior = np.full((5, 5), 0.025) + 0.875 * np.eye(5)
    own = np.repeat(np.arange(5), 3)
    owner = Owner(np.log(posterior)[own], own, np.eye(5), np.zeros(5))
    np.testing.assert_allclose(wrong_logits(owner), np.log(0.025))
    labels = np.repeat([0, 1], [6, 4])
    update = gradient(posterior[labels], np.log(posterior)[labels], labels)
    observed = observe(*update, 10, update=np.zeros(3))
    assert attack_once(name, owner, observed).tolist() == [[2] * 5]
    # Who asks each class's own samples too is told.
    assert attack_once("aux_ls", owner, observed).tolist() == [[6, 4, 0, 0, 0]]


def estimate(posterior, bias, labels):
    raised = [max(p - b, 0.0) for p, b in zip(posterior, bias, strict=True)]
    return np.array([labels * value / sum(raised) for value in raised])


def path_by_loop(observed, mu, mu_after, rate, momentum, released):
    """Return counts and scores of one update, a step and an exchange at a time."""
    steps, labels = observed.local_steps, int(observed.labels[0])
    bias = observed.bias_gradient[0].astype(float) / steps
    weight = observed.weight_gradient[0].astype(float) / steps
    classes = len(bias)
    taken = 0.1 if released else momentum
    rho = [sum(taken**k for k in range(steps - t)) for t in range(steps)]

    def rounded(scores):
        if released:
            return np.array([float(round(score)) for score in scores])
        return largest_remainder(scores[None], np.array([labels]))[0].astype(float)

    mean_feature = np.mean([weight[c] / bias[c] for c in range(classes)], axis=0)
    square = sum(value**2 for value in mean_feature)
    counts = rounded(estimate(np.mean(rho) * softmax(mu_after), bias, labels))
    exchanges = 0
    while True:
        logits = [mu]
        velocity = np.zeros(classes)
        for _ in range(steps):
            share = np.round(counts / steps) / (labels / steps) if released else counts / labels
            slope = (softmax(logits[-1]) - share) * square
            velocity = slope if released else momentum * velocity + slope
            logits.append(logits[-1] - rate * velocity)
        error = (
            logits[-2] - mu_after[min(steps, classes) - 1] if released else logits[-1] - mu_after
        )
        high = [c for c in range(classes) if error[c] >= 0 and counts[c] >= steps]
        low = [c for c in range(classes) if error[c] < 0]
        if exchanges == 4 or max(abs(error)) < 0.1 or not high or not low:
            break
        counts[max(high, key=lambda c: error[c])] -= steps
        counts[min(low, key=lambda c: error[c])] += steps
        exchanges += 1
    weights = [np.mean(rho)] * steps if released else rho
    path = np.mean([w * softmax(z) for w, z in zip(weights, logits[:-1], strict=True)], axis=0)
    scores = estimate(path, bias, labels)
    final = np.round(scores) if released else scores
    return largest_remainder(final[None], np.array([labels]))[0], scores, exchanges


def random_path(rng, steps, classes=6, size=12, clients=5):
    """Return observations and a calibration with logits that move by some."""
    updates = []
    for _ in range(clients):
        posterior = random_posterior(rng, size, classes)
        labels = rng.choice(classes, size=size, p=rng.dirichlet(np.full(classes, 0.5)))
        update = gradient(posterior, rng.uniform(size=(size, 4)), labels)
        updates.append([steps * part for part in update])
    observed = observe(*map(np.stack, zip(*updates, strict=True)), size * steps, steps)
    mu = rng.normal(size=(1, classes)) * 0.5
    calibration = {
        "mu": mu,
        "mu_after": mu + rng.normal(size=(clients, classes)) * 0.5,
        "learning_rate": np.array([0.05]),
    }
    return observed, calibration


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("steps", [2, 5, 9])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_the_path_is_the_definition_s(variant, steps, momentum):
    rng = np.random.default_rng(steps)
    exchanged = []
    attack = make_attack("rlu_path", {"variant": variant, "momentum": momentum})
    for _ in range(6):
        observed, calibration = random_path(rng, steps)
        answer = attack.infer(observed, calibration)
        check_answer("rlu_path", attack, answer, observed)
        for i in range(len(answer.counts)):
            row = observed.rows(slice(i, i + 1))
            after = calibration["mu_after"][i]
            counts, scores, exchanges = path_by_loop(
                row, calibration["mu"][0], after, 0.05, momentum, variant == "released"
            )
            np.testing.assert_allclose(answer.scores[i], scores, rtol=1e-9, atol=1e-9)
            np.testing.assert_array_equal(answer.counts[i], counts)
            exchanged.append(exchanges)
    assert np.mean(exchanged) > 0
    assert len(set(exchanged)) > 1


def test_variants_and_momentum_differ():
    observed, calibration = random_path(np.random.default_rng(0), 4)
    scores = [
        make_attack("rlu_path", options).infer(observed, calibration).scores
        for options in ({}, {"variant": "released"}, {"momentum": 0.5})
    ]
    assert not np.allclose(scores[0], scores[1])
    assert not np.allclose(scores[0], scores[2])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_momentum_weights_the_steps(momentum):
    # The posterior stays as it is, and so does the label distribution over the steps.
    steps, classes, size = 3, 5, 20
    rng = np.random.default_rng(1)
    posterior = random_posterior(rng, 1, classes)[0]
    labels = np.repeat(np.arange(classes), [8, 6, 3, 3, 0])
    _, bias = gradient(np.tile(posterior, (size, 1)), np.ones((size, 2)), labels)
    velocity = total = 0
    for _ in range(steps):
        velocity = momentum * velocity + bias
        total = total + velocity
    observed = observe(np.ones((classes, 2)), total, size * steps, steps)
    logits = np.log(posterior)[None]
    calibration = {"mu": logits, "mu_after": logits, "learning_rate": np.zeros(1)}
    found = make_attack("rlu_path", {"momentum": momentum}).infer(observed, calibration)
    expected = 3 * np.bincount(labels, minlength=classes)
    np.testing.assert_allclose(found.scores[0], expected, atol=1e-4)
    if momentum:
        wrong = make_attack("rlu_path", {}).infer(observed, calibration)
        assert np.abs(wrong.scores[0] - expected).max() > 0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_do_not_depend_on_each_other(variant):
    observed, calibration = random_path(np.random.default_rng(2), 4)
    attack = make_attack("rlu_path", {"variant": variant})
    together = attack.infer(observed, calibration)
    for i in range(5):
        own = {**calibration, "mu_after": calibration["mu_after"][i : i + 1]}
        alone = attack.infer(observed.rows(slice(i, i + 1)), own)
        np.testing.assert_allclose(alone.scores[0], together.scores[i], rtol=1e-12)
        np.testing.assert_array_equal(alone.counts[0], together.counts[i])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e37, 1e-45])
@pytest.mark.parametrize("where", ["bias", "weight", "mu", "after"])
def test_degenerate_input_has_a_valid_answer(variant, value, where):
    rng = np.random.default_rng(0)
    posterior, features = random_posterior(rng, 9, 4), rng.normal(size=(9, 3))
    weight, bias = gradient(posterior, features, rng.integers(4, size=9))
    parts = {"weight": weight, "bias": bias, "mu": np.zeros((1, 4)), "after": np.ones((1, 4))}
    parts[where] = np.full_like(parts[where], value)
    for steps in (1, 6):  # of the latter, more than there are classes
        observed = observe(parts["weight"], parts["bias"], 54, steps)
        calibration = {
            "mu": parts["mu"],
            "mu_after": parts["after"],
            "learning_rate": np.array([0.1]),
        }
        for attack in (make_attack("rlu", {}), make_attack("rlu_path", {"variant": variant})):
            check_answer("rlu", attack, attack.infer(observed, calibration), observed)


def test_a_diverged_client_has_a_valid_calibration():
    features = np.array([[np.nan, 1.0], [np.inf, 2.0], [1.0, 1e37]])
    weight = np.array([[np.inf, 1.0], [1e37, 1.0]])
    outputs = Outputs(np.full((3, 2), np.nan), features, np.array([0, 1, 1]))
    owner = Owner(np.ones((2, 2)), np.array([0, 1]), np.ones((2, 2)), np.ones(2))
    owner.outputs, owner.weight = outputs, weight
    assert np.isfinite(wrong_logits(owner)).all()


def test_unlabelled_outputs_are_refused():
    owner = Owner(np.ones((2, 3)), None, np.ones((2, 3)), np.ones(2))
    with pytest.raises(ValueError, match="need the labels"):
        wrong_logits(owner)


@pytest.mark.parametrize("name", ["rlu", "rlu_path"])
@pytest.mark.parametrize("missing", [(), (1, 3)])
def test_calibration_of_a_real_model(name, missing):
    federation = Federation(local_steps=3, missing=missing)
    observed, _ = federation.round(clients=2, batch_size=4)
    adversary, attack = federation.adversary(name, 4), make_attack(name, {})
    shown = observed.restricted(attack)
    calibration = {**attack.calibrate(adversary), **attack.calibrate_updates(adversary, shown)}
    check_calibration(name, attack, calibration, {"client": 2, "class": 5, "feature": 7})
    check_answer(name, attack, attack.infer(shown, calibration), shown)
    if name == "rlu_path":
        # The end of each client's path, not of another's.
        ends = [wrong_logits(adversary.after(update)) for update in observed.update]
        np.testing.assert_array_equal(calibration["mu_after"], ends)
        assert not np.allclose(ends[0], ends[1])
        assert not np.allclose(ends[0], calibration["mu"][0])


def test_declarations():
    for name in ("rlu", "rlu_path"):
        check_declaration(name, attacks()[name].calibration_arrays)
        assert attacks()[name].knowledge is Knowledge.AUXILIARY
    assert attacks()["rlu"].assumes == {Assumption.ONE_STEP}
    assert attacks()["rlu"].observes == {Observed.BIAS_GRADIENT}
    assert attacks()["rlu_path"].assumes == {Assumption.SEVERAL_STEPS}
    assert Observed.UPDATE in attacks()["rlu_path"].observes


def test_local_steps_on_digits():
    """Several large steps: the path helps over the start alone; the published slips cost."""
    dataset, steps, size, rate = load("digits", None), 10, 16, 0.1
    images = torch.from_numpy(dataset.images).float() * dataset.scale
    targets = torch.from_numpy(dataset.labels)
    torch.manual_seed(1)
    module = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 10)
    )
    flat = FlatModel(module, find_last_layer(module, dataset.shape, 10), torch.device("cpu"))
    start = flat.state.numpy().copy()
    own = np.concatenate([np.flatnonzero(dataset.labels == c)[:10] for c in range(10)])
    auxiliary = AuxiliarySamples(images[torch.from_numpy(own)], dataset.labels[own])
    model = GlobalModel(flat, auxiliary, dataset.shape, local_steps=steps, learning_rate=rate)
    model.enter(start, 0, (0, 0))
    pool = np.setdiff1d(np.arange(len(dataset.labels)), own)
    by_class = [pool[dataset.labels[pool] == c] for c in range(10)]
    rng = np.random.default_rng(1)
    updates, truth = [], []
    for _ in range(12):
        flat.load(torch.from_numpy(start))
        drawn = rng.choice(10, size=(steps, size), p=rng.dirichlet(np.full(10, 0.5)))
        total = torch.zeros(flat.layout.parameters)
        for labels in drawn:
            batch = torch.tensor([int(rng.choice(by_class[c])) for c in labels])
            loss = torch.nn.functional.cross_entropy(module(images[batch]), targets[batch])
            grads = torch.autograd.grad(loss, list(module.parameters()))
            step = torch.cat([g.reshape(-1) for g in grads])
            flat.state.sub_(rate * step)
            total += step
        updates.append(total.numpy())
        truth.append(np.bincount(drawn.ravel(), minlength=10))
    observed = observe(
        [model.weight_gradient(update) for update in updates],
        [model.bias_gradient(update) for update in updates],
        steps * size,
        steps,
        update=updates,
    )
    rates = {}
    for label, name, options in (
        ("start", "rlu", {}),
        ("path", "rlu_path", {}),
        ("released", "rlu_path", {"variant": "released"}),
    ):
        adversary = RestrictedAdversary(model, Knowledge.AUXILIARY, size, 0)
        counts = attack_once(name, adversary, observed, **options)
        rates[label] = asr(np.array(truth), counts).mean()
    even = largest_remainder(np.ones((12, 10)), observed.labels)
    assert rates["path"] > 0.85 > asr(np.array(truth), even).mean() + 0.2, rates
    assert rates["path"] > rates["start"] + 0.02, rates
    assert rates["path"] > rates["released"] + 0.02, rates
