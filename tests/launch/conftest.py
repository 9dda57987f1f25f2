"""Lets these tests write results files as those of the writer do."""

import sys
from pathlib import Path

_RESULTS = str(Path(__file__).parents[1] / "results")
if _RESULTS not in sys.path:
    sys.path.append(_RESULTS)
