"""What clients remember, sent from rank to rank: flat arrays, nothing pickled."""

from collections.abc import Callable, Mapping

import numpy as np
from mpi4py import MPI

from testbed.transport.base import ClientState
from testbed.transport.control import Control

_TAG = 4
# A message says of each array: whose, which, how long. Names are sent by their place here.
_NAMES = ("residual", "momentum", "head")


def send_states(
    comm: MPI.Intracomm, control: Control, rank: int, states: Mapping[int, ClientState]
) -> None:
    """Send the states of clients, by identity, to a rank that calls `receive_states`."""
    listed = [
        (identity, _NAMES.index(name), array)
        for identity, state in sorted(states.items())
        for name, array in sorted(state.items())
    ]
    index = np.array([(i, name, len(array)) for i, name, array in listed], np.int64).reshape(-1, 3)
    control.wait(comm.Issend(np.array([len(index)], np.int64), dest=rank, tag=_TAG))
    control.wait(comm.Issend(index, dest=rank, tag=_TAG))
    for _, _, array in listed:
        control.wait(comm.Issend(np.ascontiguousarray(array), dest=rank, tag=_TAG))


def receive_states(
    comm: MPI.Intracomm, wait: Callable[[MPI.Request], object], rank: int
) -> dict[int, ClientState]:
    """Return the states that a rank sends."""
    count = np.zeros(1, np.int64)
    wait(comm.Irecv(count, source=rank, tag=_TAG))
    index = np.empty((int(count[0]), 3), np.int64)
    wait(comm.Irecv(index, source=rank, tag=_TAG))
    states: dict[int, ClientState] = {}
    for identity, name, length in index.tolist():
        array = np.empty(length, np.float32)
        wait(comm.Irecv(array, source=rank, tag=_TAG))
        states.setdefault(identity, {})[_NAMES[name]] = array
    return states
