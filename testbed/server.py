"""The root: the round loop of a scenario, and aggregation."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from testbed.attacking import RoundAttacks
from testbed.attacks.adversary import GlobalModel
from testbed.attacks.assumptions import Facts
from testbed.checkpoint import ScenarioState
from testbed.data.batches import steps_of
from testbed.failure import Position
from testbed.local_training import local_optimizer
from testbed.models.norms import Norms, statistics_length
from testbed.plan import ScenarioPlan
from testbed.results.writer import ResultsWriter
from testbed.round import Round, is_finite
from testbed.server_optimizer import make_server_optimizer
from testbed.startup import ScenarioSetup
from testbed.summing import CohortSum
from testbed.transport.base import Downlink
from testbed.update import Message


class Checkpoint(Protocol):
    """Where a scenario's state is saved."""

    @property
    def stopping(self) -> bool:
        """Whether somebody has asked for the end of the run."""

    def due(self) -> bool:
        """Return whether to save."""

    def write(self, scenario: int, state: ScenarioState) -> None:
        """Save the state of a scenario, by its number in the results file."""

    def stop_if_asked(self) -> None:
        """End the run here, by an exception, if somebody has asked for that."""


class ScenarioServer:
    """Runs the rounds of one scenario on the root.

    Parameters
    ----------
    plan
        The scenario's rounds.
    setup
        Its model, data and attacks.
    workers
        How many workers there are.
    writer
        Of the results file. Rounds that it has are gone through for what later ones need of them,
        and neither attacked nor written again.
    initial
        Returns a round's model where it is a stage of a training, else None.
    checkpoint
        Says whether it is time for one (asked between two rounds), and saves a state.

    Attributes
    ----------
    number
        The next round. After `RanksLost`, `rounds` goes on with it; but not where clients keep
        states, which are lost with a rank and have to be restored everywhere.
    """

    def __init__(
        self,
        plan: ScenarioPlan,
        setup: ScenarioSetup,
        workers: int,
        writer: ResultsWriter,
        initial: Callable[[int], NDArray[np.float32] | None] = lambda _: None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self._plan = plan
        self._setup = setup
        self._layout = setup.layout
        self._writer = writer
        self._initial = initial
        self._checkpoint = checkpoint
        federation = plan.scenario.federation
        self._adversary = GlobalModel(
            setup.model,
            setup.auxiliary(),
            setup.samples.shape,
            local_steps=plan.local_steps or 1,
            learning_rate=federation.learning_rate,
            training=local_optimizer(federation),
            frozen_norms=federation.batch_norm == "frozen",
        )
        self._attacks = RoundAttacks(plan, setup, self._adversary, scenario_facts(plan, setup))
        size = setup.layout.size
        self._window = plan.in_flight(workers, 4 * size)
        # The models under way, and the one that is attacked meanwhile.
        self._models = np.empty((self._window + 1, size), np.float32)
        self._aggregate = torch.zeros(size)
        self._unpacked = np.empty(size if setup.pipeline.compresses else 0, np.float32)
        section = federation.server
        self._optimizer = make_server_optimizer(
            section.optimizer,
            learning_rate=section.learning_rate,
            momentum=section.momentum,
            beta1=section.beta1,
            beta2=section.beta2,
            epsilon=section.epsilon,
            size=setup.layout.parameters,
        )
        self.number = 0
        self._published = 0
        # Rounds before which the workers send the states of their clients.
        self._wanted: set[int] = set()
        self._publish_seconds = self._write_seconds = 0.0

    def restore(self, state: ScenarioState) -> None:
        """Go on from a checkpoint; before `rounds`.

        Raises
        ------
        ValueError
            It is of another scenario.
        """
        if state.model.shape != (self._layout.size,) or state.round > self._plan.rounds:
            raise ValueError(f"a model of {len(state.model)} values in round {state.round}")
        self._optimizer.restore(state.optimizer)
        self._attacks.restore(state.accumulated)
        self.number = state.round
        self._slot(state.round)[:] = state.model

    def skip(self, number: int) -> None:
        """Begin with a later round; only where every round has a model of its own."""
        assert self._plan.fresh_model
        self.number = number

    def rounds(self, downlink: Downlink, position: Position) -> Iterator[int]:
        """Run the scenario; yield the number of each round when it is done, recorded before or now.

        Parameters
        ----------
        downlink
            To the workers, which begin with the same round.
        position
            Is kept up to date, for the report of a failure.
        """
        self._downlink = downlink
        position.scenario = self._plan.index
        self._published = self.number  # whatever was under way before has been lost
        self._wanted.clear()
        self._publish_until(self.number + self._window)
        while self.number < self._plan.rounds:
            number = position.round = self.number
            self._save(number)
            record = self._collect(number)
            # Before the attacks, so that they work while the clients compute.
            self._publish_until(number + 1 + self._window)
            record.clock.seconds["publish"], self._publish_seconds = self._publish_seconds, 0.0
            self._attacks.take(record)
            recorded = number < self._writer.recorded(self._plan.position)
            if not recorded:
                self._record(number, record)
            # What was observed is not to be held while the next round's updates come in.
            del record
            self.number = number + 1
            yield number

    def _record(self, number: int, record: Round) -> None:
        """Attack and evaluate, and hand everything to the writer."""
        rows: dict[str, Any] = {}
        if self._plan.is_attacked(number):
            rows = self._attacks.run(number, record, self._slot(number))
        rows |= self._evaluate(number, record)
        record.clock.seconds["write"], self._write_seconds = self._write_seconds, 0.0
        started = time.perf_counter()
        self._writer.append(self._plan.position, number, rows | record.measured())
        self._write_seconds += time.perf_counter() - started

    def _save(self, number: int) -> None:
        """Save what this round depends on, if it is time."""
        if self._checkpoint is None:
            return
        if self._plan.fresh_model:
            due = self._checkpoint.stopping
        elif self._plan.keeps_state:
            due = number in self._wanted
        else:
            due = self._checkpoint.due()
        if not due:
            return
        started = time.perf_counter()
        self._writer.commit()
        if not self._plan.fresh_model:
            state = ScenarioState(
                round=number,
                model=self._slot(number),
                optimizer=self._optimizer.state(),
                accumulated=self._attacks.state(),
                clients=self._downlink.states() if self._plan.keeps_state else {},
            )
            self._checkpoint.write(self._plan.position, state)
        self._write_seconds += time.perf_counter() - started
        self._checkpoint.stop_if_asked()

    def _slot(self, number: int) -> NDArray[np.float32]:
        model: NDArray[np.float32] = self._models[number % len(self._models)]
        return model

    def _publish_until(self, stop: int) -> None:
        started = time.perf_counter()
        for number in range(self._published, min(stop, self._plan.rounds)):
            model = self._slot(number)
            if number == 0 or self._plan.fresh_model:
                trained = self._initial(number)
                if trained is None:
                    key = self._plan.initial_key(number)
                    self._setup.initialise(torch.from_numpy(model), key)
                else:
                    model[:] = trained
            if self._plan.keeps_state and self._checkpoint is not None and self._checkpoint.due():
                self._wanted.add(number)
            self._downlink.publish(number, model, wants_states=number in self._wanted)
            self._published = number + 1
        self._publish_seconds += time.perf_counter() - started

    def _collect(self, number: int) -> Round:
        """Receive a round's updates in client order, and step the global model."""
        attacked = self._plan.is_attacked(number) or self._attacks.needs_every_round
        record = Round(
            self._plan,
            self._layout,
            number,
            keep_weights=self._attacks.needs_weights and attacked,
            # Sums over rounds are of the last layer alone.
            keep_updates=self._attacks.needs_updates and self._plan.is_attacked(number),
        )
        self._aggregate.zero_()
        if self._plan.summed is not None:
            weight = self._collect_sum(number, record)
        else:
            weight = self._collect_updates(number, record)
        if not self._plan.fresh_model and number + 1 < self._plan.rounds:
            with record.clock.phase("aggregate"):
                self._step(number, weight)
        return record

    def _collect_updates(self, number: int, record: Round) -> float:
        """Add up the updates, each as it comes; return their weight."""
        total = 0.0
        for task in self._plan.round_tasks(number):
            with record.clock.phase("wait"):
                message = self._downlink.receive(task)
            with record.clock.phase("aggregate"):
                record.note(task.client, message)
                record.tell(task.client, message)
                payload = self._plain(number, message)
                finite = record.observe(task.client, payload, self._layout)
                record.finite[task.client] = finite
                if finite and not self._plan.fresh_model:
                    weight = float(message.header["weight"])
                    self._aggregate.add_(torch.from_numpy(payload), alpha=weight)
                    total += weight
        return total

    def _plain(self, number: int, message: Message) -> NDArray[np.float32]:
        """Return an update [P + S] as the server understands it."""
        stop, payload = self._setup.shared, self._unpacked
        if self._setup.pipeline.compresses:
            used = int(message.header["payload_bytes"])
            self._setup.pipeline.unpack(message.body[:used], payload[:stop])
        else:
            payload = message.payload
        # Buffers that are not shared are those that went out.
        payload[stop:] = self._slot(number)[stop:]
        return payload

    def _collect_sum(self, number: int, record: Round) -> float:
        """Receive the cohort's sum alone; return its weight, 0 for a round that is lost."""
        cohort = CohortSum(self._plan, self._setup.shared, self._setup.weigh, number)
        truth = CohortTruth(self._layout.classes)
        for task in self._plan.round_tasks(number):
            with record.clock.phase("wait"):
                message = self._downlink.receive(task)
            with record.clock.phase("aggregate"):
                record.note(task.client, message)
                record.bytes_on_wire[task.client] += cohort.bytes_in_reduction
                record.finite[task.client] = bool(message.header["weight"])
                cohort.add(task.client, message)
                truth.add(message)
        with record.clock.phase("aggregate"):
            shared = cohort.finish(self._downlink)
            if shared is None:
                return 0.0
            truth.tell(record)
            mean = np.concatenate([shared, self._slot(number)[len(shared) :]])
            if not record.observe(0, mean, self._layout):
                return 0.0
            self._aggregate.copy_(torch.from_numpy(mean)).mul_(cohort.weight)
        return float(cohort.weight)

    def _step(self, number: int, weight: float) -> None:
        """Make the next global model: the optimiser's step, and the clients' mean buffers."""
        split = self._layout.parameters
        before, after = self._slot(number), self._slot(number + 1)
        if weight == 0:
            after[:] = before
            return
        federation = self._plan.scenario.federation
        self._aggregate.div_(weight)
        mean = self._aggregate.numpy()
        if not is_finite(mean):  # each was, and their sum is not
            after[:] = before
            return
        after[split:] = mean[split:] if federation.shares_statistics else before[split:]
        mean[:split] *= np.float32(federation.learning_rate)
        self._optimizer.step(before[:split], mean[:split], after[:split])

    def _evaluate(self, number: int, record: Round) -> dict[str, Any]:
        if not self._plan.is_evaluated(number):
            return {}
        withheld = self._setup.pipeline.withheld
        if self._plan.keeps_state and withheld is not None and withheld.head == "personal":
            # Clients keep a part of the model: theirs is what can be used.
            personal = record.accuracy[np.isfinite(record.accuracy)]
            return {"rounds/accuracy": personal.mean()} if len(personal) else {}
        with record.clock.phase("evaluate"):
            seed = self._plan.scenario.seed
            self._adversary.enter(self._slot(number), seed, (self._plan.draws, number))
            accuracy = self._adversary.accuracy(
                self._setup.samples,
                self._setup.parts.test,
                normalised_by_batch=self._plan.scenario.federation.batch_norm == "local",
            )
            return {"rounds/accuracy": accuracy}


class CohortTruth:
    """The truth behind a cohort's sum: all labels that are in it, and their mean posterior."""

    def __init__(self, classes: int) -> None:
        self._counts = np.zeros(classes, np.int64)
        self._posterior = np.zeros(classes)
        self._labels = 0
        self._steps = 1

    def add(self, message: Message) -> None:
        """Add a client's truth, if its update is in the sum."""
        if message.header["weight"] == 0:
            return
        labels = int(message.header["labels"])
        self._counts += message.counts
        self._posterior += labels * message.posterior.astype(np.float64)
        self._labels += labels
        self._steps = int(message.header["steps"])

    def tell(self, record: Round) -> None:
        """Enter the truth into the record."""
        record.counts[0] = self._counts
        record.posterior[0] = self._posterior / self._labels
        record.labels[0] = self._labels
        record.steps[0] = self._steps


def scenario_facts(
    plan: ScenarioPlan, setup: ScenarioSetup, lowest_feature: float | None = None
) -> Facts:
    """Return what of a scenario decides about the attacks' assumptions."""
    scenario, layout = plan.scenario, setup.layout
    statistics = statistics_length(setup.model.module)
    adversary, federation = scenario.adversary, scenario.federation
    return Facts(
        classes=layout.classes,
        features=layout.features,
        bias=layout.bias is not None,
        statistics=statistics if federation.shares_statistics else 0,
        batch_size=federation.batch_size * (1 if plan.summed is None else plan.clients),
        local_steps=_usual_steps(plan, setup),
        known_size=adversary.knows_size,
        fair_samples=adversary.has_fair_samples,
        statistics_noise=federation.statistics_noise,
        undoable=not statistics or Norms(setup.model, setup.samples.shape).undoable,
        lowest_feature=lowest_feature,
        withheld=setup.pipeline.withheld is not None,
    )


def _usual_steps(plan: ScenarioPlan, setup: ScenarioSetup) -> int:
    """Return the local steps of every client, or of the one in the middle."""
    if plan.local_steps is not None:
        return plan.local_steps
    assert setup.partition is not None
    federation = plan.scenario.federation
    middle = int(np.median([len(own) for own in setup.partition.indices]))
    return steps_of(middle, federation.batch_size, federation.local_epochs or 1)
