"""Whole runs in this process: the real program on the real digits, and what passed on its wire."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from small_run import setups_for
from torch import nn
from typing_extensions import override

from testbed.client import ClientWorker
from testbed.experiment import parse_experiment
from testbed.plan import ScenarioPlan, Task, make_plan
from testbed.run import RunOptions, run
from testbed.startup import ScenarioSetup
from testbed.transport.base import ClientState, Downlink, Worker
from testbed.transport.local import LocalTransport
from testbed.update import Message, UpdateLayout

Vector = NDArray[np.float32]
Tamper = Callable[[Task, Message], None]
CONTENT: Mapping[str, Any] = {
    "data": {"name": "digits"},
    # Of the paper's uniform start and sigmoid, the gradients of lower layers are tiny.
    "model": {"name": "cnn", "init": "torch", "activation": "relu"},
    "attacks": ["random"],
}
FEDERATION = {"rounds": 4, "clients": 3, "batch_size": 8, "learning_rate": 0.5}


@dataclass
class Sent:
    """What a client sent: the bytes of its update, and what its header says."""

    body: NDArray[np.uint8]
    header: Mapping[str, Any]
    counts: NDArray[np.int32]


@dataclass
class WholeRun:
    """What a run left behind, and what passed on its way.

    Attributes
    ----------
    models
        The global model of each round, as it went out.
    sent
        Of each task, what its client sent.
    states
        Of each task, what its client remembers afterwards.
    memory
        What clients remember at the end, by identity.
    """

    plan: ScenarioPlan
    setup: ScenarioSetup
    path: Path
    models: dict[int, Vector] = field(default_factory=dict)
    sent: dict[Task, Sent] = field(default_factory=dict)
    states: dict[Task, dict[str, Vector]] = field(default_factory=dict)
    memory: Mapping[int, dict[str, Vector]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # It draws the same batches as the run's own.
        self.worker = ClientWorker(self.plan, self.setup, 0)

    def __getitem__(self, name: str) -> NDArray[Any]:
        with h5py.File(self.path, "r") as file:
            values: NDArray[Any] = file[f"scenarios/0000/{name}"][...]
        return values

    def names(self, group: str) -> list[str]:
        with h5py.File(self.path, "r") as file:
            return list(file[f"scenarios/0000/{group}"])

    def attributes(self, path: str = "") -> dict[str, Any]:
        with h5py.File(self.path, "r") as file:
            return dict(file[f"scenarios/0000/{path}"].attrs)

    @property
    def final(self) -> Vector:
        """The model of the last round."""
        return self.models[self.plan.rounds - 1]

    def plain(self, task: Task) -> Vector:
        """Return a plain update as it was sent."""
        return self.sent[task].body.view(np.float32)

    def decoded(self, task: Task) -> Vector:
        """Return an update as the server decodes it."""
        out = np.zeros(self.setup.shared, np.float32)
        self.setup.pipeline.unpack(self.sent[task].body, out)
        return out

    def module(self, model: Vector) -> nn.Module:
        """Return a module of its own with a model's values, in training mode."""
        self.setup.model.load(torch.from_numpy(model.copy()))
        module = copy.deepcopy(self.setup.model.module)
        for parameter in module.parameters():
            parameter.grad = None
        return module.train()

    def batches(self, task: Task) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return images and labels of a client's local steps."""
        samples = self.setup.samples
        return [(samples.inputs(b), samples.targets(b)) for b in self.worker.draw(task)]


class _Recorder(Downlink):
    def __init__(self, inner: Downlink, worker: Worker, record: WholeRun, tamper: Tamper) -> None:
        self._inner, self._run, self._tamper = inner, record, tamper
        # The worker is wrapped in one that notes where it is.
        record.memory = worker._worker.states  # type: ignore[attr-defined]

    @override
    def publish(self, round_: int, model: Vector, *, wants_states: bool = False) -> None:
        self._run.models[round_] = model.copy()
        self._inner.publish(round_, model, wants_states=wants_states)

    @override
    def states(self) -> dict[int, ClientState]:
        return self._inner.states()

    @override
    def receive(self, task: Task) -> Message:
        message = self._inner.receive(task)
        self._tamper(task, message)
        header = {name: message.header[name].item() for name in message.header.dtype.names}
        body = message.body[: header["payload_bytes"]].copy()
        self._run.sent[task] = Sent(body, header, message.counts.copy())
        state = self._run.memory.get(header["identity"], {})
        self._run.states[task] = {name: values.copy() for name, values in state.items()}
        return message

    @override
    def reduce(self, total: NDArray[Any]) -> None:
        self._inner.reduce(total)

    @override
    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)


class _Watched(LocalTransport):
    def __init__(self, record: WholeRun, tamper: Tamper) -> None:
        super().__init__()
        self._record, self._tamper = record, tamper

    @override
    def open(
        self,
        plan: ScenarioPlan,
        layout: UpdateLayout,
        worker: Worker | None,
        *,
        buffers: int,
        capacity: int,
        start: int = 0,
    ) -> Downlink:
        assert worker is not None
        inner = super().open(plan, layout, worker, buffers=buffers, capacity=capacity, start=start)
        return _Recorder(inner, worker, self._record, self._tamper)


def nothing(_: Task, __: Message) -> None:
    pass


def run_whole(path: Path, tamper: Tamper = nothing, **changes: Any) -> WholeRun:
    """Run an experiment of one scenario to its end.

    Parameters
    ----------
    path
        A folder.
    tamper
        May change messages on their way to the server.
    changes
        Sections that replace those of `CONTENT`; the federation is completed by `FEDERATION`.
    """
    content = {**CONTENT, **changes}
    content["federation"] = {**FEDERATION, **changes.get("federation", {})}
    text = yaml.safe_dump(content)
    path.mkdir(parents=True, exist_ok=True)
    (path / "e.yaml").write_text(text)
    (plan,) = make_plan(parse_experiment(text))
    record = WholeRun(plan, setups_for([plan]).make(plan), path / "r.h5")
    options = RunOptions(path / "e.yaml", (), path / "r.h5", overwrite=True, progress="none")
    assert run(_Watched(record, tamper), options) == 0
    return record


def joined(tensors: Sequence[torch.Tensor]) -> Vector:
    """Return tensors as one flat vector."""
    flat: Vector = torch.cat([tensor.detach().flatten() for tensor in tensors]).numpy()
    return flat


def values_of(module: nn.Module) -> Vector:
    """Return parameters and float buffers, as a global model has them."""
    floats = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    return joined([*module.parameters(), *floats])


def loss_of(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross entropy of a batch."""
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def gradient_of(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Vector:
    """Return the gradient of a batch's mean cross entropy, flat."""
    grads = torch.autograd.grad(loss_of(module, batch), list(module.parameters()))
    return joined(grads)


class Breaking(nn.Module):
    """A model for the digits whose outputs are NaN for images with much ink in a corner."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.broken = broken
        self.body, self.head = nn.Linear(64, 12), nn.Linear(12, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        logits: torch.Tensor = self.head(self.body(images.flatten(1)).relu())
        if self.broken and self.training:
            ink = images[:, 0, 0, 2]
            logits = logits + torch.where(ink > 0.5, torch.nan, 0.0)[:, None]
        return logits
