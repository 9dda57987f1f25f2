"""An adversary that has arrays in place of a model: for replays, and for updates from elsewhere."""

from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from testbed.attacks.base import (
    Head,
    Knowledge,
    Normalised,
    Observations,
    Outputs,
    Planted,
    WhiteBox,
)
from testbed.attacks.simulation import simulate_head
from testbed.errors import UserError


class NotGivenError(UserError):
    """An attack asks for something that the offline adversary was not given."""


class ArrayAdversary:
    """The last layer and the outputs on auxiliary samples; see `testbed.attacks.Adversary`.

    Asking for more than the declared knowledge raises `PermissionError`, as it does live; asking
    for what was not given, or for what takes the whole model, raises `NotGivenError`.

    Parameters
    ----------
    knowledge
        What the attack declares.
    classes
        C.
    batch_size, local_steps, learning_rate, seed
        See `testbed.attacks.Adversary`.
    head
        The global model's last layer, where it is known.
    auxiliary
        The global model's outputs on labelled samples, where there are some.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        classes: int,
        *,
        batch_size: int,
        local_steps: int = 1,
        learning_rate: float = 0.1,
        seed: int = 0,
        head: Head | None = None,
        auxiliary: Outputs | None = None,
    ) -> None:
        self._knowledge = knowledge
        self._classes = classes
        self.batch_size = batch_size
        self.local_steps = local_steps
        self.learning_rate = learning_rate
        self.seed = seed
        self._head = head
        self._auxiliary = auxiliary if auxiliary is None else _sorted(auxiliary)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self._classes

    def head(self) -> Head:
        """Return the last layer."""
        self._require(Knowledge.MODEL)
        if self._head is None:
            raise NotGivenError("it needs the weights of the global model's last layer")
        return self._head

    def on_dummy(self, kind: str, samples: int) -> Outputs:  # noqa: ARG002
        """Refuse: dummy inputs have to be run through the model."""
        self._lacks_model(Knowledge.MODEL, "to run it on dummy inputs")

    def on_auxiliary(self, *, pure: bool = False) -> Outputs:  # noqa: ARG002
        """Return the outputs on the auxiliary samples, sorted by class."""
        self._require(Knowledge.AUXILIARY)
        if self._auxiliary is None:
            raise NotGivenError(
                "it needs auxiliary samples: their features, their labels, and their posterior or "
                "the last layer"
            )
        return self._auxiliary

    def after(self, update: NDArray[np.float32]) -> "ArrayAdversary":  # noqa: ARG002
        """Refuse: the model that a client ended with cannot be run."""
        self._lacks_model(Knowledge.MODEL, "to run that of a client after its training")

    def simulate(
        self, batches: NDArray[np.int64], targets: NDArray[np.float32] | None = None
    ) -> Observations:
        """Observe simulated clients, by the last layer's closed form."""
        outputs = self.on_auxiliary()
        head = None if batches.shape[1] == 1 else self.head()
        return simulate_head(outputs, head, batches, self.learning_rate, targets)

    def local_update(self, batches: NDArray[np.int64]) -> NDArray[np.float32]:  # noqa: ARG002
        """Refuse: local training takes the model."""
        self._lacks_model(Knowledge.AUXILIARY, "to train it on auxiliary samples")

    def weight_gradient(self, update: NDArray[np.float32]) -> NDArray[np.float32]:  # noqa: ARG002
        """Refuse: where the last layer lies in an update is not known."""
        self._lacks_model(Knowledge.GRADIENTS, "to find the last layer in an update")

    def bias_gradient(
        self,
        update: NDArray[np.float32],  # noqa: ARG002
    ) -> NDArray[np.float32] | None:
        """Refuse: where the last layer lies in an update is not known."""
        self._lacks_model(Knowledge.GRADIENTS, "to find the last layer in an update")

    def statistics_sent(self) -> NDArray[np.float32]:
        """Refuse: the model's buffers are not known."""
        self._lacks_model(Knowledge.MODEL, "for its BatchNorm statistics")

    def momentum(self) -> NDArray[np.float32]:
        """Return no momentum: of buffers nothing is known, and samples count as independent."""
        self._require(Knowledge.MODEL)
        return np.zeros(0, np.float32)

    def disturbed(
        self,
        statistics: NDArray[np.float32],  # noqa: ARG002
        sigma: float,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
    ) -> NDArray[np.float32]:
        """Refuse: the model's buffers are not known."""
        self._lacks_model(Knowledge.MODEL, "for its BatchNorm statistics")

    def normalised(self, statistics: NDArray[np.float32]) -> Normalised:  # noqa: ARG002
        """Refuse: samples with the normalisation of a client's batch take the model."""
        self._lacks_model(Knowledge.AUXILIARY, "to normalise samples as a client's batch was")

    def logit_gradients(self) -> NDArray[np.float32]:
        """Refuse: backward passes take the model."""
        self._lacks_model(Knowledge.AUXILIARY, "for the gradients of its logits")

    def planted(self) -> Planted:
        """Refuse: nothing was planted by whoever holds arrays alone."""
        self._lacks_model(Knowledge.MALICIOUS, "and to choose that of each client")

    def white_box(self) -> WhiteBox:
        """Refuse: optimising over inputs takes the model."""
        self._lacks_model(Knowledge.MODEL, "to optimise inputs through it")

    def _require(self, needed: Knowledge) -> None:
        if not self._knowledge.includes(needed):
            raise PermissionError(
                f"the attack declares knowledge of {self._knowledge.value!r} and asks for "
                f"{needed.value!r}: declare what it uses"
            )

    def _lacks_model(self, needed: Knowledge, purpose: str) -> NoReturn:
        self._require(needed)
        raise NotGivenError(f"it needs the whole model, {purpose}, run it live")


def _sorted(outputs: Outputs) -> Outputs:
    """Return outputs sorted by class, as those of the live adversary are, and read-only."""
    if outputs.labels is None:
        raise ValueError("auxiliary samples need labels")
    order = np.argsort(outputs.labels, kind="stable")
    result = Outputs(outputs.posterior[order], outputs.features[order], outputs.labels[order])
    for array in (result.posterior, result.features, result.labels):
        if array is not None:
            array.flags.writeable = False
    return result
