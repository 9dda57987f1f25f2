import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from failures import refused
from official_files import write_picture
from PIL import Image
from traced import peak_below

from testbed.data import describe, load

RNG = np.random.default_rng(3)
RGB = RNG.integers(0, 256, (8, 5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (4, 6, 6), dtype=np.uint8)


def test_classes_are_the_sorted_folders(tmp_path: Path) -> None:
    files = ("dog/b.png", "dog/a.bmp", "cat/x.PNG", "cat/y.tif", "ant/1.ppm")
    for file, pixels in zip(files, RGB[:5], strict=True):
        write_picture(tmp_path / file, pixels)
    (tmp_path / "dog" / "notes.txt").write_text("left out")
    (tmp_path / "dog" / ".hidden.png").write_text("left out")
    (tmp_path / ".git").mkdir()
    dataset = load("images", tmp_path)
    assert dataset.class_names == ("ant", "cat", "dog")
    assert dataset.labels.tolist() == [0, 1, 1, 2, 2]
    order = [files.index(f) for f in ("ant/1.ppm", "cat/x.PNG", "cat/y.tif", "dog/a.bmp")]
    order.append(files.index("dog/b.png"))
    np.testing.assert_array_equal(dataset.images, RGB[order].transpose(0, 3, 1, 2))
    assert (dataset.classes, dataset.test_start, dataset.shape) == (3, None, (3, 5, 7))
    assert describe("images", tmp_path) == (3, (3, 5, 7))


def test_train_and_test_folders(tmp_path: Path) -> None:
    for file, pixels in zip(
        ("train/b/1.png", "train/a/1.pgm", "test/b/2.png", "val/c/3.png"), GREY, strict=True
    ):
        write_picture(tmp_path / file, pixels)
    dataset = load("images", tmp_path)
    np.testing.assert_array_equal(dataset.images, GREY[[1, 0, 2], None])
    assert dataset.labels.tolist() == [0, 1, 1]
    assert (dataset.class_names, dataset.test_start) == (("a", "b"), 2)


def test_jpeg_and_palette_are_rgb(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (250, 0, 0)).save(write(tmp_path / "a" / "1.jpg"), quality=100)
    Image.new("RGB", (4, 4), (0, 0, 250)).quantize().save(write(tmp_path / "b" / "1.png"))
    images = load("images", tmp_path).images.astype(int)
    assert images[0, :, 0, 0] == pytest.approx([250, 0, 0], abs=5)
    assert images[1, :, 0, 0].tolist() == [0, 0, 250]


def test_black_and_white_is_grey(tmp_path: Path) -> None:
    Image.new("1", (4, 4), 1).save(write(tmp_path / "a" / "1.png"))
    Image.new("L", (4, 4), 7).save(write(tmp_path / "b" / "1.png"))
    assert load("images", tmp_path).images[:, 0, 0, 0].tolist() == [255, 7]


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_describe_before_there_is_a_folder(tmp_path: Path) -> None:
    assert describe("images", None) == (None, None)
    assert describe("images", tmp_path / "later") == (None, None)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda path: Image.new("RGB", (5, 7)).save(path),
            "5x7 pixels, RGB; expected 7x5 pixels, RGB",
        ),
        (lambda path: Image.new("L", (7, 5)).save(path), "7x5 pixels, grey; expected"),
        (lambda path: Image.new("RGBA", (7, 5)).save(path), "without transparency"),
        (lambda path: Image.new("I;16", (7, 5)).save(path), "kind I;16; expected grey or RGB"),
        (lambda path: path.write_bytes(b"text"), "not a readable image"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "not a readable image"),
        (lambda path: Image.new("RGB", (7, 5)).save(path, "GIF"), "not a readable image"),
        (
            lambda path: (path.unlink(), path.symlink_to("nowhere")),
            "not a readable image (No such file",
        ),
    ],
)
def test_the_image_that_differs_is_named(
    tmp_path: Path, make: Callable[[Path], object], expected: str
) -> None:
    for file, pixels in zip(("a/1.png", "a/2.png", "b/1.png"), RGB[:3], strict=True):
        write_picture(tmp_path / file, pixels)
    path = tmp_path / "b" / "1.png"
    make(path)
    refused("images", tmp_path, str(path), expected)


def test_huge_image_is_refused_by_its_header(tmp_path: Path) -> None:
    write_picture(tmp_path / "a" / "1.png", RGB[0])
    content = bytearray((tmp_path / "a" / "1.png").read_bytes())
    content[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    write(tmp_path / "b" / "1.png").write_bytes(content)
    refused("images", tmp_path, str(tmp_path / "b" / "1.png"))


def test_folders_that_are_no_classes(tmp_path: Path) -> None:
    refused("images", tmp_path, "0 folders with images", "the folder is empty")
    write_picture(tmp_path / "a" / "1.png", RGB[0])
    refused("images", tmp_path, "1 folders with images", "at least 2 classes")
    (tmp_path / "b").mkdir()
    refused("images", tmp_path, f"{tmp_path / 'b'}: no image")
    write_picture(tmp_path / "b" / "1.png", RGB[1])
    (tmp_path / "b" / "more").mkdir()
    refused("images", tmp_path, f"{tmp_path / 'b' / 'more'}: a folder in the folder of the class")


def test_class_in_test_only(tmp_path: Path) -> None:
    for file in ("train/a/1.png", "train/b/1.png", "test/c/1.png"):
        write_picture(tmp_path / file, RGB[0])
    refused("images", tmp_path, str(tmp_path / "test" / "c"), "without training images")


def test_pictures_of_too_many_pixels_are_refused_undecoded(tmp_path: Path) -> None:
    # 150 million pixels in 20 kB.
    for label in ("a", "b"):
        write_picture(tmp_path / "small" / label / "0.png", RGB[0])
        (tmp_path / "large" / label).mkdir(parents=True)
        Image.new("1", (15_000, 10_000)).save(tmp_path / "large" / label / "0.png")
    load("images", tmp_path / "small")  # imports what it needs
    with peak_below(8e6):
        refused(
            "images", tmp_path / "large", "0.png: 15000x10000 pixels; expected at most 16777216"
        )
