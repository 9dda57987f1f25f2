"""Figures: success against the stage of training, or against another swept key."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from analysis.figures import describe, grid
from analysis.load import varying_columns
from analysis.notes import parameters
from analysis.success import LABELS, attack_styles, draw_curves, finish

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_PANELS = 16
_MAX_FACET = 4
# In every figure that has them, as what the others are compared with.
_ALWAYS = ("llg", "llg_plus")


def stage_figures(
    summary: "pd.DataFrame", key: str, title: str, most: int, *, chosen: bool = False
) -> "dict[str, Figure]":
    """Draw success against a swept key, with intervals and what a guess would score.

    Parameters
    ----------
    summary
        Of one file, as `analysis.table.summarise` returns it, by a metric with baselines; every
        attack scored.
    key
        The column of the key: numbers, drawn at equal distances.
    title
        Of the experiment.
    most
        Attacks in a figure: of more, LLG and LLG+ and the best ones over the figure are drawn.
    chosen
        Whether the attacks are the user's choice, to be drawn whatever their number.

    Returns
    -------
    dict[str, matplotlib.figure.Figure]
        A panel per batch size and label distribution, or per other swept parameters where those
        do not vary; a figure per setting of what is left, by what to append to its name. A setting
        with a single value of the key has none.
    """
    varying = [name for name in varying_columns(summary[parameters(summary)]) if name != key]
    facets = _facets(summary, varying)
    further = [name for name in varying if name not in facets]
    settings: Sequence[tuple[Any, pd.DataFrame]] = [((), summary)]
    if further:
        settings = list(summary.groupby(further, sort=False, dropna=False))
    figures: dict[str, Figure] = {}
    for values, part in settings:
        if part[key].nunique(dropna=False) < 2:
            continue
        setting = dict(zip(further, values, strict=True))
        shown = part if chosen else best_attacks(part, most)
        name = _free("".join(f"-{_slug(*pair)}" for pair in setting.items()), figures)
        headed = f"{title}\n{describe(setting, width=80)}" if setting else title
        figures[name] = _draw(shown, key, facets, headed)
    return figures


def _facets(summary: "pd.DataFrame", varying: Sequence[str]) -> list[str]:
    """Return the parameters, rows first, that panels differ in: two at most."""
    usual = [name for name in ("distribution", "batch_size") if name in varying]
    others = [
        name
        for name in varying
        if name not in usual and summary[name].nunique(dropna=False) <= _MAX_FACET
    ]
    return [*others[: 2 - len(usual)], *usual]


def best_attacks(part: "pd.DataFrame", most: int) -> "pd.DataFrame":
    """Return the rows of the attacks to draw, ``most`` at most, in the order of the legend."""
    means = part.groupby("attack", sort=False)["mean"].mean()
    if len(means) > most:
        # A self-test that is told the truth is no rival.
        told = part.loc[part["knowledge"] == "truth", "attack"].unique()
        ranked = means.drop(told).sort_values(ascending=False, kind="stable").index.tolist()
        always = [label for label in _ALWAYS if label in ranked]
        best = [label for label in ranked if label not in always]
        order = [*always, *best[: most - len(always)]]
        part = part[part["attack"].isin(order)]
        part = part.sort_values("attack", key=lambda column: column.map(order.index), kind="stable")
    return part


def _draw(part: "pd.DataFrame", key: str, facets: Sequence[str], title: str) -> "Figure":
    groups: list[tuple[dict[str, Any], pd.DataFrame]] = [({}, part)]
    if facets:
        groups = [
            (dict(zip(facets, values, strict=True)), group)
            for values, group in part.groupby(list(facets), sort=True, dropna=False)
        ]
    across = part[facets[-1]].nunique(dropna=False) if facets else 1
    shown = groups[:_MAX_PANELS]
    figure, panels = grid(len(shown), columns=min(across, _MAX_FACET), height=3.3)
    styles = attack_styles([part])
    for axes, (setting, group) in zip(panels, shown, strict=True):
        _panel(axes, group, key, styles)
        axes.set_title(describe(setting, width=40), parse_math=False)
    left_out = len(groups) - len(shown)
    note = f"; {left_out} more panels left out" if left_out else ""
    finish(figure, panels, title, "bands", note, LABELS[part["metric"].iloc[0]])
    return figure


def _panel(
    axes: "Axes", group: "pd.DataFrame", key: str, styles: Mapping[str, tuple[str, str, str]]
) -> None:
    values = sorted(group[key].unique().tolist(), key=lambda value: (value == value, value))
    position = {str(value): at for at, value in enumerate(values)}
    draw_curves(axes, group.assign(x=group[key].map(lambda value: position[str(value)])), styles)
    accuracy = group.groupby(key, dropna=False)["accuracy"].mean()
    staged = key.rpartition(".")[2] == "steps"
    labels = []
    for value in values:
        label = f"{value:g}" if value == value else "none"
        known = accuracy[accuracy.index == value].dropna()
        labels.append(f"{label}\n{known.iloc[0] * 100:.0f} %" if staged and len(known) else label)
    axes.set_xticks(range(len(values)), labels)
    axes.set_xlim(-0.25, len(values) - 0.75)
    named = "steps of training (accuracy of the model beneath)"
    axes.set_xlabel(named if staged else key.replace("_", " "))


def _slug(name: str, value: object) -> str:
    """Return a setting as a part of a file's name."""
    text = f"{name}-{value:g}" if isinstance(value, (int, float)) else str(value)
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:40] or name


def _free(name: str, taken: Mapping[str, object]) -> str:
    number, free = 2, name
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free
