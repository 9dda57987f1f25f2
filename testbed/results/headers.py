"""What a writer of results files is told before the first round, and of ranks that are lost."""

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from testbed.results.schema import ArraySpec


@dataclass(frozen=True)
class AttackHeader:
    """The attributes of an attack's group."""

    name: str
    title: str
    knowledge: str
    source: str
    options: Mapping[str, Any]
    answers: str = "counts"
    observes: Sequence[str] = ()
    assumes: Sequence[str] = ()
    broken: Mapping[str, str] = field(default_factory=dict)
    not_applicable: str = ""
    target: str = "update"
    adapted: str = ""
    adaptation: Sequence[str] = ()


@dataclass(frozen=True)
class ScenarioHeader:
    """What is known of a scenario before its first round."""

    swept: Mapping[str, Any]
    parameters: Mapping[str, Any]
    model_parameters: int
    model_buffers: int
    last_layer: str
    lengths: Mapping[str, int]
    arrays: Mapping[str, ArraySpec]
    attacks: Mapping[str, AttackHeader]
    privacy: Mapping[str, Any] = field(default_factory=dict)
    number: int | None = None
    draws: int | None = None


@dataclass(frozen=True)
class RankHeader:
    """Where a rank computes; see `testbed.results.reader.Rank`."""

    host: str
    device: str
    role: str
    local_rank: int
    cores: str = ""
    gpu: str = ""


def now() -> str:
    """Return the time: ISO 8601, UTC, in seconds."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class LossRecord:
    """A rank that was lost while the run went on.

    Attributes
    ----------
    rank
        Its number in the world as it was at the start.
    host
        Where it was.
    reason
        ``killed`` or ``stuck``.
    scenario, round
        Where the run was: number of the scenario in the file, and of the round.
    seconds
        From the moment when the root noticed until the round went on.
    time
        When it was noticed: ISO 8601, UTC.
    """

    rank: int
    host: str
    reason: str
    scenario: int
    round: int
    seconds: float
    time: str = field(default_factory=now)
