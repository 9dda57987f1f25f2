"""From an experiment to scenarios, rounds, and the clients that each rank works for.

The plan is a function of the experiment and the number of workers alone. Every rank derives it for
itself, so the root sends models and receives updates without telling anyone what comes next.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from testbed.experiment import ResolvedExperiment, Scenario
from testbed.seeds import Purpose

# A model that takes at most this much for all workers together is sent to each of them.
_DIRECT_BYTES = 1 << 22
# Models of one scenario that are under way to clients at once take at most this much memory.
_MODELS_IN_FLIGHT_BYTES = 1 << 30


@dataclass(frozen=True)
class Task:
    """One client's work in one round."""

    scenario: int
    round: int
    client: int


@dataclass(frozen=True)
class ScenarioPlan:
    """The rounds of one scenario.

    A worker is a rank that computes for clients; workers are numbered from 0.
    """

    index: int
    swept: Mapping[str, Any]
    scenario: Scenario
    observations: str

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return self.scenario.federation.rounds

    @property
    def clients(self) -> int:
        """Number of clients in each round."""
        return self.scenario.federation.clients

    @property
    def fresh_model(self) -> bool:
        """Whether every round is a repetition with a model of its own, which never steps."""
        return self.scenario.federation.fresh_model

    @property
    def pretraining_steps(self) -> int | None:
        """Steps of training before the first round, or None for no stage of a training."""
        return self.scenario.pretraining.steps

    @property
    def labels_per_update(self) -> int:
        """Labels behind one update, N: batch size times local steps."""
        return self.scenario.federation.batch_size * self.local_steps

    @property
    def local_steps(self) -> int:
        """Local steps behind one update, E."""
        return 1

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
        return (self.index, round_) if self.pretraining_steps is None else (round_,)

    def is_attacked(self, round_: int) -> bool:
        """Return whether the updates of this round are attacked."""
        return round_ % self.scenario.federation.attack_every == 0

    def is_evaluated(self, round_: int) -> bool:
        """Return whether the global model is evaluated before this round's step."""
        every = self.scenario.federation.evaluate_every
        return every > 0 and round_ % every == 0

    def worker(self, task: Task, workers: int) -> int:
        """Return the worker that computes for a client in a round.

        In training a client stays with its worker. Repetitions with models of their own are dealt
        out one client after the other, over the rounds, so that no worker waits.
        """
        if self.fresh_model:
            return (task.round * self.clients + task.client) % workers
        return task.client % workers

    def tasks(self) -> Iterator[Task]:
        """Yield all tasks in the order in which their updates are taken in."""
        for round_ in range(self.rounds):
            for client in range(self.clients):
                yield Task(self.index, round_, client)

    def share(self, worker: int, workers: int) -> Iterator[tuple[int, list[Task]]]:
        """Yield the rounds that need a worker, each with the worker's tasks in it."""
        for round_ in range(self.rounds):
            # The inverse of `worker`.
            first = (worker - round_ * self.clients * self.fresh_model) % workers
            mine = range(first, self.clients, workers)
            if mine:
                yield round_, [Task(self.index, round_, client) for client in mine]

    def needed_by(self, round_: int, workers: int) -> list[int]:
        """Return the workers that have a task in a round, ascending."""
        first = Task(self.index, round_, 0)
        if self.clients >= workers:
            return list(range(workers))
        start = self.worker(first, workers)
        return sorted((start + client) % workers for client in range(self.clients))

    def broadcasts(self, workers: int, model_bytes: int) -> bool:
        """Return whether a round's model goes to all workers at once, rather than one by one.

        A broadcast hands a model on from rank to rank, which is the faster the larger the model
        and the more workers there are; a little data to few is there sooner without detours.
        """
        everyone = not self.fresh_model and self.clients >= workers
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
            return (task.scenario, task.client)
        return (task.scenario, task.round, task.client)


def make_plan(resolved: ResolvedExperiment) -> Sequence[ScenarioPlan]:
    """Return the plan of every scenario, in the order of the sweep."""
    return [
        ScenarioPlan(index, point.swept, point.scenario, resolved.experiment.results.observations)
        for index, point in enumerate(resolved.points)
    ]
