"""Figure: all attacks in all scenarios as a matrix, coloured by the advantage over a guess."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from analysis.figures import describe, set_title
from analysis.load import attack_names, family_order, of_updates
from analysis.notes import BROKEN, parameters, plain
from analysis.scenarios import outermost_first, pages
from analysis.score import ACCUMULATED
from analysis.success import LABELS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_COLUMNS = 24
_BASELINES = {"random": "random guess", "uniform": "uniform guess", "oracle": "oracle"}
# Inches of a cell, and of the gap above the baselines in heights of a cell.
_WIDTH, _HEIGHT, _GAP = 0.46, 0.25, 0.4
_FONT = 8
_LINE = 11  # points
_CHARACTER = 0.6 * _FONT / 72
# Of a label that stands upright: what it is broken at, and the lines that fit into a column.
_UPRIGHT, _MOST_LINES = 34, 3
_COLOURS = "RdBu_r"
_MISSING = "0.88"


def matrix_figures(summary: "pd.DataFrame", title: str) -> "list[Figure]":
    """Draw the mean of every attack in every scenario, the best attack on top.

    Attacks adapted to the defences have their rows beneath the plain ones'.

    Parameters
    ----------
    summary
        Of one file, as `analysis.table.summarise` returns it, by a metric with baselines.
    title
        Of the experiment.

    Returns
    -------
    list[matplotlib.figure.Figure]
        A figure for at most 24 scenarios, the values of the outermost swept key kept together. A
        cell's colour is the advantage over the uniform guess, white where there is none.
    """
    columns = parameters(summary)
    scenarios = summary.drop_duplicates("scenario")[["scenario", *columns]]
    ranked = summary.groupby("attack", sort=False)["mean"].mean()
    attacks = summary.drop_duplicates("attack")
    summed = attacks.loc[attacks["target"] == ACCUMULATED, "attack"].tolist()
    best = ranked.sort_values(ascending=False, kind="stable").index.tolist()
    best.sort(key=lambda label: label in summed)
    order = family_order(best, dict(zip(attacks["attack"], attacks["adapted"], strict=True)))
    names = attack_names(summary)
    return [
        _draw(page, summary[summary["scenario"].isin(page["scenario"])], order, names, title)
        for page in pages(scenarios, MOST_COLUMNS)
    ]


def _draw(
    page: "pd.DataFrame",
    summary: "pd.DataFrame",
    order: list[str],
    names: Mapping[str, str],
    title: str,
) -> "Figure":
    from matplotlib.figure import Figure

    cells = summary.set_index(["attack", "scenario"])
    columns = page["scenario"].tolist()
    mean, advantage = (
        cells[name].unstack("scenario").reindex(index=order, columns=columns).to_numpy(float)
        for name in ("mean", "advantage")
    )
    broken = cells["broken"].unstack("scenario").reindex(index=order, columns=columns)
    marked = broken.notna().to_numpy() & (broken != "{}").to_numpy() & ~np.isnan(mean)
    most = of_updates(summary).sort_values("repetitions", kind="stable").groupby("scenario").last()
    uniform = most["uniform"].reindex(columns).to_numpy(float)
    below_them = {
        name: most[column].reindex(columns).to_numpy(float) for column, name in _BASELINES.items()
    }
    summed = summary[summary["target"] == ACCUMULATED]
    if not summed.empty and len(summed) < len(summary):
        guess = summed.groupby("scenario")["uniform"].mean().reindex(columns).to_numpy(float)
        below_them["uniform guess, accumulated"] = guess
    base = np.array(list(below_them.values()))

    levels = [_Level.of(page, name) for name in reversed(outermost_first(page))]
    knows = summary.drop_duplicates("attack").set_index("attack")["knowledge"]
    rows = [f"{names[label]}  ({knows.get(label, '')})" for label in order]
    height = len(order) + _GAP + len(base)
    margin = _CHARACTER * max(map(len, [*rows, *below_them, *(level.name for level in levels)]))
    figure = Figure(
        figsize=(
            max(margin + _WIDTH * len(columns) + 1.9, 6),
            _HEIGHT * height + sum(level.points for level in levels) / 72 + 1.5,
        )
    )
    axes = figure.add_subplot()
    mesh = _fill(axes, np.arange(len(order) + 1), mean, advantage, marked)
    below = len(order) + _GAP + np.arange(len(base) + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        ahead = np.where(uniform < 1, (base - uniform) / (1 - uniform), np.nan)
    # A guess by itself, about other labels than the rest.
    ahead[len(_BASELINES) :] = np.where(np.isnan(base[len(_BASELINES) :]), np.nan, 0)
    _fill(axes, below, base, ahead, np.zeros(base.shape, bool))
    axes.set_ylim(height, 0)
    ticks = [*(np.arange(len(order)) + 0.5), *(below[:-1] + 0.5)]
    axes.set_yticks(ticks, [*rows, *below_them], parse_math=False)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    _label_columns(axes, levels)
    common = {
        name: page[name].iloc[0]
        for name in parameters(summary)
        if name not in {level.name for level in levels} and plain(page[name].iloc[0])
    }
    axes.set_title(describe(common, width=max(40, 7 * len(columns))), parse_math=False)
    _add_scale(figure, axes, mesh)
    says = f"cells: {LABELS[summary['metric'].iloc[0]]}, mean of the updates"
    says += f"; {BROKEN} an assumption of the attack is broken" if marked.any() else ""
    says += "; \N{EN DASH} not applicable, or no score" if np.isnan(mean).any() else ""
    says += "; grey: the guess is always right" if (uniform == 1).any() else ""
    figure.supxlabel(textwrap.fill(says, int(figure.get_figwidth() * 14)), fontsize=_FONT + 1)
    set_title(figure, title)
    return figure


def _fill(
    axes: "Axes",
    edges: NDArray[Any],
    values: NDArray[np.float64],
    colours: NDArray[np.float64],
    marked: NDArray[np.bool_],
) -> Any:
    """Draw rows of cells between edges; return what a colour scale needs."""
    from matplotlib import colormaps

    colourmap = colormaps[_COLOURS].with_extremes(bad=_MISSING)
    x = np.arange(values.shape[1] + 1)
    mesh = axes.pcolormesh(
        x, edges, colours, cmap=colourmap, vmin=-1, vmax=1, edgecolors="white", linewidth=0.6
    )
    for (row, column), value in np.ndenumerate(values):
        known, shade = not np.isnan(value), colours[row, column]
        red, green, blue, _ = colourmap((shade + 1) / 2) if not np.isnan(shade) else (1, 1, 1, 1)
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(
            column + 0.5,
            (edges[row] + edges[row + 1]) / 2,
            f"{value:.2f}{BROKEN if marked[row, column] else ''}" if known else "\N{EN DASH}",
            ha="center",
            va="center",
            fontsize=_FONT,
            color="white" if dark else "black",
            in_layout=False,  # hundreds of texts that lie inside the axes anyway
        )
    return mesh


@dataclass(frozen=True)
class _Level:
    """A parameter beneath the columns.

    Attributes
    ----------
    name
        Of the parameter.
    labels
        By the first column and the one behind the last that share a value, how it is shown.
    upright
        Whether the labels stand upright: words are not cut where one is wider than its columns.
    points
        How much room the line takes.
    """

    name: str
    labels: Mapping[tuple[int, int], str]
    upright: bool
    points: float

    @staticmethod
    def of(page: "pd.DataFrame", name: str) -> "_Level":
        """Return the level of a parameter, whose spans end where those of outer ones do."""
        order = outermost_first(page)
        outer = page[order[: order.index(name) + 1]].astype(str)
        new = np.r_[True, (outer.to_numpy()[1:] != outer.to_numpy()[:-1]).any(axis=1)]
        starts = np.flatnonzero(new).tolist()
        spans = list(zip(starts, [*starts[1:], len(page)], strict=True))
        shown = {span: plain(page[name].iloc[span[0]]) or "none" for span in spans}
        room = {span: int((span[1] - span[0]) * _WIDTH / _CHARACTER) for span in spans}
        upright = any(max(map(len, text.split())) > room[span] for span, text in shown.items())
        labels = {
            span: textwrap.fill(
                text,
                max(_UPRIGHT, len(text) // _MOST_LINES + 9) if upright else room[span],
                break_long_words=not upright,
                break_on_hyphens=not upright,
            )
            for span, text in shown.items()
        }
        lines = [text.split("\n") for text in labels.values()]
        longest = max(len(line) for each in lines for line in each)
        points = 72 * _CHARACTER * longest if upright else _LINE * max(map(len, lines))
        return _Level(name, labels, upright, points + 3)


def _label_columns(axes: "Axes", levels: Sequence[_Level]) -> None:
    """Write the parameters beneath the columns: a line each, the innermost on top."""
    depth = -4.0
    place: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    for level in levels:
        for (start, stop), label in level.labels.items():
            if start and level is not levels[0]:
                axes.axvline(start, color="white", lw=3)
            axes.annotate(
                label,
                ((start + stop) / 2, 0),
                (0, depth),
                ha="center",
                va="top",
                rotation=90 if level.upright else 0,
                fontsize=_FONT,
                parse_math=False,
                annotation_clip=False,
                **place,
            )
        axes.annotate(
            level.name.replace("_", " "),
            (0, 0),
            (-4, depth),
            ha="right",
            va="top",
            fontsize=_FONT,
            style="italic",
            parse_math=False,
            annotation_clip=False,
            **place,
        )
        depth -= level.points


def _add_scale(figure: "Figure", axes: "Axes", mesh: Any) -> None:
    scale = figure.colorbar(mesh, ax=axes, extend="min", fraction=0.05, pad=0.02, aspect=25)
    scale.set_ticks([-1, -0.5, 0, 0.5, 1], labels=["-1", "-0.5", "0", "0.5", "1"])
    scale.set_label("advantage over the uniform guess", fontsize=_FONT + 1)
