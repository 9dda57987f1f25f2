"""Secure aggregation in a round: what clients send, and what the server makes of it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.defenses.sums import SecureAggregation
from testbed.plan import ScenarioPlan, Task
from testbed.secure.client import write_message
from testbed.secure.fixed_point import FixedPoint
from testbed.secure.protocol import SecureRound
from testbed.secure.server import Aggregator
from testbed.seeds import Purpose, seed64
from testbed.startup import ScenarioSetup
from testbed.transport.base import Downlink
from testbed.update import Message

Weigh = Callable[[int], int]


class _Sum:
    """What both sides know of a scenario's sums.

    Parameters
    ----------
    plan
        Of a scenario with secure aggregation.
    size
        Length of what is shared of an update.
    weigh
        Returns the weight of a client of the population. In the sum they count in units of their
        greatest common divisor, which leaves the most room for values.
    """

    def __init__(self, plan: ScenarioPlan, size: int, weigh: Weigh) -> None:
        assert isinstance(plan.summed, SecureAggregation)
        self._plan = plan
        self._defense = plan.summed
        self._size = size
        self._weigh = weigh
        self._unit = math.gcd(*(weigh(identity) for identity in range(plan.population)))
        self._masked = plan.summed.protocol == "masks"

    def is_lost(self, number: int) -> bool:
        """Return whether too few clients of a round survive for the server to get their sum."""
        return self._round(number).lost

    def _round(self, number: int) -> SecureRound:
        arriving = self._plan.participants(number).arriving
        return self._defense.secure_round(range(self._plan.clients), arriving, self._size)

    def _fixed_point(self, number: int) -> FixedPoint:
        identities = self._plan.participants(number).identities
        return self._defense.fixed_point(sum(map(self._weigh, identities)) // self._unit)


class ClientSum(_Sum):
    """A worker's side: encodes, masks, and adds up where MPI reduces; see `_Sum`.

    A client whose update is not finite abstains: it adds zeros, and says that they weigh 0.
    """

    def __init__(self, plan: ScenarioPlan, size: int, weigh: Weigh) -> None:
        super().__init__(plan, size, weigh)
        self._encoded = self._defense.fixed_point(1).zeros(size)
        self._total = np.zeros_like(self._encoded)

    @property
    def capacity(self) -> int:
        """The most bytes that a client's message takes, in the body of `Message`."""
        if not self._masked:
            return 0
        everyone = range(self._plan.clients)
        return self._padded(self._defense.secure_round(everyone, everyone, self._size))

    def add(self, task: Task, update: NDArray[np.float32], message: Message) -> int:
        """Share an update, float32 [P + S]; return the bytes of the message's body that it takes.

        Where MPI reduces, these are the bytes with which a client takes part in the reduction, and
        the body stays empty.
        """
        round_, numbers = self._round(task.round), self._fixed_point(task.round)
        identity = self._plan.participants(task.round).identities[task.client]
        weight = self._weigh(identity) if bool(np.isfinite(update).all()) else 0
        message.header["weight"] = weight
        message.header["clipped"] = 0
        if round_.lost:
            return 0
        clipped = numbers.encode(update, weight // self._unit, self._encoded)
        message.header["clipped"] = clipped
        if not self._masked:
            numbers.add(self._total, self._encoded)
            return 0
        scenario = self._plan.scenario
        seeds = [
            seed64(scenario.seed, Purpose.SECRETS, self._plan.draws, task.round, client)
            for client in range(self._plan.clients)
        ]
        used = self._padded(round_)
        message.body[:used] = 0
        write_message(round_, seeds, task.client, self._encoded, message.body)
        return used

    def take(self) -> NDArray[Any]:
        """Return the sum of the updates since the last call, unsigned integers [P + S]."""
        total = self._total.copy()
        self._total[:] = 0
        return total

    @staticmethod
    def _padded(round_: SecureRound) -> int:
        return -(-round_.message_bytes // 4) * 4


class CohortSum(_Sum):
    """The server's side of one round; see `_Sum`."""

    def __init__(self, plan: ScenarioPlan, size: int, weigh: Weigh, number: int) -> None:
        super().__init__(plan, size, weigh)
        self._number = number
        self._of = self._round(number)
        self._aggregator = Aggregator(self._of) if self._masked and not self._of.lost else None
        self.weight = 0

    @property
    def bytes_in_reduction(self) -> int:
        """The bytes with which each client takes part, where MPI adds up; else 0."""
        return 0 if self._masked else self._of.dtype.itemsize * self._size

    def add(self, client: int, message: Message) -> None:
        """Take in a survivor's message."""
        self.weight += int(message.header["weight"])
        if self._aggregator is not None:
            self._aggregator.add(client, message.body[: self._of.message_bytes])

    def finish(self, downlink: Downlink) -> NDArray[np.float32] | None:
        """Return the weighted mean update, float32 [P + S]; None where the round is lost."""
        total = None
        if not self._masked:
            total = self._fixed_point(self._number).zeros(self._size)
            downlink.reduce(total)
        elif self._aggregator is not None:
            total = self._aggregator.finish()
        if total is None or self._of.lost or self.weight == 0:
            return None
        return self._fixed_point(self._number).decode(total, self.weight // self._unit)


def message_capacity(plan: ScenarioPlan, setup: ScenarioSetup) -> int:
    """Return the most bytes that the body of a scenario's messages takes."""
    if plan.summed is None:
        return setup.capacity
    return ClientSum(plan, setup.shared, setup.weigh).capacity
