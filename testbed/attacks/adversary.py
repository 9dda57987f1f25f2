"""The server as an adversary: runs the global model on inputs of its own, for the calibrations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from testbed.attacks.base import Head, Normalised, Observations, Outputs, Planted
from testbed.attacks.simulation import head_gradient, simulate_head
from testbed.client_optimizer import LocalOptimizer
from testbed.evaluation import accuracy
from testbed.models.flat import FlatModel
from testbed.models.norms import Norm, Norms
from testbed.norm_statistics import NoisyStatistics
from testbed.samples import Samples
from testbed.seeds import Purpose, seed64, stream

_BATCH = 512
# Measured on the paper's CNN: the gradient bridge is no better with more than five of each class,
# and by no more than 0.02 with more than two.
_SAMPLES_OF_JACOBIAN = (2, 5, 200)


@dataclass(frozen=True)
class AuxiliarySamples:
    """The adversary's own samples.

    Attributes
    ----------
    inputs
        float32 [n, channels, height, width] on the model's device, sorted by class.
    labels
        int64 [n], on the host.
    """

    inputs: torch.Tensor
    labels: NDArray[np.int64]


class GlobalModel:
    """One global model, and its outputs on the adversary's inputs: computed once, whoever asks.

    Modules run as in inference, but for BatchNorm, which normalises by the batch as it does on a
    client. The auxiliary samples then run in batches of mixed classes, of a client's size; those of
    each class in a batch of their own where an attack is defined by class-pure gradients.

    Parameters
    ----------
    model
        A module that nothing else uses while a calibration runs.
    auxiliary
        The adversary's samples; may be none.
    shape
        Channels, height and width of an input.
    local_steps, learning_rate
        Of the clients' local training.
    norms
        What is known already of the module's BatchNorm layers.
    training
        Of the clients, for simulated ones; plain SGD by default.
    frozen_norms
        Whether BatchNorm normalises by its running statistics on clients as well.
    """

    def __init__(
        self,
        model: FlatModel,
        auxiliary: AuxiliarySamples,
        shape: tuple[int, int, int],
        *,
        local_steps: int = 1,
        learning_rate: float = 0.1,
        norms: Norms | None = None,
        training: LocalOptimizer | None = None,
        frozen_norms: bool = False,
    ) -> None:
        self._model = model
        self._auxiliary = auxiliary
        self.shape = shape
        self.layout = model.layout
        self.local_steps, self.learning_rate = local_steps, learning_rate
        self._training = training or LocalOptimizer(learning_rate)
        self._frozen = frozen_norms
        found = [module for module in model.module.modules() if isinstance(module, Norm)]
        # Those that normalise by the batch.
        self._norms = [] if frozen_norms else found
        self._still = found if frozen_norms else []
        self._found = norms or Norms(model, shape)
        self._outputs: dict[object, Outputs] = {}
        self._state = torch.zeros(model.layout.size)
        self._key: tuple[int, ...] = ()
        self._seed = 0

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.layout.classes

    def enter(self, state: NDArray[np.float32], seed: int, key: tuple[int, ...]) -> None:
        """Take over the global model of a round; ``seed`` and ``key`` are for random inputs."""
        self._state.copy_(torch.from_numpy(state))
        self._seed, self._key = seed, key
        self._outputs.clear()

    def after(self, update: NDArray[np.float32]) -> "GlobalModel":
        """Return the model that a client ended with; see `testbed.attacks.Adversary`."""
        split = self.layout.parameters
        later = GlobalModel(
            self._model,
            self._auxiliary,
            self.shape,
            local_steps=self.local_steps,
            learning_rate=self.learning_rate,
            norms=self._found,
            training=self._training,
            frozen_norms=self._frozen,
        )
        shared = torch.from_numpy(np.array(update, np.float32))
        later._state[:split] = self._state[:split] - self.learning_rate * shared[:split]
        later._state[split:] = shared[split:]
        later._seed, later._key = self._seed, self._key
        return later

    def accuracy(
        self, samples: Samples, indices: NDArray[np.int64], *, normalised_by_batch: bool = False
    ) -> float:
        """Return the share of samples that the model classifies rightly; see `accuracy`."""
        self._load()
        return accuracy(self._model, samples, indices, normalised_by_batch=normalised_by_batch)

    def lowest_feature(self) -> float:
        """Return the smallest input of the last layer on random inputs."""
        return float(self.on_dummy("random", 32).features.min())

    def head(self) -> Head:
        """Return the last layer; see `testbed.attacks.Adversary`."""
        state = self._state.numpy()
        bias = self.layout.bias_gradient(state)
        weight = self.layout.weight_gradient(state)
        zeros = np.zeros(self.classes)
        return Head(weight.astype(np.float64), zeros if bias is None else bias.astype(np.float64))

    def on_dummy(self, kind: str, samples: int) -> Outputs:
        """Return the outputs on dummy inputs; see `testbed.attacks.Adversary`."""
        return self._cached((kind, samples), lambda: self._on_dummy(kind, samples), None)

    def on_auxiliary(self, batch_size: int | None = None) -> Outputs:
        """Return the outputs on the auxiliary samples.

        ``batch_size`` is that of the mixed batches of a model with BatchNorm; None for batches of
        one class each.
        """
        labels = self._auxiliary.labels
        parts = self._pure_parts()
        if batch_size is not None and self._norms:
            # The first sample of every class, the second of every class, and so on.
            starts = np.searchsorted(labels, labels)
            order = np.argsort(np.arange(len(labels)) - starts, kind="stable")
            parts = np.array_split(order, max(1, len(order) // max(2, batch_size)))
        key = ("mixed", batch_size) if self._norms else "auxiliary"
        return self._cached(key, lambda: self._on_parts(parts), labels)

    def simulate(
        self, batches: NDArray[np.int64], targets: NDArray[np.float32] | None = None
    ) -> Observations:
        """Observe simulated clients; see `testbed.attacks.Adversary`."""
        if not self._norms:
            outputs, head = self.on_auxiliary(), self.head()
            return simulate_head(outputs, head, batches, self.learning_rate, targets)
        simulations, steps, size = batches.shape
        observed = _Collector(simulations, self.layout.classes, self.layout.features)
        statistics = np.empty((simulations, self.layout.buffers), np.float32)
        head = self.head()
        for row, local in enumerate(batches):
            self._load(train_norms=True)
            w, b = head.weight.copy(), head.bias.copy()
            for step, chosen in enumerate(local):
                _, h = self._model.outputs([self._images(chosen)])
                h = h[: len(chosen)]
                logits = h @ w.T + b
                posterior = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
                labels = self._auxiliary.labels[chosen]
                soft = None if targets is None else targets[row, step][None]
                dw, db = head_gradient(posterior[None], h[None], labels[None], soft)
                observed.add(row, dw[0], db[0])
                w -= self.learning_rate * dw[0]
                b -= self.learning_rate * db[0]
            statistics[row] = self._model.buffers.cpu().numpy()
        return observed.result(steps, steps * size, statistics)

    def local_update(self, batches: NDArray[np.int64]) -> NDArray[np.float32]:
        """Train as a client does; see `testbed.attacks.Adversary`."""
        split = self.layout.parameters
        model = self._model
        model.load(self._state)
        model.module.train()
        for norm in self._still:
            norm.eval()
        torch.manual_seed(seed64(self._seed, Purpose.LOCAL, *self._key))
        gradient = torch.empty(split, device=model.state.device)
        total = torch.zeros_like(gradient)
        parameters = model.state[:split]
        self._training.begin(parameters)
        for chosen in batches:
            logits = model.module(self._images(chosen))[: len(chosen)]
            targets = torch.from_numpy(self._auxiliary.labels[chosen]).to(logits.device)
            model.gradient(torch.nn.functional.cross_entropy(logits, targets), gradient)
            direction = self._training.direction(gradient, parameters)
            total += direction
            self._training.step(parameters, direction)
        update: NDArray[np.float32] = torch.cat([total, model.buffers]).cpu().numpy()
        return update

    def weight_gradient(self, update: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the last layer's part of a whole update, [C, D]."""
        return self.layout.weight_gradient(update)

    def bias_gradient(self, update: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Return the last layer's part of a whole update, [C]."""
        return self.layout.bias_gradient(update)

    def statistics_sent(self) -> NDArray[np.float32]:
        """Return the buffers that went out with the model, [S]."""
        sent: NDArray[np.float32] = self._state[self.layout.parameters :].numpy().copy()
        return sent

    def momentum(self) -> NDArray[np.float32]:
        """Return the weight of a new batch in each buffer's running average, [S]."""
        return self._momentum

    def disturbed(
        self, statistics: NDArray[np.float32], sigma: float, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Add a client's noise to statistics; see `testbed.attacks.Adversary`."""
        noise, noisy = NoisyStatistics(self._model.module, sigma), statistics.copy()
        for row in noisy:
            noise.disturb(row, rng)
        return noisy

    @cached_property
    def _momentum(self) -> NDArray[np.float32]:
        module = self._model.module
        norms = {
            name: norm.momentum for name, norm in module.named_modules() if norm in self._norms
        }
        parts = []
        for name, buffer in module.named_buffers():
            if not buffer.is_floating_point():
                continue
            owner, _, last = name.rpartition(".")
            known = norms.get(owner) if last in ("running_mean", "running_var") else None
            parts.append(np.full(buffer.numel(), np.nan if known is None else known, np.float32))
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def normalised(self, statistics: NDArray[np.float32], batch_size: int) -> Normalised:
        """Run the auxiliary samples as if in a client's batch; see `testbed.attacks.Adversary`."""
        momentum = self.momentum().astype(np.float64)
        known = momentum > 0
        left = np.where(known, 1 - momentum, 0.0) ** self.local_steps
        sent = self.statistics_sent().astype(np.float64)
        undone = (statistics - left * sent) / (1 - left)
        batch = np.zeros_like(sent)
        moments = np.zeros((len(self._auxiliary.labels), len(sent)))
        self._load(train_norms=True)
        tracks = [track for track in self._found.tracks if known[track.mean].all()]
        for track in tracks:
            count = batch_size * track.positions
            # Modules normalise by the biased variance, and average the unbiased one. Noise on what
            # is shared may take it below 0.
            variance = np.maximum(undone[track.variance], 0) * (count - 1) / count
            batch[track.mean] = undone[track.mean]
            batch[track.variance] = variance + undone[track.mean] ** 2
            self._model.buffers[track.mean] = torch.from_numpy(undone[track.mean]).float()
            self._model.buffers[track.variance] = torch.from_numpy(variance).float()
            track.norm.eval()
        seen: dict[torch.nn.Module, list[NDArray[np.float32]]] = {
            track.norm: [] for track in tracks
        }

        def note(norm: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            values = inputs[0].flatten(2) if inputs[0].dim() > 2 else inputs[0][:, :, None]
            parts = [values.mean(dim=2), values.square().mean(dim=2)]
            seen[norm].append(torch.cat(parts, dim=1).cpu().numpy())

        parts = self._pure_parts()
        hooks = [track.norm.register_forward_pre_hook(note) for track in tracks]
        try:
            posterior, features = self._on_parts(parts)
        finally:
            for hook in hooks:
                hook.remove()
        for track in tracks:
            both = np.concatenate(seen[track.norm])[self._rows(parts)]
            moments[:, track.mean], moments[:, track.variance] = np.hsplit(both, 2)
        return Normalised(Outputs(posterior, features, self._auxiliary.labels), moments, batch)

    def logit_gradients(self) -> NDArray[np.float32]:
        """Return the mean gradient of each logit, [C, P]; see `testbed.attacks.Adversary`."""
        self._load(train_norms=True)
        mean = np.zeros((self.classes, self.layout.parameters), np.float32)
        gradient = torch.empty(self.layout.parameters, device=self._model.state.device)
        labels = self._auxiliary.labels
        least, most, total = _SAMPLES_OF_JACOBIAN
        each = max(least, min(most, total // self.classes))
        chosen = np.concatenate([np.flatnonzero(labels == c)[:each] for c in np.unique(labels)])
        count = len(chosen)
        for part in self._pure_parts(chosen):
            logits = self._model.module(self._images(part))[: len(part)].sum(dim=0)
            for c in range(self.classes):
                self._model.gradient(logits[c], gradient, retain_graph=True)
                mean[c] += gradient.cpu().numpy() / count
        return mean

    def planted(self) -> Planted:
        """See `testbed.attacks.Adversary`."""
        raise PermissionError("this server gave every client the same model")

    def white_box(self) -> "WhiteBoxModel":
        """Return the model itself, loaded; see `testbed.attacks.Adversary`."""
        self._load(train_norms=True)
        return WhiteBoxModel(self._model, self.shape, pairs=self._found.single_values)

    def _load(self, *, train_norms: bool = False) -> None:
        self._model.load(self._state)
        self._model.module.eval()
        if train_norms:
            for norm in self._norms:
                norm.train()

    def _cached(
        self,
        key: object,
        run: Callable[[], tuple[NDArray[np.float64], NDArray[np.float64]]],
        labels: NDArray[np.int64] | None,
    ) -> Outputs:
        if key not in self._outputs:
            self._load(train_norms=True)
            outputs = Outputs(*run(), labels)
            # They are handed to several attacks.
            for array in vars(outputs).values():
                if array is not None:
                    array.flags.writeable = False
            self._outputs[key] = outputs
        return self._outputs[key]

    def _on_dummy(self, kind: str, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        inputs = self._dummy(kind, count)
        if count == 1 and self._norms and (kind in ("zeros", "ones") or self._found.single_values):
            # Of inputs that are all alike, two do for one, and BatchNorm takes them.
            inputs = inputs.repeat(2, 1, 1, 1)
        posterior, features = self._model.outputs([inputs])
        return posterior[:count], features[:count]

    def _dummy(self, kind: str, samples: int) -> torch.Tensor:
        shape, device = (samples, *self.shape), self._model.state.device
        if kind == "zeros":
            return torch.zeros(shape, device=device)
        if kind == "ones":
            return torch.ones(shape, device=device)
        rng = stream(self._seed, Purpose.DUMMY, *self._key)
        if kind == "random":
            return torch.from_numpy(rng.random(shape, np.float32)).to(device)
        if kind == "normal":
            return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(device)
        raise ValueError(f"there are no dummy inputs {kind!r}")

    def _pure_parts(self, chosen: NDArray[np.int64] | None = None) -> list[NDArray[np.int64]]:
        """Return the auxiliary samples, or some, in batches of one class; all alike without norms.

        Ascending positions, each once.
        """
        if chosen is None:
            chosen = np.arange(len(self._auxiliary.labels))
        starts = np.arange(_BATCH, len(chosen), _BATCH)
        if self._norms:
            # Sorted by class: a batch for each.
            starts = np.flatnonzero(np.diff(self._auxiliary.labels[chosen])) + 1
        return np.split(chosen, starts)

    def _on_parts(
        self, parts: list[NDArray[np.int64]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the outputs on auxiliary samples, each once, by ascending positions."""
        posterior, features = self._model.outputs(self._images(part) for part in parts)
        rows = self._rows(parts)
        return posterior[rows], features[rows]

    def _rows(self, parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Return where each sample, by ascending positions, lies in the batches one by one."""
        order = np.concatenate([self._enough(part) for part in parts])
        return np.unique(order, return_index=True)[1]

    def _images(self, part: NDArray[np.int64]) -> torch.Tensor:
        """Return auxiliary samples; a single one twice where BatchNorm refuses it."""
        return self._auxiliary.inputs[torch.from_numpy(self._enough(part))]

    def _enough(self, part: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.repeat(part, 2) if len(part) == 1 and self._found.single_values else part


class WhiteBoxModel:
    """See `testbed.attacks.base.WhiteBox`.

    Parameters
    ----------
    model, shape
        As of `GlobalModel`.
    pairs
        Whether a single input runs as two of its kind, which BatchNorm takes.
    """

    def __init__(self, model: FlatModel, shape: tuple[int, int, int], *, pairs: bool) -> None:
        self._model = model
        self._pairs = pairs
        self.shape = shape
        self.parameters = model.layout.parameters

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits [n, C]."""
        count = len(inputs)
        if count == 1 and self._pairs:
            inputs = inputs.repeat(2, 1, 1, 1)
        logits: torch.Tensor = self._model.module(inputs.to(self._model.state.device))
        return logits[:count]

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the gradient [P] with its graph."""
        return self._model.gradient_with_graph(loss)


class _Collector:
    """Sums of last-layer gradients, as an update has them."""

    def __init__(self, simulations: int, classes: int, features: int) -> None:
        self._weight = np.zeros((simulations, classes, features))
        self._bias = np.zeros((simulations, classes))

    def add(self, row: int, weight: NDArray[np.float64], bias: NDArray[np.float64]) -> None:
        self._weight[row] += weight
        self._bias[row] += bias

    def result(self, steps: int, labels: int, statistics: NDArray[np.float32]) -> Observations:
        single = self._weight.astype(np.float32)
        return Observations(
            row_sums=single.sum(axis=2, dtype=np.float64).astype(np.float32),
            bias_gradient=self._bias.astype(np.float32),
            weight_gradient=single,
            labels=np.full(len(single), labels),
            keys=np.arange(len(single)),
            local_steps=steps,
            statistics=statistics,
        )
