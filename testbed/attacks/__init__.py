"""Label-inference attacks: what they are, their registry, and the metrics that score them."""

from testbed.attacks.base import (
    Adversary,
    Answer,
    Assumption,
    Attack,
    Calibration,
    Head,
    Inferred,
    Knowledge,
    LabelCounts,
    LabelDistribution,
    LabelPresence,
    Observations,
    Observed,
    Outputs,
    Planted,
)
from testbed.attacks.registry import attacks, make_attack, register

__all__ = [
    "Adversary",
    "Answer",
    "Assumption",
    "Attack",
    "Calibration",
    "Head",
    "Inferred",
    "Knowledge",
    "LabelCounts",
    "LabelDistribution",
    "LabelPresence",
    "Observations",
    "Observed",
    "Outputs",
    "Planted",
    "attacks",
    "make_attack",
    "register",
]
