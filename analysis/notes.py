"""What must be known to read a table: what was measured, what broke, and whether to trust it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.load import attack_names, of_updates, varying_columns
from analysis.score import ACCUMULATED, baseline_columns
from analysis.share_notes import share_notes

if TYPE_CHECKING:
    import pandas as pd

BROKEN = "†"
UPDATE = ["file", "scenario", "round", "client"]
# What figures and tables call a metric; the others have no longer name.
TITLES = {"asr": "attack success rate (asr)"}


def table_notes(
    summary: "pd.DataFrame", left_out: "pd.DataFrame", metric: str, level: float
) -> list[str]:
    """Return the notes of a table.

    Parameters
    ----------
    summary
        Of the attacks in the table, as `analysis.table.summarise` returns it.
    left_out
        The same of the attacks that have no score by this metric.
    metric
        The metric shown.
    level
        Of the intervals.
    """
    scored = summary[summary["repetitions"] > 0]
    low, high = scored["repetitions"].min(), scored["repetitions"].max()
    if scored.empty:
        low = high = 0
    count = f"{low}" if low == high else f"{low} to {high}"
    interval = f"± is the larger side of the {level * 100:g} % interval over rounds"
    if summary["low"].isna().all():
        single = (summary["target"] != ACCUMULATED).any()
        interval = "no interval" + (", since it takes two rounds" if single else "")
    what = TITLES.get(metric, metric)
    notes = [f"{what}, mean of {count} update{'' if count == '1' else 's'}; {interval}"]
    if not baseline_columns(metric):
        notes.append("no baselines: those of this program are of asr and of presence_f1")
    columns = parameters(summary)
    varying = varying_columns(summary[columns])
    fixed = [
        f"{name} {plain(summary[name].iloc[0])}"
        for name in columns
        if name not in varying and plain(summary[name].iloc[0])
    ]
    notes += [", ".join(fixed)] if fixed else []
    names = attack_names(summary)
    summed = summary.loc[summary["target"] == ACCUMULATED, "attack"].unique().tolist()
    what = (
        "about all updates of a client so far, with guesses of their own and no interval, since "
        "their rounds contain each other"
    )
    notes += _grouped("scored otherwise", {what: summed} if summed else {}, names)
    notes += _grouped(f"{BROKEN} the scenario breaks an assumption", _broken(scored), names)
    notes += not_applicable(summary, names)
    if not left_out.empty:
        shown = "; ".join(attack_names(left_out).values())
        notes.append(f"left out, with presence alone to score by presence_f1: {shown}")
    return notes


def not_applicable(rows: "pd.DataFrame", names: Mapping[str, str]) -> list[str]:
    """Return a note on the attacks that were not run, and why; none where all were.

    Parameters
    ----------
    rows
        Of a frame or a summary.
    names
        See `analysis.load.attack_names`.
    """
    idle = rows[~rows["applicable"].astype(bool)]
    reasons = {
        str(reason): part["attack"].unique().tolist()
        for reason, part in idle.groupby("obstacle", sort=False)
    }
    return _grouped("- not applicable", reasons, names)


def loading_notes(frame: "pd.DataFrame", *, intervals: bool) -> list[str]:
    """Return what rows do not tell: which scenarios and shares have none, which are trainings.

    Parameters
    ----------
    frame
        As `analysis.load` returns it, or some of its rows.
    intervals
        Whether the table shows any.
    """
    notes = []
    shown = set(frame[["file", "scenario"]].itertuples(index=False, name=None))
    if intervals and shown.intersection(frame.attrs.get("trained", ())):
        notes.append(
            "rounds of one training are not independent: its intervals are about this training"
        )
    sets = frame.attrs.get("sets", ())
    runs = {file: one.name for one in sets for file in one.files}
    several = len(sets) > 1
    found: dict[tuple[str, str], list[int]] = {}
    for file, number, why in frame.attrs.get("lost", ()):
        found.setdefault((runs[file] if several else "", why), []).append(number)
    for (file, why), numbers in found.items():
        which = f"scenario{'' if len(numbers) == 1 else 's'} {', '.join(map(str, sorted(numbers)))}"
        notes.append(f"{which}{f' of {Path(file).name}' if file else ''}: {why}")
    return [*notes, *share_notes(sets)]


def not_finite(frame: "pd.DataFrame") -> list[str]:
    """Return a note on updates that no attack answered for; none where there are none."""
    from testbed.attacks.metrics import METRICS

    run = frame[frame["applicable"]]
    answered = run[list(METRICS)].notna().any(axis=1)
    updates = answered.groupby([run[name] for name in UPDATE]).any()
    lost = int((~updates).sum())
    if not lost:
        return []
    return [f"{lost:,} of {_updates(len(updates))} held NaN or infinity: not attacked"]


def self_test(frame: "pd.DataFrame") -> str:
    """Return how the updates do that are sums of plain gradients: two identities must hold.

    Parameters
    ----------
    frame
        As `analysis.load` returns it.
    """
    updates = of_updates(frame).drop_duplicates(UPDATE)
    plain_ones = updates[updates["residual"].notna()]
    if plain_ones.empty:
        return "self-test: none, since no update is the plain, finite gradient of local steps"
    facts = []
    oracle = plain_ones["oracle"].dropna()
    failed = int((oracle < 1).sum())
    if failed:
        facts.append(
            f"oracle BELOW 1 in {failed:,} of {len(oracle):,} updates, {oracle.min():.3f} at worst"
        )
    elif oracle.empty:
        facts.append("no oracle, since the last layer has no bias")
    else:
        facts.append(f"oracle 1.000 in {'all ' if len(oracle) > 1 else ''}{_updates(len(oracle))}")
    largest = plain_ones["residual"].max()
    facts.append(f"sums of gradients over classes at most {largest:.0e} of their size")
    return "self-test: " + "; ".join(facts)


def parameters(summary: "pd.DataFrame") -> list[str]:
    """Return the columns of a summary that hold parameters of the scenario."""
    columns = list(map(str, summary.columns))
    return columns[columns.index("scenario") + 1 : columns.index("attack")]


def plain(value: object) -> str:
    """Return a parameter as tables show it."""
    if value is None or value != value:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _broken(summary: "pd.DataFrame") -> dict[str, list[str]]:
    """Return the attacks by the assumption of theirs that some scenario breaks."""
    found: dict[str, dict[str, None]] = {}
    for attack, text in summary[["attack", "broken"]].drop_duplicates().itertuples(index=False):
        for assumption in json.loads(text):
            found.setdefault(assumption, {})[attack] = None
    return {assumption: list(attacks) for assumption, attacks in found.items()}


def _grouped(head: str, groups: Mapping[str, list[str]], names: Mapping[str, str]) -> list[str]:
    each = [
        f"{what} ({'; '.join(names[attack] for attack in attacks)})"
        for what, attacks in groups.items()
    ]
    return [f"{head}: {', '.join(each)}"] if each else []


def _updates(count: int) -> str:
    return f"{count:,} update{'' if count == 1 else 's'}"
