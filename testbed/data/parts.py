"""The disjoint parts of a data set: the victims', the adversary's, and the test part."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from testbed.errors import UserError


@dataclass(frozen=True, eq=False)
class Parts:
    """Disjoint indices into a `Dataset` that together cover it.

    Attributes
    ----------
    victim
        int64 ``[v]``, ascending: the samples that clients train on.
    auxiliary
        int64 ``[classes * per_class]``, class by class: ``reshape(classes, per_class)`` has one
        class per row. The samples that the adversary owns.
    test
        int64 ``[t]``, ascending: the samples that measure the global model.
    """

    victim: NDArray[np.int64]
    auxiliary: NDArray[np.int64]
    test: NDArray[np.int64]


def split(
    labels: NDArray[np.int64],
    classes: int,
    test_start: int | None,
    *,
    auxiliary_per_class: int,
    test_fraction: float,
    rng: np.random.Generator,
) -> Parts:
    """Split a data set into its parts.

    One permutation decides everything: with the same generator state, fewer auxiliary samples are
    a subset of more, and their number does not change the test part.

    Parameters
    ----------
    labels
        int64 ``[n]``, in 0..classes-1.
    classes
        The number of classes.
    test_start
        Where the official test split begins, which then is the test part; None for none.
    auxiliary_per_class
        How many samples of each class the adversary gets.
    test_fraction
        The share of every class that goes to the test part where there is no official one, in
        [0, 1), rounded per class and never all of a class.
    rng
        Its state decides the split.

    Raises
    ------
    UserError
        If a value is out of range, a class has no sample to train on, or no victim sample of a
        class would be left.
    """
    if auxiliary_per_class < 0:
        raise UserError(
            f"data.auxiliary_per_class: {auxiliary_per_class}; expected a count of 0 or more"
        )
    if not 0 <= test_fraction < 1:
        raise UserError(f"data.test_fraction: {test_fraction}; expected a share in [0, 1)")
    training = len(labels) if test_start is None else test_start
    counts = np.bincount(labels[:training], minlength=classes)
    if (counts == 0).any():
        raise UserError(
            f"class {int(np.argmin(counts))} has no training sample; expected at least one of each "
            f"of the {classes} classes: number the labels from 0 without gaps, or add samples"
        )
    for_test = np.zeros_like(counts)
    if test_start is None:
        for_test = np.minimum(np.rint(test_fraction * counts).astype(np.int64), counts - 1)
    _check_room(counts, for_test, auxiliary_per_class)

    permutation = rng.permutation(training)
    order = permutation[np.argsort(labels[permutation], kind="stable")]
    # The place of each sample within its class, in the random order.
    place = np.arange(training) - np.repeat(np.cumsum(counts) - counts, counts)
    first = np.repeat(for_test, counts)
    in_test = place < first
    in_auxiliary = ~in_test & (place < first + auxiliary_per_class)
    return Parts(
        victim=np.sort(order[~in_test & ~in_auxiliary]),
        auxiliary=order[in_auxiliary],
        test=np.concatenate((np.sort(order[in_test]), np.arange(training, len(labels)))),
    )


def _check_room(
    counts: NDArray[np.int64], for_test: NDArray[np.int64], auxiliary_per_class: int
) -> None:
    room = counts - for_test - 1
    smallest = int(np.argmin(room))
    if auxiliary_per_class > room[smallest]:
        test = f", {for_test[smallest]} of them in the test part" if for_test[smallest] else ""
        raise UserError(
            f"data.auxiliary_per_class: {auxiliary_per_class} leaves no victim sample of class "
            f"{smallest}, which has {counts[smallest]} training samples{test}; "
            f"set it to at most {room[smallest]}"
        )
