"""Defences against label leakage: what clients do to what they share."""

from testbed.defenses.base import (
    Compression,
    Defense,
    Known,
    LabelDefense,
    Levels,
    Quantiser,
    Sparsifier,
    Stage,
    Targets,
    Tensors,
    VectorDefense,
)
from testbed.defenses.registry import defenses, make_defense, register

__all__ = [
    "Compression",
    "Defense",
    "Known",
    "LabelDefense",
    "Levels",
    "Quantiser",
    "Sparsifier",
    "Stage",
    "Targets",
    "Tensors",
    "VectorDefense",
    "defenses",
    "make_defense",
    "register",
]
