import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from failures import refused
from official_files import write_celeba, write_mnist, write_picture
from traced import peak_below

from testbed.data import Dataset, describe, load, open_dataset
from testbed.data.images import open_images
from testbed.data.lazy import in_memory
from testbed.data.packed import open_packed
from testbed.data.packing import pack
from testbed.errors import UserError

RNG = np.random.default_rng(5)


def assert_equal(one: Dataset, other: Dataset) -> None:
    for field in dataclasses.fields(Dataset):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
        else:
            assert left == right
            assert type(left) is type(right)


def made(dtype: str, **changes: Any) -> Dataset:
    images = (
        RNG.random((12, 2, 5, 4)) if dtype == "float32" else RNG.integers(0, 256, (12, 2, 5, 4))
    )
    dataset = Dataset(
        name="npz",
        images=images.astype(dtype),
        labels=np.arange(12) % 3,
        classes=4,
        scale=1.0 if dtype == "float32" else 1 / 255,
        test_start=None,
    )
    return dataclasses.replace(dataset, **changes)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"test_start": 9},
        {"users": np.arange(12) // 3 - 1, "test_start": 8},
        {"class_names": ("zéro", "one", "two", "")},
    ],
)
def test_packed_is_exactly_equal(tmp_path: Path, dtype: str, changes: dict[str, Any]) -> None:
    dataset = made(dtype, **changes)
    path = tmp_path / "all.h5"
    pack(in_memory(dataset), path, source="here")
    assert_equal(load("packed", path), dataset)
    assert describe("packed", path) == (4, (2, 5, 4))
    assert [each.name for each in tmp_path.iterdir()] == ["all.h5"]


def test_block_by_block_and_chunk_by_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.data.lazy._BLOCK_BYTES", 7 * 64)
    monkeypatch.setattr("testbed.data.packing._CHUNK_BYTES", 5 * 64)
    monkeypatch.setattr("testbed.data.packed._BLOCK_BYTES", 11 * 64)
    path = tmp_path / "digits.h5"
    pack(open_dataset("digits", None), path, source="")
    assert_equal(load("packed", path), load("digits", None))
    # A limit reads pieces.
    assert_equal(load("packed", path, limit=100), load("digits", None, limit=100))
    chosen = np.array([1700, 3, 3, 900])
    np.testing.assert_array_equal(
        open_packed(path).read(chosen), load("digits", None).images[chosen]
    )


def test_images_are_not_all_in_memory_while_packing(tmp_path: Path) -> None:
    write_celeba(tmp_path, [["Bald"], ["Gray_Hair"]] * 60)
    with h5py.File(tmp_path / "warm.h5", "w"):
        pass
    data = open_dataset("celeba", tmp_path)
    assert len(data.labels) * data.image_bytes > 13e6
    path = tmp_path / "hair.h5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("testbed.data.lazy._BLOCK_BYTES", 1 << 20)
        with peak_below(5e6):
            pack(data, path, source="celeba")
    packed = open_packed(path)
    assert packed.variant == "hair"
    assert_equal(packed.load(), data.load())


def test_attributes_of_the_file(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "m.h5"
    pack(open_dataset("mnist", tmp_path), path, source="the folder")
    with h5py.File(path) as file:
        attributes = dict(file.attrs)
        assert file["images"].chunks is not None
        assert file["images"].fletcher32
    assert attributes.pop("created")
    assert attributes.pop("software").startswith("label-leakage-testbed ")
    assert attributes == {
        "encoding-type": "testbed-dataset",
        "encoding-version": "1.0",
        "name": "mnist",
        "variant": "",
        "classes": 10,
        "scale": 1 / 255,
        "test_start": 30,
        "source": "the folder",
    }


def test_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    path.write_text("precious")
    data = in_memory(made("uint8"))
    with pytest.raises(UserError, match=r"a\.h5: exists; .* --overwrite"):
        pack(data, path, source="")
    assert path.read_text() == "precious"
    pack(data, path, source="", overwrite=True)
    assert len(load("packed", path).labels) == 12


def test_failure_leaves_nothing_new(tmp_path: Path) -> None:
    write_celeba(tmp_path, [["Bald"], ["Gray_Hair"]])
    (tmp_path / "img_align_celeba" / "000002.jpg").write_bytes(b"damaged")
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.h5").write_text("precious")
    with pytest.raises(UserError, match=r"000002\.jpg: not a readable image"):
        pack(open_dataset("celeba", tmp_path), out / "a.h5", source="", overwrite=True)
    assert [(each.name, each.read_text()) for each in out.iterdir()] == [("a.h5", "precious")]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    data = in_memory(made("uint8"))
    (tmp_path / "file").touch()
    for path, expected in (
        (tmp_path, "this is a folder"),
        (tmp_path / "none" / "a.h5", "no such folder"),
        (tmp_path / "file" / "a.h5", "no such folder"),
        (tmp_path / ("long" * 100), "cannot be written"),
        (tmp_path / ("long" * 100) / "a.h5", "cannot be written"),
        # Without a name.
        (Path(), "this is a folder"),
        (Path("/"), "this is a folder"),
    ):
        with pytest.raises(UserError, match=expected):
            pack(data, path, source="")


def test_class_name_that_is_not_utf8(tmp_path: Path) -> None:
    for name in (b"a\xff", b"b"):
        folder = tmp_path / "classes" / os.fsdecode(name)
        write_picture(folder / "1.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError, match=r"a\\udcff' is not UTF-8; rename the folder"):
        pack(open_images(tmp_path / "classes"), tmp_path / "a.h5", source="")
    assert [each.name for each in tmp_path.iterdir()] == ["classes"]


def test_users_are_numbered_without_gaps(packed: Path) -> None:
    with h5py.File(packed, "r+") as file:
        replaced("users", data=[70, 70, -1, 3, 3, 3, 9, 9, 9, 5, 70, 1000])(file)
    users = load("packed", packed).users
    assert users is not None
    # Those of the test part alone, the last three samples, follow.
    assert users.tolist() == [2, 2, -1, 0, 0, 0, 1, 1, 1, 3, 2, 4]


def test_images_on_the_edge_of_their_range(packed: Path) -> None:
    levels = np.array([0, 1 / 3, 3], "f4").repeat(4).reshape(12, 1, 1, 1)
    with h5py.File(packed, "r+") as file:
        replaced("images", data=levels)(file)
        # A little more than a third.
        file.attrs["scale"] = np.float32(1 / 3)
    np.testing.assert_array_equal(load("packed", packed).images, levels)


def test_images_above_their_range_are_refused_once_they_are_read(packed: Path) -> None:
    with h5py.File(packed, "r+") as file:
        file.attrs["scale"] = 1.0
    assert describe("packed", packed) == (4, (2, 5, 4))
    assert open_packed(packed).read(np.array([], np.int64)).shape == (0, 2, 5, 4)
    refused("packed", packed, "'images' holds values from", "expected 0 to 1, which 'scale' takes")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "p.h5"
    users = np.arange(12) // 4
    pack(in_memory(made("uint8", users=users, test_start=9)), path, source="")
    return path


def replaced(name: str, **arguments: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **arguments)

    return change


def attribute(name: str, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file.attrs[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (attribute("encoding-type", "testbed-results"), "of the encoding 'testbed-results'"),
        (attribute("encoding-type", 3), "of another kind (it holds 'images', 'labels', 'users')"),
        (attribute("encoding-version", "2.0"), "version 2.0 of the format; expected 1.0"),
        (attribute("classes", 2), "holds the label 2; expected 0..1"),
        (attribute("classes", 0), "'classes' is 0"),
        (attribute("classes", "ten"), "'classes' is ten"),
        (attribute("scale", 0.0), "'scale' is 0.0"),
        (attribute("scale", np.nan), "'scale' is nan"),
        (attribute("scale", np.inf), "'scale' is inf"),
        (attribute("test_start", 12), "'test_start' is 12; expected 1..11"),
        (attribute("test_start", -1), "'test_start' is -1"),
        (attribute("name", 1), "'name' is 1; expected text"),
        (lambda file: file.attrs.clear(), "of another kind"),
        (lambda file: file.pop("images"), "no array 'images' of its own"),
        (lambda file: file.pop("labels"), "no array 'labels' of its own"),
        (replaced("labels", data=np.arange(11)), "11 labels for 12 images"),
        (replaced("labels", data=np.arange(12) - 1), "holds the label -1"),
        (replaced("labels", data=np.ones(12)), "'labels' is float64"),
        (replaced("labels", data=np.ones((12, 1), int)), "shape (12, 1)"),
        (replaced("images", data=np.ones((12, 5, 4), np.uint8)), "expected 4 dimensions"),
        (replaced("images", data=np.ones((12, 1, 5, 4), np.int16)), "'images' is int16"),
        (replaced("images", data=np.ones((12, 1, 0, 4), np.uint8)), "none of them 0"),
        (replaced("images", data=np.full((12, 1, 2, 2), np.nan, "f4")), "are no numbers"),
        (
            replaced("images", shape=(12, 3, 99999, 99999), dtype="u1", chunks=(1, 1, 999, 999)),
            "but the file holds 0 of it",
        ),
        (replaced("users", data=np.arange(11)), "'users' are not"),
        (replaced("users", data=np.arange(12) - 2), "'users' are not"),
        (replaced("users", data=np.full(12, 2**64 - 1, np.uint64)), "'users' are not"),
        (replaced("images", data=np.full((12, 1, 2, 2), -0.1, "f4")), "values from -0.1 to -0.1"),
        (replaced("images", data=np.full((12, 1, 2, 2), 256, "f4")), "expected 0 to 255, which"),
        (replaced("images", data=np.full((12, 1, 2, 2), np.inf, "f4")), "values from inf to inf"),
        (lambda file: file.create_dataset("class_names", data=["a", "b"]), "2 class names for 4"),
        (
            lambda file: file.create_dataset("class_names", data=[1, 2, 3, 4]),
            "'class_names' is int",
        ),
    ],
)
def test_wrong_content(packed: Path, change: Callable[[h5py.File], object], expected: str) -> None:
    with h5py.File(packed, "r+") as file:
        change(file)
    refused("packed", packed, str(packed), expected)


def test_arrays_of_other_files_are_not_read(packed: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(480))
    with h5py.File(packed, "r+") as file:
        del file["images"]
        file.create_dataset(
            "images", (12, 2, 5, 4), np.uint8, external=[(os.fsencode(secret), 0, 480)]
        )
    refused("packed", packed, "no array 'images' of its own")
    pack(in_memory(made("uint8")), tmp_path / "other.h5", source="")
    for link in (h5py.ExternalLink("other.h5", "/images"), h5py.SoftLink("/labels")):
        with h5py.File(packed, "r+") as file:
            del file["images"]
            file["images"] = link
        refused("packed", packed, "no array 'images' of its own")
    layout = h5py.VirtualLayout((12, 2, 5, 4), np.uint8)
    layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "images", (12, 2, 5, 4))
    with h5py.File(packed, "r+") as file:
        del file["images"]
        file.create_virtual_dataset("images", layout)
    refused("packed", packed, "no array 'images' of its own")


def test_pieces_larger_than_the_images_are_refused(packed: Path) -> None:
    with h5py.File(packed, "r+") as file:
        images = file["images"][()]
        del file["images"]
        chunks, most = (1 << 20, *images.shape[1:]), (None, *images.shape[1:])
        file.create_dataset("images", data=images, chunks=chunks, maxshape=most, compression=1)
    with peak_below(8e6):
        refused("packed", packed, "'images' has pieces of 41943040 bytes")


def test_texts_that_would_keep_the_library_busy_for_ever_are_refused(packed: Path) -> None:
    content = bytearray(packed.read_bytes())
    heap = content.index(b"GCOL\x01\0\0\0")
    content[heap + 16 : heap + 32] = bytes(16)
    packed.write_bytes(content)
    refused("packed", packed, "not a readable HDF5 file", "a heap with an object of 0 bytes")


def test_changed_pixels_are_noticed(packed: Path) -> None:
    images = load("packed", packed).images
    content = bytearray(packed.read_bytes())
    place = content.index(images.tobytes())
    content[place + 100] ^= 1
    packed.write_bytes(content)
    refused("packed", packed, str(packed), "not a readable HDF5 file")


@pytest.mark.parametrize("kept", [0, 7, 100, 2000, -1])
def test_truncated_file(packed: Path, kept: int) -> None:
    packed.write_bytes(packed.read_bytes()[:kept])
    refused("packed", packed, str(packed), "not a readable HDF5 file")


def test_real_cifar100_packed(data_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "cifar100.h5"
    pack(open_dataset("cifar100", data_root, None).limited(5000), path, source="")
    assert_equal(load("packed", path), load("cifar100", data_root, limit=5000))
    packed = load("packed", path, limit=500)
    assert np.bincount(packed.labels[:500]).tolist() == [5] * 100
    assert packed.class_names is not None
    assert packed.class_names[:3] == ("apple", "aquarium_fish", "baby")
