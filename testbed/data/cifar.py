"""CIFAR-10 and CIFAR-100, from the official files of their Python versions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.data.dataset import Dataset, check_counts, check_labels, kind_of, require_root
from testbed.data.pickles import read_pickle
from testbed.errors import UserError

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Format:
    """How a data set's files are named, and what they call their parts."""

    name: str
    title: str
    folder: str
    classes: int
    training: tuple[str, ...]
    test: str
    labels: str
    meta: str
    class_names: str


_CIFAR10 = _Format(
    name="cifar10",
    title="CIFAR-10",
    folder="cifar-10-batches-py",
    classes=10,
    training=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test="test_batch",
    labels="labels",
    meta="batches.meta",
    class_names="label_names",
)
_CIFAR100 = _Format(
    name="cifar100",
    title="CIFAR-100",
    folder="cifar-100-python",
    classes=100,
    training=("train",),
    test="test",
    labels="fine_labels",
    meta="meta",
    class_names="fine_label_names",
)


def load_cifar10(root: Path | None) -> Dataset:
    """Return CIFAR-10, uint8 ``[n, 3, 32, 32]``, training images first, batch by batch.

    Parameters
    ----------
    root
        The folder with the files ``data_batch_1`` to ``data_batch_5`` and ``test_batch``, or the
        one above, in which the official archive makes the folder ``cifar-10-batches-py``.

    Raises
    ------
    UserError
        If the folder or a file is missing, or a file is damaged or not one of CIFAR-10.

    Notes
    -----
    Source and layout: as `load_cifar100`.
    """
    return _load(_CIFAR10, root)


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
    return _load(_CIFAR100, root)


def _load(form: _Format, root: Path | None) -> Dataset:
    folder = _find(form, require_root(form.name, root, "folder"))
    splits = [_read(form, folder / name) for name in (*form.training, form.test)]
    return Dataset(
        name=form.name,
        images=np.ascontiguousarray(np.concatenate([rows for rows, _ in splits])).reshape(
            -1, 3, 32, 32
        ),
        labels=np.concatenate([labels for _, labels in splits]),
        classes=form.classes,
        scale=1 / 255,
        test_start=sum(len(labels) for _, labels in splits[:-1]),
        class_names=_class_names(form, folder / form.meta),
    )


def _find(form: _Format, root: Path) -> Path:
    names = (*form.training, form.test)
    for folder in (root, root / form.folder):
        if all(kind_of(folder / name) == "file" for name in names):
            return folder
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    raise UserError(
        f"{root}: no {form.title} here (looked for {listed}, here and in {form.folder}/); unpack "
        f"the official {form.folder} archive and set data.root to its folder"
    )


def _read(form: _Format, path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    content = read_pickle(path)
    missing = [key for key in ("data", form.labels) if key not in content]
    if missing:
        found = ", ".join(repr(key[:20]) for key in sorted(content)[:8]) or "nothing"
        raise UserError(
            f"{path}: holds {found}, but no {' and no '.join(map(repr, missing))}; "
            f"expected a file of {form.title}'s Python version"
        )
    rows = content["data"]
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8:
        found = str(rows.dtype) if isinstance(rows, np.ndarray) else type(rows).__name__
        raise UserError(f"{path}: 'data' is of type {found}; expected an array of uint8")
    if rows.ndim != 2 or rows.shape[1] != _PIXELS or len(rows) == 0:
        raise UserError(
            f"{path}: 'data' has the shape {rows.shape}; expected (n, {_PIXELS}) with n > 0"
        )
    labels = _labels(form, path, content[form.labels])
    check_counts(path, len(rows), len(labels))
    return rows, labels


def _labels(form: _Format, path: Path, values: Any) -> NDArray[np.int64]:
    name, last = form.labels, form.classes - 1
    if isinstance(values, list):
        # Before NumPy sees them: it would turn strings, booleans and floats into integers.
        for value in values:
            if type(value) is not int or value.bit_length() > 62:
                kind = "huge integer" if type(value) is int else type(value).__name__
                raise UserError(f"{path}: '{name}' holds a {kind}; expected integers 0..{last}")
        values = np.array(values, np.int64)
    if not isinstance(values, np.ndarray) or values.ndim != 1 or len(values) == 0:
        raise UserError(f"{path}: '{name}' is not a list of integers; expected one per image")
    check_labels(path, values, form.classes)
    return values.astype(np.int64)


def _class_names(form: _Format, path: Path) -> tuple[str, ...] | None:
    if kind_of(path) != "file":
        return None
    names = read_pickle(path).get(form.class_names)
    if not isinstance(names, list) or len(names) != form.classes:
        raise UserError(
            f"{path}: '{form.class_names}' is no list of {form.classes} names; expected the "
            "official file: get it again, or remove it"
        )
    return tuple(n.decode("utf-8", "replace") if isinstance(n, bytes) else str(n) for n in names)
