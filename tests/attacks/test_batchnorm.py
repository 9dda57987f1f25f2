"""The regression on BatchNorm statistics: exact where it must be, by definitions of its own."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from closed_form import first_layer, observe_training
from hypothesis import given, strategies
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import nn

from testbed.attacks import Knowledge, attacks, make_attack
from testbed.attacks.adversary import AuxiliarySamples, GlobalModel
from testbed.attacks.assumptions import Facts, not_applicable
from testbed.attacks.base import Attack, Calibration, Observations
from testbed.attacks.batchnorm import choose_samples
from testbed.attacks.checks import check_answer, check_calibration, check_declaration
from testbed.attacks.offline import ArrayAdversary, NotGivenError
from testbed.attacks.regression_statistics import fit_ridge, project_shares
from testbed.attacks.restricted import RestrictedAdversary
from testbed.attacks.rounding import largest_remainder
from testbed.data import load
from testbed.models.build import build
from testbed.models.flat import FlatModel
from testbed.models.last_layer import find_last_layer

CPU = torch.device("cpu")
BOTH = ["batchnorm", "batchnorm_joint"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def flat(module: nn.Module, shape: tuple[int, int, int], classes: int) -> FlatModel:
    return FlatModel(module, find_last_layer(module, shape, classes), CPU)


def success(truth: NDArray[np.int64], counts: NDArray[np.int64]) -> float:
    return float(np.minimum(truth, counts).sum() / truth.sum())


def adversary_of(attack: Attack, model: GlobalModel, batch_size: int) -> RestrictedAdversary:
    return RestrictedAdversary(model, attack.knowledge, batch_size, 7)


def answer(
    name: str, model: GlobalModel, observations: Observations, batch_size: int, **options: object
) -> NDArray[np.int64]:
    """Return checked counts."""
    attack = make_attack(name, options)
    calibration = attack.calibrate(adversary_of(attack, model, batch_size))
    layout = model.layout
    lengths = {"class": layout.classes, "buffer": layout.buffers, "feature": layout.features}
    check_calibration(name, attack, calibration, lengths)
    inferred = attack.infer(observations.restricted(attack), calibration)
    check_answer(name, attack, inferred, observations)
    counts: NDArray[np.int64] = inferred.values
    return counts


# Layers whose statistics are the label shares themselves: `first_layer`


def counts_of(labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    return np.stack([np.bincount(row.ravel(), minlength=classes) for row in labels])


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("batch_size", [2, 9, 32])
def test_exact_where_batch_means_are_mixtures_of_class_means(name: str, batch_size: int) -> None:
    model = first_layer()
    labels = np.random.default_rng(0).integers(5, size=(20, 1, batch_size))
    counts = answer(name, model, observe_training(model, labels), batch_size)
    np.testing.assert_array_equal(counts, counts_of(labels, 5))


@pytest.mark.parametrize("momentum", [0.01, 0.5, 1.0, None])
def test_exact_for_every_momentum(momentum: float | None) -> None:
    model = first_layer(momentum=momentum)
    labels = np.random.default_rng(0).integers(5, size=(20, 1, 8))
    counts = answer("batchnorm", model, observe_training(model, labels), 8)
    np.testing.assert_array_equal(counts, counts_of(labels, 5))


def test_exact_for_several_steps_on_the_same_labels() -> None:
    model = first_layer(steps=3)
    labels = np.repeat(np.random.default_rng(0).integers(5, size=(20, 1, 8)), 3, axis=1)
    counts = answer("batchnorm", model, observe_training(model, labels), 8, batches=100)
    np.testing.assert_array_equal(counts, counts_of(labels, 5))


def test_unlike_steps_are_told_with_errors() -> None:
    # The running average weighs late steps more.
    model = first_layer(steps=8)
    labels = np.random.default_rng(0).integers(5, size=(20, 8, 8))
    counts = answer("batchnorm", model, observe_training(model, labels), 8, batches=100)
    assert 0.9 < success(counts_of(labels, 5), counts) < 1


@pytest.mark.parametrize("steps", [1, 4])
def test_what_the_server_sent_is_taken_out(steps: int) -> None:
    labels = np.random.default_rng(0).integers(5, size=(10, steps, 6))
    scores = []
    for sent in (0.0, 2.5):
        model = first_layer(steps=steps, sent=sent)
        attack = make_attack("batchnorm", {"batches": 100})
        calibration = attack.calibrate(adversary_of(attack, model, 6))
        seen = observe_training(model, labels)
        scores.append(attack.infer(seen, calibration).scores)
    assert (
        np.abs(
            seen.statistics - observe_training(first_layer(steps=steps), labels).statistics
        ).min()
        > 1
    )
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-3)


@pytest.mark.parametrize("steps", [1, 4])
def test_running_average_of_a_real_module_is_affine_in_the_batches(steps: int) -> None:
    model = first_layer(steps=steps, sent=1.5)
    labels = np.random.default_rng(2).integers(5, size=(1, steps, 6))
    old, momentum = model.statistics_sent()[:8], model.momentum()[:8]
    np.testing.assert_allclose(momentum, 0.1)
    inputs = model._auxiliary.inputs.flatten(1).numpy()
    means = inputs[labels[0] * 3].mean(axis=1)
    left = 0.9**steps
    undone = (observe_training(model, labels).statistics[0, :8] - left * old) / (1 - left)
    weights = 0.1 * 0.9 ** np.arange(steps)[::-1] / (1 - left)
    np.testing.assert_allclose(undone, weights @ means, atol=1e-5)


def test_statistics_that_were_not_shared_say_nothing() -> None:
    model = first_layer()
    labels = np.random.default_rng(0).integers(5, size=(6, 1, 8))
    observed = observe_training(model, labels)
    sent = np.tile(model.statistics_sent(), (6, 1))
    counts = answer("batchnorm", model, replace(observed, statistics=sent), 8)
    assert len(np.unique(counts, axis=0)) == 1


@pytest.mark.parametrize("name", BOTH)
def test_an_update_has_the_answer_of_its_own_calibration(name: str) -> None:
    labels = np.random.default_rng(0).integers(5, size=(4, 1, 8))
    attack = make_attack(name, {"batches": 60})
    seen, given = [], []
    for sent in (0.0, 2.5):
        model = first_layer(sent=sent)
        seen.append(observe_training(model, labels).restricted(attack))
        given.append(attack.calibrate(adversary_of(attack, model, 8)))
    alone = [attack.infer(*pair) for pair in zip(seen, given, strict=True)]
    swapped = attack.infer(seen[1], given[0])
    assert np.abs(swapped.scores - alone[1].scores).max() > 1
    # Updates of both models in turns, and a calibration for each.
    turns = np.array([0, 1, 1, 0])
    mixed = {
        part: np.stack([vars(seen[turn])[part][row] for row, turn in enumerate(turns)])
        for part in ("row_sums", "bias_gradient", "statistics")
        if getattr(seen[0], part) is not None
    }
    each = {key: np.concatenate([given[turn][key] for turn in turns]) for key in given[0]}
    found = attack.infer(replace(seen[0], **mixed), each)
    expected = np.stack([alone[turn].scores[row] for row, turn in enumerate(turns)])
    np.testing.assert_allclose(found.scores, expected, atol=1e-9)


# A trained model on real data


@pytest.fixture(scope="module")
def digits() -> tuple[GlobalModel, AuxiliarySamples]:
    """Return a trained model with the adversary's samples, and the victims' samples."""
    torch.set_num_threads(1)
    dataset = load("digits", None)
    module = build(
        "cnn_bn",
        shape=dataset.shape,
        classes=10,
        activation=None,
        arguments={},
        init="torch",
        seed=0,
    )
    model = flat(module, dataset.shape, 10)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(dataset.labels))
    order = order[np.argsort(dataset.labels[order], kind="stable")]
    labels = dataset.labels[order]
    place = np.arange(len(labels)) - np.searchsorted(labels, labels)
    images = torch.from_numpy(dataset.images[order].astype(np.float32) * dataset.scale)
    own, others = np.flatnonzero(place < 20), np.flatnonzero(place >= 20)
    victims = AuxiliarySamples(images[torch.from_numpy(others)], labels[others])
    gradient = torch.empty(model.layout.parameters)
    model.module.train()
    for _ in range(150):
        chosen = rng.choice(len(others), 32)
        logits = model.module(victims.inputs[torch.from_numpy(chosen)])
        loss = nn.functional.cross_entropy(logits, torch.from_numpy(victims.labels[chosen]))
        model.gradient(loss, gradient)
        model.state[: len(gradient)].sub_(gradient, alpha=0.1)
    auxiliary = AuxiliarySamples(images[torch.from_numpy(own)], labels[own])
    adversary = GlobalModel(model, auxiliary, dataset.shape)
    adversary.enter(model.state.numpy().copy(), 0, (0, 0))
    return adversary, victims


def any_samples(labels: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    rng = np.random.default_rng(1)
    return np.vectorize(lambda label: rng.choice(np.flatnonzero(labels == label)))(wanted)


def of_victims(
    digits: tuple[GlobalModel, AuxiliarySamples], wanted: NDArray[np.int64]
) -> Observations:
    """Return what clients with the given labels [N, E, B] share."""
    adversary, victims = digits
    clients = GlobalModel(adversary._model, victims, adversary.shape)
    clients.enter(adversary._state.numpy(), 0, (0, 0))
    return clients.simulate(any_samples(victims.labels, wanted))


def skewed(clients: int, steps: int, batch_size: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(5)
    labels = rng.integers(10, size=(clients, steps, batch_size))
    labels[:, :, : batch_size // 2] = rng.integers(10, size=(clients, 1, 1))
    return labels


@pytest.mark.parametrize("name", BOTH)
def test_trained_model_leaks_through_its_statistics(
    digits: tuple[GlobalModel, AuxiliarySamples], name: str
) -> None:
    labels = skewed(60, 1, 16)
    truth, observations = counts_of(labels, 10), of_victims(digits, labels)
    found = success(truth, answer(name, digits[0], observations, 16, batches=200))
    uniform = success(truth, largest_remainder(np.ones((60, 10)), observations.labels))
    llg = make_attack("llg", {})
    gradient = success(truth, llg.infer(observations.restricted(llg), {}).values)
    assert uniform < 0.5
    assert gradient < 0.75
    assert found > 0.8


def test_gradients_add_to_statistics(digits: tuple[GlobalModel, AuxiliarySamples]) -> None:
    labels = skewed(60, 1, 16)
    truth, observations = counts_of(labels, 10), of_victims(digits, labels)
    joint, alone = (
        success(truth, answer(name, digits[0], observations, 16, batches=200))
        for name in ("batchnorm_joint", "batchnorm")
    )
    assert joint > alone


@pytest.mark.parametrize("steps", [1, 3])
def test_several_local_steps(digits: tuple[GlobalModel, AuxiliarySamples], steps: int) -> None:
    adversary = digits[0]
    later = GlobalModel(adversary._model, adversary._auxiliary, adversary.shape, local_steps=steps)
    later.enter(adversary._state.numpy(), 0, (0, 0))
    labels = skewed(40, steps, 8)
    observations = of_victims(digits, labels)
    truth = counts_of(labels, 10)
    assert truth.sum(axis=1).tolist() == [8 * steps] * 40
    assert success(truth, answer("batchnorm", later, observations, 8, batches=200)) > 0.7


def test_what_the_prior_expects_is_found_better(
    digits: tuple[GlobalModel, AuxiliarySamples],
) -> None:
    labels = skewed(60, 1, 16)
    truth, observations = counts_of(labels, 10), of_victims(digits, labels)
    right, wrong = (
        success(truth, answer("batchnorm", digits[0], observations, 16, batches=200, prior=prior))
        for prior in ("unbalanced", "balanced")
    )
    assert right > wrong
    concentrated, even = (
        success(
            truth,
            answer(
                "batchnorm",
                digits[0],
                observations,
                16,
                batches=200,
                prior="dirichlet",
                alpha=alpha,
            ),
        )
        for alpha in (0.3, 1e4)
    )
    assert concentrated > even


def test_calibration_depends_on_the_seed_alone(
    digits: tuple[GlobalModel, AuxiliarySamples],
) -> None:
    attack = make_attack("batchnorm_joint", {"batches": 20})

    def calibrate(seed: int) -> Calibration:
        return attack.calibrate(RestrictedAdversary(digits[0], Knowledge.AUXILIARY, 4, seed))

    first, again, other = calibrate(1), calibrate(1), calibrate(2)
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
        assert not np.array_equal(values, other[name])


@pytest.mark.parametrize("name", BOTH)
def test_rows_and_libraries_agree(digits: tuple[GlobalModel, AuxiliarySamples], name: str) -> None:
    attack = make_attack(name, {"batches": 30})
    calibration = attack.calibrate(adversary_of(attack, digits[0], 8))
    observations = of_victims(digits, skewed(7, 1, 8)).restricted(attack)
    whole = attack.infer(observations, calibration)
    for i in range(7):
        one = attack.infer(observations.rows(slice(i, i + 1)), calibration)
        np.testing.assert_array_equal(one.values[0], whole.values[i])
    on_torch = Observations(
        **{
            part: torch.from_numpy(np.array(values)) if isinstance(values, np.ndarray) else values
            for part, values in vars(observations).items()
        }
    )
    found = attack.infer(on_torch, calibration)
    np.testing.assert_array_equal(found.values.numpy(), whole.values)
    np.testing.assert_allclose(found.scores.numpy(), whole.scores, rtol=1e-9, atol=1e-9)


# Degenerate cases


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_small_batches(
    digits: tuple[GlobalModel, AuxiliarySamples], name: str, batch_size: int
) -> None:
    labels = skewed(30, 1, batch_size)
    counts = answer(name, digits[0], of_victims(digits, labels), batch_size, batches=200)
    assert success(counts_of(labels, 10), counts) > 0.6


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, 0.0])
def test_models_that_say_nothing(
    digits: tuple[GlobalModel, AuxiliarySamples], name: str, value: float
) -> None:
    adversary = digits[0]
    ruined = GlobalModel(adversary._model, adversary._auxiliary, adversary.shape)
    state = adversary._state.numpy().copy()
    state[: adversary.layout.parameters] = value
    ruined.enter(state, 0, (0, 0))
    observations = of_victims(digits, skewed(4, 1, 8))
    counts = answer(name, ruined, observations, 8, batches=10)
    assert (counts.sum(axis=1) == 8).all()


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("kept", [[3], [0, 2, 5, 9]])
def test_classes_without_auxiliary_samples_get_the_uniform_share(
    digits: tuple[GlobalModel, AuxiliarySamples], name: str, kept: list[int]
) -> None:
    adversary = digits[0]
    chosen = np.flatnonzero(np.isin(adversary._auxiliary.labels, kept))
    few = AuxiliarySamples(
        adversary._auxiliary.inputs[torch.from_numpy(chosen)], adversary._auxiliary.labels[chosen]
    )
    narrow = GlobalModel(adversary._model, few, adversary.shape)
    narrow.enter(adversary._state.numpy(), 0, (0, 0))
    attack = make_attack(name, {"batches": 100})
    calibration = attack.calibrate(adversary_of(attack, narrow, 8))
    missing = np.setdiff1d(np.arange(10), kept)
    np.testing.assert_allclose(calibration["intercept"][0, missing], 0.1)
    assert not calibration["statistics"][0][:, missing].any()
    observations = of_victims(digits, skewed(5, 1, 8))
    assert (answer(name, narrow, observations, 8, batches=20).sum(axis=1) == 8).all()


@pytest.mark.parametrize("name", BOTH)
def test_not_applicable_without_statistics(name: str) -> None:
    attack = make_attack(name, {})
    facts = Facts(classes=10, features=8, bias=True, statistics=0, batch_size=4)
    assert "no BatchNorm statistics" in not_applicable(attack, facts)
    assert not not_applicable(attack, replace(facts, statistics=72))
    without_bias = replace(facts, statistics=72, bias=False)
    assert bool(not_applicable(attack, without_bias)) == (name == "batchnorm_joint")


@pytest.mark.parametrize("name", BOTH)
def test_calibration_needs_a_model_with_statistics(name: str) -> None:
    module = build(
        "cnn_gn", shape=(1, 8, 8), classes=5, activation=None, arguments={}, init="torch", seed=0
    )
    model = GlobalModel(
        flat(module, (1, 8, 8), 5),
        AuxiliarySamples(torch.rand(5, 1, 8, 8), np.arange(5)),
        (1, 8, 8),
    )
    attack = make_attack(name, {})
    with pytest.raises(ValueError, match="no BatchNorm statistics"):
        attack.calibrate(adversary_of(attack, model, 4))
    outputs = model.on_auxiliary()
    arrays_alone = ArrayAdversary(Knowledge.AUXILIARY, 5, batch_size=4, auxiliary=outputs)
    with pytest.raises(NotGivenError, match="BatchNorm statistics"):
        attack.calibrate(arrays_alone)


@pytest.mark.parametrize("name", BOTH)
def test_declaration(name: str) -> None:
    attack = attacks()[name]
    check_declaration(name, attack.calibration_arrays)
    assert attack.knowledge is Knowledge.AUXILIARY


# The pieces, against definitions


def naive_ridge(
    features: NDArray[np.float64], targets: NDArray[np.float64], strength: float
) -> NDArray[np.float64]:
    """Return coefficients by the normal equations."""
    gram = features.T @ features + len(features) * strength * np.eye(features.shape[1])
    coefficients: NDArray[np.float64] = np.linalg.inv(gram) @ features.T @ targets
    return coefficients


@pytest.mark.parametrize(("n", "width"), [(40, 6), (12, 30), (15, 15)])
@pytest.mark.parametrize("noise", [0.1, 2.0])
def test_ridge_is_what_predicts_the_other_half_best(n: int, width: int, noise: float) -> None:
    rng = np.random.default_rng(n + width)
    x = rng.normal(3, 2, (n, width)) * np.logspace(0, 1, width)
    y = x[:, :3] @ rng.normal(size=(3, 4)) + noise * 5 * rng.normal(size=(n, 4))
    second = np.arange(n) % 3 == 0
    z, targets = (x - x.mean(axis=0)) / x.std(axis=0), y - y.mean(axis=0)
    errors = {}
    for strength in np.logspace(-5, 3, 25):
        errors[strength] = 0.0
        for half in (second, ~second):
            fitted = z[~half] @ naive_ridge(z[half], targets[half], strength)
            errors[strength] += ((targets[~half] - fitted) ** 2).sum()
    best = min(errors, key=lambda strength: errors[strength])
    found = fit_ridge(x, y, second)
    assert found.strength == pytest.approx(best / 2)
    expected = z @ naive_ridge(z, targets, best / 2) + y.mean(axis=0)
    np.testing.assert_allclose(x @ found.coefficients + found.intercept, expected, atol=1e-6)


def test_halves_that_contradict_each_other_are_not_trusted() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5))
    y = x @ rng.normal(size=(5, 2))
    second = np.arange(60) >= 30
    agreeing = fit_ridge(x, y, second)
    contradicting = fit_ridge(x, np.where(second[:, None], -y, y), second)
    assert agreeing.strength < 1e-4
    assert contradicting.strength > 100


def test_ridge_ignores_what_does_not_vary() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 4))
    y = x @ rng.normal(size=(4, 2))
    second = np.arange(30) % 2 == 1
    dull = np.stack([np.full(30, 7.0), 1e6 + 1e-3 * rng.normal(size=30)], axis=1)
    dull = np.append(dull, np.where(np.arange(30) == 3, np.nan, rng.normal(size=30))[:, None], 1)
    found = fit_ridge(np.hstack([x, dull]), y, second)
    assert not found.coefficients[4:].any()
    alone = fit_ridge(x, y, second).coefficients
    np.testing.assert_allclose(found.coefficients[:4], alone, rtol=1e-9)
    nothing = fit_ridge(dull, y, second)
    assert not nothing.coefficients.any()
    np.testing.assert_allclose(nothing.intercept, y.mean(axis=0))


def naive_projection(row: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lower all values alike, until what is left above zero sums to 1."""
    low, high = row.min() - 1, row.max()
    for _ in range(200):
        middle = (low + high) / 2
        if np.maximum(row - middle, 0).sum() > 1:
            low = middle
        else:
            high = middle
    return np.maximum(row - low, 0)


@given(arrays(float, (3, 6), elements=strategies.floats(-50, 50)))
def test_projection_is_the_nearest_point_of_the_simplex(values: NDArray[np.float64]) -> None:
    found = project_shares(values)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(found, [naive_projection(row) for row in values], atol=1e-9)
    np.testing.assert_allclose(project_shares(found), found, atol=1e-12)
    on_torch = project_shares(torch.from_numpy(values)).numpy()
    np.testing.assert_allclose(on_torch, found, atol=1e-12)


def test_projection_of_what_is_not_finite_is_uniform() -> None:
    values = np.array([[np.nan, 1.0], [np.inf, 0.0], [-np.inf, 3.0], [1e300, 0.0]])
    np.testing.assert_allclose(project_shares(values), [[0.5, 0.5]] * 3 + [[1.0, 0.0]])


def test_samples_are_of_the_wanted_labels_and_halves_share_none() -> None:
    labels = np.array([0, 0, 2, 2, 2, 5])
    wanted = np.random.default_rng(0).choice([0, 2, 5], size=(40, 2, 3))
    second = np.arange(40) % 2 == 1
    chosen = choose_samples(labels, wanted, second, np.random.default_rng(1))
    np.testing.assert_array_equal(labels[chosen], wanted)
    assert set(chosen[~second].ravel()) == {0, 2, 4, 5}
    assert set(chosen[second].ravel()) == {1, 3, 5}
