"""Figure: what leaks against what the model is worth, with the bytes that each defence sends."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.figures import MARKERS, PALETTE, STYLE, describe, save_figure, set_title
from analysis.load import DEFENSES, varying_columns
from analysis.notes import plain
from analysis.placing import place_labels
from analysis.score import ACCUMULATED
from analysis.share_notes import titled
from analysis.success import LABELS
from analysis.table import LEVEL
from analysis.tradeoff import tradeoff
from testbed.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_ROWS, _MOST_POINTS = 6, 40
_FONT = 8
# Inches: of the two panels, and what a bar and the axis beneath them take.
_WIDTHS, _BAR, _REST, _LEAST = (5.2, 4.8), 0.22, 0.9, 3.4
_GREY = "0.35"
# Of the horizontal axis: beyond the points, and what sets a scenario's guess apart.
_ROOM, _APART = 0.1, 0.04
_SCENARIO = ["file", "scenario"]


def tradeoff_figure(
    frame: "pd.DataFrame",
    title: str,
    attacks: Sequence[str] = (),
    metric: str = "asr",
    last: int = 1,
) -> "Figure":
    """Draw final accuracy over leakage, a point per defence, and the bytes of an update.

    Parameters
    ----------
    frame, attacks, metric, last
        See `analysis.tradeoff.tradeoff`.
    title
        Above the figure.

    Returns
    -------
    matplotlib.figure.Figure
        A row of two panels for each setting of what was swept beside the defences, 6 at most; one
        row where these were not swept. Attacks on all updates of a client so far, whose guess is
        another one, are left to the table.

    Raises
    ------
    UserError
        See `analysis.tradeoff.tradeoff`; or no model was evaluated.
    """
    from matplotlib.figure import Figure

    found = tradeoff(frame, attacks, metric, last)
    found = found[found["kind"] != ACCUMULATED]
    if found["accuracy"].isna().all():
        raise UserError(
            "no model was evaluated, so that there is no accuracy to draw: set "
            "federation.evaluate_every, or leave out -o for the table"
        )
    varying = [name for name in varying_columns(frame) if name != "seed"]
    facets = [name for name in varying if name != DEFENSES] if DEFENSES in varying else []
    groups: list[tuple[dict[str, Any], pd.DataFrame]] = [({}, found)]
    if facets:
        groups = [
            (dict(zip(facets, values, strict=True)), group)
            for values, group in found.groupby(facets, sort=False, dropna=False)
        ]
    shown = groups[:_MOST_ROWS]
    named = [_points(group, [name for name in varying if name not in facets]) for _, group in shown]
    heights = [max(_LEAST, _BAR * len(points) + _REST) for points in named]
    figure = Figure(figsize=(sum(_WIDTHS), sum(heights) + 1.1))
    cells = figure.add_gridspec(len(shown), 2, width_ratios=_WIDTHS, height_ratios=heights)
    panels = []
    for row, ((setting, _), points) in enumerate(zip(shown, named, strict=True)):
        left, right = (figure.add_subplot(cells[row, column]) for column in (0, 1))
        _draw_points(left, points)
        _draw_bytes(right, points)
        left.set_title(describe(setting, width=60), parse_math=False)
        left.set_xlabel(LABELS[metric])
        left.set_ylabel("final accuracy")
        panels.append((left, right))
    scenarios = sum(len(group.drop_duplicates(_SCENARIO)) for _, group in shown)
    undrawn = scenarios - sum(int(_drawn(points).sum()) for points in named)
    undrawn += len(frame.attrs.get("lost", ()))
    _add_legend(figure, panels, len(groups) - len(shown), undrawn, attacks)
    set_title(figure, title)
    figure.draw_without_rendering()
    written = [_write(left, points) for (left, _), points in zip(panels, named, strict=True)]
    for (_, right), points, numbered in zip(panels, named, written, strict=True):
        if numbered:
            names = [f"{name}  {n}" for n, name in enumerate(points["name"], start=1)]
            right.set_yticks(range(len(points)), names, parse_math=False)
    return figure


def save_tradeoff(
    frame: "pd.DataFrame",
    path: Path,
    attacks: Sequence[str] = (),
    metric: str = "asr",
    last: int = 1,
) -> Path:
    """Write the figure to a file, headed by the titles of the experiments; see above."""
    from matplotlib import rc_context

    from testbed.results.reader import open_results

    titles = []
    for file in frame["file"].unique():
        with open_results(str(file)) as results:
            titles.append(results.title)
    title = titled("; ".join(dict.fromkeys(titles)), frame.attrs.get("sets", ()))
    with rc_context(STYLE):
        figure = tradeoff_figure(frame, title, attacks, metric, last)
        return save_figure(figure, path)


def _points(group: "pd.DataFrame", varying: Sequence[str]) -> "pd.DataFrame":
    """Return a row per scenario: name, plain and adapted leakage, and the costs."""
    first = group.drop_duplicates(_SCENARIO).head(_MOST_POINTS)
    points = first[[*_SCENARIO, "accuracy", "bytes", "epsilon", "uniform", "random"]].copy()
    points["name"] = [
        describe({name: row[name] for name in varying}, width=200) or plain(row["scenario"])
        for row in first.to_dict("records")
    ]
    # Equal ones come from several files.
    twice = points["name"].duplicated(keep=False)
    points.loc[twice, "name"] += ", " + points["file"].map(lambda file: Path(file).stem)[twice]
    twice = points["name"].duplicated(keep=False)
    points.loc[twice, "name"] += " #" + points["scenario"].astype(str)[twice]
    for kind in ("plain", "adapted"):
        rows = group[group["kind"] == kind][[*_SCENARIO, "mean", "low", "high"]]
        renamed = rows.rename(columns={name: f"{kind}_{name}" for name in ("mean", "low", "high")})
        points = points.merge(renamed, on=_SCENARIO, how="left")
    return points


def _leaks(points: "pd.DataFrame") -> "pd.Series[float]":
    """Return where each point is: at the attacker who knows more, or at the guess."""
    return points["adapted_mean"].fillna(points["plain_mean"]).fillna(points["uniform"])


def _drawn(points: "pd.DataFrame") -> "pd.Series[bool]":
    return points["accuracy"].notna() & _leaks(points).notna()


def _look(index: int) -> dict[str, Any]:
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}


def _draw_points(axes: "Axes", points: "pd.DataFrame") -> None:
    for index, point in enumerate(points.to_dict("records")):
        look, y = _look(index), point["accuracy"]
        ends = [point[f"{kind}_mean"] for kind in ("plain", "adapted")]
        if np.isnan(ends).all():
            if np.isnan(point["uniform"]):
                continue
            axes.plot(point["uniform"], y, "x", color=look["color"], ms=7, mew=1.6)
            continue
        if not np.isnan(ends).any():
            axes.plot(ends, [y, y], "-", color=look["color"], lw=1, alpha=0.6)
        for kind, mean, fill in zip(("plain", "adapted"), ends, ("white", None), strict=True):
            if np.isnan(mean):
                continue
            sides = [mean - point[f"{kind}_low"], point[f"{kind}_high"] - mean]
            axes.errorbar(
                mean,
                y,
                xerr=None if np.isnan(sides).any() else np.maximum(sides, 0)[:, None],
                **look,
                ms=6,
                mfc=fill or look["color"],
                mew=1.3,
                elinewidth=0.8,
                capsize=2,
            )
    x = points.filter(regex="_(mean|low|high)$|^random$|^uniform$").to_numpy(float)
    x = x[np.isfinite(x)]
    if x.size:
        axes.set_xlim(max(-0.02, x.min() - _ROOM), min(1.04, x.max() + _ROOM))
    low, high = points["accuracy"].min(), points["accuracy"].max()
    room = max(0.02, 0.15 * (high - low))
    axes.set_ylim(max(-0.02, low - room), min(1.04, high + room))
    for name, line in (("random", "--"), ("uniform", ":")):
        usual = points[name].median()
        if np.isnan(usual):
            continue
        axes.axvline(usual, ls=line, color=_GREY, lw=1.2, zorder=1.9)
        # Sums over a cohort are easier to guess.
        for at, y in points.loc[
            (points[name] - usual).abs() > _APART, [name, "accuracy"]
        ].to_numpy():
            half = 0.04 * (high - low + 2 * room)
            axes.plot([at, at], [y - half, y + half], ls=line, color=_GREY, lw=1.2, zorder=1.9)


def _draw_bytes(axes: "Axes", points: "pd.DataFrame") -> None:
    """Draw the bytes of an update as bars, with the privacy budget behind them."""
    from matplotlib.ticker import EngFormatter

    sizes, places = points["bytes"], range(len(points))
    colours = [_look(index)["color"] for index in places]
    axes.barh(places, sizes.fillna(0), 0.65, color=colours, alpha=0.75)
    axes.set_yticks(places, points["name"], fontsize=_FONT, parse_math=False)
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("sent per client and round")
    most, least = sizes.max(), sizes[sizes > 0].min()
    if most > 0 and most / least > 20:
        axes.set_xscale("log")
        axes.set_xlim(least / 3, most * 20)
    elif most > 0:
        axes.set_xlim(0, most * 1.5)
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    for place, (size, epsilon) in enumerate(zip(sizes, points["epsilon"], strict=True)):
        says = "unknown" if np.isnan(size) else _bytes(size)
        says += "" if np.isnan(epsilon) else f", \N{GREEK SMALL LETTER EPSILON} {epsilon:.3g}"
        x = axes.get_xlim()[0] if np.isnan(size) else size
        axes.annotate(
            says, (x, place), (3, 0), textcoords="offset points", va="center", fontsize=_FONT
        )


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _write(axes: "Axes", points: "pd.DataFrame") -> bool:
    """Name the points; return whether there was room for their numbers only."""
    x = _leaks(points).to_numpy(float)
    y = points["accuracy"].to_numpy(float)
    known = _drawn(points).to_numpy()
    at = np.stack([x, y], axis=1)[known]
    # The line between the two and their whiskers, as a row of points.
    reach = points.filter(regex="_(mean|low|high)$").to_numpy(float)
    along = np.linspace(np.fmin.reduce(reach, axis=1), np.fmax.reduce(reach, axis=1), 15)
    others = np.stack([along, np.broadcast_to(y, along.shape)], axis=-1).reshape(-1, 2)
    guesses = [
        np.stack([points[name].to_numpy(float), y], axis=1) for name in ("random", "uniform")
    ]
    others = np.concatenate([others, *guesses])
    others = others[~np.isnan(others).any(axis=1)]
    indices = np.flatnonzero(known).tolist()
    colours = [_look(index)["color"] for index in indices]
    numbers = [str(index + 1) for index in indices]
    if place_labels(axes, at, points["name"][known].tolist(), colours, others, _FONT):
        return False
    return place_labels(axes, at, numbers, colours, others, _FONT, anyway=True)


def _add_legend(
    figure: "Figure",
    panels: "Sequence[tuple[Axes, Axes]]",
    left_out: int,
    undrawn: int,
    attacks: Sequence[str],
) -> None:
    from matplotlib.lines import Line2D

    what = "attack" if attacks else "strongest attack"
    mark: dict[str, Any] = {"ls": "", "marker": "o", "color": _GREY, "ms": 6}
    entries = [
        Line2D([], [], **mark, mfc="white", label=what),
        Line2D([], [], **mark, label=f"{what} that knows the defences"),
        Line2D([], [], ls="--", color=_GREY, lw=1.2, label="random guess (expected)"),
        Line2D([], [], ls=":", color=_GREY, lw=1.2, label="uniform guess"),
    ]
    crosses = any(line.get_marker() == "x" for left, _ in panels for line in left.get_lines())
    if crosses:
        label = "no attack applies"
        entries.append(Line2D([], [], ls="", marker="x", color=_GREY, ms=6, label=label))
    note = f"; {left_out} more settings left out" if left_out else ""
    if undrawn:
        note += f"; {undrawn} scenario{'' if undrawn == 1 else 's'} not drawn"
    figure.legend(
        handles=entries,
        loc="outside lower center",
        ncols=3,
        title=f"whiskers: {LEVEL * 100:g} % interval of the mean{note}",
    )
