import pickle
from pathlib import Path

import numpy as np
import pytest
from failures import refused
from official_files import CIFAR10_NAMES, cifar10_bytes, cifar_rows, write_cifar, write_cifar10

from testbed.data import load


@pytest.mark.parametrize("sub", ["", "cifar-10-batches-py"])
def test_reads_official_files(tmp_path: Path, sub: str) -> None:
    folder = tmp_path / sub
    folder.mkdir(exist_ok=True)
    write_cifar10(folder)
    dataset = load("cifar10", tmp_path)
    assert dataset.images.shape == (120, 3, 32, 32)
    assert (dataset.classes, dataset.test_start, dataset.shape) == (10, 100, (3, 32, 32))
    for seed in range(6):
        part = slice(20 * seed, 20 * seed + 20)
        np.testing.assert_array_equal(dataset.images[part].reshape(20, -1), cifar_rows(20, seed))
        assert dataset.labels[part].tolist() == [(i + seed) % 10 for i in range(20)]
    assert dataset.images.flags.c_contiguous
    assert dataset.class_names == tuple(f"class{i}" for i in range(10))


def test_written_pickle_is_what_python_and_numpy_read() -> None:
    rows = cifar_rows(3, 0)
    content = cifar10_bytes(rows, [7, 0, 9]).replace(b"numpy.core.", b"numpy._core.")
    read = pickle.loads(content, encoding="bytes")
    np.testing.assert_array_equal(read[b"data"], rows)
    assert read[b"labels"] == [7, 0, 9]


@pytest.mark.parametrize("name", CIFAR10_NAMES)
def test_every_batch_is_needed(tmp_path: Path, name: str) -> None:
    write_cifar10(tmp_path)
    (tmp_path / name).unlink()
    refused("cifar10", tmp_path, "no CIFAR-10 here", "data_batch_5 and test_batch")


def test_works_without_the_names_of_the_classes(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "batches.meta").unlink()
    assert load("cifar10", tmp_path).class_names is None


ROWS = cifar_rows(10, 0)
TEN = list(range(10))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (cifar10_bytes(ROWS, TEN)[:5000], "damaged pickle"),
        (cifar10_bytes(ROWS, TEN[:9]), "9 labels for 10 images"),
        (cifar10_bytes(ROWS, [*TEN[:9], 10]), "holds the label 10; expected 0..9"),
        (pickle.dumps({"data": ROWS, "fine_labels": TEN}, 3), "no 'labels'"),
        (b"cos\nsystem\n(S'true'\ntR.", "refused"),
    ],
)
def test_damaged_batch(tmp_path: Path, content: bytes, expected: str) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_4").write_bytes(content)
    refused("cifar10", tmp_path, str(tmp_path / "data_batch_4"), expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (pickle.dumps({"label_names": ["a"] * 9}, 2), "no list of 10 names"),
        (pickle.dumps({"other": 1}, 2), "no list of 10 names"),
        (b"text", "damaged pickle"),
    ],
)
def test_damaged_names(tmp_path: Path, content: bytes, expected: str) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "batches.meta").write_bytes(content)
    refused("cifar10", tmp_path, "batches.meta", expected)


def test_other_cifar_is_named(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    refused("cifar10", tmp_path, "this folder looks like cifar100: set data.name: cifar100")
    other = tmp_path / "other"
    other.mkdir()
    write_cifar10(other)
    refused("cifar100", other, "this folder looks like cifar10: set data.name: cifar10")
