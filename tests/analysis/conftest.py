"""Lets these tests use the builder of results files, which stands beside the reader's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "results"))
