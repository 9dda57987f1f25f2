"""Which device a rank computes on."""

import importlib
import os
from dataclasses import dataclass

import threadpoolctl
import torch

from testbed.errors import UserError
from testbed.results.placed import write_ranges


@dataclass(frozen=True)
class Placement:
    """Where a rank computes.

    Attributes
    ----------
    host
        Its host name.
    local_rank
        Its rank among those on the host.
    device
        ``cpu`` or ``cuda:N``.
    description
        The device and its product name, for the results file.
    cores
        The CPUs of the host that it may run on, as in ``0-3,8``; empty where the system does not
        tell.
    gpu
        Its GPU's UUID, which all ranks of a host see alike, as ``nvidia-smi -L`` writes it
        (``GPU-...``); empty on a CPU.
    """

    host: str
    local_rank: int
    device: str
    description: str
    cores: str
    gpu: str = ""


def place(preference: str, *, host: str, local_rank: int, threads: int) -> Placement:
    """Choose this rank's device and fix its arithmetic.

    The GPU is that of the local rank among the visible ones, modulo their number, so it respects
    ``CUDA_VISIBLE_DEVICES`` and Slurm's binding; several ranks may share one.

    Parameters
    ----------
    preference
        ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``.
    host, local_rank
        Of this rank.
    threads
        Threads for arithmetic on the CPU; results depend on it.

    Raises
    ------
    UserError
        ``cuda`` is asked for and no GPU is visible.
    """
    torch.set_num_threads(threads)
    # NumPy's and SciPy's, which would take all cores of the host on every rank: only what has been
    # loaded can be told.
    importlib.import_module("scipy.linalg")
    threadpoolctl.threadpool_limits(threads)
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if preference == "cuda" and not available:
        reason = "no GPU is visible" if torch.version.cuda else "this PyTorch is built without CUDA"
        raise UserError(
            f"compute.device=cuda, but on host {host} {reason}: "
            "set compute.device=auto to compute on the CPU where there is no GPU"
        )
    if preference == "cpu" or not available:
        return Placement(host, local_rank, "cpu", "cpu", own_cores())
    index = local_rank % available
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    # The same bits in every run: no choice of kernels by timing, no reduced precision.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    found = torch.cuda.get_device_properties(device)
    return Placement(
        host,
        local_rank,
        str(device),
        f"{device} {found.name}",
        own_cores(),
        # PyTorch leaves out the kind, which the driver, Slurm and CUDA_VISIBLE_DEVICES write.
        f"GPU-{found.uuid}" if hasattr(found, "uuid") else "",
    )


def own_cores() -> str:
    """Return the CPUs that this process may run on, as in ``0-3,8``."""
    if not hasattr(os, "sched_getaffinity"):  # Linux has it
        return ""
    return write_ranges(sorted(os.sched_getaffinity(0)))
