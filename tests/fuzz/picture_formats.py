"""Data sets of image files: the pictures, and CelebA's lists."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import official_files as official
from data_formats import made, reads
from formats import Files, Format
from mutate import damage, damage_text
from PIL import Image

_SUFFIXES = ("jpg", "png", "ppm", "bmp", "tif", "webp")


def picture(content: bytes, rng: random.Random) -> bytes:
    """Damage an image file; a PNG with sums that are right again in half of the cases."""
    if content[:4] != b"\x89PNG" or rng.random() < 0.5:
        return damage(content, rng)
    if rng.random() < 0.2:
        return _png_bomb(rng)
    chunks, place = [], 8
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    at = rng.randrange(len(chunks))
    kind, data = chunks[at]
    if kind == b"IDAT" and rng.random() < 0.5:
        data = zlib.compress(damage(zlib.decompress(data), rng))
    else:
        data = damage(data, rng)
    chunks[at] = (kind, data)
    if rng.random() < 0.2:
        text = b"a\0" + zlib.compress(bytes(100 << 20))
        extra = ((b"zTXt", text), (b"iCCP", text), (b"tEXt", b"a\0" + b"b" * 100_000), chunks[at])
        chunks.insert(rng.randrange(1, len(chunks)), rng.choice(extra))
    return _png(chunks)


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        out += struct.pack(">I", len(data)) + kind + data
        out += struct.pack(">I", zlib.crc32(kind + data))
    return out


def _png_bomb(rng: random.Random) -> bytes:
    width, height = rng.choice(((13000, 13000), (30000, 30000), (1 << 20, 100), (1 << 31, 1 << 31)))
    header = struct.pack(">IIBBBBB", width & 0x7FFFFFFF, height & 0x7FFFFFFF, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(min(width * height * 3, 100 << 20)), 1)
    return _png([(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")])


def pictures(files: Files, rng: random.Random) -> Files:
    # The first image decides about shape and colour of all.
    name = rng.choice([sorted(files)[0], *sorted(files)])
    changed = {**files, name: picture(files[name], rng)}
    if rng.random() < 0.1:
        odd = rng.choice(("a\x1b[2J", "b\n", ".hidden", "train", "test", "é", "c"))
        changed |= {name.replace("/0/", f"/{odd}/"): files[name] for name in files if "/0/" in name}
    return changed


def folders(suffix: str) -> Files:
    """Return two classes of two images each."""
    rng = np.random.default_rng(0)
    files = {}
    for label in range(2):
        for number in range(2):
            pixels = rng.integers(0, 256, (12, 9, 3), dtype=np.uint8)
            out = io.BytesIO()
            image = Image.fromarray(pixels if suffix != "png" else pixels[..., 0])
            image.save(out, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
            files[f"data/{label}/{number}.{suffix}"] = out.getvalue()
    return files


def celeba(files: Files, rng: random.Random) -> Files:
    name = rng.choice(sorted(files))
    edit = damage_text if name.endswith(".txt") else picture
    return {**files, name: edit(files[name], rng)}


def _celeba(folder: Path) -> None:
    attributes = [["Bald", "Male"], ["Black_Hair"], ["Blond_Hair"], ["Brown_Hair"], ["Gray_Hair"]]
    official.write_celeba(folder, attributes, [3, 1, 4, 1, 5], [0, 0, 0, 1, 2])


FORMATS = {
    form.name: form
    for form in (
        Format(
            "images", lambda: [folders(suffix) for suffix in _SUFFIXES], reads("images"), pictures
        ),
        Format(
            "celeba",
            lambda: [made(_celeba)],
            reads("celeba", variants=("hair", "gender", "identity")),
            celeba,
        ),
    )
}
