"""Asserts what a loader refuses."""

from pathlib import Path

import pytest

from testbed.data import load
from testbed.errors import UserError


def refused(name: str, root: Path | None, *expected: str, variant: str | None = None) -> str:
    """Load a data set, and return the one line of the refusal once it holds what is expected."""
    with pytest.raises(UserError) as caught:
        load(name, root, variant)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message
    return message
