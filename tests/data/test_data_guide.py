"""The page on data sets: its fragments, commands and output are what the program has."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from official_files import (
    leaf_content,
    write_celeba,
    write_cifar,
    write_cifar10,
    write_emnist,
    write_leaf,
    write_picture,
    write_svhn,
)

from testbed.__main__ import main
from testbed.data import DATASETS, load
from testbed.experiment import parse_experiment

TEXT = (Path(__file__).parents[2] / "docs/data.md").read_text()
FRAGMENTS = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
REST = """
model: {name: fcnn}
federation: {rounds: 1, batch_size: 2}
attacks: [llg]
"""


def write_femnist(root: Path) -> None:
    for split in ("train", "test"):
        write_leaf(root / split / "all_data_0.json", leaf_content({"u": [1, 2], "v": [3]}))


def write_both(root: Path) -> None:
    write_emnist(root, "balanced", 47)
    write_emnist(root, "byclass", 62)


def write_images(root: Path) -> None:
    for name in ("a", "b"):
        write_picture(root / name / "1.png", np.zeros((4, 4), np.uint8))


def write_npz(path: Path) -> None:
    np.savez(path, images=np.zeros((2, 4, 4), np.uint8), labels=np.arange(2))


def write_packed(path: Path) -> None:
    assert main(["data", "pack", "digits", "-o", str(path)]) == 0


WRITERS: dict[str, Callable[[Path], object]] = {
    "emnist": write_both,
    "femnist": write_femnist,
    "svhn": write_svhn,
    "cifar10": write_cifar10,
    "cifar100": write_cifar,
    "celeba": lambda root: write_celeba(root, [["Bald"], ["Black_Hair"], ["Blond_Hair"]]),
    "images": write_images,
    "npz": write_npz,
    "packed": write_packed,
}


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda text: " ".join(text.split())[:50])
def test_every_fragment_reads_a_data_set(fragment: str, tmp_path: Path) -> None:
    content = yaml.safe_load(fragment)
    data = content["data"]
    root = tmp_path
    if data["root"] != "DIR":
        root = tmp_path / "file"
    WRITERS[data["name"]](root)
    if data["name"] == "npz":
        root = root.with_name("file.npz")
    text = yaml.safe_dump(content | {"data": data | {"root": str(root)}}) + REST
    section = parse_experiment(text).experiment.data
    found = load(section.name, section.root, section.variant, section.limit)
    assert len(found.images) == len(found.labels) > 0


def test_every_data_set_is_in_the_table_with_its_image() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", TEXT, re.MULTILINE)
    assert [name for name, _ in rows] == [*DATASETS]
    for name, row in rows:
        classes, image = (cell.strip() for cell in row.split("|")[2:4])
        info = DATASETS[name]
        if info.shape:
            assert image == "x".join(map(str, info.shape))
        if info.classes and not info.variants:
            assert classes == str(info.classes)


def test_the_commands_run_and_print_what_the_page_shows(tmp_path: Path) -> None:
    (commands,) = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in commands.splitlines():
        words = line.removeprefix("python").split()
        subprocess.run([sys.executable, *words], cwd=tmp_path, check=True, capture_output=True)
    (console,) = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
    shown, _, output = console.partition("\n")
    words = shown.removeprefix("$ python").split()
    done = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True)
    assert done.stdout == output
