"""The server as one attack sees it: what it did not declare to know is refused."""

import numpy as np
from numpy.typing import NDArray

from testbed.attacks.adversary import GlobalModel, WhiteBoxModel
from testbed.attacks.base import Head, Knowledge, Normalised, Observations, Outputs, Planted


class RestrictedAdversary:
    """A global model behind what an attack declared to know; see `testbed.attacks.Adversary`.

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
        self.local_steps, self.learning_rate = model.local_steps, model.learning_rate

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self._model.classes

    def head(self) -> Head:
        """Return the last layer."""
        return self._with(Knowledge.MODEL).head()

    def on_dummy(self, kind: str, samples: int) -> Outputs:
        """Return the model's outputs on dummy inputs."""
        return self._with(Knowledge.MODEL).on_dummy(kind, samples)

    def on_auxiliary(self, *, pure: bool = False) -> Outputs:
        """Return the model's outputs on the auxiliary samples."""
        return self._with(Knowledge.AUXILIARY).on_auxiliary(None if pure else self.batch_size)

    def after(self, update: NDArray[np.float32]) -> "RestrictedAdversary":
        """Return the adversary at the model that a client ended with."""
        later = self._with(Knowledge.MODEL).after(update)
        return RestrictedAdversary(later, self._knowledge, self.batch_size, self.seed)

    def simulate(
        self, batches: NDArray[np.int64], targets: NDArray[np.float32] | None = None
    ) -> Observations:
        """Observe simulated clients."""
        return self._with(Knowledge.AUXILIARY).simulate(batches, targets)

    def local_update(self, batches: NDArray[np.int64]) -> NDArray[np.float32]:
        """Train as a client does, on auxiliary samples."""
        return self._with(Knowledge.AUXILIARY).local_update(batches)

    def weight_gradient(self, update: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the last layer's weight gradient in a whole update."""
        return self._model.weight_gradient(update)

    def bias_gradient(self, update: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Return the last layer's bias gradient in a whole update."""
        return self._model.bias_gradient(update)

    def statistics_sent(self) -> NDArray[np.float32]:
        """Return the buffers that went out with the model."""
        return self._with(Knowledge.MODEL).statistics_sent()

    def momentum(self) -> NDArray[np.float32]:
        """Return the weight of a new batch in each buffer's running average."""
        return self._with(Knowledge.MODEL).momentum()

    def disturbed(
        self, statistics: NDArray[np.float32], sigma: float, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Return statistics as noisy as clients share them."""
        return self._with(Knowledge.MODEL).disturbed(statistics, sigma, rng)

    def normalised(self, statistics: NDArray[np.float32]) -> Normalised:
        """Run the auxiliary samples, normalised as a client's batch was."""
        return self._with(Knowledge.AUXILIARY).normalised(statistics, self.batch_size)

    def logit_gradients(self) -> NDArray[np.float32]:
        """Return the mean gradient of each logit over the auxiliary samples."""
        return self._with(Knowledge.AUXILIARY).logit_gradients()

    def planted(self) -> Planted:
        """Return what was planted in the clients' models."""
        return self._with(Knowledge.MALICIOUS).planted()

    def white_box(self) -> WhiteBoxModel:
        """Return the model itself."""
        return self._with(Knowledge.MODEL).white_box()

    def _with(self, needed: Knowledge) -> GlobalModel:
        if not self._knowledge.includes(needed):
            raise PermissionError(
                f"the attack declares knowledge of {self._knowledge.value!r} and asks for "
                f"{needed.value!r}: declare what it uses"
            )
        return self._model
