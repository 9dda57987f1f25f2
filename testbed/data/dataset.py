"""What every loader returns, and the checks that loaders share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.errors import UserError

Images = NDArray[np.uint8] | NDArray[np.float32]
"""``[n, channels, height, width]``."""


# Identity is the only equality that makes sense for large arrays.
@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images in memory, as they are stored: scaling is the consumer's.

    Attributes
    ----------
    name
        The name in the catalogue.
    images
        uint8 or float32 ``[n, channels, height, width]``, C-contiguous: the training images, then
        the official test images.
    labels
        int64 ``[n]``, in 0..classes-1.
    classes
        The number of classes.
    scale
        ``images * scale`` is in [0, 1].
    test_start
        Index of the first image of the official test split; None where there is none.
    users
        int64 ``[n]``: whose each sample is, numbered from 0 without gaps in the training part, and
        -1 for a sample of nobody's; None for a data set without users. Users of the official test
        split alone have the numbers that follow.
    class_names
        One for each class; None where they are not known.
    """

    name: str
    images: Images
    labels: NDArray[np.int64]
    classes: int
    scale: float
    test_start: int | None
    users: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width


def kind_of(path: Path) -> str:
    """Return ``"file"``, ``"folder"``, ``"special file"``, or ``""`` where there is nothing.

    `UserError` if the system does not let us look.
    """
    try:
        if path.is_dir():
            return "folder"
        if path.is_file():
            return "file"
        return "special file" if path.exists() else ""
    except OSError as error:
        raise UserError(
            f"{path}: cannot be looked at ({error.strerror}); expected a readable path in data.root"
        ) from error


def require_root(name: str, root: Path | None, kind: str) -> Path:
    """Return the root of a data set that is read from disk, once it is known to be there.

    Parameters
    ----------
    name
        The data set's name, for the message.
    root
        The value of ``data.root``.
    kind
        ``"folder"`` or ``"file"``.

    Raises
    ------
    UserError
        If it is not given, does not exist, or is of the other kind.
    """
    if root is None:
        raise UserError(
            f"data.root is not set: data set {name!r} is read from a {kind}; "
            f"set data.root to the path of that {kind}"
        )
    found = kind_of(root)
    if not found:
        raise UserError(
            f"data.root: {root} does not exist; data set {name!r} expects a {kind} there"
        )
    if found != kind:
        raise UserError(
            f"data.root: {root} is a {found}; data set {name!r} expects the path of a {kind}"
        )
    return root


def check_counts(path: Path, images: int, labels: int) -> None:
    """Refuse a split whose labels, read from ``path``, do not match its images in number."""
    if images != labels:
        raise UserError(
            f"{path}: {labels} labels for {images} images; expected one label per image "
            "(do both come from the same split?)"
        )


def check_labels(path: Path, labels: NDArray[Any], classes: int, first: int = 0) -> None:
    """Refuse labels outside first..first+classes-1.

    Parameters
    ----------
    path
        The file that they come from, for the message.
    labels
        Integers of any width ``[n]``, n > 0.
    classes
        The number of classes.
    first
        The label of the first class in the file.
    """
    last = first + classes - 1
    for extreme in (int(labels.min()), int(labels.max())):
        if not first <= extreme <= last:
            raise UserError(f"{path}: holds the label {extreme}; expected {first}..{last}")


def number_users(keys: NDArray[np.int64], test_start: int | None) -> NDArray[np.int64]:
    """Return the users' numbers as `Dataset` has them.

    Parameters
    ----------
    keys
        int64 ``[n]``: any number of 0 or more for each user, -1 for nobody.
    test_start
        As in `Dataset`.
    """
    training = np.unique(keys[:test_start])
    # Negative: so that -1 comes first among the sorted, and stays -1.
    known = np.union1d(training, [-1])
    others = np.setdiff1d(keys, known)
    order = np.concatenate((known, others))
    by_key = np.argsort(order)
    numbers: NDArray[np.int64] = by_key[np.searchsorted(order, keys, sorter=by_key)] - 1
    return numbers
