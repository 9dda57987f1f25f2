"""One attack against the best of the others, scenario by scenario, on the same updates."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis.bootstrap import bootstrap_interval
from analysis.formats import RENDERERS, Page
from analysis.load import attack_names, parameter_columns, varying_columns
from analysis.notes import TITLES, UPDATE, parameters, plain
from analysis.scenarios import choose_attacks, merge_seeds
from analysis.score import ACCUMULATED, baseline_columns
from analysis.share_notes import share_notes
from analysis.shares import join_shares
from analysis.table import LEVEL, STYLES
from testbed.errors import UserError, suggest

if TYPE_CHECKING:
    import pandas as pd

_SCENARIO = ["file", "scenario"]
# Of all other metrics, more is better.
_DISTANCES = ("hellinger", "total_variation")


def compare(
    frame: "pd.DataFrame", attack: str, metric: str = "asr", against: Sequence[str] = ()
) -> "pd.DataFrame":
    """Return how far an attack is ahead of the best other one in each scenario.

    The best is the one with the best mean over the scenario's updates, which is known only
    afterwards: chosen by luck in part, it is flattered, and the difference is too small rather
    than too large.

    Parameters
    ----------
    frame
        As `analysis.load` returns it.
    attack
        A label.
    metric
        See `analysis.table.summarise`.
    against
        Labels of the others, with answers about the same labels as the attack's; where none is
        named, all of these that know no more than the attack does.

    Returns
    -------
    pandas.DataFrame
        A row per file and scenario in which the attack and another one were scored: the
        parameters, ``accuracy``, ``attack``, ``mean``, ``low``, ``high``, ``best`` (the other's
        label), ``best_mean``, ``best_low``, ``best_high``, and ``difference``,
        ``difference_low``, ``difference_high``: of the attack less the other, update by update,
        with 95 % intervals over rounds (NaN for attacks on all updates of a client so far);
        ``uniform``, where the metric has baselines.

    Raises
    ------
    UserError
        A label or the metric is unknown, or nothing can be compared.
    """
    import pandas as pd

    from testbed.attacks.metrics import METRICS

    if metric not in METRICS:
        raise UserError(f"unknown metric {metric!r}: {suggest(metric, METRICS)}")
    choose_attacks(frame, [attack, *against])
    kept = [*_SCENARIO, *parameter_columns(frame)]
    rows = []
    for _, group in frame[frame[metric].notna()].groupby(_SCENARIO, sort=False):
        own = group[group["attack"] == attack]
        others = group[group["attack"].isin(against or _rivals(group, attack))]
        others = others[others["target"].isin(own["target"].unique())]
        if own.empty or others.empty:
            continue
        means = others.groupby("attack", sort=False)[metric].mean()
        best = str((means.idxmin if metric in _DISTANCES else means.idxmax)())
        rival = others[others["attack"] == best]
        pairs = own.merge(rival, on=UPDATE, suffixes=("", "_best"))
        difference = pairs[metric] - pairs[f"{metric}_best"]
        row = {name: own.iloc[0][name] for name in kept}
        row |= {"accuracy": own["accuracy"].mean(), "attack": attack, "metric": metric}
        row |= _interval("", own[metric], own)
        row |= {"best": best, **_interval("best_", rival[metric], rival)}
        row |= _interval("difference_", difference, pairs, least=-1)
        row["difference"] = row.pop("difference_mean")
        if baseline_columns(metric):
            row["uniform"] = own[baseline_columns(metric)["uniform"]].mean()
        rows.append(row)
    if not rows:
        raise UserError(
            f"no scenario in which {attack!r} and another attack that knows no more were scored by "
            f"{metric}"
        )
    return pd.DataFrame(rows)


def render_comparison(
    frame: "pd.DataFrame",
    attack: str,
    style: str = "text",
    metric: str = "asr",
    against: Sequence[str] = (),
) -> str:
    """Return the comparison as a table; ``style`` as in `analysis.table.render`."""
    if style not in STYLES:
        raise UserError(f"unknown format {style!r}: {suggest(style, STYLES)}")
    merged = merge_seeds(join_shares(frame))
    found = compare(merged, attack, metric, against)
    if style == "csv":
        return found.to_csv(index=False)
    names = attack_names(merged)
    columns: dict[str, Iterable[str]] = {"#": found["scenario"].map(str)}
    if found["file"].nunique() > 1:
        columns["file"] = found["file"].map(lambda file: Path(file).name)
    for name in varying_columns(found[parameters(found.rename(columns={"accuracy": "attack"}))]):
        columns[name] = found[name].map(plain)
    if found["accuracy"].notna().any():
        columns["accuracy"] = found["accuracy"].map("{:.2f}".format)
    columns[names[attack]] = _cells(found, "mean", "low", "high")
    columns["best other"] = found["best"].map(names)
    columns["its"] = _cells(found, "best_mean", "best_low", "best_high")
    columns["difference"] = _cells(found, "difference", "difference_low", "difference_high", "+")
    if "uniform" in found:
        columns["uniform guess"] = found["uniform"].map("{:.3f}".format)
    body = list(zip(*columns.values(), strict=True))
    others = (
        "of " + ", ".join(names[label] for label in against) if against else "that knows no more"
    )
    notes = [
        f"{TITLES.get(metric, metric)} of {names[attack]} and of the best other attack {others}, "
        "and the difference update by update; ± is the larger side of the "
        f"{LEVEL * 100:g} % interval over rounds",
        "the best other is chosen by its mean on the same updates, which flatters it",
        *share_notes(frame.attrs.get("sets", ())),
    ]
    return RENDERERS[style]([Page(head=[list(columns)], body=body)], notes)


def _rivals(group: "pd.DataFrame", attack: str) -> list[str]:
    """Return the attacks that know no more than one does."""
    from testbed.attacks.base import Knowledge

    kinds = group[["attack", "knowledge", "adapted"]].drop_duplicates()
    levels = {
        str(label): (Knowledge(knowledge), bool(adapted))
        for label, knowledge, adapted in kinds.itertuples(index=False)
    }
    if attack not in levels:
        return []
    level, adapts = levels[attack]
    return [
        label
        for label, (knowledge, adapted) in levels.items()
        # An adapted attack knows the defences too.
        if label != attack and level.includes(knowledge) and adapts >= adapted
    ]


def _interval(
    prefix: str, values: "pd.Series[float]", rows: "pd.DataFrame", least: float = 0.0
) -> dict[str, float]:
    low, high = np.nan, np.nan
    # Accumulated rounds contain each other.
    if (rows["target"] != ACCUMULATED).all():
        found = bootstrap_interval(values.to_numpy(), rows["round"].to_numpy(), level=LEVEL)
        low, high = np.clip(found, least, 1).tolist()
    return {f"{prefix}mean": float(values.mean()), f"{prefix}low": low, f"{prefix}high": high}


def _cells(found: "pd.DataFrame", mean: str, low: str, high: str, sign: str = "") -> list[str]:
    cells = []
    for middle, below, above in found[[mean, low, high]].to_numpy():
        half = max(middle - below, above - middle)
        cells.append(f"{middle:{sign}.3f}" + ("" if half != half else f" ±{half:.3f}"))
    return cells
