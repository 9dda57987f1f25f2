import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
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

from testbed.data import DATASETS, check_variant, describe, load
from testbed.errors import UserError

FOLDERS = ["mnist", "emnist", "femnist", "svhn", "cifar10", "cifar100", "celeba", "images"]
FILES = ["npz", "packed"]


def test_catalogue() -> None:
    assert list(DATASETS) == ["digits", *FOLDERS, *FILES]
    assert {name: info.root for name, info in DATASETS.items()} == {
        "digits": "",
        **dict.fromkeys(FOLDERS, "folder"),
        **dict.fromkeys(FILES, "file"),
    }
    assert all(info.name == name and info.description for name, info in DATASETS.items())
    variants = {name: info.variants for name, info in DATASETS.items() if info.variants}
    assert variants == {
        "emnist": ("byclass", "bymerge", "balanced", "letters", "digits", "mnist"),
        "celeba": ("hair", "gender", "identity"),
    }
    with pytest.raises(TypeError):
        DATASETS["new"] = DATASETS["digits"]  # type: ignore[index]


def test_catalogue_agrees_with_what_is_loaded(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_cifar(tmp_path)
    write_cifar10(tmp_path)
    write_svhn(tmp_path)
    write_emnist(tmp_path, "byclass", 62)
    (tmp_path / "faces").mkdir()
    write_celeba(tmp_path / "faces", [["Bald"], ["Male"]])
    leaf = tmp_path / "leaf"
    for split in ("train", "test"):
        write_leaf(leaf / split / "all_data_0.json", leaf_content({"u": [1, 2]}))
    roots = {"celeba": tmp_path / "faces", "femnist": leaf}
    for name in ("digits", *FOLDERS[:-1]):
        dataset = load(name, roots.get(name, tmp_path))
        assert describe(name, None) == (dataset.classes, dataset.shape)
        assert dataset.name == name
        assert dataset.images.min() == 0
        assert dataset.images.max() * dataset.scale == 1
        assert dataset.class_names is None or len(dataset.class_names) == dataset.classes


def test_digits() -> None:
    dataset = load("digits", None)
    assert dataset.images.shape == (1797, 1, 8, 8)
    assert dataset.images.dtype == np.uint8
    assert dataset.labels.dtype == np.int64
    assert (dataset.test_start, dataset.classes, dataset.scale) == (None, 10, 1 / 16)
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(dataset.labels).tolist() == counts
    # The first row of the first image in the published file.
    assert dataset.images[0, 0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"scikit-learn.*pip install \.\[run\]"):
        load("digits", None)


@pytest.mark.parametrize("call", [load, describe])
def test_unknown_name(call: object) -> None:
    assert callable(call)
    with pytest.raises(
        UserError, match=r"data\.name: unknown data set 'mnits'; did you mean 'e?mnist'"
    ):
        call("mnits", None)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "folder") for name in FOLDERS), *((name, "file") for name in FILES)]
)
def test_wrong_root(tmp_path: Path, name: str, kind: str) -> None:
    with pytest.raises(UserError, match=rf"data\.root is not set: .*'{name}'.* {kind}"):
        load(name, None)
    with pytest.raises(UserError, match=rf"nowhere does not exist; .*'{name}' expects a {kind}"):
        load(name, tmp_path / "nowhere")
    other = tmp_path / "file"
    other.touch()
    found, wrong = ("file", other) if kind == "folder" else ("folder", tmp_path)
    with pytest.raises(UserError, match=rf"is a {found}; .*'{name}' expects the path of a {kind}"):
        load(name, wrong)
    with pytest.raises(UserError, match="is a special file"):
        load(name, Path("/dev/null"))
    with pytest.raises(UserError, match=r"cannot be looked at|does not exist"):
        load(name, tmp_path / ("long" * 1000))


def test_variants() -> None:
    assert check_variant("mnist", None) == ""
    assert check_variant("emnist", None) == "byclass"
    assert check_variant("celeba", "gender") == "gender"
    with pytest.raises(
        UserError, match=r"data\.variant: 'a'; the data set 'mnist' has no variants"
    ):
        load("mnist", None, "a")
    with pytest.raises(UserError, match=r"no variant 'leters'; did you mean 'letters'"):
        describe("emnist", None, "leters")


def test_describe_npz_that_is_not_there(tmp_path: Path) -> None:
    assert describe("npz", None) == (None, None)
    assert describe("npz", tmp_path / "later.npz") == (None, None)


def test_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_picture(tmp_path / name / "1.png", np.zeros((4, 4), np.uint8))
    locked, iterdir = tmp_path / "b", Path.iterdir

    # Permissions do not keep the super-user out.
    def refuse(path: Path) -> Iterator[Path]:
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    for call in (load, describe):
        with pytest.raises(UserError, match=rf"{locked}: cannot be read \(Permission denied\)"):
            call("images", tmp_path)


def test_dataset_is_frozen() -> None:
    dataset = load("digits", None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.classes = 11  # type: ignore[misc]
    assert dataset == dataset
    assert dataset != load("digits", None)


def test_import_needs_numpy_only() -> None:
    code = (
        "import sys, testbed.data;"
        "heavy = {'torch', 'mpi4py', 'sklearn', 'scipy', 'h5py', 'pandas', 'PIL'};"
        "print(*heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
