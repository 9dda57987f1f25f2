"""Calls the program's command lines within the process."""

import contextlib
import io
from collections.abc import Callable, Sequence

from sandbox import Caught, check_shown

from testbed.errors import UserError

_PREFIX = "error: "


def testbed(*words: str) -> str:
    """Run ``python -m testbed`` and return what it printed."""
    from testbed.__main__ import main

    return _run(main, words)


def analysis(*words: str) -> str:
    """Run ``python -m analysis`` and return what it printed."""
    from analysis.__main__ import main

    return _run(main, words)


def _run(main: Callable[[Sequence[str]], int], words: Sequence[str]) -> str:
    """Return the output, or raise what the exit status and the output stand for."""
    out, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            status = main(words)
    except SystemExit as end:
        status = end.code
        if status == 2 and errors.getvalue().startswith("usage: "):
            raise UserError("the command line is wrong") from None
    text, said = out.getvalue(), errors.getvalue()
    # The terminal's encoding is UTF-8, which has no lone surrogates.
    text.encode()
    check_shown(text)
    if status == 2 and said.splitlines()[-1:] and _PREFIX in said:
        before, _, message = said.partition(_PREFIX)
        check_shown(before)
        raise UserError(*message.removesuffix("\n").split("\n"))
    if status != 0:
        raise Caught(f"exit status {status!r}: {said[:1000]!r}")
    check_shown(said)
    return text
