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

# Name, axes behind the leading one, dtype: see `Attack`.
CalibrationArrays = Mapping[str, tuple[tuple[str | int, ...], str]]


class Knowledge(Enum):
    """What the adversary has; each level includes those before it.

    The last two are no honest-but-curious server's: ``malicious`` also chooses the model that each
    client gets, and ``truth`` is told the mean posterior of the batch, as a self-test.
    """

    GRADIENTS = "gradients"
    MODEL = "model"
    AUXILIARY = "auxiliary"
    MALICIOUS = "malicious"
    TRUTH = "truth"

    def includes(self, other: "Knowledge") -> bool:
        """Return whether an adversary of this level has what ``other`` stands for."""
        levels = list(Knowledge)
        return levels.index(self) >= levels.index(other)


class Observed(Enum):
    """The parts of an update that an attack may look at; row sums are always there."""

    ROW_SUMS = "row sums"
    BIAS_GRADIENT = "bias gradient"
    WEIGHT_GRADIENT = "weight gradient"
    STATISTICS = "BatchNorm statistics"
    UPDATE = "whole update"


class Assumption(Enum):
    """What an attack takes for granted. Where it does not hold, the attack is run all the same."""

    NON_NEGATIVE_FEATURES = "non-negative features"
    ONE_LABEL = "one label per update"
    DISTINCT_LABELS = "distinct labels"
    FEWER_LABELS_THAN_RANK = "fewer labels than rank"
    ABSENT_CLASS = "an absent class"
    FEATURES_FOR_CLASSES = "as many features as classes"
    ONE_STEP = "one local step"
    SEVERAL_STEPS = "several local steps"
    KNOWN_SIZE = "number of labels known"
    FIVE_CLASSES = "at least five classes"
    FAIR_SAMPLES = "auxiliary samples of every class, as the victims' are"
    EXACT_STATISTICS = "statistics without noise"
    KNOWN_MOMENTUM = "running averages that can be undone"


class Answer(Enum):
    """What an attack infers of an update."""

    COUNTS = "counts"
    PRESENCE = "presence"
    DISTRIBUTION = "distribution"


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
        int64 [N]: how many labels to recover, batch size times local steps, as far as the server
        knows (``adversary.batch_size`` of the experiment may say otherwise than the truth).
    keys
        int64 [N]: the update's identity within its round (the client).
    local_steps
        Local steps behind each update; 1 for FedSGD.
    statistics
        float32 [N, S], or None: the BatchNorm statistics that came with the update, as the client
        left them: all float buffers of the model.
    update
        float32 [N, P + S], or None: the whole update as it is shared, gradients of all parameters
        (summed over the local steps), then the buffers.
    norm
        float [N], or None: Euclidean norm of each update's gradient part. Every attack sees it.
    posterior
        float [N, C], or None: the batch's mean posterior, which is part of the truth: only
        `Knowledge.TRUTH` sees it.
    """

    row_sums: Array
    bias_gradient: Array | None
    weight_gradient: Array | None
    labels: Array
    keys: Array
    local_steps: int = 1
    statistics: Array | None = None
    update: Array | None = None
    posterior: Array | None = None
    norm: Array | None = None

    def rows(self, chosen: slice) -> "Observations":
        """Return the observations of some of the updates."""
        return replace(
            self,
            **{
                name: value[chosen]
                for name, value in vars(self).items()
                if name != "local_steps" and value is not None
            },
        )

    def restricted(self, attack: "type[Attack] | Attack") -> "Observations":
        """Return what an attack declares to look at; the rest is None."""
        shown: dict[str, Observed] = {
            "bias_gradient": Observed.BIAS_GRADIENT,
            "weight_gradient": Observed.WEIGHT_GRADIENT,
            "statistics": Observed.STATISTICS,
            "update": Observed.UPDATE,
        }
        hidden: dict[str, Any] = {
            name: None for name, part in shown.items() if part not in attack.observes
        }
        if attack.knowledge is not Knowledge.TRUTH:
            hidden["posterior"] = None
        return replace(self, **hidden)


@dataclass(frozen=True)
class LabelCounts:
    """An attack's answer for N updates: how often each class occurs.

    Attributes
    ----------
    counts
        int64 [N, C]: how often each class is inferred; each row sums to the update's labels.
    scores
        float64 [N, C], or None: the estimate before rounding, where the attack has one.
    """

    answer: ClassVar[Answer] = Answer.COUNTS

    counts: Array
    scores: Array | None = None

    @property
    def values(self) -> Array:
        """What is stored and scored."""
        return self.counts


@dataclass(frozen=True)
class LabelPresence:
    """An attack's answer for N updates: which classes occur.

    Attributes
    ----------
    presence
        bool [N, C].
    scores
        float64 [N, C], or None: larger where a class is more likely to be present.
    """

    answer: ClassVar[Answer] = Answer.PRESENCE

    presence: Array
    scores: Array | None = None

    @property
    def values(self) -> Array:
        """What is stored and scored."""
        return self.presence


@dataclass(frozen=True)
class LabelDistribution:
    """An attack's answer for N updates: the shares of the classes.

    Attributes
    ----------
    shares
        float64 [N, C]: not negative; each row sums to 1.
    """

    answer: ClassVar[Answer] = Answer.DISTRIBUTION

    shares: Array

    @property
    def values(self) -> Array:
        """What is stored and scored."""
        return self.shares


Inferred = LabelCounts | LabelPresence | LabelDistribution


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


@dataclass(frozen=True)
class Normalised:
    """The global model's answers on n inputs, normalised as a client's batch was.

    A module whose BatchNorm layers normalise by fixed numbers treats every input by itself. With
    those of a batch, what the batch left in the statistics is therefore exactly the mean of its
    samples' own moments, and so are its gradients: these are the moments of the server's samples,
    in the same terms.

    Attributes
    ----------
    outputs
        Posterior and features.
    moments
        float64 [n, S]: for each float buffer, in place of a running mean the mean of a channel
        over a sample, in place of a running variance the mean square. 0 for a buffer that is
        none of BatchNorm's.
    batch
        float64 [S]: the same of the client's batch.
    """

    outputs: Outputs
    moments: NDArray[np.float64]
    batch: NDArray[np.float64]


@dataclass(frozen=True)
class Head:
    """The global model's last layer, ``z = W h + b``.

    Attributes
    ----------
    weight
        float64 [C, D].
    bias
        float64 [C]; zeros for a layer without.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]


@dataclass(frozen=True)
class Planted:
    """What a malicious server planted in the models of U clients, each with one of its own.

    Every sample of client u has the features ``embeddings[u]`` and so the same posterior (Wang et
    al., "Breaking Secure Aggregation", INFOCOM 2024).

    Attributes
    ----------
    embeddings
        float64 [U, D].
    posterior
        float64 [U, C].
    weights
        float64 [U]: of each client's gradient in the sum that the server receives.
    """

    embeddings: NDArray[np.float64]
    posterior: NDArray[np.float64]
    weights: NDArray[np.float64]


class Adversary(Protocol):
    """What `calibrate` may use. Asking for more than the declared knowledge raises.

    Attributes
    ----------
    batch_size
        Number of samples in a client's batch, B, as far as the server knows.
    local_steps, learning_rate
        Of the clients' local training; its updates are sums of the steps' gradients.
    seed
        An unsigned 64-bit seed of this attack in this round.
    """

    batch_size: int
    local_steps: int
    learning_rate: float
    seed: int

    @property
    def classes(self) -> int:
        """Number of classes, C."""

    def head(self) -> Head:
        """Return the last layer of the global model (`Knowledge.MODEL`)."""

    def on_dummy(self, kind: str, samples: int) -> Outputs:
        """Run the global model on dummy inputs (`Knowledge.MODEL`).

        ``zeros``, ``ones``, ``random`` (uniform in [0, 1)) or ``normal`` (standard normal).
        """

    def on_auxiliary(self, *, pure: bool = False) -> Outputs:
        """Run the global model on the auxiliary samples (`Knowledge.AUXILIARY`).

        They cover every class, unless the experiment takes classes away
        (``adversary.auxiliary_missing``). With BatchNorm, samples run in batches of mixed classes
        of a client's size, or, if ``pure``, those of each class in a batch of their own.
        """

    def after(self, update: NDArray[np.float32]) -> "Adversary":
        """Return the same adversary at the model that a client ended with (`Knowledge.MODEL`).

        Parameters
        ----------
        update
            float32 [P + S], of `Observations.update`.
        """

    def simulate(
        self, batches: NDArray[np.int64], targets: NDArray[np.float32] | None = None
    ) -> Observations:
        """Observe what clients with the given auxiliary samples would send (`Knowledge.AUXILIARY`).

        Forward passes only: the last layer's gradients by their closed form, and the BatchNorm
        statistics. With BatchNorm every batch is run through the model; without, the outputs on
        single samples are put together, which costs next to nothing.

        Parameters
        ----------
        batches
            int64 [S, E, B]: for each of S simulated updates, and each of its E local steps,
            positions of auxiliary samples in the order of `on_auxiliary`. For several steps, the
            last layer alone moves from step to step.
        targets
            float32 [S, E, B, C], or None: the label distributions that the clients train on in
            place of the samples' own labels.

        Returns
        -------
        Observations
            Of S updates, with weight gradients [S, C, D]: keep S moderate. float32, NumPy.
        """

    def local_update(self, batches: NDArray[np.int64]) -> NDArray[np.float32]:
        """Do a client's local training on auxiliary samples (`Knowledge.AUXILIARY`).

        Parameters
        ----------
        batches
            int64 [E, B]: positions of auxiliary samples for each local step.

        Returns
        -------
        NDArray[np.float32]
            [P + S]: the whole update, as a client would share it.
        """

    def weight_gradient(self, update: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the last layer's weight gradient [C, D] in a whole update, a view."""

    def bias_gradient(self, update: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Return the last layer's bias gradient [C] in a whole update, a view."""

    def statistics_sent(self) -> NDArray[np.float32]:
        """Return the float buffers [S] that went out with the global model (`Knowledge.MODEL`)."""

    def momentum(self) -> NDArray[np.float32]:
        """Return for each float buffer [S] the weight of a new batch in its running average.

        NaN where a buffer is none of BatchNorm's, or averages over all batches
        (`Knowledge.MODEL`).
        """

    def disturbed(
        self, statistics: NDArray[np.float32], sigma: float, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Return statistics [n, S] as noisy as clients share them (`Knowledge.MODEL`).

        Parameters
        ----------
        statistics
            float32 [n, S], without noise; left as they are.
        sigma
            As ``federation.statistics_noise``.
        rng
            Its state decides the noise.
        """

    def normalised(self, statistics: NDArray[np.float32]) -> Normalised:
        """Run the auxiliary samples, normalised as a client's batch was (`Knowledge.AUXILIARY`).

        Parameters
        ----------
        statistics
            float32 [S], of one update of `Observations.statistics`. The running average is undone:
            of one local step, what is left are the statistics of its batch; of several, a weighted
            mean.
        """

    def logit_gradients(self) -> NDArray[np.float32]:
        """Return the mean gradient of each logit over some auxiliary samples of every class.

        float32 [C, P]: gradients of all parameters, C backward passes (`Knowledge.AUXILIARY`).
        """

    def planted(self) -> Planted:
        """Return what was planted in the clients' models (`Knowledge.MALICIOUS`)."""

    def white_box(self) -> "WhiteBox":
        """Return the model itself, to optimise inputs through it (`Knowledge.MODEL`)."""


class WhiteBox(Protocol):
    """The global model for attacks that optimise over inputs. Values are torch tensors.

    Attributes
    ----------
    shape
        Channels, height and width of an input.
    parameters
        P: length of the gradient part of an update.
    """

    shape: tuple[int, int, int]
    parameters: int

    def logits(self, inputs: Any) -> Any:
        """Return the logits [n, C] of inputs [n, channels, height, width], with their graph."""

    def gradient(self, loss: Any) -> Any:
        """Return the gradient [P] of a scalar over all parameters, itself differentiable."""


@dataclass(frozen=True)
class Attack(ABC):
    """An attack with its knobs, which are the fields of the dataclass.

    A subclass is a frozen dataclass, registered with `testbed.attacks.register`. Knobs that come
    from an experiment file are validated against the fields' types; ``Annotated[int,
    pydantic.Field(ge=1)]`` states a range.

    Attributes
    ----------
    name, title, source
        Its name in experiment files, what tables call it, and the publication.
    knowledge
        What it has to have.
    observes
        The parts of an update that it looks at; it is shown no other. It is not run where the
        scenario's updates lack one of them.
    assumes
        What it takes for granted. Where the scenario breaks it, the results say so.
    answers
        What it infers.
    simulates
        Whether its calibration simulates a client's local steps one by one, so that its cost grows
        with their number.
    calibrated_by
        Knobs that decide what `calibrate` and `calibrate_updates` return: a stored calibration
        serves every attack of the name that agrees in them. All knobs by default.
    calibration_arrays
        Arrays of the calibration: the axes behind the leading one (``class``, ``feature``,
        ``buffer``, or a whole number for an axis of that length), and the dtype. The first axis is
        ``client`` for what `calibrate_updates` returns.
    """

    __pydantic_config__: ClassVar = pydantic.ConfigDict(extra="forbid")

    name: ClassVar[str]
    title: ClassVar[str]
    knowledge: ClassVar[Knowledge]
    source: ClassVar[str]
    observes: ClassVar[frozenset[Observed]] = frozenset({Observed.ROW_SUMS})
    assumes: ClassVar[frozenset[Assumption]] = frozenset()
    answers: ClassVar[Answer] = Answer.COUNTS
    simulates: ClassVar[bool] = False
    calibrated_by: ClassVar[tuple[str, ...] | None] = None
    calibration_arrays: ClassVar[CalibrationArrays] = {}

    def arrays(self) -> CalibrationArrays:
        """Return `calibration_arrays`; override it where a knob decides on a length."""
        return self.calibration_arrays

    def calibrate(self, adversary: Adversary) -> Calibration:  # noqa: ARG002
        """Derive from the global model what `infer` needs; once per model and batch size.

        Returns
        -------
        Calibration
            Arrays that `arrays` declares without the axis ``client``, with a leading axis of
            length 1.
        """
        return {}

    def calibrate_updates(
        self,
        adversary: Adversary,  # noqa: ARG002
        observations: Observations,  # noqa: ARG002
    ) -> Calibration:
        """Derive what `infer` needs and what depends on the model and on each update.

        For attacks that run the model that a client ended with, or optimise through the model;
        once per round, with the updates of all its clients.

        Returns
        -------
        Calibration
            Arrays that `arrays` declares with the axis ``client`` first, [N, ...].
        """
        return {}

    @abstractmethod
    def infer(self, observations: Observations, calibration: Calibration) -> Inferred:
        """Infer the labels of N updates. Pure; row i depends on update i alone."""

    def options(self) -> dict[str, Any]:
        """Return the knobs by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
