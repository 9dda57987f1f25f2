"""The data sets by name, and what is known of each without reading it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from testbed.data.cifar import load_cifar100
from testbed.data.dataset import Dataset, kind_of
from testbed.data.digits import load_digits
from testbed.data.idx import load_mnist
from testbed.data.npz import describe_npz, load_npz
from testbed.errors import UserError, suggest


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set without reading anything.

    Attributes
    ----------
    name, description
        For the experiment file and for lists.
    classes
        The number of classes; None where the file decides.
    shape
        (channels, height, width); None where the file decides.
    root
        What ``data.root`` must be: ``"folder"``, ``"file"``, or ``""`` where it is not read.
    load
        Reads the data set from ``data.root``; raises `UserError`.
    """

    name: str
    description: str
    classes: int | None
    shape: tuple[int, int, int] | None
    root: str
    load: Callable[[Path | None], Dataset]


DATASETS: Mapping[str, DatasetInfo] = MappingProxyType(
    {
        info.name: info
        for info in (
            DatasetInfo(
                name="digits",
                description="8x8 digits that come with scikit-learn; no files needed",
                classes=10,
                shape=(1, 8, 8),
                root="",
                load=load_digits,
            ),
            DatasetInfo(
                name="mnist",
                description="MNIST, or another set in its four IDX files, plain or gzip",
                classes=10,
                shape=(1, 28, 28),
                root="folder",
                load=load_mnist,
            ),
            DatasetInfo(
                name="cifar100",
                description="CIFAR-100 with fine labels, from the official Python version",
                classes=100,
                shape=(3, 32, 32),
                root="folder",
                load=load_cifar100,
            ),
            DatasetInfo(
                name="npz",
                description="your own images and labels, in a file that numpy.savez wrote",
                classes=None,
                shape=None,
                root="file",
                load=load_npz,
            ),
        )
    }
)


def load(name: str, root: Path | None) -> Dataset:
    """Read a data set.

    Parameters
    ----------
    name
        Its name in `DATASETS`.
    root
        The value of ``data.root``; ignored by a data set that reads no files.

    Raises
    ------
    UserError
        If the name is unknown, or the root or a file is missing or damaged.
    """
    return _info(name).load(root)


def describe(name: str, root: Path | None) -> tuple[int | None, tuple[int, int, int] | None]:
    """Return the number of classes and (channels, height, width) of an image, reading no images.

    Both are None for a file that is not there (yet). `UserError` if the name is unknown or the
    file is damaged.
    """
    info = _info(name)
    if info.classes is not None or root is None or kind_of(root) != "file":
        return info.classes, info.shape
    return describe_npz(root)


def _info(name: str) -> DatasetInfo:
    if name not in DATASETS:
        raise UserError(f"data.name: unknown data set {name!r}; {suggest(name, DATASETS)}")
    return DATASETS[name]
