"""Data sets of bytes, pickles, MATLAB variables and JSON, damaged with knowledge of their parts."""

import functools
import gzip
import json
import pickle
import pickletools
import random
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import official_files as official
from formats import Files, Format
from mutate import damage, damage_text, damage_tree, nested
from sandbox import check_shown

from testbed.data import Dataset, open_dataset
from testbed.data.summary import summarize


def reads(name: str, *, variants: Sequence[str | None] = (None,), root: str = "data") -> Callable:
    """Return a reader that opens a data set, describes it as `data info`, and loads it."""

    def read(folder: Path, arguments: Sequence[str]) -> None:
        for variant in arguments or variants:
            data = open_dataset(name, folder / root, variant)
            check_shown(summarize(data))
            _check(data.load())

    return read


def _check(data: Dataset) -> None:
    """Raise where what was read is no data set, whatever the files were."""
    images, labels, count = data.images, data.labels, len(data.labels)
    assert images.ndim == 4
    assert images.flags.c_contiguous
    assert len(images) == count > 0
    assert images.dtype in (np.uint8, np.float32)
    assert images.min() >= 0
    assert images.max() * data.scale <= 1 + 1e-6
    assert labels.dtype == np.int64
    assert labels.min() >= 0
    assert labels.max() < data.classes
    assert data.test_start is None or 0 < data.test_start < count
    assert data.users is None or (len(data.users) == count and data.users.min() >= -1)
    assert data.class_names is None or len(data.class_names) == data.classes


def made(write: Callable[[Path], object], *names: str) -> Files:
    """Return the files that a function writes into a folder, under ``data/``."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        found = {f"data/{path.relative_to(folder)}": path.read_bytes() for path in paths}
    return {name: found[f"data/{name}"] for name in names} if names else found


# IDX: sizes in the header, and gzip around it.


def idx(files: Files, rng: random.Random) -> Files:
    name = rng.choice(sorted(files))
    return {**files, name: _idx(files[name], rng)}


def _idx(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return damage(content, rng)
    header = bytearray(content[: 4 + 4 * content[3]])
    if rng.random() < 0.3:
        header[rng.randrange(4)] = rng.choice((0, 1, 3, 8, 9, 13, 255))
    else:
        place = rng.randrange(1, len(header) // 4) * 4
        sizes = (0, 1, 27, 29, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
        struct.pack_into(">I", header, place, rng.choice(sizes))
    return bytes(header) + content[len(header) :]


def idx_gz(files: Files, rng: random.Random) -> Files:
    name = rng.choice(sorted(files))
    content = files[name]
    draw = rng.random()
    if draw < 0.35:
        return {**files, name: damage(content, rng)}
    if draw < 0.36:
        return {**files, name: _gzip_bomb(content, rng)}
    inside = _idx(gzip.decompress(content), rng)
    packed = gzip.compress(inside, 1, mtime=0)
    if draw > 0.9:
        packed += rng.choice((packed, b"\0" * 50, b"\x1f\x8b", rng.randbytes(30)))
    return {**files, name: packed}


def _gzip_bomb(content: bytes, rng: random.Random) -> bytes:
    """Return what unpacks to 128 MiB, and a header that announces as much, or more, or less."""
    header = bytearray(gzip.decompress(content)[:16])
    struct.pack_into(">I", header, 4, rng.choice((1, 12, 171_196, (1 << 32) - 1)))
    return gzip.compress(header, 1, mtime=0) + _zeros()


@functools.cache
def _zeros() -> bytes:
    return gzip.compress(bytes(128 << 20), 6, mtime=0)


def _mnist(folder: Path, *, compressed: bool) -> None:
    official.write_mnist(folder, 12, 10, compressed=compressed)


# Pickles: opcodes.

_CALLS = (
    *(b"cposix\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\nexec\n", b"cnumpy\nload\n"),
    *(b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\n_reconstruct\n"),
    *(b"(iposix\nsystem\n", b"X\x04\0\0\0true\x85R", b"U\x04true\x85R", b"b", b"R", b"\x81", b"o"),
    *(b"\x93", b"Q", b"Pid\n", b"\x82\1", b"]" * 600, b"\x85" * 3000, b"K\1r\xff\xff\xff\x7f"),
    *(b"\x8e" + b"\xff" * 7 + b"\x7f", b"T\xff\xff\xff\x7f", b"h\0", b"2", b"0", b"(", b"t", b"1"),
    *(b"\x8a\xff" + b"\xff" * 255, b"\x8b\xff\xff\xff\x7f", b"I" + b"9" * 5000 + b"\n", b"}", b")"),
)


def opcodes(content: bytes, rng: random.Random) -> bytes:
    """Drop, repeat, exchange or put in opcodes of a pickle; damage what is none."""
    try:
        starts = [place for *_, place in pickletools.genops(content)]
    except Exception:
        return damage(content, rng)
    stops = [*starts[1:], len(content)]
    parts = [content[start:stop] for start, stop in zip(starts, stops, strict=True)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        place, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        edit = rng.randrange(5)
        if edit == 0:
            parts[place] = b""
        elif edit == 1:
            parts[place:place] = parts[other : other + rng.choice((1, 2, 5))]
        elif edit == 2:
            parts[place], parts[other] = parts[other], parts[place]
        elif edit == 3:
            parts.insert(place, rng.choice(_CALLS))
        else:
            parts[place] = damage(parts[place], rng)
    return b"".join(parts)


def pickled(files: Files, rng: random.Random) -> Files:
    name = rng.choice(sorted(files))
    content = files[name]
    draw = rng.random()
    if draw < 0.3:
        return {**files, name: damage(content, rng)}
    if draw < 0.4:
        return {**files, name: pickle.dumps(damage_tree(_PLAIN, rng), rng.randrange(6))}
    return {**files, name: opcodes(content, rng)}


_PLAIN = {"data": [[0] * 8], "labels": [0, 1], "fine_labels": [3], "label_names": ["a"] * 10}


def _cifar10(folder: Path) -> None:
    official.write_cifar10(folder, 10)


def _cifar100(folder: Path) -> None:
    official.write_cifar(folder, 100, 100)


# MATLAB: elements within elements, some of them zlib streams.


def matlab(files: Files, rng: random.Random) -> Files:
    name = rng.choice(sorted(files))
    return {**files, name: _matlab(files[name], rng)}


def _matlab(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damage(content, rng)
    parts, place = [content[:128]], 128
    while place + 8 <= len(content):
        _, length = struct.unpack_from("<II", content, place)
        parts.append(content[place : place + 8 + length])
        place += 8 + length
    at = rng.randrange(len(parts))
    if at == 0:
        parts[0] = damage(parts[0][100:], rng).rjust(128)[:128]
        return b"".join(parts)
    try:
        inside = zlib.decompress(parts[at][8:])
    except zlib.error:
        inside = b""
    draw = rng.random()
    if draw < 0.01:
        inside = inside[:200] + bytes(64 << 20)
    elif draw < 0.6:
        # Tags, flags, shape and name are at the beginning.
        inside = damage(inside[:96], rng) + inside[96:]
    else:
        inside = damage(inside, rng)
    packed = zlib.compress(inside, 1)
    plain = draw > 0.9
    body = inside if plain else struct.pack("<II", 15, len(packed)) + packed
    parts[at] = body
    if rng.random() < 0.1:
        parts += parts[1:] * rng.choice((1, 100))
    return b"".join(parts)


# LEAF's JSON.


def leaf_json(files: Files, rng: random.Random) -> Files:
    name = rng.choice(sorted(files))
    content = files[name]
    draw = rng.random()
    if draw < 0.3:
        return {**files, name: damage_text(content, rng)}
    if draw < 0.32:
        opening = rng.choice((b"[", b'{"a":', b'{"users":['))
        return {**files, name: opening * rng.choice((900, 10_000, 1_000_000))}
    tree = json.loads(content)
    if draw < 0.36:
        tree["user_data"] = nested(tree["user_data"], 900, rng)
    try:
        return {**files, name: json.dumps(damage_tree(tree, rng)).encode()}
    except RecursionError:  # the two together are too deep to be written
        return {**files, name: damage_text(content, rng)}


def _leaf(folder: Path) -> None:
    for seed, (split, users) in enumerate(
        (("train", {"a": [0, 61], "b": [5]}), ("test", {"a": [1]}))
    ):
        official.write_leaf(folder / split / "all_data_0.json", official.leaf_content(users, seed))


FORMATS = {
    form.name: form
    for form in (
        Format("idx", lambda: [made(lambda f: _mnist(f, compressed=False))], reads("mnist"), idx),
        Format(
            "idx-gz", lambda: [made(lambda f: _mnist(f, compressed=True))], reads("mnist"), idx_gz
        ),
        Format(
            "emnist",
            lambda: [made(lambda f: official.write_emnist(f, "letters", 26, first=1))],
            reads("emnist", variants=("letters",)),
            idx_gz,
        ),
        Format("cifar10", lambda: [made(_cifar10)], reads("cifar10"), pickled),
        Format("cifar100", lambda: [made(_cifar100)], reads("cifar100"), pickled),
        Format(
            "svhn", lambda: [made(lambda f: official.write_svhn(f, 12, 10))], reads("svhn"), matlab
        ),
        Format("femnist", lambda: [made(_leaf)], reads("femnist"), leaf_json),
    )
}
