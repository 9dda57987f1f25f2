"""Data sets whose images are read when they are wanted: for limits, for packing, for a summary."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.data.dataset import Dataset, Images, number_users
from testbed.errors import UserError

_BLOCK_BYTES = 1 << 24
_BEFORE = " (before the limit)"


@dataclass(frozen=True, eq=False)
class LazyDataset:
    """A `Dataset` but for its images, which `read` fetches.

    Attributes
    ----------
    name, labels, classes, scale, test_start, users, class_names
        As in `Dataset`.
    shape
        (channels, height, width) of one image.
    dtype
        Of the images: uint8 or float32.
    read
        Returns the images of a slice, or of an int64 array of indices, in the given order.
    variant
        Which variant of the data set; empty for one without variants.
    note
        What a summary says besides, such as what was left out; may be empty.
    """

    name: str
    labels: NDArray[np.int64]
    classes: int
    scale: float
    test_start: int | None
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    read: Callable[[slice | NDArray[np.int64]], Images]
    users: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None
    variant: str = ""
    note: str = ""

    @property
    def training(self) -> int:
        """The number of samples before the official test split."""
        return len(self.labels) if self.test_start is None else self.test_start

    @property
    def image_bytes(self) -> int:
        """The memory of one image."""
        channels, height, width = self.shape
        return channels * height * width * self.dtype.itemsize

    def load(self) -> Dataset:
        """Read all images; `UserError` where memory does not suffice."""
        try:
            images = self.read(slice(None))
        except MemoryError as error:
            raise UserError(
                f"data set {self.name!r}: {len(self.labels)} images of {self.image_bytes} bytes do "
                "not fit into memory: set data.limit"
            ) from error
        return Dataset(
            name=self.name,
            images=images,
            labels=self.labels,
            classes=self.classes,
            scale=self.scale,
            test_start=self.test_start,
            users=self.users,
            class_names=self.class_names,
        )

    def blocks(self) -> Iterator[tuple[int, Images]]:
        """Read all images bit by bit; yields where in the data set each block of them starts."""
        step = max(1, _BLOCK_BYTES // self.image_bytes)
        for start in range(0, len(self.labels), step):
            yield start, self.read(slice(start, start + step))

    def limited(self, limit: int | None) -> "LazyDataset":
        """Return the data set with at most so many training samples, and as few test samples.

        Every class keeps its share of the samples, and at least one; of a class, those kept are
        evenly spaced. Nothing is drawn: the same files and limit give the same samples. The test
        split is reduced in the same proportion, rounded up.

        Raises
        ------
        UserError
            If the limit is below 1, or below the number of classes that have training samples.
        """
        if limit is None:
            return self
        if limit < 1:
            raise UserError(f"data.limit: {limit}; expected at least 1 training sample")
        training = self.training
        if limit >= training:
            return self
        present = len(np.unique(self.labels[:training]))
        if limit < present:
            raise UserError(
                f"data.limit: {limit} is less than the {present} classes of the training samples; "
                f"expected at least {present}, one of each"
            )
        kept = spread(self.labels[:training], limit)
        if self.test_start is not None:
            test = self.labels[training:]
            wanted = -(-len(test) * limit // training)
            kept = np.concatenate((kept, training + spread(test, wanted)))
        start = None if self.test_start is None else limit
        read = self.read
        return replace(
            self,
            labels=self.labels[kept],
            test_start=start,
            users=None if self.users is None else number_users(self.users[kept], start),
            read=lambda chosen: read(kept[chosen]),
            note=self.note and self.note.removesuffix(_BEFORE) + _BEFORE,
        )


def in_memory(dataset: Dataset, variant: str = "") -> LazyDataset:
    """Return a data set that has been read as one whose images are read on demand."""
    return LazyDataset(
        name=dataset.name,
        labels=dataset.labels,
        classes=dataset.classes,
        scale=dataset.scale,
        test_start=dataset.test_start,
        shape=dataset.shape,
        dtype=dataset.images.dtype,
        read=lambda chosen: dataset.images[chosen],
        users=dataset.users,
        class_names=dataset.class_names,
        variant=variant,
    )


def read_each(
    paths: list[Path], shape: tuple[int, int, int], read: Callable[[Path], NDArray[np.uint8]]
) -> Callable[[slice | NDArray[np.int64]], Images]:
    """Return a `LazyDataset.read` for images that lie in one file each."""

    def chosen_images(chosen: slice | NDArray[np.int64]) -> Images:
        wanted = np.arange(len(paths))[chosen]
        images = np.empty((len(wanted), *shape), np.uint8)
        for place, index in enumerate(wanted):
            images[place] = read(paths[index])
        return images

    return chosen_images


def spread(labels: NDArray[np.int64], wanted: int) -> NDArray[np.int64]:
    """Choose samples so that the classes keep their shares.

    Parameters
    ----------
    labels
        int64 ``[n]``, not negative.
    wanted
        How many, at most n. From as many as there are classes among the labels on, each of these
        gets at least one; with fewer, the least common ones may get none.

    Returns
    -------
    int64 ``[wanted]``, ascending.
    """
    counts = np.bincount(labels)
    least = (counts > 0).astype(np.int64) if wanted >= np.count_nonzero(counts) else 0 * counts
    # Largest remainders, in integers: exact, and never more than a class has.
    above, free = counts - least, wanted - int(least.sum())
    total = max(int(above.sum()), 1)
    quota, rest = np.divmod(above * free, total)
    short = free - int(quota.sum())
    quota[np.argsort(-rest, kind="stable")[:short]] += 1
    quota += least
    order = np.argsort(labels, kind="stable")
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    count, share = np.repeat(counts, counts), np.repeat(quota, counts)
    # Exactly `share` of the places 0..count-1 begin a new multiple, and they are evenly spaced.
    begins = (place * share) // count > ((place - 1) * share) // count
    return np.sort(order[begins])
