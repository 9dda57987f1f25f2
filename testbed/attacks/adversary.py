"""The server as an adversary: runs the global model on inputs of its own, for the calibrations."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from testbed.attacks.base import Knowledge, Outputs
from testbed.models.flat import FlatModel
from testbed.samples import Samples
from testbed.seeds import Purpose, stream

_BATCH = 512


class GlobalModel:
    """One global model, and its outputs on the adversary's inputs: computed once, whoever asks.

    Modules run as in inference, but for BatchNorm, which normalises by the batch as it does on a
    client; its running statistics are left alone. The auxiliary samples of a class then form a
    batch of their own, as in the paper's definition of the class-pure gradients.

    Parameters
    ----------
    model
        A module that nothing else uses while a calibration runs.
    samples
        The data.
    auxiliary
        int64 [classes * per_class]: the auxiliary samples, sorted by class; may be empty.
    """

    def __init__(self, model: FlatModel, samples: Samples, auxiliary: NDArray[np.int64]) -> None:
        self._model = model
        self._samples = samples
        self._auxiliary = auxiliary
        self._norms = [
            module
            for module in model.module.modules()
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        ]
        self._outputs: dict[object, Outputs] = {}
        self._state = model.state.clone()
        self._key: tuple[int, ...] = ()
        self._seed = 0

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self._model.layout.classes

    def enter(self, state: NDArray[np.float32], seed: int, key: tuple[int, ...]) -> None:
        """Take over the global model of a round; ``seed`` and ``key`` are for random inputs."""
        self._state.copy_(torch.from_numpy(state))
        self._seed, self._key = seed, key
        self._outputs.clear()

    def accuracy(self, indices: NDArray[np.int64]) -> float:
        """Return the share of samples that the model classifies rightly, in inference mode."""
        self._model.load(self._state)
        self._model.module.eval()
        right = 0
        with torch.no_grad():
            for start in range(0, len(indices), _BATCH):
                batch = indices[start : start + _BATCH]
                guess = self._model.module(self._samples.inputs(batch)).argmax(dim=1)
                right += int((guess == self._samples.targets(batch)).sum())
        return right / len(indices)

    def on_dummy(self, kind: str, samples: int) -> Outputs:
        """Return the outputs on dummy inputs; see `testbed.attacks.Adversary`."""
        if kind != "random" and samples == 1 and self._norms:
            # BatchNorm of a single value fails. Of inputs that are all alike, two do for one.
            pair = self.on_dummy(kind, 2)
            return Outputs(pair.posterior[:1], pair.features[:1], None)
        return self._cached((kind, samples), lambda: [self._dummy(kind, samples)], None)

    def on_auxiliary(self) -> Outputs:
        """Return the outputs on the auxiliary samples."""
        labels = self._samples.labels[self._auxiliary]
        return self._cached("auxiliary", self._auxiliary_batches, labels)

    def _cached(
        self,
        key: object,
        batches: Callable[[], Iterable[torch.Tensor]],
        labels: NDArray[np.int64] | None,
    ) -> Outputs:
        if key not in self._outputs:
            self._model.load(self._state)
            self._model.module.eval()
            for norm in self._norms:
                norm.train()
            posterior, features = self._model.outputs(batches())
            self._model.load_buffers(self._state[self._model.layout.parameters :])
            outputs = Outputs(posterior, features, labels)
            # They are handed to several attacks.
            for array in vars(outputs).values():
                if array is not None:
                    array.flags.writeable = False
            self._outputs[key] = outputs
        return self._outputs[key]

    def _dummy(self, kind: str, samples: int) -> torch.Tensor:
        shape = (samples, *self._samples.shape)
        if kind == "zeros":
            return torch.zeros(shape, device=self._samples.device)
        if kind == "ones":
            return torch.ones(shape, device=self._samples.device)
        rng = stream(self._seed, Purpose.DUMMY, *self._key)
        return torch.from_numpy(rng.random(shape, np.float32)).to(self._samples.device)

    def _auxiliary_batches(self) -> Iterator[torch.Tensor]:
        per_batch = len(self._auxiliary) // self.classes if self._norms else _BATCH
        for start in range(0, len(self._auxiliary), per_batch):
            yield self._samples.inputs(self._auxiliary[start : start + per_batch])


class RestrictedAdversary:
    """A global model behind what an attack declared to know.

    Parameters
    ----------
    model
        Of the round.
    knowledge
        What the attack declares.
    batch_size, seed
        See `testbed.attacks.Adversary`.
    """

    def __init__(
        self, model: GlobalModel, knowledge: Knowledge, batch_size: int, seed: int
    ) -> None:
        self._model = model
        self._knowledge = knowledge
        self.batch_size = batch_size
        self.seed = seed

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self._model.classes

    def on_dummy(self, kind: str, samples: int) -> Outputs:
        """Return the model's outputs on dummy inputs."""
        self._require(Knowledge.MODEL)
        return self._model.on_dummy(kind, samples)

    def on_auxiliary(self) -> Outputs:
        """Return the model's outputs on the auxiliary samples."""
        self._require(Knowledge.AUXILIARY)
        return self._model.on_auxiliary()

    def _require(self, needed: Knowledge) -> None:
        if not self._knowledge.includes(needed):
            raise PermissionError(
                f"the attack declares knowledge of {self._knowledge.value!r} and asks for "
                f"{needed.value!r}: declare what it uses"
            )
