"""A process that reads damaged inputs one after the other, and says which one it is at.

``python worker.py FORMAT SEED START STOP SECONDS FOLDER``: reads the inputs of numbers START to
STOP - 1, or as many as fit into that many seconds, and writes two lines of JSON about each to its
standard output: before and after. What dies, or is killed, has said at which input.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, *(ROOT / "tests" / name for name in ("data", "results", "fuzz"))):
    sys.path.insert(0, str(folder))
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

from formats import Format, Input, find  # noqa: E402
from sandbox import Caught, Sandbox, brief, controls, memory_error  # noqa: E402

from testbed.errors import UserError  # noqa: E402

# Of an error's message; a line on a screen is shorter by far.
_LONGEST, _MOST_LINES = 2500, 50


def write(given: Input, folder: Path) -> None:
    """Put the files of an input into a folder that is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in given.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def try_one(form: Format, given: Input, folder: Path, sandbox: Sandbox) -> tuple[str, str]:
    """Return ``accepted``, ``refused`` or what went wrong, and details."""
    write(given, folder)
    try:
        with (
            warnings.catch_warnings(record=True) as warned,
            sandbox.reading(form.seconds, form.patience),
        ):
            warnings.simplefilter("always")
            form.read(folder, given.arguments)
    except UserError as error:
        if memory_error(error):
            return "memory", brief(error)
        return _judge(form, str(error))
    except Caught as error:
        return "caught", str(error)
    # Whatever it is that a user would see as a traceback.
    except BaseException as error:
        return ("memory" if memory_error(error) else type(error).__name__), brief(error)
    if warned:
        # Users are shown a line of our code.
        return "warning", f"{warned[0].filename}:{warned[0].lineno}: {warned[0].message}"
    return ("accepted, which is wrong", "") if given.refused else ("accepted", "")


def _judge(form: Format, message: str) -> tuple[str, str]:
    if not message.strip():
        return "empty message", ""
    lines = message.split("\n")
    if max(map(len, lines)) > _LONGEST:
        return "long message", f"{max(map(len, lines))} characters: {message[:300]!r}"
    if len(lines) > (_MOST_LINES if form.lines else 1):
        return "several lines", f"{len(lines)}: {message[:1000]!r}"
    if found := controls(message):
        return "control characters", f"{found!r} in {message[:1000]!r}"
    return "refused", message


def main() -> None:
    name, seed, start, stop, seconds, where = sys.argv[1:]
    form, folder = find(name), Path(where)
    # What is read may print; lines about inputs go where nothing else does.
    told = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(folder / "output", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1)

    def tell(**content: Any) -> None:
        print(json.dumps(content), file=told, flush=True)

    seeds = form.seeds()
    sandbox = Sandbox(folder)
    os.chdir(folder)
    began, number = time.monotonic(), int(start)
    while number < int(stop) and time.monotonic() - began < float(seconds):
        tell(at=number)
        outcome, detail = try_one(form, form.draw(seeds, int(seed), number), folder / "in", sandbox)
        if number < len(seeds) and outcome == "refused":
            outcome = "valid, but refused"
        if outcome not in ("accepted", "refused"):
            (folder / "in").rename(folder / f"{number}")
        tell(at=number, outcome=outcome, detail=detail)
        number += 1
    with contextlib.suppress(io.UnsupportedOperation):
        told.close()


if __name__ == "__main__":
    main()
