"""What defences leave to attacks, and what they cost: leakage, accuracy, bytes, privacy."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis.bootstrap import bootstrap_interval
from analysis.formats import RENDERERS, Page
from analysis.load import (
    DEFENSES,
    attack_names,
    is_trained,
    of_updates,
    parameter_columns,
    varying_columns,
)
from analysis.notes import TITLES, loading_notes, not_applicable, not_finite, plain
from analysis.scenarios import choose_attacks, merge_seeds, seeds_note
from analysis.score import ACCUMULATED, baseline_columns
from analysis.shares import join_shares
from analysis.table import LEVEL, STYLES
from testbed.errors import UserError, suggest

if TYPE_CHECKING:
    import pandas as pd

    from testbed.results.reader import Scenario

KINDS = ("plain", "adapted", ACCUMULATED)
# Attacks that make nothing of an update: no leakage where they are the best.
_GUESSES = ("random", "uniform", "prior")
_SCENARIO = ["file", "scenario"]
_COSTS = ("accuracy", "bytes", "epsilon", "delta")


def tradeoff(
    frame: "pd.DataFrame",
    attacks: Sequence[str] = (),
    metric: str = "asr",
    last: int = 1,
) -> "pd.DataFrame":
    """Return what leaks in every scenario, and what keeping it costs.

    Parameters
    ----------
    frame
        As `analysis.load` returns it; its files are read once more for the costs. Scenarios that
        differ in the seed alone are averaged.
    attacks
        Labels of plain attacks: the strongest of these, as they are and adapted, in place of the
        strongest of all but guesses and those that are told the truth.
    metric
        Of the leakage: ``asr`` or ``presence_f1``.
    last
        Evaluated rounds whose mean accuracy is the final one.

    Returns
    -------
    pandas.DataFrame
        A row per file, scenario and ``kind`` of attack: ``plain``; ``adapted`` to the defences; or
        ``accumulated``, about all updates of a client so far. The parameters; ``attack`` (label of
        the strongest of the kind, the one with the best mean; empty where none has a score) and
        ``title``; ``metric``, ``mean``, ``low``, ``high`` (95 % interval over rounds; NaN for
        ``accumulated``, where rounds contain each other), ``repetitions``, and what the ``random``
        and the ``uniform`` guess score on the same updates; ``accuracy`` of the final model (mean
        of all models, where rounds are no training), ``bytes`` of an update on the wire, mean of
        those that arrived, and ``epsilon`` and ``delta``: NaN where unknown.

    Raises
    ------
    UserError
        An attack or the metric is unknown, or the metric has no guess to compare with.
    """
    import pandas as pd

    from testbed.attacks.metrics import GUESSES

    if metric not in GUESSES:
        raise UserError(f"unknown metric {metric!r}: {suggest(metric, GUESSES)}")
    if last < 1:
        raise UserError(f"last: found {last}, expected at least 1 evaluated round")
    choose_attacks(frame, attacks)
    merged = merge_seeds(join_shares(frame))
    costs = _costs(frame, merged, last)
    kept = [*_SCENARIO, *parameter_columns(merged)]
    rows = []
    for key, group in merged.groupby(_SCENARIO, sort=False):
        first = group.iloc[0]
        rivals = _rivals(group, attacks)
        for kind in KINDS:
            found = _strongest(rivals[_of_kind(rivals, kind)], metric)
            if found is None and kind == "plain":
                found = _unattacked(group, metric)
            if found is not None:
                described = {name: first[name] for name in kept}
                rows.append(described | {"kind": kind, **found, **costs[key]})
    return pd.DataFrame(rows)


def _rivals(rows: "pd.DataFrame", attacks: Sequence[str]) -> "pd.DataFrame":
    """Return the rows of the attacks of which the strongest is looked for."""
    from testbed.attacks import attacks as registered

    if attacks:
        return rows[rows["attack"].isin(attacks) | rows["adapted"].isin(attacks)]
    guesses = {registered()[name].title for name in _GUESSES}
    return rows[(rows["knowledge"] != "truth") & ~rows["title"].isin(guesses)]


def _of_kind(rows: "pd.DataFrame", kind: str) -> "pd.Series[bool]":
    summed = rows["target"] == ACCUMULATED
    if kind == ACCUMULATED:
        return summed
    return ~summed & ((rows["adapted"] != "") == (kind == "adapted"))


def _strongest(rows: "pd.DataFrame", metric: str) -> "dict[str, object] | None":
    """Return what the best of some attacks scores; None where none has a score."""
    scored = rows[rows[metric].notna()]
    if scored.empty:
        return None
    best = scored.groupby("attack", sort=False)[metric].mean().idxmax()
    own = scored[scored["attack"] == best]
    low, high = np.nan, np.nan
    if own["target"].iloc[0] != ACCUMULATED:
        interval = bootstrap_interval(own[metric], own["round"], level=LEVEL)
        low, high = np.clip(interval, 0, 1).tolist()
    return {
        "attack": best,
        "title": own.iloc[0]["title"],
        "metric": metric,
        "mean": own[metric].mean(),
        "low": low,
        "high": high,
        "repetitions": len(own),
        **_guesses(own, metric),
    }


def _unattacked(group: "pd.DataFrame", metric: str) -> dict[str, object]:
    """Return what there is to say of a scenario to which no attack applies."""
    nothing = dict.fromkeys(("mean", "low", "high"), float("nan"))
    guesses = _guesses(of_updates(group), metric)
    return {"attack": "", "title": "", "metric": metric, **nothing, "repetitions": 0, **guesses}


def _guesses(rows: "pd.DataFrame", metric: str) -> dict[str, float]:
    columns = baseline_columns(metric)
    return {name: rows[columns[name]].mean() for name in ("random", "uniform")}


def _costs(
    frame: "pd.DataFrame", merged: "pd.DataFrame", last: int
) -> Mapping[Hashable, Mapping[str, float]]:
    """Return the costs of each scenario of the merged frame, means over its seeds."""
    import pandas as pd

    from testbed.results.reader import open_results

    pairs = frame[_SCENARIO].assign(run=merged["file"], merged=merged["scenario"])
    rows = []
    for file, group in pairs.drop_duplicates().groupby("file", sort=False):
        with open_results(str(file)) as results:
            for number, *stands_for in group[["scenario", "run", "merged"]].to_numpy().tolist():
                found = _cost(results.numbered(number), last)
                rows.append(dict(zip(_SCENARIO, stands_for, strict=True)) | found)
    means = pd.DataFrame(rows).groupby(_SCENARIO, sort=False)[list(_COSTS)].mean()
    return {
        key: dict(zip(_COSTS, row, strict=True))
        for key, row in zip(means.index, means.to_numpy().tolist(), strict=True)
    }


def _cost(scenario: "Scenario", last: int) -> dict[str, float]:
    accuracy, sent = np.zeros(0), np.zeros(0)
    if scenario.has("rounds/accuracy"):
        accuracy = scenario.array("rounds/accuracy")
        accuracy = accuracy[np.isfinite(accuracy)]
        if is_trained(scenario):
            accuracy = accuracy[-last:]
    if scenario.has("updates/bytes_on_wire"):
        sent = scenario.array("updates/bytes_on_wire")
        came = scenario.array("updates/arrived") if scenario.has("updates/arrived") else sent >= 0
        sent = sent[came == 1]
    found = {"accuracy": accuracy, "bytes": sent}
    means = {name: float(x.mean()) if x.size else float("nan") for name, x in found.items()}
    told = {name: scenario.privacy.get(name) for name in ("epsilon", "delta")}
    return means | {name: float("nan" if x is None else x) for name, x in told.items()}


def render_tradeoff(
    frame: "pd.DataFrame",
    style: str = "text",
    attacks: Sequence[str] = (),
    metric: str = "asr",
    last: int = 1,
) -> str:
    """Return the trade-off as a table; ``style`` as in `analysis.table.render`."""
    if style not in STYLES:
        raise UserError(f"unknown format {style!r}: {suggest(style, STYLES)}")
    found = tradeoff(frame, attacks, metric, last)
    if style == "csv":
        return found.to_csv(index=False)
    names = {"": "-", **attack_names(frame)}
    scenarios = found.drop_duplicates(_SCENARIO).set_index(_SCENARIO)
    columns: dict[str, Iterable[str]] = {"#": [str(index) for _, index in scenarios.index]}
    if scenarios.index.get_level_values("file").nunique() > 1:
        columns["file"] = [Path(str(file)).name for file, _ in scenarios.index]
    joined = join_shares(frame)
    merged = merge_seeds(joined)
    varying = varying_columns(merged)
    following = _following(scenarios, varying)
    for name in (name for name in varying if name not in following):
        columns[name] = scenarios[name].map(plain)
    for kind in KINDS:
        rows = found[found["kind"] == kind].set_index(_SCENARIO).reindex(scenarios.index)
        if rows["attack"].isna().all():
            continue
        if found.loc[found["kind"] == kind, "attack"].nunique() > 1 or not attacks:
            columns[f"{kind} attack"] = rows["attack"].fillna("").map(names)
            columns[f"its {metric}" if kind == "plain" else f"its {metric}, {kind}"] = _cells(rows)
        else:
            columns[names[rows["attack"].dropna().iloc[0]]] = _cells(rows)
        if kind == ACCUMULATED:
            columns["uniform guess, accumulated"] = rows["uniform"].map(_number)
        if kind == "plain":
            columns["uniform guess"] = rows["uniform"].map(_number)
            columns["random guess"] = rows["random"].map(_number)
    columns["accuracy"] = scenarios["accuracy"].map(_number)
    columns["bytes"] = scenarios["bytes"].map(lambda x: "-" if np.isnan(x) else f"{x:,.0f}")
    if scenarios["epsilon"].notna().any():
        columns["epsilon"] = scenarios["epsilon"].map(lambda x: "-" if np.isnan(x) else f"{x:.3g}")
    body = list(zip(*columns.values(), strict=True))
    notes = _notes(found, merged, attacks, metric, last)
    notes[-1:-1] = [
        *seeds_note(joined, merged),
        *_told_apart(scenarios, following),
        *loading_notes(frame, intervals=bool(found["low"].notna().any())),
        *not_finite(merged),
    ]
    return RENDERERS[style]([Page(head=[list(columns)], body=body)], notes)


def _following(scenarios: "pd.DataFrame", varying: Sequence[str]) -> dict[str, str]:
    """Return the columns whose value an earlier one determines, as in a zipped sweep, and that one.

    Not where that one tells all scenarios apart: it determines everything. Defences stay.
    """
    found: dict[str, str] = {}
    for place, name in enumerate(varying):
        for earlier in varying[:place] if name != DEFENSES else ():
            values = scenarios.groupby(earlier, dropna=False)[name].nunique(dropna=False)
            if earlier not in found and len(values) < len(scenarios) and values.max() == 1:
                found[name] = earlier
                break
    return found


def _told_apart(scenarios: "pd.DataFrame", following: Mapping[str, str]) -> list[str]:
    """Return a note for each value that determines others: what these are there."""
    notes = []
    for name in dict.fromkeys(following.values()):
        for value, rows in scenarios.groupby(name, sort=False, dropna=False):
            told = {one: plain(rows.iloc[0][one]) for one in following if following[one] == name}
            with_it = ", ".join(f"{one} {text}" for one, text in told.items() if text)
            notes.append(f"{name} {plain(value)}: {with_it}")
    return notes


def _not_run(merged: "pd.DataFrame", attacks: Sequence[str], metric: str) -> "pd.DataFrame":
    """Return the rows of attacks that do not apply, of kinds without any score in the scenario."""
    rivals = _rivals(merged, attacks)
    kind = rivals["target"].where(rivals["target"] == ACCUMULATED, rivals["adapted"] != "")
    keys = [*(rivals[name] for name in _SCENARIO), kind.astype(str)]
    scored = rivals[metric].notna().groupby(keys).transform("any")
    return rivals[~scored & ~rivals["applicable"].astype(bool)]


def _notes(
    found: "pd.DataFrame",
    merged: "pd.DataFrame",
    attacks: Sequence[str],
    metric: str,
    last: int,
) -> list[str]:
    strongest = "the chosen attack" if attacks else "the strongest attack"
    what = TITLES.get(metric, metric)
    interval = f"± is the larger side of the {LEVEL * 100:g} % interval over rounds"
    notes = [f"{what} of {strongest}; {interval}"]
    if not attacks:
        notes.append("the strongest is chosen by its mean on the same updates, which flatters it")
    kinds = {
        "adapted": "adapted: the attacker knows the defences",
        ACCUMULATED: "accumulated: about the labels of all updates of a client so far, without "
        "interval, since their rounds contain each other",
    }
    notes += [text for kind, text in kinds.items() if (found["kind"] == kind).any()]
    rounds = "last evaluated round" if last == 1 else f"last {last} evaluated rounds, mean"
    notes.append(f"accuracy of the global model: {rounds}; bytes of an update on the wire, mean")
    deltas = found["delta"].dropna().unique()
    if len(deltas):
        notes.append(f"epsilon at delta {', '.join(f'{delta:g}' for delta in deltas)}")
    notes += not_applicable(_not_run(merged, attacks, metric), attack_names(merged))
    varying = varying_columns(merged)
    fixed = [
        f"{name} {plain(found[name].iloc[0])}"
        for name in parameter_columns(merged)
        if name not in varying and plain(found[name].iloc[0])
    ]
    return [*notes, ", ".join(fixed)]


def _cells(rows: "pd.DataFrame") -> list[str]:
    cells = []
    for mean, low, high in rows[["mean", "low", "high"]].to_numpy():
        half = max(mean - low, high - mean)
        cells.append(_number(mean) + ("" if np.isnan(half) else f" ±{half:.3f}"))
    return cells


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"
