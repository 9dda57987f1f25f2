"""The experiment file: its schema, its validation, and the scenarios that its sweep stands for.

Importing this module costs neither torch nor MPI: `testbed check` runs on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import BeforeValidator, ConfigDict, Field

from testbed import sweep as sweeps
from testbed.attacks import Attack, Knowledge, make_attack
from testbed.data import DATASETS
from testbed.errors import UserError, suggest
from testbed.models.catalog import ACTIVATIONS, MODELS


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a number, not yes or no")
    return value


# Numbers of rounds and clients travel in 32 bits.
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, lt=2**31)]
Natural = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, allow_inf_nan=False)]


class _Section(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class DataSection(_Section):
    """Which data, and how they are divided among victims, adversary and test."""

    name: str
    root: Path | None = None
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
        return root.expanduser() if root is not None else None


class LabelsSection(_Section):
    """How the labels of a client's batch are distributed (Wainakh et al. 2022, section 5)."""

    distribution: Literal["balanced", "unbalanced", "natural"] = "balanced"


class ModelSection(_Section):
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


class PretrainingSection(_Section):
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


class AdversarySection(_Section):
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
    """

    batch_size: Literal["known", "estimated"] = "known"
    batch_size_factor: Annotated[
        float, BeforeValidator(_no_bool), Field(gt=0, le=1000, allow_inf_nan=False)
    ] = 1.0
    auxiliary_noise: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=100)] = 0.0
    auxiliary_missing: Natural = 0
    auxiliary_data: str | None = None
    auxiliary_root: Path | None = None

    @pydantic.field_validator("auxiliary_data")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in DATASETS:
            raise ValueError(suggest(name, DATASETS))
        return name

    @pydantic.field_validator("auxiliary_root")
    @classmethod
    def _home(cls, root: Path | None) -> Path | None:
        return root.expanduser() if root is not None else None

    @property
    def knows_size(self) -> bool:
        """Whether it knows the batch size."""
        return self.batch_size == "known" and self.batch_size_factor == 1

    @property
    def has_fair_samples(self) -> bool:
        """Whether its samples are the victims' kind, and of every class."""
        shifted = self.auxiliary_noise or self.auxiliary_missing or self.auxiliary_data
        return not shifted


class FederationSection(_Section):
    """The rounds.

    Attributes
    ----------
    share_statistics
        Whether clients share BatchNorm's statistics; if not, each sends back those it received.
    statistics_noise
        Noise on shared statistics, in multiples of their own scale: means get Gaussian noise of
        that many standard deviations of their channel, variances that much relative noise.
    """

    algorithm: Literal["fedsgd"] = "fedsgd"
    fresh_model: bool = False
    rounds: Count
    clients: Count = 1
    batch_size: Count
    learning_rate: Positive = 0.1
    attack_every: Count = 1
    evaluate_every: Natural = 0
    share_statistics: bool = True
    statistics_noise: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=100)] = 0.0

    @pydantic.model_validator(mode="after")
    def _noise_is_shared(self) -> "FederationSection":
        if self.statistics_noise and not self.share_statistics:
            raise ValueError(
                "federation.statistics_noise is of no use where share_statistics is false: "
                "statistics that are not shared get no noise"
            )
        return self


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


class ComputeSection(_Section):
    """Where the clients compute. Results do not depend on it, but for the device's arithmetic."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count = 1
    receive_buffers: Annotated[int, BeforeValidator(_no_bool), Field(ge=2, le=4096)] = 16


class ResultsSection(_Section):
    """What the results file keeps, and how often it is committed."""

    observations: Literal["summary", "last_layer", "full"] = "summary"
    commit_seconds: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=3600)] = 1.0


class Scenario(_Section):
    """One point of the sweep."""

    seed: Natural = 0
    data: DataSection
    labels: LabelsSection = LabelsSection()
    model: ModelSection
    pretraining: PretrainingSection = PretrainingSection()
    federation: FederationSection
    adversary: AdversarySection = AdversarySection()
    attacks: Annotated[list[AttackSection], Field(min_length=1)]

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Scenario":
        labels = [attack.label for attack in self.attacks]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(
                f"attacks: {twice[0]!r} stands there twice: give each a `label` of its own"
            )
        other = (self.adversary.auxiliary_data, self.adversary.auxiliary_root)
        if other[0] is not None and other[1] is not None and not DATASETS[other[0]].root:
            raise ValueError(
                f"adversary.auxiliary_root: the data set {other[0]!r} reads no files: leave it out"
            )
        if other[0] == self.data.name and _same_place(other[1], self.data.root):
            raise ValueError(
                "adversary.auxiliary_data is the victims' data set, of which the server has the "
                "auxiliary part anyway: name another one"
            )
        if other[0] is None and other[1] is not None:
            raise ValueError("adversary.auxiliary_root is of no use without auxiliary_data")
        if self.data.auxiliary_per_class == 0:
            for attack in self.attacks:
                if attack.make().knowledge is Knowledge.AUXILIARY:
                    raise ValueError(
                        f"the attack {attack.label!r} needs auxiliary samples: "
                        "data.auxiliary_per_class is 0, expected at least 1"
                    )
        classes = DATASETS[self.data.name].classes
        if classes is not None and self.adversary.auxiliary_missing >= classes:
            raise ValueError(
                f"adversary.auxiliary_missing: {self.adversary.auxiliary_missing} of {classes} "
                "classes; expected at least one class with samples"
            )
        others = DATASETS[other[0]].classes if other[0] else None
        if classes is not None and others is not None and classes != others:
            raise ValueError(
                f"adversary.auxiliary_data: {other[0]!r} has {others} classes, {self.data.name!r} "
                f"has {classes}: expected a data set with the same classes"
            )
        info, shape = MODELS.get(self.model.name), DATASETS[self.data.name].shape
        if info and shape and min(shape[1:]) < info.min_size:
            raise ValueError(
                f"model {self.model.name!r} needs images of at least "
                f"{info.min_size}x{info.min_size}, those of {self.data.name!r} "
                f"are {shape[1]}x{shape[2]}: choose another model or data set"
            )
        return self


def _same_place(one: Path | None, other: Path | None) -> bool:
    """Return whether two roots are the same on disk, however they are written."""
    return one == other or (
        one is not None and other is not None and one.resolve() == other.resolve()
    )


class Experiment(Scenario):
    """An experiment file."""

    title: str = "untitled"
    sweep: dict[str, Any] = {}
    compute: ComputeSection = ComputeSection()
    results: ResultsSection = ResultsSection()

    @pydantic.field_validator("title")
    @classmethod
    def _printable(cls, title: str) -> str:
        # HDF5 stores no NUL and no lone surrogate, and reports give a title one line.
        if not title.isprintable():
            raise ValueError("expected one line of printable text")
        return title


S = TypeVar("S", bound=Scenario)


@dataclass(frozen=True)
class Point:
    """A scenario, and the values of the swept keys that single it out."""

    swept: Mapping[str, Any]
    scenario: Scenario


@dataclass(frozen=True)
class ResolvedExperiment:
    """An experiment whose every scenario has been validated."""

    experiment: Experiment
    points: Sequence[Point]

    def require_data(self) -> None:
        """Raise `UserError` where a data set lacks its root: to run, not to check, needs one."""
        for point in self.points:
            data, adversary = point.scenario.data, point.scenario.adversary
            for name, root, key in (
                (data.name, data.root, "data.root"),
                (adversary.auxiliary_data, adversary.auxiliary_root, "adversary.auxiliary_root"),
            ):
                wanted = DATASETS[name].root if name else None
                if wanted and root is None:
                    raise UserError(
                        f"the data set {name!r} is read from a {wanted} of yours: "
                        f"set {key}={wanted.upper()}"
                    )

    def to_yaml(self) -> str:
        """Return the experiment file, overrides applied and defaults filled in."""
        content = self.experiment.model_dump(mode="json")
        order = ["title", "seed", *(key for key in content if key not in ("title", "seed"))]
        return yaml.safe_dump({key: content[key] for key in order}, sort_keys=False)


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> ResolvedExperiment:
    """Read an experiment file.

    Parameters
    ----------
    path
        The YAML file.
    overrides
        ``key=value`` with dotted keys and YAML values; an override of a swept key takes the key
        out of the sweep, and ``sweep.KEY=[...]`` sweeps it.

    Raises
    ------
    UserError
        The file cannot be read, or holds an unknown key or a value out of range. The message
        names the file, each such key, what was found and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text file"
        raise UserError(f"{path}: cannot read the experiment file: {reason}") from None
    return parse_experiment(text, overrides, name=str(path))


def parse_experiment(
    text: str, overrides: Sequence[str] = (), name: str = "experiment"
) -> ResolvedExperiment:
    """Read an experiment from YAML text; see `load_experiment`."""
    content = sweeps.parse_yaml(text, name)
    if not isinstance(content, dict):
        raise UserError(f"{name}: expected a mapping of keys, found {type(content).__name__}")
    content = sweeps.apply_overrides(content, overrides)
    whole = {key for key in Experiment.model_fields if key not in Scenario.model_fields}

    # Values that a sweep supplies need not stand in the file as well: fill in its first point.
    variations = sweeps.expand(content.get("sweep") or {}, name, run_keys=whole)
    filled = sweeps.set_keys(content, variations[0], f"{name}: sweep")
    experiment = _validate(Experiment, filled, name, "")
    points = []
    for variation in variations:
        raw = {key: value for key, value in content.items() if key not in whole}
        raw = sweeps.set_keys(raw, variation, f"{name}: sweep")
        where = f" (sweep: {sweeps.describe(variation)})" if variation else ""
        points.append(Point(variation, _validate(Scenario, raw, name, where)))
    return ResolvedExperiment(experiment, points)


def _validate(schema: type[S], content: Mapping[str, Any], name: str, where: str) -> S:
    try:
        return schema.model_validate(content)
    except pydantic.ValidationError as error:
        lines = [f"{name}: {_explain(schema, item)}{where}" for item in error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def _explain(schema: type[pydantic.BaseModel], error: Any) -> str:
    """Turn one of pydantic's errors into: key, what was found, what was expected."""
    location = error["loc"]
    key = ".".join(str(part) for part in location)
    kind, found = error["type"], error["input"]
    if kind == "extra_forbidden":
        known = _fields(schema, location[:-1])
        return f"{key}: unknown key {location[-1]!r}: {suggest(str(location[-1]), known)}"
    if kind == "missing":
        return f"{key}: this key is missing"
    if kind == "literal_error":
        allowed = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{key}: found {found!r}: {suggest(str(found), allowed)}"
    message = error["msg"].removeprefix("Value error, ")
    if kind in ("model_type", "dict_type"):
        message = "expected a mapping of keys"
    if isinstance(found, (dict, list)) or not location:
        return f"{key}: {message}" if key else message
    return f"{key}: found {found!r}: {message[0].lower()}{message[1:]}"


def _fields(schema: type[pydantic.BaseModel], location: Sequence[Any]) -> list[str]:
    for part in location:
        field = schema.model_fields[str(part)]
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, pydantic.BaseModel)
        schema = field.annotation
    return list(schema.model_fields)
