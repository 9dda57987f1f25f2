"""Training by rounds: FedSGD, FedAvg, FedProx and server optimisers against plain PyTorch."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from whole_run import Vector, WholeRun, joined, loss_of, run_whole

from testbed.plan import Task

RATE = 0.5
FEDAVG = {"algorithm": "fedavg", "local_steps": 3}
OF_DIFFERENT_SIZE = {
    "partition": {"kind": "dirichlet_classes", "alpha": 0.5},
    "labels": {"distribution": "natural"},
}


def client_model(
    run: WholeRun,
    start: Vector,
    task: Task,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    proximal: float = 0.0,
) -> Vector:
    """Return a client's parameters after its local steps, by PyTorch's own optimiser."""
    module = run.module(start)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer = torch.optim.SGD(
        module.parameters(), lr=RATE, momentum=momentum, weight_decay=weight_decay
    )
    for batch in run.batches(task):
        optimizer.zero_grad()
        drifts = zip(module.parameters(), before, strict=True)
        distance = sum(((now - then) ** 2).sum() for now, then in drifts)
        loss = loss_of(module, batch) + proximal / 2 * distance
        loss.backward()
        optimizer.step()
    return joined(list(module.parameters()))


def mean_models(
    run: WholeRun, weights: Iterable[float] = (1, 1, 1), **optimizer: float
) -> list[Vector]:
    """Return the global models of a training that averages the clients' models."""
    models = [run.models[0]]
    for number in range(run.plan.rounds - 1):
        ends = [
            client_model(run, models[-1], task, **optimizer)
            for task in run.plan.round_tasks(number)
        ]
        models.append(np.average(ends, axis=0, weights=list(weights)).astype(np.float32))
    return models


def assert_close(run: WholeRun, expected: list[Vector]) -> None:
    moved = np.abs(run.final - run.models[0]).max()
    assert moved > 0.01
    for number, model in enumerate(expected):
        np.testing.assert_allclose(run.models[number], model, atol=1e-5 * moved + 1e-6)


def assert_equal_models(one: WholeRun, other: WholeRun) -> None:
    assert len(one.models) == len(other.models) == one.plan.rounds
    for number, model in one.models.items():
        np.testing.assert_array_equal(model, other.models[number])
    assert np.abs(one.final - one.models[0]).max() > 0.01


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fedsgd_is_centralised_sgd_on_the_union_of_the_batches(
    tmp_path: Path, decay: float
) -> None:
    run = run_whole(tmp_path, federation={"rounds": 8, "weight_decay": decay})
    module = run.module(run.models[0])
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, weight_decay=decay)
    expected = [joined(list(module.parameters()))]
    for number in range(7):
        batches = [batch for task in run.plan.round_tasks(number) for batch in run.batches(task)]
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert len(labels) == 3 * 8
        optimizer.zero_grad()
        loss_of(module, (images, labels)).backward()
        optimizer.step()
        expected.append(joined(list(module.parameters())))
    assert_close(run, expected)


@pytest.mark.parametrize("other", [{}, OF_DIFFERENT_SIZE, {"model": {"name": "cnn_bn"}}])
def test_fedavg_of_one_step_is_fedsgd_to_the_bit(tmp_path: Path, other: dict[str, Any]) -> None:
    # Momentum starts anew with each client's first step.
    one_step = {"algorithm": "fedavg", "local_steps": 1, "momentum": 0.9, "proximal": 1.0}
    fedsgd = run_whole(tmp_path / "fedsgd", **other)
    fedavg = run_whole(tmp_path / "fedavg", federation=one_step, **other)
    assert_equal_models(fedsgd, fedavg)
    for name in ("truth/counts", "observations/row_sums", "updates/loss"):
        np.testing.assert_array_equal(fedsgd[name], fedavg[name])


def test_fedavg_is_the_mean_of_the_clients_models(tmp_path: Path) -> None:
    run = run_whole(tmp_path, federation=FEDAVG)
    assert_close(run, mean_models(run))


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_models_weigh_by_the_samples_of_their_clients_or_all_the_same(
    tmp_path: Path, weighting: str
) -> None:
    run = run_whole(tmp_path, federation={**FEDAVG, "weighting": weighting}, **OF_DIFFERENT_SIZE)
    assert run.setup.partition is not None
    sizes = run.setup.partition.sizes
    assert sizes.max() > 1.2 * sizes.min()
    expected = {
        kind: mean_models(run, weights)
        for kind, weights in (("samples", sizes.tolist()), ("uniform", (1, 1, 1)))
    }
    assert_close(run, expected[weighting])
    assert np.abs(expected["samples"][-1] - expected["uniform"][-1]).max() > 1e-3


def test_fedprox_without_mu_is_fedavg(tmp_path: Path) -> None:
    fedavg = run_whole(tmp_path / "fedavg", federation=FEDAVG)
    without = run_whole(tmp_path / "without", federation={**FEDAVG, "proximal": 0.0})
    assert_equal_models(fedavg, without)
    # As mu vanishes, so does what it does.
    gaps = []
    for mu in (1e-2, 1e-3, 1e-4):
        near = run_whole(tmp_path / str(mu), federation={**FEDAVG, "rounds": 2, "proximal": mu})
        gaps.append(float(np.abs(near.models[1] - fedavg.models[1]).max()))
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2] > 0


@pytest.mark.parametrize(
    "optimizer",
    [
        {"proximal": 0.5},
        {"momentum": 0.8},
        {"weight_decay": 0.05},
        {"proximal": 0.5, "momentum": 0.5, "weight_decay": 0.02},
    ],
)
def test_local_steps_are_those_of_torch(tmp_path: Path, optimizer: dict[str, float]) -> None:
    run = run_whole(tmp_path, federation={**FEDAVG, "local_steps": 4, "rounds": 3, **optimizer})
    assert_close(run, mean_models(run, **optimizer))
    plain = mean_models(run)
    assert np.abs(run.final - plain[-1]).max() > 1e-3 * np.abs(run.final - run.models[0]).max()
    # What the server is shown is the sum of the steps, in units of gradients.
    for task in run.plan.round_tasks(0):
        end = client_model(run, run.models[0], task, **optimizer)
        np.testing.assert_allclose(run.plain(task), (run.models[0] - end) / RATE, atol=1e-5)


def test_server_learning_rate_stretches_the_mean_step(tmp_path: Path) -> None:
    federation = {**FEDAVG, "rounds": 2, "server": {"learning_rate": 0.25}}
    run = run_whole(tmp_path, federation=federation)
    whole = mean_models(run)[1] - run.models[0]
    np.testing.assert_allclose(run.models[1] - run.models[0], 0.25 * whole, atol=1e-6)


def momentum_reference(run: WholeRun, learning_rate: float, momentum: float) -> Iterable[Vector]:
    """Yield the models of server momentum, by `torch.optim.SGD` on pseudo-gradients."""
    model = torch.nn.Parameter(torch.from_numpy(run.models[0].copy()))
    optimizer = torch.optim.SGD([model], lr=learning_rate, momentum=momentum)
    for delta in deltas(run, model):
        model.grad = delta
        optimizer.step()
        yield model.detach().numpy().copy()


def adam_reference(
    run: WholeRun, learning_rate: float, beta1: float, beta2: float, epsilon: float
) -> Iterable[Vector]:
    """Yield the models of FedAdam (Reddi et al. 2021, algorithm 2), in float64."""
    model = torch.nn.Parameter(torch.from_numpy(run.models[0].copy()))
    first, second = 0.0, epsilon**2
    exact = run.models[0].astype(np.float64)
    for delta in deltas(run, model):
        change = -delta.numpy().astype(np.float64)
        first = beta1 * first + (1 - beta1) * change
        second = beta2 * second + (1 - beta2) * change**2
        exact = exact + learning_rate * first / (np.sqrt(second) + epsilon)
        model.data = torch.from_numpy(exact.astype(np.float32))
        yield model.detach().numpy().copy()


def deltas(run: WholeRun, model: torch.nn.Parameter) -> Iterable[torch.Tensor]:
    """Yield how far the clients' mean is from the model of each round, the model minus the mean."""
    for number in range(run.plan.rounds - 1):
        before = model.detach().numpy().copy()
        ends = [client_model(run, before, task) for task in run.plan.round_tasks(number)]
        yield torch.from_numpy(before - np.mean(ends, axis=0, dtype=np.float32))


@pytest.mark.parametrize(
    ("server", "reference"),
    [
        ({"optimizer": "momentum", "learning_rate": 0.5, "momentum": 0.8}, momentum_reference),
        (
            {
                "optimizer": "adam",
                "learning_rate": 0.02,
                "beta1": 0.8,
                "beta2": 0.95,
                "epsilon": 1e-2,
            },
            adam_reference,
        ),
    ],
)
def test_server_optimisers_step_along_the_mean_update(
    tmp_path: Path, server: Mapping[str, Any], reference: Any
) -> None:
    federation = {**FEDAVG, "rounds": 5, "server": server}
    run = run_whole(tmp_path, federation=federation)
    numbers = {key: value for key, value in server.items() if key != "optimizer"}
    assert_close(run, [run.models[0], *reference(run, **numbers)])


def test_a_round_that_is_not_evaluated_has_no_accuracy_and_training_raises_it(
    tmp_path: Path,
) -> None:
    federation = {**FEDAVG, "rounds": 31, "learning_rate": 0.2, "local_steps": 8}
    federation |= {"evaluate_every": 10, "attack_every": 40}
    run = run_whole(tmp_path, federation=federation)
    accuracy = run["rounds/accuracy"]
    assert np.flatnonzero(np.isfinite(accuracy)).tolist() == [0, 10, 20, 30]
    assert accuracy[0] < 0.3 < 0.7 < accuracy[30]
    module = run.module(run.final).eval()
    test = run.setup.parts.test
    with torch.no_grad():
        guess = module(run.setup.samples.inputs(test)).argmax(dim=1)
    right = float((guess == run.setup.samples.targets(test)).double().mean())
    assert accuracy[30] == pytest.approx(right, abs=1e-12)
