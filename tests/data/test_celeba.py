import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from failures import refused
from official_files import CELEBA_ATTRIBUTES, write_celeba
from PIL import Image

from testbed.data import describe, load, open_dataset

ATTRIBUTES = [
    ["Blond_Hair", "Young"],
    ["Male", "Bald"],
    ["Black_Hair", "Brown_Hair"],
    ["Male"],
    ["Gray_Hair"],
    ["Black_Hair", "Male", "Wearing_Hat"],
    ["Brown_Hair", "Wavy_Hair"],
    ["Bald"],
]
IDENTITIES = [2880, 15, 15, 7, 2880, 7, 9, 4]
SPLITS = [2, 0, 0, 1, 1, 0, 0, 2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_celeba(tmp_path, ATTRIBUTES, IDENTITIES, SPLITS)
    return tmp_path


def numbers(images: np.ndarray) -> list[int]:
    """Return the numbers of the images, which are in their red channel."""
    return [round(level / 10) for level in images[:, 0].mean((1, 2))]


def test_hair_keeps_images_with_exactly_one_colour(root: Path) -> None:
    dataset = load("celeba", root)
    # Images 3 (two colours) and 4 (none) are left out; 1 and 8 are the test split.
    assert numbers(dataset.images) == [2, 5, 6, 7, 1, 8]
    assert dataset.labels.tolist() == [0, 4, 1, 3, 2, 0]
    assert dataset.class_names == ("bald", "black", "blond", "brown", "gray")
    assert (dataset.classes, dataset.test_start, dataset.shape) == (5, 4, (3, 218, 178))
    assert dataset.images.dtype == np.uint8
    # Training identities 7, 9, 15, 2880 by number; identity 4 is of the test split alone.
    assert dataset.users is not None
    assert dataset.users.tolist() == [2, 3, 0, 1, 3, 4]


def test_channels_rows_and_columns_are_in_place(root: Path) -> None:
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[:109, :, 0] = 200
    pixels[:, :89, 2] = 100
    Image.fromarray(pixels).save(root / "img_align_celeba" / "000002.jpg", quality=100)
    image = load("celeba", root).images[0].astype(int)
    assert image[:, 10, 10] == pytest.approx([200, 0, 100], abs=4)
    assert image[:, 10, 170] == pytest.approx([200, 0, 0], abs=4)
    assert image[:, 210, 10] == pytest.approx([0, 0, 100], abs=4)


def test_gender_takes_all_images(root: Path) -> None:
    dataset = load("celeba", root, "gender")
    assert numbers(dataset.images) == [2, 3, 4, 5, 6, 7, 1, 8]
    assert dataset.labels.tolist() == [1, 0, 1, 0, 1, 0, 0, 0]
    assert dataset.class_names == ("female", "male")
    assert describe("celeba", None, "gender") == (2, (3, 218, 178))


def test_identities_are_numbered_without_gaps(root: Path) -> None:
    dataset = load("celeba", root, "identity")
    assert numbers(dataset.images) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert dataset.labels.tolist() == [4, 3, 3, 1, 4, 1, 2, 0]
    assert (dataset.classes, dataset.test_start, dataset.users) == (5, None, None)
    assert describe("celeba", root, "identity") == (5, (3, 218, 178))
    assert describe("celeba", None, "identity") == (None, (3, 218, 178))
    assert describe("celeba", root / "later", "identity") == (None, (3, 218, 178))


def test_identities_need_no_attributes(root: Path) -> None:
    (root / "list_attr_celeba.txt").unlink()
    assert load("celeba", root, "identity").classes == 5
    refused("celeba", root, "no file list_attr_celeba.txt", "Anno")


def test_without_lists_of_identities_and_splits(root: Path) -> None:
    (root / "list_eval_partition.txt").unlink()
    (root / "identity_CelebA.txt").unlink()
    dataset = load("celeba", root)
    assert (dataset.test_start, dataset.users) == (None, None)
    assert numbers(dataset.images) == [1, 2, 5, 6, 7, 8]
    refused("celeba", root, "no file identity_CelebA.txt", variant="identity")


def test_a_subset_of_the_images_is_used(root: Path) -> None:
    for name in ("000001.jpg", "000008.jpg", "000005.jpg"):
        (root / "img_align_celeba" / name).unlink()
    (root / "img_align_celeba" / "999999.jpg").write_bytes(b"not listed, not read")
    data = open_dataset("celeba", root)
    assert data.load().labels.tolist() == [0, 1, 3]
    assert data.test_start is None
    assert "3 of the 8 listed images" in data.note


def test_image_of_no_known_identity_belongs_to_nobody(root: Path) -> None:
    path = root / "identity_CelebA.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:6]))
    users = load("celeba", root).users
    assert users is not None
    assert users.tolist() == [1, 2, 0, -1, 2, -1]


def test_folders_of_the_official_archives(root: Path) -> None:
    for folder, names in {
        "Anno": ("list_attr_celeba.txt", "identity_CelebA.txt"),
        "Eval": ("list_eval_partition.txt",),
        "Img": ("img_align_celeba",),
    }.items():
        (root / folder).mkdir()
        for name in names:
            shutil.move(root / name, root / folder / name)
    assert load("celeba", root).labels.tolist() == [0, 4, 1, 3, 2, 0]


ATTR, IDS, EVAL = "list_attr_celeba.txt", "identity_CelebA.txt", "list_eval_partition.txt"


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        (ATTR, lambda _text: "", "names no attribute Bald and no Black_Hair"),
        (ATTR, lambda text: "\n".join(text.splitlines()[:2]), "lists no image"),
        (ATTR, lambda text: text.replace("Gray_Hair", "Grey_Hair"), "no attribute Gray_Hair"),
        (ATTR, lambda text: text[:-4], "line 10 is not a file name and 40 values"),
        (ATTR, lambda text: text.replace("1 ", "2 "), "is not a file name and 40 values"),
        (ATTR, lambda text: text.replace(".jpg", ".png"), "none of the 8 images"),
        (ATTR, lambda text: text[:-1].rsplit("\n", 1)[0], "lists 7 images, its first line annou"),
        (ATTR, lambda text: text.split("\n", 1)[1], "first line is not the number of images"),
        (ATTR, lambda text: "9" * 5000 + text, "first line is not the number of images"),
        (
            ATTR,
            lambda text: text.replace("8.jpg", "7.jpg"),
            "lists 000007.jpg 2 times; expected on",
        ),
        (EVAL, lambda text: text + "000003.jpg 2\n", "lists 000003.jpg 2 times"),
        (IDS, lambda text: text + "000003.jpg 15\n", "lists 000003.jpg 2 times"),
        (EVAL, lambda text: text.replace("4.jpg 1", "4.jpg 3"), "line 4 is not a file name and 0"),
        (EVAL, lambda text: text.replace("4.jpg 1", "4.jpg"), "line 4 is not"),
        (EVAL, lambda text: text.replace("4.jpg 1", "4.jpg -1"), "line 4 is not"),
        (EVAL, lambda text: text.replace("000006.jpg 0\n", ""), "does not list 000006.jpg"),
        (EVAL, lambda text: text.replace(" 0", " 2").replace(" 1", " 2"), "add training images"),
        (EVAL, lambda _text: "", "lists no image"),
        (IDS, lambda text: text.replace("2880", "9" * 5000), "line 1 is not a file name and an id"),
        (IDS, lambda text: text.replace("2880", "two"), "line 1 is not a file name and an id"),
    ],
)
def test_damaged_list(root: Path, file: str, change: Callable[[str], str], expected: str) -> None:
    path = root / file
    path.write_text(change(path.read_text()))
    refused("celeba", root, expected)


def test_list_of_a_part_with_its_own_count(root: Path) -> None:
    path = root / ATTR
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["5", *lines[1:7]]))
    assert numbers(load("celeba", root, "gender").images) == [2, 3, 4, 5, 1]


def test_list_that_is_no_text(root: Path) -> None:
    (root / ATTR).write_bytes(b"\xff\xfe\0" * 100)
    refused("celeba", root, "not text")


def test_names_lead_nowhere_else(root: Path) -> None:
    shutil.copy(root / "img_align_celeba" / "000001.jpg", root / "outside.jpg")
    path = root / ATTR
    path.write_text(path.read_text().replace("000001.jpg", "../outside.jpg"))
    assert len(open_dataset("celeba", root, "gender").labels) == 7


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "not a readable image"),
        (lambda path: path.write_bytes(b"<html>"), "not a readable image"),
        (lambda path: path.write_bytes(b""), "not a readable image"),
        (lambda path: Image.new("RGB", (178, 218)).save(path, "PNG"), "not a readable image"),
        (
            lambda path: Image.new("RGB", (409, 687)).save(path),
            "409x687 pixels, RGB; expected 178x218 pixels, RGB",
        ),
        (lambda path: Image.new("L", (178, 218)).save(path), "178x218 pixels, grey; expected"),
        (lambda path: Image.new("CMYK", (178, 218)).save(path), "pixels of the kind CMYK"),
    ],
)
def test_damaged_image(root: Path, make: Callable[[Path], object], expected: str) -> None:
    path = root / "img_align_celeba" / "000005.jpg"
    make(path)
    refused("celeba", root, str(path), expected)


def test_limit_reads_only_what_is_kept(root: Path) -> None:
    attributes = [["Bald"], ["Gray_Hair"]] * 10
    other = root / "more"
    other.mkdir()
    names = write_celeba(other, attributes)
    read = set(numbers(load("celeba", other, limit=4).images))
    assert len(read) == 4
    for number, name in enumerate(names, 1):
        if number not in read:
            (other / "img_align_celeba" / name).write_bytes(b"damaged")
    assert load("celeba", other, limit=4).labels.tolist() == [0, 4, 0, 4]


def test_without_pillow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused("celeba", root, "Pillow", "pip install")


def test_attributes_are_the_official_ones() -> None:
    # Of the colours, as the reference code of Wainakh et al. numbers them from 0.
    colours = [CELEBA_ATTRIBUTES[i] for i in (4, 8, 9, 11, 17)]
    assert colours == ["Bald", "Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair"]
    assert len(CELEBA_ATTRIBUTES) == 40
