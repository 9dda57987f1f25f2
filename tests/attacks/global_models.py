"""Small real models on the handwritten digits, as a server has them and as its clients do."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from testbed.attacks import Attack, Calibration, Inferred, Observations
from testbed.attacks.adversary import AuxiliarySamples, GlobalModel
from testbed.attacks.checks import check_answer, check_calibration, check_declaration
from testbed.attacks.restricted import RestrictedAdversary
from testbed.data import load
from testbed.models.flat import FlatModel
from testbed.models.last_layer import find_last_layer

CLASSES = 10


def perceptron(
    activation: type[nn.Module] = nn.Sigmoid, width: int = 24, *, norm: bool = False
) -> nn.Module:
    """Build a network with one hidden layer, from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        norms = [nn.BatchNorm1d(width)] if norm else []
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), *norms, activation(), nn.Linear(width, CLASSES)
        )


class Federation:
    """One global model, the server's auxiliary samples, and clients that hold other samples."""

    def __init__(
        self,
        module: nn.Module,
        *,
        per_class: int = 20,
        missing: Sequence[int] = (),
        local_steps: int = 1,
        batch_size: int = 8,
        training: int = 0,
    ) -> None:
        self.batch_size, self.local_steps = batch_size, local_steps
        data = load("digits", None)
        images = torch.from_numpy(data.images).float() * data.scale
        by_class = [np.flatnonzero(data.labels == c) for c in range(CLASSES)]
        auxiliary = [own[:per_class] for c, own in enumerate(by_class) if c not in missing]
        _train(module, images, data.labels, np.concatenate(by_class), training)
        last = find_last_layer(module, data.shape, CLASSES)
        self.flat = FlatModel(module, last, torch.device("cpu"))
        state = self.flat.state.numpy().copy()

        def enter(indices: NDArray[np.int64]) -> GlobalModel:
            samples = AuxiliarySamples(images[torch.from_numpy(indices)], data.labels[indices])
            model = GlobalModel(self.flat, samples, data.shape, local_steps=local_steps)
            model.enter(state, 0, (0, 0))
            return model

        self.model = enter(np.concatenate(auxiliary))
        private = np.concatenate([own[-100:] for own in by_class])
        self._clients = enter(private)
        self._private = [np.flatnonzero(data.labels[private] == c) for c in range(CLASSES)]

    @property
    def lengths(self) -> dict[str, int]:
        layout = self.flat.layout
        return {"class": CLASSES, "feature": layout.features, "buffer": layout.buffers}

    def adversary(self, attack: Attack, seed: int = 1) -> RestrictedAdversary:
        return RestrictedAdversary(self.model, attack.knowledge, self.batch_size, seed)

    def observe(self, updates: NDArray[np.float32], local_steps: int | None = None) -> Observations:
        """Return what the server sees of whole updates [N, P + S]."""
        weight = np.array([self.model.weight_gradient(update) for update in updates])
        biases = [self.model.bias_gradient(update) for update in updates]
        split = self.flat.layout.parameters
        steps = self.local_steps if local_steps is None else local_steps
        return Observations(
            row_sums=weight.sum(axis=2),
            bias_gradient=None if biases[0] is None else np.array(biases),
            weight_gradient=weight,
            labels=np.full(len(updates), self.batch_size * self.local_steps),
            keys=np.arange(len(updates)),
            local_steps=steps,
            statistics=updates[:, split:],
            update=updates,
        )

    def clients(self, labels: NDArray[np.int64]) -> tuple[Observations, NDArray[np.int64]]:
        """Train clients with the labels [N, E, B]; return what is seen, and the true counts."""
        rng = np.random.default_rng(17)
        samples = np.vectorize(lambda c: rng.choice(self._private[c]))(labels)
        updates = np.array([self._clients.local_update(batches) for batches in samples])
        flat = labels.reshape(len(labels), -1)
        counts = np.array([np.bincount(row, minlength=CLASSES) for row in flat])
        return self.observe(updates), counts

    def draw(self, clients: int, seed: int = 5) -> tuple[Observations, NDArray[np.int64]]:
        """Train clients of which each has three classes."""
        rng = np.random.default_rng(seed)
        shape = self.local_steps, self.batch_size
        own = [rng.choice(CLASSES, 3, replace=False) for _ in range(clients)]
        return self.clients(np.array([rng.choice(classes, shape) for classes in own]))

    def calibrate(
        self, attack: Attack, observations: Observations, seed: int = 1
    ) -> dict[str, Any]:
        """Return both calibrations, checked."""
        adversary = self.adversary(attack, seed)
        calibration = dict(attack.calibrate(adversary))
        calibration |= attack.calibrate_updates(adversary, observations.restricted(attack))
        check_declaration(attack.name, attack.arrays())
        lengths = self.lengths | {"client": len(observations.keys)}
        check_calibration(attack.name, attack, calibration, lengths)
        return calibration

    def run(self, attack: Attack, observations: Observations) -> Any:
        """Return an attack's answer, checked."""
        return infer(attack, observations, self.calibrate(attack, observations))


def infer(attack: Attack, observations: Observations, calibration: Calibration) -> Inferred:
    """Infer from what the attack declares to look at; check the answer."""
    inferred = attack.infer(observations.restricted(attack), calibration)
    check_answer(attack.name, attack, inferred, observations)
    return inferred


def success(counts: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Return the mean attack success rate."""
    return float((np.minimum(counts, truth).sum(axis=1) / truth.sum(axis=1)).mean())


def _train(
    module: nn.Module,
    images: torch.Tensor,
    labels: NDArray[np.int64],
    among: NDArray[np.int64],
    steps: int,
) -> None:
    rng = np.random.default_rng(23)
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    for _ in range(steps):
        chosen = torch.from_numpy(rng.choice(among, 32))
        optimizer.zero_grad()
        targets = torch.from_numpy(labels)[chosen]
        nn.functional.cross_entropy(module(images[chosen]), targets).backward()
        optimizer.step()
