import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failures import refused
from official_files import leaf_content, write_leaf

from testbed.data import load
from testbed.data.femnist import CLASS_NAMES

FIRST = leaf_content({"f0_1": [0, 61, 35], "f0_2": [36]}, 0)
SECOND = leaf_content({"f1_9": [10, 9], "f0_1": [1]}, 1)
TEST = leaf_content({"f0_1": [2], "f1_9": [3, 4]}, 2)


def write(root: Path) -> None:
    write_leaf(root / "train" / "all_data_1_niid_0_keep_0_train_9.json", SECOND)
    write_leaf(root / "train" / "all_data_0_niid_0_keep_0_train_9.json", FIRST)
    write_leaf(root / "test" / "all_data_0_niid_0_keep_0_test_9.json", TEST)


@pytest.mark.parametrize("sub", ["", "data"])
def test_reads_users_pixels_and_labels(tmp_path: Path, sub: str) -> None:
    write(tmp_path / sub)
    dataset = load("femnist", tmp_path)
    assert dataset.labels.tolist() == [0, 61, 35, 36, 10, 9, 1, 2, 3, 4]
    assert dataset.users is not None
    assert dataset.users.tolist() == [0, 0, 0, 1, 2, 2, 0, 0, 2, 2]
    assert (dataset.test_start, dataset.classes, dataset.shape) == (7, 62, (1, 28, 28))
    assert dataset.images.dtype == np.uint8
    # Nothing is lost: the decimals in the files are those of the levels, to the last digit.
    floats = [
        image
        for content in (FIRST, SECOND, TEST)
        for user in content["users"]
        for image in content["user_data"][user]["x"]
    ]
    np.testing.assert_array_equal(dataset.images.reshape(10, -1) / 255, floats)


def test_users_of_the_test_part_alone_come_last(tmp_path: Path) -> None:
    write_leaf(tmp_path / "test" / "all_data_0.json", leaf_content({"a": [1, 2], "c": [3]}))
    write_leaf(tmp_path / "train" / "all_data_0.json", leaf_content({"b": [4], "c": [5], "d": []}))
    dataset = load("femnist", tmp_path)
    assert dataset.users is not None
    assert dataset.users.tolist() == [0, 1, 2, 2, 1]


def test_integers_and_single_precision_are_levels_too(tmp_path: Path) -> None:
    content = leaf_content({"a": [1], "b": [2]})
    levels = np.arange(784) % 256
    content["user_data"]["a"]["x"] = (levels / 255).astype(np.float32).astype(float)[None].tolist()
    content["user_data"]["b"]["x"] = [[0, 1] * 392]
    write_leaf(tmp_path / "train" / "all_data_0.json", content)
    write_leaf(tmp_path / "test" / "all_data_0.json", leaf_content({"a": [1]}))
    images = load("femnist", tmp_path).images.reshape(3, -1)
    assert images[0].tolist() == levels.tolist()
    assert images[1].tolist() == [0, 255] * 392


def test_names_of_the_classes() -> None:
    assert [CLASS_NAMES[i] for i in (0, 9, 10, 35, 36, 61)] == list("09AZaz")


def test_missing_part(tmp_path: Path) -> None:
    write(tmp_path)
    for path in (tmp_path / "test").iterdir():
        path.unlink()
    refused("femnist", tmp_path, "no FEMNIST here", "test/all_data_*.json", "preprocess.sh")


def changed(**parts: Any) -> str:
    return json.dumps(leaf_content({"u": [1, 2]}) | parts)


def of_user(**parts: Any) -> str:
    content = leaf_content({"u": [1, 2]})
    return changed(user_data={"u": content["user_data"]["u"] | parts})


PIXELS = [0.0] * 784
GOOD = changed()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "damaged JSON"),
        (GOOD[:-20], "damaged JSON"),
        (GOOD[: len(GOOD) // 2], "damaged JSON"),
        ("[" * 100_000, "damaged JSON"),
        ("9" * 5000, "damaged JSON"),
        ("[1]", "holds a list; expected a mapping"),
        ("{}", "no lists 'users' and 'num_samples'"),
        (changed(users=[]), "0 users, 1 numbers"),
        (changed(users=[1]), "expected a name"),
        (changed(users=["other"]), "no lists 'x' and 'y' of user 'other'"),
        (changed(num_samples=[3]), "2 samples of user 'u', but 'num_samples' says 3"),
        (of_user(y=[1]), "1 labels for 2 images"),
        (of_user(y=[1, 62]), "holds the label 62; expected 0..61"),
        (of_user(y=[1, -1]), "holds the label -1; expected 0..61"),
        (of_user(y=[1, 2.0]), "is no label"),
        (of_user(y=[1, True]), "is no label"),
        (of_user(y=[1, "2"]), "is no label"),
        (of_user(y=[1, 10**4000]), "is no label"),
        (of_user(x="0" * 784), "no lists 'x' and 'y'"),
        (of_user(x=[PIXELS, PIXELS[1:]]), "no list of images of 784 numbers"),
        (of_user(x=[PIXELS[1:], PIXELS[1:]]), "no list of images of 784 numbers"),
        (of_user(x=[PIXELS, ["0.5"] * 784]), "no list of images of 784 numbers"),
        (of_user(x=[PIXELS, [None] * 784]), "no list of images of 784 numbers"),
        (of_user(x=[PIXELS, [0.5, *PIXELS[1:]]]), "no grey level divided by 255"),
        (of_user(x=[PIXELS, [256 / 255, *PIXELS[1:]]]), "no grey level divided by 255"),
        (of_user(x=[PIXELS, [-1 / 255, *PIXELS[1:]]]), "no grey level divided by 255"),
        (of_user(x=[PIXELS, [1e999, *PIXELS[1:]]]), "damaged JSON (the number Infinity)"),
        (of_user(x=[PIXELS, [float("nan"), *PIXELS[1:]]]), "damaged JSON (the number NaN)"),
        (of_user(x=[PIXELS, [7e7, *PIXELS[1:]]]).replace("70000000.0", "1e999"), "no grey level"),
        ("\udcff", "damaged JSON"),
    ],
)
def test_damaged_file(tmp_path: Path, text: str, expected: str) -> None:
    write(tmp_path)
    path = tmp_path / "train" / "all_data_2.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    refused("femnist", tmp_path, str(path), expected)


def test_huge_file_is_not_read(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "test" / "all_data_7.json"
    with path.open("wb") as file:
        file.truncate((1 << 29) + 1)
    refused("femnist", tmp_path, str(path), "expected a file of at most 536870912 bytes")


def test_no_training_sample(tmp_path: Path) -> None:
    write_leaf(tmp_path / "train" / "all_data_0.json", leaf_content({"d": []}))
    write_leaf(tmp_path / "test" / "all_data_0.json", leaf_content({"a": [1]}))
    refused("femnist", tmp_path, "holds no sample")
