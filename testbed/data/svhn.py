"""SVHN with cropped digits, from its official MATLAB files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from testbed.data.dataset import Dataset, check_counts, check_labels, kind_of, require_root
from testbed.data.matlab import Variable, read_variables
from testbed.errors import UserError

_FILES = ("train_32x32.mat", "test_32x32.mat")
_IMAGE = (32, 32, 3)
# Deflate, which MATLAB's format uses, cannot do better than 1032 to 1.
_MAX_RATIO = 1040
_NUMBERS = frozenset("int8 uint8 int16 uint16 int32 uint32 int64 uint64 single double".split())  # noqa: SIM905


def load_svhn(root: Path | None) -> Dataset:
    """Return SVHN's cropped digits, uint8 ``[n, 3, 32, 32]``, training images first.

    Parameters
    ----------
    root
        The folder with ``train_32x32.mat`` and ``test_32x32.mat``; ``extra_32x32.mat`` is not
        read.

    Raises
    ------
    UserError
        If the folder or a file is missing, damaged, or not one of SVHN.

    Notes
    -----
    Source: Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning",
    2011, format 2. ``X`` is ``[32, 32, 3, n]``, ``y`` ``[n, 1]``, and the digit 0 has the label 10.
    """
    folder = require_root("svhn", root, "folder")
    if missing := [name for name in _FILES if kind_of(folder / name) != "file"]:
        raise UserError(
            f"{folder}: no file {' and no file '.join(missing)} (looked for {' and '.join(_FILES)})"
            "; set data.root to the folder with the official files of cropped digits (format 2)"
        )
    splits = [_read(folder / name) for name in _FILES]
    return Dataset(
        name="svhn",
        images=np.concatenate([images for images, _ in splits]),
        labels=np.concatenate([labels for _, labels in splits]),
        classes=10,
        scale=1 / 255,
        test_start=len(splits[0][0]),
        class_names=tuple("0123456789"),
    )


def _read(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        found = read_variables(path)
        _check_header(path, found)
        # The header's type and that of the stored numbers are two fields of the file.
        if found["X"].stored_type() != np.uint8:
            raise UserError(
                f"{path}: 'X' holds {found['X'].stored_type()}, but its header says uint8: get the "
                "file again"
            )
        images, labels = found["X"].values(), found["y"].values().ravel()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path}: not a readable MATLAB file ({reason}); expected the official one of SVHN "
            "(version 5): get it again"
        ) from error
    check_counts(path, images.shape[3], len(labels))
    whole = np.isfinite(labels) & (labels == np.rint(labels))
    if found["y"].is_complex or not whole.all():
        raise UserError(f"{path}: 'y' holds labels that are not whole; expected 1..10")
    check_labels(path, labels, 10, first=1)
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), labels.astype(np.int64) % 10


def _check_header(path: Path, found: Mapping[str, Variable]) -> None:
    """Refuse a file by the names, shapes and types in it, before memory is given to them."""
    if missing := [name for name in ("X", "y") if name not in found]:
        names = ", ".join(repr(name[:20]) for name in sorted(found)[:8]) or "nothing"
        raise UserError(
            f"{path}: holds {names}, but no {' and no '.join(map(repr, missing))}; expected a file "
            "of SVHN's cropped digits (format 2)"
        )
    shape, kind = found["X"].shape, found["X"].kind
    if kind != "uint8" or len(shape) != 4 or shape[:3] != _IMAGE or shape[3] < 1:
        raise UserError(
            f"{path}: 'X' is {kind} of shape {shape}; expected uint8 of shape (32, 32, 3, n)"
        )
    if shape[3] * 3072 > _MAX_RATIO * path.stat().st_size:
        raise UserError(
            f"{path}: 'X' announces {shape[3]} images, more than a file of its size can hold: "
            "get it again"
        )
    shape, kind = found["y"].shape, found["y"].kind
    if kind not in _NUMBERS or len(shape) != 2 or shape[1] != 1:
        raise UserError(f"{path}: 'y' is {kind} of shape {shape}; expected numbers of shape (n, 1)")
    check_counts(path, found["X"].shape[3], shape[0])
