"""Waiting for MPI, and what the root says meanwhile.

Every wait of a rank goes through `Control.wait`, so that a rank that waits hears the root: that the
run ends early, whether it still answers, that others are lost. The round loop itself needs no such
messages: the plan tells every rank what comes next.
"""

import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from functools import partial
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI

from testbed.transport.base import RanksLost, StopAsked

T = TypeVar("T")

_SAY, _ANSWER, _GATE, _OBJECT = 1, 2, 3, 4
# Of a message from the root, int64: what, a number, how many more, and these.
_WORDS = 64
_MOST = _WORDS - 3
# Seconds. Timers are dear on virtual machines: naps of microseconds cost more than they save.
_PATIENCE = 0.01
_LONGEST_NAP = 0.005
_LOST = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)


class Word(IntEnum):
    """What the root says."""

    PING = 1
    STOP = 2
    DONE = 3
    LOST = 4


@contextmanager
def noticing() -> Iterator[None]:
    """Turn what MPI says of a dead rank into `RanksLost`."""
    try:
        yield
    except MPI.Exception as error:
        if error.Get_error_class() in _LOST:
            raise RanksLost(error.Get_error_string()) from None
        raise


class Control:
    """One rank's end of the channel on which the root speaks.

    Parameters
    ----------
    comm
        A communicator for this alone, on which nothing is ever revoked.

    Attributes
    ----------
    done
        Whether the root has said that all is done.
    victims
        The processes that this rank is to kill, when others are lost.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._heard = np.zeros(_WORDS, np.int64)
        self._listening: MPI.Request | None = None
        # What is under way must not be freed.
        self._sent: list[tuple[MPI.Request, object]] = []
        self._answers: dict[int, tuple[MPI.Request, np.ndarray[tuple[int], np.dtype[np.int64]]]]
        self._answers = {}
        self._pings = 0
        self.done = False
        self.victims: list[int] | None = None
        if comm.rank != 0:
            self._listen()

    def wait(
        self,
        request: MPI.Request,
        status: MPI.Status | None = None,
        *,
        limit: float | None = None,
    ) -> bool:
        """Wait for a request without keeping a core from the ranks that compute.

        Open MPI spins in a blocking wait. Here a rank tests and gives way to others, which costs a
        waiting rank nothing of a core that somebody else wants; where that takes long it sleeps,
        for a small share of the time that it has waited already.

        Returns whether the request is done; else ``limit`` seconds have passed.

        Raises
        ------
        RanksLost, StopAsked
            As it was noticed, or as the root says.
        """
        with noticing():
            return self.until(lambda: request.Test(status), limit)

    def until(self, condition: Callable[[], bool], limit: float | None = None) -> bool:
        """Wait for a condition; see `wait`."""
        started = time.monotonic()
        while not condition():
            waited = time.monotonic() - started
            if limit is not None and waited > limit:
                return False
            if waited < _PATIENCE:
                os.sched_yield()
            else:
                self.hear()
                time.sleep(min(waited / 10, _LONGEST_NAP))
        return True

    def hear(self) -> None:
        """Do what the root says, if it has said something; nothing on the root."""
        while self._listening is not None and self._arrived(self._listening):
            word, number, count = (int(value) for value in self._heard[:3])
            rest = self._heard[3 : 3 + count].tolist()
            self._listening = None
            if word == Word.LOST:
                self.victims = rest
                raise RanksLost("the root has lost ranks")
            if word == Word.STOP:
                raise StopAsked(number)
            self._listen()
            if word == Word.DONE:
                self.done = True
            else:
                answer = np.array([number], np.int64)
                self._keep(self._comm.Isend(answer, dest=0, tag=_ANSWER), answer)

    def say(self, word: Word, rank: int, number: int = 0, rest: Sequence[int] = ()) -> None:
        """Say something to a rank, from the root; nothing happens if it is dead."""
        message = np.zeros(_WORDS, np.int64)
        rest = rest[:_MOST]
        message[:3] = word, number, len(rest)
        message[3 : 3 + len(rest)] = rest
        try:
            self._keep(self._comm.Isend(message, dest=rank, tag=_SAY), message)
        except MPI.Exception as error:
            if error.Get_error_class() not in _LOST:
                raise

    def say_to_all(self, word: Word, number: int = 0) -> None:
        """Say something to every other rank, from the root."""
        for rank in range(1, self._comm.size):
            self.say(word, rank, number)

    def silent(self, limit: float, until: Callable[[], bool]) -> list[int] | None:
        """Return the ranks that do not answer the root within ``limit`` seconds.

        None if a condition comes true before.
        """
        self._pings += 1
        ranks = range(1, self._comm.size)
        for rank in ranks:
            self._expect(rank)
            self.say(Word.PING, rank, self._pings)
        waiting = set(ranks)

        def done() -> bool:
            for rank in list(waiting):
                request, answer = self._answers[rank]
                if self._arrived(request):
                    if int(answer[0]) == self._pings:
                        waiting.discard(rank)
                    del self._answers[rank]
                    self._expect(rank)
            return not waiting or until()

        if self.until(done, limit) and waiting:
            return None
        return sorted(waiting)

    def _expect(self, rank: int) -> None:
        if rank not in self._answers:
            answer = np.zeros(1, np.int64)
            request = self._comm.Irecv(answer, source=rank, tag=_ANSWER)
            self._answers[rank] = request, answer

    @staticmethod
    def _arrived(request: MPI.Request) -> bool:
        with noticing():
            return bool(request.Test())

    def _listen(self) -> None:
        self._listening = self._comm.Irecv(self._heard, source=0, tag=_SAY)

    def _keep(self, request: MPI.Request, buffer: object) -> None:
        self._sent = [pair for pair in self._sent if not _over(pair[0])]
        self._sent.append((request, buffer))


def gate(
    comm: MPI.Intracomm,
    control: Control,
    *,
    wait: Callable[[MPI.Request], object] | None = None,
) -> None:
    """Wait until every rank of a communicator is here.

    By way of its first rank. A blocking collective behind it does not spin for long, and Open MPI's
    non-blocking ones do not say what has happened when a rank dies.
    """
    nothing = np.zeros(0, np.int8)
    others = range(1, comm.size)
    wait = wait or control.wait
    with noticing():
        if comm.rank:
            here = comm.Isend(nothing, dest=0, tag=_GATE)
            wait(comm.Irecv(nothing, source=0, tag=_GATE))
            wait(here)
            return
        for request in [comm.Irecv(nothing, source=rank, tag=_GATE) for rank in others]:
            wait(request)
        for request in [comm.Isend(nothing, dest=rank, tag=_GATE) for rank in others]:
            wait(request)


def farewell(comm: MPI.Intracomm, control: Control, limit: float) -> None:
    """Wait until every rank of a communicator that lives is here; for ``limit`` seconds at most.

    What the root has said before has arrived then: nobody takes a root that ends for a dead one.
    """
    end = time.monotonic() + limit
    nothing = np.zeros(0, np.int8)

    def meet(start: Callable[[], MPI.Request]) -> None:
        with suppress(RanksLost, StopAsked, MPI.Exception), noticing():
            control.wait(start(), limit=max(0.0, end - time.monotonic()))

    others = range(1, comm.size) if comm.rank == 0 else [0]
    receive = [partial(comm.Irecv, nothing, source=rank, tag=_GATE) for rank in others]
    send = [partial(comm.Isend, nothing, dest=rank, tag=_GATE) for rank in others]
    for step in [*receive, *send] if comm.rank == 0 else [*send, *receive]:
        meet(step)


def gather_objects(comm: MPI.Intracomm, control: Control, value: T) -> list[T]:
    """Return every rank's value on the first rank, nothing elsewhere; pickled, for set-up.

    Point to point, since a rank that waits in a blocking collective does not hear of a loss.
    """
    if comm.rank:
        _send(comm, control, 0, value)
        return []
    return [value, *(_receive(comm, control, rank) for rank in range(1, comm.size))]


def spread_object(comm: MPI.Intracomm, control: Control, value: T) -> T:
    """Return the first rank's value on every rank; see `gather_objects`."""
    if comm.rank:
        received: T = _receive(comm, control, 0)
        return received
    for rank in range(1, comm.size):
        _send(comm, control, rank, value)
    return value


def _send(comm: MPI.Intracomm, control: Control, rank: int, value: object) -> None:
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    length = np.array([len(data)], np.int64)
    with noticing():
        requests = [comm.Isend(part, dest=rank, tag=_OBJECT) for part in (length, data)]
    for request in requests:
        control.wait(request)


def _receive(comm: MPI.Intracomm, control: Control, rank: int) -> Any:
    length = np.zeros(1, np.int64)
    with noticing():
        request = comm.Irecv(length, source=rank, tag=_OBJECT)
    control.wait(request)
    data = np.empty(int(length[0]), np.uint8)
    with noticing():
        request = comm.Irecv(data, source=rank, tag=_OBJECT)
    control.wait(request)
    return pickle.loads(data.tobytes())  # of a rank of this run


def _over(request: MPI.Request) -> bool:
    try:
        return bool(request.Test())
    except MPI.Exception:  # to a rank that is dead
        return True
