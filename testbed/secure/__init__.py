"""Secure aggregation: the server learns the sum of a cohort's updates and no single one.

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning (CCS 2017), in
the variant against an honest but curious server. NumPy and the standard library only; who sends
what to whom is the caller's.
"""

from testbed.secure.client import write_message
from testbed.secure.fixed_point import Encoded, FixedPoint, ModulusBits
from testbed.secure.protocol import MessageError, SecureRound, TooFewSurvivorsError
from testbed.secure.server import Aggregator

__all__ = [
    "Aggregator",
    "Encoded",
    "FixedPoint",
    "MessageError",
    "ModulusBits",
    "SecureRound",
    "TooFewSurvivorsError",
    "write_message",
]
