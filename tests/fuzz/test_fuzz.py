"""Damaged inputs of every format: read, or refused in a line. ``run.py`` is the long form."""

import pytest
from campaign import fuzz
from formats import NAMES, find

_SEED = 20260701
_INPUTS = 60


@pytest.mark.parametrize("name", NAMES)
def test_damaged_inputs_are_read_or_refused(name: str) -> None:
    inputs = int(_INPUTS * find(name).share)
    tally = fuzz(name, _SEED, stop=inputs, most=3)
    assert not tally.failures, "\n\n".join(map(str, tally.failures))
    assert tally.tried == inputs
    # A mutator that breaks everything, or nothing, would test nothing.
    assert tally.outcomes["accepted"] >= 2
    assert tally.outcomes["refused"] >= inputs // 10
