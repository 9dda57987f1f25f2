"""Command lines: as they are printed, and as they are run."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from testbed.errors import UserError

# Seconds for a program that answers at once where all is well.
_PATIENCE = 30


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
        try:
            os.execvpe(self.words[0], list(self.words), {**os.environ, **self.settings})
        except OSError as error:
            raise UserError(f"{self.words[0]}: cannot be started: {error.strerror}") from None

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Run it to its end, and return its status and what it said.

        Raises
        ------
        UserError
            There is no such program, or it does not come to an end.
        """
        try:
            return subprocess.run(
                self.words,
                env={**os.environ, **self.settings},
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=_PATIENCE,
                stdin=subprocess.DEVNULL,
            )
        except OSError as error:
            raise UserError(f"{self.words[0]}: cannot be started: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise UserError(f"{self}: no answer within {_PATIENCE} s") from None
