"""What tests of closed-form attacks share: batches of a last layer, servers, a real small model."""

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

from testbed.attacks import Observations, Outputs, attacks, make_attack
from testbed.attacks.adversary import AuxiliarySamples, GlobalModel
from testbed.attacks.restricted import RestrictedAdversary
from testbed.models.flat import FlatModel
from testbed.models.last_layer import find_last_layer

MODULES = ("baselines", "llg", "presence", "bias", "zlg", "auxiliary_counts")
NAMES = sorted(
    name for name, attack in attacks().items() if attack.__module__.rpartition(".")[2] in MODULES
)

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 40)


def gradient(posterior, features, labels):
    """Return the closed form: mean over samples of (p - onehot(y)) h^T, and of p - onehot(y)."""
    error = posterior - np.eye(posterior.shape[1])[labels]
    return error.T @ features / len(labels), error.mean(axis=0)


def random_posterior(rng, samples, classes, sharpness=1.0):
    logits = rng.normal(size=(samples, classes)) * sharpness
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


@st.composite
def batches(draw, lowest=0.0, samples=SIZES):
    """Draw posterior, features and labels of a batch: whatever a last layer can meet."""
    rng = np.random.default_rng(draw(SEEDS))
    classes, width, size = draw(st.integers(2, 10)), draw(st.integers(1, 6)), draw(samples)
    posterior = random_posterior(rng, size, classes, draw(st.sampled_from([0.1, 1.0, 5.0])))
    features = rng.uniform(lowest, 1.0, size=(size, width))
    return posterior, features, rng.integers(classes, size=size)


def observe(weight, bias, labels, local_steps=1, posterior=None, update=None):
    """Observe one update, or many, as the server has them: float32, read-only."""

    def single(values, ndim):
        if values is None:
            return None
        values = np.asarray(values, np.float32)
        values = values[None] if values.ndim < ndim else values
        values.flags.writeable = False
        return values

    weight = single(weight, 3)
    return Observations(
        row_sums=single(weight.sum(axis=2, dtype=np.float64), 2),
        bias_gradient=single(bias, 2),
        weight_gradient=weight,
        labels=np.broadcast_to(np.asarray(labels, np.int64), len(weight)).copy(),
        keys=np.arange(len(weight)),
        local_steps=local_steps,
        posterior=single(posterior, 2),
        update=single(update, 2),
    )


def server(outputs, batch_size=8, local_steps=1, **more):
    """Return an adversary whose model answers everything with the given outputs."""
    return SimpleNamespace(
        classes=outputs.posterior.shape[1],
        batch_size=batch_size,
        local_steps=local_steps,
        seed=7,
        on_auxiliary=lambda **_: outputs,
        on_dummy=lambda _kind, _samples: Outputs(outputs.posterior, outputs.features, None),
        **more,
    )


def constant_outputs(posterior, features):
    """Return outputs on three samples of each class, all alike."""
    labels = np.repeat(np.arange(len(posterior)), 3)
    shape = (len(labels), 1)
    return Outputs(np.tile(posterior, shape), np.tile(features, shape), labels)


def attack_once(name, adversary, observations, **options):
    """Calibrate and infer as the server does; return the values of the answer."""
    attack = make_attack(name, options)
    shown = observations.restricted(attack)
    calibration = {**attack.calibrate(adversary), **attack.calibrate_updates(adversary, shown)}
    return attack.infer(shown, calibration).values


SHAPE, PER_CLASS = (1, 3, 3), 4


class Federation:
    """A real model, a server's view of it, and clients that train on random samples.

    The samples of a class scatter around a mean of its own.
    """

    def __init__(self, seed=0, classes=5, local_steps=1, rate=0.5, activation=nn.Sigmoid, **more):
        self.rng = np.random.default_rng(seed)
        torch.default_generator.manual_seed(seed)
        self.classes, self.local_steps, self.rate = classes, local_steps, rate
        self.centres = self.rng.normal(size=(classes, *SHAPE))
        self.module = nn.Sequential(
            nn.Flatten(), nn.Linear(9, 7), activation(), nn.Linear(7, classes)
        )
        last = find_last_layer(self.module, SHAPE, classes)
        self.flat = FlatModel(self.module, last, torch.device("cpu"))
        self.start = self.flat.state.numpy().copy()
        labels = np.repeat(np.arange(classes), PER_CLASS)
        kept = np.isin(labels, more.get("missing", []), invert=True)
        auxiliary = AuxiliarySamples(self.samples(labels[kept]), labels[kept])
        self.model = GlobalModel(
            self.flat, auxiliary, SHAPE, local_steps=local_steps, learning_rate=rate
        )
        self.model.enter(self.start, 3, (0, 0))

    def samples(self, labels):
        noise = self.rng.normal(size=(len(labels), *SHAPE)) * 0.5
        return torch.from_numpy((self.centres[labels] + noise).astype(np.float32))

    def client(self, batch_size):
        """Train as a client; return the update, the label counts and the mean posterior."""
        parameters = list(self.module.parameters())
        self.flat.load(torch.from_numpy(self.start))
        total, counts, posterior = 0, np.zeros(self.classes, int), 0
        for _ in range(self.local_steps):
            labels = self.rng.integers(self.classes, size=batch_size)
            logits = self.module(self.samples(labels))
            loss = nn.functional.cross_entropy(logits, torch.from_numpy(labels))
            step = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])
            self.flat.state.sub_(self.rate * step)
            total = total + step.numpy()
            counts += np.bincount(labels, minlength=self.classes)
            posterior = posterior + logits.detach().double().softmax(dim=1).mean(dim=0).numpy()
        return total, counts, posterior / self.local_steps

    def round(self, clients, batch_size):
        """Return the observations of a round, and the true counts."""
        updates, counts, posteriors = zip(
            *(self.client(batch_size) for _ in range(clients)), strict=True
        )
        observations = observe(
            [self.model.weight_gradient(update) for update in updates],
            [self.model.bias_gradient(update) for update in updates],
            batch_size * self.local_steps,
            self.local_steps,
            posteriors,
            updates,
        )
        return observations, np.array(counts)

    def adversary(self, name, batch_size):
        return RestrictedAdversary(self.model, attacks()[name].knowledge, batch_size, 11)


class FirstLayer(nn.Module):
    """Normalises its inputs, so that the batch means are those of the samples."""

    def __init__(self, features, classes, momentum):
        super().__init__()
        self.norm = nn.BatchNorm1d(features, momentum=momentum)
        self.classifier = nn.Linear(features, classes)

    def forward(self, x):
        return self.classifier(self.norm(x.flatten(1)))


def first_layer(*, momentum=0.1, steps=1, sent=0.0, per_class=3, apart=1.0):
    """Return a model of inputs that are the same for all samples of a class.

    The batch means of its statistics are mixtures of the inputs of the classes, which are as far
    ``apart`` as this.
    """
    classes, shape = 5, (1, 2, 4)
    torch.manual_seed(3)
    module = FirstLayer(8, classes, momentum)
    model = FlatModel(module, find_last_layer(module, shape, classes), torch.device("cpu"))
    prototypes = torch.randn(classes, *shape) * apart
    labels = np.repeat(np.arange(classes), per_class)
    auxiliary = AuxiliarySamples(prototypes[torch.from_numpy(labels)], labels)
    adversary = GlobalModel(model, auxiliary, shape, local_steps=steps)
    state = model.state.numpy().copy()
    state[model.layout.parameters :] += sent
    adversary.enter(state, 0, (0, 0))
    return adversary


def observe_training(model, labels, per_class=3):
    """Return what clients of `first_layer` with labels [N, E, B] share, by real training."""
    layout = model.layout
    updates = np.stack([model.local_update(batches * per_class) for batches in labels])
    weight = np.stack([layout.weight_gradient(update) for update in updates])
    bias = [layout.bias_gradient(update) for update in updates]
    return Observations(
        row_sums=weight.sum(axis=2),
        bias_gradient=np.stack([part for part in bias if part is not None]),
        weight_gradient=weight,
        labels=np.full(len(labels), labels[0].size),
        keys=np.arange(len(labels)),
        local_steps=labels.shape[1],
        statistics=updates[:, layout.parameters :],
        update=updates,
    )
