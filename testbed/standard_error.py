"""Standard error that outlives who reads it."""

import io
import os
from typing import TextIO

from typing_extensions import override


class LastingError(io.TextIOBase):
    """Writes to a stream as long as somebody reads it, and then to nowhere.

    A run whose terminal is closed, or whose output goes to a program that has ended, has still to
    save itself.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @override
    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    @override
    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    @override
    def isatty(self) -> bool:
        return self._stream.isatty()

    @override
    def fileno(self) -> int:
        return self._stream.fileno()

    def _give_up(self) -> None:
        # What is buffered goes there too, or Python would complain about it at its end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
