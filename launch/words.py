"""Command lines: as they are printed, and as they are run."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from testbed.errors import UserError

# Seconds for a program that answers at once where all is well.
_PATIENCE = 30.0


class NoAnswer(UserError):  # noqa: N818 - what it is
    """A program did not come to its end in time."""


@dataclass(frozen=True)
class Command:
    """A program with its arguments, and what is set in its environment.

    Attributes
    ----------
    words
        The program and its arguments.
    settings
        Environment variables beside those of this process.
    """

    words: Sequence[str]
    settings: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.settings.items()]
        return " ".join([*settings, shlex.join(self.words)])

    def replace_this_process(self) -> None:
        """Run it in place of this process, which so gets its signals and its status.

        Raises
        ------
        UserError
            There is no such program.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        # Python ignores it, and programs that it becomes would too.
        before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        try:
            os.execvpe(self.words[0], list(self.words), {**os.environ, **self.settings})
        except OSError as error:
            signal.signal(signal.SIGPIPE, before)
            raise self._unstartable(error) from None

    def finish(self, seconds: float = _PATIENCE) -> subprocess.CompletedProcess[str]:
        """Run it to its end, and return its status and what it said.

        Parameters
        ----------
        seconds
            How long it may take; then it is killed.

        Raises
        ------
        NoAnswer
            It does not come to an end.
        UserError
            There is no such program.
        """
        try:
            return subprocess.run(
                self.words,
                env={**os.environ, **self.settings},
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=seconds,
                stdin=subprocess.DEVNULL,
            )
        except OSError as error:
            raise self._unstartable(error) from None
        except subprocess.TimeoutExpired:
            raise NoAnswer(f"{self}: no answer within {seconds:g} s") from None

    def _unstartable(self, error: OSError) -> UserError:
        return UserError(f"{self.words[0]}: cannot be started: {error.strerror}")
