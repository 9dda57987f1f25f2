"""GPUs: which there are, and on which of them this PyTorch can compute."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.checks import Finding, Programs

_QUERY = "--query-gpu=name,memory.total,driver_version,compute_mode"


@dataclass(frozen=True)
class Gpu:
    """A GPU as ``nvidia-smi`` sees it; ``memory`` in MiB as it writes it."""

    name: str
    memory: str
    driver: str
    mode: str


def examine_gpus(programs: Programs) -> list[Finding]:
    """Ask nvidia-smi for GPUs, and PyTorch to compute on each that it sees."""
    gpus, driver = _seen(programs)
    torch, reason = programs.probe("torch", seconds=16)
    if torch:
        return [driver, *torch_findings(len(gpus), torch, programs.environment)]
    if reason.startswith("no "):
        found = f"importing it takes long ({reason})"
        fix = "try --patience 5, for the first import is the slowest; if it stays so, put the "
        fix += "virtual environment on a faster file system"
        return [driver, Finding("gpu", "PyTorch", "note", found, fix)]
    fix = "pip install '.[run]' in the repository"
    found = f"it cannot be imported ({reason})"
    return [driver, Finding("gpu", "PyTorch", "missing", found, fix)]


def _seen(programs: Programs) -> tuple[list[Gpu], Finding]:
    what = "driver"
    smi = programs.find("nvidia-smi")
    if not smi:
        found = "there is no nvidia-smi in PATH: no NVIDIA GPU, or no driver"
        return [], Finding("gpu", what, "note", found)
    answer = programs.ask(smi, _QUERY, "--format=csv,noheader,nounits", seconds=6)
    gpus = parse_gpus(answer.out)
    if answer.status != 0 or not gpus:
        fix = "ask the site: the driver is not loaded, or this container or job was given no GPU"
        return [], Finding("gpu", what, "note", f"nvidia-smi: {answer.reason}", fix)
    return gpus, gpus_finding(gpus)


def parse_gpus(text: str) -> list[Gpu]:
    """Return the GPUs of ``nvidia-smi``'s table without header and units."""
    rows = ([field.strip() for field in line.split(",")] for line in text.splitlines())
    return [Gpu(*row) for row in rows if len(row) == 4]


def gpus_finding(gpus: Sequence[Gpu]) -> Finding:
    """Return the finding of the GPUs that nvidia-smi sees."""
    kinds: dict[tuple[str, str], int] = {}
    for gpu in gpus:
        kinds[gpu.name, gpu.memory] = kinds.get((gpu.name, gpu.memory), 0) + 1
    listed = ", ".join(f"{n} {name} with {memory} MiB" for (name, memory), n in kinds.items())
    found = f"NVIDIA {gpus[0].driver}: {listed}"
    if any("Exclusive" in gpu.mode for gpu in gpus):
        found += f"; compute mode {gpus[0].mode}: one process per GPU"
        fix = "start no more ranks on a node than it has GPUs"
        return Finding("gpu", "driver", "note", found, fix)
    return Finding("gpu", "driver", "ok", found)


def torch_findings(
    seen: int, torch: Mapping[str, Any], environment: Mapping[str, str]
) -> list[Finding]:
    """Return what this PyTorch can do with the GPUs of this machine, and why not.

    Parameters
    ----------
    seen
        Number of GPUs that the driver sees.
    torch
        What `launch.checks_probes.torch` has found.
    environment
        Environment variables: ``CUDA_VISIBLE_DEVICES`` is one's own choice.
    """
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else ""
    build = build or (f"ROCm {torch['hip']}" if torch["hip"] else "CPUs alone")
    findings = [Finding("gpu", "PyTorch", "ok", f"{torch['version']}, built for {build}")]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    chosen = "" if visible is None else f"; CUDA_VISIBLE_DEVICES={visible}"
    what = "computes on"
    broken = [f"{i}: {gpu['error']}" for i, gpu in enumerate(torch["gpus"]) if gpu["error"]]
    if broken:
        fix = "see `nvidia-smi` for who else uses it, or install a PyTorch built for this GPU"
        found = f"not on GPU {'; '.join(broken)}{chosen}"
        return [*findings, Finding("gpu", what, "note", found, fix)]
    if torch["gpus"]:
        names = ", ".join(f"cuda:{i} {gpu['name']}" for i, gpu in enumerate(torch["gpus"]))
        return [*findings, Finding("gpu", what, "ok", f"{names}{chosen}")]
    if not seen:
        found = "the CPU: there is no GPU here"
        if torch["cuda"] or torch["hip"]:
            found += ", as on many login nodes"
        return [*findings, Finding("gpu", what, "ok", found + chosen)]
    if not torch["cuda"]:
        found = f"the CPU, though there are GPUs ({seen}): this PyTorch is built for {build}"
        fix = "install PyTorch's CUDA build for this driver (pytorch.org, Get Started)"
    elif visible is not None and not _names_one(visible):
        found = f"the CPU, though there are GPUs ({seen}){chosen} hides them"
        fix = "unset CUDA_VISIBLE_DEVICES"
    elif "too old" in torch["warning"]:
        found = f"the CPU, though there are GPUs ({seen}): {torch['warning']}"
        fix = f"a newer driver, or a PyTorch built for an older CUDA than {torch['cuda']}"
    else:
        warning = torch["warning"] or "PyTorch does not say why"
        found = f"the CPU, though there are GPUs ({seen}): {warning}{chosen}"
        fix = "by hand: python -c 'import torch; torch.zeros(1).cuda()'"
    return [*findings, Finding("gpu", what, "note", found, fix)]


def _names_one(visible: str) -> bool:
    """Return whether a value of CUDA_VISIBLE_DEVICES starts with a device, and not with none."""
    first = visible.split(",")[0].strip()
    return first.isdigit() or first.startswith(("GPU-", "MIG-"))
