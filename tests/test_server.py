"""The round loop in one process: real models on real data, against plain PyTorch."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_run import RANKS, header_of, plan_of, setups_for
from torch import nn

from testbed.attacks import inference
from testbed.attacks.adversary import GlobalModel
from testbed.attacks.restricted import RestrictedAdversary
from testbed.client import ClientWorker
from testbed.failure import Position
from testbed.models.build import build
from testbed.plan import ScenarioPlan, Task
from testbed.results.schema import PHASES
from testbed.results.writer import ResultsWriter
from testbed.seeds import Purpose, seed64
from testbed.server import ScenarioServer
from testbed.startup import ScenarioSetup
from testbed.summing import message_capacity
from testbed.transport.base import ClientState, Downlink
from testbed.transport.local import LocalTransport
from testbed.update import Message

Tamper = Callable[[Task, Message], None]
THREE = "federation.clients=3"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Run:
    """What a scenario left behind."""

    plan: ScenarioPlan
    setup: ScenarioSetup
    path: Path
    models: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    updates: dict[Task, NDArray[np.float32]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> NDArray[Any]:
        with h5py.File(self.path, "r") as file:
            values: NDArray[Any] = file[f"scenarios/0000/{name}"][...]
        return values

    def update(self, round_: int, client: int) -> NDArray[np.float32]:
        return self.updates[Task(0, round_, client)]

    def module(self, round_: int) -> nn.Module:
        """Return a round's global model, in training mode, as a module of its own."""
        self.setup.model.load(torch.from_numpy(self.models[round_]))
        module = copy.deepcopy(self.setup.model.module)
        for parameter in module.parameters():
            parameter.grad = None
        return module.train()

    def batch(self, round_: int, clients: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        worker = ClientWorker(self.plan, self.setup, 0)
        batches = [batch for client in clients for batch in worker.draw(Task(0, round_, client))]
        indices = np.concatenate(batches)
        return self.setup.samples.inputs(indices), self.setup.samples.targets(indices)


class Recorder(Downlink):
    """Keeps what passes, and may change updates on their way."""

    def __init__(self, inner: Downlink, run: Run, tamper: Tamper) -> None:
        self._inner, self._run, self._tamper = inner, run, tamper

    def publish(
        self, round_: int, model: NDArray[np.float32], *, wants_states: bool = False
    ) -> None:
        assert round_ == len(self._run.models)
        self._run.models[round_] = model.copy()
        self._inner.publish(round_, model, wants_states=wants_states)

    def states(self) -> dict[int, ClientState]:
        return self._inner.states()

    def receive(self, task: Task) -> Message:
        message = self._inner.receive(task)
        self._tamper(task, message)
        self._run.updates[task] = message.payload.copy()
        return message

    def reduce(self, total: NDArray[Any]) -> None:
        self._inner.reduce(total)

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)


def serve(
    path: Path,
    *overrides: str,
    tamper: Tamper = lambda *_: None,
    workers: int = 1,
    commit_seconds: float = 1.0,
) -> Run:
    plan = plan_of(*overrides)
    setups = setups_for([plan])
    run = Run(plan, setups.make(plan), path)
    worker = ClientWorker(plan, setups.make(plan, copy=True), 0)
    header = header_of(plan, run.setup)
    writer = ResultsWriter(
        path, attributes={}, ranks=RANKS, scenarios=[header], commit_seconds=commit_seconds
    )
    transport = LocalTransport()
    capacity = message_capacity(plan, run.setup)
    opened = transport.open(plan, run.setup.layout, worker, buffers=4, capacity=capacity)
    with closing(writer), Recorder(opened, run, tamper) as downlink:
        loop = ScenarioServer(plan, run.setup, workers, writer)
        position = Position()
        for expected, number in enumerate(loop.rounds(downlink, position)):
            assert (number, position.round, position.scenario) == (expected, expected, 0)
        assert number == plan.rounds - 1
        writer.complete()
    assert list(run.updates) == list(plan.tasks())
    return run


def joined(tensors: Sequence[torch.Tensor]) -> NDArray[np.float32]:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).numpy()


# Training


def test_rounds_are_steps_of_centralised_sgd(tmp_path: Path) -> None:
    run = serve(tmp_path / "a.h5", THREE, "federation.learning_rate=0.5", "federation.rounds=4")
    for number in range(3):
        module = run.module(number)
        images, labels = run.batch(number, range(3))
        assert len(labels) == 12
        loss = nn.functional.cross_entropy(module(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.optim.SGD(module.parameters(), lr=0.5).step()
        expected = joined(list(module.parameters()))
        np.testing.assert_allclose(run.models[number + 1], expected, atol=1e-6)
        assert np.abs(run.models[number + 1] - run.models[number]).max() > 1e-3


def test_first_model_is_that_of_the_seed(tmp_path: Path) -> None:
    for init in ("uniform", "torch"):
        run = serve(tmp_path / init, f"model.init={init}", "seed=3", "federation.rounds=1")
        np.testing.assert_array_equal(run.models[0], built(init, seed64(3, Purpose.MODEL, 0, 0)))


def built(init: str, seed: int, name: str = "cnn") -> NDArray[np.float32]:
    module = build(
        name, shape=(1, 8, 8), classes=10, activation=None, arguments={}, init=init, seed=seed
    )
    floats = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    return joined([*module.parameters(), *floats])


def test_clients_count_by_their_samples(tmp_path: Path) -> None:
    def tamper(task: Task, message: Message) -> None:
        message.header["weight"] = [1, 3][task.client]

    run = serve(tmp_path / "a.h5", "federation.rounds=2", tamper=tamper)
    mean = (run.update(0, 0).astype(float) + 3 * run.update(0, 1)) / 4
    np.testing.assert_allclose(run.models[1], run.models[0] - 0.1 * mean, atol=1e-6)


def test_updates_are_added_in_client_order(tmp_path: Path) -> None:
    values = [1.0, 3e7, -3e7, 1.0]

    def tamper(task: Task, message: Message) -> None:
        message.payload[:] = values[task.client]

    run = serve(
        tmp_path / "a.h5",
        "federation.clients=4",
        "federation.batch_size=1",
        "federation.rounds=2",
        "federation.learning_rate=1",
        tamper=tamper,
    )
    # Rounding makes every other order give another sum than that of the order 0, 1, 2, 3.
    total = np.float32(0)
    for value in values:
        total += np.float32(value)
    assert total == 1
    np.testing.assert_array_equal(run.models[1], run.models[0] - np.float32(total / 4))


def test_buffers_become_the_mean_of_the_clients(tmp_path: Path) -> None:
    run = serve(tmp_path / "a.h5", "model.name=resnet20", "federation.rounds=2", THREE)
    split = run.setup.layout.parameters
    assert run.setup.layout.buffers > 0
    buffers = []
    for client in range(3):
        module = run.module(0)
        module(run.batch(0, [client])[0])
        buffers.append(joined([b for b in module.buffers() if b.is_floating_point()]))
        np.testing.assert_allclose(run.update(0, client)[split:], buffers[-1], rtol=1e-5)
    np.testing.assert_allclose(run.models[1][split:], np.mean(buffers, axis=0), rtol=1e-5)
    assert not np.allclose(run.models[1][split:], run.models[0][split:])


# Repetitions


@pytest.mark.parametrize("init", ["uniform", "torch"])
@pytest.mark.parametrize("workers", [1, 7])
def test_repetitions_have_models_of_their_own(tmp_path: Path, init: str, workers: int) -> None:
    run = serve(
        tmp_path / "a.h5",
        "federation.fresh_model=true",
        "federation.rounds=6",
        "seed=5",
        f"model.init={init}",
        workers=workers,
    )
    assert len(run.models) == 6
    for number, model in run.models.items():
        np.testing.assert_array_equal(model, built(init, seed64(5, Purpose.MODEL, 0, number)))
        # Each update was computed at its own round's model, however many are under way.
        images, _ = run.batch(number, [1])
        with torch.no_grad():
            expected = torch.softmax(run.module(number)(images), dim=1).mean(dim=0)
        np.testing.assert_allclose(run["truth/posterior"][number, 1], expected, atol=1e-6)
    assert len({model.tobytes() for model in run.models.values()}) == 6


def test_repetitions_with_statistics_start_from_the_module_s_own(tmp_path: Path) -> None:
    run = serve(
        tmp_path / "a.h5",
        "federation.fresh_model=true",
        "model.name=resnet20",
        "federation.clients=1",
        "attacks=[llg, llg_plus]",
    )
    for number, model in run.models.items():
        seed = seed64(0, Purpose.MODEL, 0, number)
        np.testing.assert_array_equal(model, built("uniform", seed, "resnet20"))


# What is recorded


def test_observations_are_what_the_client_sent(tmp_path: Path) -> None:
    run = serve(tmp_path / "a.h5", THREE, "results.observations=last_layer", "attacks=[random]")
    layout = run.setup.layout
    rows, bias, weight = (
        run[f"observations/{name}"] for name in ("row_sums", "bias_gradient", "weight_gradient")
    )
    for task, payload in run.updates.items():
        at = task.round, task.client
        np.testing.assert_array_equal(weight[at], layout.weight_gradient(payload))
        np.testing.assert_array_equal(bias[at], layout.bias_gradient(payload))
        np.testing.assert_allclose(rows[at], weight[at].sum(axis=1, dtype=float), rtol=1e-6)


@pytest.mark.parametrize("commit_seconds", [0.0, 3600.0])
def test_statistics_sent_are_those_of_the_round_however_late_they_are_written(
    tmp_path: Path, commit_seconds: float
) -> None:
    statistics = ("model.name=cnn_bn", "model.init=torch", "results.observations=last_layer")
    run = serve(
        tmp_path / "a.h5", *statistics, "federation.rounds=6", commit_seconds=commit_seconds
    )
    split = run.setup.layout.parameters
    sent = run["observations/statistics_sent"]
    for number, model in run.models.items():
        np.testing.assert_array_equal(sent[number], model[split:])
    assert len({row.tobytes() for row in sent}) == 6


def test_identities_of_the_last_layer(tmp_path: Path) -> None:
    run = serve(tmp_path / "a.h5", THREE, "federation.batch_size=16")
    rows, bias = run["observations/row_sums"], run["observations/bias_gradient"]
    counts = run["truth/counts"]
    assert (counts.sum(axis=2) == 16).all()
    np.testing.assert_allclose(rows.sum(axis=2), 0, atol=1e-5 * np.abs(rows).max())
    np.testing.assert_allclose(bias.sum(axis=2), 0, atol=1e-6)
    np.testing.assert_allclose(16 * (run["truth/posterior"] - bias), counts, atol=1e-3)


def test_truth_is_that_of_the_batches(tmp_path: Path) -> None:
    run = serve(tmp_path / "a.h5", THREE)
    losses = run["updates/loss"]
    for task in run.updates:
        images, labels = run.batch(task.round, [task.client])
        counts = np.bincount(labels.numpy(), minlength=10)
        np.testing.assert_array_equal(run["truth/counts"][task.round, task.client], counts)
        loss = nn.functional.cross_entropy(run.module(task.round)(images), labels)
        assert losses[task.round, task.client] == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(run["rounds/loss"], losses.mean(axis=1))


def test_wire_and_times(tmp_path: Path) -> None:
    run = serve(tmp_path / "a.h5", "federation.evaluate_every=1")
    assert (run["updates/bytes_on_wire"] == 4 * run.setup.layout.size).all()
    assert (run["updates/finite"] == 1).all()
    assert (run["timings/client_rank"] == 0).all()
    assert (run["timings/client_seconds"] > 0).all()
    for phase in PHASES:
        seconds = run[f"timings/{phase}"]
        assert np.isfinite(seconds).all()
        assert (seconds >= 0).all()
        assert seconds.max() > 0
    assert (run["timings/wait"] >= run["timings/client_seconds"].sum(axis=1)).all()
    assert (run["timings/attacks/llg"] <= run["timings/attack"]).all()


def test_attacks_answer_for_every_label(tmp_path: Path) -> None:
    attacks = "attacks=[random, llg, llg_star, llg_plus]"
    run = serve(tmp_path / "a.h5", THREE, attacks, "federation.batch_size=8")
    truth = run["truth/counts"]
    success = {}
    for label in ("random", "llg", "llg_star", "llg_plus"):
        counts = run[f"attacks/{label}/counts"]
        assert (counts >= 0).all()
        assert (counts.sum(axis=2) == 8).all()
        success[label] = np.minimum(counts, truth).sum() / truth.sum()
    assert success["llg_plus"] > 0.85 > 0.7 > success["random"]
    assert success["llg"] > success["random"]


def test_calibrations_are_of_the_round_s_model(tmp_path: Path) -> None:
    run = serve(tmp_path / "a.h5", "attacks=[llg_plus]", "federation.learning_rate=1")
    setup = run.setup
    attack = setup.attacks["llg_plus"]
    adversary = GlobalModel(setup.model, setup.auxiliary(), setup.samples.shape)
    for number in range(3):
        adversary.enter(run.models[number], 0, (0, number))
        expected = attack.calibrate(RestrictedAdversary(adversary, attack.knowledge, 4, 0))
        for name, values in expected.items():
            stored = run[f"attacks/llg_plus/calibration/{name}"][number]
            np.testing.assert_array_equal(stored, values[0])
    assert len(set(run["attacks/llg_plus/calibration/impact"])) == 3


def test_random_attacks_have_seeds_of_their_own(tmp_path: Path) -> None:
    labels = "attacks=[{name: random, label: a}, {name: random, label: b}]"
    run = serve(tmp_path / "a.h5", labels)
    seeds = [run[f"attacks/{label}/calibration/seed"] for label in "ab"]
    assert seeds[0].dtype == np.uint64
    assert len(set(np.concatenate(seeds))) == 6
    assert not np.array_equal(run["attacks/a/counts"], run["attacks/b/counts"])


def test_attacks_in_chunks_answer_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ("federation.clients=5", "attacks=[random, llg, llg_plus]", "federation.rounds=2")
    whole = serve(tmp_path / "whole.h5", *overrides)
    for chunk in (20, 1):  # two updates at once, and one
        monkeypatch.setattr(inference, "_CHUNK", chunk)
        parts = serve(tmp_path / f"parts{chunk}.h5", *overrides)
        for label in ("random", "llg", "llg_plus"):
            name = f"attacks/{label}/counts"
            np.testing.assert_array_equal(parts[name], whole[name])


def test_a_last_layer_without_bias(tmp_path: Path) -> None:
    run = serve(tmp_path / "a.h5", "model.name=small_run:unbiased", "attacks=[llg, llg_plus]")
    with h5py.File(run.path) as file:
        assert list(file["scenarios/0000/observations"]) == ["labels", "norm", "row_sums"]
    for task, payload in run.updates.items():
        sums = run.setup.layout.weight_gradient(payload).sum(axis=1, dtype=float)
        found = run["observations/row_sums"][task.round, task.client]
        np.testing.assert_allclose(found, sums, rtol=1e-6)
    assert (run["attacks/llg_plus/counts"].sum(axis=2) == 4).all()


def test_only_every_kth_round_is_attacked(tmp_path: Path) -> None:
    run = serve(
        tmp_path / "a.h5",
        "federation.rounds=5",
        "federation.attack_every=2",
        "attacks=[llg_star]",
        "results.observations=last_layer",
    )
    attacked = np.array([True, False, True, False, True])
    for name in ("truth/counts", "attacks/llg_star/counts"):
        assert (run[name][~attacked] == -1).all()
        assert (run[name][attacked] >= 0).all()
    names = ["truth/posterior", "observations/row_sums", "observations/bias_gradient"]
    names += ["observations/weight_gradient", "attacks/llg_star/calibration/offset"]
    names += ["timings/attacks/llg_star"]
    for name in names:
        values = run[name]
        assert np.isnan(values[~attacked]).all()
        assert np.isfinite(values[attacked]).all()
    assert (run["timings/attack"][~attacked] == 0).all()
    assert np.isfinite(run["rounds/loss"]).all()
    assert (run["updates/finite"] == 1).all()


def test_global_model_is_evaluated_before_the_step(tmp_path: Path) -> None:
    run = serve(
        tmp_path / "a.h5",
        "federation.rounds=5",
        "federation.evaluate_every=2",
        "federation.learning_rate=1",
        "model.init=torch",
        "model.activation=relu",
        "federation.batch_size=64",
    )
    accuracy = run["rounds/accuracy"]
    assert np.isnan(accuracy[[1, 3]]).all()
    test = run.setup.parts.test
    for number in (0, 2, 4):
        with torch.no_grad():
            guess = run.module(number).eval()(run.setup.samples.inputs(test)).argmax(dim=1)
        right = (guess.numpy() == run.setup.samples.labels[test]).mean()
        assert accuracy[number] == pytest.approx(right)
    assert len({*accuracy[[0, 2, 4]]}) > 1


def test_a_run_is_a_function_of_its_experiment(tmp_path: Path) -> None:
    overrides = ("attacks=[random, llg_star]", "labels.distribution=unbalanced", THREE)
    runs = [serve(tmp_path / name, *overrides) for name in ("a.h5", "b.h5")]
    other = serve(tmp_path / "c.h5", *overrides, "seed=1")
    names: list[str] = []
    with h5py.File(runs[0].path) as file:
        file["scenarios/0000"].visit(names.append)
        arrays = [
            name for name in names if isinstance(file[f"scenarios/0000/{name}"], h5py.Dataset)
        ]
    arrays = [name for name in arrays if not name.startswith("timings")]
    assert "attacks/random/counts" in arrays
    for name in arrays:
        assert runs[0][name].tobytes() == runs[1][name].tobytes(), name
    for name in ("truth/counts", "rounds/loss", "attacks/random/counts"):
        assert not np.array_equal(runs[0][name], other[name])


# Updates that are not finite


@pytest.mark.parametrize(
    "values", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf]], ids=["nan", "inf", "-inf", "both"]
)
@pytest.mark.parametrize("place", ["anywhere", "last layer"])
def test_a_client_that_is_not_finite_is_left_out(
    tmp_path: Path, values: list[float], place: str
) -> None:
    plan = plan_of()
    weight = setups_for([plan]).make(plan).layout.weight
    start = 5 if place == "anywhere" else weight

    def tamper(task: Task, message: Message) -> None:
        if task.client == 1:
            message.payload[start : start + len(values)] = values

    run = serve(tmp_path / "a.h5", THREE, "attacks=[llg, random]", tamper=tamper)
    sound = [0, 2]
    np.testing.assert_array_equal(run["updates/finite"], [[1, 0, 1]] * 3)
    for label in ("llg", "random"):
        counts = run[f"attacks/{label}/counts"]
        assert (counts[:, 1] == -1).all()
        assert (counts[:, sound].sum(axis=2) == 4).all()
    for name in ("row_sums", "bias_gradient"):
        observed = run[f"observations/{name}"]
        assert np.isnan(observed[:, 1]).all()
        assert np.isfinite(observed[:, sound]).all()
    assert (run["truth/counts"].sum(axis=2) == 4).all()
    for number in range(2):
        mean = (run.update(number, 0) + run.update(number, 2)) / 2
        expected = run.models[number] - 0.1 * mean
        np.testing.assert_allclose(run.models[number + 1], expected, atol=1e-6)


def test_large_numbers_are_finite(tmp_path: Path) -> None:
    def tamper(task: Task, message: Message) -> None:
        message.payload[:2] = 3e38  # their sum is beyond float32

    run = serve(tmp_path / "a.h5", "federation.rounds=1", tamper=tamper)
    assert (run["updates/finite"] == 1).all()
    assert (run["attacks/llg/counts"] >= 0).all()


def test_round_without_a_finite_update_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    def tamper(task: Task, message: Message) -> None:
        if task.round == 0:
            message.payload[-1] = np.nan
            message.header["loss"] = np.nan

    run = serve(tmp_path / "a.h5", "model.name=resnet20", "attacks=[llg_star]", tamper=tamper)
    np.testing.assert_array_equal(run.models[1], run.models[0])
    assert not np.array_equal(run.models[2], run.models[1])
    np.testing.assert_array_equal(run["updates/finite"], [[0, 0], [1, 1], [1, 1]])
    counts = run["attacks/llg_star/counts"]
    assert (counts[0] == -1).all()
    assert (counts[1:].sum(axis=2) == 4).all()
    assert np.isnan(run["rounds/loss"][0])
    assert np.isfinite(run["rounds/loss"][1:]).all()
    assert np.isnan(run["attacks/llg_star/calibration/impact"][0])


def test_loss_of_a_round_is_the_mean_of_the_finite_ones(tmp_path: Path) -> None:
    def tamper(task: Task, message: Message) -> None:
        message.header["loss"] = [1.0, np.inf, 2.0][task.client]

    run = serve(tmp_path / "a.h5", THREE, "federation.rounds=1", tamper=tamper)
    np.testing.assert_array_equal(run["rounds/loss"], [1.5])
    np.testing.assert_array_equal(run["updates/loss"], [[1.0, np.inf, 2.0]])
