import gzip
from pathlib import Path

import numpy as np
import pytest
from failures import refused
from official_files import digits_like, emnist_arrays, idx_bytes, write_emnist, write_mnist

from testbed.data import describe, load

CLASSES = {"byclass": 62, "bymerge": 47, "balanced": 47, "letters": 26, "digits": 10, "mnist": 10}


@pytest.mark.parametrize("variant", CLASSES)
def test_reads_every_variant_upright(tmp_path: Path, variant: str) -> None:
    classes, first = CLASSES[variant], int(variant == "letters")
    write_emnist(tmp_path, variant, classes, first=first)
    dataset = load("emnist", tmp_path, variant)
    for split, part in (("train", slice(2 * classes)), ("test", slice(2 * classes, None))):
        stored, labels = emnist_arrays(split, 2 * classes, classes, first)
        for image, other in zip(dataset.images[part, 0], stored, strict=True):
            np.testing.assert_array_equal(image, other.T)
        np.testing.assert_array_equal(dataset.labels[part], labels.astype(int) - first)
    assert (dataset.classes, dataset.test_start) == (classes, 2 * classes)
    assert describe("emnist", None, variant) == (classes, (1, 28, 28))
    assert dataset.images.flags.c_contiguous
    assert dataset.class_names is not None
    assert len(set(dataset.class_names)) == classes


def test_default_variant_and_characters(tmp_path: Path) -> None:
    (tmp_path / "gzip").mkdir()
    write_emnist(tmp_path / "gzip", "byclass", 62)
    dataset = load("emnist", tmp_path)
    assert dataset.class_names is not None
    # NIST's mapping: 0 is the digit 0, 10 is A, 36 is a, 61 is z.
    assert [dataset.class_names[i] for i in (0, 9, 10, 35, 36, 61)] == list("09AZaz")


def test_merged_characters_are_those_of_the_official_mapping(tmp_path: Path) -> None:
    write_emnist(tmp_path, "balanced", 47)
    # emnist-balanced-mapping.txt: the ASCII code of each class.
    codes = [*range(48, 58), *range(65, 91), 97, 98, 100, 101, 102, 103, 104, 110, 113, 114, 116]
    assert load("emnist", tmp_path, "balanced").class_names == tuple(map(chr, codes))


def test_plain_files(tmp_path: Path) -> None:
    write_emnist(tmp_path, "digits", 10)
    for path in list(tmp_path.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert len(load("emnist", tmp_path, "digits").labels) == 40


@pytest.mark.parametrize("label", [0, 27])
def test_letters_count_from_one(tmp_path: Path, label: int) -> None:
    write_emnist(tmp_path, "letters", 26, first=1)
    labels = np.array([*range(1, 27), *range(1, 26), label], np.uint8)
    name = "emnist-letters-train-labels-idx1-ubyte.gz"
    (tmp_path / name).write_bytes(gzip.compress(idx_bytes(labels)))
    refused("emnist", tmp_path, name, f"label {label}; expected 1..26", variant="letters")


def test_missing_variant_names_those_that_are_there(tmp_path: Path) -> None:
    write_emnist(tmp_path, "digits", 10)
    write_emnist(tmp_path, "letters", 26, first=1)
    refused(
        "emnist",
        tmp_path,
        "no file emnist-byclass-train-images-idx3-ubyte",
        "there are files of the variant letters and digits: set data.variant",
    )


def test_truncated_file(tmp_path: Path) -> None:
    write_emnist(tmp_path, "mnist", 10)
    path = tmp_path / "emnist-mnist-test-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    refused("emnist", tmp_path, str(path), "damaged gzip", variant="mnist")
    path.write_bytes(gzip.compress(idx_bytes(digits_like(19, 0)[0])))
    refused("emnist", tmp_path, "20 labels for 19 images", variant="mnist")


def test_mnist_folder_and_the_contrary(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    refused("emnist", tmp_path, "this folder looks like mnist: set data.name: mnist")
    (tmp_path / "e").mkdir()
    write_emnist(tmp_path / "e", "mnist", 10)
    refused("mnist", tmp_path / "e", "this folder looks like emnist: set data.name: emnist")
