"""What a user is told is text, in lines of a length that can be read."""

import pickle

import pytest

from testbed.errors import UserError, printable


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ("plain, Größe, 日本", "plain, Größe, 日本"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\nb\r\tc\x00", "a\\nb\\r\\tc\\x00"),
        ("\x7f\x9b", "\\x7f\\x9b"),
        ("\ud800", "\\ud800"),
        ("C:\\x1b", "C:\\x1b"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_an_escape(found: str, shown: str) -> None:
    assert printable(found) == shown
    assert str(UserError(f"{found}: damaged")) == f"{shown}: damaged"


def test_every_argument_is_a_line() -> None:
    assert str(UserError("one", "two\nthree")) == "one\ntwo\\nthree"


def test_a_line_that_is_too_long_keeps_its_beginning_and_its_end() -> None:
    message = str(UserError(f"file: found {'x' * 100_000}: expected less"))
    assert message.startswith("file: found xxx")
    assert " [...] " in message
    assert message.endswith("xxx: expected less")
    assert len(message) < 2100


def test_lines_that_are_too_many_are_counted() -> None:
    lines = str(UserError(*map(str, range(1000)))).split("\n")
    assert lines == [*map(str, range(40)), "... and 960 more"]


def test_it_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(UserError("a\x1b", "b")))
    assert str(error) == "a\\x1b\nb"
