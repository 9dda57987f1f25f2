from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from failures import refused
from official_files import (
    leaf_content,
    write_celeba,
    write_cifar,
    write_cifar10,
    write_emnist,
    write_leaf,
    write_mnist,
    write_picture,
    write_svhn,
)

from testbed.data import DATASETS, describe, open_dataset
from testbed.data.packing import pack
from testbed.data.recognise import recognise
from testbed.errors import UserError


def write_femnist(root: Path) -> None:
    for split in ("train", "test"):
        write_leaf(root / split / "all_data_0.json", leaf_content({"u": [1]}))


def write_images(root: Path) -> None:
    for name in ("a", "b"):
        write_picture(root / name / "1.png", np.zeros((4, 4), np.uint8))


WRITERS: dict[str, Callable[[Path], object]] = {
    "mnist": write_mnist,
    "emnist": lambda root: write_emnist(root, "digits", 10),
    "femnist": write_femnist,
    "svhn": write_svhn,
    "cifar10": write_cifar10,
    "cifar100": write_cifar,
    "celeba": lambda root: write_celeba(root, [["Bald"], ["Male"]]),
    "images": write_images,
}


@pytest.mark.parametrize("there", WRITERS)
def test_every_folder_of_another_data_set_is_named(tmp_path: Path, there: str) -> None:
    WRITERS[there](tmp_path)
    assert recognise(tmp_path) == (there,)
    for name, info in DATASETS.items():
        if info.root and name != there:
            refused(name, tmp_path, f"this folder looks like {there}: set data.name: {there}")


@pytest.mark.parametrize("name", WRITERS)
def test_the_folder_above_is_noticed(tmp_path: Path, name: str) -> None:
    (tmp_path / "another").mkdir()
    folder = tmp_path / "data of mine"
    folder.mkdir()
    WRITERS[name](folder)
    # A folder of image folders, seen from above, has no image of its own.
    refused(name, tmp_path, f"{folder} looks like {name}: set data.root to it")


def test_files_of_other_data_sets_are_named(tmp_path: Path) -> None:
    packed = tmp_path / "a.h5"
    pack(open_dataset("digits", None), packed, source="")
    archive = tmp_path / "a.npz"
    np.savez(archive, images=np.zeros((4, 2, 2), np.uint8), labels=np.arange(4) % 2)
    refused("npz", packed, "this file looks like packed: set data.name: packed")
    refused("mnist", packed, "is a file", "this file looks like packed")
    refused("packed", archive, "this file looks like npz: set data.name: npz")
    with pytest.raises(UserError, match="this file looks like npz"):
        describe("packed", archive)


def test_unknown_folder_is_described(tmp_path: Path) -> None:
    refused("svhn", tmp_path, "the folder is empty")
    for name in "fedcbag":
        (tmp_path / name).touch()
    refused("svhn", tmp_path, "the folder holds a, b, c, d, e and more")


def test_damaged_file_of_the_right_data_set_brings_no_advice(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"")
    message = refused("mnist", tmp_path, "t10k-labels-idx1-ubyte: is empty")
    assert "looks like" not in message
    assert "holds" not in message


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x89HDF\r\n\x1a\n", b"text"])
def test_unknown_file_is_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert recognise(tmp_path / "file") == ()
    assert recognise(tmp_path / "nowhere") == ()
    assert recognise(tmp_path / ("long" * 1000)) == ()


def test_where_the_real_data_lie(data_root: Path) -> None:
    refused("mnist", data_root, f"{data_root / 'mnist'} looks like mnist")
    refused("cifar10", data_root, "this folder looks like cifar100")
    assert recognise(data_root / "mnist") == ("mnist",)
