"""One process: the root works for every client itself, through the same round loop."""

import socket
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from testbed.plan import ScenarioPlan, Task
from testbed.transport.base import (
    ClientState,
    Downlink,
    Lost,
    RanksLost,
    StopAsked,
    Transport,
    Worker,
)
from testbed.update import Message, UpdateLayout

T = TypeVar("T")


class LocalTransport(Transport):
    """The transport of a run without MPI."""

    def __init__(self) -> None:
        self.rank = self.number = 0
        self.size = self.started = 1
        self.workers = 1
        self.local_rank = 0
        self.host = socket.gethostname()
        self.library = ""

    @override
    def broadcast(self, value: T) -> T:
        return value

    @override
    def gather(self, value: T) -> list[T]:
        return [value]

    @override
    def collect(self, arrays: Sequence[NDArray[np.float32]]) -> list[list[NDArray[np.float32]]]:
        return [list(arrays)]

    @override
    def distribute(self, states: Mapping[int, Mapping[int, ClientState]]) -> dict[int, ClientState]:
        return dict(states.get(0, {}))

    @override
    def share(
        self, load: Callable[[], tuple[T, dict[str, NDArray[np.generic]]]]
    ) -> tuple[T, dict[str, NDArray[np.generic]]]:
        return load()

    @override
    def serve(
        self,
        plan: ScenarioPlan,
        layout: UpdateLayout,
        worker: Worker,
        *,
        capacity: int,
        start: int = 0,
    ) -> None:
        raise RuntimeError("a run of one process has no rank beside the root")

    @override
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
        if worker is None:
            raise ValueError("the only rank of a run needs a worker")
        return _LocalDownlink(Message(layout, self.allocate, capacity), worker)

    @override
    def cannot_recover(self) -> str:
        return "a single process has no other rank to lose: start it by mpirun --with-ft ulfm"

    @override
    def blame(self, lost: RanksLost) -> str:
        return str(lost)

    @override
    def recover(self, lost: RanksLost) -> tuple[Transport, list[Lost]]:
        raise RuntimeError("a run of one process has no rank to lose") from lost

    @override
    def abort(self, status: int) -> None:
        pass

    @override
    def stop(self, status: int) -> NoReturn:
        raise StopAsked(status)

    @override
    def leave(self, status: int) -> None:
        pass

    @override
    def finish(self) -> None:
        pass

    @override
    def part(self, status: int = 0) -> None:
        pass


class _LocalDownlink(Downlink):
    def __init__(self, message: Message, worker: Worker) -> None:
        self._worker = worker
        self._message = message
        self._models: dict[int, NDArray[np.float32]] = {}
        self._loaded: int | None = None

    @override
    def publish(
        self, round_: int, model: NDArray[np.float32], *, wants_states: bool = False
    ) -> None:
        self._models[round_] = model

    @override
    def states(self) -> dict[int, ClientState]:
        return self._worker.states

    @override
    def receive(self, task: Task) -> Message:
        if self._loaded != task.round:
            self._models = {key: m for key, m in self._models.items() if key >= task.round}
            self._worker.load(self._models[task.round])
            self._loaded = task.round
        self._worker.work(task, self._message)
        return self._message

    @override
    def reduce(self, total: NDArray[Any]) -> None:
        total[:] = self._worker.take_sum()

    @override
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._models.clear()
