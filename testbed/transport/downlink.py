"""The root's side of a scenario over MPI: models out, updates in, in the order of the plan."""

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from typing_extensions import override

from testbed.errors import UserError
from testbed.plan import ScenarioPlan, Task
from testbed.transport.base import ClientState, Downlink, RanksLost
from testbed.transport.control import Control, gate, noticing
from testbed.transport.states import receive_states
from testbed.update import Message, UpdateLayout

MODEL, UPDATE, WANTED = 1, 2, 5
# Messages are sent as 32-bit items, and MPI counts items in an int.
_MAX_BYTES = 4 * (2**31 - 1)
# The part of the deadline that passes before the root asks who is there.
_UNASKED = 0.1


class MPIDownlink(Downlink):
    """See `Downlink`.

    Parameters
    ----------
    comm, reductions, control
        For models and updates, for sums, and for what the root says.
    plan, workers, start
        The scenario, for how many workers, from which round on.
    messages
        What updates are received into.
    deadline
        See `Transport`.
    tolerant
        Whether ranks may die without the end of the run.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        reductions: MPI.Intracomm,
        control: Control,
        plan: ScenarioPlan,
        workers: int,
        messages: list[Message],
        *,
        start: int = 0,
        deadline: float | None = None,
        tolerant: bool = False,
    ) -> None:
        self._tolerant = tolerant
        self._comm = comm
        self._reductions = reductions
        self._control = control
        self._plan = plan
        self._workers = workers
        self._deadline = deadline
        self._models: deque[tuple[int, list[MPI.Request]]] = deque()
        self._flags: deque[NDArray[np.int32]] = deque(maxlen=4)
        self._tasks = plan.tasks(start)
        self._posted: deque[tuple[Task, MPI.Request, Message]] = deque()
        self._current: Message | None = None
        # What was noticed while a model went out, told when updates are asked for: until then the
        # server may finish what it has.
        self._lost: RanksLost | None = None
        for message in messages:
            self._post(message)

    @override
    def publish(
        self, round_: int, model: NDArray[np.float32], *, wants_states: bool = False
    ) -> None:
        if self._lost is not None:
            return
        try:
            self._publish(round_, model, wants_states=wants_states)
        except RanksLost as lost:
            self._lost = lost

    def _publish(self, round_: int, model: NDArray[np.float32], *, wants_states: bool) -> None:
        needed = [1 + worker for worker in self._plan.needed_by(round_, self._workers)]
        requests = []
        with noticing():
            if self._plan.keeps_state:
                flag = np.array([wants_states], np.int32)
                self._flags.append(flag)
                requests += [self._comm.Isend(flag, dest=rank, tag=WANTED) for rank in needed]
            if self._plan.broadcasts(self._workers, model.nbytes) and not self._tolerant:
                requests.append(self._comm.Ibcast(model, root=0))
            else:
                requests += [self._comm.Isend(model, dest=rank, tag=MODEL) for rank in needed]
        self._models.append((round_, requests))
        if self._plan.fresh_model:
            return
        # In training the workers wait for the model. It has to leave before the root turns to the
        # attacks: without its help no large message would move on.
        for request in requests:
            self._wait(request)

    @override
    def states(self) -> dict[int, ClientState]:
        self._check()
        found: dict[int, ClientState] = {}
        for worker in range(self._workers):
            found |= receive_states(self._comm, self._wait, worker + 1)
        return found

    @override
    def receive(self, task: Task) -> Message:
        self._check()
        if self._current is not None:
            self._post(self._current)
            self._current = None
        expected, request, message = self._posted[0]
        status = MPI.Status()
        self._wait(request, status)
        self._posted.popleft()
        moved = 4 * status.Get_count(MPI.INT32_T)
        if moved != message.used:
            raise RuntimeError(f"an update of {task} says {message.used} bytes, {moved} came")
        header = message.header
        found = Task(int(header["scenario"]), int(header["round"]), int(header["client"]))
        if not found == expected == task:
            raise RuntimeError(f"expected the update of {task}, planned {expected}, got {found}")
        while self._models and self._models[0][0] < task.round:
            # All updates of that round have come, so its model has been received everywhere.
            for request in self._models[0][1]:
                self._wait(request)
            self._models.popleft()
        self._current = message
        return message

    @override
    def reduce(self, total: NDArray[Any]) -> None:
        self._check()
        # The server takes part with nothing of its own, and sees the sum alone.
        reduce(self._reductions, self._control, total, tolerant=self._tolerant, wait=self._wait)

    def _check(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _wait(self, request: MPI.Request, status: MPI.Status | None = None) -> None:
        """Wait; where that takes long, find out who does not answer until the deadline."""
        if self._deadline is None:
            self._control.wait(request, status)
            return
        while not self._control.wait(request, status, limit=_UNASKED * self._deadline):
            arrived = False

            def test() -> bool:
                nonlocal arrived
                with noticing():
                    arrived = bool(request.Test(status))
                return arrived

            stuck = self._control.silent((1 - _UNASKED) * self._deadline, test)
            if arrived:
                return
            if stuck:
                raise RanksLost(f"no answer within {self._deadline:g} s", stuck)

    def _post(self, message: Message) -> None:
        task = next(self._tasks, None)
        if task is not None:
            source = 1 + self._plan.worker(task, self._workers)
            with noticing():
                request = self._comm.Irecv(_items(message), source=source, tag=UPDATE)
            self._posted.append((task, request, message))

    @override
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            for _, requests in self._models:
                for request in requests:
                    self._wait(request)


def reduce(
    comm: MPI.Intracomm,
    control: Control,
    total: NDArray[Any],
    *,
    tolerant: bool,
    wait: Callable[[MPI.Request], object] | None = None,
) -> None:
    """Add up the ranks' sums into the root's, in place, by MPI's own reduction."""
    send: Any = total if comm.rank else MPI.IN_PLACE
    receive = None if comm.rank else total
    if not tolerant:
        request = comm.Ireduce(send, receive, op=MPI.SUM, root=0)
        (wait or control.wait)(request)
        return
    gate(comm, control, wait=wait)
    with noticing():
        comm.Reduce(send, receive, op=MPI.SUM, root=0)


def _items(message: Message) -> NDArray[np.int32]:
    return message.buffer.view(np.int32)


def sent(message: Message) -> NDArray[np.int32]:
    """Return what is sent of a message: no more than the update takes."""
    return message.buffer[: message.used].view(np.int32)


def check_size(layout: UpdateLayout, capacity: int) -> None:
    """Raise where a scenario's messages are longer than one of MPI can be."""
    size = max(4 * layout.size, capacity) + (1 << 20)
    if size > _MAX_BYTES:
        raise UserError(
            f"an update of {layout.size} parameters is too large for one MPI message "
            f"({size} bytes, at most {_MAX_BYTES}): use a smaller model"
        )
