"""Places labels beside the points of a figure so that nothing overlaps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels

# In points: tried from near to far; beyond some a line leads to the point.
_RADII = (7, 10, 14, 20, 28, 38, 50, 64, 80)
_ANGLES = 16
_LED = 14
_MARKER, _LINE = 4.5, 1.5
_SHADE = 0.65


def place_labels(
    axes: "Axes",
    points: NDArray[np.float64],
    labels: Sequence[str],
    colours: Sequence[str],
    others: NDArray[np.float64],
    fontsize: float,
    *,
    anyway: bool = False,
) -> bool:
    """Write a label beside each point, where there is room for all of them.

    The layout of the figure has to be final; labels take no part in it.

    Parameters
    ----------
    axes
        To write into.
    points
        float64 [n, 2]: in data coordinates.
    labels, colours
        Their n labels, and the points' colours, of which the labels have a darker shade.
    others
        float64 [m, 2]: further places to keep clear of.
    fontsize
        In points.
    anyway
        Whether labels without room are written too: with lines across, or over what is there.

    Returns
    -------
    bool
        Whether the labels were written.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    scale = figure.dpi / 72
    frame = axes.get_window_extent()
    at = axes.transData.transform(points)
    kept = axes.transData.transform(others.reshape(-1, 2))
    taken = [_around(place, _MARKER * scale) for place in np.concatenate([at, kept])]
    offsets: list[tuple[float, float]] = []
    for place, label in zip(at, labels, strict=True):
        size = _size(axes, label, fontsize)
        found = _find(place, size, frame, taken, scale)
        if found is None and not anyway:
            return False
        found = found or _find(place, size, frame, taken, scale, crossing=True)
        offset, boxes = found or (_offsets()[0], [])
        offsets.append(offset)
        taken += boxes
    for point, label, colour, offset in zip(points, labels, colours, offsets, strict=True):
        _write(axes, point, label, colour, offset, fontsize)
    return True


def _find(
    place: NDArray[np.float64],
    size: tuple[float, float],
    frame: "Bbox",
    taken: Sequence[Box],
    scale: float,
    *,
    crossing: bool = False,
) -> tuple[tuple[float, float], list[Box]] | None:
    """Return where a label finds room, and the boxes that it and the line to it then take."""
    for dx, dy in _offsets():
        end = place + np.array([dx, dy]) * scale
        # The nearest side of the label lies that far from the point.
        x, y = end[0] + np.sign(round(dx, 6)) * size[0] / 2, end[1]
        box = (x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2)
        inside = frame.contains(*box[:2]) and frame.contains(*box[2:])
        if not inside or any(_overlap(box, other) for other in taken):
            continue
        line: list[Box] = []
        if np.hypot(dx, dy) > _LED:
            # From where the point's own marker ends.
            steps = np.linspace(2 * _MARKER * scale / np.hypot(*(end - place)), 1, 12)
            line = [_around(place + t * (end - place), _LINE * scale) for t in steps[:-1]]
        if crossing or not any(_overlap(part, other) for part in line for other in taken):
            return (dx, dy), [box, *line]
    return None


def _write(
    axes: "Axes",
    point: NDArray[np.float64],
    label: str,
    colour: str,
    offset: tuple[float, float],
    fontsize: float,
) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke

    dx, dy = offset
    text = axes.annotate(
        label,
        (float(point[0]), float(point[1])),
        (dx, dy),
        textcoords="offset points",
        ha="left" if dx > 1e-6 else "right" if dx < -1e-6 else "center",
        va="center",
        fontsize=fontsize,
        parse_math=False,
        color=tuple(_SHADE * part for part in to_rgb(colour)),
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        arrowprops=(
            {"arrowstyle": "-", "lw": 0.5, "color": "0.5", "shrinkA": 0}
            if np.hypot(dx, dy) > _LED
            else None
        ),
    )
    text.set_in_layout(False)


def _offsets() -> list[tuple[float, float]]:
    """Return where labels may stand, in points from their point, the nearest places first."""
    turns = sorted(range(_ANGLES), key=lambda turn: min(turn, _ANGLES - turn))
    angles = [2 * np.pi * turn / _ANGLES for turn in turns]
    return [
        (radius * float(np.cos(angle)), radius * float(np.sin(angle)))
        for radius in _RADII
        for angle in angles
    ]


def _size(axes: "Axes", label: str, fontsize: float) -> tuple[float, float]:
    text = axes.text(0, 0, label, fontsize=fontsize, parse_math=False)
    extent = text.get_window_extent()
    text.remove()
    return extent.width + 2, extent.height + 1


def _around(place: NDArray[np.float64], half: float) -> Box:
    x, y = place.tolist()
    return (x - half, y - half, x + half, y + half)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
