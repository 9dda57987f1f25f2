"""The experiment file: its schema, its validation, and the scenarios that its sweep stands for.

Importing this module costs neither torch nor MPI: `testbed check` runs on it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import yaml
from pydantic import Field

from testbed import sweep as sweeps
from testbed.attacks import Knowledge
from testbed.data import DATASETS, describe
from testbed.defenses import Defense, Stage
from testbed.errors import UserError, suggest
from testbed.models.catalog import MODELS
from testbed.results.schema import ACCUMULATED, ADAPTED
from testbed.sections import (
    AdversarySection,
    AttackSection,
    ComputeSection,
    DataSection,
    DefenseSection,
    FederationSection,
    LabelsSection,
    ModelSection,
    Natural,
    PartitionSection,
    PretrainingSection,
    ResultsSection,
    Section,
)

# More than one of them would undo, or be mistaken for, the other.
_ONCE = ("mixup", "randomised_response", "soteria", "withhold_last_layer", "dgc")


class Scenario(Section):
    """One point of the sweep."""

    seed: Natural = 0
    data: DataSection
    labels: LabelsSection = LabelsSection()
    partition: PartitionSection = PartitionSection()
    model: ModelSection
    pretraining: PretrainingSection = PretrainingSection()
    federation: FederationSection
    defenses: list[DefenseSection] = Field(default_factory=list)
    adversary: AdversarySection = AdversarySection()
    attacks: Annotated[list[AttackSection], Field(min_length=1)]

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Scenario":
        labels = [attack.label for attack in self.attacks]
        for label in labels:
            if label.endswith((ADAPTED, ACCUMULATED)):
                raise ValueError(
                    f"attacks: the label {label!r} ends like those of adapted attacks: choose "
                    "another one"
                )
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
        # Without a root: as far as they are known without the files.
        classes, _ = describe(self.data.name, None, self.data.variant)
        if classes is not None and self.adversary.auxiliary_missing >= classes:
            raise ValueError(
                f"adversary.auxiliary_missing: {self.adversary.auxiliary_missing} of {classes} "
                "classes; expected at least one class with samples"
            )
        others = describe(other[0], None)[0] if other[0] else None
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

    @pydantic.model_validator(mode="after")
    def _own_samples(self) -> "Scenario":
        kind, federation = self.partition.kind, self.federation
        if kind == "shared":
            if federation.local_epochs is not None:
                raise ValueError(
                    "federation.local_epochs: an epoch is a pass over a client's own samples, and "
                    "partition.kind is 'shared': set it to iid, dirichlet, shards or user, or set "
                    "federation.local_steps"
                )
        elif self.labels.distribution != "natural":
            raise ValueError(
                f"labels.distribution: with partition.kind {kind!r} a client's labels are those "
                f"of its own samples: set it to natural (found {self.labels.distribution!r})"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _defended(self) -> "Scenario":
        made = [section.make() for section in self.defenses]
        for earlier, later in pairwise(made):
            if later.stage < earlier.stage:
                order = ", ".join(stage.name.lower() for stage in Stage)
                raise ValueError(
                    f"defenses: {later.name!r} ({later.stage.name.lower()}) stands after "
                    f"{earlier.name!r} ({earlier.stage.name.lower()}); the order is: {order}"
                )
        for stage in (Stage.SAMPLES, Stage.QUANTISE, Stage.SUM):
            names = [one.name for one in made if one.stage is stage]
            if len(names) > 1:
                raise ValueError(
                    f"defenses: {' and '.join(names)} do not go together: at most one of them"
                )
        names = [one.name for one in made]
        for unfit, why in (
            ("mixup", "a sample that is mixed into another's row moves the sum by twice the bound"),
            ("soteria", "the columns that it leaves out tell of the samples without any noise"),
        ):
            if "dp_sgd" in names and unfit in names:
                raise ValueError(f"defenses: dp_sgd and {unfit} do not go together: {why}")
        for name in _ONCE:
            if names.count(name) > 1:
                raise ValueError(f"defenses: {name} stands there twice: expected it once")
        remembers = any(getattr(one, "error_feedback", False) for one in made)
        for one in made:
            if remembers and getattr(one, "factor", 1.0) != 1:
                raise ValueError(
                    f"defenses: {one.name}: error feedback keeps what is sent too much as well, "
                    "and values that are scaled up then grow from round to round: leave out "
                    "unbiased or rescale"
                )
        self._in_order_of_time(made)
        for one in made:
            if getattr(one, "error_feedback", False) and one.at == "step":
                raise ValueError(
                    f"defenses: {one.name}: error_feedback keeps what an update did not send: "
                    "set at: update"
                )
        if any(one.stage is Stage.SUM for one in made):
            self._summed()
        return self

    @staticmethod
    def _in_order_of_time(made: Sequence[Defense]) -> None:
        """Raise where what is done to each step is listed behind what is done to the update."""
        vectors = [one for one in made if one.stage in (Stage.CLIP, Stage.NOISE, Stage.SPARSIFY)]
        for earlier, later in pairwise(vectors):
            if earlier.at == "update" and later.at == "step":
                raise ValueError(
                    f"defenses: {later.name} is applied to each step, and stands after "
                    f"{earlier.name}, which is applied to the update: put it first, or set its "
                    "`at` to update"
                )

    def _summed(self) -> None:
        federation = self.federation
        if federation.clients < 2:
            raise ValueError(
                "defenses: secure_aggregation of one client hides nothing: set "
                "federation.clients to at least 2"
            )
        if federation.local_epochs is not None:
            raise ValueError(
                "defenses: secure_aggregation: attacks on a sum need clients with equally many "
                "local steps: set federation.local_steps in place of local_epochs"
            )


def _same_place(one: Path | None, other: Path | None) -> bool:
    """Return whether two roots are the same on disk, however they are written."""
    if one is None or other is None or one == other:
        return one == other
    try:
        return one.resolve() == other.resolve()
    except (OSError, RuntimeError):  # links that lead around in a circle
        return False


class Experiment(Scenario):
    """An experiment file."""

    title: str = "untitled"
    sweep: dict[str, Any] = Field(default_factory=dict)
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

    def roots(self) -> Iterator[tuple[str, Path]]:
        """Yield the places that data are read from, each once, with their keys."""
        yield from dict.fromkeys(
            (key, root) for key, name, root in self._data() if root and DATASETS[name].root
        )

    def require_data(self) -> None:
        """Raise `UserError` where a data set lacks its root: to run, not to check, needs one."""
        for key, name, root in self._data():
            wanted = DATASETS[name].root
            if wanted and root is None:
                raise UserError(
                    f"the data set {name!r} is read from a {wanted} of yours: "
                    f"set {key}={wanted.upper()}"
                )

    def _data(self) -> Iterator[tuple[str, str, Path | None]]:
        """Yield the data sets of all scenarios: the key of the root, the name, and the root."""
        for point in self.points:
            data, adversary = point.scenario.data, point.scenario.adversary
            yield "data.root", data.name, data.root
            if adversary.auxiliary_data:
                auxiliary = adversary.auxiliary_data, adversary.auxiliary_root
                yield "adversary.auxiliary_root", *auxiliary

    def to_yaml(self) -> str:
        """Return the experiment file, overrides applied and defaults filled in."""
        content = self.experiment.model_dump(mode="json")
        order = ["title", "seed", *(key for key in content if key not in ("title", "seed"))]
        return yaml.safe_dump({key: content[key] for key in order}, sort_keys=False)


def load_experiment(
    path: Path, overrides: Sequence[str] = (), profile: str | None = None
) -> ResolvedExperiment:
    """Read an experiment file.

    Parameters
    ----------
    path
        The YAML file.
    profile
        Name of one of its ``profiles``, whose dotted keys are set before the overrides.
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
        with path.open(encoding="utf-8") as file:
            # What is too long is refused behind this, and some files have no end.
            text = file.read(sweeps.MAX_LENGTH + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text file"
        raise UserError(f"{path}: cannot read the experiment file: {reason}") from None
    return parse_experiment(text, overrides, name=str(path), profile=profile)


def parse_experiment(
    text: str,
    overrides: Sequence[str] = (),
    name: str = "experiment",
    profile: str | None = None,
) -> ResolvedExperiment:
    """Read an experiment from YAML text; see `load_experiment`."""
    content = sweeps.parse_yaml(text, name)
    if not isinstance(content, dict):
        raise UserError(f"{name}: expected a mapping of keys, found {type(content).__name__}")
    content = _with_profile(content, profile, name)
    content = sweeps.apply_overrides(content, overrides)
    whole = {key for key in Experiment.model_fields if key not in Scenario.model_fields}

    # Values that a sweep supplies need not stand in the file as well: fill in its first point.
    variations = sweeps.expand(content.get("sweep") or {}, name, run_keys=whole)
    copied = len(variations) * sweeps.size(content)
    if copied > sweeps.MAX_COPIED:
        raise UserError(
            f"{name}: sweep: {len(variations)} scenarios of a file with {sweeps.size(content)} "
            f"values: at most {sweeps.MAX_COPIED} altogether are allowed: sweep less at a time"
        )
    filled = sweeps.set_keys(content, variations[0], f"{name}: sweep")
    experiment = _validate(Experiment, filled, name, "")
    points = []
    for variation in variations:
        raw = {key: value for key, value in content.items() if key not in whole}
        raw = sweeps.set_keys(raw, variation, f"{name}: sweep")
        where = f" (sweep: {sweeps.describe(variation)})" if variation else ""
        points.append(Point(variation, _validate(Scenario, raw, name, where)))
    return ResolvedExperiment(experiment, points)


def _with_profile(content: dict[str, Any], profile: str | None, name: str) -> dict[str, Any]:
    """Return the content without its profiles, with the keys of the chosen one set."""
    profiles = content.get("profiles") or {}
    content = {key: value for key, value in content.items() if key != "profiles"}
    if not isinstance(profiles, dict) or not all(isinstance(p, dict) for p in profiles.values()):
        raise UserError(f"{name}: profiles: expected a mapping of names to mappings of dotted keys")
    if profile is None:
        return content
    if profile not in profiles:
        known = suggest(profile, profiles) if profiles else "the file has none"
        raise UserError(f"{name}: unknown profile {profile!r}: {known}")
    return sweeps.override(content, profiles[profile], f"{name}: profiles.{profile}")


def _validate(schema: type[S], content: Mapping[str, Any], name: str, where: str) -> S:
    try:
        return schema.model_validate(content)
    except pydantic.ValidationError as error:
        lines = [f"{name}: {_explain(schema, item)}{where}" for item in error.errors()]
        raise UserError(*dict.fromkeys(lines)) from None


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
