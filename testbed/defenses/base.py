"""What a defence is: what a client does to its labels, gradients or update before it shares them.

Defences compose in a list. What they work on decides their place, in one fixed order: labels of a
batch, per-sample gradients, then the vector: clip, noise, what is withheld, what is left out, how
what is left is quantised, and last the sum of the cohort. NumPy only, on the host: experiment files
are checked without torch, and a defence's draws are the same on every device.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from testbed.attacks.base import Observations

Vector = NDArray[np.float32]
Scope = Literal["update", "tensor"]
When = Literal["step", "update"]


class Stage(IntEnum):
    """Where in a client's work a defence stands; a list of defences ascends."""

    LABELS = 1
    SAMPLES = 2
    CLIP = 3
    NOISE = 4
    WITHHOLD = 5
    SPARSIFY = 6
    QUANTISE = 7
    SUM = 8


@dataclass(frozen=True, eq=False)
class Tensors:
    """Where the parameter tensors lie in a flat vector, one after the other.

    Attributes
    ----------
    names
        Of the T tensors, as the module calls them.
    offsets
        int64 [T + 1]: tensor t is ``vector[offsets[t]:offsets[t + 1]]``.
    weight, bias
        Where the last layer's weight [C, D] and bias [C] lie; ``bias`` is None for a layer without.
    classes
        C.
    """

    names: tuple[str, ...]
    offsets: NDArray[np.int64]
    weight: slice
    bias: slice | None
    classes: int

    @property
    def size(self) -> int:
        """Length of the vector, P."""
        return int(self.offsets[-1])

    def bounds(self, scope: Scope) -> NDArray[np.int64]:
        """Return where the parts begin that a defence treats one by one, and the end [parts + 1].

        One part for the scope ``update``; the tensors for ``tensor``.
        """
        return self.offsets if scope == "tensor" else self.offsets[[0, -1]]


@dataclass(frozen=True)
class Known:
    """What an attacker who adapts to a defence knows beside the observations.

    Attributes
    ----------
    posterior
        float64 [C]: the model's mean posterior on what inputs the attacker has; 1/C where it has
        neither model nor inputs.
    batch_size
        B, as far as the server knows.
    tensors
        Of the updates.
    mass, spread
        Mean, over the same inputs, of the sum of the last layer's features, and its standard
        deviation as a part of the mean; 0 where the attacker has no model.
    """

    posterior: NDArray[np.float64]
    batch_size: int
    tensors: Tensors
    mass: float = 0.0
    spread: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Defense(ABC):
    """A defence with its knobs, which are the fields of the dataclass.

    A subclass is a frozen dataclass with keyword-only fields, registered with
    `testbed.defenses.register`, and derives from one of the classes below. Knobs from an experiment
    file are validated against the fields' types, as those of attacks are.

    Attributes
    ----------
    name, title, source
        Its name in experiment files, what tables call it, and the publication.
    stage
        Its place in the order.
    adaptation
        One sentence: what an attacker does who knows of it. Empty where there is nothing to do.
    accumulates
        Whether what it holds back or adds averages out over rounds, so that the adapted attacker
        also adds up a client's updates.
    scope
        Whether it treats the update as a whole or tensor by tensor.
    at
        Whether it is applied to the gradient of each local step, or to the final update.
    """

    __pydantic_config__: ClassVar = pydantic.ConfigDict(extra="forbid")

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    stage: ClassVar[Stage]
    adaptation: ClassVar[str] = ""

    scope: Scope = "update"
    at: When = "update"

    @property
    def accumulates(self) -> bool:
        """Whether a sum over rounds tells what a single update does not."""
        return False

    def options(self) -> dict[str, Any]:
        """Return the knobs by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    # What the adapted attacker does. All three leave what they are given as it is.

    def undo(self, observations: Observations, known: Known) -> Observations:  # noqa: ARG002
        """Return the observations [N, ...] as near as may be to those without the defence.

        Row i depends on update i alone. Parts that are None stay None.
        """
        return observations

    def imitate(
        self,
        simulated: Observations,
        rng: np.random.Generator,  # noqa: ARG002
    ) -> Observations:
        """Return simulated observations [S, ...] as the defence would have left them.

        For attacks that learn from simulated updates; what `undo` does comes afterwards. Only the
        last layer is there: where a defence works on the whole update, an approximation by it.
        """
        return simulated

    def restore(
        self,
        counts: NDArray[np.float64],
        labels: NDArray[np.int64],  # noqa: ARG002
    ) -> NDArray[np.float64]:
        """Return the true label counts [N, C], not rounded, from those behind the update.

        Parameters
        ----------
        counts
            float64 [N, C]: an attack's estimate of the counts that the gradient shows.
        labels
            int64 [N]: labels of each update.
        """
        return counts


@dataclass(frozen=True)
class Targets:
    """What a client trains a batch on.

    Attributes
    ----------
    probabilities
        float32 [B, C]: the label distribution of each sample; rows sum to 1.
    partner, share
        Where samples are mixed: int64 [B], the position within the batch of the sample that each is
        mixed with, and float32 [B], the weight of its own image. Else None. `probabilities` are
        mixed already.
    """

    probabilities: NDArray[np.float32]
    partner: NDArray[np.int64] | None = None
    share: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True)
class LabelDefense(Defense):
    """Trains on other labels than the samples have; by nature part of each step."""

    stage: ClassVar[Stage] = Stage.LABELS

    at: Literal["step"] = "step"

    @abstractmethod
    def transform(
        self, targets: Targets, samples: NDArray[np.int64], rng: np.random.Generator, seed: int
    ) -> Targets:
        """Return what to train on.

        Parameters
        ----------
        targets
            Of the B samples of a batch, as the defences before this one left them.
        samples
            int64 [B]: which samples of the data set they are.
        rng
            Of this batch.
        seed
            An unsigned 64-bit seed that stays the same all along the scenario, for what a client
            draws once per sample and remembers.
        """


@dataclass(frozen=True, kw_only=True)
class VectorDefense(Defense):
    """Changes a gradient or an update in place."""

    @abstractmethod
    def apply(self, vector: Vector, tensors: Tensors, rng: np.random.Generator) -> None:
        """Change the vector, float32 [P], in place."""


@dataclass(frozen=True, kw_only=True)
class Compression(Defense):
    """Sends less than the whole vector.

    Attributes
    ----------
    error_feedback
        Whether what was not sent is kept by the client and added to its next update.
    """

    error_feedback: bool = False

    @property
    def accumulates(self) -> bool:
        """Whether a sum over rounds tells what a single update does not."""
        return self.error_feedback


@dataclass(frozen=True, kw_only=True)
class Sparsifier(Compression):
    """Leaves entries out; those that are sent are sent as they are."""

    stage: ClassVar[Stage] = Stage.SPARSIFY

    @abstractmethod
    def select(
        self, vector: Vector, tensors: Tensors, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """Return the positions that are sent, int64 [k], ascending.

        ``vector`` is float32 [P]; positions that an earlier defence left out hold 0, and are not
        sent even where they are selected.
        """

    @property
    def factor(self) -> float:
        """What values are multiplied by before they are sent, 1 unless an option says otherwise."""
        return 1.0


@dataclass(frozen=True)
class Levels:
    """Quantised values: entry i stands for ``scales[part of i] * codes[i] / levels``, in float32.

    Attributes
    ----------
    levels
        The largest code, L.
    scales
        float32 [parts].
    codes
        int32 [k], in -L..L; without zeros where ``signs_only``.
    signs_only
        Whether every code is -1 or 1, so that a bit holds it.
    """

    levels: int
    scales: NDArray[np.float32]
    codes: NDArray[np.int32]
    signs_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Quantiser(Compression):
    """Sends entries with fewer bits."""

    stage: ClassVar[Stage] = Stage.QUANTISE

    @abstractmethod
    def quantise(
        self, values: Vector, bounds: NDArray[np.int64], rng: np.random.Generator
    ) -> Levels | NDArray[np.float16]:
        """Return what is sent in place of the values.

        Parameters
        ----------
        values
            float32 [k]: entries that are sent, in the order of the vector.
        bounds
            int64 [parts + 1]: where in ``values`` the parts of the defence's scope begin, and the
            end; parts may be empty.
        rng
            Its state decides stochastic rounding.
        """


Share = Annotated[float, pydantic.Field(ge=0, lt=1)]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
