"""Arrays that the ranks of a host have once, in memory that all of them map."""

import mmap
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from testbed.errors import UserError
from testbed.transport.base import RanksLost
from testbed.transport.control import Control, gate, spread_object

T = TypeVar("T")


class NodeMemory:
    """What the ranks of a host share.

    Parameters
    ----------
    host
        Its name.
    tolerant
        Whether ranks may die without the end of the run: Open MPI's windows do not survive that.
    """

    def __init__(self, host: str, *, tolerant: bool) -> None:
        self._host = host
        self._tolerant = tolerant
        self._windows: list[MPI.Win] = []

    def share(
        self,
        node: MPI.Intracomm,
        control: Control,
        load: Callable[[], tuple[T, dict[str, NDArray[np.generic]]]],
    ) -> tuple[T, dict[str, NDArray[np.generic]]]:
        """Load on the first rank of ``node``, the ranks of this host; see `Transport.share`."""
        leads = node.rank == 0
        arrays: dict[str, NDArray[np.generic]] = {}
        description: T | None = None
        failure: Exception | None = None
        if leads:
            try:
                description, arrays = load()
            except UserError as error:
                failure = error
            except Exception:
                failure = RuntimeError(f"on host {self._host}: {traceback.format_exc()}")
        shapes = {name: (array.shape, array.dtype.str) for name, array in arrays.items()}
        failure, description, shapes = spread_object(node, control, (failure, description, shapes))
        if failure is not None:
            raise failure
        shared: dict[str, NDArray[np.generic]] = {}
        for name, (shape, dtype) in shapes.items():
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            memory = self._allocate(node, control, size)
            array = np.asarray(memory.cast("B"))[:size].view(dtype).reshape(shape)
            if leads:
                array[...] = arrays[name]
            shared[name] = array
        gate(node, control)
        assert description is not None
        return description, shared

    def free(self) -> None:
        """Give the memory back, together with all others of the host."""
        for window in self._windows:
            window.Free()

    def _allocate(self, node: MPI.Intracomm, control: Control, size: int) -> Any:
        """Return memory that all ranks of this host have, which the first of them may write to."""
        leads = node.rank == 0
        if not self._tolerant:
            window = MPI.Win.Allocate_shared(size if leads else 0, 1, comm=node)
            self._windows.append(window)
            return window.Shared_query(0)[0]
        # Anonymous memory of the first rank outlives it, once the others have mapped it.
        descriptor = os.memfd_create("testbed") if leads else -1
        if leads:
            os.ftruncate(descriptor, max(size, 1))
        place = spread_object(node, control, f"/proc/{os.getpid()}/fd/{descriptor}")
        if not leads:
            try:
                descriptor = os.open(place, os.O_RDWR)
            except FileNotFoundError:
                if Path(place).parents[1].exists():
                    raise
                raise RanksLost("the first rank of this host has died") from None
        memory = mmap.mmap(descriptor, max(size, 1))
        gate(node, control)
        os.close(descriptor)
        return memoryview(memory)
