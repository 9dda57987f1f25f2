"""How far a submitted job is: what Slurm says of it, and what is in its results files."""

import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.words import Command, NoAnswer
from testbed.errors import UserError

# Seconds between two looks.
_PAUSE = 5.0
# States of jobs that are over; whatever else there is, or will be, may change yet.
_OVER = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "LAUNCH_FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
_FIXES = {
    "OUT_OF_MEMORY": "ask for more, as in --sbatch=--mem=32G",
    "TIMEOUT": "the run was not done with its round in time: a longer --warning",
}
# Slurm's reason for a job that it could not start.
_NOT_LAUNCHED = "JobLaunchFailure"
_MOST_SHOWN = 5


@dataclass(frozen=True)
class Part:
    """A job, an element of an array, or elements that have not begun.

    Attributes
    ----------
    name
        Its number, as in ``12`` or ``12_3``.
    state
        In Slurm's words, as in ``RUNNING``.
    count
        How many elements.
    reason
        Why it waits, or could not be started; empty for none.
    log
        The file with what it prints; empty where that is not known.
    """

    name: str
    state: str
    count: int = 1
    reason: str = ""
    log: str = ""


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

    Raises
    ------
    UserError
        Slurm does not know the job, nor did it.
    """
    shown = ""
    ended: dict[str, Part] = {}
    try:
        while True:
            parts = remember(ended, look(job))
            line = f"{describe(parts)}; {progress(outputs)}"
            if line != shown:
                print(time.strftime("%H:%M:%S ") + line, flush=True)
                shown = line
            if parts and all(part.state in _OVER for part in parts):
                return _end(parts)
            time.sleep(pause)
    except KeyboardInterrupt:
        print(f"\njob {job} goes on; `scancel {job}` ends it", file=sys.stderr)
        return 130


def remember(ended: dict[str, Part], seen: Sequence[Part]) -> list[Part]:
    """Return what is seen of a job, and those of its elements that Slurm has forgotten meanwhile.

    Parameters
    ----------
    ended
        Elements that were over when they were seen last, by name; kept up to date.
    seen
        Elements as Slurm has them now; none where it does not answer.
    """
    if not seen:
        return []
    for part in seen:
        ended.pop(part.name, None)  # it may have been queued again
    forgotten = list(ended.values())
    ended.update({part.name: part for part in seen if part.state in _OVER})
    return [*seen, *forgotten]


def look(job: str) -> list[Part]:
    """Return the parts of a job; none where Slurm does not answer now.

    Raises
    ------
    UserError
        Slurm does not know the job, nor did it.
    """
    try:
        said = Command(["scontrol", "--oneliner", "show", "job", job]).finish()
    except NoAnswer:
        return []
    parts = [read_part(line) for line in said.stdout.splitlines() if "JobState=" in line]
    if parts:
        return parts
    if said.returncode != 0 and "Invalid job id" not in said.stderr:
        return []
    # Slurm forgets a job some minutes after its end; its accounts do not, where they are kept.
    return _look_back(job)


def _look_back(job: str) -> list[Part]:
    """Return the parts of a job that is over; none where its accounts cannot be read now."""
    unknown = UserError(
        f"job {job}: Slurm does not know it any more, and keeps no accounts of it; its log tells "
        "how it has ended"
    )
    if shutil.which("sacct") is None:
        raise unknown
    try:
        said = Command(["sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", job]).finish()
    except NoAnswer:
        return []
    # CANCELLED by 1000
    rows = re.findall(r"^([^|\n]+)\|([A-Z_]+)", said.stdout, re.MULTILINE)
    if not rows and (said.returncode == 0 or "storage is disabled" in said.stderr):
        raise unknown
    return [Part(name, state) for name, state in rows]


def read_part(line: str) -> Part:
    """Return what ``scontrol --oneliner show job`` says in a line."""
    facts = dict(word.partition("=")[::2] for word in line.split())
    state, reason = facts["JobState"], facts.get("Reason", "None")
    if state == "PENDING" and facts.get("Restarts", "0") != "0" and reason == "BeginTime":
        # After its end it has to wait for some minutes.
        state, reason = "REQUEUED", "None"
    name, elements = facts.get("JobId", ""), facts.get("ArrayTaskId", "")
    if elements:
        name = f"{facts.get('ArrayJobId', name)}_{elements}"
    # Its folder may have spaces.
    log = re.search(r" StdOut=(.*?)(?= [A-Z]\w*=|\s*$)", line)
    told = reason == _NOT_LAUNCHED or (state == "PENDING" and reason != "None")
    return Part(name, state, _length(elements), reason if told else "", log[1] if log else "")


def _length(elements: str) -> int:
    """Return how many elements there are in ``3-7,9%2``, 1 for no array."""
    count = 0
    for part in elements.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        last, _, step = last.partition(":")
        if first.isdecimal():
            count += len(range(int(first), int(last or first) + 1, int(step or 1)))
    return max(count, 1)


def describe(parts: Sequence[Part]) -> str:
    """Return how many parts are in which state: ``2 running, 5 pending (Resources)``."""
    if not parts:
        return "Slurm does not answer"
    counts: Counter[str] = Counter()
    for part in parts:
        reason = f" ({part.reason})" if part.reason else ""
        counts[part.state.lower() + reason] += part.count
    if sum(counts.values()) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))


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


def _end(parts: Sequence[Part]) -> int:
    """Say what has not completed, and where to look; return the exit status."""
    failed = [part for part in parts if part.state != "COMPLETED"]
    for part in failed[:_MOST_SHOWN]:
        words = [f"job {part.name}: {part.state.lower()}"]
        if part.state in _FIXES:
            words.append(_FIXES[part.state])
        if part.reason == _NOT_LAUNCHED:
            words.append("Slurm could not start it: is the folder of its log (--output) there?")
        if part.log and Path(part.log).exists():
            words.append(f"see {part.log}")
        print("; ".join(words), file=sys.stderr)
    if len(failed) > _MOST_SHOWN:
        print(f"... and {len(failed) - _MOST_SHOWN} more", file=sys.stderr)
    if failed:
        print("the same line goes on with what is there", file=sys.stderr)
    return int(bool(failed))
