"""How the labels of a client's batch are distributed, and the samples drawn for them.

Source: Wainakh et al., "User-Level Label Leakage from Gradients in Federated Learning", PoPETs
2022, the experiments' balanced and unbalanced batches.
"""

import numpy as np
from numpy.typing import NDArray

DISTRIBUTIONS = ("balanced", "unbalanced", "natural")


def draw_skew(classes: int, rng: np.random.Generator) -> tuple[int, int]:
    """Return the classes (a, b) that dominate unbalanced batches: different, else uniform.

    A client's local steps of one round share them.

    Raises
    ------
    ValueError
        If there are fewer than two classes.
    """
    if classes < 2:
        raise ValueError(f"two different classes cannot be drawn from {classes}")
    a = int(rng.integers(classes))
    b = int(rng.integers(classes - 1))
    return a, b + (b >= a)


def draw_labels(
    distribution: str,
    batch_size: int,
    classes: int,
    rng: np.random.Generator,
    skew: tuple[int, int] | None = None,
) -> NDArray[np.int64]:
    """Return the labels of a batch, int64 ``[batch_size]``, not shuffled.

    Parameters
    ----------
    distribution
        ``"balanced"``: every label uniform over the classes. ``"unbalanced"``: floor(B/2) of class
        a, floor(B/4) of class b, the rest uniform over all classes, a and b among them.
    batch_size
        B.
    classes
        The number of classes.
    rng
        Its state decides the labels.
    skew
        (a, b) of `draw_skew`; needed by ``"unbalanced"`` and only there.

    Raises
    ------
    ValueError
        For another distribution (``"natural"`` depends on the data: see `Sampler`), or without
        the skew that it needs.
    """
    if distribution == "balanced":
        return rng.integers(classes, size=batch_size)
    if distribution != "unbalanced":
        raise ValueError(f"labels cannot be drawn from the distribution {distribution!r}")
    if skew is None:
        raise ValueError("unbalanced labels need a skew; got None")
    half, quarter = batch_size // 2, batch_size // 4
    labels = np.empty(batch_size, np.int64)
    labels[:half] = skew[0]
    labels[half : half + quarter] = skew[1]
    labels[half + quarter :] = rng.integers(classes, size=batch_size - half - quarter)
    return labels


class Sampler:
    """Draws batches from one part of a data set.

    Parameters
    ----------
    labels
        int64 ``[n]``, of the whole data set.
    part
        int64 ``[m]``, m > 0: indices into it.
    classes
        The number of classes.

    Raises
    ------
    ValueError
        If the part is empty.
    """

    def __init__(self, labels: NDArray[np.int64], part: NDArray[np.int64], classes: int) -> None:
        if len(part) == 0:
            raise ValueError("batches cannot be drawn from a part without samples")
        of_part = labels[part]
        self._classes = classes
        self._order = part[np.argsort(of_part, kind="stable")]
        self._counts = np.bincount(of_part, minlength=classes)
        self._offsets = np.cumsum(self._counts) - self._counts
        self._missing = np.flatnonzero(self._counts == 0)

    def draw(
        self,
        distribution: str,
        batch_size: int,
        rng: np.random.Generator,
        skew: tuple[int, int] | None = None,
    ) -> NDArray[np.int64]:
        """Return the indices of a batch into the data set, int64 ``[batch_size]``.

        Parameters
        ----------
        distribution
            One of `DISTRIBUTIONS`. ``"natural"`` draws uniformly from the part; the others draw
            labels with `draw_labels`, then a sample of each label. With replacement, all.
        batch_size
            B.
        rng
            Its state decides the batch.
        skew
            See `draw_labels`.

        Raises
        ------
        ValueError
            As `draw_labels`, or if the part lacks a class that might be drawn.
        """
        if distribution == "natural":
            return self._order[rng.integers(len(self._order), size=batch_size)]
        if len(self._missing):
            raise ValueError(f"the part has no sample of class {self._missing[0]}")
        labels = draw_labels(distribution, batch_size, self._classes, rng, skew)
        # random() < 1 keeps the product below the count for every count under 2**53; bounds per
        # element in rng.integers() would take three times as long.
        within = (rng.random(batch_size) * self._counts[labels]).astype(np.int64)
        drawn: NDArray[np.int64] = self._order[self._offsets[labels] + within]
        return drawn
