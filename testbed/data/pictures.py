"""Decodes image files, one at a time."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from testbed.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

# A few bytes can stand for many times as many.
_MOST_PIXELS = 1 << 24
_CHANNELS = {"1": 1, "L": 1, "P": 3, "RGB": 3}


def picture_shape(path: Path, formats: tuple[str, ...]) -> tuple[int, int, int]:
    """Return (channels, height, width) of an image file, without decoding it.

    Raises
    ------
    UserError
        As `read_picture`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(path, formats)
        with image:
            return _shape(path, image)


def read_picture(
    path: Path, shape: tuple[int, int, int], formats: tuple[str, ...]
) -> NDArray[np.uint8]:
    """Return an image as uint8 ``[channels, height, width]``.

    Parameters
    ----------
    path
        The file.
    shape
        What it must have; checked before memory is given to the pixels.
    formats
        Pillow's names of the formats that are accepted.

    Raises
    ------
    UserError
        If Pillow is missing, or the file cannot be read, is damaged, is in another format, is
        neither grey nor RGB with 8 bits, or has another shape.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(path, formats) as image:
            found = _shape(path, image)
            if found != shape:
                raise UserError(
                    f"{path}: {_words(found)}; expected {_words(shape)}, as the data set's first: "
                    "make all images alike"
                )
            try:
                pixels = np.asarray(image.convert("L" if shape[0] == 1 else "RGB"))
            # A damaged file can fail in any way that its decoder can.
            except Exception as error:
                raise _damaged(path, error) from error
    return pixels[None] if shape[0] == 1 else pixels.transpose(2, 0, 1)


def _open(path: Path, formats: tuple[str, ...]) -> "Image":
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(
            f"image files are read with Pillow, which cannot be imported ({error}); "
            "install it with: pip install pillow"
        ) from error
    try:
        return Image.open(path, formats=formats)
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) else None
    reason = (reason or " ".join(str(error).split()) or type(error).__name__).replace(f"{path}", "")
    return UserError(f"{path}: not a readable image ({reason[:120]}); get the file again")


def _shape(path: Path, image: "Image") -> tuple[int, int, int]:
    if image.mode not in _CHANNELS:
        raise UserError(
            f"{path}: pixels of the kind {image.mode}; expected grey or RGB with 8 bits, without "
            "transparency: convert the image"
        )
    if image.height * image.width > _MOST_PIXELS:
        raise UserError(
            f"{path}: {image.width}x{image.height} pixels; expected at most {_MOST_PIXELS} "
            "altogether: scale the images down"
        )
    return _CHANNELS[image.mode], image.height, image.width


def _words(shape: tuple[int, int, int]) -> str:
    channels, height, width = shape
    return f"{width}x{height} pixels, {'grey' if channels == 1 else 'RGB'}"
