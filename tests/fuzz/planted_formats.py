"""A format whose reader does what no reader may: what the harness has to notice."""

import ctypes
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from formats import Files, Format
from hdf5_edits import FIFO

from testbed.errors import UserError


def _waits(folder: Path) -> None:
    os.mkfifo(folder / FIFO)
    (folder / FIFO).read_bytes()


def _spins(folder: Path) -> None:
    while True:
        pass


def _takes_memory(folder: Path) -> None:
    assert len(bytearray(b"a") * (600 << 20))


def _asks_for_memory(folder: Path) -> None:
    try:
        bytearray(1 << 40)
    except MemoryError:
        raise UserError("too large") from None


def _refuses(*lines: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        raise UserError(*lines)

    return read


READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "accepts": (lambda folder: folder.exists(), ""),
    "segfaults": (lambda _: ctypes.string_at(0), "died of SIGSEGV"),
    "aborts": (lambda _: os.abort(), "died of SIGABRT"),
    "exits": (lambda _: os._exit(3), "exit with status 3"),
    "spins": (_spins, "took too long (processor)"),
    "waits": (_waits, "took too long (wall)"),
    "takes memory": (_takes_memory, "caught"),
    "asks for memory": (_asks_for_memory, "memory"),
    "raises": (lambda _: {}["key"], "KeyError"),
    "ends": (lambda _: sys.exit(1), "SystemExit"),
    "warns": (lambda _: warnings.warn("odd", stacklevel=1), "warning"),
    "runs a program": (lambda _: os.system("true"), "caught"),
    "starts a program": (lambda _: subprocess.run(["true"], check=True), "caught"),
    "writes": (lambda folder: (folder.parent.parent / "written").write_text("x"), "caught"),
    "removes": (lambda folder: (folder.parent.parent / "none").unlink(missing_ok=True), "caught"),
    "says nothing": (_refuses(""), "empty message"),
    "says a lot": (_refuses(*["line"] * 2), "several lines"),
    "refuses": (_refuses("damaged"), "valid, but refused"),
    "goes on": (lambda folder: folder.exists(), ""),
}


def _read(folder: Path, _: Sequence[str]) -> None:
    READERS[(folder / "data").read_text()][0](folder)


def _seeds() -> list[Files]:
    return [{"data": name.encode()} for name in READERS]


FORMATS = {"planted": Format("planted", _seeds, _read, seconds=0.5, patience=30)}
