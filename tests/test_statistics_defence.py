"""What clients do to BatchNorm's statistics before they share them, and what it is good for."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_run import plan_of, setups_for
from torch import nn

from testbed.attacks import Knowledge, make_attack
from testbed.attacks.adversary import GlobalModel
from testbed.attacks.base import Observations
from testbed.attacks.restricted import RestrictedAdversary
from testbed.client import ClientWorker
from testbed.norm_statistics import NoisyStatistics
from testbed.plan import Task
from testbed.startup import ScenarioSetup
from testbed.update import Message

CLIENTS = 60
TASKS = [Task(0, round_, client) for round_ in range(2) for client in range(3)]
Updates = dict[Task, NDArray[np.float32]]


def prepare(*overrides: str) -> tuple[ClientWorker, ScenarioSetup, NDArray[np.float32]]:
    """Return a worker at an initial model with buffers unlike those of a new module."""
    federation = ("federation.batch_size=16", f"federation.clients={CLIENTS}")
    plan = plan_of("model.name=cnn_bn", "model.init=torch", *federation, *overrides)
    setup = setups_for([plan]).make(plan)
    state = torch.empty(setup.layout.size)
    setup.initialise(state, (0, 0))
    split = setup.layout.parameters
    state[split:] = torch.rand(setup.layout.buffers, generator=torch.Generator().manual_seed(1))
    worker = ClientWorker(plan, setup, 0)
    worker.load(state.numpy())
    return worker, setup, state.numpy()


def updates_of(*overrides: str, tasks: list[Task] = TASKS) -> Updates:
    worker, setup, _ = prepare(*overrides)
    updates = {}
    for task in tasks:
        message = Message(setup.layout)
        worker.work(task, message)
        updates[task] = message.payload.copy()
    return updates


def places(module: nn.Module) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which float buffers are running means, and which are running variances."""
    names = np.concatenate(
        [
            np.full(buffer.numel(), name.rpartition(".")[2], dtype=object)
            for name, buffer in module.named_buffers()
            if buffer.is_floating_point()
        ]
    )
    return names == "running_mean", names == "running_var"


def test_statistics_are_shared_as_the_forward_pass_left_them() -> None:
    _, setup, state = prepare()
    split = setup.layout.parameters
    sent = state[split:]
    for update in updates_of().values():
        assert (update[split:] != sent).all()


@pytest.mark.parametrize("kept", ["local", "frozen"])
def test_without_sharing_no_statistics_are_sent(kept: str) -> None:
    worker, setup, state = prepare(f"federation.batch_norm={kept}")
    split = setup.layout.parameters
    shared, withheld = updates_of(), updates_of(f"federation.batch_norm={kept}")
    for task, update in withheld.items():
        np.testing.assert_array_equal(update[split:], state[split:])
        # Frozen statistics normalise, and local ones leave the gradient as it is.
        assert np.array_equal(update[:split], shared[task][:split]) == (kept == "local")
        message = Message(setup.layout)
        worker.work(task, message)
        sent = message.buffer[: message.used]
        assert message.header["payload_bytes"] == 4 * split
        np.testing.assert_array_equal(sent[-4 * split :].view(np.float32), update[:split])


def test_noise_does_not_depend_on_rank_or_order() -> None:
    forth = updates_of("federation.statistics_noise=0.3")
    back = updates_of("federation.statistics_noise=0.3", tasks=TASKS[::-1])
    for task in TASKS:
        np.testing.assert_array_equal(forth[task], back[task])


def test_noise_is_that_of_the_client_and_the_round() -> None:
    _, setup, _ = prepare()
    split = setup.layout.parameters
    clean = updates_of()
    noise = [
        update[split:] - clean[task][split:]
        for task, update in updates_of("federation.statistics_noise=0.3").items()
    ]
    for i, one in enumerate(noise):
        assert one.any()
        for other in noise[:i]:
            assert not np.array_equal(one, other)


@pytest.mark.parametrize("sigma", [0.1, 0.3])
def test_scale_of_the_noise(sigma: float) -> None:
    _, setup, _ = prepare()
    split = setup.layout.parameters
    means, variances = places(setup.model.module)
    assert means.sum() == variances.sum() == 36
    clean, noisy = updates_of(), updates_of(f"federation.statistics_noise={sigma}")
    shifts, factors = [], []
    for task, update in noisy.items():
        before, after = clean[task][split:], update[split:]
        np.testing.assert_array_equal(clean[task][:split], update[:split])
        # A mean's channel has its variance 12 places behind it.
        shifts.append((after - before)[means] / np.sqrt(before[variances]) / sigma)
        factors.append((after / before - 1)[variances] / sigma)
    for values in (np.concatenate(shifts), np.concatenate(factors)):
        count = len(values)
        assert abs(values.mean()) < 4 / np.sqrt(count)
        assert abs(values.std() - 1) < 4 / np.sqrt(2 * count)
    assert abs(np.corrcoef(np.concatenate(shifts), np.concatenate(factors))[0, 1]) < 0.25


class Mixed(nn.Module):
    """Float buffers of several kinds, in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.full((3,), 5.0))
        self.norm = nn.BatchNorm1d(2)
        self.other = nn.InstanceNorm1d(4, track_running_stats=True)
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))


def test_noise_is_for_running_means_and_variances_alone() -> None:
    noise = NoisyStatistics(Mixed(), 0.5)
    variances = np.array([1, 4, 1, 100, 0, 1], np.float32)
    start = np.concatenate(
        [np.full(3, 5), np.zeros(2), variances[:2], np.zeros(4), variances[2:]]
    ).astype(np.float32)
    drawn = np.stack([start] * 400)
    rng = np.random.default_rng(0)
    for row in drawn:
        noise.disturb(row, rng)
    assert (drawn[:, :3] == 5).all()
    np.testing.assert_allclose(
        drawn[:, [3, 4, 7, 8, 9, 10]].std(axis=0), 0.5 * np.sqrt(variances), rtol=0.15
    )
    assert (drawn[:, [5, 6, 11, 12, 14]] > 0).all()
    assert not drawn[:, 13].any()


def test_a_model_without_statistics_has_nothing_to_disturb() -> None:
    buffers = np.zeros(0, np.float32)
    NoisyStatistics(nn.Sequential(nn.GroupNorm(2, 4)), 0.5).disturb(
        buffers, np.random.default_rng()
    )
    NoisyStatistics(nn.BatchNorm1d(4, track_running_stats=False), 0.5).disturb(
        buffers, np.random.default_rng()
    )


def test_group_norm_shares_no_statistics() -> None:
    _, setup, state = prepare_group_norm()
    assert setup.layout.buffers == 0
    assert len(state) == setup.layout.parameters


def prepare_group_norm() -> tuple[ClientWorker, ScenarioSetup, NDArray[np.float32]]:
    return prepare("model.name=cnn_gn")


def success_of(*overrides: str, noise: float = 0.0) -> float:
    """Return the success of the statistics attack on a round's clients of a model in training.

    ``noise`` is what the server knows of the defence.
    """
    worker, setup, _ = prepare(
        "labels.distribution=unbalanced", "data.auxiliary_per_class=20", *overrides
    )
    state = torch.empty(setup.layout.size)
    setup.initialise(state, (0, 0))
    model, split = setup.model, setup.layout.parameters
    model.load(state)
    model.module.train()
    rng = np.random.default_rng(0)
    gradient = torch.empty(split)
    for _ in range(60):
        chosen = rng.choice(setup.parts.victim, 32)
        logits = model.module(setup.samples.inputs(chosen))
        model.gradient(nn.functional.cross_entropy(logits, setup.samples.targets(chosen)), gradient)
        model.state[:split].sub_(gradient, alpha=0.1)
    trained = model.state.numpy().copy()
    worker.load(trained)
    statistics, truth = [], []
    for client in range(CLIENTS):
        message = Message(setup.layout)
        worker.work(Task(0, 0, client), message)
        statistics.append(message.payload[split:].copy())
        truth.append(message.counts.copy())
    adversary = GlobalModel(model, setup.auxiliary(), setup.samples.shape)
    adversary.enter(trained, 0, (0, 0))
    attack = make_attack("batchnorm", {"batches": 200, "noise": noise})
    calibration = attack.calibrate(RestrictedAdversary(adversary, Knowledge.AUXILIARY, 16, 0))
    observations = Observations(
        row_sums=np.zeros((CLIENTS, 10), np.float32),
        bias_gradient=None,
        weight_gradient=None,
        labels=np.full(CLIENTS, 16),
        keys=np.arange(CLIENTS),
        statistics=np.stack(statistics),
    )
    counts = attack.infer(observations, calibration).values
    return float(np.minimum(counts, truth).sum() / (16 * CLIENTS))


def test_more_noise_leaves_less_success() -> None:
    success = [success_of(f"federation.statistics_noise={sigma}") for sigma in (0, 0.02, 0.1, 1)]
    assert success[0] > success[1] > success[2] > success[3]
    assert success[0] > success[3] + 0.25


@pytest.mark.parametrize(("sigma", "gain"), [(0.02, 0.03), (0.1, 0.07)])
def test_a_server_that_knows_of_the_noise_loses_less(sigma: float, gain: float) -> None:
    defence = f"federation.statistics_noise={sigma}"
    assert success_of(defence, noise=sigma) > success_of(defence) + gain


def test_noise_that_the_server_simulates_is_that_of_the_clients() -> None:
    _, setup, state = prepare()
    adversary = GlobalModel(setup.model, setup.auxiliary(), setup.samples.shape)
    adversary.enter(state, 0, (0, 0))
    server = RestrictedAdversary(adversary, Knowledge.MODEL, 16, 0)
    sent = np.tile(server.statistics_sent(), (2, 1))
    before = sent.copy()
    noisy = server.disturbed(sent, 0.1, np.random.default_rng(5))
    np.testing.assert_array_equal(sent, before)
    noise, rng = NoisyStatistics(setup.model.module, 0.1), np.random.default_rng(5)
    for row in sent:
        noise.disturb(row, rng)
    np.testing.assert_array_equal(noisy, sent)
    blind = RestrictedAdversary(adversary, Knowledge.GRADIENTS, 16, 0)
    with pytest.raises(PermissionError):
        blind.disturbed(sent, 0.1, rng)


def test_withheld_statistics_give_no_information() -> None:
    assert success_of() > success_of("federation.batch_norm=local") + 0.25
