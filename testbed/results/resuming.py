"""Goes on with a results file that its writer left unfinished.

HDF5 cannot write to a file whose writer was killed. What is committed is therefore copied into a
new file, which takes the old one's name when it is ready: there is a readable file at any moment.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from testbed.errors import UserError
from testbed.results.chunks import copy_chunks, datasets
from testbed.results.declaring import scenario_name
from testbed.results.events import TABLES
from testbed.results.opening import open_file
from testbed.results.output import (
    being_written,
    check_folder,
    has_name,
    hold,
    open_to_write,
    partial_path,
    reason,
)
from testbed.results.reader import Results
from testbed.results.schema import FILE_ENCODING

# Other attributes of the root say when and where the run was started.
_OF_THE_ROOT = ("experiment", "share", "run", "encoding-type", "encoding-version")
# Come from floating-point arithmetic, which another machine may round otherwise.
_DERIVED = ("privacy", "broken_assumptions")


@contextmanager
def unfinished(path: Path) -> Iterator[h5py.File]:
    """Open what a writer left of a results file, and keep others from going on with it.

    Parameters
    ----------
    path
        Name that the file has when it is complete.

    Raises
    ------
    UserError
        There is no unfinished file, another process writes it, it is damaged, or of a version
        that this program can only read.
    """
    check_folder(path)
    partial = partial_path(path)
    if not partial.exists():
        if path.exists():
            raise UserError(f"{path}: the run is complete: there is nothing to resume")
        raise UserError(f"{partial}: no such file: there is no run to resume, start one with `run`")
    with open_to_write(partial) as lock:
        # Another process may have gone on with it just now: then its copy has the name.
        if not hold(lock.fileno()) or not has_name(lock.fileno(), partial):
            raise being_written(partial)
        with open_file(partial) as file:
            Results(file, partial)  # raises where the file is damaged
            found, expected = file.attrs["encoding-version"], FILE_ENCODING[1]
            if found != expected:
                raise UserError(
                    f"{partial}: the file is of version {found}, expected {expected}, the only one "
                    "that this program can go on with: use the program that began it, or begin "
                    "again with `run --overwrite`"
                )
            yield file


def take_over(old: h5py.File, new: h5py.File) -> list[int]:
    """Copy attributes, tables and counts into a file that has just been declared.

    What is said of the run's first start stays; where the ranks are is that of the new one.

    Returns
    -------
    list[int]
        Committed rounds of each scenario.

    Raises
    ------
    UserError
        The two were not declared for the same run.
    """
    try:
        difference = _difference(old, new)
    except (OSError, RuntimeError, KeyError) as error:  # as HDF5 says that metadata are damaged
        raise UserError(
            f"{old.filename}: the file is damaged ({reason(error)}): begin again with "
            "`run --overwrite`"
        ) from None
    if difference:
        raise UserError(
            f"{old.filename}: this is the file of another run: {difference}; resume it with the "
            "experiment that it was begun with, or choose another name"
        )
    new.attrs.update(old.attrs)
    for name, group in _objects(old).items():
        for key in group.attrs.keys() & set(_DERIVED):
            new[name].attrs[key] = group.attrs[key]
    for table, (axis, _) in TABLES.items():
        # A writer that was killed may have lengthened some of the columns alone.
        length = len(old[table][axis])
        for name, column in old[table].items():
            new[table][name].resize((length,))
            new[table][name][...] = column[:length]
    committed: list[int] = old["committed_rounds"][...].tolist()
    new["committed_rounds"][...] = committed
    return committed


def copy_rounds(old: h5py.File, new: h5py.File) -> None:
    """Copy the committed rounds; the new file says already how many these are."""
    for index, rows in enumerate(new["committed_rounds"][...].tolist()):
        for dataset in datasets(old[scenario_name(index)]) if rows else ():
            if dataset.chunks is not None:
                copy = new[dataset.name]
                copy_chunks(dataset, copy, rows)
                _clear(copy, rows)


def _clear(dataset: h5py.Dataset, rows: int) -> None:
    """Take back what is written beyond the committed rounds, in the last chunk that has some."""
    begun = -(-rows // dataset.chunks[0]) * dataset.chunks[0]
    if begun > rows:
        dataset[rows:begun] = dataset.fillvalue
        dataset.flush()


def _objects(file: h5py.File) -> dict[str, h5py.Group | h5py.Dataset]:
    """Return what is declared from the plan, by name."""
    found: dict[str, h5py.Group | h5py.Dataset] = {}
    file.visititems(lambda name, item: found.update({name: item}))
    others = ("ranks", *TABLES)
    return {name: item for name, item in found.items() if name.partition("/")[0] not in others}


def _difference(old: h5py.File, new: h5py.File) -> str:
    """Return what tells two files apart that should be of one run; empty where nothing does."""
    counts = len(old["committed_rounds"]), len(new["committed_rounds"])
    if counts[0] != counts[1]:
        return _told("number of scenarios", *counts)
    for key in _OF_THE_ROOT:
        difference = _of_values(key, old.attrs.get(key), new.attrs.get(key))
        if difference:
            return difference
    before, after = _objects(old), _objects(new)
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            where = ("there", "not there")
            return _told(name, *(where if name in before else where[::-1]))
        difference = _of_objects(name, before[name], after[name])
        if difference:
            return difference
    return ""


def _of_objects(name: str, old: h5py.Group | h5py.Dataset, new: h5py.Group | h5py.Dataset) -> str:
    kinds = [_kind(item) for item in (old, new)]
    if kinds[0] != kinds[1]:
        return _told(name, *kinds)
    if isinstance(old, h5py.Dataset):
        return ""  # its attributes are HDF5's own
    for key in sorted((old.attrs.keys() | new.attrs.keys()) - set(_DERIVED)):
        difference = _of_values(f"{name}, {key}", old.attrs.get(key), new.attrs.get(key))
        if difference:
            return difference
    return ""


def _kind(item: h5py.Group | h5py.Dataset) -> str:
    if isinstance(item, h5py.Group):
        return "group"
    filters = f"{item.compression}, shuffle {item.shuffle}, checksums {item.fletcher32}"
    return f"{item.dtype} array of shape {item.shape} in chunks {item.chunks} ({filters})"


def _of_values(name: str, old: Any, new: Any) -> str:
    """Return where two values differ; of texts, which key or line it is."""
    if isinstance(old, str) and isinstance(new, str) and old != new:
        before, after = _parts(old), _parts(new)
        for key in [*before, *after]:
            pair = before.get(key, "nothing"), after.get(key, "nothing")
            if pair[0] != pair[1]:
                return _told(f"{name}, {key}", *pair)
    return "" if old == new else _told(name, old, new)


def _parts(text: str) -> dict[str, Any]:
    """Return the keys of a JSON object, or the lines of another text."""
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if isinstance(content, dict):
        return content
    return {f"line {number}": line for number, line in enumerate(text.splitlines(), start=1)}


def _told(what: str, *values: object) -> str:
    found, expected = (x.item() if isinstance(x, np.generic) else x for x in values)
    return f"{what}: found {found!r}, expected {expected!r}"
