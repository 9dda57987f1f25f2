"""Reads groups of a results file by their encoding: its name and version.

`docs/file-format.md` is the specification. What is read here are tables and descriptions of a few
rows; `testbed.results.reader` reads scenarios and their arrays.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, cast

import h5py
import numpy as np
from numpy.typing import NDArray

from testbed.errors import UserError, suggest
from testbed.results import checked
from testbed.results.records import AttackInfo, Loss, Rank, Start
from testbed.results.schema import ANSWERS, KNOWLEDGE

# A writer may be replacing a chunk at the very moment that it is read.
_ATTEMPTS, _PAUSE_SECONDS = 5, 0.05

Reader = Callable[[h5py.Group], Any]
_READERS: dict[tuple[str, int], Reader] = {}


@contextmanager
def reading(file: h5py.File) -> Iterator[None]:
    """Turn what HDF5 says of a damaged file into one line for the user."""
    try:
        yield
    except UserError:
        raise
    # A damaged file can fail in any way that HDF5 can.
    except Exception as error:
        if not file:
            raise ValueError("the results file is closed") from None
        reason = str(error.args[0] if error.args else type(error).__name__)[:200]
        raise damaged(file, reason) from error


def damaged(file: h5py.File, reason: str) -> UserError:
    """Return what to raise where a file holds what no run writes."""
    return UserError(f"{file.filename}: the file is truncated or damaged ({reason}): copy it again")


def read_array(dataset: h5py.Dataset, selection: slice) -> NDArray[Any]:
    """Return a part of an array as it is now, though a writer may be adding to it."""
    growing = dataset.file.swmr_mode
    for attempt in range(_ATTEMPTS):
        if growing:
            dataset.id.refresh()
        try:
            return cast("NDArray[Any]", dataset[selection])
        except OSError as error:
            if not growing or attempt == _ATTEMPTS - 1:
                raise OSError(f"{dataset.name}: {error}") from None
            time.sleep(_PAUSE_SECONDS)
    raise AssertionError("unreachable")


def reads(kind: str, major: int) -> Callable[[Reader], Reader]:
    """Register the reader of groups with that ``encoding-type`` and major version."""

    def add(reader: Reader) -> Reader:
        _READERS[kind, major] = reader
        return reader

    return add


def dispatch(group: h5py.Group, expected: str) -> Any:
    """Read a group with the reader of its encoding."""
    return reader_of(group, expected)(group)


def reader_of(group: h5py.Group, expected: str | None = None) -> Reader:
    """Return the reader of a group's encoding; `UserError` where that is not known here."""
    name = group.file.filename
    kind, version = group.attrs.get("encoding-type"), group.attrs.get("encoding-version")
    if not isinstance(kind, str) or not isinstance(version, str):
        if group.name == "/":
            raise UserError(
                f"{name}: this is an HDF5 file, but no results file of this testbed (its root has "
                "no attribute encoding-type)"
            )
        raise ValueError(f"the group {group.name} has no encoding-type")
    majors = sorted(known for known_kind, known in _READERS if known_kind == kind)
    if not majors or kind != (expected or kind):
        wanted = repr(expected) if expected else suggest(kind, {known for known, _ in _READERS})
        raise UserError(
            f"{name}: {group.name} has the encoding-type {kind!r}, expected {wanted}: this is no "
            "results file of this testbed, or one of a newer version"
        )
    major = version.partition(".")[0]
    if major not in map(str, majors):
        raise UserError(
            f"{name}: {group.name} ({kind}) is of version {version}, this program reads version "
            f"{', '.join(map(str, majors))}: install a matching label-leakage-testbed"
        )
    return _READERS[kind, int(major)]


def member(group: h5py.Group, name: str) -> h5py.Group:
    """Return a group within a group; ValueError where there is none."""
    return checked.member(group, name, h5py.Group)


def _column(group: h5py.Group, name: str, kind: str) -> NDArray[Any]:
    """Return a column of a table; of the kind ``S`` as text."""
    dataset = checked.member(group, name, h5py.Dataset)
    if dataset.ndim != 1 or dataset.dtype.kind != kind:
        raise ValueError(f"{dataset.name} is {dataset.dtype} of shape {dataset.shape}")
    checked.check_claim(dataset, dataset.nbytes)
    values = read_array(dataset, slice(None))
    return np.char.decode(values, "ascii") if kind == "S" else values


@reads("ranks", 1)
def _ranks(group: h5py.Group) -> list[Rank]:
    text = [_column(group, name, "S") for name in ("host", "device", "role")]
    columns = [_column(group, "rank", "i"), *text, _column(group, "local_rank", "i")]
    # Since version 1.4.
    columns += [_column(group, name, "S") for name in ("cores", "gpu") if checked.has(group, name)]
    return [Rank(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


@reads("starts", 1)
def _starts(group: h5py.Group) -> list[Start]:
    return [Start(**row) for row in _rows(group, "start", Start)]


@reads("losses", 1)
def _losses(group: h5py.Group) -> list[Loss]:
    return [Loss(**row) for row in _rows(group, "loss", Loss)]


def _rows(group: h5py.Group, axis: str, kind: type[Start | Loss]) -> list[dict[str, Any]]:
    """Return the rows of a table that grows: as many as its axis is long."""
    length = len(_column(group, axis, "i"))
    kinds = {"str": "S", "int": "i", "float": "f"}
    columns = {
        item.name: _column(group, item.name, kinds[str(getattr(item.type, "__name__", item.type))])
        for item in fields(kind)
    }
    for name, column in columns.items():
        if len(column) < length:
            raise ValueError(f"{group.name}/{name} has {len(column)} rows, expected {length}")
        columns[name] = column[:length]
    lists = (column.tolist() for column in columns.values())
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


@reads("attacks", 1)
def _attacks(group: h5py.Group) -> "dict[str, AttackInfo]":
    return {label: _describe(member(group, label)) for label in group}


def _describe(group: h5py.Group) -> AttackInfo:
    dispatch(group, "attack")
    told = group.attrs
    info = AttackInfo(
        **{key: checked.text(told, key) for key in ("name", "title", "knowledge", "source")},
        options=checked.parsed(told, "options", dict),
        # Versions 1.0 and 1.1 said less.
        answers=checked.text(told, "answers", "counts"),
        observes=checked.parsed(told, "observes", list, "[]"),
        assumes=checked.parsed(told, "assumes", list, "[]"),
        broken=checked.parsed(told, "broken_assumptions", dict, "{}"),
        not_applicable=checked.text(told, "not_applicable", ""),
        target=checked.text(told, "target", "update"),
        adapted=checked.text(told, "adapted", ""),
        adaptation=checked.parsed(told, "adaptation", list, "[]"),
    )
    texts = [*info.observes, *info.assumes, *info.adaptation, *info.broken.values()]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{group.name} has lists of something else than text")
    if info.knowledge not in KNOWLEDGE:
        raise ValueError(f"{group.name} knows {info.knowledge!r}")
    if info.answers not in ANSWERS or info.target not in ("update", "accumulated"):
        raise ValueError(f"{group.name} answers {info.answers!r} about {info.target!r}")
    return info


@reads("truth", 1)
@reads("observations", 1)
@reads("attack", 1)
@reads("calibration", 1)
@reads("rounds", 1)
@reads("updates", 1)
@reads("timings", 1)
@reads("attack-timings", 1)
def _arrays(group: h5py.Group) -> h5py.Group:
    return group
