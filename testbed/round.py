"""What the root keeps of one round, and how long its phases took."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.plan import ScenarioPlan
from testbed.results.schema import PHASES
from testbed.update import Message, UpdateLayout

_LARGEST = float(np.finfo(np.float32).max)
# Fits a cache, and is short enough for a sum in single precision.
_PART = 1 << 15
# Below, squares in single precision have lost digits.
_LEAST_SQUARE = 1e-30


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
    """What the root keeps of one round: no update as a whole, only what the attacks look at.

    Parameters
    ----------
    plan, layout
        Of the scenario.
    number
        Of the round.
    keep_weights, keep_updates
        Whether the last layer's weight gradients, and whole updates, are kept.

    Attributes
    ----------
    counts, posterior, row_sums, bias, weight, update, statistics, norm, seen
        Of each update that the server sees, [observed, ...]: its clients', or the cohort's sum.
        ``seen`` says which came and held finite numbers only.
    steps, labels
        int64 [observed]: local steps and labels behind each.
    identity, loss, accuracy, bytes_on_wire, seconds, rank, finite, arrived, member_steps, clipped
        Of each client of the round, [clients].
    """

    def __init__(
        self,
        plan: ScenarioPlan,
        layout: UpdateLayout,
        number: int,
        *,
        keep_weights: bool = False,
        keep_updates: bool = False,
    ) -> None:
        observed, clients, classes = plan.observed, plan.clients, layout.classes
        self.clock = Clock()
        self.counts = np.full((observed, classes), -1, np.int32)
        self.posterior = np.full((observed, classes), np.nan, np.float32)
        self.row_sums = np.full((observed, classes), np.nan, np.float32)
        self.bias = None if layout.bias is None else np.full_like(self.row_sums, np.nan)
        self.weight: NDArray[np.float32] | None = None
        if keep_weights:
            self.weight = np.full((observed, classes, layout.features), np.nan, np.float32)
        self.update: NDArray[np.float32] | None = None
        if keep_updates:
            self.update = np.full((observed, layout.size), np.nan, np.float32)
        self.statistics: NDArray[np.float32] | None = None
        if layout.buffers:
            self.statistics = np.full((observed, layout.buffers), np.nan, np.float32)
        self.norm = np.full(observed, np.nan, np.float32)
        self.seen = np.zeros(observed, np.bool_)
        self.steps = np.zeros(observed, np.int64)
        self.labels = np.zeros(observed, np.int64)
        self.identity = np.array(plan.participants(number).identities, np.int32)
        self.loss = np.full(clients, np.nan)
        self.accuracy = np.full(clients, np.nan)
        self.bytes_on_wire = np.zeros(clients, np.int64)
        self.seconds = np.zeros(clients)
        self.rank = np.full(clients, -1, np.int32)
        self.finite = np.zeros(clients, np.uint8)
        self.arrived = np.zeros(clients, np.uint8)
        self.member_steps = np.full(clients, -1, np.int32)
        self.clipped = np.full(clients, -1, np.int32) if plan.summed is not None else None

    def note(self, client: int, message: Message) -> None:
        """Take down what a client's message says beside the update."""
        header = message.header
        self.arrived[client] = 1
        self.loss[client] = header["loss"]
        self.accuracy[client] = header["accuracy"]
        self.bytes_on_wire[client] = header["payload_bytes"]
        self.seconds[client] = header["seconds"]
        self.rank[client] = header["rank"]
        self.member_steps[client] = header["steps"]
        if self.clipped is not None:
            self.clipped[client] = header["clipped"]

    def tell(self, row: int, message: Message) -> None:
        """Take over the truth of an update that the server sees by itself."""
        self.counts[row] = message.counts
        self.posterior[row] = message.posterior
        self.steps[row] = message.header["steps"]
        self.labels[row] = message.header["labels"]

    def observe(self, row: int, payload: NDArray[np.float32], layout: UpdateLayout) -> bool:
        """Copy out what is observed of an update; return whether all of it is finite."""
        norm = norm_of(payload[: layout.parameters])
        finite = math.isfinite(norm) and is_finite(payload[layout.parameters :])
        weight = layout.weight_gradient(payload)
        if finite:
            sums = weight.sum(axis=1, dtype=np.float64)
            # Of an update of huge finite numbers, sums may be more than single precision holds.
            finite = bool((np.abs(sums) < _LARGEST).all())
        self.seen[row] = finite
        if not finite:
            return False
        self.row_sums[row] = sums
        self.norm[row] = min(norm, _LARGEST)
        bias = layout.bias_gradient(payload)
        if self.bias is not None and bias is not None:
            self.bias[row] = bias
        if self.weight is not None:
            self.weight[row] = weight
        if self.update is not None:
            self.update[row] = payload
        if self.statistics is not None:
            self.statistics[row] = payload[layout.parameters :]
        return True

    def measured(self) -> dict[str, Any]:
        """Return the rows of what is known of every client, attacked or not."""
        losses = self.loss[np.isfinite(self.loss)]
        clipped = {} if self.clipped is None else {"updates/clipped": self.clipped}
        return {
            **clipped,
            "rounds/loss": losses.mean() if len(losses) else np.nan,
            "updates/identity": self.identity,
            "updates/local_steps": self.member_steps,
            "updates/arrived": self.arrived,
            "updates/loss": self.loss,
            "updates/bytes_on_wire": self.bytes_on_wire,
            "updates/finite": self.finite,
            "timings/client_seconds": self.seconds,
            "timings/client_rank": self.rank,
            **{f"timings/{name}": seconds for name, seconds in self.clock.seconds.items()},
        }


def is_finite(values: NDArray[np.float32]) -> bool:
    """Return whether all values of a vector are."""
    return math.isfinite(norm_of(values))


def norm_of(values: NDArray[np.float32]) -> float:
    """Return the Euclidean norm of a vector, float32 [n]; NaN where some value is not finite."""
    # The square of the norm is several times cheaper than a test of every element, and NaN and Inf
    # survive it; where it is not finite, the vector may also be one of large finite numbers.
    with np.errstate(over="ignore", invalid="ignore"):
        parts = (values[start : start + _PART] for start in range(0, len(values), _PART))
        squared = sum(float(part.dot(part)) for part in parts)
    if not _LEAST_SQUARE < squared < math.inf:
        if not np.isfinite(values).all():
            return math.nan
        squared = float(np.square(values, dtype=np.float64).sum())
    return math.sqrt(squared)
