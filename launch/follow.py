"""How far a submitted job is: what Slurm says of it, and what is in its results files."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from launch.words import Command
from testbed.errors import UserError

# Seconds between two looks.
_PAUSE = 5.0
# States of jobs that are not over.
_OPEN = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "STOPPED",
}


def follow(job: str, outputs: Sequence[Path], pause: float = _PAUSE) -> int:
    """Print how far a job is whenever that changes; return 0 if all of it has completed, else 1.

    Parameters
    ----------
    job
        Its number; an array's stands for all its elements.
    outputs
        The results files of its elements.
    pause
        Seconds between two looks.
    """
    shown = ""
    try:
        while True:
            states = job_states(job)
            line = f"{_counted(states)}; {progress(outputs)}"
            if line != shown:
                print(time.strftime("%H:%M:%S ") + line, flush=True)
                shown = line
            if not _OPEN & states.keys():
                return 0 if set(states) == {"COMPLETED"} else 1
            time.sleep(pause)
    except KeyboardInterrupt:
        print(f"\njob {job} goes on; `scancel {job}` ends it", file=sys.stderr)
        return 130


def job_states(job: str) -> Counter[str]:
    """Return how many elements of a job are in which state.

    Raises
    ------
    UserError
        Slurm does not know the job, nor did it.
    """
    said = Command(["scontrol", "--oneliner", "show", "job", job]).finish()
    states: Counter[str] = Counter()
    for line in said.stdout.splitlines():
        facts = dict(part.partition("=")[::2] for part in line.split())
        # The elements of an array that have not begun are one line: ArrayTaskId=3-7.
        count = _length(facts.get("ArrayTaskId", "0"))
        state = facts.get("JobState", "UNKNOWN")
        reason = facts.get("Reason", "None")
        if state == "PENDING" and int(facts.get("Restarts", 0)) and reason == "BeginTime":
            state = "REQUEUED"
        states[state] += count
    if states:
        return states
    # Slurm forgets a job some minutes after its end; its accounts do not, where they are kept.
    words = ["sacct", "-n", "-X", "-P", "-o", "State", "-j", job]
    try:
        kept = Command(words).finish().stdout.split("\n")
    except UserError:
        kept = []
    states.update(line.split()[0] for line in kept if line.strip())
    if not states:
        raise UserError(f"job {job}: Slurm does not know it ({said.stderr.strip()})")
    return states


def _length(elements: str) -> int:
    """Return how many elements there are in ``3-7,9%2``."""
    count = 0
    for part in elements.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        last, _, step = last.partition(":")
        if first.isdecimal():
            count += len(range(int(first), int(last or first) + 1, int(step or 1)))
    return max(count, 1)


def _counted(states: Counter[str]) -> str:
    if sum(states.values()) == 1:
        return next(iter(states)).lower()
    return ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()))


def progress(outputs: Sequence[Path]) -> str:
    """Return how many rounds there are in results files, of how many."""
    from testbed.results.reader import open_results

    done = planned = begun = 0
    for output in outputs:
        try:
            with open_results(output) as results:
                done += sum(scenario.committed for scenario in results.scenarios)
                planned += sum(scenario.rounds for scenario in results.scenarios)
                begun += 1
        except UserError:  # not begun; or its name is being changed at this moment
            continue
    if not begun:
        return "no results yet"
    files = f" in {begun} of {len(outputs)} files" if len(outputs) > 1 else ""
    return f"{done} of {planned} rounds{files}"
