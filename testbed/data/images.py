"""A user's own images in folders, one folder for each class."""

from pathlib import Path

import numpy as np

from testbed.data.dataset import kind_of, require_root
from testbed.data.lazy import LazyDataset, read_each
from testbed.data.pictures import picture_shape, read_picture
from testbed.errors import UserError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".pnm", ".bmp", ".tif", ".tiff", ".webp"}
)
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")


def open_images(root: Path | None) -> LazyDataset:
    """Return the images that lie in folders, uint8, 1 channel if the first is grey, 3 if RGB.

    Parameters
    ----------
    root
        The folder with a folder of image files for each class, or with such a folder ``train`` and
        one ``test`` (others beside these two are left out). Classes are numbered, and images
        ordered, by name. Hidden files, and files whose suffix is not one of `SUFFIXES`, are left
        out.

    Raises
    ------
    UserError
        If there are fewer than two classes, a class without images, or one in ``test`` only; and,
        on reading the images, if one is damaged, or differs from the first in size or colour.

    Notes
    -----
    The layout is that of torchvision's ``ImageFolder``, but for folders in the class folders,
    which are refused.
    """
    folder = require_root("images", root, "folder")
    split = kind_of(folder / "train") == "folder" and bool(_folders(folder / "train"))
    classes = _classes(folder / "train" if split else folder)
    if len(classes) < 2:
        raise UserError(
            f"{folder}: {len(classes)} folders with images (looked for CLASS/*.png and so on, and "
            "for train/CLASS and test/CLASS); expected a folder for each of at least 2 classes"
        )
    names = sorted(classes)
    parts = [classes]
    if split and kind_of(folder / "test") == "folder":
        parts.append(_classes(folder / "test"))
        if unknown := sorted(parts[1].keys() - classes.keys()):
            raise UserError(
                f"{folder / 'test' / unknown[0]}: a class without training images; expected the "
                "classes of train"
            )
    paths = [path for part in parts for name in names for path in part.get(name, ())]
    sizes = [len(part.get(name, ())) for part in parts for name in names]
    training = sum(sizes[: len(names)])
    shape = picture_shape(paths[0], _FORMATS)
    return LazyDataset(
        name="images",
        labels=np.repeat(np.tile(np.arange(len(names)), len(parts)), sizes),
        classes=len(names),
        scale=1 / 255,
        test_start=training if training < len(paths) else None,
        shape=shape,
        dtype=np.dtype(np.uint8),
        read=read_each(paths, shape, lambda path: read_picture(path, shape, _FORMATS)),
        class_names=tuple(names),
    )


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be looked at ({error.strerror}); expected a readable folder"
        ) from error


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Return the image files by class; nothing where no folder holds images."""
    inner = _folders(folder)
    classes = {
        each.name: sorted(
            path
            for path in each.iterdir()
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        )
        for each in inner
    }
    if not any(classes.values()):
        return {}
    for each in inner:
        if deeper := _folders(each):
            raise UserError(
                f"{deeper[0]}: a folder in the folder of the class {each.name!r}; expected image "
                "files there, and data.root with a folder for each class, or with train and test"
            )
        if not classes[each.name]:
            raise UserError(
                f"{each}: no image (looked for {', '.join(sorted(SUFFIXES))}); remove the folder, "
                "or add images"
            )
    return classes
