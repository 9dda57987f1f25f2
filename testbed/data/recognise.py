"""Tells what a folder or file seems to hold, for messages about the wrong one."""

import itertools
import zipfile
from collections.abc import Iterator
from pathlib import Path

from testbed.data.images import SUFFIXES
from testbed.data.packed import holds_dataset

# Of each data set: groups of patterns of files, any one of which has to be there as a whole.
_SIGNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "mnist": (("train-images?idx3-ubyte*",), ("t10k-images?idx3-ubyte*",)),
    "emnist": (("emnist-*-ubyte*",), ("gzip/emnist-*-ubyte*",)),
    "femnist": (("train/all_data_*.json",), ("data/train/all_data_*.json",)),
    "svhn": (("train_32x32.mat",), ("test_32x32.mat",)),
    "cifar10": (("data_batch_[1-5]",), ("cifar-10-batches-py/data_batch_[1-5]",)),
    "cifar100": (("train", "test"), ("cifar-100-python/train", "cifar-100-python/test")),
    "celeba": (
        *((f"{place}list_attr_celeba.txt",) for place in ("", "Anno/", "celeba/")),
        ("img_align_celeba/000*.jpg",),
        ("img_align_celeba/img_align_celeba/000*.jpg",),
    ),
}
_IMAGE_FOLDERS = ("*/*", "train/*/*")
_MOST = 64


def recognise(root: Path) -> tuple[str, ...]:
    """Return the names of the data sets that a folder or file seems to hold; often one or none."""
    try:
        if root.is_file():
            return _of_file(root)
        if not root.is_dir():
            return ()
        found = tuple(
            name
            for name, signs in _SIGNS.items()
            if any(all(map(any, (_files(root, part) for part in sign))) for sign in signs)
        )
        if not found and any(
            path.suffix.lower() in SUFFIXES
            for pattern in _IMAGE_FOLDERS
            for path in itertools.islice(root.glob(pattern), 10 * _MOST)
        ):
            return ("images",)
    # A hint is not worth a second error.
    except OSError:
        return ()
    return found


def hint(name: str, root: Path | None) -> str:
    """Return what to try where ``root`` is not the data set ``name``; empty where it seems to be.

    Parameters
    ----------
    name
        A name of the catalogue.
    root
        The value of ``data.root``.
    """
    if root is None:
        return ""
    found = recognise(root)
    if name in found:
        return ""
    try:
        inside = sorted(itertools.islice(root.iterdir(), 1000)) if root.is_dir() else []
    except OSError:
        return ""
    for path in inside[:_MOST]:
        if path.is_dir() and name in recognise(path):
            return f"{path} looks like {name}: set data.root to it"
    if found:
        kind = "file" if root.is_file() else "folder"
        return f"this {kind} looks like {found[0]}: set data.name: {found[0]}"
    if not inside:
        return "the folder is empty" if root.is_dir() else ""
    names = ", ".join(path.name[:40] for path in inside[:5])
    return f"the folder holds {names}" + (" and more" if len(inside) > 5 else "")


def _files(root: Path, pattern: str) -> Iterator[bool]:
    return (path.is_file() for path in root.glob(pattern))


def _of_file(path: Path) -> tuple[str, ...]:
    with path.open("rb") as file:
        start = file.read(8)
    if start == b"\x89HDF\r\n\x1a\n":
        return ("packed",) if holds_dataset(path) else ()
    if start[:4] != b"PK\x03\x04":
        return ()
    try:
        with zipfile.ZipFile(path) as archive:
            return ("npz",) if "images.npy" in archive.namelist() else ()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return ()
