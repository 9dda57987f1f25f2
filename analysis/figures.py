"""All figures of results files, as picture files."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.load import DEFENSES, STANDARD, load_attacked
from analysis.open_set import OpenSet
from analysis.scenarios import choose_attacks, merge_seeds
from analysis.shares import ShareSet, join_shares
from testbed.defenses.described import NONE
from testbed.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette for all kinds of colour vision, without the yellow that white swallows.
PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    "#7F3C8D",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.titlesize": 12,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
# Swept keys that a figure of their own is drawn against, and its name.
KEYS = {
    "pretraining.steps": "stages",
    "data.auxiliary_per_class": "auxiliary_per_class",
    "adversary.auxiliary_noise": "auxiliary_noise",
    "adversary.auxiliary_missing": "auxiliary_missing",
    "adversary.batch_size_factor": "batch_size_factor",
    "federation.local_steps": "local_steps",
    "federation.clients": "clients",
    "partition.alpha": "alpha",
}
# With more attacks, curves and bars are unreadable.
_MOST_CURVES = 8
_GLUE = "\N{NO-BREAK SPACE}"


def figures(
    results_paths: Iterable[str | Path],
    out_dir: str | Path,
    format: str = "png",  # noqa: A002
    attacks: Sequence[str] = (),
) -> list[Path]:
    """Draw the figures of each run; scenarios that differ in the seed alone are averaged.

    Parameters
    ----------
    results_paths
        Results files, complete or not; shares of an experiment are one run. Runs without a round
        that was attacked are left out.
    out_dir
        Folder; it is created.
    format
        ``png`` (150 dpi), ``pdf`` or ``svg``.
    attacks
        Labels of the attacks to draw; all by default, and in a figure against a swept key the
        best ones.

    Returns
    -------
    list[Path]
        For each run ``NAME-success``, with what its files' names have in common as ``NAME``;
        ``NAME-presence``, the same of `presence_f1`, where an attack answers with presence alone;
        ``NAME-stages`` and the like where one of `KEYS` was swept; ``NAME-defenses``, all attacks
        against all defences, where these were swept and ``NAME-success`` is not that already;
        ``NAME-rounds``, where rounds are those of a training; and ``NAME-occurrences``. More is
        appended where one picture is not enough.

    Raises
    ------
    UserError
        A file cannot be read, none holds a round that was attacked, an attack is in none, or the
        folder cannot be written to.
    """
    from matplotlib import rc_context

    from analysis.occurrences import occurrences_figure
    from analysis.rounds import rounds_figure

    if Path(out_dir).is_file():
        raise UserError(f"{out_dir}: cannot write the figures: this is a file, expected a folder")
    loaded = join_shares(load_attacked(*results_paths))
    sets: Sequence[ShareSet] = loaded.attrs["sets"]
    columns: Mapping[str, str] = loaded.attrs["columns"]
    apart = choose_attacks(loaded, attacks)
    whole = merge_seeds(apart)
    drawn: list[Path] = []
    with rc_context(STYLE):
        for one, stem in zip(sets, _stems(sets), strict=True):
            frame = whole[whole["file"] == one.name]
            if frame.empty:
                continue
            with OpenSet(one) as results:
                own = apart[apart["file"] == one.name]
                pictures = {
                    **_scores(frame, results.title, columns, chosen=bool(attacks)),
                    "rounds": rounds_figure(results, own, _MOST_CURVES, chosen=bool(attacks)),
                    "occurrences": occurrences_figure(results, frame),
                }
            for name, picture in pictures.items():
                if picture is None:
                    continue
                drawn.append(save_figure(picture, Path(out_dir) / f"{stem}-{name}.{format}"))
    return drawn


def _scores(
    frame: "pd.DataFrame", title: str, columns: Mapping[str, str], *, chosen: bool
) -> "dict[str, Figure]":
    """Return the figures of what the attacks score, by name."""
    from analysis.matrix import matrix_figures
    from analysis.stages import stage_figures
    from analysis.success import success_figure
    from analysis.table import split_scored, summarise

    pictures: dict[str, Figure] = {}
    alone = (frame["answers"] == "presence").any()
    summaries = {}
    for metric, name in [("asr", "success"), *([("presence_f1", "presence")] if alone else [])]:
        whole, _ = split_scored(summarise(frame, metric))
        summary = whole[whole["mean"].notna()]
        if summary.empty:
            continue
        summaries[metric] = summary
        if summary["attack"].nunique() <= _MOST_CURVES:
            pictures[name] = success_figure(summary, title)
            if DEFENSES in whole and whole[DEFENSES].nunique() > 1:
                named = DEFENSES if metric == "asr" else f"{name}-{DEFENSES}"
                pictures |= _numbered(named, matrix_figures(whole, title))
        else:
            pictures |= _numbered(name, matrix_figures(whole, title))
    if summaries:
        first = next(iter(summaries.values()))
        for key, name in KEYS.items():
            column = columns.get(key, "")
            if column in first and first[column].nunique(dropna=False) > 1:
                drawn = stage_figures(first, column, title, _MOST_CURVES, chosen=chosen)
                pictures |= {f"{name}{suffix}": figure for suffix, figure in drawn.items()}
    return pictures


def _numbered(name: str, drawn: "Sequence[Figure]") -> "dict[str, Figure]":
    if len(drawn) == 1:
        return {name: drawn[0]}
    return {f"{name}-{number}": figure for number, figure in enumerate(drawn, start=1)}


def grid(
    panels: int, columns: int, width: float = 4.0, height: float = 3.0
) -> "tuple[Figure, list[Axes]]":
    """Return a figure with that many panels; those of a last, shorter row are left aligned.

    Parameters
    ----------
    panels, columns
        How many, and how many in a row at most.
    width, height
        Inches of a panel.
    """
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(max(width * columns, 5.5), height * rows + 1))
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]


def set_title(figure: "Figure", title: str) -> None:
    """Put the experiment's title above a figure, on as many lines as its width asks for."""
    width = int(figure.get_figwidth() * 11)
    lines = (title or "(untitled)").split("\n")
    filled = "\n".join(textwrap.fill(line, width) for line in lines)
    figure.suptitle(filled, parse_math=False)


def describe(parameters: Mapping[Any, Any], width: int) -> str:
    """Return a scenario's parameters as a short title: ``digits, balanced, batch size 8``.

    Parameters
    ----------
    parameters
        By column name.
    width
        Characters of a line.
    """
    plain = {*STANDARD.values()} - {"batch_size"}
    words = [
        str(value) if name in plain else _named(name, value) for name, value in parameters.items()
    ]
    # Lines are broken between parameters, or in one that is longer than a line.
    whole = ", ".join(word.replace(" ", _GLUE) if len(word) < width else word for word in words)
    text = textwrap.fill(whole, width, break_on_hyphens=False)
    return text.replace(_GLUE, " ")


def _named(name: str, value: object) -> str:
    if name == DEFENSES:
        return "no defence" if value == NONE else str(value)
    return f"{name.replace('_', ' ')} {_shown(value)}"


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _stems(sets: Sequence[ShareSet]) -> list[str]:
    """Return a name for the figures of each set; equal names get a number."""
    stems: list[str] = []
    for one in sets:
        number, stem = 2, one.stem
        while stem in stems:
            stem, number = f"{one.stem}-{number}", number + 1
        stems.append(stem)
    return stems


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write a figure to a file, creating its folder; `UserError` where that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path}: cannot write the figure: {error.strerror}") from None
    return path
