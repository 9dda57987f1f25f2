"""Measures memory."""

import contextlib
import tracemalloc
from collections.abc import Iterator


@contextlib.contextmanager
def peak_below(limit: float) -> Iterator[None]:
    """Fail if the block allocates more than ``limit`` bytes at a time."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit
