"""What command lines have in common."""

import argparse
import math


def positive_seconds(text: str) -> float:
    """Return the seconds that an argument says; more than 0, and not infinite."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected seconds above 0")
    return seconds
