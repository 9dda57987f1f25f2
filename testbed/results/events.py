"""The tables of a results file that grow: when a run was started, and which ranks it lost.

Their columns are extendable and declared up front, since SWMR supports no new datasets, but longer
ones.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from testbed.results.records import Loss, Rank, now
from testbed.results.schema import FILE_ENCODING

# Of each column its type; text is cut to fit.
STARTS = {
    "time": "S32",
    "ranks": "<i4",
    "hosts": "S2048",
    "library": "S256",
    "software": "S2048",
    "command": "S1024",
    "slurm_job": "S64",
    "committed": "<i8",
}
LOSSES = {
    "time": "S32",
    "rank": "<i4",
    "host": "S256",
    "reason": "S16",
    "start": "<i4",
    "scenario": "<i4",
    "round": "<i4",
    "seconds": "<f8",
}
# By name of the group: its axis, and its columns.
TABLES = {"starts": ("start", STARTS), "losses": ("loss", LOSSES)}
_ROWS_PER_CHUNK = 8


def declare_tables(root: h5py.File) -> None:
    """Create the tables, without a row."""
    for name, (axis, columns) in TABLES.items():
        group = root.create_group(name)
        group.attrs["encoding-type"], group.attrs["encoding-version"] = name, FILE_ENCODING[1]
        _column(group, axis, "<i8").make_scale(axis)
        for column, dtype in columns.items():
            _column(group, column, dtype).dims[0].attach_scale(group[axis])


def start_row(
    attributes: Mapping[str, str], ranks: Sequence[Rank], committed: int
) -> dict[str, Any]:
    """Return the row of a start.

    Parameters
    ----------
    attributes
        Root attributes of a file that would be created now.
    ranks
        Where they are.
    committed
        Rounds of all scenarios that are in the file already.
    """

    def told(name: str) -> str:
        return attributes.get(name, "")

    software = {"software_version": told("software_version"), "git_commit": told("git_commit")}
    return {
        "time": told("created") or now(),
        "ranks": len(ranks),
        "hosts": ", ".join(dict.fromkeys(rank.host for rank in ranks)),
        "library": told("mpi_library"),
        "software": json.dumps(software | json.loads(told("dependencies") or "{}")),
        "command": told("command"),
        "slurm_job": told("slurm_job"),
        "committed": committed,
    }


def loss_row(loss: Loss, start: int) -> dict[str, Any]:
    """Return the row of a lost rank, in the start of that number."""
    return {**{name: getattr(loss, name) for name in LOSSES if name != "start"}, "start": start}


def add_row(file: h5py.File, table: str, row: Mapping[str, Any]) -> None:
    """Append a row to a table; a reader never sees a part of it.

    The axis grows last: its length is that of the table.
    """
    axis, columns = TABLES[table]
    group = file[table]
    end = len(group[axis])
    for name, dtype in columns.items():
        value = row[name]
        if isinstance(value, str):
            value = np.bytes_(value.encode("ascii", "backslashreplace")[: np.dtype(dtype).itemsize])
        _append(group[name], end, value)
    _append(group[axis], end, end)


def _append(column: h5py.Dataset, end: int, value: Any) -> None:
    column.resize((end + 1,))
    column[end] = value
    column.flush()


def _column(group: h5py.Group, name: str, dtype: str) -> h5py.Dataset:
    return group.create_dataset(
        name,
        (0,),
        dtype,
        maxshape=(None,),
        chunks=(_ROWS_PER_CHUNK,),
        compression="gzip",
        compression_opts=1,
        fletcher32=True,
    )
