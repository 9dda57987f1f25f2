"""What an attack that learns from simulated batches takes for granted about their labels."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Prior = Literal["balanced", "unbalanced", "mixed", "dirichlet"]


def draw_label_batches(
    prior: Prior,
    shape: tuple[int, int, int],
    classes: int,
    rng: np.random.Generator,
    alpha: float = 1.0,
) -> NDArray[np.int64]:
    """Draw the labels of many simulated updates.

    The classes are exchangeable under every prior: none is more likely than another before the
    update is seen.

    Parameters
    ----------
    prior
        ``balanced`` and ``unbalanced`` as in Wainakh et al., PoPETs 2022: every label uniform over
        the classes; or floor(B/2) of a random class a, floor(B/4) of another class b, which an
        update's local steps share, and the rest uniform. ``mixed``: every second update is
        unbalanced, for a server that does not know which of the two to expect. ``dirichlet``: the
        shares of the classes are drawn for each update from Dirichlet(alpha, ..., alpha), as in
        partitions of federated data (Hsu et al. 2019, arXiv 1909.06335).
    shape
        (S, E, B): updates, local steps, batch size.
    classes
        C. A single class leaves nothing to draw.
    rng
        Its state decides the labels.
    alpha
        Concentration of ``dirichlet``, positive; not used by the others.

    Returns
    -------
    NDArray[np.int64]
        [S, E, B], not shuffled within a batch.
    """
    if prior == "dirichlet":
        # In logarithms, since a gamma variate of small shape underflows: if all of an update's
        # did, its shares would be 0 / 0.
        log_gamma = np.log(rng.standard_gamma(alpha + 1.0, size=(shape[0], classes)))
        log_gamma += np.log1p(-rng.random((shape[0], classes))) / alpha
        shares = np.exp(log_gamma - log_gamma.max(axis=1, keepdims=True))
        bounds = np.cumsum(shares, axis=1)
        points = rng.random((shape[0], shape[1] * shape[2])) * bounds[:, -1:]
        rows = [
            np.searchsorted(bound, point, side="right")
            for bound, point in zip(bounds, points, strict=True)
        ]
        drawn = np.minimum(np.stack(rows), classes - 1) if rows else np.zeros(points.shape)
        return drawn.astype(np.int64).reshape(shape)
    labels = rng.integers(classes, size=shape)
    if prior == "balanced" or classes < 2:
        return labels
    # Of the mixed prior's updates every second one, so that any part of them is mixed.
    skewed = labels[1::2] if prior == "mixed" else labels
    half, quarter = shape[2] // 2, shape[2] // 4
    first = rng.integers(classes, size=len(skewed))
    second = rng.integers(classes - 1, size=len(skewed))
    second += second >= first
    skewed[:, :, :half] = first[:, None, None]
    skewed[:, :, half : half + quarter] = second[:, None, None]
    return labels


def draw_counts(
    prior: Prior,
    batch_size: int,
    classes: int,
    samples: int,
    rng: np.random.Generator,
    alpha: float = 1.0,
) -> NDArray[np.int64]:
    """Draw the label counts of simulated batches; parameters as in `draw_label_batches`.

    Returns
    -------
    NDArray[np.int64]
        [samples, classes]; every row sums to ``batch_size``.
    """
    labels = draw_label_batches(prior, (samples, 1, batch_size), classes, rng, alpha)
    return count_labels(labels, classes)


def count_labels(labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Return how often each class occurs in each update, int64 [S, C].

    Parameters
    ----------
    labels
        int64 [S, E, B].
    classes
        C.
    """
    flat = labels.reshape(len(labels), -1)
    places = flat + classes * np.arange(len(flat))[:, None]
    counts = np.bincount(places.ravel(), minlength=len(flat) * classes)
    return counts.astype(np.int64, copy=False).reshape(len(flat), classes)


def share_variance(
    prior: Prior, batch_size: int, classes: int, local_steps: int = 1, alpha: float = 1.0
) -> float:
    """Return v, for which the label shares of an update have ``Cov = v (I - 11^T / C)``.

    Every covariance that treats all classes alike, of shares that sum to 1, has this form.

    Parameters
    ----------
    prior, batch_size, classes, alpha
        See `draw_label_batches`.
    local_steps
        E: the shares are those of all E B labels.
    """
    if prior == "mixed":
        parts: tuple[Prior, ...] = ("balanced", "unbalanced")
        values = [share_variance(part, batch_size, classes, local_steps) for part in parts]
        return sum(values) / 2
    labels = batch_size * local_steps
    if prior == "dirichlet":
        spread = 1 / (classes * alpha + 1)
        return (spread + (1 - spread) / labels) / classes
    if prior == "balanced" or classes < 2:
        return 1 / (classes * labels)
    half, quarter = batch_size // 2, batch_size // 4
    rest = (batch_size - half - quarter) * local_steps
    half, quarter = half * local_steps, quarter * local_steps
    squares = half**2 + quarter**2 + rest
    # The two classes that dominate are different, so that their counts repel each other.
    return (squares - 2 * half * quarter / (classes - 1)) / (classes * labels**2)
