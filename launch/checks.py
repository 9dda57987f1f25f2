"""What the doctor finds, and how it asks other programs: none may hang it, or take it along."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# What a launcher tells its processes; programs that are asked shall not take it for their own.
_OF_A_LAUNCHER = re.compile(r"OMPI_COMM_WORLD_|PMI_|PMIX_(?!MCA_)")
_PROBES = Path(__file__).with_name("checks_probes.py")
State = Literal["ok", "note", "missing"]
_LONGEST, _MOST_BYTES = 300, 4_000_000


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    section
        Heading under which it is printed.
    what
        The thing.
    state
        ``ok``; ``note``, which a run can do without, or should know; ``missing``, without which no
        run can be started on this machine.
    found
        What was found.
    fix
        How it is mended, where there is something to mend.
    """

    section: str
    what: str
    state: State
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Answer:
    """What a program has answered.

    Attributes
    ----------
    status
        Its exit status, negative for a signal; None where it was ended because it took too long.
    out, err
        What it wrote.
    seconds
        How long it took.
    """

    status: int | None
    out: str
    err: str
    seconds: float

    @property
    def reason(self) -> str:
        """In a line, why there is no good answer."""
        if self.status is None:
            return f"no answer within {self.seconds:.0f} s" if self.seconds else "no time to ask it"
        lines = [line.strip() for line in (self.err + "\n" + self.out).splitlines()]
        lines = [line for line in lines if line.strip("-=* ")]
        if any(line.startswith("Traceback") for line in lines):
            errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
            lines = errors[-1:] or lines[-1:]
        text = " ".join(lines) or "it says nothing"
        if len(text) > _LONGEST:
            text = text[:_LONGEST] + " ..."
        return f"exit status {self.status}: {text}"


class Programs:
    """The programs of an environment, each asked for a limited time, and all of them together.

    Parameters
    ----------
    environment
        Environment variables that the programs are found by, and get.
    seconds
        After which no program is waited for any longer.
    patience
        Factor for this time and for that of each program, where all is slow.
    """

    def __init__(
        self,
        environment: Mapping[str, str] = os.environ,
        *,
        seconds: float = 18,
        patience: float = 1,
    ) -> None:
        self.environment = dict(environment)
        self._given = {k: v for k, v in environment.items() if not _OF_A_LAUNCHER.match(k)}
        self._end = time.monotonic() + seconds * patience
        self._patience = patience
        self._closed = threading.Event()

    def find(self, name: str) -> str | None:
        """Return the path of a program that is in PATH."""
        return shutil.which(name, path=self.environment.get("PATH", ""))

    def ask(self, *line: str, seconds: float, changes: Mapping[str, str] | None = None) -> Answer:
        """Run a program; end it, and what it has started, when the time is up.

        Parameters
        ----------
        line
            Path and arguments.
        seconds
            Time that it has, times the patience.
        changes
            Environment variables of its own.
        """
        started = time.monotonic()
        end = min(started + seconds * self._patience, self._end)
        if started >= end:
            return Answer(None, "", "", 0.0)
        # Not pipes: what a killed program leaves behind may hold their other end.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                process = subprocess.Popen(
                    line,
                    env={**self._given, **(changes or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
            except OSError as error:
                return Answer(127, "", f"{line[0]}: {error.strerror}", 0.0)
            while process.poll() is None and time.monotonic() < end and not self._closed.is_set():
                time.sleep(0.01)
            status = process.returncode
            if status is None:
                _end(process)
            seconds = time.monotonic() - started
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read(_MOST_BYTES).decode(errors="replace"))
        return Answer(status, texts[0], texts[1], seconds)

    def probe(self, name: str, *arguments: str, seconds: float) -> tuple[dict[str, Any], str]:
        """Ask one of `launch.checks_probes`; return what it has found, or else why not."""
        line = probe_line(name, *arguments)
        answer = self.ask(*line, seconds=seconds, changes={"PYTHONSAFEPATH": "1"})
        # Libraries write what they like before it.
        for text in reversed(answer.out.splitlines()):
            if answer.status == 0 and text.startswith("{"):
                with contextlib.suppress(ValueError):
                    return json.loads(text), ""
        return {}, answer.reason

    def close(self) -> None:
        """End all programs that are waited for."""
        self._closed.set()


def probe_line(name: str, *arguments: str) -> list[str]:
    """Return the command line of a probe, in this Python."""
    return [sys.executable, str(_PROBES), name, *arguments]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and its group: first so that it can end what it has started itself."""
    for number, seconds in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 0.5)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        # One that waits for a dead file server does not end even so, and is left to itself.
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
