"""How models go out and updates come in: one interface for one process and for a thousand ranks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from testbed.plan import ScenarioPlan, Task
from testbed.update import Allocate, Message, UpdateLayout, zeros

T = TypeVar("T")


class Worker(Protocol):
    """Computes for clients; `testbed.client` has the real one."""

    def load(self, model: NDArray[np.float32]) -> None:
        """Take over the global model of a round."""

    def work(self, task: Task, message: Message) -> None:
        """Do a client's local work at the loaded model and write its update."""

    def take_sum(self) -> NDArray[Any]:
        """Return the sum of the updates since the last call; for plans that reduce.

        uint32 or uint64, of what an update shares.
        """


class Downlink(ABC):
    """The root's side of one scenario."""

    @abstractmethod
    def publish(self, round_: int, model: NDArray[np.float32]) -> None:
        """Send the model of a round to the workers that need it.

        Rounds are published in order. The array must stay as it is until the round's updates have
        been received.
        """

    @abstractmethod
    def receive(self, task: Task) -> Message:
        """Return a client's update. Tasks are asked for in the order of the plan.

        The message is valid until the next call.
        """

    @abstractmethod
    def reduce(self, total: NDArray[Any]) -> None:
        """Add up all workers' sums of the next round, of plans that reduce.

        Called once a round, after its messages have been received. ``total`` holds zeros, and
        receives the sum; its type and length are those of `Worker.take_sum`.
        """

    def __enter__(self) -> "Downlink":
        return self

    @abstractmethod
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the buffers."""


class Transport(ABC):
    """What connects the root and the workers of a run.

    Attributes
    ----------
    rank, size
        This process, and how many there are.
    workers
        How many ranks compute for clients.
    local_rank, host
        This process's rank among those on its host, and the host's name.
    library
        Name and version of the MPI library; empty without one.
    allocate
        Makes the memory of messages: page-locked where a GPU copies into them.
    """

    rank: int
    size: int
    workers: int
    local_rank: int
    host: str
    library: str
    allocate: Allocate = staticmethod(zeros)

    @property
    def is_root(self) -> bool:
        """Whether this process is the server."""
        return self.rank == 0

    @abstractmethod
    def broadcast(self, value: T) -> T:
        """Return the root's value on every rank. For set-up; the value is pickled."""

    @abstractmethod
    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in the order of ranks, on every rank. For set-up."""

    @abstractmethod
    def collect(self, arrays: Sequence[NDArray[np.float32]]) -> list[list[NDArray[np.float32]]]:
        """Return every rank's arrays on the root, in the order of ranks; nothing elsewhere.

        One message for each array, nothing but their shapes is pickled.
        """

    @abstractmethod
    def share(
        self, load: Callable[[], tuple[T, dict[str, NDArray[np.generic]]]]
    ) -> tuple[T, dict[str, NDArray[np.generic]]]:
        """Load arrays once per host, for each of its ranks to read; none may write to them.

        ``load`` returns a description (pickled to the host's other ranks) and arrays by name. An
        exception of it is raised on every rank of the host.
        """

    @abstractmethod
    def serve(
        self, plan: ScenarioPlan, layout: UpdateLayout, worker: Worker, *, capacity: int
    ) -> None:
        """Work through a scenario on a rank that is not the root.

        ``capacity`` is the most bytes that an update takes as it is shared.
        """

    @abstractmethod
    def open(
        self,
        plan: ScenarioPlan,
        layout: UpdateLayout,
        worker: Worker | None,
        *,
        buffers: int,
        capacity: int,
    ) -> Downlink:
        """Begin a scenario on the root.

        ``worker`` computes where the root is the only rank, and is None elsewhere; ``buffers``
        bounds the updates that the root holds at once; ``capacity`` as for `serve`.
        """

    @abstractmethod
    def abort(self, status: int) -> None:
        """End every rank of the job, this one included; without other ranks, do nothing."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until every rank is done."""
