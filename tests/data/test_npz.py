import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traced import peak_below

from testbed.data import describe, load
from testbed.errors import UserError

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (12, 5, 4), dtype=np.uint8)
FLOATS = RNG.random((12, 3, 5, 4))
LABELS = np.arange(12) % 4


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def failure(path: Path, *expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load("npz", path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(path), *expected):
        assert part in message


def test_bytes_without_channels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", images=BYTES, labels=LABELS.astype(np.uint8))
    dataset = load("npz", path)
    np.testing.assert_array_equal(dataset.images, BYTES[:, None])
    np.testing.assert_array_equal(dataset.labels, LABELS)
    assert (dataset.classes, dataset.shape, dataset.test_start) == (4, (1, 5, 4), None)
    assert dataset.images.dtype == np.uint8
    assert dataset.labels.dtype == np.int64
    assert dataset.scale * 255 == 1
    assert describe("npz", path) == (4, (1, 5, 4))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_floats_with_channels_and_test_split(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "a.npz"
    images = FLOATS.astype(dtype)
    np.savez_compressed(
        path,
        images=np.asfortranarray(images[:9]),
        labels=LABELS[:9],
        test_images=images[9:],
        test_labels=LABELS[9:].astype(">i2"),
        classes=6,
    )
    dataset = load("npz", path)
    np.testing.assert_array_equal(dataset.images, images.astype(np.float32))
    np.testing.assert_array_equal(dataset.labels, LABELS)
    assert (dataset.classes, dataset.shape, dataset.test_start) == (6, (3, 5, 4), 9)
    assert dataset.images.dtype == np.float32
    assert dataset.scale == 1.0
    assert dataset.images.flags.c_contiguous
    assert describe("npz", path) == (6, (3, 5, 4))


def test_classes_come_from_either_split(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.npz",
        images=BYTES,
        labels=LABELS,
        test_images=BYTES[:1],
        test_labels=np.array([5]),
    )
    assert load("npz", path).classes == 6


def test_describe_reads_no_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=np.zeros((200, 400, 400), np.uint8), labels=np.arange(200) % 7)
    with peak_below(1e6):
        assert describe("npz", path) == (7, (1, 400, 400))


NAN = FLOATS.copy()
NAN[3, 1, 2, 2] = np.nan


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"images": None}, "no array named images (found: 'labels')"),
        ({"labels": None}, "no array named labels"),
        ({"images": None, "labels": None, "x": 1}, "no array named images or labels (found: 'x')"),
        ({"test_images": BYTES}, "no array named test_labels"),
        ({"test_labels": LABELS}, "no array named test_images"),
        ({"images": BYTES[0]}, "'images' has the shape (5, 4); expected (n, height, width)"),
        ({"images": BYTES[:0], "labels": LABELS[:0]}, "'images' has the shape (0, 5, 4)"),
        ({"images": BYTES[:, :0]}, "(12, 0, 4)"),
        ({"images": BYTES.astype(np.int32)}, "'images' is of type int32; expected uint8, or float"),
        ({"images": BYTES.astype(bool)}, "type bool"),
        ({"images": BYTES.astype(np.complex64)}, "type complex64"),
        ({"images": BYTES.astype(str)}, "type <U"),
        ({"images": BYTES.astype(object)}, "'images' is an array of object"),
        ({"images": np.zeros((12, 5, 4), [("a", "u1")])}, "[('a', 'u1')]"),
        ({"images": NAN}, "'images' holds NaN; expected values in [0, 1]"),
        ({"images": FLOATS + 0.5}, "'images' holds values from 0.5"),
        ({"images": -FLOATS}, "expected floats in [0, 1], or uint8"),
        ({"images": np.where(FLOATS > 0.9, np.inf, FLOATS)}, "to inf;"),
        ({"labels": LABELS[:11]}, "11 labels for 12 images"),
        ({"labels": LABELS.astype(float)}, "'labels' is float64 of shape (12,); expected integers"),
        ({"labels": LABELS.astype(object)}, "'labels' is an array of object"),
        ({"labels": LABELS[:, None]}, "'labels' is int64 of shape (12, 1)"),
        ({"labels": LABELS[:0]}, "shape (0,)"),
        ({"labels": LABELS - 1}, "holds the label -1; expected 0..2"),
        ({"labels": LABELS * 10}, "31 classes for 12 labels"),
        ({"labels": LABELS.astype(np.uint64) + np.uint64(2**63)}, "classes for 12 labels"),
        ({"labels": LABELS * 0}, "1 classes for 12 labels; expected at least 2"),
        ({"classes": 3}, "holds the label 3; expected 0..2"),
        ({"classes": -3}, "holds the label 0; expected 0..-1"),
        ({"classes": 13}, "13 classes for 12 labels"),
        ({"classes": 4.0}, "'classes' is float64 of shape (); expected one integer"),
        ({"classes": [4]}, "'classes' is int64 of shape (1,)"),
        ({"test_images": BYTES[:2], "test_labels": LABELS[:3]}, "3 labels for 2 images"),
        ({"test_images": BYTES[:2, :4], "test_labels": LABELS[:2]}, "'test_images' are uint8 of"),
        ({"test_images": FLOATS[:2], "test_labels": LABELS[:2]}, "'test_images' are float32 of"),
        ({"test_images": NAN, "test_labels": LABELS}, "'test_images' holds NaN"),
    ],
)
def test_wrong_arrays(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    arrays = {"images": BYTES, "labels": LABELS} | changes
    present = {name: array for name, array in arrays.items() if array is not None}
    failure(write(tmp_path / "a.npz", **present), expected)


def content(tmp_path: Path) -> bytearray:
    return bytearray(write(tmp_path / "good.npz", images=BYTES, labels=LABELS).read_bytes())


@pytest.mark.parametrize("damage", ["empty", "text", "pickle", "half", "pixel", "npy"])
def test_damaged_file(tmp_path: Path, damage: str) -> None:
    good = content(tmp_path)
    pixel = good.copy()
    pixel[good.index(BYTES.tobytes()) + 7] ^= 1
    npy = io.BytesIO()
    np.save(npy, BYTES)
    path = tmp_path / "a.npz"
    path.write_bytes(
        {
            "empty": b"",
            "text": b"a,b,c",
            "pickle": pickle.dumps({"images": BYTES}),
            "half": bytes(good[: len(good) // 2]),
            "pixel": bytes(pixel),
            "npy": npy.getvalue(),
        }[damage]
    )
    failure(path, "not a readable NumPy archive", "Bad CRC" if damage == "pixel" else "not a zip")


@pytest.mark.parametrize("place", [0, 1_000_000, 3_919_999])
def test_checksum_of_large_arrays_is_compared(tmp_path: Path, place: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5000, 28, 28), dtype=np.uint8)
    path = write(tmp_path / "a.npz", images=images, labels=np.arange(5000) % 4)
    raw = bytearray(path.read_bytes())
    raw[raw.index(images[:1].tobytes()) + place] ^= 1
    path.write_bytes(raw)
    failure(path, "Bad CRC-32 for file 'images.npy'")


def header(shape: str, descr: str = "'|u1'", version: int = 1) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        (header("(4000000000, 28, 28)") + b"few", "announces 3136000000128 bytes"),
        (header("(12, 5, 4)") + bytes(239), "announces"),
        (header("(12, 5, 4)") + bytes(241), "announces"),
        (header("(-12, -5, 4)") + bytes(240), "expected numbers"),
        (header("(12, 5, 4)", "'|O'") + pickle.dumps(1), "array of object"),
        (header("(12, 5, 4)", version=3), "format version (3, 0)"),
        (header("(12, 5"), "header"),
        (header("(12, 5, 4)", "__import__('os')"), "header"),
        (b"\x93NUMPY", "header"),
        (b"", "header"),
        (b"PK", "header"),
    ],
)
def test_hostile_member(tmp_path: Path, member: bytes, expected: str) -> None:
    labels = io.BytesIO()
    np.save(labels, LABELS)
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("images.npy", member)
        file.writestr("labels.npy", labels.getvalue())
    with peak_below(4e6):
        failure(path, expected)
    with pytest.raises(UserError, match=r"a\.npz"):
        describe("npz", path)


def test_directory_that_lies_about_size(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    n = 1_000_000
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images.npy", header(f"({n}, 28, 28)") + b"few")
        labels = io.BytesIO()
        np.save(labels, LABELS)
        file.writestr("labels.npy", labels.getvalue())
    raw = path.read_bytes()
    small = struct.pack("<I", len(header(f"({n}, 28, 28)")) + 3)
    lie = struct.pack("<I", len(header(f"({n}, 28, 28)")) + n * 784)
    assert raw.count(small) == 2
    path.write_bytes(raw.replace(small, lie))
    with peak_below(4e6):
        failure(path, "announces 784000128 bytes, but the archive holds 784000128 unpacked from")


def test_encrypted_and_exotic_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    raw = content(tmp_path)
    start = raw.index(b"PK\1\2")
    encrypted = raw.copy()
    encrypted[6] |= 1
    encrypted[start + 8] |= 1
    path.write_bytes(encrypted)
    failure(path, "encrypted")
    exotic = raw.copy()
    exotic[8] = exotic[start + 10] = 97
    path.write_bytes(exotic)
    failure(path, "compressed by method 97")


def test_names_with_line_breaks_stay_in_one_line(tmp_path: Path) -> None:
    failure(write(tmp_path / "a.npz", **{"a\nb": LABELS}), r"'a\nb'")
