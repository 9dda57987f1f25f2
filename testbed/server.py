"""The root: the round loop of a scenario, aggregation, and the attacks on every update."""

import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from testbed.attacks.adversary import GlobalModel, RestrictedAdversary
from testbed.attacks.base import Attack, Observations
from testbed.attacks.checks import check_calibration, check_counts
from testbed.failure import Position
from testbed.plan import ScenarioPlan, Task
from testbed.results.schema import PHASES
from testbed.results.writer import ResultsWriter
from testbed.seeds import Purpose, seed64
from testbed.startup import ScenarioSetup
from testbed.transport.base import Downlink
from testbed.update import Message, UpdateLayout

# Attacks work on at most this many (update, class) pairs at once.
_CHUNK = 1 << 20


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

    def __init__(self, plan: ScenarioPlan, layout: UpdateLayout, *, keep_weights: bool) -> None:
        clients, classes = plan.clients, layout.classes
        self.clock = Clock()
        self.counts = np.zeros((clients, classes), np.int32)
        self.posterior = np.full((clients, classes), np.nan, np.float32)
        self.row_sums = np.full((clients, classes), np.nan, np.float32)
        self.bias = None if layout.bias is None else np.full_like(self.row_sums, np.nan)
        self.weight: NDArray[np.float32] | None = None
        if keep_weights:
            self.weight = np.full((clients, classes, layout.features), np.nan, np.float32)
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
        finite = _is_finite(message.payload)
        self.finite[client] = finite
        if finite:
            weight = layout.weight_gradient(message.payload)
            self.row_sums[client] = weight.sum(axis=1, dtype=np.float64)
            bias = layout.bias_gradient(message.payload)
            if self.bias is not None and bias is not None:
                self.bias[client] = bias
            if self.weight is not None:
                self.weight[client] = weight
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
    """

    def __init__(
        self,
        plan: ScenarioPlan,
        setup: ScenarioSetup,
        downlink: Downlink,
        workers: int,
        writer: ResultsWriter,
    ) -> None:
        self._plan = plan
        self._setup = setup
        self._layout = setup.layout
        self._downlink = downlink
        self._workers = workers
        self._writer = writer
        self._adversary = GlobalModel(setup.model, setup.samples, setup.parts.auxiliary)
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
                self._setup.initialise(torch.from_numpy(model), self._plan.initial_key(number))
            self._downlink.publish(number, model)
            self._published = number + 1
        self._publish_seconds += time.perf_counter() - started

    def _collect(self, number: int) -> Round:
        """Receive a round's updates in client order, and step the global model."""
        keep = self._plan.keeps_weights and self._plan.is_attacked(number)
        record = Round(self._plan, self._layout, keep_weights=keep)
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
        if record.weight is not None:
            rows["observations/weight_gradient"] = record.weight
        seen = np.flatnonzero(record.finite)
        if len(seen) == 0:
            return rows
        observations = Observations(
            row_sums=record.row_sums[seen],
            bias_gradient=None if record.bias is None else record.bias[seen],
            weight_gradient=None if record.weight is None else record.weight[seen],
            labels=np.full(len(seen), self._plan.labels_per_update),
            keys=seen,
        )
        # Every attack is given the same arrays; none may change what the next one sees.
        for array in vars(observations).values():
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
        seed = self._plan.scenario.seed
        with record.clock.phase("attack"):
            self._adversary.enter(self._slot(number), seed, (self._plan.index, number))
            for label, attack in self._setup.attacks.items():
                rows |= self._run(label, attack, number, observations, record)
        return rows

    def _run(
        self, label: str, attack: Attack, number: int, observations: Observations, record: Round
    ) -> dict[str, Any]:
        started = time.perf_counter()
        name = zlib.crc32(label.encode())
        seed = seed64(self._plan.scenario.seed, Purpose.ATTACK, self._plan.index, number, name)
        batch_size = self._plan.scenario.federation.batch_size
        adversary = RestrictedAdversary(self._adversary, attack.knowledge, batch_size, seed)
        calibration = attack.calibrate(adversary)
        check_calibration(label, attack, calibration)
        counts = np.full(record.counts.shape, -1, np.int32)
        rows = max(1, _CHUNK // self._layout.classes)
        for start in range(0, len(observations.keys), rows):
            part = observations.rows(slice(start, start + rows))
            inferred = attack.infer(part, calibration).counts
            check_counts(label, inferred, part)
            counts[part.keys] = inferred
        answer: dict[str, Any] = {f"attacks/{label}/counts": counts}
        for array, values in calibration.items():
            answer[f"attacks/{label}/calibration/{array}"] = values[0]
        answer[f"timings/attacks/{label}"] = time.perf_counter() - started
        return answer

    def _evaluate(self, number: int, record: Round) -> dict[str, Any]:
        if not self._plan.is_evaluated(number):
            return {}
        with record.clock.phase("evaluate"):
            seed = self._plan.scenario.seed
            self._adversary.enter(self._slot(number), seed, (self._plan.index, number))
            return {"rounds/accuracy": self._adversary.accuracy(self._setup.parts.test)}

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


def _is_finite(values: NDArray[np.float32]) -> bool:
    # The square of the norm is several times cheaper than a test of every element, and NaN and Inf
    # survive it; where it is not finite, the update may also be one of large finite numbers.
    flat = torch.from_numpy(values)
    return bool(torch.isfinite(flat.dot(flat)) or torch.isfinite(flat).all())
