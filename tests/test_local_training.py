"""A client's local work in a run: how many steps, on what, and the truth behind the update."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from whole_run import gradient_of, loss_of, run_whole

from testbed.plan import Task

OWN = {"labels": {"distribution": "natural"}, "attacks": ["oracle", "random"]}


def test_an_epoch_is_a_pass_over_the_clients_own_samples(tmp_path: Path) -> None:
    federation = {"algorithm": "fedavg", "local_epochs": 2, "batch_size": 64, "rounds": 2}
    partition = {"kind": "dirichlet_classes", "alpha": 1.0}
    run = run_whole(tmp_path, federation=federation, partition=partition, **OWN)
    assert run.setup.partition is not None
    for task in run.plan.tasks():
        own = run.setup.partition.indices[task.client]
        batches = run.worker.draw(task)
        for epoch in np.split(np.arange(len(batches)), 2):
            passed = np.concatenate([batches[i] for i in epoch])
            np.testing.assert_array_equal(np.sort(passed), own)
        at = task.round, task.client
        assert run["updates/local_steps"][at] == 2 * -(-len(own) // 64) == len(batches)
        labels = run.setup.samples.labels[own]
        np.testing.assert_array_equal(
            run["truth/counts"][at], 2 * np.bincount(labels, minlength=10)
        )
        assert run["observations/labels"][at] == 2 * len(own)
    steps = run["updates/local_steps"]
    assert len(np.unique(steps)) > 1
    # The attacks answer for as many labels as each update has, though steps differ.
    np.testing.assert_array_equal(
        run["attacks/random/counts"].sum(axis=2), run["truth/counts"].sum(axis=2)
    )


@pytest.mark.parametrize(
    ("federation", "partition"),
    [
        ({"local_steps": 4, "batch_size": 16}, "shared"),
        ({"local_steps": 6, "batch_size": 16}, "iid"),
        # A client's samples are no multiple of a smaller batch: all of them are one.
        ({"local_epochs": 2, "batch_size": 2000}, "iid"),
    ],
)
def test_oracle_is_exact_over_plain_local_steps(
    tmp_path: Path, federation: dict[str, Any], partition: str
) -> None:
    federation = {"algorithm": "fedavg", "rounds": 3, **federation}
    run = run_whole(tmp_path, federation=federation, partition={"kind": partition}, **OWN)
    np.testing.assert_array_equal(run["attacks/oracle/counts"], run["truth/counts"])
    assert run["truth/counts"].sum() > 0
    assert np.abs(run.final - run.models[0]).max() > 0.01


@pytest.mark.parametrize("optimizer", [{}, {"momentum": 0.9}])
def test_posterior_and_loss_are_those_along_the_steps(
    tmp_path: Path, optimizer: dict[str, float]
) -> None:
    federation = {"algorithm": "fedavg", "local_steps": 3, "rounds": 1, **optimizer}
    run = run_whole(tmp_path, federation=federation)
    for task in run.plan.tasks():
        module = run.module(run.models[0])
        steps = torch.optim.SGD(module.parameters(), lr=0.5, **optimizer)
        losses, posteriors = [], []
        for images, labels in run.batches(task):
            posteriors.append(torch.softmax(module(images), dim=1).detach().numpy())
            loss = loss_of(module, (images, labels))
            losses.append(loss.item())
            steps.zero_grad()
            loss.backward()
            steps.step()
        at = task.round, task.client
        mean = np.concatenate(posteriors).mean(axis=0)
        np.testing.assert_allclose(run["truth/posterior"][at], mean, atol=1e-6)
        assert run["updates/loss"][at] == pytest.approx(np.mean(losses), rel=1e-5)


def test_update_of_one_step_is_the_gradient_to_the_bit(tmp_path: Path) -> None:
    run = run_whole(tmp_path, federation={"rounds": 2})
    for task in run.plan.tasks():
        ((images, labels),) = run.batches(task)
        gradient = gradient_of(run.module(run.models[task.round]), (images, labels))
        np.testing.assert_array_equal(run.plain(task), gradient)


def test_one_clients_work_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    """Clients of one worker begin at the global model, whoever came before."""
    federation = {"algorithm": "fedavg", "local_steps": 3, "rounds": 1, "momentum": 0.5}
    model = {"name": "cnn_bn", "init": "torch"}
    many = run_whole(tmp_path / "many", federation={**federation, "clients": 4}, model=model)
    few = run_whole(tmp_path / "few", federation={**federation, "clients": 2}, model=model)
    for client in range(2):
        task = Task(0, 0, client)
        np.testing.assert_array_equal(many.plain(task), few.plain(task))
