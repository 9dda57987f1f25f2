"""``testbed data``: what it prints and writes."""

import argparse
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from testbed.data import load
from testbed.data_commands import add_data_commands
from testbed.errors import UserError


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_data_commands(parser.add_subparsers(required=True))
    options = parser.parse_args(["data", *map(str, arguments)])
    status: int = options.command(options)
    return status


def fields(text: str) -> dict[str, str]:
    """Return the lines above the table as a mapping."""
    head = text.split("\n\n")[0]
    return {line[:9].strip(): line[10:] for line in head.splitlines()}


def write_npz(path: Path, classes: int = 3) -> Path:
    labels = np.concatenate([np.full(i + 1, i) for i in range(classes)])
    images = np.zeros((len(labels), 2, 5, 4), np.uint8)
    tests = {"test_images": images[:4], "test_labels": labels[:4]}
    np.savez(path, images=images, labels=labels, **tests)
    return path


def test_info_with_few_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "npz", write_npz(tmp_path / "a.npz")) == 0
    out = capsys.readouterr().out
    told = fields(out)
    assert told["data set"] == "npz"
    assert told["samples"] == "6 training, 4 test"
    assert told["image"] == "2x5x4 uint8, times 0.00392157 is in 0..1"
    assert told["classes"] == "3"
    assert told["users"] == "not known"
    # Ten images of 40 bytes, ten labels of 8.
    assert told["memory"] == "0.00048 MB"
    table = [line.split() for line in out.split("\n\n")[1].splitlines()]
    assert table == [
        ["class", "training", "test"],
        ["0", "1", "1", "#" * 10],
        ["1", "2", "2", "#" * 20],
        ["2", "3", "1", "#" * 30],
    ]


def test_info_with_many_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("info", "npz", write_npz(tmp_path / "a.npz", 30))
    assert capsys.readouterr().out.split("\n\n")[1].splitlines() == [
        "training samples per class: 1 to 30 (median 15.5)",
        "  fewest of class 0, most of class 29",
        "test samples per class: 0 to 2 (median 0)",
        "  fewest of class 3, most of class 1",
        "  27 classes without any",
    ]


def test_pack_and_info_of_the_packed_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "digits.h5"
    assert run("pack", "digits", "-o", path, "--limit", 500) == 0
    assert f"{path}: 500 samples of 10 classes" in capsys.readouterr().out
    np.testing.assert_array_equal(
        load("packed", path).images, load("digits", None, limit=500).images
    )
    run("info", "packed", path)
    packed = capsys.readouterr().out
    run("info", "digits", "--limit", 500)
    assert capsys.readouterr().out == packed
    assert fields(packed)["samples"] == "500, no official test"


def test_users_and_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.h5"
    run("pack", "digits", "-o", path, "--limit", 20)
    with h5py.File(path, "r+") as file:
        file["users"] = [*([0] * 3), *([1] * 5), *([2] * 6), -1, -1, 0, 4, 4, -1]
        file.attrs["test_start"] = 16
        file.attrs["variant"] = "some"
    capsys.readouterr()
    run("info", "packed", path)
    told = fields(capsys.readouterr().out)
    assert told["data set"] == "digits, variant some"
    assert told["users"] == (
        "3 with training samples, 3 to 6 (median 5) each; 1 with test samples only; "
        "3 samples of nobody"
    )


def test_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    path.touch()
    with pytest.raises(UserError, match="exists"):
        run("pack", "digits", "-o", path)
    assert run("pack", "digits", "-o", path, "--overwrite") == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("info", "mnits"), r"^NAME: unknown data set 'mnits'"),
        (("info", "mnist"), r"^ROOT is not set"),
        (("info", "mnist", "nowhere"), r"^ROOT: nowhere does not exist"),
        (("info", "mnist", "--variant", "a"), r"^--variant: 'a'; .* no variants"),
        (("info", "digits", "--limit", "9"), r"^--limit: 9 is less than the 10 classes"),
        (("info", "packed", "pyproject.toml"), r"not a readable HDF5 file"),
        (("pack", "digits", "-o", "no/such/a.h5"), "no such folder"),
    ],
)
def test_wrong_input_is_told_by_the_names_of_the_command_line(
    arguments: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        run(*arguments)


def test_keys_at_the_end_of_a_message_but_not_in_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "data.root"
    folder.mkdir()
    (folder / "emnist-digits-train-images-idx3-ubyte").touch()
    with pytest.raises(UserError, match=r"/data\.root: .* of the variant digits: set --variant$"):
        run("info", "emnist", folder)


def test_wrong_folder_is_named(tmp_path: Path, data_root: Path) -> None:
    with pytest.raises(UserError, match="looks like mnist: set NAME: mnist"):
        run("pack", "svhn", data_root / "mnist", "-o", tmp_path / "a.h5")
    assert not list(tmp_path.iterdir())


def test_real_mnist(tmp_path: Path, data_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mnist.h5"
    run("pack", "mnist", data_root / "mnist", "-o", path)
    assert path.stat().st_size < 70000 * 784 * 1.05
    run("info", "packed", path)
    out = capsys.readouterr().out
    assert "60000 training, 10000 test" in out
    # The counts that every description of MNIST has.
    assert [line.split()[:3] for line in out.splitlines()[-10:]] == [
        ["0", "5923", "980"],
        ["1", "6742", "1135"],
        ["2", "5958", "1032"],
        ["3", "6131", "1010"],
        ["4", "5842", "982"],
        ["5", "5421", "892"],
        ["6", "5918", "958"],
        ["7", "6265", "1028"],
        ["8", "5851", "974"],
        ["9", "5949", "1009"],
    ]


def test_needs_neither_torch_nor_mpi(tmp_path: Path) -> None:
    code = (
        "import argparse, sys\n"
        "for name in ('torch', 'mpi4py'): sys.modules[name] = None\n"
        "from testbed.data_commands import add_data_commands\n"
        "assert not {'numpy', 'h5py'} & set(sys.modules)\n"
        "parser = argparse.ArgumentParser()\n"
        "add_data_commands(parser.add_subparsers())\n"
        "for words in (['pack', 'npz', sys.argv[1], '-o', sys.argv[2]],\n"
        "              ['info', 'packed', sys.argv[2]]):\n"
        "    options = parser.parse_args(['data', *words])\n"
        "    options.command(options)\n"
    )
    archive, path = write_npz(tmp_path / "a.npz"), tmp_path / "a.h5"
    done = subprocess.run(
        [sys.executable, "-c", code, str(archive), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "6 training, 4 test" in done.stdout
