"""Errors that are the user's to mend: one message, no traceback, exit status 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user gave is wrong: a file, a key, a value, a missing package.

    The message names what was found, what was expected, and the fix. The command line prints it
    without a traceback and exits with status 2.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a phrase that lists the valid names, the nearest first where one is near.

    Parameters
    ----------
    name
        What was found.
    known
        The valid names.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = ", ".join(names)
    return f"did you mean {near[0]!r}? (known: {listed})" if near else f"known: {listed}"
