import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from official_files import write_cifar, write_mnist

from testbed.data import DATASETS, describe, load
from testbed.errors import UserError


def test_catalogue() -> None:
    assert list(DATASETS) == ["digits", "mnist", "cifar100", "npz"]
    assert {name: info.root for name, info in DATASETS.items()} == {
        "digits": "",
        "mnist": "folder",
        "cifar100": "folder",
        "npz": "file",
    }
    assert all(info.name == name and info.description for name, info in DATASETS.items())
    with pytest.raises(TypeError):
        DATASETS["new"] = DATASETS["digits"]  # type: ignore[index]


def test_catalogue_agrees_with_what_is_loaded(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_cifar(tmp_path)
    for name in ("digits", "mnist", "cifar100"):
        dataset = load(name, tmp_path)
        assert describe(name, None) == (dataset.classes, dataset.shape)
        assert dataset.name == name
        assert dataset.images.min() == 0
        assert dataset.images.max() * dataset.scale == 1


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
        UserError, match=r"data\.name: unknown data set 'mnits'; did you mean 'mnist'"
    ):
        call("mnits", None)


@pytest.mark.parametrize(
    ("name", "kind"), [("mnist", "folder"), ("cifar100", "folder"), ("npz", "file")]
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


def test_describe_npz_that_is_not_there(tmp_path: Path) -> None:
    assert describe("npz", None) == (None, None)
    assert describe("npz", tmp_path / "later.npz") == (None, None)


def test_dataset_is_frozen() -> None:
    dataset = load("digits", None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.classes = 11  # type: ignore[misc]
    assert dataset == dataset
    assert dataset != load("digits", None)


def test_import_needs_numpy_only() -> None:
    code = (
        "import sys, testbed.data;"
        "print(*{'torch', 'mpi4py', 'sklearn', 'scipy', 'h5py', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
