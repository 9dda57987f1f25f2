"""BatchNorm's statistics in federated training: shared and averaged, local, or frozen."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from whole_run import WholeRun, gradient_of, joined, loss_of, run_whole

from testbed.plan import Task

BN = {"name": "cnn_bn", "init": "torch"}
FEDAVG = {"algorithm": "fedavg", "local_steps": 3, "learning_rate": 0.1}
DIVIDED = {
    "partition": {"kind": "dirichlet_classes", "alpha": 0.5},
    "labels": {"distribution": "natural"},
}
Norm = nn.modules.batchnorm._BatchNorm


def buffers_of(module: nn.Module) -> Any:
    return joined([buffer for buffer in module.buffers() if buffer.is_floating_point()])


def trained(run: WholeRun, task: Task, *, frozen: bool = False) -> nn.Module:
    """Return a client's module after its local steps."""
    module = run.module(run.models[task.round])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for norm in module.modules():
        if isinstance(norm, Norm) and frozen:
            norm.eval()
    for batch in run.batches(task):
        optimizer.zero_grad()
        loss_of(module, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return module


def test_aggregated_statistics_are_the_clients_weighted_mean(tmp_path: Path) -> None:
    run = run_whole(tmp_path, model=BN, federation=FEDAVG, **DIVIDED)
    split = run.setup.layout.parameters
    assert run.setup.shared == split + 72
    assert run.setup.partition is not None
    weights = run.setup.partition.sizes
    for number in range(3):
        clients = [buffers_of(trained(run, task)) for task in run.plan.round_tasks(number)]
        for task, expected in zip(run.plan.round_tasks(number), clients, strict=True):
            np.testing.assert_allclose(run.plain(task)[split:], expected, rtol=1e-4, atol=1e-5)
        mean = np.average(clients, axis=0, weights=weights)
        np.testing.assert_allclose(run.models[number + 1][split:], mean, rtol=1e-4, atol=1e-5)
    assert np.abs(run.final[split:] - run.models[0][split:]).max() > 0.05
    assert (run["updates/bytes_on_wire"] == 4 * (split + 72)).all()


def test_statistics_of_clients_that_drop_out_are_not_averaged(tmp_path: Path) -> None:
    federation = {**FEDAVG, "dropout": 0.5, "clients": 4, "rounds": 5}
    run = run_whole(tmp_path, model=BN, federation=federation)
    split = run.setup.layout.parameters
    for number in range(4):
        arrived = [run.plain(task)[split:] for task in run.plan.round_tasks(number)]
        expected = np.mean(arrived, axis=0) if arrived else run.models[number][split:]
        np.testing.assert_allclose(run.models[number + 1][split:], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compressed", [False, True])
def test_statistics_that_stay_local_are_not_sent(tmp_path: Path, compressed: bool) -> None:
    changes: dict[str, Any] = {"defenses": [{"name": "float16"}]} if compressed else {}
    federation = {**FEDAVG, "batch_norm": "local"}
    run = run_whole(tmp_path, model=BN, federation=federation, **changes)
    split = run.setup.layout.parameters
    expected = 16 + 2 * split if compressed else 4 * split
    assert (run["updates/bytes_on_wire"] == expected).all()
    assert all(len(sent.body) == expected for sent in run.sent.values())
    for model in run.models.values():
        np.testing.assert_array_equal(model[split:], run.models[0][split:])
    for task in run.plan.round_tasks(0):
        end = joined(list(trained(run, task).parameters()))
        update = run.decoded(task) if compressed else run.plain(task)
        tolerance = 2e-3 if compressed else 1e-4
        np.testing.assert_allclose(update, (run.models[0][:split] - end) / 0.1, atol=tolerance)


def test_evaluation_without_statistics_normalises_by_the_batch(tmp_path: Path) -> None:
    federation = {**FEDAVG, "evaluate_every": 1, "rounds": 12, "batch_norm": "local"}
    run = run_whole(tmp_path, model=BN, federation=federation)
    test = run.setup.parts.test
    assert len(test) < 512
    for number in (0, 11):
        module = run.module(run.models[number]).train()
        with torch.no_grad():
            guess = module(run.setup.samples.inputs(test)).argmax(dim=1)
        right = float((guess == run.setup.samples.targets(test)).double().mean())
        assert run["rounds/accuracy"][number] == pytest.approx(right, abs=3 / len(test))
        # The statistics of the first model, which nobody has changed, tell nothing of the images.
        module = run.module(run.models[number]).eval()
        with torch.no_grad():
            wrong = module(run.setup.samples.inputs(test)).argmax(dim=1)
        stale = float((wrong == run.setup.samples.targets(test)).double().mean())
    assert right > 0.8
    assert stale < right - 0.1


@pytest.mark.parametrize("steps", [1, 3])
def test_frozen_statistics_normalise_and_never_change(tmp_path: Path, steps: int) -> None:
    federation = {**FEDAVG, "local_steps": steps, "batch_norm": "frozen", "evaluate_every": 1}
    run = run_whole(tmp_path, model=BN, federation=federation)
    split = run.setup.layout.parameters
    assert (run["updates/bytes_on_wire"] == 4 * split).all()
    for task in run.plan.tasks():
        module = run.module(run.models[task.round])
        if steps == 1:
            # There is no dropout: in inference mode, only the norms do otherwise.
            gradient = gradient_of(module.eval(), run.batches(task)[0])
            np.testing.assert_allclose(run.plain(task), gradient, atol=1e-6)
            training = gradient_of(module.train(), run.batches(task)[0])
            assert np.abs(training - gradient).max() > 0.01
        end = joined(list(trained(run, task, frozen=True).parameters()))
        expected = (run.models[task.round][:split] - end) / 0.1
        np.testing.assert_allclose(run.plain(task), expected, atol=1e-4)
    for model in run.models.values():
        np.testing.assert_array_equal(model[split:], run.models[0][split:])
    module = run.module(run.final).eval()
    test = run.setup.parts.test
    with torch.no_grad():
        guess = module(run.setup.samples.inputs(test)).argmax(dim=1)
    right = float((guess == run.setup.samples.targets(test)).double().mean())
    assert run["rounds/accuracy"][-1] == pytest.approx(right, abs=1e-12)


@pytest.mark.parametrize("batch_norm", ["local", "frozen"])
def test_attacks_on_statistics_that_are_not_shared_say_so(tmp_path: Path, batch_norm: str) -> None:
    attacks = ["llg", {"name": "batchnorm_joint", "batches": 5}]
    run = run_whole(
        tmp_path, model=BN, federation={"batch_norm": batch_norm, "rounds": 1}, attacks=attacks
    )
    reason = "no BatchNorm statistics come with the updates"
    assert run.attributes("attacks/batchnorm_joint")["not_applicable"] == reason
    assert run.attributes("attacks/llg")["not_applicable"] == ""
    assert (run["attacks/llg/counts"] >= 0).all()


def test_dp_sgd_goes_together_with_frozen_statistics(tmp_path: Path) -> None:
    run = run_whole(
        tmp_path,
        model=BN,
        federation={"batch_norm": "frozen", "rounds": 1, "clients": 1, "batch_size": 4},
        defenses=[{"name": "dp_sgd", "bound": 0.5, "noise_multiplier": 0.0}],
    )
    (task,) = run.plan.tasks()
    ((images, labels),) = run.batches(task)
    module = run.module(run.models[0]).eval()
    single = [gradient_of(module, (images[i : i + 1], labels[i : i + 1])) for i in range(4)]
    cut = [one * min(1.0, 0.5 / float(np.linalg.norm(one))) for one in single]
    np.testing.assert_allclose(run.plain(task), np.mean(cut, axis=0), atol=1e-6)


def test_secure_sums_leave_local_statistics_out(tmp_path: Path) -> None:
    run = run_whole(
        tmp_path,
        model=BN,
        federation={"batch_norm": "local", "rounds": 2},
        defenses=[{"name": "secure_aggregation", "protocol": "reduction"}],
    )
    split = run.setup.layout.parameters
    assert (run["updates/bytes_on_wire"] == 8 * split).all()
    np.testing.assert_array_equal(run.models[1][split:], run.models[0][split:])
    assert np.abs(run.models[1][:split] - run.models[0][:split]).max() > 1e-3
