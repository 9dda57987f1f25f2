"""The reader of MATLAB files, against SciPy's writer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import io

from testbed.data.matlab import read_variables

RNG = np.random.default_rng(0)
ARRAYS: dict[str, NDArray[Any]] = {
    "bytes": RNG.integers(0, 256, (3, 4, 5), np.uint8),
    "words": RNG.integers(-(2**40), 2**40, (2, 3), np.int64),
    "doubles": RNG.normal(size=(4, 1)),
    "singles": RNG.normal(size=(1, 6)).astype(np.float32),
    "small": np.array([[1.0, 2.0]]),
    "empty": np.zeros((0, 3), np.uint16),
}


@pytest.mark.parametrize("compressed", [False, True])
def test_numbers_are_those_that_scipy_wrote(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "a.mat"
    io.savemat(path, ARRAYS, do_compression=compressed)
    found = read_variables(path)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        values = found[name].values()
        assert values.dtype == array.dtype
        np.testing.assert_array_equal(values, array)


def test_what_is_no_array_of_numbers_is_told_by_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    io.savemat(path, {"text": "abc", "pair": {"a": 1}, "waves": np.array([[1 + 2j]])})
    found = read_variables(path)
    assert (found["text"].kind, found["pair"].kind) == ("char", "struct")
    assert found["waves"].is_complex
    with pytest.raises(ValueError, match="char is no type of numbers"):
        found["text"].values()


def test_bytes_in_the_other_order(tmp_path: Path) -> None:
    """MATLAB on a big-endian machine: everything but the bytes of uint8 arrays is turned round."""
    import struct

    numbers = struct.pack(">II", 4, 4) + struct.pack(">HH", 7, 300) + bytes(4)
    beginning = struct.pack(">IIII", 6, 8, 11, 0) + struct.pack(">IIii", 5, 8, 1, 2)
    name = struct.pack(">HH", 1, 1) + b"a" + bytes(3)
    body = beginning + name + numbers
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x01\x00MI"
    path = tmp_path / "a.mat"
    path.write_bytes(header + struct.pack(">II", 14, len(body)) + body)
    assert read_variables(path)["a"].values().tolist() == [[7, 300]]
