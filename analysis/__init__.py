"""Offline analysis of results files: tables, figures, and a data frame to work on.

>>> import analysis
>>> frame = analysis.load("run.h5")  # doctest: +SKIP

Needs neither torch nor MPI, and works on files that are still being written.
"""

from analysis.load import load
from analysis.updates import attack_update

__all__ = ["attack_update", "load"]
