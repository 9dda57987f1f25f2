"""How models go out and updates come in: one interface for one process and for a thousand ranks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from testbed.plan import ScenarioPlan, Task
from testbed.update import Allocate, Message, UpdateLayout, zeros

T = TypeVar("T")

# What a client remembers from round to round, by name.
ClientState = dict[str, NDArray[np.float32]]


class RanksLost(Exception):  # noqa: N818 - what happened, not what went wrong here
    """Ranks of the job have died, or do not answer; `Transport.recover` goes on without them.

    Raised by whatever call notices it, on some ranks earlier than on others.

    Parameters
    ----------
    stuck
        Ranks, as numbered now, that live and do not answer.
    detail
        What was noticed.
    """

    def __init__(self, detail: str, stuck: Sequence[int] = ()) -> None:
        super().__init__(detail)
        self.stuck = tuple(stuck)


class RootLost(Exception):  # noqa: N818
    """The root has died: the run cannot go on, and its file is there for `resume`."""


class StopAsked(Exception):  # noqa: N818
    """The root has ended the run early, in good order; every rank leaves with this status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


@dataclass(frozen=True)
class Lost:
    """A rank that a run goes on without.

    Attributes
    ----------
    number
        Its rank at the start of the run.
    host
        Where it was.
    stuck
        Whether it lived and did not answer, and was killed.
    """

    number: int
    host: str
    stuck: bool


class Worker(Protocol):
    """Computes for clients; `testbed.client` has the real one."""

    @property
    def states(self) -> dict[int, ClientState]:
        """What its clients remember, by identity; for plans that keep a state."""

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
    def publish(
        self, round_: int, model: NDArray[np.float32], *, wants_states: bool = False
    ) -> None:
        """Send the model of a round to the workers that need it.

        Rounds are published in order. The array must stay as it is until the round's updates have
        been received. ``wants_states`` asks the workers of a plan that keeps states for these, as
        they are before the round: `states` has to be called before its first update is received.
        """

    @abstractmethod
    def states(self) -> dict[int, ClientState]:
        """Return what all clients remember, by identity, before the round that asked for it."""

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
    number, started
        This process, and how many there were, when the run started: it may have lost some.
    workers
        How many ranks compute for clients.
    local_rank, host
        This process's rank among those on its host, and the host's name.
    library
        Name and version of the MPI library; empty without one.
    allocate
        Makes the memory of messages: page-locked where a GPU copies into them.
    deadline
        Seconds in which a rank has to deliver an update, or to answer while it waits itself; None
        for no limit.
    """

    rank: int
    size: int
    number: int
    started: int
    workers: int
    local_rank: int
    host: str
    library: str
    allocate: Allocate = staticmethod(zeros)
    deadline: float | None = None

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
    def distribute(self, states: Mapping[int, Mapping[int, ClientState]]) -> dict[int, ClientState]:
        """Return what a rank's clients remember.

        Parameters
        ----------
        states
            On the root: by worker, then by the client's identity. Empty elsewhere.
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
        self,
        plan: ScenarioPlan,
        layout: UpdateLayout,
        worker: Worker,
        *,
        capacity: int,
        start: int = 0,
    ) -> None:
        """Work through a scenario on a rank that is not the root.

        ``capacity`` is the most bytes that an update takes as it is shared; ``start`` the first
        round, where earlier ones are done.
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
        start: int = 0,
    ) -> Downlink:
        """Begin a scenario on the root.

        ``worker`` computes where the root is the only rank, and is None elsewhere; ``buffers``
        bounds the updates that the root holds at once; ``capacity`` and ``start`` as for `serve`.
        """

    @abstractmethod
    def cannot_recover(self) -> str:
        """Return why a lost rank ends this run whatever is asked; empty where it need not."""

    @abstractmethod
    def blame(self, lost: RanksLost) -> str:
        """Return which ranks are lost, by their numbers at the start, and how, as a phrase."""

    @abstractmethod
    def recover(self, lost: RanksLost) -> "tuple[Transport, list[Lost]]":
        """Go on without the ranks that are lost; every other rank calls this.

        Returns the transport to use from now on, with ranks numbered anew, and who is lost.

        Raises
        ------
        RootLost
            On every rank, if the root is among them.
        """

    @abstractmethod
    def abort(self, status: int) -> None:
        """End every rank of the job, this one included; without other ranks, do nothing."""

    @abstractmethod
    def stop(self, status: int) -> NoReturn:
        """End the run in good order, from the root: `StopAsked` is raised on every rank."""

    @abstractmethod
    def leave(self, status: int) -> None:
        """End this process, after `StopAsked`, with all others; without other ranks, do nothing."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until the root is done."""

    @abstractmethod
    def part(self, status: int = 0) -> None:
        """End this process if MPI, which may have lost ranks, could not end as it should."""
