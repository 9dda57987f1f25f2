"""Many ranks: models and updates as flat buffers over MPI, nothing pickled in the round loop.

The plan tells every rank what comes next, so there are no control messages: the root posts a
receive for each of the next updates, from the rank that will send it, and takes them in the order
of the plan. MPI delivers messages between two ranks in order. Talk is on duplicates of the world.
"""

import itertools
import os
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from typing_extensions import override

from testbed.errors import UserError
from testbed.plan import ScenarioPlan, Task
from testbed.transport.base import Downlink, Transport, Worker
from testbed.update import Message, UpdateLayout

T = TypeVar("T")

_MODEL, _UPDATE, _STATE = 1, 2, 3
# Messages are sent as 32-bit items, and MPI counts items in an int.
_MAX_BYTES = 4 * (2**31 - 1)


class MPITransport(Transport):
    """The transport of a run under mpirun or srun; rank 0 is the root, the others are workers."""

    def __init__(self) -> None:
        world = MPI.COMM_WORLD
        self._comm = world.Dup()
        # Apart from the broadcasts of models: the ranks do not start both in the same order.
        self._reductions = world.Dup()
        self._node = MPI.Intracomm(world.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank))
        self.rank = world.rank
        self.size = world.size
        self.workers = max(world.size - 1, 1)
        self.local_rank = self._node.rank
        self.host = socket.gethostname()
        self.library = MPI.Get_library_version().split(",")[0].split("\n")[0].strip("\0 ")
        self._windows: list[MPI.Win] = []

    @override
    def abort(self, status: int) -> None:
        MPI.COMM_WORLD.Abort(status)

    @override
    def broadcast(self, value: T) -> T:
        _wait(self._comm.Ibarrier())  # spares the root's turn: a blocking bcast spins
        result: T = self._comm.bcast(value)
        return result

    @override
    def gather(self, value: T) -> list[T]:
        _wait(self._comm.Ibarrier())
        result: list[T] = self._comm.allgather(value)
        return result

    @override
    def collect(self, arrays: Sequence[NDArray[np.float32]]) -> list[list[NDArray[np.float32]]]:
        _wait(self._comm.Ibarrier())
        shapes = self._comm.gather([array.shape for array in arrays])
        if shapes is None:
            for array in arrays:
                _wait(self._comm.Isend(np.ascontiguousarray(array), dest=0, tag=_STATE))
            return []
        collected = [list(arrays)]
        for source, sizes in enumerate(shapes[1:], start=1):
            found = [np.empty(size, np.float32) for size in sizes]
            for array in found:
                _wait(self._comm.Irecv(array, source=source, tag=_STATE))
            collected.append(found)
        return collected

    @override
    def share(
        self, load: Callable[[], tuple[T, dict[str, NDArray[np.generic]]]]
    ) -> tuple[T, dict[str, NDArray[np.generic]]]:
        node, leads = self._node, self._node.rank == 0
        arrays: dict[str, NDArray[np.generic]] = {}
        description: T | None = None
        failure: Exception | None = None
        if leads:
            try:
                description, arrays = load()
            except UserError as error:
                failure = error
            except Exception:
                failure = RuntimeError(f"on host {self.host}: {traceback.format_exc()}")
        _wait(node.Ibarrier())
        shapes = {name: (array.shape, array.dtype.str) for name, array in arrays.items()}
        failure, description, shapes = node.bcast((failure, description, shapes))
        if failure is not None:
            raise failure
        shared: dict[str, NDArray[np.generic]] = {}
        for name, (shape, dtype) in shapes.items():
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            window = MPI.Win.Allocate_shared(size if leads else 0, 1, comm=node)
            self._windows.append(window)
            memory, _ = window.Shared_query(0)
            array = np.asarray(memory.cast("B"))[:size].view(dtype).reshape(shape)
            if leads:
                array[...] = arrays[name]
            shared[name] = array
        node.Barrier()
        assert description is not None
        return description, shared

    @override
    def serve(
        self, plan: ScenarioPlan, layout: UpdateLayout, worker: Worker, *, capacity: int
    ) -> None:
        _check_size(layout, capacity)
        model = np.empty((2, layout.size), np.float32)
        messages = itertools.cycle([Message(layout, self.allocate, capacity) for _ in range(2)])
        sends: deque[MPI.Request] = deque()
        shares = plan.share(self.rank - 1, self.workers)
        # Two models and two messages: the next model may arrive, and the last update leave, while
        # the worker computes.
        upcoming = next(shares, None)
        arriving = self._expect_model(plan, model[0]) if upcoming else MPI.REQUEST_NULL
        for turn in itertools.count():
            if upcoming is None:
                break
            _, tasks = upcoming
            _wait(arriving)
            upcoming = next(shares, None)
            if upcoming is not None:
                arriving = self._expect_model(plan, model[(turn + 1) % 2])
            worker.load(model[turn % 2])
            for task in tasks:
                if len(sends) == 2:
                    _wait(sends.popleft())
                message = next(messages)
                worker.work(task, message)
                # Synchronous: completes only when the root has posted the receive, so that no
                # library buffers updates without bound on the root.
                sends.append(self._comm.Issend(_sent(message), dest=0, tag=_UPDATE))
            if plan.reduces:
                # Named, for the request alone does not keep the buffer of a reduction alive.
                total = worker.take_sum()
                _wait(self._reductions.Ireduce(total, None, op=MPI.SUM, root=0))
        for send in sends:
            _wait(send)

    def _expect_model(self, plan: ScenarioPlan, buffer: NDArray[np.float32]) -> MPI.Request:
        if plan.broadcasts(self.workers, buffer.nbytes):
            return self._comm.Ibcast(buffer, root=0)
        return self._comm.Irecv(buffer, source=0, tag=_MODEL)

    @override
    def open(
        self,
        plan: ScenarioPlan,
        layout: UpdateLayout,
        worker: Worker | None,
        *,
        buffers: int,
        capacity: int,
    ) -> Downlink:
        _check_size(layout, capacity)
        messages = [
            Message(layout, self.allocate, capacity)
            for _ in range(min(buffers, max(2 * self.workers, 2)))
        ]
        return _MPIDownlink(self._comm, self._reductions, plan, self.workers, messages)

    @override
    def finish(self) -> None:
        _wait(self._comm.Ibarrier())
        for window in self._windows:
            window.Free()


class _MPIDownlink(Downlink):
    def __init__(
        self,
        comm: MPI.Intracomm,
        reductions: MPI.Intracomm,
        plan: ScenarioPlan,
        workers: int,
        messages: list[Message],
    ) -> None:
        self._comm = comm
        self._reductions = reductions
        self._plan = plan
        self._workers = workers
        self._models: deque[tuple[int, list[MPI.Request]]] = deque()
        self._tasks = plan.tasks()
        self._posted: deque[tuple[Task, MPI.Request, Message]] = deque()
        self._current: Message | None = None
        for message in messages:
            self._post(message)

    @override
    def publish(self, round_: int, model: NDArray[np.float32]) -> None:
        if self._plan.broadcasts(self._workers, model.nbytes):
            requests = [self._comm.Ibcast(model, root=0)]
        else:
            requests = [
                self._comm.Isend(model, dest=1 + worker, tag=_MODEL)
                for worker in self._plan.needed_by(round_, self._workers)
            ]
        if self._plan.fresh_model:
            self._models.append((round_, requests))
            return
        # In training the workers wait for the model. It has to leave before the root turns to the
        # attacks: without its help no large message would move on.
        for request in requests:
            _wait(request)

    @override
    def receive(self, task: Task) -> Message:
        if self._current is not None:
            self._post(self._current)
            self._current = None
        expected, request, message = self._posted.popleft()
        status = MPI.Status()
        _wait(request, status)
        moved = 4 * status.Get_count(MPI.INT32_T)
        if moved != message.used:
            raise RuntimeError(f"an update of {task} says {message.used} bytes, {moved} came")
        header = message.header
        found = Task(int(header["scenario"]), int(header["round"]), int(header["client"]))
        if not found == expected == task:
            raise RuntimeError(f"expected the update of {task}, planned {expected}, got {found}")
        while self._models and self._models[0][0] < task.round:
            # All updates of that round have come, so its model has been received everywhere.
            for sent in self._models.popleft()[1]:
                _wait(sent)
        self._current = message
        return message

    @override
    def reduce(self, total: NDArray[Any]) -> None:
        # The server takes part with nothing of its own, and sees the sum alone.
        _wait(self._reductions.Ireduce(MPI.IN_PLACE, total, op=MPI.SUM, root=0))

    def _post(self, message: Message) -> None:
        task = next(self._tasks, None)
        if task is not None:
            source = 1 + self._plan.worker(task, self._workers)
            request = self._comm.Irecv(_items(message), source=source, tag=_UPDATE)
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
                for sent in requests:
                    _wait(sent)


def _items(message: Message) -> NDArray[np.int32]:
    return message.buffer.view(np.int32)


def _sent(message: Message) -> NDArray[np.int32]:
    """Return what is sent of a message: no more than the update takes."""
    return message.buffer[: message.used].view(np.int32)


def _check_size(layout: UpdateLayout, capacity: int) -> None:
    size = max(4 * layout.size, capacity) + (1 << 20)
    if size > _MAX_BYTES:
        raise UserError(
            f"an update of {layout.size} parameters is too large for one MPI message "
            f"({size} bytes, at most {_MAX_BYTES}): use a smaller model"
        )


def _wait(request: MPI.Request, status: MPI.Status | None = None) -> None:
    """Wait without keeping a core from the ranks that compute.

    Open MPI spins in a blocking wait. Here a rank tests and gives way to others, which costs a
    waiting rank nothing of a core that somebody else wants; where that takes long it sleeps, for a
    small share of the time that it has waited already.
    """
    started = time.monotonic()
    while not request.Test(status):
        waited = time.monotonic() - started
        if waited < _PATIENCE:
            os.sched_yield()
        else:
            time.sleep(min(waited / 10, _LONGEST_NAP))


# Seconds. Timers are dear on virtual machines: naps of microseconds cost more than they save.
_PATIENCE = 0.01
_LONGEST_NAP = 0.005
