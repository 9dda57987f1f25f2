"""All figures of results files, as picture files."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.load import STANDARD, load_attacked
from testbed.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette for all kinds of colour vision, without the yellow that white swallows.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
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
_GLUE = "\N{NO-BREAK SPACE}"
_SUFFIXES = (".partial", ".h5", ".hdf5")


def figures(
    results_paths: Iterable[str | Path],
    out_dir: str | Path,
    format: str = "png",  # noqa: A002
) -> list[Path]:
    """Draw each file's figures.

    Parameters
    ----------
    results_paths
        Results files, complete or not. Those without a round that was attacked are left out.
    out_dir
        Folder; it is created.
    format
        ``png`` (150 dpi), ``pdf`` or ``svg``.

    Returns
    -------
    list[Path]
        For each file ``NAME-success`` and ``NAME-occurrences``.

    Raises
    ------
    UserError
        A file cannot be read, none holds a round that was attacked, or the folder cannot be
        written to.
    """
    from matplotlib import rc_context

    from analysis.occurrences import occurrences_figure
    from analysis.success import success_figure
    from testbed.results.reader import open_results

    paths = [Path(path) for path in results_paths]
    whole = load_attacked(*paths)
    drawn: list[Path] = []
    with rc_context(STYLE):
        for path, stem in zip(paths, _stems(paths), strict=True):
            frame = whole[whole["file"] == str(path)]
            if frame.empty:
                continue
            with open_results(path) as results:
                pictures = {
                    "success": success_figure(frame, results.title),
                    "occurrences": occurrences_figure(results, frame),
                }
            for name, picture in pictures.items():
                drawn.append(_save(picture, Path(out_dir) / f"{stem}-{name}.{format}"))
    return drawn


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
    figure.suptitle(textwrap.fill(title or "(untitled)", width), parse_math=False)


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
        str(value) if name in plain else f"{name.replace('_', ' ')} {_shown(value)}"
        for name, value in parameters.items()
    ]
    # Lines are broken between parameters, where no parameter is longer than a line.
    text = textwrap.fill(", ".join(word.replace(" ", _GLUE) for word in words), width)
    return text.replace(_GLUE, " ")


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _stems(paths: Sequence[Path]) -> list[str]:
    """Return a name for each file's figures; equal names get a number."""
    stems: list[str] = []
    for path in paths:
        name = path.name
        for suffix in _SUFFIXES:
            name = name.removesuffix(suffix)
        number, stem = 2, name
        while stem in stems:
            stem, number = f"{name}-{number}", number + 1
        stems.append(stem)
    return stems


def _save(figure: "Figure", path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path}: cannot write the figure: {error.strerror}") from None
    return path
