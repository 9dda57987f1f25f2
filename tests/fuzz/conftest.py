"""Lets these tests use the makers of data files and of results files."""

import sys
from pathlib import Path

for _name in ("data", "results"):
    sys.path.insert(0, str(Path(__file__).parents[1] / _name))
