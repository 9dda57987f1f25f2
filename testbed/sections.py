"""The sections of an experiment file, each validated by itself.

Importing this module costs neither torch nor MPI: `testbed check` runs on it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field

from testbed.attacks import Attack, make_attack
from testbed.data import DATASETS, check_variant
from testbed.defenses import Defense, make_defense
from testbed.errors import UserError, suggest
from testbed.models.catalog import ACTIVATIONS, MODELS


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a number, not yes or no")
    return value


def _expanded(root: Path | None) -> Path | None:
    try:
        return root.expanduser() if root is not None else None
    except RuntimeError:
        raise ValueError("there is no such user, or no home folder") from None


# Numbers of rounds and clients travel in 32 bits.
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, lt=2**31)]
Natural = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, lt=1)]


class Section(pydantic.BaseModel):
    """What all sections share: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class DataSection(Section):
    """Which data, and how they are divided among victims, adversary and test.

    Attributes
    ----------
    variant
        Of a data set that has several: EMNIST's splits, CelebA's attributes; None for the first.
    limit
        At most so many training samples are used, and test samples in proportion.
    """

    name: str
    root: Path | None = None
    variant: str | None = None
    limit: Count | None = None
    auxiliary_per_class: Natural = 20
    test_fraction: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, lt=1)] = 0.2

    @pydantic.field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in DATASETS:
            raise ValueError(suggest(name, DATASETS))
        return name

    @pydantic.field_validator("root")
    @classmethod
    def _home(cls, root: Path | None) -> Path | None:
        return _expanded(root)

    @pydantic.model_validator(mode="after")
    def _known_variant(self) -> "DataSection":
        if self.variant is not None:
            try:
                check_variant(self.name, self.variant)
            except UserError as error:
                raise ValueError(str(error)) from None
        return self


class LabelsSection(Section):
    """How the labels of a client's batch are distributed (Wainakh et al. 2022, section 5)."""

    distribution: Literal["balanced", "unbalanced", "natural"] = "balanced"


class ModelSection(Section):
    """The global model: one of the paper's, or ``package.module:callable`` with arguments.

    Attributes
    ----------
    init
        ``uniform``, the paper's; ``torch``, the module's own weights; or None, see
        `initialisation`.
    """

    name: str
    activation: str | None = None
    init: Literal["uniform", "torch"] | None = None
    last_layer: str | None = None
    arguments: dict[str, Any] = {}

    @pydantic.field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if ":" not in name and name not in MODELS:
            raise ValueError(f"{suggest(name, MODELS)}, or an import path package.module:callable")
        return name

    @pydantic.field_validator("activation")
    @classmethod
    def _activation(cls, activation: str | None) -> str | None:
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(suggest(activation, ACTIVATIONS))
        return activation

    @property
    def initialisation(self) -> str:
        """Where nothing is said, built-in models start as in the paper, and yours as they are."""
        return self.init or ("torch" if ":" in self.name else "uniform")

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "ModelSection":
        if ":" in self.name and self.activation is not None:
            raise ValueError(
                "model.activation is for the built-in models; pass it to yours in model.arguments"
            )
        if ":" not in self.name and self.arguments:
            raise ValueError("model.arguments is for models given by an import path")
        return self


class PretrainingSection(Section):
    """Training before the first round: plain SGD on the victims' samples, by the testbed itself.

    Attributes
    ----------
    steps
        How many. All scenarios that agree in data, model, seed and in this section, but for the
        number of steps, attack the same models, each at its stage of one training. Where it is
        left out, there is no training, and every scenario has initial models of its own.
    """

    steps: Natural | None = None
    batch_size: Count = 32
    learning_rate: Positive = 0.1

    @pydantic.model_validator(mode="after")
    def _trains(self) -> "PretrainingSection":
        for key, field in type(self).model_fields.items():
            if self.steps is None and key != "steps" and getattr(self, key) != field.default:
                raise ValueError(
                    f"pretraining.{key} is of no use without pretraining.steps: set the number of "
                    "steps, 0 for none"
                )
        return self


class AdversarySection(Section):
    """What the server knows wrongly, or less well than the attacks presume.

    Attributes
    ----------
    batch_size
        ``known``, or ``estimated`` from each update's gradient.
    batch_size_factor
        What the server takes for the batch size, in multiples of what it is or is estimated to be.
    auxiliary_noise
        Standard deviation of Gaussian noise on its images, whose values are in [0, 1].
    auxiliary_missing
        Classes that it has no samples of.
    auxiliary_data, auxiliary_root
        Another data set with the same classes, which its samples are from, scaled to the size of
        the victims' images.
    adaptive
        Whether, in a scenario with defences, every attack is also run as an attacker would who
        knows them.
    """

    batch_size: Literal["known", "estimated"] = "known"
    batch_size_factor: Annotated[
        float, BeforeValidator(_no_bool), Field(gt=0, le=1000, allow_inf_nan=False)
    ] = 1.0
    auxiliary_noise: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=100)] = 0.0
    auxiliary_missing: Natural = 0
    auxiliary_data: str | None = None
    auxiliary_root: Path | None = None
    adaptive: bool = True

    @pydantic.field_validator("auxiliary_data")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in DATASETS:
            raise ValueError(suggest(name, DATASETS))
        return name

    @pydantic.field_validator("auxiliary_root")
    @classmethod
    def _home(cls, root: Path | None) -> Path | None:
        return _expanded(root)

    @property
    def knows_size(self) -> bool:
        """Whether it knows the batch size."""
        return self.batch_size == "known" and self.batch_size_factor == 1

    @property
    def has_fair_samples(self) -> bool:
        """Whether its samples are the victims' kind, and of every class."""
        shifted = self.auxiliary_noise or self.auxiliary_missing or self.auxiliary_data
        return not shifted


class PartitionSection(Section):
    """How the victims' samples are divided among the clients.

    Attributes
    ----------
    kind
        ``shared``: every client draws from all of them, as in the paper; ``iid``; ``dirichlet``
        (Hsu et al. 2019: label proportions per client, clients of equal size);
        ``dirichlet_classes`` (Yurochkin et al. 2019: every class divided among the clients, sizes
        vary); ``shards`` (McMahan et al. 2017); ``user``, by the data set's users.
    alpha
        Of both Dirichlet partitions: the smaller, the less alike are clients.
    classes_per_client
        Shards of each client.
    """

    kind: Literal["shared", "iid", "dirichlet", "dirichlet_classes", "shards", "user"] = "shared"
    alpha: Positive | None = None
    classes_per_client: Count | None = None

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "PartitionSection":
        owners = {"alpha": ("dirichlet", "dirichlet_classes"), "classes_per_client": ("shards",)}
        for key, kinds in owners.items():
            given = getattr(self, key) is not None
            if given and self.kind not in kinds:
                raise ValueError(
                    f"partition.{key} belongs to {' and '.join(kinds)}, and partition.kind is "
                    f"{self.kind!r}"
                )
            if not given and self.kind in kinds:
                raise ValueError(f"partition.{key} is missing: {self.kind!r} needs it")
        return self


class ServerSection(Section):
    """How the server makes its step from the clients' mean update (Reddi et al. 2021).

    Attributes
    ----------
    optimizer
        ``sgd``; ``momentum``, or ``adam``, FedAdam.
    learning_rate
        Of the step along what the clients' own step would be on average: with 1 and ``sgd`` the new
        model is the mean of the clients' models.
    momentum
        Of ``momentum``.
    beta1, beta2, epsilon
        Of ``adam``; epsilon is tau, added to the root of the second moment.
    """

    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    learning_rate: Positive = 1.0
    momentum: Share = 0.9
    beta1: Share = 0.9
    beta2: Share = 0.99
    epsilon: Positive = 1e-3

    @pydantic.model_validator(mode="after")
    def _used(self) -> "ServerSection":
        owners = {"momentum": "momentum", "beta1": "adam", "beta2": "adam", "epsilon": "adam"}
        for key, owner in owners.items():
            default = type(self).model_fields[key].default
            if self.optimizer != owner and getattr(self, key) != default:
                raise ValueError(
                    f"federation.server.{key} belongs to {owner}, and optimizer is "
                    f"{self.optimizer!r}"
                )
        return self


class FederationSection(Section):
    """The rounds.

    Attributes
    ----------
    algorithm
        ``fedsgd``: a client shares the gradient of one batch. ``fedavg``: what it changed in
        several local steps, over the learning rate (McMahan et al. 2017).
    clients, population
        Clients of a round, and how many there are altogether (by default as many): a seeded sample
        takes part in each round.
    local_steps, local_epochs
        One of them for ``fedavg``: batches, or passes over a client's own samples.
    momentum, weight_decay, proximal
        Of the local steps; ``proximal`` is FedProx's mu (Li et al. 2020).
    weighting
        What a client's update weighs in the mean: as many as it has ``samples`` (where it draws
        from all, as many as it used), or all the same, ``uniform``.
    dropout
        Probability that a client's update never arrives.
    batch_norm
        ``aggregated``: statistics are shared and averaged like parameters. ``local``: they stay
        with the client, and batches are normalised by themselves, also in evaluation (Li et al.,
        FedBN, ICLR 2021). ``frozen``: the initial statistics normalise, and never change.
    statistics_noise
        Noise on shared statistics, in multiples of their own scale: means get Gaussian noise of
        that many standard deviations of their channel, variances that much relative noise.
    attack_every, evaluate_every
        Every so many rounds; 0 for no evaluation.
    """

    algorithm: Literal["fedsgd", "fedavg"] = "fedsgd"
    fresh_model: bool = False
    rounds: Count
    clients: Count = 1
    population: Count | None = None
    batch_size: Count
    local_steps: Count | None = None
    local_epochs: Count | None = None
    learning_rate: Positive = 0.1
    momentum: Share = 0.0
    weight_decay: NonNegative = 0.0
    proximal: NonNegative = 0.0
    weighting: Literal["samples", "uniform"] = "samples"
    server: ServerSection = ServerSection()
    dropout: Share = 0.0
    batch_norm: Literal["aggregated", "local", "frozen"] = "aggregated"
    statistics_noise: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=100)] = 0.0
    attack_every: Count = 1
    evaluate_every: Natural = 0

    @property
    def shares_statistics(self) -> bool:
        """Whether BatchNorm's statistics come with the updates."""
        return self.batch_norm == "aggregated"

    @pydantic.model_validator(mode="after")
    def _noise_is_shared(self) -> "FederationSection":
        if self.statistics_noise and not self.shares_statistics:
            raise ValueError(
                "federation.statistics_noise is of no use where batch_norm is "
                f"{self.batch_norm!r}: statistics that are not shared get no noise"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _local_work(self) -> "FederationSection":
        steps, epochs = self.local_steps, self.local_epochs
        if self.algorithm == "fedsgd":
            if epochs is not None or steps not in (None, 1):
                raise ValueError(
                    "federation.local_steps and local_epochs belong to fedavg: set "
                    "federation.algorithm to fedavg (fedsgd is one step)"
                )
            for key in ("momentum", "proximal"):
                if getattr(self, key):
                    raise ValueError(
                        f"federation.{key} has no effect on a single local step: set "
                        "federation.algorithm to fedavg"
                    )
            return self
        if (steps is None) == (epochs is None):
            raise ValueError(
                "fedavg needs one of federation.local_steps and local_epochs, found "
                + ("none" if steps is None else "both")
            )
        return self

    @pydantic.model_validator(mode="after")
    def _steps(self) -> "FederationSection":
        if self.fresh_model and self.server != ServerSection():
            raise ValueError(
                "federation.server is of no use where fresh_model is true: the model never steps"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _enough(self) -> "FederationSection":
        if self.population is not None and self.population < self.clients:
            raise ValueError(
                f"federation.population: {self.population} clients altogether, and "
                f"{self.clients} in each round: expected at least as many"
            )
        return self


class DefenseSection(pydantic.BaseModel):
    """One defence; keys beside ``name`` are its options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @pydantic.model_validator(mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _makes(self) -> "DefenseSection":
        try:
            self.make()
        except UserError as error:
            raise ValueError(str(error)) from None
        return self

    def make(self) -> Defense:
        """Return the defence."""
        return make_defense(self.name, self.model_extra or {})


class AttackSection(pydantic.BaseModel):
    """One attack; keys beside ``name`` and ``label`` are its options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    label: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+*-]{0,63}$")] = ""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _labelled(cls, value: object) -> object:
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            return {"label": value["name"].rpartition(":")[2], **value}
        return value

    @pydantic.model_validator(mode="after")
    def _makes(self) -> "AttackSection":
        try:
            self.make()
        except UserError as error:
            raise ValueError(str(error)) from None
        return self

    def make(self) -> Attack:
        """Return the attack."""
        return make_attack(self.name, self.model_extra or {})


class ComputeSection(Section):
    """Where the clients compute. Results do not depend on it, but for the device's arithmetic."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count = 1
    receive_buffers: Annotated[int, BeforeValidator(_no_bool), Field(ge=2, le=4096)] = 16


class ResultsSection(Section):
    """What the results file keeps, and how often it is committed."""

    observations: Literal["summary", "last_layer", "full"] = "summary"
    commit_seconds: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=3600)] = 1.0
    checkpoint_seconds: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=86400)] = 60.0
    mode: Literal["auto", "swmr", "flush"] = "auto"
