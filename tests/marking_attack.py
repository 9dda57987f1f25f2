"""An attack that notes on disk that the rounds have begun; copied beside experiments by tests."""

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import ClassVar

from testbed.attacks.llg import LLG

_calls = count()


@dataclass(frozen=True)
class Marking(LLG):
    """LLG, under another name."""

    name: ClassVar[str] = "marking"

    def infer(self, observations, calibration):
        """Answer as LLG does."""
        if next(_calls) == 1:  # round 0 is done with
            Path("begun").touch()
        return super().infer(observations, calibration)
