"""Figure: success of attacks along training, above the accuracy of the model they attack."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.bootstrap import bootstrap_interval
from analysis.figures import PALETTE, describe
from analysis.load import is_trained, parameter_columns, varying_columns
from analysis.score import BASELINES
from analysis.stages import best_attacks
from analysis.success import attack_styles, draw_curves, finish
from analysis.table import LEVEL

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analysis.open_set import Described

_MAX_PANELS, _COLUMNS = 12, 4
_MOST_POINTS = 20
# Rounds of a point: as many as an interval asks for, unless too few points are left.
_ROUNDS, _FEWEST_POINTS = 5, 5
# With fewer rounds the quantile of Student's distribution says more than they do.
_LEAST_CLUSTERS = 3
_WIDTH, _HEIGHTS = 3.6, (2.6, 1.4)


def rounds_figure(
    results: "Described", frame: "pd.DataFrame", most: int, *, chosen: bool = False
) -> "Figure | None":
    """Draw success against the round of training, binned, and what a guess would score.

    Parameters
    ----------
    results
        An open file, or an open set of shares.
    frame
        Its rows as `analysis.load` returns them, seeds apart.
    most
        Attacks in the figure: of more, LLG and LLG+ and the best ones are drawn.
    chosen
        Whether the attacks are the user's choice, to be drawn whatever their number.

    Returns
    -------
    matplotlib.figure.Figure or None
        For each setting a panel of the attacks and, where models were evaluated, one of their
        accuracy beneath, 12 settings at most; scenarios that differ in the seed alone are averaged.
        None where no scenario trains a model, or none attacks it in two rounds.
    """
    from matplotlib.ticker import MaxNLocator

    trained = [scenario.number for scenario in results.scenarios if is_trained(scenario)]
    rows = frame[frame["scenario"].isin(trained)]
    attacked = rows.groupby("scenario")["round"].transform("nunique") > 1
    rows = rows[attacked & rows["asr"].notna()]
    if rows.empty:
        return None
    keys = [name for name in parameter_columns(rows) if name != "seed"]
    groups = [group for _, group in rows.groupby(keys, sort=False, dropna=False)]
    shown = groups[:_MAX_PANELS]
    points = [_binned(group) for group in shown]
    if not chosen:
        best = best_attacks(_joined(points), most)["attack"].unique()
        points = [part[part["attack"].isin(best)] for part in points]
    accuracy = [_accuracy(results, group["scenario"].unique().tolist()) for group in shown]
    evaluated = any(len(values) for _, values in accuracy)
    figure, panels, beneath = _panels(len(shown), evaluated=evaluated)
    styles = attack_styles(points)
    varying = [name for name in varying_columns(rows) if name != "seed"]
    for axes, group, part in zip(panels, shown, points, strict=True):
        draw_curves(axes, part, styles)
        first = group.iloc[0]
        setting = {name: first[name] for name in varying or ("dataset", "distribution")}
        axes.set_title(describe(setting, width=36), parse_math=False)
        if not evaluated:
            axes.set_xlabel("round")
    for axes in (*panels, *beneath):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    for axes, (rounds, values) in zip(beneath, accuracy, strict=False):
        _draw_accuracy(axes, rounds, values)
    left_out = len(groups) - len(shown)
    note = f", where a point stands for {_LEAST_CLUSTERS} rounds or more"
    note += f"; {left_out} more settings left out" if left_out else ""
    finish(figure, panels, results.title, "bands", note, "")
    for row in range(0, len(panels), _COLUMNS):
        panels[row].set_ylabel("attack success rate")
        if evaluated:
            beneath[row].set_ylabel("accuracy")
    return figure


def _joined(points: "Sequence[pd.DataFrame]") -> "pd.DataFrame":
    import pandas as pd

    return pd.concat(points)


def _binned(group: "pd.DataFrame") -> "pd.DataFrame":
    """Return the mean of each attack over ranges of rounds, at the mean round of each."""
    import pandas as pd

    rounds = np.unique(group["round"])
    seeds = group["scenario"].nunique()
    count = len(rounds) // -(-_ROUNDS // seeds)
    if count < _FEWEST_POINTS:
        count = len(rounds)
    parts = np.array_split(rounds, min(count, _MOST_POINTS))
    places = {number: float(part.mean()) for part in parts for number in part.tolist()}
    # Every round of every seed has a model of its own.
    clusters = group["round"] + (group["scenario"] - group["scenario"].min()) * (rounds[-1] + 1)
    binned = group.assign(x=group["round"].map(places), cluster=clusters)
    rows = []
    for _, part in binned.groupby(["attack", "x"], sort=False):
        low, high = np.nan, np.nan
        if part["cluster"].nunique() >= _LEAST_CLUSTERS:
            interval = bootstrap_interval(part["asr"], part["cluster"], level=LEVEL)
            low, high = np.clip(interval, 0, 1).tolist()
        told = ("attack", "x", "title", "knowledge", "target", "adapted", "broken")
        first = part.iloc[0]
        rows.append(
            {name: first[name] for name in told}
            | {"mean": part["asr"].mean(), "low": low, "high": high}
            | {name: part[name].mean() for name in BASELINES}
        )
    return pd.DataFrame(rows)


def _accuracy(results: "Described", indices: Sequence[int]) -> tuple[Any, Any]:
    """Return the rounds that were evaluated, and the accuracy of each scenario's model [S, n]."""
    found: list[Any] = []
    for index in indices:
        scenario = results.numbered(index)
        if scenario.has("rounds/accuracy"):
            found.append(scenario.array("rounds/accuracy"))
    length = min((len(values) for values in found), default=0)
    values = np.array([each[:length] for each in found]).reshape(len(found), length)
    known = np.flatnonzero(np.isfinite(values).all(axis=0)) if len(found) else np.zeros(0, int)
    return known, values[:, known].T if len(known) else np.zeros((0, len(found)))


def _panels(count: int, *, evaluated: bool) -> "tuple[Figure, list[Axes], list[Axes]]":
    """Return a figure with panels for success, and ones beneath them with the same rounds."""
    from matplotlib.figure import Figure

    columns = min(count, _COLUMNS)
    blocks = -(-count // columns)
    heights = _HEIGHTS if evaluated else _HEIGHTS[:1]
    figure = Figure(figsize=(max(_WIDTH * columns, 5.5), sum(heights) * blocks + 1.2))
    cells = figure.add_gridspec(len(heights) * blocks, columns, height_ratios=heights * blocks)
    above: list[Axes] = []
    beneath: list[Axes] = []
    for number in range(count):
        block, column = divmod(number, columns)
        axes = figure.add_subplot(cells[len(heights) * block, column])
        above.append(axes)
        if evaluated:
            lower = figure.add_subplot(cells[2 * block + 1, column], sharex=axes)
            axes.tick_params(labelbottom=False)
            beneath.append(lower)
    return figure, above, beneath


def _draw_accuracy(axes: "Axes", rounds: Any, values: Any) -> None:
    if len(rounds):
        low, high = values.min(axis=1), values.max(axis=1)
        axes.fill_between(rounds, low, high, color=PALETTE[6], alpha=0.18, lw=0)
        axes.plot(rounds, values.mean(axis=1), color=PALETTE[6], lw=1.4, marker=".", ms=4)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("round")
