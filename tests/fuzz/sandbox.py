"""Limits of a process that reads hostile input, and what it is caught at."""

import contextlib
import faulthandler
import os
import resource
import signal
import sys
import traceback
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ADDRESS_SPACE = 4 << 30
RESIDENT = 400 << 20
_FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn"),
    *("subprocess.Popen", "socket.connect", "socket.bind", "urllib.Request", "webbrowser.open"),
)
# For the provenance of a replay, and for the fonts of figures.
_PROGRAMS = ("git", "fc-list")
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_NAMES = {
    *(("numpy", "ndarray"), ("numpy", "dtype")),
    *(("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")),
}


class Caught(BaseException):
    """Input made the program do what no input may; not an `Exception`, which might be caught."""


class Sandbox:
    """Watches what a process does while it reads an input.

    Not a prison: it is there to notice.

    Parameters
    ----------
    folder
        The only place where files may be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder.resolve())
        self._active = False
        self._seen: list[str] = []
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        faulthandler.enable()
        for number in (signal.SIGPROF, signal.SIGALRM):
            faulthandler.register(number, chain=True)
        sys.addaudithook(self._audit)

    @contextlib.contextmanager
    def reading(self, seconds: float, patience: float) -> Iterator[None]:
        """End the process if the block takes too long; raise `Caught` for what it did else."""
        self._seen.clear()
        before = _peak_memory()
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, patience * seconds)
        self._active = True
        try:
            yield
        finally:
            self._active = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if self._seen:
                raise Caught("; ".join(self._seen[:5]))
            taken = _peak_memory() - before
            if taken > RESIDENT:
                raise Caught(f"{taken >> 20} MiB of memory were taken")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active:
            return
        if event == "subprocess.Popen" and arguments[0] in _PROGRAMS:
            return
        forbidden = event in _FORBIDDEN
        if event == "pickle.find_class":
            forbidden = arguments not in _NAMES
        elif event in _CHANGES:
            forbidden = not self._is_inside(arguments[0])
        elif event == "open":
            path, mode, flags = arguments
            writes = set("wax+") & set(mode or "") or (isinstance(flags, int) and flags & _WRITING)
            forbidden = bool(writes) and not self._is_inside(path)
        if forbidden:
            self._seen.append(f"{event}{arguments!r:.200}")

    def _is_inside(self, path: Any) -> bool:
        if isinstance(path, int):  # of a file that is open
            return True
        found = os.path.realpath(os.fsdecode(path))
        return found.startswith(self._folder) or found == os.devnull


def _peak_memory() -> int:
    """Return the greatest resident size since the last call, in bytes."""
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) << 10
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def memory_error(error: BaseException | None) -> bool:
    """Return whether one of the errors behind an error is that memory did not suffice.

    Python's parser calls it so as well where parentheses nest too deeply.
    """
    behind, seen = [error], set[int]()
    while behind:
        one = behind.pop()
        if isinstance(one, MemoryError) and not _in_parser(one):
            return True
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            behind += [one.__cause__, one.__context__]
    return False


def _in_parser(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.endswith("ast.py")


def brief(error: BaseException) -> str:
    """Return the end of a traceback."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(lines[:2] + lines[-14:] if len(lines) > 16 else lines)[-4000:]


def controls(text: str) -> str:
    """Return the characters that a terminal would obey, or cannot show."""
    return "".join(
        sorted({c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cs")})
    )


def check_shown(text: str) -> None:
    """Raise where a text that the program prints holds what no terminal should get."""
    if found := controls(text):
        raise Caught(f"{found!r} would be printed: {text[:1000]!r}")
