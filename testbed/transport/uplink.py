"""A worker's side of a scenario over MPI: models in, updates out, in the order of the plan."""

import itertools
from collections import deque

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from testbed.plan import ScenarioPlan
from testbed.transport.base import Worker
from testbed.transport.control import Control, noticing
from testbed.transport.downlink import MODEL, UPDATE, WANTED, reduce, sent
from testbed.transport.states import send_states
from testbed.update import Message


class MPIUplink:
    """What a worker receives and sends in a scenario, with the buffers for it.

    Two models and two messages: the next model may arrive, and the last update leave, while the
    worker computes.

    Parameters
    ----------
    comm, reductions, control
        For models and updates, for sums, and for what the root says.
    plan, workers
        The scenario, for how many workers.
    size
        Numbers in a model.
    messages
        Two, that updates are sent from.
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
        size: int,
        messages: list[Message],
        *,
        tolerant: bool,
    ) -> None:
        self._tolerant = tolerant
        self._comm = comm
        self._reductions = reductions
        self._control = control
        self._plan = plan
        self._workers = workers
        self._models = np.empty((2, size), np.float32)
        # Whether the root wants the clients' states before it.
        self._wanted = np.zeros((2, 1), np.int32)
        self._messages = messages
        self._sends: deque[MPI.Request] = deque()

    def serve(self, worker: Worker, start: int) -> None:
        """Compute the rounds of the plan from ``start`` on, as far as they are this worker's."""
        plan, messages = self._plan, itertools.cycle(self._messages)
        shares = plan.share(self._comm.rank - 1, self._workers, start)
        upcoming = next(shares, None)
        arriving = [] if upcoming is None else self._expect(0)
        for turn in itertools.count():
            if upcoming is None:
                break
            _, tasks = upcoming
            for request in arriving:
                self._control.wait(request)
            if self._wanted[turn % 2]:
                send_states(self._comm, self._control, 0, worker.states)
            upcoming = next(shares, None)
            if upcoming is not None:
                arriving = self._expect(turn + 1)
            if tasks or plan.reduces:
                worker.load(self._models[turn % 2])
            for task in tasks:
                if len(self._sends) == 2:
                    self._control.wait(self._sends.popleft())
                message = next(messages)
                worker.work(task, message)
                self._send(message)
            if plan.reduces:
                # Named, for the request alone does not keep the buffer of a reduction alive.
                total = worker.take_sum()
                reduce(self._reductions, self._control, total, tolerant=self._tolerant)
        for send in self._sends:
            self._control.wait(send)

    def _send(self, message: Message) -> None:
        # Synchronous: completes only when the root has posted the receive, so that no library
        # buffers updates without bound on the root.
        with noticing():
            self._sends.append(self._comm.Issend(sent(message), dest=0, tag=UPDATE))
        self._control.hear()

    def _expect(self, turn: int) -> list[MPI.Request]:
        """Begin to receive a model, and whether the root wants the clients' states before it."""
        model: NDArray[np.float32] = self._models[turn % 2]
        requests = []
        with noticing():
            if self._plan.keeps_state:
                requests.append(self._comm.Irecv(self._wanted[turn % 2], source=0, tag=WANTED))
            if self._plan.broadcasts(self._workers, model.nbytes) and not self._tolerant:
                requests.append(self._comm.Ibcast(model, root=0))
            else:
                requests.append(self._comm.Irecv(model, source=0, tag=MODEL))
        return requests
