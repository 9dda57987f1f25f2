"""Figure: attack success rate against batch size, or per scenario where that is not swept."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.figures import MARKERS, PALETTE, describe, grid, set_title
from analysis.load import attack_names, of_updates, varying_columns
from analysis.notes import BROKEN, parameters
from analysis.score import ACCUMULATED
from analysis.table import LEVEL

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_PANELS = 16
_BARS_PER_ROW = 8
# Characters of a line beneath bars: more where a word would be cut.
_LABEL, _LONGEST_LABEL = 20, 28
_GREY = "0.35"
BASELINES = {
    "random": ("random guess (expected)", "--"),
    "uniform": ("uniform guess", ":"),
    "oracle": ("oracle", "-."),
}
# Of attacks on all updates of a client so far.
_ACCUMULATED: tuple[str, Any] = ("uniform guess, accumulated", (0, (1, 4)))
LABELS = {"asr": "attack success rate", "presence_f1": "F1 score of the classes present"}


def success_figure(summary: "pd.DataFrame", title: str) -> "Figure":
    """Draw every attack's success with its 95 % interval, and what a guess would score.

    Parameters
    ----------
    summary
        Of one file, as `analysis.table.summarise` returns it, by a metric with baselines; not
        empty, and every attack scored.
    title
        Of the experiment.

    Returns
    -------
    matplotlib.figure.Figure
        A panel per data set, label distribution and further swept parameter, over batch sizes; or
        bars per scenario where no panel would have two batch sizes.
    """
    varying = varying_columns(summary[parameters(summary)])
    keys = ["dataset", "distribution"]
    keys += [name for name in varying if name not in (*keys, "batch_size")]
    groups = [
        (dict(zip(keys, values, strict=True)), group)
        for values, group in summary.groupby(keys, sort=False, dropna=False)
    ]
    curves = max(group["batch_size"].nunique() for _, group in groups) > 1
    return _curves(groups, title) if curves else _bars(summary, varying, title)


def _curves(groups: Sequence[tuple[dict[str, Any], "pd.DataFrame"]], title: str) -> "Figure":
    shown = groups[:_MAX_PANELS]
    figure, panels = grid(len(shown), columns=min(4, max(2, round(len(shown) ** 0.5))))
    sizes = sorted({size for _, group in shown for size in group["batch_size"]})
    styles = attack_styles(group for _, group in shown)
    for axes, (setting, group) in zip(panels, shown, strict=True):
        draw_curves(axes, group.assign(x=group["batch_size"]), styles)
        _scale_sizes(axes, sizes)
        axes.set_title(describe(setting, width=40), parse_math=False)
        axes.set_xlabel("batch size")
    left_out = _left_out(len(groups) - len(shown), "panels")
    finish(figure, panels, title, "bands", left_out, LABELS[groups[0][1]["metric"].iloc[0]])
    return figure


def draw_curves(
    axes: "Axes", part: "pd.DataFrame", styles: Mapping[str, tuple[str, str, str]]
) -> None:
    """Draw the curves of attacks with their bands, and those of the guesses, over ``x``."""
    # Where curves lie upon each other, the later ones leave a rim of the markers beneath.
    sizes = np.linspace(8, 3.5, len(styles)).tolist()
    for size, (attack, (name, colour, marker)) in zip(sizes, styles.items(), strict=True):
        rows = part[part["attack"] == attack].sort_values("x")
        if rows.empty:
            continue
        x = rows["x"]
        axes.fill_between(x, rows["low"], rows["high"], color=colour, alpha=0.18, lw=0)
        axes.plot(x, rows["mean"], color=colour, marker=marker, ms=size, lw=1.4, label=name)
    for label, line, base in baseline_means(part):
        axes.plot(base.index, base, ls=line, color=_GREY, lw=1.2, label=label, zorder=1.9)


def baseline_means(part: "pd.DataFrame") -> "list[tuple[str, Any, pd.Series[float]]]":
    """Return label, line style and mean over ``x`` of each guess, and of the oracle."""
    base = of_updates(part).groupby("x")[list(BASELINES)].mean()
    found = [(label, line, base[column]) for column, (label, line) in BASELINES.items()]
    summed = part[part["target"] == ACCUMULATED]
    if not summed.empty and len(summed) < len(part):
        found.append((*_ACCUMULATED, summed.groupby("x")["uniform"].mean()))
    return found


def _bars(summary: "pd.DataFrame", varying: Sequence[str], title: str) -> "Figure":
    found = summary["scenario"].unique().tolist()
    shown = found[: _BARS_PER_ROW * _MAX_PANELS // 2]
    styles = attack_styles([summary])
    rows = [shown[start : start + _BARS_PER_ROW] for start in range(0, len(shown), _BARS_PER_ROW)]
    wide = len(rows[0])
    figure, panels = grid(len(rows), columns=1, width=1.0 + 0.32 * wide * (len(styles) + 1))
    for axes, row in zip(panels, rows, strict=True):
        part = summary[summary["scenario"].isin(row)]
        _draw_bars(axes, part.assign(x=part["scenario"].map(row.index)), styles)
        first = part.groupby("scenario", sort=False).first()[
            list(varying or ("dataset", "distribution"))
        ]
        slanted = len(row) > 2
        settings = first.to_dict("records")
        words = " ".join(describe(setting, width=1000) for setting in settings).split()
        width = min(max(_LABEL, *map(len, words)), _LONGEST_LABEL)
        axes.set_xticks(
            range(len(row)),
            [describe(setting, width) for setting in settings],
            rotation=30 if slanted else 0,
            ha="right" if slanted else "center",
            rotation_mode="anchor" if slanted else "default",
            parse_math=False,
        )
        axes.set_xlim(-0.6, wide - 0.4)
        axes.grid(axis="x", visible=False)
    left_out = _left_out(len(found) - len(shown), "scenarios")
    finish(figure, panels, title, "whiskers", left_out, LABELS[summary["metric"].iloc[0]])
    return figure


def _draw_bars(
    axes: "Axes", part: "pd.DataFrame", styles: Mapping[str, tuple[str, str, str]]
) -> None:
    """Draw a group of bars at each ``x``, with the baselines across it."""
    width = 0.8 / len(styles)
    for index, (attack, (name, colour, _)) in enumerate(styles.items()):
        rows = part[part["attack"] == attack]
        below, above = rows["mean"] - rows["low"], rows["high"] - rows["mean"]
        axes.bar(
            rows["x"] + (index + 0.5) * width - 0.4,
            rows["mean"],
            0.92 * width,
            # Of equal values the mean may be off by a bit; matplotlib refuses negative errors.
            yerr=np.maximum([below, above], 0),
            color=colour,
            label=name,
            error_kw={"lw": 1, "capsize": 2, "ecolor": "0.2"},
        )
    for label, line, base in baseline_means(part):
        axes.hlines(
            base,
            base.index - 0.45,
            base.index + 0.45,
            color=_GREY,
            ls=line,
            lw=1.4,
            label=label,
        )


def _left_out(count: int, what: str) -> str:
    return f"; {count} more {what} left out" if count else ""


def attack_styles(groups: "Iterable[pd.DataFrame]") -> dict[str, tuple[str, str, str]]:
    """Return for each attack its name, colour and marker, the same in all panels.

    The name of one whose assumptions some scenario breaks ends in a dagger.
    """
    import pandas as pd

    rows = pd.concat(list(groups))
    broken = rows[(rows["broken"] != "{}") & rows["mean"].notna()]["attack"].unique().tolist()
    names = {
        attack: name + BROKEN * (attack in broken) for attack, name in attack_names(rows).items()
    }
    return {
        attack: (name, PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)])
        for index, (attack, name) in enumerate(names.items())
    }


def _scale_sizes(axes: "Axes", sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    step = -(-len(sizes) // 9)
    axes.set_xticks(sizes[::step], [f"{size:g}" for size in sizes[::step]])
    axes.xaxis.minorticks_off()
    axes.set_xlim(sizes[0] / 1.25, sizes[-1] * 1.25)


def finish(
    figure: "Figure", panels: Sequence["Axes"], title: str, spread: str, note: str, label: str
) -> None:
    """Give a figure its scale, legend and title.

    Parameters
    ----------
    figure, panels
        The figure and its axes.
    title
        Above it.
    spread
        What shows the intervals: ``bands`` or ``whiskers``.
    note
        Added to what the legend says of them.
    label
        Of the vertical axis of all panels; none where it is empty.
    """
    entries: dict[str, Artist] = {}
    for axes in panels:
        axes.set_ylim(0, 1.03)
        handles, labels = axes.get_legend_handles_labels()
        entries = {**dict(zip(labels, handles, strict=True)), **entries}
    baselines = [name for name, _ in (*BASELINES.values(), _ACCUMULATED)]
    names = sorted(entries, key=lambda name: name in baselines)
    if any(name.endswith(BROKEN) for name in names):
        note += f"; {BROKEN} a scenario breaks an assumption"
    # A character is about 0.075 inches wide, the line before it and the gap together 0.65.
    width = 0.65 + 0.075 * max(map(len, names))
    figure.legend(
        [entries[name] for name in names],
        names,
        loc="outside lower center",
        ncols=min(len(names), max(2, int(figure.get_figwidth() / width))),
        title=f"{spread}: {LEVEL * 100:g} % interval of the mean{note}",
    )
    if label:
        figure.supylabel(label, fontsize=9)
    set_title(figure, title)
