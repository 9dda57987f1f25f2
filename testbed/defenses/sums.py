"""Secure aggregation: the server gets the sum of the cohort's updates and no single one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from testbed.defenses.base import Defense, Stage
from testbed.defenses.registry import register
from testbed.secure.fixed_point import FixedPoint, ModulusBits
from testbed.secure.protocol import SecureRound


@register
@dataclass(frozen=True, kw_only=True)
class SecureAggregation(Defense):
    """The sum alone, over fixed-point integers; both protocols give the same one, to the bit.

    Attributes
    ----------
    protocol
        ``masks``: every client sends its update under masks that cancel in the sum, and survivors
        help to take off those of clients that drop out. ``reduction``: MPI itself adds up, and the
        server receives the sum; it trusts whoever runs the ranks in between.
    modulus_bits
        Width m of the integers on the wire: sums are modulo 2^m.
    fraction_bits
        F, of the m bits: updates are rounded to multiples of 2^-F, and clipped where the sum of the
        cohort might overflow. By default half of the modulus: 32 of 64, or 16 of 32.
    threshold
        Share of the cohort that must survive. Rounds with fewer are lost.
    """

    name: ClassVar[str] = "secure_aggregation"
    title: ClassVar[str] = "Secure aggregation"
    source: ClassVar[str] = "Bonawitz et al., CCS 2017"
    stage: ClassVar[Stage] = Stage.SUM
    adaptation: ClassVar[str] = (
        "Attacks the sum, for the cohort's label counts; only a malicious server gets at those of "
        "single clients (breaking_secure_aggregation)."
    )

    scope: Literal["update"] = "update"
    at: Literal["update"] = "update"
    protocol: Literal["masks", "reduction"] = "masks"
    modulus_bits: ModulusBits = 64
    fraction_bits: Annotated[int, Field(ge=1, le=62)] | None = None
    threshold: Annotated[float, Field(gt=0, le=1)] = 2 / 3

    def __post_init__(self) -> None:
        if self.fraction > self.modulus_bits - 2:
            raise ValueError(
                f"fraction_bits = {self.fraction} does not fit modulus_bits = {self.modulus_bits}; "
                f"expected 1 to {self.modulus_bits - 2}"
            )

    @property
    def fraction(self) -> int:
        """Return the fraction bits, the default filled in."""
        return self.modulus_bits // 2 if self.fraction_bits is None else self.fraction_bits

    def needed(self, cohort: int) -> int:
        """Return how many clients of a cohort of a size must survive.

        At least two of two or more: a single share would be the secret itself, and the sum of one
        client its update.
        """
        # 0.55 * 100 is a little more than 55.
        share = math.ceil(self.threshold * cohort - 1e-9)
        return max(share, min(2, cohort))

    def fixed_point(self, total_weight: int) -> FixedPoint:
        """Return how updates become integers, for a cohort whose weights add up to this."""
        return FixedPoint(self.modulus_bits, self.fraction, total_weight)

    def secure_round(
        self, cohort: Sequence[int], survivors: Sequence[int], size: int
    ) -> SecureRound:
        """Return the round of a cohort, of which some survive, for vectors of a size."""
        return SecureRound(
            cohort=tuple(cohort),
            survivors=tuple(survivors),
            threshold=self.needed(len(cohort)),
            size=size,
            modulus_bits=self.modulus_bits,
        )
