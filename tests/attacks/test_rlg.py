"""RLG against its definition by linear programmes, and where it is exact and where it cannot be."""

import numpy as np
import pytest
import torch
from closed_form import SEEDS, gradient, observe, random_posterior
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from testbed.attacks import Answer, Assumption, Knowledge, attacks, make_attack, rlg
from testbed.attacks.checks import check_answer, check_declaration

SOLVERS = ("nnls", "linprog")


def infer(weight, labels=1, **options):
    attack = make_attack("rlg", options)
    observed = observe(weight, None, labels).restricted(attack)
    answer = attack.infer(observed, {})
    check_answer("rlg", attack, answer, observed)
    return answer.presence


def random_batch(rng, samples, classes=40, width=64, activation="relu", sharpness=0.3):
    """Return the weight gradient of a batch with features of an activation, and who is present."""
    features = rng.normal(size=(samples, width))
    features = np.tanh(features) if activation == "tanh" else np.maximum(features, 0)
    labels = rng.integers(classes, size=samples)
    weight, _ = gradient(random_posterior(rng, samples, classes, sharpness), features, labels)
    return weight, np.bincount(labels, minlength=classes) > 0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("samples", [1, 2, 8, 20])
def test_exact_for_fewer_samples_than_the_rank_could_be(solver, activation, samples):
    rng = np.random.default_rng(samples)
    for _ in range(5):
        weight, present = random_batch(rng, samples, activation=activation)
        np.testing.assert_array_equal(infer(weight, samples, solver=solver)[0], present)


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_samples_than_the_rank_hide_everything(solver):
    rng = np.random.default_rng(0)
    for samples in (39, 60, 200):
        weight, present = random_batch(rng, samples)
        assert infer(weight, samples, solver=solver).all()
    assert not present.all() or samples == 200


def test_noise_hides_everything_unless_the_tolerance_allows_for_it():
    rng = np.random.default_rng(1)
    weight, present = random_batch(rng, 6)
    noisy = weight + rng.normal(size=weight.shape) * 1e-6
    assert infer(noisy, 6).all()
    np.testing.assert_array_equal(infer(noisy, 6, tolerance=1e-3)[0], present)


@given(SEEDS, st.integers(1, 12), st.sampled_from([0.3, 2.0]))
def test_no_present_class_is_missed(seed, samples, sharpness):
    # Absent classes may be named: the paper's condition is sufficient for few samples alone.
    rng = np.random.default_rng(seed)
    weight, present = random_batch(rng, samples, classes=12, width=20, sharpness=sharpness)
    assert infer(weight, samples)[0][present].all()


def by_definition(weight, rank):
    """Return for each class whether a plane separates it: a linear programme for each."""
    left, _, _ = np.linalg.svd(weight)
    points = left[:, :rank]
    answers = []
    for c in range(len(weight)):
        others = np.delete(points, c, axis=0)
        found = linprog(
            np.zeros(rank),
            A_ub=np.vstack([points[c], -others]),
            b_ub=np.append(-1.0, np.zeros(len(others))),
            bounds=(None, None),
        )
        answers.append(found.status == 0)
    return np.array(answers)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("projections", [0, 20])
def test_answers_are_those_of_the_linear_programmes(solver, projections, monkeypatch):
    monkeypatch.setattr(rlg, "_PROJECTIONS", projections)
    rng = np.random.default_rng(5)
    wrong = 0
    for samples in (2, 4, 6, 8, 9):
        for sharpness in (0.3, 1.5):
            # Of so few classes some absent ones can be separated too.
            weight, present = random_batch(rng, samples, classes=11, sharpness=sharpness)
            expected = by_definition(weight.astype(np.float32).astype(float), samples)
            np.testing.assert_array_equal(infer(weight, samples, solver=solver)[0], expected)
            wrong += (expected & ~present).sum()
    assert wrong > 0


def test_certificates_spare_the_solver_and_are_right(monkeypatch):
    rng = np.random.default_rng(6)
    weight, present = random_batch(rng, 20, classes=80)
    asked = []
    original = rlg.RLG._separable

    def counted(self, point, others):
        asked.append(point)
        return original(self, point, others)

    monkeypatch.setattr(rlg.RLG, "_separable", counted)
    np.testing.assert_array_equal(infer(weight, 20)[0], present)
    assert len(asked) < 20
    with monkeypatch.context() as patch:
        patch.setattr(rlg, "_PROJECTIONS", 0)
        np.testing.assert_array_equal(infer(weight, 20)[0], present)
    assert len(asked) >= 80


def test_a_solver_that_goes_round_in_a_circle_is_replaced(monkeypatch):
    def circle(*_args, **_more):
        raise RuntimeError("Maximum number of iterations reached.")

    weight, present = random_batch(np.random.default_rng(7), 5, classes=15)
    monkeypatch.setattr("scipy.optimize.nnls", circle)
    monkeypatch.setattr(rlg, "_PROJECTIONS", 0)
    np.testing.assert_array_equal(infer(weight, 5)[0], present)


def test_classes_without_a_gradient_are_absent():
    weight, present = random_batch(np.random.default_rng(8), 5, classes=30)
    dead = ~present & (np.arange(30) % 2 == 0)
    for size in (0.0, 1e-12):
        weight[dead] *= size
        np.testing.assert_array_equal(infer(weight, 5)[0], present)
    # The live classes' space may be full for themselves.
    few = np.zeros((9, 4))
    few[[1, 4]] = [[1.0, 2, 0, 1], [-1, -2, 0, -1]]
    np.testing.assert_array_equal(np.flatnonzero(infer(few)[0]), [1, 4])


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e36, 1e-45])
@pytest.mark.parametrize("where", ["one", "row", "all"])
def test_degenerate_input_has_a_valid_answer(value, where):
    weight, _ = random_batch(np.random.default_rng(9), 4, classes=8)
    weight[{"one": (0, 0), "row": 3, "all": slice(None)}[where]] = value
    presence = infer(weight, 4)
    if not np.isfinite(value) or (where == "all" and value == 0):
        assert not presence.any()


def test_rows_do_not_depend_on_each_other():
    rng = np.random.default_rng(10)
    weights = np.stack([random_batch(rng, samples, classes=20)[0] for samples in (1, 5, 30)])
    together = infer(weights, [1, 5, 30])
    for weight, row in zip(weights, together, strict=True):
        np.testing.assert_array_equal(infer(weight)[0], row)


@pytest.mark.parametrize("activation", [torch.nn.ReLU, torch.nn.Tanh])
def test_images_of_a_hundred_classes(activation, data_root):
    from testbed.data import load

    dataset = load("cifar100", data_root / "cifar-100-python")
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 12, 5, stride=4),
        activation(),
        torch.nn.Flatten(),
        torch.nn.Linear(588, 100),
    )
    for size in (8, 32):
        for _ in range(3):
            batch = rng.integers(len(dataset.labels), size=size)
            images = torch.from_numpy(dataset.images[batch]).float() * dataset.scale
            targets = torch.from_numpy(dataset.labels[batch])
            loss = torch.nn.functional.cross_entropy(module(images), targets)
            (weight,) = torch.autograd.grad(loss, [module[-1].weight])
            present = np.bincount(dataset.labels[batch], minlength=100) > 0
            np.testing.assert_array_equal(infer(weight.numpy(), size)[0], present)


def test_declaration():
    attack = attacks()["rlg"]
    check_declaration("rlg", attack.calibration_arrays)
    assert attack.knowledge is Knowledge.GRADIENTS
    assert attack.answers is Answer.PRESENCE
    assert attack.assumes == {Assumption.FEWER_LABELS_THAN_RANK}
