"""CelebA with hair colour, gender or identity as labels, from its official files."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from testbed.data.dataset import kind_of, number_users, require_root
from testbed.data.lazy import LazyDataset, read_each
from testbed.data.pictures import read_picture
from testbed.errors import UserError

HAIR = ("bald", "black", "blond", "brown", "gray")
GENDERS = ("female", "male")
SHAPE = (3, 218, 178)
"""Of the aligned and cropped images."""
VARIANTS = ("hair", "gender", "identity")
_COLUMNS = {
    "hair": ("Bald", "Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair"),
    "gender": ("Male",),
}
_IMAGES, _ATTRIBUTES = "img_align_celeba", "list_attr_celeba.txt"
_IDENTITIES, _PARTITION = "identity_CelebA.txt", "list_eval_partition.txt"
# Where the official archives, unpacked side by side, and torchvision put the files.
_PLACES = ("", "Anno", "Eval", "Img", "celeba")
_FORMATS = ("JPEG",)
# The largest official list has 27 MB.
_MAX_BYTES = 1 << 28


def open_celeba(root: Path | None, variant: str) -> LazyDataset:
    """Return CelebA's aligned and cropped images, uint8 ``[n, 3, 218, 178]``, training first.

    Images that are listed but not there are left out, and so are files that are not listed. The
    official split is followed where its list is there (training and validation images are one).
    Identities are the users where their list is there.

    Parameters
    ----------
    root
        The folder with ``img_align_celeba`` and the lists ``list_attr_celeba.txt``,
        ``identity_CelebA.txt`` and ``list_eval_partition.txt``, or with the folders ``Img``,
        ``Anno`` and ``Eval``, or ``celeba``, in which these are.
    variant
        ``"hair"``: bald, black, blond, brown, gray; only the images with exactly one of these
        attributes, as Wainakh et al. (PETS 2022). ``"gender"``: female 0, male 1. ``"identity"``:
        identities numbered without gaps; no official test split, since no identity is in two
        splits, and no users.

    Raises
    ------
    UserError
        If a file or every image is missing, or a list is damaged; on reading the images, if one
        is damaged or of another size.

    Notes
    -----
    Source: Liu et al., "Deep Learning Face Attributes in the Wild", ICCV 2015.
    """
    folder = require_root("celeba", root, "folder")
    listing = _require(folder, _IDENTITIES if variant == "identity" else _ATTRIBUTES)
    names, labels = _labels(listing, variant)
    where = _require(folder, _IMAGES, "folder")
    there = {path.name for path in where.iterdir()}
    kept = [i for i, name in enumerate(names) if labels[i] >= 0 and name in there]
    if not kept:
        raise UserError(
            f"{where}: none of the {len(names)} images that {listing} lists; expected the aligned "
            f"and cropped images, {names[0]} and so on"
        )
    used = [names[i] for i in kept]
    labels = labels[kept]
    test_start, users, class_names = None, None, {"hair": HAIR, "gender": GENDERS}.get(variant)
    if variant == "identity":
        labels = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    else:
        order, test_start = _split(_find(folder, _PARTITION), used)
        used, labels = [used[i] for i in order], labels[order]
        users = _users(_find(folder, _IDENTITIES), used, test_start)
    return LazyDataset(
        name="celeba",
        labels=labels,
        classes=len(class_names) if class_names else int(labels.max()) + 1,
        scale=1 / 255,
        test_start=test_start,
        shape=SHAPE,
        dtype=np.dtype(np.uint8),
        read=read_each(
            [where / name for name in used], SHAPE, lambda path: read_picture(path, SHAPE, _FORMATS)
        ),
        users=users,
        class_names=class_names,
        variant=variant,
        note=f"{len(used)} of the {len(names)} listed images are used: those that are there"
        + (", with exactly one of the hair colours" if variant == "hair" else ""),
    )


def _find(root: Path, name: str, kind: str = "file") -> Path | None:
    candidates = [root / place / name for place in _PLACES]
    # The archive of the images, unpacked by some tools, makes its folder twice.
    if kind == "folder":
        candidates = [inner for path in candidates for inner in (path / name, path)]
    return next((path for path in candidates if kind_of(path) == kind), None)


def _require(root: Path, name: str, kind: str = "file") -> Path:
    path = _find(root, name, kind)
    if path is None:
        raise UserError(
            f"{root}: no {kind} {name} (looked for it here and in {', '.join(_PLACES[1:])}); set "
            f"data.root to the folder with CelebA's {_IMAGES}, unpacked, and its lists"
        )
    return path


def _labels(path: Path, variant: str) -> tuple[list[str], NDArray[np.int64]]:
    """Return the listed file names and their labels, -1 for an image to be left out."""
    if variant == "identity":
        return _pairs(path, lambda value: value >= 0, "an identity")
    lines = _lines(path)
    count = next(lines, (1, ["0"]))[1]
    if len(count) != 1 or not count[0].isdecimal() or len(count[0]) > 9:
        raise UserError(
            f"{path}: its first line is not the number of images; expected CelebA's {_ATTRIBUTES}"
        )
    header = next(lines, (2, [""]))[1]
    wanted = _COLUMNS[variant]
    if missing := [column for column in wanted if column not in header]:
        raise UserError(
            f"{path}: its second line names no attribute {' and no '.join(missing)}; expected "
            f"CelebA's {_ATTRIBUTES}"
        )
    columns = [1 + header.index(column) for column in wanted]
    names, rows = [], []
    for number, words in lines:
        values = [words[c] for c in columns] if len(words) == 1 + len(header) else []
        if not values or not {"1", "-1"}.issuperset(values):
            raise UserError(
                f"{path}: line {number} is not a file name and {len(header)} values 1 or -1; get "
                "the file again"
            )
        names.append(words[0])
        rows.append([value == "1" for value in values])
    _check_names(path, names)
    if len(names) < int(count[0]):
        raise UserError(
            f"{path}: lists {len(names)} images, its first line announces {count[0]}: get the file "
            "again, or, if it is to list a part of the images, put their number there"
        )
    has = np.array(rows)
    if variant == "gender":
        return names, has[:, 0].astype(np.int64)
    return names, np.where(has.sum(1) == 1, has.argmax(1), -1)


def _split(path: Path | None, names: list[str]) -> tuple[NDArray[np.int64], int | None]:
    """Return an order of the images, the training images first, and their number."""
    if path is None:
        return np.arange(len(names)), None
    split = _values(path, names, lambda value: value in (0, 1, 2), "0, 1 or 2")
    if (split < 0).any():
        raise UserError(
            f"{path}: does not list {names[int(split.argmin())]}; expected the split of every image"
        )
    test = split == 2
    if test.all():
        raise UserError(f"{path}: all images that are there are test images; add training images")
    return np.argsort(test, kind="stable"), int((~test).sum()) if test.any() else None


def _users(path: Path | None, names: list[str], start: int | None) -> NDArray[np.int64] | None:
    if path is None:
        return None
    keys = _values(path, names, lambda value: value >= 0, "an identity")
    return number_users(keys, start)


def _values(
    path: Path, names: list[str], accepted: Callable[[int], bool], wanted: str
) -> NDArray[np.int64]:
    """Return the integers that a list has for file names; -1 for a name that it has not."""
    listed, values = _pairs(path, accepted, wanted)
    known = dict(zip(listed, values.tolist(), strict=True))
    return np.array([known.get(name, -1) for name in names], np.int64)


def _pairs(
    path: Path, accepted: Callable[[int], bool], wanted: str
) -> tuple[list[str], NDArray[np.int64]]:
    names, values = [], []
    for number, words in _lines(path):
        right = len(words) == 2 and words[1].isdecimal() and len(words[1]) <= 9
        if not right or not accepted(int(words[1])):
            raise UserError(
                f"{path}: line {number} is not a file name and {wanted}; get the file again"
            )
        names.append(words[0])
        values.append(int(words[1]))
    _check_names(path, names)
    return names, np.array(values, np.int64)


def _check_names(path: Path, names: list[str]) -> None:
    if not names:
        raise UserError(f"{path}: lists no image; expected the official file: get it again")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UserError(f"{path}: lists {name} {times} times; expected once: get the file again")


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield number and words of the lines that are not empty."""
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise UserError(f"{path}: {size} bytes; expected a list of at most {_MAX_BYTES} bytes")
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if words := line.split():
                    yield number, words
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"{path}: cannot be read ({reason}); expected a list of images") from error
