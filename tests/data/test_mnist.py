import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from official_files import MNIST_NAMES, digits_like, idx_bytes, write_mnist
from traced import peak_below

from testbed.data import load
from testbed.errors import UserError

IMAGES, LABELS = MNIST_NAMES[:2]


def failure(root: Path, *expected: str) -> str:
    with pytest.raises(UserError) as caught:
        load("mnist", root)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message
    return message


@pytest.mark.parametrize("compressed", [False, True])
def test_reads_official_files(tmp_path: Path, compressed: bool) -> None:
    write_mnist(tmp_path, 30, 20, compressed=compressed)
    dataset = load("mnist", tmp_path)
    train, train_labels = digits_like(30, 1)
    test, test_labels = digits_like(20, 2)
    np.testing.assert_array_equal(dataset.images[:30, 0], train)
    np.testing.assert_array_equal(dataset.images[30:, 0], test)
    np.testing.assert_array_equal(dataset.labels, [*train_labels, *test_labels])
    assert (dataset.name, dataset.classes, dataset.test_start) == ("mnist", 10, 30)
    assert dataset.shape == (1, 28, 28)
    assert dataset.images.dtype == np.uint8
    assert dataset.labels.dtype == np.int64
    assert dataset.images.flags.c_contiguous
    assert dataset.scale * 255 == 1


def test_reads_dotted_names_and_any_suffix(tmp_path: Path) -> None:
    write_mnist(tmp_path, compressed=True)
    for name in MNIST_NAMES:
        (tmp_path / f"{name}.gz").rename(tmp_path / name.replace("-idx", ".idx"))
    assert len(load("mnist", tmp_path).images) == 50


def test_missing_file_says_what_was_looked_for(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / LABELS).unlink()
    names = (LABELS, f"{LABELS}.gz", "train-labels.idx1-ubyte", "train-labels.idx1-ubyte.gz")
    failure(tmp_path, str(tmp_path), *names, "data.root")


def test_folder_in_place_of_file_is_missing(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / LABELS).unlink()
    (tmp_path / LABELS).mkdir()
    failure(tmp_path, f"no file {LABELS}")


def test_file_as_root(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    failure(tmp_path / LABELS, "is a file", "path of a folder")


images, labels = digits_like(30, 1)
GOOD = {IMAGES: idx_bytes(images), LABELS: idx_bytes(labels)}


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


# The time in it would give the tests other names from second to second.
PACKED = gzip.compress(GOOD[LABELS], mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (IMAGES, b"", "is empty"),
        (IMAGES, b"\0\0", "begins with 00 00; expected an IDX file, which begins with 00 00 08 03"),
        (IMAGES, b"PK\3\4 a zip file", "begins with 50 4b 03 04"),
        (IMAGES, b"<!DOCTYPE html>", "begins with 3c 21 44 4f"),
        (IMAGES, GOOD[LABELS], "array of 1 dimensions; expected 3"),
        (LABELS, GOOD[IMAGES], "array of 3 dimensions; expected 1"),
        (IMAGES, idx_bytes(images.astype(np.float32)), "type 0x0d (32-bit float); expected 0x08"),
        (IMAGES, b"\0\0\x42\3" + GOOD[IMAGES][4:], "type 0x42 (unknown)"),
        (IMAGES, GOOD[IMAGES][:9], "ends inside its header"),
        (
            IMAGES,
            GOOD[IMAGES][:-1],
            "truncated: 23519 bytes of data, but its header announces 23520",
        ),
        (IMAGES, GOOD[IMAGES] + b"\0", "more data than the 23520 bytes"),
        (IMAGES, idx_bytes(images[:, :27]), "30 x 27 x 28; expected n x 28 x 28"),
        (IMAGES, idx_bytes(images[:0]), "0 x 28 x 28; expected n x 28 x 28 with n > 0"),
        (LABELS, idx_bytes(labels[:29]), "29 labels for 30 images"),
        (LABELS, idx_bytes(labels + np.uint8(1)), "holds the label 10; expected 0..9"),
        (LABELS, GOOD[LABELS][:-3], "truncated: 27 bytes"),
        (LABELS, PACKED[:-9], "damaged gzip data"),
        (LABELS, flipped(PACKED, 12), "damaged gzip data"),
        (LABELS, flipped(PACKED, len(PACKED) - 8), "CRC"),
        (LABELS, PACKED + b"more", "damaged gzip data"),
        (LABELS, gzip.compress(GOOD[LABELS] + b"more", mtime=0), "more data than the 30 bytes"),
        (LABELS, b"\x1f\x8b", "damaged gzip data"),
    ],
)
def test_damaged_file(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    write_mnist(tmp_path)
    (tmp_path / name).write_bytes(content)
    failure(tmp_path, str(tmp_path / name), expected)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path)

    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    failure(tmp_path, str(tmp_path / IMAGES), "cannot be read (Permission denied)")


def plain(content: bytes) -> bytes:
    return content


@pytest.mark.parametrize("pack", [plain, gzip.compress])
def test_absurd_header_allocates_nothing(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    write_mnist(tmp_path)
    huge = b"\0\0\x08\x03" + b"\xff\xff\xff\xff" + (28).to_bytes(4, "big") * 2 + b"few bytes"
    (tmp_path / IMAGES).write_bytes(pack(huge))
    with peak_below(8e6):
        failure(tmp_path, "truncated: 9 bytes of data, but its header announces 3367254359")


def test_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    bomb = gzip.compress(GOOD[LABELS] + bytes(50_000_000), compresslevel=1)
    assert len(bomb) < 1_000_000
    (tmp_path / LABELS).write_bytes(bomb)
    with peak_below(8e6):
        failure(tmp_path, "more data than the 30 bytes")


def test_real_mnist(data_root: Path) -> None:
    dataset = load("mnist", data_root / "mnist")
    assert dataset.images.shape == (70_000, 1, 28, 28)
    assert dataset.test_start == 60_000
    assert dataset.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert dataset.labels[60_000:60_005].tolist() == [7, 2, 1, 0, 4]
    # The published counts of the test split and mean of the training pixels.
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(dataset.labels[60_000:]).tolist() == counts
    assert dataset.images[:60_000].mean() * dataset.scale == pytest.approx(0.1307, abs=5e-5)
