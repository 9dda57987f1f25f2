"""Lets processes read damaged inputs, and starts another one where an input ends one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")
# Where every input ends the process, something else is wrong.
_MOST_FAILURES = 40


@dataclass(frozen=True)
class Failure:
    """An input that did what no input may."""

    format: str
    seed: int
    number: int
    what: str
    detail: str

    @property
    def kind(self) -> str:
        """What failures with the same cause have in common, as far as text can tell."""
        places = [line.strip() for line in self.detail.splitlines() if line.startswith("  File ")]
        # faulthandler tells the innermost call first, Python last.
        if "(most recent call first)" in self.detail:
            places.reverse()
        return "\n".join([self.what, *(places[-1:] or [self.detail[:60]])])

    def __str__(self) -> str:
        return (
            f"{self.format}, input {self.number} of seed {self.seed}: {self.what}\n{self.detail}\n"
            f"again: python tests/fuzz/run.py --format {self.format} --seed {self.seed} "
            f"--only {self.number}"
        )


@dataclass
class Tally:
    """What came of the inputs of a format."""

    format: str
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tried(self) -> int:
        return self.outcomes.total()


def fuzz(
    name: str,
    seed: int,
    *,
    start: int = 0,
    stop: int = 1 << 40,
    seconds: float = 1e9,
    keep: Path | None = None,
    most: int = _MOST_FAILURES,
) -> Tally:
    """Read the inputs of a format.

    Parameters
    ----------
    name
        Of the format.
    seed, start, stop
        Which inputs.
    seconds
        How long at most.
    keep
        Folder for inputs that fail, each in a folder of its own with a report.
    most
        Failures after which it ends.
    """
    tally, began, number = Tally(name), time.monotonic(), start
    while number < stop and len(tally.failures) < most:
        left = seconds - (time.monotonic() - began)
        if left <= 0:
            break
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            number = _read(tally, seed, (number, stop), left, Path(folder), keep)
    tally.seconds = time.monotonic() - began
    return tally


def _read(
    tally: Tally, seed: int, span: tuple[int, int], seconds: float, folder: Path, keep: Path | None
) -> int:
    """Let one process read inputs; return the number of the next one."""
    arguments = [tally.format, seed, *span, seconds, folder]
    errors = folder / "errors"
    number, done = span[0], False
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, str(WORKER), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "MPLCONFIGDIR": str(folder / "matplotlib")},
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            told = json.loads(line)
            number, done = told["at"], "outcome" in told
            if done:
                outcome = told["outcome"]
                good = outcome in ("accepted", "refused")
                tally.outcomes[outcome if good else "failed"] += 1
                if not good:
                    _fail(tally, seed, number, outcome, told["detail"], folder / str(number), keep)
                    if len(tally.failures) >= _MOST_FAILURES:
                        child.kill()
                        return number + 1
    if child.returncode == 0:
        # By its clock time was up, or all were read.
        return span[1]
    tally.outcomes["failed"] += 1
    text = errors.read_text(errors="replace")
    if done or (number == span[0] and not (folder / "in").exists()):
        raise RuntimeError(f"{tally.format}: the process itself failed:\n{text[-4000:]}")
    _fail(tally, seed, number, _death(child.returncode), text[-4000:], folder / "in", keep)
    return number + 1


def _death(status: int) -> str:
    if status >= 0:
        return f"exit with status {status}"
    limits = {signal.SIGPROF: "took too long (processor)", signal.SIGALRM: "took too long (wall)"}
    return limits.get(signal.Signals(-status), f"died of {signal.Signals(-status).name}")


def _fail(
    tally: Tally, seed: int, number: int, what: str, detail: str, files: Path, keep: Path | None
) -> None:
    failure = Failure(tally.format, seed, number, what, detail)
    tally.failures.append(failure)
    if keep is not None:
        place = keep / f"{failure.format}-{seed}-{number}"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(files, place / "in", symlinks=True, ignore=_special)
        (place / "report.txt").write_text(f"{failure}\n", errors="backslashreplace")


def _special(folder: str, names: list[str]) -> list[str]:
    """Return what is neither file nor folder: traps that were laid for the reader."""
    paths = [(name, Path(folder, name)) for name in names]
    return [name for name, path in paths if not (path.is_file() or path.is_dir())]
