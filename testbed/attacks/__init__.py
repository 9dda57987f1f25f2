"""Label-inference attacks: what they are, their registry, and the metrics that score them."""

from testbed.attacks.base import (
    Adversary,
    Attack,
    Calibration,
    Knowledge,
    LabelCounts,
    Observations,
    Outputs,
)
from testbed.attacks.registry import attacks, make_attack, register

__all__ = [
    "Adversary",
    "Attack",
    "Calibration",
    "Knowledge",
    "LabelCounts",
    "Observations",
    "Outputs",
    "attacks",
    "make_attack",
    "register",
]
