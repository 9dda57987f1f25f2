"""Success of every attack in every scenario, with its interval and what a guess would score."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.load import BASELINES, attack_names, parameter_columns, varying_columns
from testbed.errors import UserError, suggest

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.95
_INTERVAL = ("mean", "low", "high")
_BASELINE_TITLES = {
    "random": "random guess",
    "uniform": "uniform guess",
    "oracle": "oracle",
}
_NOT_ASR = "no baselines: those of this program (random, uniform, oracle) are success rates (asr)"


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
        Columns ``file``, ``scenario``, the parameters, ``attack``, ``title``, ``knowledge``,
        ``metric``, ``mean``, ``low`` and ``high`` (95 % bootstrap interval of the mean over
        rounds; NaN with one round), ``repetitions`` (updates scored) and ``rounds`` (those they
        come from). Where the metric is ``asr`` also the means of ``random``, ``uniform`` and
        ``oracle`` over the same updates, and ``advantage``: of the mean over the uniform guess.

    Raises
    ------
    UserError
        The metric is unknown, or the frame is empty.
    """
    import pandas as pd

    from testbed.attacks.metrics import METRICS, advantage, bootstrap_interval

    if metric not in METRICS:
        raise UserError(f"unknown metric {metric!r}: {suggest(metric, METRICS)}")
    if frame.empty:
        raise UserError("no rows to summarise: no round with an attack has been committed yet")
    rows = []
    for _, group in frame.groupby(["file", "scenario", "attack"], sort=False):
        scored = group[group[metric].notna()]
        low, high = bootstrap_interval(
            scored[metric].to_numpy(), scored["round"].to_numpy(), level=LEVEL
        )
        row = {
            "mean": scored[metric].mean(),
            "low": low,
            "high": high,
            "repetitions": len(scored),
            "rounds": scored["round"].nunique(),
        }
        if metric == "asr":
            row |= {name: scored[name].mean() for name in BASELINES}
            row["advantage"] = float(advantage(row["mean"], row["uniform"]))
        first = group.iloc[0]
        kept = ["file", "scenario", *parameter_columns(frame), "attack", "title", "knowledge"]
        rows.append({**{name: first[name] for name in kept}, "metric": metric, **row})
    return pd.DataFrame(rows)


def render(frame: "pd.DataFrame", style: str = "text", metric: str = "asr") -> str:
    """Return a table of a frame as text.

    Parameters
    ----------
    frame
        As `analysis.load` returns it.
    style
        ``csv`` for one row per scenario and attack at full precision (`summarise`); ``text``,
        ``markdown`` or ``latex`` (booktabs) for a row per scenario and a column per attack.
    metric
        See `summarise`.

    Raises
    ------
    UserError
        See `summarise`; or the style is unknown.
    """
    if style not in STYLES:
        raise UserError(f"unknown format {style!r}: {suggest(style, STYLES)}")
    summary = summarise(frame, metric)
    if style == "csv":
        return summary.to_csv(index=False)
    return _RENDERERS[style](_wide(summary), _notes(summary, metric))


def _wide(summary: "pd.DataFrame") -> "pd.DataFrame":
    """Return the cells to print: a row per scenario, a column per attack and baseline."""
    import pandas as pd

    scenarios = ["file", "scenario"]
    first = summary.groupby(scenarios, sort=False).first()
    columns = {"#": [str(index) for _, index in first.index]}
    if summary["file"].nunique() > 1:
        columns["file"] = [str(file) for file, _ in first.index]
    for name in varying_columns(summary[_parameters(summary)]):
        columns[name] = [_plain(value) for value in first[name]]
    keys = zip(summary["file"], summary["scenario"], summary["attack"], strict=True)
    cells = dict(zip(keys, map(_cell, *(summary[name] for name in _INTERVAL)), strict=True))
    for label, name in attack_names(summary).items():
        columns[name] = [cells.get((*key, label), "-") for key in first.index]
    if "random" in summary:
        # Where one attack failed on some updates, the others' baselines cover more of them.
        most = summary.sort_values("repetitions", kind="stable").groupby(scenarios, sort=False)
        means = most.last().loc[first.index]
        for name in BASELINES:
            columns[_BASELINE_TITLES[name]] = [_number(value) for value in means[name]]
    return pd.DataFrame(columns)


def _parameters(summary: "pd.DataFrame") -> list[str]:
    columns = list(map(str, summary.columns))
    return columns[columns.index("scenario") + 1 : columns.index("attack")]


def _notes(summary: "pd.DataFrame", metric: str) -> list[str]:
    """Return what must be known to read the table."""
    parameters = _parameters(summary)
    varying = varying_columns(summary[parameters])
    fixed = [
        f"{name} {_plain(summary[name].iloc[0])}"
        for name in parameters
        if name not in varying and _plain(summary[name].iloc[0])
    ]
    low, high = summary["repetitions"].min(), summary["repetitions"].max()
    count = f"{low}" if low == high else f"{low} to {high}"
    what = "attack success rate (asr)" if metric == "asr" else metric
    interval = f"± is the larger side of the {LEVEL * 100:g} % bootstrap interval over rounds"
    if summary["low"].isna().all():
        interval = "no interval, since it takes two rounds"
    notes = [f"{what}, mean of {count} update{'' if count == '1' else 's'}; {interval}"]
    notes += [_NOT_ASR] if metric != "asr" else []
    return [*notes, *([", ".join(fixed)] if fixed else [])]


def _cell(mean: float, low: float, high: float) -> str:
    if np.isnan(low):
        return _number(mean)
    return f"{mean:.3f} ±{max(mean - low, high - mean):.3f}"


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"


def _plain(value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _widths(wide: "pd.DataFrame") -> list[int]:
    return [max(len(name), *map(len, wide[name])) for name in map(str, wide.columns)]


def _lines(wide: "pd.DataFrame") -> list[list[str]]:
    return [list(map(str, wide.columns)), *wide.to_numpy().tolist()]


def _text(wide: "pd.DataFrame", notes: Sequence[str]) -> str:
    widths = _widths(wide)
    head, *body = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in _lines(wide)
    ]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    return "\n".join([head, rule, *body, rule, *notes]) + "\n"


def _markdown(wide: "pd.DataFrame", notes: Sequence[str]) -> str:
    escaped = [
        [cell.replace("|", "\\|").replace("*", "\\*") for cell in line] for line in _lines(wide)
    ]
    widths = [max(map(len, column)) for column in zip(*escaped, strict=True)]
    head, *body = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in escaped
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    notes = [note.replace("*", "\\*") for note in notes]
    return "\n".join([head, rule, *body, "", "; ".join(notes) + "."]) + "\n"


_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        '"': r"\textquotedbl{}",
        "±": r"$\pm$",
    }
)


def _latex(wide: "pd.DataFrame", notes: Sequence[str]) -> str:
    head, *body = [
        "  " + " & ".join(cell.translate(_LATEX) for cell in line) + r" \\" for line in _lines(wide)
    ]
    caption = ["% " + note for note in notes]
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            *caption,
            r"\begin{tabular}{" + "l" * len(wide.columns) + "}",
            r"  \toprule",
            head,
            r"  \midrule",
            *body,
            r"  \bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


_RENDERERS: Mapping[str, Callable[["pd.DataFrame", Sequence[str]], str]] = {
    "text": _text,
    "markdown": _markdown,
    "latex": _latex,
}
STYLES = (*_RENDERERS, "csv")
