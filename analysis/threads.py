"""Threads of linear algebra."""

from contextlib import AbstractContextManager, nullcontext


def limited(threads: int) -> AbstractContextManager[object]:
    """Return a context in which NumPy and SciPy compute with this many threads.

    The last bits of an answer depend on the number, and its time does where the machine has other
    work: for small matrices, threads that wait for each other take many times as long as one.
    """
    import scipy.linalg  # noqa: F401 - only what has been loaded can be told

    try:
        from threadpoolctl import threadpool_limits
    except ImportError:  # it comes with what runs need, and the analysis does without
        return nullcontext()
    limits: AbstractContextManager[object] = threadpool_limits(threads)
    return limits
