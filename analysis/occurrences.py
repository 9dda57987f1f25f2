"""Figure: the last layer's gradient of a class against how often the class is in the batch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from analysis.figures import PALETTE, describe, grid, set_title
from analysis.load import varying_columns

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from analysis.open_set import Described
    from testbed.results.reader import Scenario

T = TypeVar("T")

_MAX_PANELS = 8
_MAX_POINTS = 20_000
_RHO = "\N{GREEK SMALL LETTER RHO}"


class _Moments:
    """Sums over blocks of points, so that a scenario need not fit in memory."""

    def __init__(self) -> None:
        self._sums = np.zeros((3, 3))

    def add(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        rows = np.stack([np.ones_like(x), x, y])
        self._sums += rows @ rows.T

    def pearson(self) -> float:
        """Return Pearson's correlation; NaN where x or y does not vary."""
        n = self._sums[0, 0]
        if n < 2:
            return float("nan")
        mean = self._sums[0, 1:] / n
        covariance = self._sums[1:, 1:] / n - np.outer(mean, mean)
        variance = np.diagonal(covariance)
        # What rounding leaves of a variance of zero is below this.
        if (variance <= 1e-12 * np.diagonal(self._sums)[1:] / n).any():
            return float("nan")
        return float(covariance[0, 1] / np.sqrt(variance.prod()))


def occurrences_figure(results: "Described", frame: "pd.DataFrame") -> "Figure":
    """Draw row sums against label counts, which property 2 of LLG says are a straight line.

    Wainakh et al., PoPETs 2022(2), section 4: with impact m < 0, ``g_c = s_c + m lambda_c``.

    Parameters
    ----------
    results
        An open file, or an open set of shares.
    frame
        Its rows, as `analysis.load` returns them; not empty.

    Returns
    -------
    matplotlib.figure.Figure
        A panel per scenario, at most 8 of them, with Pearson's rho of all their points. Where an
        attack has estimated the offsets s, the rho of ``g_c - s_c`` stands beside it.
    """
    from matplotlib.ticker import MaxNLocator

    varying = varying_columns(frame)
    chosen, found = _choose(frame, [name for name in varying if name != "batch_size"])
    varying = varying or ["dataset", "distribution"]
    figure, panels = grid(len(chosen), columns=4, width=3.2, height=2.8)
    for axes, index in zip(panels, chosen, strict=True):
        x, y, rho, adjusted = _points(results.numbered(index))
        axes.scatter(x, y, s=5, color=PALETTE[0], alpha=0.3, lw=0, rasterized=True)
        first = frame[frame["scenario"] == index].iloc[0]
        says = "undefined" if np.isnan(rho) else f"{rho:.3f}"
        if not np.isnan(adjusted):
            says += f", offsets removed {adjusted:.3f}"
        name = describe({key: first[key] for key in varying}, width=30)
        axes.set_title(f"{name}\n{_RHO} = {says}", parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    notes = ["points shifted sideways at random to show how many there are"]
    if len(chosen) < found:
        notes.append(f"{len(chosen)} of {found} scenarios, evenly chosen")
    figure.supxlabel(f"occurrences of the class in the batch\n({'; '.join(notes)})", fontsize=9)
    figure.supylabel("gradient of the class's row, summed over features", fontsize=9)
    set_title(figure, results.title)
    return figure


def _choose(frame: "pd.DataFrame", keys: Sequence[str]) -> tuple[list[int], int]:
    """Return the scenarios to draw, and how many there are.

    Each setting of ``keys`` gets as many panels, so that the same batch sizes stand side by side.
    """
    scenarios = frame[["scenario", *keys]].drop_duplicates()
    if not keys:
        found = [scenarios["scenario"].tolist()]
    else:
        found = [
            group["scenario"].tolist()
            for _, group in scenarios.groupby(list(keys), sort=False, dropna=False)
        ]
    found = _spread(found, _MAX_PANELS)
    chosen = [index for group in found for index in _spread(group, _MAX_PANELS // len(found))]
    return chosen, len(scenarios)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """Return at most ``count`` items, evenly spread: the middle one, or the ends among them."""
    if count == 1:
        return [items[len(items) // 2]]
    picks = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[round(pick)] for pick in picks.tolist()]


def _points(
    scenario: "Scenario",
) -> tuple[NDArray[np.float64], NDArray[np.float64], float, float]:
    """Return x (label counts, jittered) and y (row sums) to draw, and Pearson's rho.

    The first rho is of the row sums as they are, the second with the estimated offsets removed,
    NaN where there are none.
    """
    moments, adjusted = _Moments(), _Moments()
    offsets = _offsets(scenario)
    total = scenario.committed * scenario.clients * scenario.classes
    stride = max(1, -(-total // _MAX_POINTS))
    xs, ys = [], []
    for start, stop in scenario.blocks():
        truth = scenario.array("truth/counts", start, stop)
        sums = scenario.array("observations/row_sums", start, stop)
        known = (truth >= 0) & np.isfinite(sums)
        x, y = truth[known].astype(np.float64), sums[known].astype(np.float64)
        moments.add(x, y)
        if offsets is not None:
            offset = scenario.array(offsets, start, stop)
            # One for all clients, or one for each where their local steps vary.
            offset = offset if offset.ndim == sums.ndim else offset[:, None]
            adjusted.add(x, (sums - offset)[known])
        xs.append(x[::stride])
        ys.append(y[::stride])
    x, y = np.concatenate(xs), np.concatenate(ys)
    jitter = np.random.default_rng(0).uniform(-0.25, 0.25, len(x))
    return x + jitter, y, moments.pearson(), adjusted.pearson()


def _offsets(scenario: "Scenario") -> str | None:
    """Return the path of the best estimate of the offsets, that of the most knowing attack."""
    order = ("auxiliary", "model")
    known = sorted(
        (label for label, info in scenario.attacks.items() if info.knowledge in order),
        key=lambda label: order.index(scenario.attacks[label].knowledge),
    )
    paths = (f"attacks/{label}/calibration/offset" for label in known)
    return next((path for path in paths if scenario.has(path)), None)
