"""Imports PyTorch, on which most of the time goes that a rank takes to start."""

import gc
import sys


def import_torch() -> None:
    """Import PyTorch, and keep what it makes away from the garbage collector.

    Its hundreds of thousands of objects live as long as the process. A collector that knows them
    goes through them in every full collection, and when the process ends.

    Raises
    ------
    ImportError
        PyTorch is not there, or not whole.
    """
    if sys.modules.get("torch") is not None:  # None is what makes an import fail on purpose
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
