"""What is written to a results file before its rounds and beside them, and read back from it."""

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from testbed.results.schema import ArraySpec


def now() -> str:
    """Return the time: ISO 8601, UTC, in seconds."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Rank:
    """Where a rank computed.

    Attributes
    ----------
    rank, local_rank
        In the world, and on its host.
    host
        Host name.
    device
        ``cpu`` or ``cuda:N NAME``.
    role
        ``server``, ``client`` or ``server+client``.
    cores
        The CPUs of the host that it may run on, as in ``0-3,8``. Empty where that is not known, as
        before version 1.4.
    gpu
        What tells its GPU from all others, whatever numbers the ranks give it. Empty on a CPU, and
        where that is not known.
    """

    rank: int
    host: str
    device: str
    role: str
    local_rank: int
    cores: str = ""
    gpu: str = ""


@dataclass(frozen=True)
class AttackInfo:
    """What an attack was.

    Attributes
    ----------
    name, title, source
        As registered; ``source`` names the publication.
    knowledge
        ``gradients``, ``model``, ``auxiliary``, ``malicious`` or ``truth``.
    options
        Its knobs.
    answers
        ``counts``, ``presence`` or ``distribution``: the name of the array with its answers.
    observes, assumes
        The parts of an update that it looks at, and what it takes for granted.
    broken
        Those of its assumptions that the scenario breaks, and what was found instead.
    not_applicable
        Why it was not run in this scenario; empty where it was.
    target
        Which truth its answers are about: the ``update``'s own labels, or those ``accumulated``
        over all updates of the client so far.
    adapted, adaptation
        Label of the plain attack that it is, as run by someone who knows the defences, and what
        that one does about each; both empty for a plain attack.
    """

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
    attacks: Mapping[str, AttackInfo]
    privacy: Mapping[str, Any] = field(default_factory=dict)
    number: int | None = None
    draws: int | None = None


@dataclass(frozen=True)
class Start:
    """One start of the run: the first, or one that went on with the file.

    Attributes
    ----------
    time
        ISO 8601, UTC.
    ranks
        Size of the world.
    hosts
        Their names, separated by commas.
    library
        The MPI library; empty for a run without MPI.
    software
        Versions, as JSON; cut off where it was too long.
    command, slurm_job
        The command line, and the number of the job; empty outside Slurm.
    committed
        Rounds of all scenarios that were there already.
    """

    time: str
    ranks: int
    hosts: str
    library: str
    software: str
    command: str
    slurm_job: str
    committed: int


@dataclass(frozen=True)
class Loss:
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
    start
        During which start of the run, from 0; the writer of the file knows.
    """

    rank: int
    host: str
    reason: str
    scenario: int
    round: int
    seconds: float
    time: str = field(default_factory=now)
    start: int = 0
