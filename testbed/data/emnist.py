"""EMNIST, from its official IDX files, plain or compressed with gzip."""

import string
from pathlib import Path

import numpy as np

from testbed.data.dataset import Dataset, kind_of, require_root
from testbed.data.idx import read_splits

_ALL = string.digits + string.ascii_uppercase + string.ascii_lowercase
# Where upper and lower case look alike, the lower case letters are merged into the upper.
_MERGED = string.digits + string.ascii_uppercase + "abdefghnqrt"
VARIANTS = {
    "byclass": _ALL,
    "bymerge": _MERGED,
    "balanced": _MERGED,
    "letters": string.ascii_uppercase,
    "digits": string.digits,
    "mnist": string.digits,
}
"""The variants, the default first, and the character of each class."""

_FOLDER = "gzip"


def load_emnist(root: Path | None, variant: str) -> Dataset:
    """Return a variant of EMNIST, uint8 ``[n, 1, 28, 28]``, upright, training images first.

    Parameters
    ----------
    root
        The folder with ``emnist-VARIANT-train-images-idx3-ubyte`` and the other three files of the
        variant, each with or without ``.gz``, or the one above, in which the official archive
        makes the folder ``gzip``.
    variant
        One of `VARIANTS`.

    Raises
    ------
    UserError
        If the folder or a file is missing, damaged, or at odds with another one.

    Notes
    -----
    Source: Cohen et al., "EMNIST: an extension of MNIST to handwritten letters", 2017. The files
    hold every image column by column, and the labels of the variant letters begin with 1.
    """
    folder = _find(require_root("emnist", root, "folder"), variant)
    images, labels, test_start = read_splits(
        folder,
        (f"emnist-{variant}-train", f"emnist-{variant}-test"),
        len(VARIANTS[variant]),
        first=1 if variant == "letters" else 0,
        hint=_hint(folder, variant),
    )
    return Dataset(
        name="emnist",
        images=np.ascontiguousarray(images.transpose(0, 2, 1))[:, None],
        labels=labels,
        classes=len(VARIANTS[variant]),
        scale=1 / 255,
        test_start=test_start,
        class_names=tuple(VARIANTS[variant]),
    )


def _find(root: Path, variant: str) -> Path:
    for folder in (root, root / _FOLDER):
        if kind_of(folder) == "folder" and variant in _present(folder):
            return folder
    # Where another variant is, the message names it.
    inner = root / _FOLDER
    return inner if kind_of(inner) == "folder" and not _present(root) else root


def _present(folder: Path) -> list[str]:
    return [name for name in VARIANTS if any(folder.glob(f"emnist-{name}-*-ubyte*"))]


def _hint(folder: Path, variant: str) -> str:
    others = [name for name in _present(folder) if name != variant]
    if others:
        return f"there are files of the variant {' and '.join(others)}: set data.variant"
    return f"set data.root to the folder with the four files emnist-{variant}-*"
