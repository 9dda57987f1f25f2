"""NumPy archives as a data set, and the arrays of `analysis attack`."""

import io
import random
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from command_lines import analysis
from data_formats import reads
from formats import Files, Format, Input
from mutate import damage
from numpy.lib import format as npy

_HEADERS = (
    *("{'descr': '|O', 'fortran_order': False, 'shape': (3,), }", "{}", "[]", "None", "1" * 5000),
    *("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }", "(" * 3000, "{{}}"),
    *("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }", "{" + "'a':" * 900, "\x00\x00"),
    *("{'descr': '|V99999999', 'fortran_order': False, 'shape': (99999,), }", "-" * 9000 + "1"),
    *("{'descr': [('a', '<f8'), ('b', '|O')], 'fortran_order': False, 'shape': (2,), }", "{[]:1}"),
    *("{'descr': '<f8', 'fortran_order': False, 'shape': (0, 99999999999999999999), }", "x", "é"),
    *("{'descr': '<f16', 'fortran_order': True, 'shape': (2, 3), }", "__import__('os')", "{1:2}"),
    *("{'descr': '<U9', 'fortran_order': False, 'shape': (2,), }", "{'descr': 3, 'shape': 3}"),
    *("{'descr': ('<f8', (3,)), 'fortran_order': 1, 'shape': (True,), }", "[" * 90 + "]" * 90),
    *("{'descr': 'M8[s]', 'fortran_order': False, 'shape': (2,), }", "b'a' 'c'", "1e999", "{*[]}"),
)
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def npy_bytes(array: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    npy.write_array(out, array, version=(1, 0))
    return out.getvalue()


def array(content: bytes, rng: random.Random) -> bytes:
    """Damage a .npy file, its header in particular."""
    draw = rng.random()
    if draw < 0.15:
        return damage(content, rng)
    start = 10 + int.from_bytes(content[8:10], "little")
    header, values = content[10:start], content[start:]
    if draw < 0.4:
        header = damage(header, rng)
    elif draw < 0.8:
        return content[:start] + damage(values, rng)[: len(values)].ljust(len(values), b"\0")
    else:
        header = rng.choice(_HEADERS).encode("latin-1") + b"\n"
    version = rng.choice((1, 1, 1, 1, 2, 3, 9))
    return (
        b"\x93NUMPY"
        + bytes((version, 0))
        + len(header).to_bytes(2 if version == 1 else 4, "little")
        + header
        + values
    )


def unzipped(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members: Sequence[tuple[str, bytes]], method: int) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as archive:
        warnings.simplefilter("ignore")  # of two members with the same name
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method, 1 if method == 8 else None)
    return out.getvalue()


def archive(content: bytes, rng: random.Random) -> bytes:
    """Damage an archive, or its members, which are packed again."""
    draw = rng.random()
    if draw < 0.3:
        return damage(content, rng)
    members = list(unzipped(content).items())
    place = rng.randrange(len(members))
    name, inside = members[place]
    if draw < 0.75:
        members[place] = name, array(inside, rng)
    elif draw < 0.8:
        members[place] = rng.choice(("../x.npy", "/x.npy", "\x1b.npy", "", "é", name * 9)), inside
    elif draw < 0.85:
        del members[place]
    elif draw < 0.9:
        members.append((name, array(inside, rng)))
    elif draw < 0.91:
        # A bomb, whose header tells the truth.
        count = rng.choice((1 << 26, 1 << 34))
        start = npy_bytes(np.zeros((1, 3, 3), np.uint8)).replace(
            b"(1, 3, 3), }", b"(%d,), }" % count
        )
        members[place] = name, start + bytes(1 << 26)
    else:
        members[place] = name, npy_bytes(_odd(rng))
    packed = zipped(members, rng.choice(_METHODS) if rng.random() < 0.1 else rng.choice((0, 8)))
    if rng.random() < 0.15:
        # Flags, method, sizes, names.
        at = packed.rfind(b"PK\x01\x02")
        packed = packed[:at] + damage(packed[at : at + 60], rng) + packed[at + 60 :]
    return packed


def _odd(rng: random.Random) -> np.ndarray[Any, Any]:
    return rng.choice(
        (
            *(np.array([np.nan, np.inf, -np.inf]), np.zeros((0, 3)), np.array(3), np.array(True)),
            *(np.full((3, 4, 4), 1e300), np.zeros((2, 2), complex), np.array(["a", "b"])),
            *(np.array([-(1 << 63)]), np.array([(1 << 64) - 1], np.uint64), np.zeros((1,) * 30)),
            *(np.zeros((3, 0, 2)), np.array(["2024"], "M8[s]"), np.zeros(3, "i4,f8"), np.ones(9)),
            *(np.full((12, 4, 4), np.finfo(np.longdouble).max), np.arange(12), np.ones((12, 2))),
        )
    )


def _npz(files: Files, rng: random.Random) -> Files:
    return {"data": archive(files["data"], rng)}


def _data_sets() -> list[Files]:
    images, labels = (
        np.random.default_rng(0).integers(0, 256, (12, 4, 5), dtype=np.uint8),
        np.arange(12) % 3,
    )
    floats = {"images": images[:, None] / np.float32(255), "labels": labels, "classes": np.array(3)}
    more = {"images": images, "labels": labels, "test_images": images, "test_labels": labels}
    return [
        {"data": zipped([(f"{name}.npy", npy_bytes(values)) for name, values in arrays.items()], 8)}
        for arrays in (floats, more)
    ]


# What `analysis attack` takes beside the gradient, and whether it must be there.
_OPTIONAL = (
    "bias-gradient",
    "model-weights",
    "model-bias",
    "auxiliary-features",
    "auxiliary-labels",
)


def _given() -> list[Files]:
    classes, width, samples = 4, 5, 12
    rng = np.random.default_rng(0)
    gradient = rng.normal(size=(2, classes, width)).astype(np.float32)
    gradient -= gradient.mean(axis=1, keepdims=True)
    bias = gradient.sum(axis=2)
    files = {
        "weight-gradient": gradient,
        "bias-gradient": bias,
        "model-weights": rng.normal(size=(classes, width)),
        "model-bias": np.zeros(classes),
        "auxiliary-features": abs(rng.normal(size=(samples, width))),
        "auxiliary-labels": np.arange(samples) % classes,
    }
    return [{name: npy_bytes(values) for name, values in files.items()}]


def _arrays(files: Files, rng: random.Random) -> Input:
    share = rng.choice((1, 1, 1, 0.6))
    kept = {
        name: content
        for name, content in files.items()
        if name == "weight-gradient" or rng.random() < share
    }
    name = rng.choice(sorted(kept))
    if rng.random() < 0.3:
        kept[name] = archive(zipped([("a.npy", kept[name])], 8), rng)
    else:
        kept[name] = array(kept[name], rng) if rng.random() < 0.8 else npy_bytes(_odd(rng))
    size = rng.choice((*["8"] * 20, "1", "0", "-1", "1000000", "1" * 30))
    more = ("--local-steps=3", "--learning-rate=0.1") if rng.random() < 0.2 else ()
    if rng.random() < 0.05:
        more = (f"--learning-rate={rng.choice(('nan', '0', '1e-320', '1e300', '-1'))}",)
    return Input(kept, (f"--batch-size={size}", *more))


def _attack(folder: Path, arguments: Sequence[str]) -> None:
    given = [word for path in sorted(folder.iterdir()) for word in (f"--{path.name}", str(path))]
    chosen = ["--attack", "llg", "--attack", "idlg", "--attack", "llg_plus"] if arguments else []
    analysis("attack", *given, *(arguments or ["--batch-size=8"]), *chosen)


FORMATS = {
    form.name: form
    for form in (
        Format("npz", _data_sets, reads("npz"), _npz),
        Format("array", _given, _attack, _arrays),
    )
}
