"""Files of runs that share an experiment (``--share i/n``), which are one file to the tables."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def first_files(told: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    """Return for each file the first of those that hold another share of the same experiment.

    Parameters
    ----------
    told
        Name and root attributes of each file; without ``experiment`` or ``share`` it stands alone.
        A share that is there twice, as in a run and its replay, begins another set of files.
    """
    sets: dict[tuple[object, str], list[tuple[str, set[str]]]] = {}
    found = {}
    for file, attributes in told:
        found[file] = file
        place, _, count = str(attributes.get("share", "")).partition("/")
        if not count or "experiment" not in attributes:
            continue
        known = sets.setdefault((attributes["experiment"], count), [])
        for first, places in known:
            if place not in places:
                places.add(place)
                found[file] = first
                break
        else:
            known.append((file, {place}))
    return found


def join_shares(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Return a frame in which all shares of an experiment are in its first file.

    Parameters
    ----------
    frame
        As `analysis.load` returns it.

    Returns
    -------
    pandas.DataFrame
        With the same index, the scenarios of a file in the order of their numbers. The frame
        itself where no two files share an experiment.
    """
    file = frame["file"].replace(frame.attrs.get("runs", {}))
    if file.equals(frame["file"]):
        return frame
    place = file.map({name: number for number, name in enumerate(file.unique())})
    return frame.assign(file=file).iloc[np.lexsort((frame["scenario"], place))]
