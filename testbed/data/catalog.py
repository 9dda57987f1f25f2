"""The data sets by name, and what is known of each without reading it."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from testbed.data.celeba import SHAPE, VARIANTS, open_celeba
from testbed.data.cifar import load_cifar10, load_cifar100
from testbed.data.dataset import Dataset, kind_of
from testbed.data.digits import load_digits
from testbed.data.emnist import VARIANTS as CHARACTERS
from testbed.data.emnist import load_emnist
from testbed.data.femnist import load_femnist
from testbed.data.idx import load_mnist
from testbed.data.images import open_images
from testbed.data.lazy import LazyDataset, in_memory
from testbed.data.npz import describe_npz, load_npz
from testbed.data.packed import open_packed
from testbed.data.recognise import hint
from testbed.data.svhn import load_svhn
from testbed.errors import UserError, suggest

Shape = tuple[int, int, int]


def _whole(load: Callable[[Path | None], Dataset]) -> Callable[[Path | None, str], LazyDataset]:
    """Return the opener of a data set without variants that is read at once."""
    return lambda root, _variant: in_memory(load(root))


def _outline(data: LazyDataset) -> tuple[int, Shape]:
    return data.classes, data.shape


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set without reading anything.

    Attributes
    ----------
    name, description
        For the experiment file and for lists.
    classes
        The number of classes, of the default variant; None where the file decides.
    shape
        (channels, height, width); None where the file decides.
    root
        What ``data.root`` must be: ``"folder"``, ``"file"``, or ``""`` where it is not read.
    open
        Reads the data set from ``data.root`` and a variant (empty for a data set without any), or
        enough of it to know its samples; raises `UserError`.
    variants
        The values of ``data.variant``, the default first; empty for none.
    variant_classes
        The number of classes by variant, where it is not `classes`; None where the file decides.
    outline
        Where the file decides: reads the number of classes and the shape, but no images.
    """

    name: str
    description: str
    classes: int | None
    shape: Shape | None
    root: str
    open: Callable[[Path | None, str], LazyDataset]
    variants: tuple[str, ...] = ()
    variant_classes: Mapping[str, int | None] = field(default_factory=dict)
    outline: Callable[[Path, str], tuple[int, Shape]] | None = None


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
                open=_whole(load_digits),
            ),
            DatasetInfo(
                name="mnist",
                description="MNIST, or another set in its four IDX files, plain or gzip",
                classes=10,
                shape=(1, 28, 28),
                root="folder",
                open=_whole(load_mnist),
            ),
            DatasetInfo(
                name="emnist",
                description="EMNIST, characters in MNIST's format, plain or gzip",
                classes=len(CHARACTERS["byclass"]),
                shape=(1, 28, 28),
                root="folder",
                open=lambda root, variant: in_memory(load_emnist(root, variant), variant),
                variants=tuple(CHARACTERS),
                variant_classes={name: len(known) for name, known in CHARACTERS.items()},
            ),
            DatasetInfo(
                name="femnist",
                description="FEMNIST, characters by writer, from the JSON files of LEAF",
                classes=62,
                shape=(1, 28, 28),
                root="folder",
                open=_whole(load_femnist),
            ),
            DatasetInfo(
                name="svhn",
                description="SVHN, house numbers as single digits, from the MATLAB files",
                classes=10,
                shape=(3, 32, 32),
                root="folder",
                open=_whole(load_svhn),
            ),
            DatasetInfo(
                name="cifar10",
                description="CIFAR-10, from the official Python version",
                classes=10,
                shape=(3, 32, 32),
                root="folder",
                open=_whole(load_cifar10),
            ),
            DatasetInfo(
                name="cifar100",
                description="CIFAR-100 with fine labels, from the official Python version",
                classes=100,
                shape=(3, 32, 32),
                root="folder",
                open=_whole(load_cifar100),
            ),
            DatasetInfo(
                name="celeba",
                description="CelebA, aligned faces: hair colour, gender or identity",
                classes=5,
                shape=SHAPE,
                root="folder",
                open=open_celeba,
                variants=VARIANTS,
                variant_classes={"gender": 2, "identity": None},
                outline=lambda root, variant: _outline(open_celeba(root, variant)),
            ),
            DatasetInfo(
                name="images",
                description="your own image files, in a folder for each class",
                classes=None,
                shape=None,
                root="folder",
                open=lambda root, _variant: open_images(root),
                outline=lambda root, _variant: _outline(open_images(root)),
            ),
            DatasetInfo(
                name="npz",
                description="your own images and labels, in a file that numpy.savez wrote",
                classes=None,
                shape=None,
                root="file",
                open=_whole(load_npz),
                outline=lambda root, _variant: describe_npz(root),
            ),
            DatasetInfo(
                name="packed",
                description="any of these, in the file that testbed data pack wrote",
                classes=None,
                shape=None,
                root="file",
                open=lambda root, _variant: open_packed(root),
                outline=lambda root, _variant: _outline(open_packed(root)),
            ),
        )
    }
)


def load(
    name: str, root: Path | None, variant: str | None = None, limit: int | None = None
) -> Dataset:
    """Read a data set.

    Parameters
    ----------
    name
        Its name in `DATASETS`.
    root
        The value of ``data.root``; ignored by a data set that reads no files.
    variant
        One of its variants; None for the default.
    limit
        How many training samples at most, of all classes, as `LazyDataset.limited` chooses them;
        None for all.

    Raises
    ------
    UserError
        If a name is unknown, the limit too low, or the root or a file is missing or damaged. Where
        the root seems to be that of another data set, the message says so.
    """
    return open_dataset(name, root, variant).limited(limit).load()


def open_dataset(name: str, root: Path | None, variant: str | None = None) -> LazyDataset:
    """Read as much of a data set as is needed to know its samples; parameters as of `load`."""
    chosen = check_variant(name, variant)
    with _told(name, root):
        return DATASETS[name].open(root, chosen)


def describe(
    name: str, root: Path | None, variant: str | None = None
) -> tuple[int | None, Shape | None]:
    """Return the number of classes and (channels, height, width) of an image, reading no images.

    Both are None for a file or folder that decides about them and is not there (yet). `UserError`
    if a name is unknown, or the file or folder is damaged or cannot be read.
    """
    chosen = check_variant(name, variant)
    info = DATASETS[name]
    classes = info.variant_classes.get(chosen, info.classes)
    if classes is not None and info.shape is not None:
        return classes, info.shape
    if root is None or kind_of(root) != info.root:
        return classes, info.shape
    with _told(name, root):
        return _outlined(name, root, chosen, root.stat().st_mtime_ns)


# A plan asks for every scenario, and the lists of 200,000 images take seconds.
@functools.lru_cache(maxsize=16)
def _outlined(name: str, root: Path, variant: str, _changed: int) -> tuple[int, Shape]:
    outline = DATASETS[name].outline
    if outline is None:
        raise ValueError(f"{name}: neither classes nor shape are known, nor how to read them")
    return outline(root, variant)


def check_variant(name: str, variant: str | None) -> str:
    """Return the variant of a data set that is meant; empty for a data set that has none.

    `UserError` if the name or the variant is unknown.
    """
    info = _info(name)
    if variant is None:
        return info.variants[0] if info.variants else ""
    if not info.variants:
        raise UserError(
            f"data.variant: {variant!r}; the data set {name!r} has no variants: leave it out"
        )
    if variant not in info.variants:
        raise UserError(
            f"data.variant: {name!r} has no variant {variant!r}; {suggest(variant, info.variants)}"
        )
    return variant


def _info(name: str) -> DatasetInfo:
    if name not in DATASETS:
        raise UserError(f"data.name: unknown data set {name!r}; {suggest(name, DATASETS)}")
    return DATASETS[name]


@contextlib.contextmanager
def _told(name: str, root: Path | None) -> Iterator[None]:
    """Turn what reading a data set raises into what its user can mend."""
    try:
        yield
    except UserError as error:
        more = hint(name, root) if DATASETS[name].root else ""
        raise (UserError(f"{error}; {more}") if more else error) from error
    except MemoryError as error:
        raise UserError(
            f"{root}: does not fit into memory; expected a data set that does: pack a part of it "
            "with testbed data pack --limit where there is more"
        ) from error
    except OSError as error:
        raise UserError(
            f"{error.filename or root}: cannot be read ({error.strerror}); expected readable files "
            "in data.root"
        ) from error
