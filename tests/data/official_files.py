"""Writes data files as their publishers do."""

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

IDX_TYPES = {"|u1": 0x08, "|i1": 0x09, ">i4": 0x0C, ">f4": 0x0D}


def idx_bytes(array: NDArray[np.generic]) -> bytes:
    """Return an IDX file: its magic number, sizes and elements, big-endian."""
    array = array.astype(array.dtype.newbyteorder(">"))
    header = struct.pack(
        f">BBBB{array.ndim}I", 0, 0, IDX_TYPES[array.dtype.str], array.ndim, *array.shape
    )
    return header + array.tobytes()


def digits_like(
    n: int, seed: int, classes: int = 10
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return random 28x28 images and labels in which every class occurs if n allows it."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
    return images, (np.arange(n) % classes).astype(np.uint8)


MNIST_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def write_mnist(folder: Path, train: int = 30, test: int = 20, *, compressed: bool = False) -> None:
    """Write the four files of MNIST, with random images."""
    arrays = (*digits_like(train, 1), *digits_like(test, 2))
    for name, array in zip(MNIST_NAMES, arrays, strict=True):
        content = idx_bytes(array)
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


class Python2Pickle:
    """Assembles a pickle of protocol 2 with the opcodes that Python 2's cPickle chose."""

    def __init__(self) -> None:
        self._out = bytearray(b"\x80\x02")
        self._slot = 0

    def put(self) -> None:
        small = self._slot < 256
        self._out += b"q" + bytes([self._slot]) if small else b"r" + struct.pack("<I", self._slot)
        self._slot += 1

    def raw(self, opcodes: bytes) -> None:
        self._out += opcodes

    def string(self, value: bytes) -> None:
        short = len(value) < 256
        self._out += b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))
        self._out += value
        self.put()

    def integer(self, value: int) -> None:
        if 0 <= value < 256:
            self._out += b"K" + bytes([value])
        elif 0 <= value < 65536:
            self._out += b"M" + struct.pack("<H", value)
        else:
            self._out += b"J" + struct.pack("<i", value)

    def name(self, module: str, name: str) -> None:
        self._out += f"c{module}\n{name}\n".encode()
        self.put()

    def array(self, shape: tuple[int, ...], dtype: bytes, content: bytes) -> None:
        self.name("numpy.core.multiarray", "_reconstruct")
        self.name("numpy", "ndarray")
        self.raw(b"K\0\x85")
        self.put()
        self.string(b"b")
        self.raw(b"\x87")
        self.put()
        self.raw(b"R")
        self.put()
        self.raw(b"(K\x01")
        self.raw(b"(")
        for size in shape:
            self.integer(size)
        self.raw(b"t")
        self.put()
        self.name("numpy", "dtype")
        self.string(dtype)
        self.raw(b"K\0K\x01\x87")
        self.put()
        self.raw(b"R")
        self.put()
        self.raw(b"(K\x03")
        self.string(b"|")
        self.raw(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t")
        self.put()
        self.raw(b"b\x89")
        self.string(content)
        self.raw(b"t")
        self.put()
        self.raw(b"b")

    def integers(self, values: list[int]) -> None:
        self.raw(b"]")
        self.put()
        self.raw(b"(")
        for value in values:
            self.integer(value)
        self.raw(b"e")

    def strings(self, values: list[bytes]) -> None:
        self.raw(b"]")
        self.put()
        self.raw(b"(")
        for value in values:
            self.string(value)
        self.raw(b"e")

    def finish(self) -> bytes:
        return bytes(self._out) + b"."


def cifar_bytes(
    rows: NDArray[np.uint8],
    labels: list[int],
    *,
    dtype: bytes = b"u1",
    shape: tuple[int, ...] | None = None,
) -> bytes:
    """Return a file of CIFAR-100's Python version with all five of its keys."""
    pickle = Python2Pickle()
    pickle.raw(b"}")
    pickle.put()
    pickle.raw(b"(")
    pickle.string(b"filenames")
    pickle.strings([b"bos_taurus_s_%06d.png" % i for i in range(len(labels))])
    pickle.string(b"batch_label")
    pickle.string(b"training batch 1 of 1")
    pickle.string(b"fine_labels")
    pickle.integers(labels)
    pickle.string(b"coarse_labels")
    pickle.integers([label // 5 for label in labels])
    pickle.string(b"data")
    pickle.array(rows.shape if shape is None else shape, dtype, rows.tobytes())
    pickle.raw(b"u")
    return pickle.finish()


def cifar_rows(n: int, seed: int) -> NDArray[np.uint8]:
    """Return random images as CIFAR-100 stores them, ``[n, 3072]``."""
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)


def write_cifar(folder: Path, train: int = 200, test: int = 100) -> None:
    """Write the files train and test of CIFAR-100, with random images."""
    for seed, (name, n) in enumerate((("train", train), ("test", test))):
        (folder / name).write_bytes(cifar_bytes(cifar_rows(n, seed), [i % 100 for i in range(n)]))
