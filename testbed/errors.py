"""Errors that are the user's to mend: one message, no traceback, exit status 2."""

import difflib
import unicodedata
from collections.abc import Iterable

_MOST_LINES, _LONGEST = 40, 2000


class UserError(Exception):
    """Something that the user gave is wrong: a file, a key, a value, a missing package.

    The message names what was found, what was expected, and the fix. The command line prints it
    without a traceback and exits with status 2.

    Parameters
    ----------
    lines
        The message, one line for each thing that is wrong. Of what was found in files, characters
        that would break a line, or that a terminal would obey, are shown as escapes, and what is
        very long is cut.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)

    def __str__(self) -> str:
        lines = [_shortened(printable(line)) for line in self.args[:_MOST_LINES]]
        if len(self.args) > _MOST_LINES:
            lines.append(f"... and {len(self.args) - _MOST_LINES} more")
        return "\n".join(lines)


def _shortened(line: str) -> str:
    """Return a line without the middle of one that fills a screen; its end says what to do."""
    half = _LONGEST // 2
    return line if len(line) <= _LONGEST else f"{line[:half]} [...] {line[-half:]}"


def printable(text: str) -> str:
    """Return a line of text with control characters and lone surrogates as Python's escapes."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cs")
        else character
        for character in text
    )


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
