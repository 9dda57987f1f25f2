"""CIFAR-100, from the official files of its Python version."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.data.dataset import Dataset, check_counts, check_labels, kind_of, require_root
from testbed.data.pickles import read_pickle
from testbed.errors import UserError

_FOLDER = "cifar-100-python"
_PIXELS = 3 * 32 * 32


def load_cifar100(root: Path | None) -> Dataset:
    """Return CIFAR-100 with its fine labels, uint8 ``[n, 3, 32, 32]``, training images first.

    Parameters
    ----------
    root
        The folder with the files ``train`` and ``test``, or the one above, in which the official
        archive makes the folder ``cifar-100-python``.

    Raises
    ------
    UserError
        If the folder or a file is missing, or a file is damaged or not one of CIFAR-100.

    Notes
    -----
    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. A row holds
    1024 red values, then green, then blue, each a 32x32 image row by row.
    """
    folder = _find(require_root("cifar100", root, "folder"))
    splits = [_read(folder / name) for name in ("train", "test")]
    return Dataset(
        name="cifar100",
        images=np.ascontiguousarray(np.concatenate([rows for rows, _ in splits])).reshape(
            -1, 3, 32, 32
        ),
        labels=np.concatenate([labels for _, labels in splits]),
        classes=100,
        scale=1 / 255,
        test_start=len(splits[0][1]),
    )


def _find(root: Path) -> Path:
    for folder in (root, root / _FOLDER):
        if kind_of(folder / "train") == kind_of(folder / "test") == "file":
            return folder
    raise UserError(
        f"{root}: no CIFAR-100 here (looked for train and test, {_FOLDER}/train and "
        f"{_FOLDER}/test); unpack the official {_FOLDER} archive and set data.root to its folder"
    )


def _read(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    content = read_pickle(path)
    missing = [key for key in ("data", "fine_labels") if key not in content]
    if missing:
        found = ", ".join(repr(key[:20]) for key in sorted(content)[:8]) or "nothing"
        raise UserError(
            f"{path}: holds {found}, but no {' and no '.join(map(repr, missing))}; "
            "expected a file of CIFAR-100's Python version"
        )
    rows = content["data"]
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8:
        found = str(rows.dtype) if isinstance(rows, np.ndarray) else type(rows).__name__
        raise UserError(f"{path}: 'data' is of type {found}; expected an array of uint8")
    if rows.ndim != 2 or rows.shape[1] != _PIXELS or len(rows) == 0:
        raise UserError(
            f"{path}: 'data' has the shape {rows.shape}; expected (n, {_PIXELS}) with n > 0"
        )
    labels = _labels(path, content["fine_labels"])
    check_counts(path, len(rows), len(labels))
    return rows, labels


def _labels(path: Path, values: Any) -> NDArray[np.int64]:
    if isinstance(values, list):
        # Before NumPy sees them: it would turn strings, booleans and floats into integers.
        for value in values:
            if type(value) is not int or value.bit_length() > 62:
                kind = "huge integer" if type(value) is int else type(value).__name__
                raise UserError(f"{path}: 'fine_labels' holds a {kind}; expected integers 0..99")
        values = np.array(values, np.int64)
    if not isinstance(values, np.ndarray) or values.ndim != 1 or len(values) == 0:
        raise UserError(f"{path}: 'fine_labels' is not a list of integers; expected one per image")
    check_labels(path, values, 100)
    return values.astype(np.int64)
