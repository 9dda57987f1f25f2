"""Edits of HDF5 files that leave them valid HDF5: what a program must not believe nevertheless."""

import contextlib
import functools
import io
import json
import random
import zlib
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np
from mutate import WORDS, damage_tree, leaf, nested

FIFO = "fifo"
"""In the folder of the file, and in the working directory: who opens it waits for ever."""

_UNPACKED = 512 << 20


def edited(content: bytes, rng: random.Random) -> bytes:
    """Return the file after one to three edits."""
    image = io.BytesIO(content)
    # After some edits HDF5 cannot close the file any more.
    with (
        contextlib.suppress(RuntimeError),
        h5py.File(image, "r+", libver=("v110", "v110")) as file,
    ):
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            # What an earlier edit left behind may not allow this one.
            for edit in rng.choices(_EDITS, k=5):
                try:
                    edit(file, rng)
                except Exception:
                    continue
                break
    return image.getvalue()


def _items(file: h5py.File, kind: type) -> list[str]:
    found: list[str] = []
    file.visititems(lambda name, item: found.append(name) if isinstance(item, kind) else None)
    return found


def _dataset(file: h5py.File, rng: random.Random) -> str:
    names = _items(file, h5py.Dataset)
    # Those that everything else hangs on, more often.
    first = [
        name for name in names if name.endswith(("committed_rounds", "truth/counts", "labels"))
    ]
    return rng.choice(first if first and rng.random() < 0.3 else names)


def _any(file: h5py.File, rng: random.Random) -> str:
    return rng.choice(_items(file, object))


def _remove(file: h5py.File, rng: random.Random) -> None:
    del file[_any(file, rng)]


def _attribute(file: h5py.File, rng: random.Random) -> None:
    holders = [file, *(file[name] for name in _items(file, object))]
    holder = rng.choice([one for one in holders if len(one.attrs)])
    names = list(holder.attrs)
    # HDF5's own attributes, which make the dimension scales, are among them.
    name = rng.choice(names)
    draw = rng.random()
    if draw < 0.15:
        del holder.attrs[name]
        return
    old = holder.attrs[name]
    if isinstance(old, str) and old[:1] in ("{", "[") and draw < 0.6:
        new = damage_tree(json.loads(old), rng)
        holder.attrs[name] = json.dumps(new) if draw < 0.5 else json.dumps(new)[: rng.randrange(9)]
        return
    holder.attrs.create(name, **rng.choice(_values(rng)))


def _values(rng: random.Random) -> list[dict[str, Any]]:
    plain = [leaf(rng), rng.choice(WORDS).replace("\0", ""), nested([], 1000, rng)]
    texts = [
        value if isinstance(value, str) else json.dumps(value, default=str)[:60_000]
        for value in plain
    ]
    return [
        *({"data": text.encode("utf-8", "replace").decode()[:20_000]} for text in texts),
        {"data": np.bytes_(b"\xff\xfe\x00a")},
        {"data": b"\xff\xfe", "dtype": h5py.string_dtype()},
        {"data": b"\x1b[2J", "dtype": h5py.string_dtype()},
        {"data": rng.choice((-1, 0, 1, 1 << 31, (1 << 63) - 1, -(1 << 63)))},
        {"data": np.uint64((1 << 64) - 1)},
        {"data": rng.choice((np.nan, np.inf, -0.0, 1e300))},
        {"data": np.float16(3)},
        {"data": np.arange(3)},
        {"data": np.zeros((0,), "i4")},
        {"data": ["a", "b"], "dtype": h5py.string_dtype()},
        {"data": np.array([(1, 2.0)], "i4,f8")},
        {"data": h5py.Empty("f8")},
        {"data": h5py.Empty(h5py.string_dtype())},
        {"data": np.void(b"abc")},
        {"data": True},
        {"data": 1j},
        {"data": "1." + "9" * 5000},
        {
            "data": rng.choice(
                ("1.0", "1.9", "2.0", "0.1", "1", "", "99999999999999999999.0", "٣.0")
            )
        },
    ]


def _replace(file: h5py.File, rng: random.Random) -> None:
    """Put another dataset in the place of one, with its dimension scales where these fit."""
    name = _dataset(file, rng)
    old = file[name]
    shape, dtype = old.shape or (), old.dtype
    scales = (
        [[scale.name for scale in dim.values()] for dim in old.dims] if not old.is_scale else []
    )
    arguments = rng.choice(_datasets(shape, dtype, rng))
    was_scale = old.is_scale
    del file[name]
    row = arguments.pop("packed", 0)
    if arguments.pop("raw", False):
        file[name] = arguments["data"]
    else:
        made = file.create_dataset(name, **arguments)
        if row:
            made.id.write_direct_chunk((0,) * made.ndim, _packed(row))
    if was_scale and rng.random() < 0.8:
        file[name].make_scale(name.rpartition("/")[2])
    for axis, names in enumerate(scales[: file[name].ndim]):
        for scale in names:
            if scale in file and rng.random() < 0.9:
                file[name].dims[axis].attach_scale(file[scale])


def _datasets(shape: tuple[int, ...], dtype: Any, rng: random.Random) -> list[dict[str, Any]]:
    number = dtype if dtype.kind in "iuf" else np.dtype("f4")
    fill = rng.choice((0, 1, 77, -1)) if number.kind != "u" else 77
    large = tuple(rng.choice((1, 1 << 20, 1 << 33, 1 << 40)) for _ in shape) or (1 << 40,)
    while np.prod(np.array(large, object)) * number.itemsize >= 1 << 62:
        large = tuple(max(1, length >> 8) for length in large)
    other = rng.choice(("S3", "U", "f2", "i8", "u8", "c16", "b1", "i4,f8", "V7", "f8", "i1", ">i4"))
    other = h5py.string_dtype() if other == "U" else np.dtype(other)
    values = _extreme(shape, number, rng)
    return [
        *({"shape": shape, "dtype": other} for _ in range(2)),
        *({"data": values} for _ in range(4)),
        {"shape": shape, "dtype": h5py.vlen_dtype(np.int32)},
        {"shape": shape, "dtype": h5py.enum_dtype({"a": 1, "b": 2})},
        {"shape": shape, "dtype": h5py.ref_dtype},
        {"data": h5py.Empty(number), "raw": True},
        {"shape": (), "dtype": number},
        {"shape": (*shape, 2), "dtype": number},
        {"shape": shape[1:], "dtype": number},
        {"shape": tuple(length + rng.choice((-1, 0, 1)) for length in shape), "dtype": number},
        {"shape": (0, *shape[1:]), "dtype": number},
        # Chunks that were never written: a few bytes stand for as much as one likes.
        {
            "shape": large,
            "dtype": number,
            "chunks": tuple(min(9, n) for n in large),
            "fillvalue": fill,
        },
        {"shape": large, "dtype": number, "chunks": tuple(min(9, n) for n in large)},
        _large_chunk(shape or (1,), number),
        {"shape": shape or (1,), "dtype": number, "compression": "lzf", "chunks": True},
        {"shape": shape or (1,), "dtype": number, "maxshape": (None,) * max(1, len(shape))},
    ]


def _large_chunk(shape: tuple[int, ...], dtype: np.dtype[Any]) -> dict[str, Any]:
    """Return a small dataset whose only chunk takes 512 MiB when it is unpacked."""
    row = dtype.itemsize * max(1, int(np.prod(shape[1:])))
    return {
        "shape": shape,
        "dtype": dtype,
        "chunks": (_UNPACKED // row, *shape[1:]),
        "maxshape": (None, *shape[1:]),
        "compression": 1,
        "packed": row,
    }


@functools.cache
def _packed(row: int) -> bytes:
    packer, size = zlib.compressobj(1), _UNPACKED // row * row
    pieces = [
        packer.compress(bytes(min(1 << 20, size - start))) for start in range(0, size, 1 << 20)
    ]
    return b"".join((*pieces, packer.flush()))


def _extreme(shape: tuple[int, ...], dtype: np.dtype[Any], rng: random.Random) -> Any:
    if np.prod(np.array(shape, object)) > 1 << 20:
        raise ValueError("an earlier edit made it large")
    if dtype.kind == "f":
        choices = [0, 1, -1, np.nan, np.inf, -np.inf, 1e300, 1e-300, 0.5, 2]
    else:
        info = np.iinfo(dtype)
        choices = [0, 1, 2, 7, info.min, info.max, info.max // 2, max(-1, info.min), 100]
    with np.errstate(over="ignore"):
        if rng.random() < 0.5:
            return np.full(shape, rng.choice(choices), dtype)
        drawn = np.random.default_rng(rng.getrandbits(64))
        return drawn.choice(np.array(choices, dtype), shape)


def _values_of(file: h5py.File, rng: random.Random) -> None:
    item = file[_dataset(file, rng)]
    if item.dtype.kind in "iuf" and item.shape:
        item[...] = _extreme(item.shape, item.dtype, rng)
    elif item.dtype.kind == "S":
        item[...] = rng.choice((b"\xff", b"\x1b[2J", b"", b"a\nb", b"9" * 99))


def _resize(file: h5py.File, rng: random.Random) -> None:
    """Make an axis, and what has it, longer than the file can hold."""
    names = [name for name in _items(file, h5py.Dataset) if file[name].is_scale]
    if not names:
        _replace(file, rng)
        return
    name = rng.choice(names)
    length = rng.choice((0, 1, 5, 1000, 1 << 31, 1 << 40))
    label = name.rpartition("/")[2]
    held = [one for one in _items(file, h5py.Dataset) if _has(file, one, name)]
    shapes = {
        one: tuple(
            length if any(scale.name == f"/{name}" for scale in dim.values()) else size
            for size, dim in zip(file[one].shape, file[one].dims, strict=True)
        )
        for one in held
    }
    scales = {one: [[s.name for s in dim.values()] for dim in file[one].dims] for one in held}
    dtypes = {one: file[one].dtype for one in held}
    for one in (name, *held):
        del file[one]
    chunk = {"chunks": (min(9, length),)} if length else {}
    file.create_dataset(name, (length,), "i8", **chunk).make_scale(label)
    for one in held:
        chunk = {"chunks": tuple(min(9, n) for n in shapes[one])} if all(shapes[one]) else {}
        file.create_dataset(
            one, shapes[one], dtypes[one], fillvalue=_fill(dtypes[one], rng), **chunk
        )
        for axis, attached in enumerate(scales[one]):
            for scale in attached:
                file[one].dims[axis].attach_scale(file[scale])
    if rng.random() < 0.7 and "committed_rounds" in file and label == "round":
        file["committed_rounds"][...] = length


def _fill(dtype: np.dtype[Any], rng: random.Random) -> Any:
    return None if dtype.kind not in "iuf" else np.zeros((), dtype) + rng.choice((0, 1, 8))


def _has(file: h5py.File, name: str, scale: str) -> bool:
    item = file[name]
    return not item.is_scale and any(
        one.name == f"/{scale}" for dim in item.dims for one in dim.values()
    )


def _detach(file: h5py.File, rng: random.Random) -> None:
    item = file[_dataset(file, rng)]
    axis = rng.randrange(item.ndim)
    for scale in item.dims[axis].values():
        item.dims[axis].detach_scale(scale)
    if rng.random() < 0.5:
        others = [file[name] for name in _items(file, h5py.Dataset) if file[name].is_scale]
        item.dims[axis].attach_scale(rng.choice(others))


def _link(file: h5py.File, rng: random.Random) -> None:
    """Put a link in the place of something: to itself, around in a circle, out of the file."""
    name = _any(file, rng)
    target = _any(file, rng)
    if rng.random() < 0.5:
        del file[name]
    else:
        name = (
            rng.choice((*_items(file, h5py.Group), "scenarios"))
            + "/"
            + rng.choice(("0001", "x", "llg"))
        )
    file[name] = rng.choice(
        (
            h5py.SoftLink(f"/{name}"),
            h5py.SoftLink("/"),
            h5py.SoftLink(f"/{target}"),
            h5py.SoftLink("/nowhere"),
            h5py.ExternalLink(FIFO, "/"),
            h5py.ExternalLink(FIFO, f"/{name}"),
            h5py.ExternalLink("data", f"/{name}"),
            file["/"],
        )
    )


def _outside(file: h5py.File, rng: random.Random) -> None:
    """Put a dataset in the place of one whose elements are in another file."""
    name = _dataset(file, rng)
    shape, dtype = file[name].shape, file[name].dtype
    scales = [[s.name for s in dim.values()] for dim in file[name].dims]
    del file[name]
    size = int(np.prod(shape)) * dtype.itemsize
    if rng.random() < 0.5:
        target = rng.choice((FIFO, "/dev/zero", "/proc/self/mem"))
        file.create_dataset(name, shape, dtype, external=[(target, 0, size)])
    else:
        layout = h5py.VirtualLayout(shape, dtype)
        target, path = rng.choice(((FIFO, "x"), (".", f"/{name}"), (f"in/{FIFO}", "x")))
        layout[...] = h5py.VirtualSource(target, path, shape)
        file.create_virtual_dataset(name, layout)
    for axis, names in enumerate(scales):
        for scale in names:
            file[name].dims[axis].attach_scale(file[scale])


def _filter(file: h5py.File, rng: random.Random) -> None:
    """Name a filter that nobody has: HDF5 would look for a library."""
    name = _dataset(file, rng)
    shape, dtype = file[name].shape, file[name].dtype
    if np.prod(np.array(shape, object)) > 1 << 20:
        raise ValueError("an earlier edit made it large")
    del file[name]
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(tuple(max(1, n) for n in shape))
    properties.set_filter(rng.choice((307, 32001, 65535)), h5py.h5z.FLAG_OPTIONAL, (1, 2))
    space = h5py.h5s.create_simple(shape)
    made = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, properties)
    h5py.Dataset(made).id.write_direct_chunk((0,) * len(shape), b"abc", 0)


def _rename(file: h5py.File, rng: random.Random) -> None:
    name = _any(file, rng)
    stem = name.rpartition("/")[0]
    last = rng.choice(
        ("9999", "0002", "٣", "9" * 30, "a" * 5000, "\x1b[2J", "a\nb", "é", "00", "x")
    )
    file.move(name, f"{stem}/{last}" if stem else last)


def _copy(file: h5py.File, rng: random.Random) -> None:
    groups = _items(file, h5py.Group)
    if groups:
        name = rng.choice(groups)
        file.copy(name, name + rng.choice(("1", "+adapted", "\x1b", " ")))


def _deepen(file: h5py.File, rng: random.Random) -> None:
    name = rng.choice([*_items(file, h5py.Group), "/"])
    file.create_group(name + "/a" * rng.choice((10, 2000)))


_EDITS: list[Callable[[h5py.File, random.Random], None]] = [
    *[_remove] * 2,
    *[_attribute] * 6,
    *[_replace] * 6,
    *[_values_of] * 5,
    *[_resize] * 2,
    *[_detach, _link, _link, _outside, _filter, _rename, _copy, _deepen],
]
