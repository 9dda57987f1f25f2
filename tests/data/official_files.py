"""Writes data files as their publishers do."""

import gzip
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import io

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
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
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


def cifar10_bytes(rows: NDArray[np.uint8], labels: list[int]) -> bytes:
    """Return a batch of CIFAR-10's Python version with all four of its keys."""
    pickle = Python2Pickle()
    pickle.raw(b"}")
    pickle.put()
    pickle.raw(b"(")
    pickle.string(b"data")
    pickle.array(rows.shape, b"u1", rows.tobytes())
    pickle.string(b"labels")
    pickle.integers(labels)
    pickle.string(b"batch_label")
    pickle.string(b"training batch 1 of 5")
    pickle.string(b"filenames")
    pickle.strings([b"leptodactylus_pentadactylus_s_%06d.png" % i for i in range(len(labels))])
    pickle.raw(b"u")
    return pickle.finish()


CIFAR10_NAMES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def write_cifar10(folder: Path, each: int = 20) -> None:
    """Write CIFAR-10's five training batches, the test batch, and the names of its classes."""
    for seed, name in enumerate(CIFAR10_NAMES):
        rows = cifar_rows(each, seed)
        (folder / name).write_bytes(cifar10_bytes(rows, [(i + seed) % 10 for i in range(each)]))
    pickle = Python2Pickle()
    pickle.raw(b"}")
    pickle.put()
    pickle.raw(b"(")
    pickle.string(b"num_cases_per_batch")
    pickle.integer(10000)
    pickle.string(b"label_names")
    pickle.strings([b"class%d" % i for i in range(10)])
    pickle.raw(b"u")
    (folder / "batches.meta").write_bytes(pickle.finish())


def emnist_arrays(
    split: str, n: int, classes: int, first: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images as they are stored, columns first, and labels."""
    images, labels = digits_like(n, 5 if split == "train" else 6, classes)
    return images, labels + np.uint8(first)


def write_emnist(folder: Path, variant: str, classes: int, *, first: int = 0) -> None:
    """Write the four files of a variant of EMNIST, compressed, with every class twice."""
    for split in ("train", "test"):
        arrays = emnist_arrays(split, 2 * classes, classes, first)
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays, strict=True):
            name = f"emnist-{variant}-{split}-{kind}-ubyte.gz"
            (folder / name).write_bytes(gzip.compress(idx_bytes(array), 1, mtime=0))


def svhn_arrays(n: int, seed: int) -> dict[str, NDArray[np.uint8]]:
    """Return ``X`` [32, 32, 3, n] and ``y`` [n, 1] with labels 1..10."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % 10 + 1).astype(np.uint8)
    return {"X": rng.integers(0, 256, (32, 32, 3, n), dtype=np.uint8), "y": labels[:, None]}


def write_svhn(folder: Path, train: int = 30, test: int = 20) -> None:
    """Write the two files of SVHN's cropped digits, compressed as the official ones."""
    for seed, (name, n) in enumerate((("train", train), ("test", test))):
        io.savemat(folder / f"{name}_32x32.mat", svhn_arrays(n, seed), do_compression=True)


def leaf_content(users: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, Any]:
    """Return a file of LEAF's FEMNIST with random pixels for the labels of each user."""
    rng = np.random.default_rng(seed)
    return {
        "users": list(users),
        "num_samples": [len(labels) for labels in users.values()],
        "user_data": {
            user: {
                "x": (rng.integers(0, 256, (len(labels), 784)) / 255).tolist(),
                "y": list(labels),
            }
            for user, labels in users.items()
        },
    }


def write_leaf(path: Path, content: Any) -> None:
    """Write a JSON file, and the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


CELEBA_ATTRIBUTES = """
    5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose
    Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee
    Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard
    Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair
    Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young
    """.split()  # noqa: SIM905


def write_celeba(
    folder: Path,
    attributes: Sequence[Sequence[str]],
    identities: Sequence[int] | None = None,
    splits: Sequence[int] | None = None,
) -> list[str]:
    """Write CelebA's lists, and an image whose grey level is its number times ten, as JPEG.

    Parameters
    ----------
    attributes
        Of each image: the names of the attributes that it has.
    """
    names = [f"{i:06d}.jpg" for i in range(1, len(attributes) + 1)]
    lines = [str(len(names)), " ".join(CELEBA_ATTRIBUTES) + " "]
    for name, has in zip(names, attributes, strict=True):
        values = (" 1" if attribute in has else "-1" for attribute in CELEBA_ATTRIBUTES)
        lines.append(f"{name} {' '.join(values)}")
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    for file, values in (
        ("identity_CelebA.txt", identities),
        ("list_eval_partition.txt", splits),
    ):
        if values is not None:
            rows = [f"{name} {value}" for name, value in zip(names, values, strict=True)]
            (folder / file).write_text("\n".join(rows) + "\n")
    images = folder / "img_align_celeba"
    images.mkdir()
    for number, name in enumerate(names, 1):
        Image.new("RGB", (178, 218), (10 * number, 0, 255)).save(images / name, quality=95)
    return names


def write_picture(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write grey [h, w] or RGB [h, w, 3] in the format of the suffix, and the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
