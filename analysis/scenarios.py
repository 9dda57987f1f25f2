"""Which rows of a frame belong together: repetitions over seeds, chosen attacks, pages."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.load import parameter_columns, varying_columns
from testbed.errors import UserError, suggest

if TYPE_CHECKING:
    import pandas as pd


def choose_attacks(frame: "pd.DataFrame", labels: Sequence[str]) -> "pd.DataFrame":
    """Return the rows of some attacks; all where none is named.

    Raises
    ------
    UserError
        An attack is not in the frame.
    """
    known = frame["attack"].unique().tolist()
    for label in labels:
        if label not in known:
            raise UserError(f"unknown attack {label!r}: {suggest(label, known)}")
    return frame[frame["attack"].isin(labels)] if labels else frame


def merge_seeds(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Return a frame in which scenarios that differ in the seed alone are one.

    Parameters
    ----------
    frame
        As `analysis.load` returns it.

    Returns
    -------
    pandas.DataFrame
        Without the column ``seed``; each scenario has the smallest number of those that it stands
        for, and the rounds of further seeds are numbered on, since every one has a model of its
        own. The frame itself where no two scenarios of a file differ in the seed alone.
    """
    if "seed" not in frame:
        return frame
    keys = ["file", *(name for name in parameter_columns(frame) if name != "seed")]
    merged = frame.groupby(keys, sort=False, dropna=False)["scenario"].transform("min")
    if merged.equals(frame["scenario"]):
        return frame
    order = {seed: number for number, seed in enumerate(frame["seed"].drop_duplicates())}
    rounds = frame["round"] + frame["seed"].map(order) * (frame["round"].max() + 1)
    return frame.assign(scenario=merged, round=rounds).drop(columns="seed")


def seeds_note(frame: "pd.DataFrame", merged: "pd.DataFrame") -> list[str]:
    """Return a note on how many seeds stand behind a scenario; none where none were merged.

    Parameters
    ----------
    frame, merged
        What `merge_seeds` was given, and what it returned.
    """
    if merged is frame:
        return []
    counts = frame["seed"].groupby([merged["file"], merged["scenario"]]).nunique()
    low, high = counts.min(), counts.max()
    return [f"averaged over {high if low == high else f'{low} to {high}'} seeds"]


def pages(scenarios: "pd.DataFrame", most: int) -> list["pd.DataFrame"]:
    """Divide scenarios among pages, the values of the outermost swept key kept together.

    Parameters
    ----------
    scenarios
        A row for each scenario, in the order of the sweep.
    most
        Scenarios on a page.
    """
    import pandas as pd

    if len(scenarios) <= most:
        return [scenarios]
    keys = outermost_first(scenarios)
    if keys:
        groups = [group for _, group in scenarios.groupby(keys[0], sort=False, dropna=False)]
    else:
        groups = [scenarios[at : at + 1] for at in range(len(scenarios))]
    divided: list[pd.DataFrame] = []
    for page in (page for group in groups for page in pages(group, most)):
        if divided and len(divided[-1]) + len(page) <= most:
            divided[-1] = pd.concat([divided[-1], page])
        else:
            divided.append(page)
    return divided


def outermost_first(scenarios: "pd.DataFrame") -> list[str]:
    """Return what tells scenarios apart, the keys that change least often along them first."""
    changes = {
        name: int((scenarios[name].astype(str) != scenarios[name].astype(str).shift()).sum())
        for name in [*(["file"] if "file" in scenarios else []), *varying_columns(scenarios)]
        if scenarios[name].nunique(dropna=False) > 1
    }
    return sorted(changes, key=lambda name: changes[name])
