"""From an experiment to scenarios, rounds, and the clients that each rank works for.

The plan is a function of the experiment and the number of workers alone. Every rank derives it for
itself, so the root sends models and receives updates without telling anyone what comes next.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from testbed.defenses import Defense, Stage
from testbed.experiment import ResolvedExperiment, Scenario
from testbed.seeds import Purpose, stream

# A model that takes at most this much for all workers together is sent to each of them.
_DIRECT_BYTES = 1 << 22
# Models of one scenario that are under way to clients at once take at most this much memory.
_MODELS_IN_FLIGHT_BYTES = 1 << 30


@dataclass(frozen=True)
class Task:
    """One client's work in one round; ``client`` is its place among the round's clients."""

    scenario: int
    round: int
    client: int


@dataclass(frozen=True)
class Participants:
    """Who takes part in a round.

    Attributes
    ----------
    identities
        The population's clients that were chosen, ascending: ``identities[c]`` is client c of the
        round.
    arriving
        Which clients of the round deliver an update; the others drop out.
    """

    identities: tuple[int, ...]
    arriving: tuple[int, ...]


@dataclass(frozen=True)
class ScenarioPlan:
    """The rounds of one scenario.

    A worker is a rank that computes for clients; workers are numbered from 0.

    Attributes
    ----------
    index
        Its number in the sweep.
    swept, scenario, observations
        Of the experiment.
    place
        Its number in this run, which may do a share of the scenarios; as in the sweep by default.
    twin
        The number on which its draws depend: that of the first scenario that differs in defences
        alone. These draw the same models, clients and batches, so that what differs between them
        is what the defences did. Its own by default.
    """

    index: int
    swept: Mapping[str, Any]
    scenario: Scenario
    observations: str
    place: int | None = None
    twin: int | None = None

    @property
    def draws(self) -> int:
        """The number that stands for the scenario in the keys of `testbed.seeds`."""
        return self.index if self.twin is None else self.twin

    @property
    def position(self) -> int:
        """Its number in this run's results file."""
        return self.index if self.place is None else self.place

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return self.scenario.federation.rounds

    @property
    def clients(self) -> int:
        """Number of clients in each round."""
        return self.scenario.federation.clients

    @property
    def population(self) -> int:
        """Number of clients altogether."""
        return self.scenario.federation.population or self.clients

    @cached_property
    def defenses(self) -> tuple[Defense, ...]:
        """What the clients do, in order."""
        return tuple(section.make() for section in self.scenario.defenses)

    @cached_property
    def summed(self) -> Defense | None:
        """The secure aggregation, where the server gets no single update."""
        return next((one for one in self.defenses if one.stage is Stage.SUM), None)

    @property
    def observed(self) -> int:
        """Updates that the server sees of a round: the clients', or the sum of the cohort."""
        return self.clients if self.summed is None else 1

    @cached_property
    def keeps_state(self) -> bool:
        """Whether clients remember something from round to round."""
        remembered = (
            getattr(one, "error_feedback", False) or getattr(one, "head", None) == "personal"
            for one in self.defenses
        )
        return not self.fresh_model and any(remembered)

    def participants(self, round_: int) -> Participants:
        """Return who takes part in a round."""
        federation = self.scenario.federation
        return _participants(
            self.scenario.seed,
            self.draws,
            round_,
            self.clients,
            self.population,
            federation.dropout,
        )

    @property
    def fresh_model(self) -> bool:
        """Whether every round is a repetition with a model of its own, which never steps."""
        return self.scenario.federation.fresh_model

    @property
    def pretraining_steps(self) -> int | None:
        """Steps of training before the first round, or None for no stage of a training."""
        return self.scenario.pretraining.steps

    @property
    def varying_steps(self) -> bool:
        """Whether clients differ in their number of local steps: their samples decide."""
        return self.scenario.federation.local_epochs is not None

    @property
    def local_steps(self) -> int | None:
        """Local steps behind one update, E; None where they vary."""
        return None if self.varying_steps else self.scenario.federation.local_steps or 1

    @property
    def labels_per_update(self) -> int | None:
        """Labels behind one client's update, N: batch size times local steps; None if they vary."""
        steps = self.local_steps
        return None if steps is None else self.scenario.federation.batch_size * steps

    @property
    def keeps_weights(self) -> bool:
        """Whether the file keeps the last layer's weight gradients and BatchNorm's statistics."""
        return self.observations in ("last_layer", "full")

    @property
    def keeps_updates(self) -> bool:
        """Whether the file keeps whole updates."""
        return self.observations == "full"

    def initial_key(self, round_: int) -> tuple[int, ...]:
        """Return what a round's initial model depends on, for `testbed.seeds`."""
        # Scenarios that attack stages of one training begin with the same models.
        return (self.draws, round_) if self.pretraining_steps is None else (round_,)

    def is_attacked(self, round_: int) -> bool:
        """Return whether the updates of this round are attacked."""
        return round_ % self.scenario.federation.attack_every == 0

    def is_evaluated(self, round_: int) -> bool:
        """Return whether the global model is evaluated before this round's step."""
        every = self.scenario.federation.evaluate_every
        return every > 0 and round_ % every == 0

    def worker(self, task: Task, workers: int) -> int:
        """Return the worker that computes for a client in a round.

        A client that keeps a state stays with its worker; else the round's clients are dealt out.
        Repetitions with models of their own are dealt out over the rounds, so that no worker waits.
        """
        if self.fresh_model:
            return (task.round * self.clients + task.client) % workers
        if self.keeps_state and self.population > self.clients:
            return self.home(self.participants(task.round).identities[task.client], workers)
        return task.client % workers

    def home(self, identity: int, workers: int) -> int:
        """Return the worker of a client that keeps a state, by its number in the population."""
        return identity % workers

    def round_tasks(self, round_: int) -> list[Task]:
        """Return the tasks of a round in the order in which their updates are taken in."""
        return [Task(self.index, round_, client) for client in self.participants(round_).arriving]

    def tasks(self, start: int = 0) -> Iterator[Task]:
        """Yield all tasks, from a round on, in the order in which their updates are taken in."""
        for round_ in range(start, self.rounds):
            yield from self.round_tasks(round_)

    def share(self, worker: int, workers: int, start: int = 0) -> Iterator[tuple[int, list[Task]]]:
        """Yield the rounds that need a worker, from ``start`` on, with the worker's tasks in each.

        Those of a sum by reduction need every worker: all of them take part in it. So does every
        round where clients keep a state, for which the root may ask at any round.
        """
        for round_ in range(start, self.rounds):
            tasks = self.round_tasks(round_)
            mine = [task for task in tasks if self.worker(task, workers) == worker]
            if mine or self.reduces or self.keeps_state:
                yield round_, mine

    @property
    def reduces(self) -> bool:
        """Whether a round's updates are added up by MPI's own reduction."""
        return getattr(self.summed, "protocol", "") == "reduction"

    def needed_by(self, round_: int, workers: int) -> list[int]:
        """Return the workers that need the model of a round, ascending."""
        if self.reduces or self.keeps_state:
            return list(range(workers))
        return sorted({self.worker(task, workers) for task in self.round_tasks(round_)})

    def broadcasts(self, workers: int, model_bytes: int) -> bool:
        """Return whether a round's model goes to all workers at once, rather than one by one.

        A broadcast hands a model on from rank to rank, which is the faster the larger the model
        and the more workers there are; a little data to few is there sooner without detours.
        """
        everyone = (
            self.reduces
            or self.keeps_state
            or (
                not self.fresh_model
                and self.clients >= workers
                and self.scenario.federation.dropout == 0
            )
        )
        return everyone and workers * model_bytes > _DIRECT_BYTES

    def in_flight(self, workers: int, model_bytes: int) -> int:
        """Return how many rounds may be under way at once.

        Training has one: the next model does not exist before the round is over. Repetitions are
        independent: enough of them for every worker to have one at hand and the next one queued.
        """
        if not self.fresh_model:
            return 1
        wanted = -(-2 * workers // self.clients)
        affordable = _MODELS_IN_FLIGHT_BYTES // max(model_bytes, 1)
        return max(1, min(wanted, affordable, self.rounds))

    def key(self, purpose: Purpose, task: Task) -> tuple[int, ...]:
        """Return what a draw for a client depends on, for `testbed.seeds`.

        The skew of a client's labels (the classes a and b of the unbalanced distribution) stays
        with the client in training; where every round is a repetition, its client is a new one.
        """
        if purpose is Purpose.SKEW and not self.fresh_model:
            return (self.draws, self.participants(task.round).identities[task.client])
        return (self.draws, task.round, task.client)


# Of one round many tasks ask in a row.
@lru_cache(maxsize=256)
def _participants(
    seed: int, scenario: int, round_: int, clients: int, population: int, dropout: float
) -> Participants:
    identities = tuple(range(clients))
    if population > clients:
        rng = stream(seed, Purpose.SAMPLING, scenario, round_)
        identities = tuple(np.sort(rng.choice(population, clients, replace=False)).tolist())
    arriving = tuple(range(clients))
    if dropout:
        rng = stream(seed, Purpose.DROPOUT, scenario, round_)
        arriving = tuple(np.flatnonzero(rng.random(clients) >= dropout).tolist())
    return Participants(identities, arriving)


def make_plan(
    resolved: ResolvedExperiment, share: tuple[int, int] = (0, 1)
) -> Sequence[ScenarioPlan]:
    """Return the plan of every scenario, in the order of the sweep.

    Parameters
    ----------
    resolved
        The experiment.
    share
        (i, n): every n-th scenario from number i on, for one of n runs that share an experiment.
        Each scenario's draws are those of a run that does them all.
    """
    observations = resolved.experiment.results.observations
    first: dict[str, int] = {}
    twins = [
        first.setdefault(
            point.scenario.model_copy(update={"defenses": []}).model_dump_json(), index
        )
        for index, point in enumerate(resolved.points)
    ]
    chosen = list(enumerate(resolved.points))[share[0] :: share[1]]
    return [
        ScenarioPlan(index, point.swept, point.scenario, observations, place, twins[index])
        for place, (index, point) in enumerate(chosen)
    ]
