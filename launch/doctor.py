"""``python -m launch doctor``: what is here for a run, and what is missing, with the fix."""

import dataclasses
import json as json_format
import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.checks import Finding, Programs
from launch.checks_folder import examine_folder, examine_nodes
from launch.checks_gpu import examine_gpus
from launch.checks_machine import examine_machine
from launch.checks_mpi import examine_mpi
from launch.checks_python import examine_python
from launch.checks_slurm import examine_slurm
from testbed.errors import printable

_TITLES = {
    "python": "Python",
    "mpi": "MPI",
    "slurm": "Slurm",
    "gpu": "GPUs",
    "machine": "This machine",
    "files": "Results",
    "nodes": "All nodes",
}
_WIDEST = 110


def doctor(folder: Path, *, json: bool = False, patience: float = 1) -> int:
    """Examine this machine, print a report, and return an exit status.

    Other programs and libraries are tried in processes of their own, for some 20 seconds at most,
    times the patience.

    Parameters
    ----------
    folder
        Where results would be written.
    json
        Print a list of findings, for programs.
    patience
        How much longer than usual programs are waited for.

    Returns
    -------
    status
        0 where a run can be started on this machine, 1 where something that it needs is missing.
    """
    findings = examine(folder, patience=patience)
    if json:
        print(json_format.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        print(render(findings, min(shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST)))
    return int(any(finding.state == "missing" for finding in findings))


def examine(
    folder: Path, environment: Mapping[str, str] = os.environ, *, patience: float = 1
) -> list[Finding]:
    """Return what is found on this machine, all sections at once.

    Parameters
    ----------
    folder
        Where results would be written.
    environment
        Environment variables by which programs are found.
    patience
        See `doctor`.
    """
    programs = Programs(environment, patience=patience)
    with ThreadPoolExecutor() as pool:
        try:
            mpi = pool.submit(examine_mpi, programs)
            slurm = pool.submit(examine_slurm, programs)
            gpus = pool.submit(examine_gpus, programs)
            files = pool.submit(examine_folder, programs, folder)
            here = [examine_python(environment), examine_machine()]
            of_slurm, nodes = slurm.result()
            of_files = files.result()
            seen = of_files[0].state != "missing"
            return [
                *here[0],
                *mpi.result(),
                *of_slurm,
                *gpus.result(),
                *here[1],
                *of_files,
                *(examine_nodes(folder, nodes) if seen else []),
            ]
        finally:
            programs.close()


def render(findings: Sequence[Finding], width: int) -> str:
    """Return a report as plain text.

    Parameters
    ----------
    findings
        In the order in which they are shown.
    width
        Columns that a line has at most, where its words allow it.
    """
    column = max(len(finding.what) for finding in findings) + 2
    lines: list[str] = []
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", _TITLES.get(section, section)]
        start = f"  {finding.state:<9}{finding.what:<{column}}"
        lines += _wrapped(finding.found, start, width)
        if finding.fix:
            lines += _wrapped(f"fix: {finding.fix}", " " * len(start), width)
    return "\n".join([*lines[1:], "", *_summary(findings)])


def _wrapped(text: str, start: str, width: int) -> list[str]:
    return textwrap.wrap(
        printable(text),
        max(width, len(start) + 20),
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _summary(findings: Sequence[Finding]) -> list[str]:
    missing = [finding.what for finding in findings if finding.state == "missing"]
    notes = sum(finding.state == "note" for finding in findings)
    noted = f"; notes: {notes}" if notes else ""
    if missing:
        return [f"No run can be started here until this is mended: {', '.join(missing)}{noted}"]
    return [f"A run can be started here{noted}"]
