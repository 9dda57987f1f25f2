"""Conditioned statistics: what a batch leaves is the mean over its samples, to the last digit."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from closed_form import first_layer, observe_training
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import nn

from testbed.attacks import Knowledge, attacks, make_attack
from testbed.attacks.adversary import AuxiliarySamples, GlobalModel
from testbed.attacks.base import Normalised, Observations
from testbed.attacks.batchnorm_conditioned import class_evidence, label_shares
from testbed.attacks.checks import check_answer, check_calibration, check_declaration
from testbed.attacks.restricted import RestrictedAdversary
from testbed.attacks.rounding import largest_remainder
from testbed.data import load
from testbed.models.build import build
from testbed.models.flat import FlatModel
from testbed.models.last_layer import find_last_layer

BOTH = ["batchnorm_conditioned", "batchnorm_conditioned_joint"]
Labels = NDArray[np.int64]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Federation:
    """A model on the digits: trained a little, with auxiliary samples and victims."""

    def __init__(self, module: nn.Module, steps: int, *, per_class: int = 20) -> None:
        dataset = load("digits", None)
        self.model = FlatModel(
            module, find_last_layer(module, dataset.shape, 10), torch.device("cpu")
        )
        self.shape = dataset.shape
        rng = np.random.default_rng(0)
        order = rng.permutation(len(dataset.labels))
        order = order[np.argsort(dataset.labels[order], kind="stable")]
        labels = dataset.labels[order]
        place = np.arange(len(labels)) - np.searchsorted(labels, labels)
        images = torch.from_numpy(dataset.images[order].astype(np.float32) * dataset.scale)

        def part(chosen: NDArray[np.bool_]) -> AuxiliarySamples:
            return AuxiliarySamples(images[torch.from_numpy(chosen)], labels[chosen])

        self.own, self.victims = part(place < per_class), part(place >= per_class)
        gradient = torch.empty(self.model.layout.parameters)
        self.model.module.train()
        for _ in range(steps):
            chosen = rng.choice(len(self.victims.labels), 32)
            logits = self.model.module(self.victims.inputs[torch.from_numpy(chosen)])
            targets = torch.from_numpy(self.victims.labels[chosen])
            self.model.gradient(nn.functional.cross_entropy(logits, targets), gradient)
            self.model.state[: len(gradient)].sub_(gradient, alpha=0.1)
        self.state = self.model.state.numpy().copy()

    def holder(self, samples: AuxiliarySamples, steps: int = 1) -> GlobalModel:
        holder = GlobalModel(self.model, samples, self.shape, local_steps=steps)
        holder.enter(self.state, 0, (0, 0))
        return holder

    def chosen(self, labels: Labels) -> Labels:
        rng = np.random.default_rng(1)
        own = self.victims.labels
        return np.vectorize(lambda label: rng.choice(np.flatnonzero(own == label)))(labels)

    def observe(self, labels: Labels) -> Observations:
        """Return what clients with labels [N, E, B] share."""
        holder = self.holder(self.victims, labels.shape[1])
        return holder.simulate(self.chosen(labels))


def built(name: str) -> nn.Module:
    return build(
        name, shape=(1, 8, 8), classes=10, activation=None, arguments={}, init="torch", seed=0
    )


@pytest.fixture(scope="module")
def trained() -> Federation:
    torch.set_num_threads(1)
    return Federation(built("cnn_bn"), 150)


def skewed(clients: int, steps: int, batch_size: int) -> Labels:
    rng = np.random.default_rng(5)
    labels = rng.integers(10, size=(clients, steps, batch_size))
    labels[:, :, : batch_size // 2] = rng.integers(10, size=(clients, 1, 1))
    return labels


def counts_of(labels: Labels, classes: int = 10) -> Labels:
    return np.stack([np.bincount(row.ravel(), minlength=classes) for row in labels])


def success(truth: Labels, counts: Labels) -> float:
    return float(np.minimum(truth, counts).sum() / truth.sum())


def answer(name: str, model: GlobalModel, seen: Observations, batch_size: int) -> Labels:
    attack = make_attack(name, {})
    adversary = RestrictedAdversary(model, attack.knowledge, batch_size, 0)
    shown = seen.restricted(attack)
    calibration = {**attack.calibrate(adversary), **attack.calibrate_updates(adversary, shown)}
    lengths = {"class": model.classes, "client": len(seen.row_sums)}
    check_calibration(name, attack, calibration, lengths)
    inferred = attack.infer(shown, calibration)
    check_answer(name, attack, inferred, seen)
    counts: Labels = inferred.values
    return counts


# What the adversary is given


def normalised(federation: Federation, labels: Labels, row: Observations) -> Normalised:
    """Return the moments of the very samples that a client holds, [1, 1, B]."""
    chosen = np.sort(federation.chosen(labels)[0, 0])
    own = AuxiliarySamples(
        federation.victims.inputs[torch.from_numpy(chosen)], federation.victims.labels[chosen]
    )
    adversary = RestrictedAdversary(federation.holder(own), Knowledge.AUXILIARY, labels.shape[2], 0)
    return adversary.normalised(row.statistics[0])


class Vectors(nn.Module):
    """Normalises vectors as well as maps; one norm keeps no statistics, one buffer is none."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(3))
        self.hidden = nn.Linear(64, 12)
        self.first = nn.BatchNorm1d(12)
        self.second = nn.BatchNorm1d(12, momentum=0.4, eps=1e-2)
        self.classifier = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(self.hidden(x.flatten(1))))
        logits: torch.Tensor = self.classifier(torch.relu(self.second(hidden)))
        return logits


@pytest.mark.parametrize("make", [lambda: built("cnn_bn"), lambda: built("resnet20"), Vectors])
@pytest.mark.parametrize("batch_size", [4, 13])
def test_a_batch_is_the_mean_of_its_samples(make: Callable[[], nn.Module], batch_size: int) -> None:
    federation = Federation(make(), 3)
    labels = skewed(1, 1, batch_size)
    row = federation.observe(labels)
    found = normalised(federation, labels, row)
    # Samples drawn twice are there twice.
    np.testing.assert_allclose(found.moments.mean(axis=0), found.batch, atol=2e-4)
    assert np.abs(found.batch).max() > 0.1
    outputs = found.outputs
    assert outputs.labels is not None
    residual = outputs.posterior - np.eye(10)[outputs.labels]
    np.testing.assert_allclose(residual.mean(axis=0), row.bias_gradient[0], atol=1e-4)
    np.testing.assert_allclose(
        residual.T @ outputs.features / batch_size, row.weight_gradient[0], atol=2e-4
    )


def test_moments_are_those_of_a_plain_module(trained: Federation) -> None:
    labels = skewed(1, 1, 9)
    found = normalised(trained, labels, trained.observe(labels))
    trained.model.load(torch.from_numpy(trained.state))
    module = trained.model.module.train()
    chosen = np.sort(trained.chosen(labels)[0, 0])
    inputs = []
    hook = module.norm2.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        module(trained.victims.inputs[torch.from_numpy(chosen)])
    hook.remove()
    (second,) = inputs
    np.testing.assert_allclose(found.moments[:, 24:36], second.mean(dim=(2, 3)), atol=1e-4)
    squares = second.square().mean(dim=(2, 3))
    np.testing.assert_allclose(found.moments[:, 36:48], squares, atol=1e-4)


def test_buffers_that_are_no_statistics_are_zero() -> None:
    federation = Federation(Vectors(), 3)
    labels = skewed(1, 1, 9)
    found = normalised(federation, labels, federation.observe(labels))
    assert not found.moments[:, :3].any()
    assert not found.batch[:3].any()


class Averaging(Vectors):
    """Averages over all batches, which cannot be undone without their number."""

    def __init__(self) -> None:
        super().__init__()
        self.second.momentum = None


def test_norms_without_momentum_are_left_out() -> None:
    federation = Federation(Averaging(), 3)
    labels = skewed(1, 1, 9)
    found = normalised(federation, labels, federation.observe(labels))
    assert found.moments[:, 3:27].any(axis=0).all()
    assert not found.moments[:, 27:].any()
    assert np.isfinite(found.outputs.posterior).all()


def test_several_steps_are_undone_to_a_weighted_mean(trained: Federation) -> None:
    labels = skewed(1, 4, 6)
    seen = trained.observe(labels)
    own = trained.holder(trained.own, steps=4)
    found = RestrictedAdversary(own, Knowledge.AUXILIARY, 6, 0).normalised(seen.statistics[0])
    weights = 0.1 * 0.9 ** np.arange(4)[::-1]
    inputs = trained.victims.inputs[torch.from_numpy(trained.chosen(labels)[0])]
    with torch.no_grad():
        maps = [trained.model.module.conv1(images).mean(dim=(0, 2, 3)) for images in inputs]
    expected = weights @ np.stack(maps) / weights.sum()
    np.testing.assert_allclose(found.batch[:12], expected, atol=1e-4)


def test_asking_needs_auxiliary_knowledge_and_leaves_no_trace(trained: Federation) -> None:
    model = trained.holder(trained.own)
    before = model.on_auxiliary().posterior
    seen = trained.observe(skewed(1, 1, 6))
    with pytest.raises(PermissionError, match="auxiliary"):
        RestrictedAdversary(model, Knowledge.MODEL, 6, 0).normalised(seen.statistics[0])
    RestrictedAdversary(model, Knowledge.AUXILIARY, 6, 0).normalised(seen.statistics[0])
    model._outputs.clear()
    np.testing.assert_array_equal(model.on_auxiliary().posterior, before)


def test_noisy_variances_below_zero_are_taken_for_zero(trained: Federation) -> None:
    seen = trained.observe(skewed(1, 1, 6))
    adversary = RestrictedAdversary(trained.holder(trained.own), Knowledge.AUXILIARY, 6, 0)
    found = adversary.normalised(np.full_like(seen.statistics[0], -3))
    assert np.isfinite(found.outputs.posterior).all()
    assert np.isfinite(found.moments).all()


# Where batch means are mixtures of class prototypes


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("batch_size", [1, 9, 32])
def test_exact_where_all_samples_of_a_class_are_alike(name: str, batch_size: int) -> None:
    model = first_layer()
    labels = np.random.default_rng(0).integers(5, size=(20, 1, batch_size))
    counts = answer(name, model, observe_training(model, labels), batch_size)
    np.testing.assert_array_equal(counts, counts_of(labels, 5))


@pytest.mark.parametrize("name", BOTH)
def test_one_sample_of_each_class_tells_most(name: str) -> None:
    # What scatters within classes is unknown then, and taken for as much as between them.
    model = first_layer(per_class=1)
    labels = np.random.default_rng(0).integers(5, size=(40, 1, 4))
    truth, seen = counts_of(labels, 5), observe_training(model, labels, per_class=1)
    uniform = success(truth, largest_remainder(np.ones(truth.shape), seen.labels))
    assert success(truth, answer(name, model, seen, 4)) > uniform + 0.2


def test_statistics_that_were_not_shared_say_nothing() -> None:
    model = first_layer()
    labels = np.random.default_rng(0).integers(5, size=(20, 1, 8))
    seen = observe_training(model, labels)
    sent = replace(seen, statistics=np.tile(model.statistics_sent(), (20, 1)))
    counts = answer("batchnorm_conditioned", model, sent, 8)
    assert len(np.unique(counts, axis=0)) == 1
    truth = counts_of(labels, 5)
    shared = answer("batchnorm_conditioned", model, seen, 8)
    assert success(truth, counts) < success(truth, shared) - 0.2


def test_classes_that_leave_the_same_statistics_are_not_told_apart() -> None:
    model = first_layer(apart=0.0)
    labels = np.full((3, 1, 10), 4)
    counts = answer("batchnorm_conditioned", model, observe_training(model, labels), 10)
    np.testing.assert_array_equal(counts, 2)


# Success


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(("batch_size", "steps"), [(1, 1), (8, 1), (32, 1), (8, 3)])
def test_better_than_the_uniform_guess(
    trained: Federation, name: str, batch_size: int, steps: int
) -> None:
    labels = skewed(40, steps, batch_size)
    truth, seen = counts_of(labels), trained.observe(labels)
    found = success(truth, answer(name, trained.holder(trained.own, steps), seen, batch_size))
    uniform = success(truth, largest_remainder(np.ones(truth.shape), seen.labels))
    assert found > uniform + 0.3


def test_at_least_as_good_as_the_regression_on_simulated_batches(trained: Federation) -> None:
    for labels in (
        skewed(60, 1, 16),
        np.random.default_rng(3).integers(10, size=(60, 1, 16)),
    ):
        truth, seen = counts_of(labels), trained.observe(labels)
        attack = make_attack("batchnorm", {"batches": 150})
        model = trained.holder(trained.own)
        adversary = RestrictedAdversary(model, attack.knowledge, 16, 0)
        simulated = attack.infer(seen.restricted(attack), attack.calibrate(adversary)).values
        found = answer("batchnorm_conditioned", model, seen, 16)
        assert success(truth, found) > success(truth, simulated) - 0.01


def test_with_gradients_exact_at_the_start() -> None:
    federation = Federation(built("cnn_bn"), 0)
    labels = skewed(30, 1, 16)
    truth, seen = counts_of(labels), federation.observe(labels)
    model = federation.holder(federation.own)
    assert success(truth, answer("batchnorm_conditioned_joint", model, seen, 16)) > 0.97


@pytest.mark.parametrize("name", BOTH)
def test_rows_do_not_depend_on_each_other(trained: Federation, name: str) -> None:
    seen = trained.observe(skewed(3, 1, 8))
    model = trained.holder(trained.own)
    whole = answer(name, model, seen, 8)
    for i in range(3):
        np.testing.assert_array_equal(
            answer(name, model, seen.rows(slice(i, i + 1)), 8)[0], whole[i]
        )


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, 0.0])
def test_models_that_say_nothing(trained: Federation, name: str, value: float) -> None:
    model = trained.holder(trained.own)
    state = trained.state.copy()
    state[: trained.model.layout.parameters] = value
    model.enter(state, 0, (0, 0))
    seen = trained.observe(skewed(2, 1, 8))
    assert (answer(name, model, seen, 8).sum(axis=1) == 8).all()


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("kept", [[3], [0, 2, 5, 9]])
def test_missing_auxiliary_classes(trained: Federation, name: str, kept: list[int]) -> None:
    chosen = np.flatnonzero(np.isin(trained.own.labels, kept))
    few = AuxiliarySamples(trained.own.inputs[torch.from_numpy(chosen)], trained.own.labels[chosen])
    seen = trained.observe(skewed(3, 1, 8))
    assert (answer(name, trained.holder(few), seen, 8).sum(axis=1) == 8).all()


def test_one_auxiliary_sample_of_each_class(trained: Federation) -> None:
    federation = replace_own(trained, per_class=1)
    seen = trained.observe(skewed(3, 1, 8))
    for name in BOTH:
        assert (answer(name, trained.holder(federation), seen, 8).sum(axis=1) == 8).all()


def replace_own(federation: Federation, per_class: int) -> AuxiliarySamples:
    chosen = np.flatnonzero(np.arange(len(federation.own.labels)) % 20 < per_class)
    return AuxiliarySamples(
        federation.own.inputs[torch.from_numpy(chosen)], federation.own.labels[chosen]
    )


@pytest.mark.parametrize("name", BOTH)
def test_declaration(name: str) -> None:
    check_declaration(name, attacks()[name].calibration_arrays)


# The estimate, against definitions


def test_evidence_is_that_of_the_normal_equations() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 30)
    samples = rng.normal(size=(3, 5))[labels] * 2 + rng.normal(size=(90, 5)) @ rng.normal(
        size=(5, 5)
    )
    batch = rng.normal(size=5)
    precision, projection = class_evidence(samples, batch, labels, 3)
    means = np.stack([samples[labels == c].mean(axis=0) for c in range(3)])
    inside = sum(
        (samples[labels == c] - means[c]).T @ (samples[labels == c] - means[c]) for c in range(3)
    )
    covariance = inside / 87
    scale = np.diag(np.sqrt(np.diag(covariance)))
    correlation = np.linalg.inv(scale) @ covariance @ np.linalg.inv(scale)
    # The shrinkage of Chen et al. in terms of traces.
    trace, square = np.trace(correlation), np.trace(correlation @ correlation)
    rho = ((1 - 2 / 5) * square + trace**2) / ((87 + 1 - 2 / 5) * (square - trace**2 / 5))
    assert 0.005 < rho < 0.5
    inverse = np.linalg.inv(scale @ ((1 - rho) * correlation + rho * np.eye(5)) @ scale)
    about = means - means.mean(axis=0)
    np.testing.assert_allclose(precision, about @ inverse @ about.T, rtol=1e-6)
    np.testing.assert_allclose(
        projection, about @ inverse @ (batch - means.mean(axis=0)), rtol=1e-6
    )


def test_evidence_does_not_depend_on_units() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 10)
    samples = rng.normal(size=(40, 6)) + labels[:, None] * rng.normal(size=6)
    batch = rng.normal(size=6)
    units, origin = np.logspace(-3, 3, 6), rng.normal(size=6)
    for one, other in zip(
        class_evidence(samples, batch, labels, 4),
        class_evidence(samples * units + origin, batch * units + origin, labels, 4),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_shares_are_the_average_of_the_most_likely_ones() -> None:
    rng = np.random.default_rng(4)
    means, truth = rng.normal(size=(4, 7)), np.array([0.5, 0.3, 0.0, 0.2])
    about, n, size = means - means.mean(axis=0), 40.0, 10
    precision = about @ about.T
    x = truth @ about + 0.4 * rng.normal(size=7)
    found = label_shares(precision, about @ x, size, n)
    estimates, evidence = [], []
    for v in np.geomspace(1 / size, 1, 8):
        noise = 1 / size + (1 / 4 + v) / n
        # The likelihood of x within the span of the class means.
        basis = np.linalg.svd(about, full_matrices=False)[2][:3]
        spread = noise * np.eye(3) + v / 4 * (about @ basis.T).T @ (about @ basis.T)
        seen = basis @ x
        evidence.append(
            -0.5 * (np.linalg.slogdet(spread)[1] + seen @ np.linalg.solve(spread, seen))
        )

        def cost(share: NDArray[np.float64], noise: float = noise, v: float = v) -> float:
            misfit, unlike = x - share @ about, share - 1 / 4
            return float(misfit @ misfit / noise + unlike @ unlike / (v / 4)) / 2

        found_one = minimize(
            cost,
            np.full(4, 0.25),
            bounds=[(0, 1)] * 4,
            constraints={"type": "eq", "fun": lambda share: share.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-12},
        )
        estimates.append(found_one.x)
    weights = np.exp(np.array(evidence) - max(evidence))
    np.testing.assert_allclose(found, weights @ estimates / weights.sum(), atol=1e-4)


@pytest.mark.parametrize("labels", [1, 2, 50])
def test_no_evidence_gives_equal_shares(labels: int) -> None:
    shares = label_shares(np.zeros((5, 5)), np.zeros(5), labels, 3)
    np.testing.assert_allclose(shares, 0.2)
    broken = label_shares(np.eye(5), np.full(5, np.nan), labels, 3)
    np.testing.assert_allclose(broken, 0.2)


def test_clear_evidence_gives_the_truth() -> None:
    truth = np.array([0.75, 0.25, 0, 0, 0])
    precision = 1e8 * (np.eye(5) - 0.2)
    shares = label_shares(precision, precision @ truth, 8, 1e9)
    np.testing.assert_allclose(shares, truth, atol=1e-4)
