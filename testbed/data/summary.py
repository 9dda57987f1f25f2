"""What a data set holds, as text."""

import numpy as np
from numpy.typing import NDArray

from testbed.data.lazy import LazyDataset
from testbed.errors import printable

_MOST_CLASSES = 20
_BAR = 30


def summarize(data: LazyDataset) -> str:
    """Return samples, image shape, users, memory and class counts of a data set, in lines.

    Images are not read. Few classes get a line and a bar each, many classes their least, median
    and greatest count.
    """
    training = data.training
    test = len(data.labels) - training
    channels, height, width = data.shape
    count = len(data.labels)
    held = count * data.image_bytes + data.labels.nbytes
    held += 0 if data.users is None else data.users.nbytes
    rows = {
        "data set": printable(data.name + (f", variant {data.variant}" if data.variant else "")),
        "samples": f"{training} training, {test} test" if test else f"{count}, no official test",
        "image": f"{channels}x{height}x{width} {data.dtype}, times {data.scale:.6g} is in 0..1",
        "users": _users(data),
        "memory": _size(held),
        "classes": str(data.classes),
    }
    lines = [f"{key:<9} {value}" for key, value in rows.items()]
    if data.note:
        lines.append(f"{'note':<9} {data.note}")
    parts = {"training": np.bincount(data.labels[:training], minlength=data.classes)}
    if test:
        parts["test"] = np.bincount(data.labels[training:], minlength=data.classes)
    lines += ["", *(_bars if data.classes <= _MOST_CLASSES else _spans)(data, parts)]
    return "\n".join(lines)


def _users(data: LazyDataset) -> str:
    if data.users is None:
        return "not known"
    training = data.users[: data.training]
    known = training[training >= 0]
    if len(known) == 0:
        return "none of the training samples has one"
    counts = np.bincount(known)
    text = f"{len(counts)} with training samples, {_span(counts)} each"
    others = len(np.unique(data.users)) - len(counts) - bool((data.users < 0).any())
    nobody = int((data.users < 0).sum())
    text += f"; {others} with test samples only" if others else ""
    return text + (f"; {nobody} samples of nobody" if nobody else "")


def _span(counts: NDArray[np.int64]) -> str:
    return f"{counts.min()} to {counts.max()} (median {np.median(counts):g})"


def _name(data: LazyDataset, label: int) -> str:
    name = data.class_names[label] if data.class_names else ""
    return f"{label} {printable(name)}" if name and name != str(label) else str(label)


def _bars(data: LazyDataset, parts: dict[str, NDArray[np.int64]]) -> list[str]:
    names = [_name(data, label) for label in range(data.classes)]
    width = max(map(len, [*names, "class"]))
    header = f"{'class':<{width}}" + "".join(f"  {part:>8}" for part in parts)
    greatest = max(int(parts["training"].max()), 1)
    lines = [header]
    for label, name in enumerate(names):
        numbers = "".join(f"  {counts[label]:>8}" for counts in parts.values())
        bar = "#" * -(-_BAR * int(parts["training"][label]) // greatest)
        lines.append(f"{name:<{width}}{numbers}  {bar}".rstrip())
    return lines


def _spans(data: LazyDataset, parts: dict[str, NDArray[np.int64]]) -> list[str]:
    lines = []
    for part, counts in parts.items():
        lines.append(f"{part} samples per class: {_span(counts)}")
        least, most = (_name(data, int(find(counts))) for find in (np.argmin, np.argmax))
        if least != most:
            lines.append(f"  fewest of class {least}, most of class {most}")
        if empty := int((counts == 0).sum()):
            lines.append(f"  {empty} classes without any")
    return lines


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 999.5e6 else f"{count / 1e6:.3g} MB"
