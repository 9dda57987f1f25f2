"""The root: the round loop of a scenario, aggregation, and the attacks on every update."""

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from testbed.attacks.adversary import GlobalModel
from testbed.attacks.assumptions import Facts, not_applicable
from testbed.attacks.base import Attack, Observations, Observed
from testbed.attacks.batch_size import estimate_labels
from testbed.attacks.checks import check_calibration
from testbed.attacks.inference import infer_in_chunks
from testbed.attacks.restricted import RestrictedAdversary
from testbed.failure import Position
from testbed.models.norms import Norms, statistics_length
from testbed.plan import ScenarioPlan, Task
from testbed.results.schema import PHASES
from testbed.results.writer import ResultsWriter
from testbed.seeds import Purpose, seed64
from testbed.startup import ScenarioSetup
from testbed.transport.base import Downlink
from testbed.update import Message, UpdateLayout

_LARGEST = float(np.finfo(np.float32).max)


class Clock:
    """Adds up the seconds that each phase of a round takes on the root."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time in the block towards a phase."""
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started


class Round:
    """What the root keeps of one round: no update as a whole, only what the attacks look at."""

    def __init__(
        self,
        plan: ScenarioPlan,
        layout: UpdateLayout,
        *,
        keep_weights: bool = False,
        keep_updates: bool = False,
    ) -> None:
        clients, classes = plan.clients, layout.classes
        self.clock = Clock()
        self.counts = np.zeros((clients, classes), np.int32)
        self.posterior = np.full((clients, classes), np.nan, np.float32)
        self.row_sums = np.full((clients, classes), np.nan, np.float32)
        self.bias = None if layout.bias is None else np.full_like(self.row_sums, np.nan)
        self.weight: NDArray[np.float32] | None = None
        if keep_weights:
            self.weight = np.full((clients, classes, layout.features), np.nan, np.float32)
        self.update: NDArray[np.float32] | None = None
        if keep_updates:
            self.update = np.full((clients, layout.size), np.nan, np.float32)
        self.statistics: NDArray[np.float32] | None = None
        if layout.buffers:
            self.statistics = np.full((clients, layout.buffers), np.nan, np.float32)
        self.loss = np.full(clients, np.nan)
        self.bytes_on_wire = np.zeros(clients, np.int64)
        self.seconds = np.zeros(clients)
        self.rank = np.zeros(clients, np.int32)
        self.finite = np.zeros(clients, np.uint8)

    def take(self, client: int, message: Message, layout: UpdateLayout) -> bool:
        """Copy out what is observed of an update; return whether all of it is finite."""
        self.counts[client] = message.counts
        self.posterior[client] = message.posterior
        self.loss[client] = message.header["loss"]
        self.bytes_on_wire[client] = message.header["payload_bytes"]
        self.seconds[client] = message.header["seconds"]
        weight = layout.weight_gradient(message.payload)
        finite = _is_finite(message.payload)
        if finite:
            sums = weight.sum(axis=1, dtype=np.float64)
            # Of an update of huge finite numbers, sums may be more than single precision holds.
            finite = bool((np.abs(sums) < _LARGEST).all())
        self.finite[client] = finite
        if finite:
            self.row_sums[client] = sums
            bias = layout.bias_gradient(message.payload)
            if self.bias is not None and bias is not None:
                self.bias[client] = bias
            if self.weight is not None:
                self.weight[client] = weight
            if self.update is not None:
                self.update[client] = message.payload
            if self.statistics is not None:
                self.statistics[client] = message.payload[layout.parameters :]
        return finite


class ScenarioServer:
    """Runs the rounds of one scenario on the root.

    Parameters
    ----------
    plan
        The scenario's rounds.
    setup
        Its model, data and attacks.
    downlink
        To the workers.
    workers
        Their number.
    writer
        Of the results file.
    initial
        Returns a round's model where it is a stage of a training, else None.
    """

    def __init__(
        self,
        plan: ScenarioPlan,
        setup: ScenarioSetup,
        downlink: Downlink,
        workers: int,
        writer: ResultsWriter,
        initial: Callable[[int], NDArray[np.float32] | None] = lambda _: None,
    ) -> None:
        self._plan = plan
        self._setup = setup
        self._layout = setup.layout
        self._downlink = downlink
        self._workers = workers
        self._writer = writer
        self._initial = initial
        self._adversary = GlobalModel(
            setup.model,
            setup.auxiliary(),
            setup.samples.shape,
            local_steps=plan.local_steps,
            learning_rate=plan.scenario.federation.learning_rate,
        )
        facts = scenario_facts(plan, setup)
        self._attacks = {
            label: attack
            for label, attack in setup.attacks.items()
            if not not_applicable(attack, facts)
        }
        observed = {part for attack in self._attacks.values() for part in attack.observes}
        self._estimates = plan.scenario.adversary.batch_size == "estimated"
        self._needs_weights = (
            plan.keeps_weights or self._estimates or Observed.WEIGHT_GRADIENT in observed
        )
        self._needs_updates = plan.keeps_updates or Observed.UPDATE in observed
        size = setup.layout.size
        self._window = plan.in_flight(workers, 4 * size)
        # The models under way, and the one that is attacked meanwhile.
        self._models = np.empty((self._window + 1, size), np.float32)
        self._aggregate = torch.zeros(size)
        self._published = 0
        self._publish_seconds = 0.0

    def rounds(self, position: Position) -> Iterator[int]:
        """Run the scenario; yield the number of each round when it has been recorded.

        Parameters
        ----------
        position
            Is kept up to date, for the report of a failure.
        """
        position.scenario = self._plan.index
        written = 0.0
        self._publish_until(self._window)
        for number in range(self._plan.rounds):
            position.round = number
            record = self._collect(number)
            # Before the attacks, so that they work while the clients compute.
            self._publish_until(number + 1 + self._window)
            record.clock.seconds["publish"], self._publish_seconds = self._publish_seconds, 0.0
            rows = self._attack(number, record) if self._plan.is_attacked(number) else {}
            rows |= self._evaluate(number, record)
            record.clock.seconds["write"] = written
            started = time.perf_counter()
            self._writer.append(self._plan.index, number, rows | self._measured(record))
            # What was observed is not to be held while the next round's updates come in.
            del record, rows
            written = time.perf_counter() - started
            yield number

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
            self._downlink.publish(number, model)
            self._published = number + 1
        self._publish_seconds += time.perf_counter() - started

    def _collect(self, number: int) -> Round:
        """Receive a round's updates in client order, and step the global model."""
        attacked = self._plan.is_attacked(number)
        record = Round(
            self._plan,
            self._layout,
            keep_weights=self._needs_weights and attacked,
            keep_updates=self._needs_updates and attacked,
        )
        samples = 0
        self._aggregate.zero_()
        for client in range(self._plan.clients):
            task = Task(self._plan.index, number, client)
            with record.clock.phase("wait"):
                message = self._downlink.receive(task)
            with record.clock.phase("aggregate"):
                finite = record.take(client, message, self._layout)
                if finite and not self._plan.fresh_model:
                    weight = int(message.header["samples"])
                    self._aggregate.add_(torch.from_numpy(message.payload), alpha=weight)
                    samples += weight
            record.rank[client] = message.header["rank"]
        if not self._plan.fresh_model and number + 1 < self._plan.rounds:
            with record.clock.phase("aggregate"):
                self._step(number, samples)
        return record

    def _step(self, number: int, samples: int) -> None:
        """Make the next global model: a gradient step, and the clients' mean buffers."""
        split = self._layout.parameters
        before = torch.from_numpy(self._slot(number))
        after = torch.from_numpy(self._slot(number + 1))
        if samples == 0:
            after.copy_(before)
            return
        step = -self._plan.scenario.federation.learning_rate / samples
        torch.add(before[:split], self._aggregate[:split], alpha=step, out=after[:split])
        torch.div(self._aggregate[split:], samples, out=after[split:])

    def _attack(self, number: int, record: Round) -> dict[str, Any]:
        rows: dict[str, Any] = {
            "truth/counts": record.counts,
            "truth/posterior": record.posterior,
            "observations/row_sums": record.row_sums,
        }
        if record.bias is not None:
            rows["observations/bias_gradient"] = record.bias
        if self._plan.keeps_weights and record.weight is not None:
            rows["observations/weight_gradient"] = record.weight
        if self._plan.keeps_weights and record.statistics is not None:
            rows["observations/statistics"] = record.statistics
            # A copy: the row waits for the next commit, and the slot for a later model.
            rows["observations/statistics_sent"] = self._slot(number)[
                self._layout.parameters :
            ].copy()
        if self._plan.keeps_updates and record.update is not None:
            rows["observations/update"] = record.update
        seen = np.flatnonzero(record.finite)
        if len(seen) == 0:
            return rows
        # Mostly all of them: views, as whole updates of many clients are large.
        chosen = slice(None) if len(seen) == len(record.finite) else seen
        with record.clock.phase("attack"):
            believed = self._believed_labels(record, chosen)
        observations = Observations(
            row_sums=record.row_sums[chosen],
            bias_gradient=None if record.bias is None else record.bias[chosen],
            weight_gradient=None if record.weight is None else record.weight[chosen],
            labels=believed,
            keys=seen,
            local_steps=self._plan.local_steps,
            statistics=None if record.statistics is None else record.statistics[chosen],
            update=None if record.update is None else record.update[chosen],
            posterior=record.posterior[chosen],
        )
        labels = np.full(self._plan.clients, -1, np.int32)
        labels[seen] = observations.labels
        rows["observations/labels"] = labels
        # Every attack is given the same arrays; none may change what the next one sees.
        for array in vars(observations).values():
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
        seed = self._plan.scenario.seed
        with record.clock.phase("attack"):
            self._adversary.enter(self._slot(number), seed, (self._plan.index, number))
            for label, attack in self._attacks.items():
                rows |= self._run(label, attack, number, observations.restricted(attack))
        return rows

    def _believed_labels(
        self, record: Round, chosen: slice | NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return how many labels the server takes each of the chosen updates to have."""
        steps = self._plan.local_steps
        labels = np.full(len(record.finite[chosen]), self._plan.labels_per_update)
        if self._estimates and record.weight is not None:
            bias = None if record.bias is None else record.bias[chosen]
            labels = estimate_labels(record.weight[chosen], bias, steps)
        factor = self._plan.scenario.adversary.batch_size_factor
        return np.maximum(np.rint(labels * factor), 1).astype(np.int64)

    def _run(
        self, label: str, attack: Attack, number: int, observations: Observations
    ) -> dict[str, Any]:
        started = time.perf_counter()
        name = zlib.crc32(label.encode())
        seed = seed64(self._plan.scenario.seed, Purpose.ATTACK, self._plan.index, number, name)
        # A calibration serves all updates of a round: where the sizes differ, that of the middle.
        batch_size = max(1, round(float(np.median(observations.labels)) / self._plan.local_steps))
        adversary = RestrictedAdversary(self._adversary, attack.knowledge, batch_size, seed)
        calibration = {
            **attack.calibrate(adversary),
            **attack.calibrate_updates(adversary, observations),
        }
        lengths = {
            "client": len(observations.keys),
            "class": self._layout.classes,
            "feature": self._layout.features,
            "buffer": self._layout.buffers,
        }
        check_calibration(label, attack, calibration, lengths)
        values = infer_in_chunks(label, attack, observations, calibration)
        answer: dict[str, Any] = {
            f"attacks/{label}/{attack.answers.value}": self._spread(values, observations.keys)
        }
        declared = attack.arrays()
        for array, values in calibration.items():
            path = f"attacks/{label}/calibration/{array}"
            each = declared[array][0][:1] == ("client",)
            answer[path] = self._spread(values, observations.keys) if each else values[0]
        answer[f"timings/attacks/{label}"] = time.perf_counter() - started
        return answer

    def _spread(self, values: NDArray[Any], seen: NDArray[np.int64]) -> NDArray[Any]:
        """Return values of the attacked updates as those of all clients."""
        if values.dtype == np.bool_:
            values = values.astype(np.int8)
        fill = {"f": np.nan, "i": -1, "u": 0}[values.dtype.kind]
        spread = np.full((self._plan.clients, *values.shape[1:]), fill, values.dtype)
        spread[seen] = values
        return spread

    def _evaluate(self, number: int, record: Round) -> dict[str, Any]:
        if not self._plan.is_evaluated(number):
            return {}
        with record.clock.phase("evaluate"):
            seed = self._plan.scenario.seed
            self._adversary.enter(self._slot(number), seed, (self._plan.index, number))
            accuracy = self._adversary.accuracy(self._setup.samples, self._setup.parts.test)
            return {"rounds/accuracy": accuracy}

    @staticmethod
    def _measured(record: Round) -> dict[str, Any]:
        finite = record.loss[np.isfinite(record.loss)]
        return {
            "rounds/loss": finite.mean() if len(finite) else np.nan,
            "updates/loss": record.loss,
            "updates/bytes_on_wire": record.bytes_on_wire,
            "updates/finite": record.finite,
            "timings/client_seconds": record.seconds,
            "timings/client_rank": record.rank,
            **{f"timings/{name}": seconds for name, seconds in record.clock.seconds.items()},
        }


def scenario_facts(
    plan: ScenarioPlan, setup: ScenarioSetup, lowest_feature: float | None = None
) -> Facts:
    """Return what of a scenario decides about the attacks' assumptions."""
    scenario, layout = plan.scenario, setup.layout
    statistics = statistics_length(setup.model.module)
    adversary = scenario.adversary
    return Facts(
        classes=layout.classes,
        features=layout.features,
        bias=layout.bias is not None,
        statistics=statistics if scenario.federation.share_statistics else 0,
        batch_size=scenario.federation.batch_size,
        local_steps=plan.local_steps,
        known_size=adversary.knows_size,
        fair_samples=adversary.has_fair_samples,
        statistics_noise=scenario.federation.statistics_noise,
        undoable=not statistics or Norms(setup.model, setup.samples.shape).undoable,
        lowest_feature=lowest_feature,
    )


def _is_finite(values: NDArray[np.float32]) -> bool:
    # The square of the norm is several times cheaper than a test of every element, and NaN and Inf
    # survive it; where it is not finite, the update may also be one of large finite numbers.
    flat = torch.from_numpy(values)
    return bool(torch.isfinite(flat.dot(flat)) or torch.isfinite(flat).all())
