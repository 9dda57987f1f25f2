from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from failures import refused
from official_files import svhn_arrays, write_svhn
from scipy import io
from traced import peak_below

from testbed.data import load


def test_reads_official_files(tmp_path: Path) -> None:
    write_svhn(tmp_path, 30, 20)
    (tmp_path / "extra_32x32.mat").write_bytes(b"not read")
    dataset = load("svhn", tmp_path)
    assert dataset.images.shape == (50, 3, 32, 32)
    assert (dataset.classes, dataset.test_start) == (10, 30)
    for seed, part in enumerate((slice(30), slice(30, None))):
        stored = svhn_arrays(30 - 10 * seed, seed)
        for i, image in enumerate(dataset.images[part]):
            for channel in range(3):
                np.testing.assert_array_equal(image[channel], stored["X"][:, :, channel, i])
        # The digit 0 is stored as 10.
        digits = [0 if label == 10 else label for label in stored["y"][:, 0]]
        assert dataset.labels[part].tolist() == digits
    assert dataset.images.flags.c_contiguous
    assert dataset.labels.dtype == np.int64


def test_labels_as_matlabs_double(tmp_path: Path) -> None:
    write_svhn(tmp_path)
    arrays: dict[str, Any] = svhn_arrays(20, 1)
    arrays["y"] = arrays["y"].astype(float)
    io.savemat(tmp_path / "test_32x32.mat", arrays)
    assert load("svhn", tmp_path).labels[30:33].tolist() == [1, 2, 3]


def test_missing_file(tmp_path: Path) -> None:
    write_svhn(tmp_path)
    (tmp_path / "test_32x32.mat").unlink()
    refused("svhn", tmp_path, "no file test_32x32.mat", "cropped digits (format 2)")


X, Y = svhn_arrays(20, 1).values()
LABELS = Y.astype(float)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"X": X}, "holds 'X', but no 'y'"),
        ({"digitStruct": Y}, "holds 'digitStruct', but no 'X' and no 'y'"),
        ({"X": X, "y": Y[:-1]}, "19 labels for 20 images"),
        ({"X": X, "y": Y + 1}, "holds the label 11; expected 1..10"),
        ({"X": X, "y": Y - 1}, "holds the label 0; expected 1..10"),
        ({"X": X, "y": LABELS + 0.5}, "not whole"),
        ({"X": X, "y": np.where(LABELS == 3, np.nan, LABELS)}, "not whole"),
        ({"X": X, "y": np.where(LABELS == 3, np.inf, LABELS)}, "not whole"),
        ({"X": X, "y": LABELS + 1j}, "not whole"),
        ({"X": X, "y": Y.astype(str)}, "'y' is char"),
        ({"X": X, "y": Y.T}, "shape (1, 20); expected numbers of shape (n, 1)"),
        ({"X": X.astype(float), "y": Y}, "'X' is double"),
        ({"X": X[:16], "y": Y}, "shape (16, 32, 3, 20); expected uint8 of shape (32, 32, 3, n)"),
        ({"X": X.transpose(3, 0, 1, 2), "y": Y}, "expected uint8 of shape (32, 32, 3, n)"),
    ],
)
def test_wrong_arrays(tmp_path: Path, arrays: dict[str, Any], expected: str) -> None:
    write_svhn(tmp_path)
    io.savemat(tmp_path / "test_32x32.mat", arrays)
    refused("svhn", tmp_path, str(tmp_path / "test_32x32.mat"), expected)


def test_numbers_of_another_type_than_the_headers(tmp_path: Path) -> None:
    write_svhn(tmp_path)
    path = tmp_path / "test_32x32.mat"
    io.savemat(path, {"X": X / 2, "y": Y})
    content = bytearray(path.read_bytes())
    # The class in the array flags of X, the first variable: mxDOUBLE_CLASS, mxUINT8_CLASS.
    assert content[144] == 6
    content[144] = 9
    path.write_bytes(content)
    refused("svhn", tmp_path, f"{path}: 'X' holds float64, but its header says uint8")


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>" * 40, b"\0" * 300])
def test_other_content(tmp_path: Path, content: bytes) -> None:
    write_svhn(tmp_path)
    (tmp_path / "train_32x32.mat").write_bytes(content)
    refused("svhn", tmp_path, str(tmp_path / "train_32x32.mat"), "version 5")


def test_newer_version_of_the_format(tmp_path: Path) -> None:
    write_svhn(tmp_path)
    path = tmp_path / "train_32x32.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        file["X"] = X
    content = bytearray(path.read_bytes())
    content[:128] = b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\x02IM"
    path.write_bytes(content)
    refused("svhn", tmp_path, "not a readable MATLAB file", "version 5")


def test_announced_images_cost_nothing(tmp_path: Path) -> None:
    write_svhn(tmp_path)
    path = tmp_path / "train_32x32.mat"
    io.savemat(path, svhn_arrays(30, 0))
    content = path.read_bytes()
    sizes = np.array([32, 32, 3, 30], "<i4").tobytes()
    assert content.count(sizes) == 1
    huge = np.array([32, 32, 3, 2**31 - 1], "<i4").tobytes()
    path.write_bytes(content.replace(sizes, huge))
    with peak_below(20e6):
        refused("svhn", tmp_path, "more than a file of its size can hold")
