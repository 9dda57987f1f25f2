"""Success of every attack in every scenario, with its interval and what a guess would score."""

from typing import TYPE_CHECKING

import numpy as np

from analysis.formats import RENDERERS, Page
from analysis.load import (
    ATTACK,
    attack_names,
    of_updates,
    parameter_columns,
    varying_columns,
)
from analysis.notes import (
    BROKEN,
    loading_notes,
    not_finite,
    parameters,
    plain,
    self_test,
    table_notes,
)
from analysis.scenarios import merge_seeds, outermost_first, pages, seeds_note
from analysis.score import ACCUMULATED, BASELINES, baseline_columns
from analysis.shares import join_shares
from testbed.errors import UserError, suggest

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.95
# With more attacks a column each is unreadable.
MOST_COLUMNS = 8
ROWS = ("auto", "scenarios", "attacks")
STYLES = (*RENDERERS, "csv")
_INTERVAL = ("mean", "low", "high")
_BASELINE_TITLES = {
    "random": "random guess",
    "uniform": "uniform guess",
    "oracle": "oracle",
    ACCUMULATED: "uniform guess, accumulated",
}
_SCENARIO = ["file", "scenario"]


def summarise(frame: "pd.DataFrame", metric: str = "asr") -> "pd.DataFrame":
    """Return the mean of a metric for each file, scenario and attack.

    Parameters
    ----------
    frame
        As `analysis.load` returns it, or some of its rows.
    metric
        A metric column; those of `testbed.attacks.metrics`.

    Returns
    -------
    pandas.DataFrame
        Columns ``file``, ``scenario``, the parameters, what `analysis.load` says of the attack
        (``attack`` to ``broken``), ``metric``, ``mean``, ``low`` and ``high`` (95 %
        interval of the mean over rounds; NaN with one round, and for the target ``accumulated``,
        whose rounds contain each other), ``repetitions`` (updates scored),
        ``rounds`` (those they come from) and ``accuracy`` (mean over the rounds' models). Where
        the metric has baselines also the means of ``random``, ``uniform`` and ``oracle`` over the
        same updates, and ``advantage``: of the mean over the uniform guess.

    Raises
    ------
    UserError
        The metric is unknown, or the frame is empty.
    """
    import pandas as pd

    from analysis.bootstrap import bootstrap_interval
    from testbed.attacks.metrics import METRICS, advantage

    if metric not in METRICS:
        raise UserError(f"unknown metric {metric!r}: {suggest(metric, METRICS)}")
    if frame.empty:
        raise UserError("no rows to summarise: no round with an attack has been committed yet")
    baselines = baseline_columns(metric)
    kept = [*_SCENARIO, *parameter_columns(frame), *ATTACK]
    rows = []
    for _, group in frame.groupby([*_SCENARIO, "attack"], sort=False):
        scored = group[group[metric].notna()]
        low, high = np.nan, np.nan
        if group["target"].iloc[0] != ACCUMULATED:
            found = bootstrap_interval(scored[metric], scored["round"], level=LEVEL)
            # No metric leaves [0, 1], as Student's interval of a few rounds may.
            low, high = np.clip(found, 0, 1).tolist()
        row = {
            "mean": scored[metric].mean(),
            "low": low,
            "high": high,
            "repetitions": len(scored),
            "rounds": scored["round"].nunique(),
            "accuracy": group["accuracy"].mean(),
        }
        row |= {name: scored[column].mean() for name, column in baselines.items()}
        if baselines:
            row["advantage"] = float(advantage(row["mean"], row["uniform"]))
        first = group.iloc[0]
        rows.append({**{name: first[name] for name in kept}, "metric": metric, **row})
    return pd.DataFrame(rows)


def split_scored(summary: "pd.DataFrame") -> "tuple[pd.DataFrame, pd.DataFrame]":
    """Return the rows of attacks whose answers the metric can score, and those of the others."""
    from testbed.attacks.metrics import scored_by

    kinds = {kind: scored_by(kind) for kind in summary["answers"].unique().tolist()}
    scored = [
        metric in kinds[kind]
        for kind, metric in zip(summary["answers"], summary["metric"], strict=True)
    ]
    return summary[scored], summary[np.logical_not(scored)]


def render(
    frame: "pd.DataFrame",
    style: str = "text",
    metric: str = "asr",
    rows: str = "auto",
    *,
    per_seed: bool = False,
) -> str:
    """Return a table of a frame as text.

    Parameters
    ----------
    frame
        As `analysis.load` returns it.
    style
        ``csv`` for one row per scenario and attack at full precision (`summarise`); ``text``,
        ``markdown`` or ``latex`` (booktabs) for a table to read.
    metric
        See `summarise`.
    rows
        What the rows of a table to read are: ``scenarios``, with a column for each attack;
        ``attacks``, with a column for each scenario, on several pages where there are many; or
        ``auto``: attacks where there are more than 8.
    per_seed
        Whether scenarios that differ in the seed alone stay apart; else they are averaged.

    Raises
    ------
    UserError
        See `summarise`; the style is unknown, or the metric scores none of the attacks.
    """
    if style not in STYLES:
        raise UserError(f"unknown format {style!r}: {suggest(style, STYLES)}")
    if rows not in ROWS:
        raise UserError(f"unknown rows {rows!r}: {suggest(rows, ROWS)}")
    joined = join_shares(frame)
    merged = joined if per_seed else merge_seeds(joined)
    everything = summarise(merged, metric)
    if style == "csv":
        return everything.to_csv(index=False)
    summary, left_out = split_scored(everything)
    if summary.empty:
        raise UserError(
            f"the metric {metric} scores none of these attacks, which infer presence alone: "
            "choose presence_f1"
        )
    notes = table_notes(summary, left_out, metric, LEVEL)
    notes[1:1] = seeds_note(joined, merged)
    notes += loading_notes(frame, intervals=bool(summary["low"].notna().any()))
    notes += [*not_finite(merged), self_test(merged)]
    many = summary["attack"].nunique() > MOST_COLUMNS
    layout = _by_attack if rows == "attacks" or (rows == "auto" and many) else _by_scenario
    return RENDERERS[style](layout(summary), notes)


def _by_scenario(summary: "pd.DataFrame") -> list[Page]:
    """Return a row per scenario, a column per attack and baseline."""
    first = summary.groupby(_SCENARIO, sort=False).first()
    columns = {"#": [str(index) for _, index in first.index]}
    if summary["file"].nunique() > 1:
        columns["file"] = [str(file) for file, _ in first.index]
    for name in varying_columns(summary[parameters(summary)]):
        columns[name] = [plain(value) for value in first[name]]
    cells = _cells(summary)
    for label, name in attack_names(summary).items():
        columns[name] = [cells.get((*key, label), "-") for key in first.index]
    for name, values in _baselines(summary).items():
        columns[_BASELINE_TITLES[name]] = [values[key] for key in first.index]
    return [Page(head=[list(columns)], body=list(zip(*columns.values(), strict=True)))]


def _by_attack(summary: "pd.DataFrame") -> list[Page]:
    """Return a row per attack and baseline, a column per scenario."""
    scenarios = summary.drop_duplicates(_SCENARIO)[[*_SCENARIO, *parameters(summary)]]
    attacks = summary.drop_duplicates("attack").set_index("attack")
    cells, baselines = _cells(summary), _baselines(summary)
    every = outermost_first(scenarios)
    found = []
    for page in pages(scenarios, MOST_COLUMNS):
        keys = list(zip(page["file"], page["scenario"], strict=True))
        varying = outermost_first(page)
        common = [name for name in every if name not in varying]
        head = [[name, "", "", *map(plain, page[name])] for name in varying]
        head += [["attack", "knows", "answers", *(f"#{index}" for _, index in keys)]]
        body = [
            [
                *(name, attacks["knowledge"][label], attacks["answers"][label]),
                *(cells.get((*key, label), "-") for key in keys),
            ]
            for label, name in attack_names(summary).items()
        ]
        foot = [
            [_BASELINE_TITLES[name], "", "", *(values[key] for key in keys)]
            for name, values in baselines.items()
        ]
        title = ", ".join(f"{name} {plain(page[name].iloc[0])}".strip() for name in common)
        found.append(Page(head, body, foot, title))
    return found


def _cells(summary: "pd.DataFrame") -> dict[tuple[str, int, str], str]:
    """Return the cell of each file, scenario and attack."""
    keys = zip(summary["file"], summary["scenario"], summary["attack"], strict=True)
    values = map(_cell, *(summary[name] for name in (*_INTERVAL, "broken")))
    return dict(zip(keys, values, strict=True))


def _baselines(summary: "pd.DataFrame") -> dict[str, dict[tuple[str, int], str]]:
    """Return for each baseline the cell of each file and scenario."""
    if "random" not in summary:
        return {}
    kinds = {name: (name, of_updates(summary)) for name in BASELINES}
    summed = summary[summary["target"] == ACCUMULATED]
    if not summed.empty and len(summed) < len(summary):
        kinds[ACCUMULATED] = ("uniform", summed)
    scenarios = summary.drop_duplicates(_SCENARIO)[_SCENARIO].itertuples(index=False, name=None)
    empty = dict.fromkeys(scenarios, "-")
    found = {}
    for kind, (name, rows) in kinds.items():
        # Where one attack failed on some updates, the others' baselines cover more of them.
        most = rows.sort_values("repetitions", kind="stable").groupby(_SCENARIO, sort=False)
        means = most.last()[name]
        found[kind] = empty | dict(zip(means.index, map(_number, means), strict=True))
    return found


def _cell(mean: float, low: float, high: float, broken: str) -> str:
    mark = BROKEN if broken != "{}" and not np.isnan(mean) else ""
    if np.isnan(low):
        return _number(mean) + mark
    return f"{mean:.3f} ±{max(mean - low, high - mean):.3f}{mark}"


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"
