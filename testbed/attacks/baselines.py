"""Attacks without information: what every success rate is to be read against."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from array_api_compat import array_namespace, device
from typing_extensions import override

from testbed.attacks.base import (
    Adversary,
    Attack,
    Calibration,
    Knowledge,
    LabelCounts,
    Observations,
)
from testbed.attacks.registry import register


@register
@dataclass(frozen=True)
class RandomGuess(Attack):
    """Every label is drawn uniformly from the classes."""

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "Random"
    knowledge: ClassVar[Knowledge] = Knowledge.GRADIENTS
    source: ClassVar[str] = "baseline of Wainakh et al., PoPETs 2022(2)"
    calibration_arrays: ClassVar = {"seed": ((), "u8")}

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        return {"seed": np.array([adversary.seed], dtype=np.uint64)}

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        xp = array_namespace(observations.row_sums)
        rows, classes = observations.row_sums.shape
        seeds = np.broadcast_to(calibration["seed"], (rows,))
        counts = np.empty((rows, classes), np.int64)
        for row, (seed, key, labels) in enumerate(
            zip(seeds, observations.keys, observations.labels, strict=True)
        ):
            sequence = np.random.SeedSequence(int(seed), spawn_key=(int(key),))
            generator = np.random.Generator(np.random.PCG64(sequence))
            counts[row] = generator.multinomial(int(labels), np.full(classes, 1 / classes))
        return LabelCounts(xp.asarray(counts, device=device(observations.row_sums)))
