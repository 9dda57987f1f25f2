"""FEMNIST, handwritten characters by writer, from the JSON files that LEAF makes."""

import functools
import json
import string
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from testbed.data.dataset import (
    Dataset,
    check_counts,
    check_labels,
    kind_of,
    number_users,
    require_root,
)
from testbed.errors import UserError

CLASS_NAMES = tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase)
# LEAF puts a hundred writers into a file, which makes 100 to 200 MB.
MAX_BYTES = 1 << 29
_PIXELS = 28 * 28
# Of a grey level: float32's rounding is far below, the distance of two levels far above.
_TOLERANCE = 1e-3


def load_femnist(root: Path | None) -> Dataset:
    """Return FEMNIST, uint8 ``[n, 1, 28, 28]``, and its writers as users.

    LEAF divides grey levels by 255 and writes them as decimals. They are multiplied back, exactly,
    which takes a quarter of the memory; files with other values are refused.

    Parameters
    ----------
    root
        The folder with ``train`` and ``test``, each with LEAF's files ``all_data_*.json``, or the
        one above, in which LEAF names it ``data``.

    Raises
    ------
    UserError
        If the folder or a file is missing, too large, damaged, or not one of FEMNIST.

    Notes
    -----
    Source: Caldas et al., "LEAF: A Benchmark for Federated Settings", 2018. Users are numbered in
    the order of the files (sorted by name) and within them; a user in several files is one.
    """
    folder = _find(require_root("femnist", root, "folder"))
    numbers: dict[str, int] = {}
    images, labels, users = [], [], []
    test_start = 0
    for split in ("train", "test"):
        for path in sorted((folder / split).glob("all_data_*.json")):
            for user, pixels, targets in _read(path):
                number = numbers.setdefault(user, len(numbers))
                images.append(pixels)
                labels.append(targets)
                users.append(np.full(len(targets), number))
        if split == "train":
            test_start = sum(map(len, labels))
    total = sum(map(len, labels))
    if test_start == 0:
        raise UserError(f"{folder / 'train'}: holds no sample; expected LEAF's training samples")
    start = test_start if test_start < total else None
    return Dataset(
        name="femnist",
        images=np.concatenate(images).reshape(-1, 1, 28, 28),
        labels=np.concatenate(labels),
        classes=len(CLASS_NAMES),
        scale=1 / 255,
        test_start=start,
        # A user without samples has got a number as well.
        users=number_users(np.concatenate(users), start),
        class_names=CLASS_NAMES,
    )


def _find(root: Path) -> Path:
    for folder in (root, root / "data"):
        if all(
            kind_of(folder / split) == "folder" and any((folder / split).glob("all_data_*.json"))
            for split in ("train", "test")
        ):
            return folder
    raise UserError(
        f"{root}: no FEMNIST here (looked for train/all_data_*.json and test/all_data_*.json, here "
        "and in data); make them with LEAF's preprocess.sh and set data.root to its data folder"
    )


def _read(path: Path) -> list[tuple[str, NDArray[np.uint8], NDArray[np.int64]]]:
    """Return of each user: name, pixels ``[k, 784]``, labels ``[k]``."""
    content = _parse(path)
    users, counts, data = (content.get(key) for key in ("users", "num_samples", "user_data"))
    if not (isinstance(users, list) and isinstance(counts, list) and isinstance(data, dict)):
        raise UserError(
            f"{path}: no lists 'users' and 'num_samples' and mapping 'user_data'; expected a file "
            "that LEAF wrote"
        )
    if len(users) != len(counts) or not all(isinstance(user, str) for user in users):
        raise UserError(
            f"{path}: {len(users)} users, {len(counts)} numbers of samples; expected a name and a "
            "number for each user"
        )
    parts = []
    for user, count in zip(users, counts, strict=True):
        pixels, labels = _samples(path, user, data.get(user))
        if len(labels) != count:
            raise UserError(
                f"{path}: {len(labels)} samples of user {user[:40]!r}, but 'num_samples' says "
                f"{str(count)[:20]}; get the file again"
            )
        parts.append((user, pixels, labels))
    return parts


def _parse(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: {size} bytes; expected a file of at most {MAX_BYTES} bytes")
        with path.open(encoding="utf-8") as file:
            # Few of the millions of numbers differ: shared, they take a quarter of the memory.
            shared = functools.lru_cache(maxsize=4096)(float)
            content = json.load(file, parse_float=shared, parse_constant=_refuse)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); expected a readable JSON file"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path}: damaged JSON ({reason}); expected a file that LEAF wrote: make it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected a mapping, as LEAF's")
    return content


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"the number {constant}")


def _samples(path: Path, user: str, data: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    where = f"user {user[:40]!r}"
    x, y = (data.get("x"), data.get("y")) if isinstance(data, dict) else (None, None)
    if not (isinstance(x, list) and isinstance(y, list)):
        raise UserError(f"{path}: no lists 'x' and 'y' of {where}; expected a file that LEAF wrote")
    if not y and not x:
        return np.empty((0, _PIXELS), np.uint8), np.empty(0, np.int64)
    check_counts(path, len(x), len(y))
    # Before NumPy sees them: it would turn booleans and floats into integers.
    if not all(type(label) is int and label.bit_length() <= 62 for label in y):
        raise UserError(f"{path}: 'y' of {where} holds what is no label; expected integers 0..61")
    labels = np.array(y, np.int64)
    check_labels(path, labels, len(CLASS_NAMES))
    try:
        values = np.array(x)
    except ValueError:
        values = np.empty(0)
    if values.dtype.kind not in "fi" or values.shape != (len(x), _PIXELS):
        raise UserError(f"{path}: 'x' of {where} is no list of images of {_PIXELS} numbers each")
    levels = values.clip(0, 1) * 255.0
    whole = np.rint(levels)
    if not ((values >= 0) & (values <= 1) & (np.abs(levels - whole) < _TOLERANCE)).all():
        raise UserError(
            f"{path}: 'x' of {where} holds values that are no grey level divided by 255; expected "
            "pixels as LEAF writes them, in [0, 1]"
        )
    return whole.astype(np.uint8), labels
