"""What an attack is: two pure functions, and what each of them may look at."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, ClassVar, Protocol

import numpy as np
import pydantic
from numpy.typing import NDArray

# An array of any library that follows the array API standard (NumPy, torch).
Array = Any

# What an attack derived from the global model. Every array has a leading axis: one entry per
# update, or a single one that serves all updates.
Calibration = Mapping[str, Array]


class Knowledge(Enum):
    """What the adversary has; each level includes those before it."""

    GRADIENTS = "gradients"
    MODEL = "model"
    AUXILIARY = "auxiliary"

    def includes(self, other: "Knowledge") -> bool:
        """Return whether an adversary of this level has what ``other`` stands for."""
        levels = list(Knowledge)
        return levels.index(self) >= levels.index(other)


@dataclass(frozen=True)
class Observations:
    """What the server sees of N updates; C classes, D features of the last layer.

    Attributes
    ----------
    row_sums
        float [N, C]: the last layer's weight gradient summed over its features. For an update of
        several local steps, the sum of the steps' gradients.
    bias_gradient
        float [N, C], or None for a layer without bias.
    weight_gradient
        float [N, C, D], or None where it was not kept.
    labels
        int64 [N]: how many labels to recover, batch size times local steps.
    keys
        int64 [N]: the update's identity within its round (the client).
    local_steps
        Local steps behind each update; 1 for FedSGD.
    """

    row_sums: Array
    bias_gradient: Array | None
    weight_gradient: Array | None
    labels: Array
    keys: Array
    local_steps: int = 1

    def rows(self, chosen: slice) -> "Observations":
        """Return the observations of some of the updates."""
        return replace(
            self,
            row_sums=self.row_sums[chosen],
            bias_gradient=None if self.bias_gradient is None else self.bias_gradient[chosen],
            weight_gradient=None if self.weight_gradient is None else self.weight_gradient[chosen],
            labels=self.labels[chosen],
            keys=self.keys[chosen],
        )


@dataclass(frozen=True)
class LabelCounts:
    """An attack's answer for N updates.

    Attributes
    ----------
    counts
        int64 [N, C]: how often each class is inferred; each row sums to the update's labels.
    scores
        float64 [N, C], or None: the estimate before rounding, where the attack has one.
    """

    counts: Array
    scores: Array | None = None


@dataclass(frozen=True)
class Outputs:
    """The global model's answers on n inputs of the server's own.

    Attributes
    ----------
    posterior
        float64 [n, C]: softmax of the logits.
    features
        float64 [n, D]: the last layer's inputs.
    labels
        int64 [n], or None for dummy inputs.
    """

    posterior: NDArray[np.float64]
    features: NDArray[np.float64]
    labels: NDArray[np.int64] | None


class Adversary(Protocol):
    """What `calibrate` may use. Asking for more than the declared knowledge raises.

    Attributes
    ----------
    batch_size
        Number of samples in a client's batch, B.
    seed
        An unsigned 64-bit seed of this attack in this round.
    """

    batch_size: int
    seed: int

    @property
    def classes(self) -> int:
        """Number of classes, C."""

    def on_dummy(self, kind: str, samples: int) -> Outputs:
        """Run the global model on dummy inputs: ``zeros``, ``ones``, or ``random`` in [0, 1)."""

    def on_auxiliary(self) -> Outputs:
        """Run the global model on the auxiliary samples; they cover every class."""


@dataclass(frozen=True)
class Attack(ABC):
    """An attack with its knobs, which are the fields of the dataclass.

    A subclass is a frozen dataclass, registered with `testbed.attacks.register`. Knobs that come
    from an experiment file are validated against the fields' types; ``Annotated[int,
    pydantic.Field(ge=1)]`` states a range.
    """

    __pydantic_config__: ClassVar = pydantic.ConfigDict(extra="forbid")

    name: ClassVar[str]
    title: ClassVar[str]
    knowledge: ClassVar[Knowledge]
    source: ClassVar[str]
    # Arrays of the calibration: the axes behind the leading one ("class"), and the dtype.
    calibration_arrays: ClassVar[Mapping[str, tuple[tuple[str, ...], str]]] = {}

    def calibrate(self, adversary: Adversary) -> Calibration:  # noqa: ARG002
        """Derive from the global model what `infer` needs; once per model and batch size.

        Returns
        -------
        Calibration
            The arrays that `calibration_arrays` declares, with a leading axis of length 1.
        """
        return {}

    @abstractmethod
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        """Infer the labels of N updates. Pure; row i depends on update i alone."""

    def options(self) -> dict[str, Any]:
        """Return the knobs by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
