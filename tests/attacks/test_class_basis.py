"""The class basis: exact on mixtures of what it was made of, and its compression loses little."""

from dataclasses import replace

import numpy as np
import pytest
from global_models import CLASSES, Federation, infer, perceptron, success
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import nn

from testbed.attacks import Observations
from testbed.attacks.class_basis import ClassBasis, mixture

VARIANTS = [
    ClassBasis(),
    ClassBasis(overall=False),
    ClassBasis(use="bias"),
    ClassBasis(use="bias", overall=False),
    ClassBasis(directions=40),
]


@pytest.fixture(scope="module")
def trained():
    return Federation(perceptron(nn.ReLU), training=300, batch_size=16)


@pytest.mark.parametrize("attack", VARIANTS, ids=str)
def test_exact_on_clients_with_the_servers_own_samples(trained, attack):
    rng = np.random.default_rng(0)
    counts = rng.multinomial(16, rng.dirichlet(np.full(CLASSES, 0.5), 8))
    own = np.arange(CLASSES * 20).reshape(CLASSES, 20)
    updates = [trained.model.local_update(np.repeat(own, n, axis=0).reshape(1, -1)) for n in counts]
    inferred = trained.run(attack, trained.observe(np.array(updates)))
    np.testing.assert_array_equal(inferred.counts, counts)
    np.testing.assert_allclose(inferred.scores, counts, atol=0.05)


def test_the_basis_of_one_step_is_what_class_pure_clients_send(trained):
    attack = ClassBasis(directions=24)
    basis = attack.calibrate(trained.adversary(attack))
    (projection,) = basis["projection"]
    np.testing.assert_allclose(projection.T @ projection, np.eye(24), atol=1e-9)
    for c in range(CLASSES):
        update = trained.model.local_update(np.arange(20 * c, 20 * c + 20)[None])
        weight, bias = basis["basis"][0, c, :, :-1], basis["basis"][0, c, :, -1]
        # All directions of the feature axis: nothing is lost.
        expected = trained.model.weight_gradient(update)
        np.testing.assert_allclose(weight @ projection.T, expected, atol=1e-6)
        np.testing.assert_allclose(bias, trained.model.bias_gradient(update), atol=1e-6)


def test_the_basis_of_several_steps_is_the_clients_schedule():
    federation = Federation(perceptron(), per_class=1, batch_size=10, local_steps=3)
    attack = ClassBasis(directions=24)
    calibration = attack.calibrate(federation.adversary(attack))
    own = [np.full((3, 10), c) for c in range(CLASSES)]
    for found, samples in zip(
        [*calibration["basis"][0], calibration["overall"][0]],
        [*own, np.tile(np.arange(CLASSES), (3, 1))],
        strict=True,
    ):
        update = federation.model.local_update(samples)
        weight = federation.model.weight_gradient(update)
        bias = federation.model.bias_gradient(update)
        np.testing.assert_allclose(found[:, :-1], weight @ calibration["projection"][0], atol=1e-5)
        np.testing.assert_allclose(found[:, -1], bias, atol=1e-5)


@pytest.mark.parametrize("attack", VARIANTS, ids=str)
def test_several_steps_of_one_class(attack):
    federation = Federation(perceptron(), training=200, local_steps=3)
    labels = np.tile(np.arange(CLASSES)[:, None, None], (1, 3, 8))
    observations, truth = federation.clients(labels)
    inferred = federation.run(attack, observations)
    assert success(inferred.counts, truth) > 0.9


@pytest.mark.parametrize(("local_steps", "least"), [(1, 0.97), (4, 0.85)])
def test_success_on_an_untrained_model(local_steps, least):
    federation = Federation(perceptron(nn.ReLU), local_steps=local_steps)
    observations, truth = federation.draw(20)
    assert success(federation.run(ClassBasis(), observations).counts, truth) > least


def test_the_update_on_all_classes_counts_for_each_evenly():
    rng = np.random.default_rng(4)
    basis, overall = rng.normal(size=(1, 5, 5, 1)), rng.normal(size=(1, 5, 1))
    basis[0, 3] = 0
    update = 0.6 * basis[0, 1, :, 0] + 0.4 * overall[0, :, 0]
    observations = Observations(
        row_sums=np.zeros((1, 5)),
        bias_gradient=update[None],
        weight_gradient=np.zeros((1, 5, 2)),
        labels=np.array([20]),
        keys=np.arange(1),
        local_steps=2,
    )
    inferred = infer(ClassBasis(use="bias"), observations, {"basis": basis, "overall": overall})
    np.testing.assert_allclose(inferred.scores, [[2, 14, 2, 0, 2]])


def test_norms_use_class_pure_batches():
    federation = Federation(perceptron(norm=True), batch_size=16)
    attack = ClassBasis(directions=24)
    calibration = attack.calibrate(federation.adversary(attack))
    update = federation.model.local_update(np.arange(20)[None])
    bias = federation.model.bias_gradient(update)
    np.testing.assert_allclose(calibration["basis"][0, 0, :, -1], bias, atol=1e-6)


@pytest.mark.parametrize("local_steps", [1, 3])
def test_missing_classes_get_no_label(local_steps):
    missing = [2, 7]
    federation = Federation(perceptron(), missing=missing, local_steps=local_steps)
    observations, truth = federation.draw(10)
    inferred = federation.run(ClassBasis(), observations)
    assert not inferred.counts[:, missing].any()
    known = truth[:, missing].sum(axis=1) == 0
    assert known.sum() > 1
    assert success(inferred.counts[known], truth[known]) > 0.85


def test_labels_of_a_class_without_auxiliary_samples_go_to_others():
    federation = Federation(perceptron(), missing=[7])
    for labels, most in ([7] * 8, 0.0), ([3] * 4 + [7] * 4, 0.5):
        observations, truth = federation.clients(np.tile(labels, (6, 1, 1)))
        inferred = federation.run(ClassBasis(), observations)
        assert success(inferred.counts, truth) <= most
    informed = Federation(perceptron())
    observations, truth = informed.clients(np.full((6, 1, 8), 7))
    assert success(informed.run(ClassBasis(), observations).counts, truth) > 0.9


def test_batches_are_drawn_by_the_seed():
    federation = Federation(perceptron(), local_steps=3)
    attack = ClassBasis()
    first, again, other = (
        attack.calibrate(federation.adversary(attack, seed))["basis"] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_row_depends_on_its_own_calibration_alone(trained):
    observations, _ = trained.draw(4)
    attack = ClassBasis()
    one = trained.calibrate(attack, observations)
    other = {name: 2 * values for name, values in one.items()}
    both = {name: np.concatenate([one[name], other[name]] * 2) for name in one}
    mixed = infer(attack, observations, both)
    for row, own in enumerate([one, other] * 2):
        alone = infer(attack, observations.rows(slice(row, row + 1)), own)
        np.testing.assert_allclose(mixed.scores[row], alone.scores[0])


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e300])
def test_calibrations_of_a_diverged_or_a_perfect_model(trained, value):
    observations, _ = trained.draw(2)
    calibration = trained.calibrate(ClassBasis(), observations)
    calibration["basis"] = np.full_like(calibration["basis"], value)
    calibration["overall"] = np.full_like(calibration["overall"], value)
    infer(ClassBasis(), observations, calibration)
    if value == 0:
        inferred = infer(ClassBasis(), observations, calibration)
        assert inferred.counts.tolist() == [[2] * 6 + [1] * 4] * 2


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e30])
@pytest.mark.parametrize("attack", VARIANTS, ids=str)
def test_updates_that_say_nothing(trained, attack, value):
    observations, _ = trained.draw(2)
    strange = replace(
        observations,
        weight_gradient=np.full_like(observations.weight_gradient, value),
        bias_gradient=np.full_like(observations.bias_gradient, value),
    )
    trained.run(attack, strange)


@given(
    st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**32 - 1), st.sampled_from([1e-9, 1, 1e6])
)
def test_mixture_is_the_least_squares_fit_of_all_equations(count, length, seed, scale):
    rng = np.random.default_rng(seed)
    columns = rng.normal(size=(count, length)) * scale
    updates = rng.normal(size=(3, length)) * scale
    size = np.sqrt((columns**2).sum(axis=1).mean())
    system = np.vstack([columns.T, np.full(count, 10 * size)])
    found = mixture(columns, updates)
    for weights, update in zip(found, updates, strict=True):
        target = np.append(update, 10 * size)
        _, best = nnls(system, target)
        assert (weights >= 0).all()
        assert np.linalg.norm(system @ weights - target) == pytest.approx(
            best, rel=1e-6, abs=1e-9 * size
        )


def test_mixture_gives_nothing_to_columns_of_zeros():
    columns = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    found = mixture(columns, np.array([[0.25, 0.75], [9.0, 0.0]]))
    np.testing.assert_allclose(found[0], [0.25, 0, 0.75])
    assert not found[:, 1].any()
