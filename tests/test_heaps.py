"""A file that would keep the HDF5 library busy for ever is not given to it."""

import struct
from pathlib import Path

import h5py
import numpy as np
import pytest

from testbed.heaps import check_heaps


@pytest.fixture(params=["earliest", "v110", "latest"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a file with attributes in several heaps, one of them large."""
    path = tmp_path / "file.h5"
    with h5py.File(path, "w", libver=request.param) as file:
        for number in range(300):
            file.attrs[f"name{number}"] = f"text {number} " * 10
        file.attrs["long"] = "x" * 50_000
        texts = np.array([f"class {number}" for number in range(1000)], object)
        file.create_dataset("texts", data=texts, dtype=h5py.string_dtype())
        # Data that look like a heap, but for the three reserved bytes.
        file["data"] = np.frombuffer(b"GCOL\x01\0\0\x01" * 100, np.uint8)
    return path


def test_heaps_that_the_library_wrote_are_accepted(path: Path) -> None:
    assert path.read_bytes().count(b"GCOL\x01\0\0\0") > 3
    check_heaps(path)


@pytest.mark.parametrize(("index", "length"), [(0, 0), (0, 15), (1, 2**64 - 16), (1, 2**40)])
def test_an_object_that_leads_nowhere_is_refused(path: Path, index: int, length: int) -> None:
    content = bytearray(path.read_bytes())
    start = content.index(b"GCOL\x01\0\0\0") + 16
    struct.pack_into("<H6xQ", content, start, index, length)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a heap with an object of {length} bytes"):
        check_heaps(path)


def test_a_heap_behind_the_first_block_of_the_file_is_found(path: Path) -> None:
    # Where it is does not matter, across the border of two blocks that are read in particular.
    heap = b"GCOL\x01\0\0\0" + struct.pack("<Q", 32) + bytes(16)
    size = path.stat().st_size
    for place in ((1 << 22) - 20, (1 << 22) - 5, 1 << 22, (1 << 23) - 1):
        content = path.read_bytes() + bytes(place - size) + heap
        other = path.with_name("other.h5")
        other.write_bytes(content)
        with pytest.raises(ValueError, match="a heap with an object of 0 bytes"):
            check_heaps(other)


def test_heaps_in_heaps_are_refused(path: Path) -> None:
    # Each says that it reaches to the end of the file: to walk through all would take for ever.
    count = 10_000
    part = b"GCOL\x01\0\0\0" + struct.pack("<Q", 16 * count)
    path.write_bytes(path.read_bytes() + part * count)
    with pytest.raises(ValueError, match="heap"):
        check_heaps(path)


@pytest.mark.parametrize("content", [b"", b"\x89HDF", b"PK\3\4" * 10, bytes(512)])
def test_what_is_no_hdf5_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="file signature not found"):
        check_heaps(tmp_path / "file")


def test_fields_of_another_size_are_refused(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[9 if content[8] >= 2 else 13] = 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match="superblock"):
        check_heaps(path)
