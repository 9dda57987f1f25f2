import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from official_files import cifar_bytes, cifar_rows, write_cifar

from testbed.data import load
from testbed.errors import UserError


def failure(root: Path, *expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load("cifar100", root)
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize("sub", ["", "cifar-100-python"])
def test_reads_official_files(tmp_path: Path, sub: str) -> None:
    folder = tmp_path / sub
    folder.mkdir(exist_ok=True)
    write_cifar(folder)
    dataset = load("cifar100", tmp_path)
    assert dataset.images.shape == (300, 3, 32, 32)
    assert (dataset.classes, dataset.test_start, dataset.shape) == (100, 200, (3, 32, 32))
    np.testing.assert_array_equal(dataset.images[:200].reshape(200, -1), cifar_rows(200, 0))
    np.testing.assert_array_equal(dataset.images[200:].reshape(100, -1), cifar_rows(100, 1))
    np.testing.assert_array_equal(dataset.labels, np.arange(300) % 100)
    assert dataset.images.dtype == np.uint8
    assert dataset.labels.dtype == np.int64
    assert dataset.images.flags.c_contiguous


def test_written_pickle_is_what_python_and_numpy_read(tmp_path: Path) -> None:
    # Else the other tests would prove agreement with nothing but their own helper.
    rows = cifar_rows(3, 0)
    content = cifar_bytes(rows, [7, 0, 99]).replace(b"numpy.core.", b"numpy._core.")
    read = pickle.loads(content, encoding="bytes")
    np.testing.assert_array_equal(read[b"data"], rows)
    assert read[b"fine_labels"] == [7, 0, 99]
    assert read[b"filenames"][2] == b"bos_taurus_s_000002.png"


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("arrange", [np.ascontiguousarray, np.asfortranarray])
def test_reads_repickled_files(tmp_path: Path, protocol: int, arrange: Any) -> None:
    rows = cifar_rows(100, 0)
    content = {
        "data": arrange(rows),
        "fine_labels": np.arange(100, dtype=">i8"),
        "comment": None,
    }
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol))
    dataset = load("cifar100", tmp_path)
    np.testing.assert_array_equal(dataset.images[:100].reshape(100, -1), rows)
    np.testing.assert_array_equal(dataset.labels[100:], np.arange(100))
    assert dataset.images.flags.c_contiguous


def test_wrong_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python.tar.gz").touch()
    failure(tmp_path, str(tmp_path), "train and test, here and in cifar-100-python/", "unpack")


ROWS = cifar_rows(10, 3)
TEN = list(range(10))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "damaged pickle (pickle exhausted before seeing STOP)"),
        (b"<!DOCTYPE html>", "damaged pickle"),
        (b"\x1f\x8b\x08\0", "damaged pickle"),
        (cifar_bytes(ROWS, TEN)[:-1], "damaged pickle"),
        (cifar_bytes(ROWS, TEN)[:9000], "damaged pickle"),
        (cifar_bytes(ROWS, TEN) + b"\0", "1 bytes after its end"),
        (cifar_bytes(ROWS, TEN[:9]), "9 labels for 10 images"),
        (cifar_bytes(ROWS, [*TEN[:9], 100]), "holds the label 100; expected 0..99"),
        (cifar_bytes(ROWS, [*TEN[:9], -1]), "holds the label -1; expected 0..99"),
        (cifar_bytes(ROWS[:0], []), "shape (0, 3072); expected (n, 3072) with n > 0"),
        (cifar_bytes(ROWS, TEN, shape=(20, 1536)), "shape (20, 1536)"),
        (cifar_bytes(ROWS, TEN, shape=(10, 3, 1024)), "shape (10, 3, 1024)"),
        (cifar_bytes(ROWS, TEN, dtype=b"u2", shape=(10, 1536)), "type uint16"),
        (pickle.dumps([1, 2], 2), "holds a list; expected a dict"),
        (pickle.dumps({}, 2), "holds nothing, but no 'data' and no 'fine_labels'"),
        (
            pickle.dumps({"data": 1, "labels": [1]}, 2),
            "holds 'data', 'labels', but no 'fine_labels'",
        ),
        (pickle.dumps({"data": "x" * 30720, "fine_labels": TEN}, 2), "type str"),
        (pickle.dumps({"data": ROWS, "fine_labels": "0123456789"}, 3), "not a list of integers"),
        (pickle.dumps({"data": ROWS, "fine_labels": []}, 3), "not a list of integers"),
        (pickle.dumps({"data": ROWS, "fine_labels": ["1"] * 10}, 3), "holds a str"),
        (pickle.dumps({"data": ROWS, "fine_labels": [True] * 10}, 3), "holds a bool"),
        (pickle.dumps({"data": ROWS, "fine_labels": [1.0] * 10}, 3), "holds a float"),
        (pickle.dumps({"data": ROWS, "fine_labels": [10**5000] * 10}, 3), "holds a huge integer"),
        (pickle.dumps({"data": ROWS, "fine_labels": [TEN] * 10}, 3), "holds a list"),
        (pickle.dumps({"data": ROWS, "fine_labels": np.zeros((10, 1), int)}, 3), "not a list"),
    ],
)
def test_damaged_file(tmp_path: Path, content: bytes, expected: str) -> None:
    write_cifar(tmp_path)
    (tmp_path / "test").write_bytes(content)
    failure(tmp_path, str(tmp_path / "test"), expected)


def test_real_cifar100(data_root: Path) -> None:
    dataset = load("cifar100", data_root)
    # By the unrestricted reader, which these files, unlike a stranger's, may be given.
    for name, part in (
        ("train", slice(dataset.test_start)),
        ("test", slice(dataset.test_start, None)),
    ):
        content = (data_root / "cifar-100-python" / name).read_bytes()
        plain = pickle.loads(content.replace(b"numpy.core.", b"numpy._core."), encoding="bytes")
        rows = dataset.images[part].reshape(-1, 3072)
        np.testing.assert_array_equal(rows, plain[b"data"])
        assert dataset.labels[part].tolist() == plain[b"fine_labels"]
        # Every class is equally frequent in either split.
        assert len(set(np.bincount(dataset.labels[part], minlength=100))) == 1
    # The published channel means; the order of the channels shows in them.
    means = dataset.images[: dataset.test_start].mean(axis=(0, 2, 3)) * dataset.scale
    np.testing.assert_allclose(means, [0.5071, 0.4865, 0.4409], atol=0.01)
