"""Many ranks: models and updates as flat buffers over MPI, nothing pickled in the round loop.

The plan tells every rank what comes next, so there are no control messages in it: the root posts a
receive for each of the next updates, from the rank that will send it, and takes them in the order
of the plan. MPI delivers messages between two ranks in order. Talk is on duplicates of the world.

Where ranks are lost and the run goes on (ULFM: MPI_Comm_revoke and MPI_Comm_shrink, as Open MPI has
them), every communicator is given up and made anew among the survivors; see `MPITransport.recover`.
"""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TypeVar

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from typing_extensions import override

from testbed.plan import ScenarioPlan
from testbed.standard_error import await_reader
from testbed.transport.base import (
    ClientState,
    Downlink,
    Lost,
    RanksLost,
    RootLost,
    StopAsked,
    Transport,
    Worker,
)
from testbed.transport.control import (
    Control,
    Word,
    farewell,
    gather_objects,
    spread_object,
)
from testbed.transport.downlink import MPIDownlink, check_size
from testbed.transport.environment import is_tolerant
from testbed.transport.local import LocalTransport
from testbed.transport.sharing import NodeMemory
from testbed.transport.states import receive_states, send_states
from testbed.transport.uplink import MPIUplink
from testbed.update import Message, UpdateLayout

T = TypeVar("T")

_STATE = 3
# For the others to come to the end of a run that was stopped, in seconds.
_FAREWELL = 10


class _Channels:
    """The communicators of the ranks that there are, each for one use."""

    def __init__(self, base: MPI.Intracomm) -> None:
        self.base = base
        self.rounds = base.Dup()
        # Apart from the broadcasts of models: the ranks do not start both in the same order.
        self.reductions = base.Dup()
        self.control = base.Dup()
        self.node = MPI.Intracomm(base.Split_type(MPI.COMM_TYPE_SHARED, key=base.rank))

    def revoke(self) -> None:
        """Make every call on them fail, on every rank; but not what the root says."""
        for comm in (self.rounds, self.reductions, self.node):
            comm.Revoke()


class MPITransport(Transport):
    """The transport of a run under mpirun or srun; rank 0 is the root, the others are workers."""

    def __init__(self) -> None:
        world = MPI.COMM_WORLD
        self._take(_Channels(world))
        self.number = world.rank
        self.started = world.size
        # Of every rank that there is, its number at the start.
        self._numbers = list(range(world.size))
        self.local_rank = self._channels.node.rank
        self.host = socket.gethostname()
        self.library = MPI.Get_library_version().split(",")[0].split("\n")[0].strip("\0 ")
        # Under --with-ft ulfm, whatever a loss is to do to the run: nothing is used then that does
        # not survive it, or does not tell of it.
        self._tolerant = not self.cannot_recover()
        self._memory = NodeMemory(self.host, tolerant=self._tolerant)
        self._downlink: Downlink | None = None
        here = self._channels.rounds.allgather((self.host, os.getpid()))
        self._places: list[tuple[str, int]] = here
        # Requests that a lost rank left unfinished, with their buffers: MPI may still look at them.
        self._buried: list[object] = []

    def _take(self, channels: _Channels) -> None:
        self._channels = channels
        self._comm = channels.rounds
        self._control = Control(channels.control)
        self._wait = self._control.wait
        self.rank, self.size = channels.base.rank, channels.base.size
        self.workers = max(self.size - 1, 1)

    @override
    def abort(self, status: int) -> None:
        if self._tolerant and self._is_last():
            # Of the last rank that aborts, a tolerant mpirun says 0.
            self._end(status)
        await_reader()
        MPI.COMM_WORLD.Abort(status)

    def _is_last(self) -> bool:
        base = self._channels.base
        with contextlib.suppress(MPI.Exception):
            return bool(base.size - base.Get_failed().size <= 1)
        return False

    @override
    def stop(self, status: int) -> NoReturn:
        self._control.say_to_all(Word.STOP, status)
        raise StopAsked(status)

    @override
    def leave(self, status: int) -> None:
        # What is under way between the ranks will never be finished, as MPI_Finalize would want.
        with contextlib.suppress(StopAsked, RanksLost, MPI.Exception):
            farewell(self._channels.control, self._control, _FAREWELL)
        self._end(status)

    @override
    def part(self, status: int = 0) -> None:
        # MPI_Finalize would wait for the dead, now and then; also for who dies in these moments.
        if self._tolerant:
            self.leave(status)

    @staticmethod
    def _end(status: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        await_reader()
        os._exit(status)

    @override
    def broadcast(self, value: T) -> T:
        return spread_object(self._comm, self._control, value)

    @override
    def gather(self, value: T) -> list[T]:
        return spread_object(
            self._comm, self._control, gather_objects(self._comm, self._control, value)
        )

    @override
    def collect(self, arrays: Sequence[NDArray[np.float32]]) -> list[list[NDArray[np.float32]]]:
        shapes = gather_objects(self._comm, self._control, [array.shape for array in arrays])
        if not self.is_root:
            for array in arrays:
                self._wait(self._comm.Isend(np.ascontiguousarray(array), dest=0, tag=_STATE))
            return []
        collected = [list(arrays)]
        for source, sizes in enumerate(shapes[1:], start=1):
            found = [np.empty(size, np.float32) for size in sizes]
            for array in found:
                self._wait(self._comm.Irecv(array, source=source, tag=_STATE))
            collected.append(found)
        return collected

    @override
    def distribute(self, states: Mapping[int, Mapping[int, ClientState]]) -> dict[int, ClientState]:
        if not self.is_root:
            return receive_states(self._comm, self._wait, 0)
        for worker in range(self.workers):
            send_states(self._comm, self._control, worker + 1, states.get(worker, {}))
        return {}

    @override
    def share(
        self, load: Callable[[], tuple[T, dict[str, NDArray[np.generic]]]]
    ) -> tuple[T, dict[str, NDArray[np.generic]]]:
        return self._memory.share(self._channels.node, self._control, load)

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
        check_size(layout, capacity)
        uplink = MPIUplink(
            self._comm,
            self._channels.reductions,
            self._control,
            plan,
            self.workers,
            layout.size,
            [Message(layout, self.allocate, capacity) for _ in range(2)],
            tolerant=self._tolerant,
        )
        self._buried.append(uplink)
        uplink.serve(worker, start)
        self._buried.pop()

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
        check_size(layout, capacity)
        messages = [
            Message(layout, self.allocate, capacity)
            for _ in range(min(buffers, max(2 * self.workers, 2)))
        ]
        downlink = MPIDownlink(
            self._comm,
            self._channels.reductions,
            self._control,
            plan,
            self.workers,
            messages,
            start=start,
            deadline=self.deadline,
            tolerant=self._tolerant,
        )
        self._downlink = downlink
        return downlink

    @override
    def cannot_recover(self) -> str:
        if not hasattr(MPI.Comm, "Shrink") or "Open MPI" not in self.library:
            return (
                f"{self.library} ends all ranks when one dies: it takes Open MPI 5, started as "
                "mpirun --with-ft ulfm"
            )
        if not is_tolerant(os.environ):
            return (
                "without fault tolerance mpirun ends all ranks when one dies: start the run by "
                "mpirun --with-ft ulfm"
            )
        return ""

    @override
    def recover(self, lost: RanksLost) -> tuple[Transport, list[Lost]]:
        self._channels.revoke()
        victims = self._order_kills(lost) if self.is_root else self._hear_of_loss()
        for process in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        before = self._channels.base.group
        numbers, places = self._numbers, self._places
        self._buried.append((self._channels, self._control, self._downlink))
        channels = self._shrunk()
        here = channels.base.group
        ranks = here.Translate_ranks(list(range(here.size)), before)
        self._numbers = [numbers[rank] for rank in ranks]
        self._places = [places[rank] for rank in ranks]
        self._take(channels)
        stuck = {numbers[rank] for rank in lost.stuck}
        gone = [
            Lost(number, place[0], number in stuck)
            for number, place in zip(numbers, places, strict=True)
            if number not in self._numbers
        ]
        if self._numbers[0] != 0:
            raise RootLost("the root has died")
        if self.size > 1:
            return self, gone
        return _Alone(self), gone

    def _order_kills(self, lost: RanksLost) -> list[int]:
        """Tell every rank that answers which processes it has to kill; return the root's own."""
        stuck = lost.stuck
        orders: dict[int, list[int]] = {}
        for rank in stuck:
            host, process = self._places[rank]
            neighbours = [
                other
                for other, place in enumerate(self._places)
                if place[0] == host and other not in stuck
            ]
            if not neighbours:
                raise RanksLost(f"{lost}, and {host} has no other rank to kill it", stuck)
            orders.setdefault(neighbours[0], []).append(process)
        for rank in range(1, self.size):
            if rank not in stuck:
                self._control.say(Word.LOST, rank, rest=orders.get(rank, []))
        return orders.get(0, [])

    def _hear_of_loss(self) -> list[int]:
        """Return which processes the root wants killed by this rank."""
        control = self._control

        def told() -> bool:
            control.hear()
            return control.done

        if control.victims is None:  # else the root has told it already
            with contextlib.suppress(RanksLost):  # what is waited for; or the root is dead
                control.until(told)
                raise StopAsked(0)  # nothing is left to be done
        return control.victims or []

    def _shrunk(self) -> _Channels:
        base = self._channels.base
        while True:
            base = MPI.Intracomm(base.Shrink())
            channels = None
            try:
                channels = _Channels(base)
            except MPI.Exception:  # another one has died meanwhile
                base.Revoke()
            with contextlib.suppress(MPI.Exception):
                if base.Agree(channels is not None) and channels is not None:
                    return channels

    @override
    def blame(self, lost: RanksLost) -> str:
        ranks = list(lost.stuck)
        if not ranks and hasattr(MPI.Comm, "Get_failed"):
            base = self._channels.base
            failed = base.Get_failed()
            ranks = failed.Translate_ranks(list(range(failed.size)), base.group)
        if not ranks:
            return str(lost)
        names = ", ".join(f"rank {self._numbers[r]} on {self._places[r][0]}" for r in ranks)
        return f"{names} " + (f"gave {lost}" if lost.stuck else "died")

    @override
    def finish(self) -> None:
        if self.is_root:
            self._control.say_to_all(Word.DONE)
        else:
            self._control.until(self._told_done)
        self._memory.free()

    def _told_done(self) -> bool:
        self._control.hear()
        return self._control.done


class _Alone(LocalTransport):
    """The root, when it has lost all others: it computes itself, and ends as it would have."""

    def __init__(self, before: MPITransport) -> None:
        super().__init__()
        self._before = before
        self.started, self.library = before.started, before.library
        self.host, self.local_rank = before.host, before.local_rank
        self.allocate = before.allocate

    @override
    def abort(self, status: int) -> None:
        self._before.abort(status)

    @override
    def leave(self, status: int) -> None:
        self._before.leave(status)

    @override
    def part(self, status: int = 0) -> None:
        self._before.part(status)
