"""Declares a results file: all its groups, datasets and attributes, before the first round.

`docs/file-format.md` is the specification.
"""

import json
from collections.abc import Mapping, Sequence

import h5py
import numpy as np

from testbed.results.events import declare_tables
from testbed.results.records import Rank, ScenarioHeader
from testbed.results.schema import FILE_ENCODING, chunk_shape


def declare(
    root: h5py.File,
    attributes: Mapping[str, str],
    ranks: Sequence[Rank],
    scenarios: Sequence[ScenarioHeader],
) -> None:
    """Create everything that a results file has, but for the rows of its tables.

    Parameters
    ----------
    root
        An empty file.
    attributes
        Attributes of the root group.
    ranks, scenarios
        Headers of all ranks and scenarios, in order.
    """
    _encode(root, FILE_ENCODING[0])
    root.attrs.update(attributes)
    _scale(root, "scenario", len(scenarios))
    committed = root.create_dataset("committed_rounds", data=np.zeros(len(scenarios), "<i8"))
    committed.dims[0].attach_scale(root["scenario"])

    table = root.create_group("ranks")
    _encode(table, "ranks")
    _scale(table, "rank", len(ranks))
    columns = {
        "host": np.array([rank.host.encode() for rank in ranks], dtype="S"),
        "device": np.array([rank.device.encode() for rank in ranks], dtype="S"),
        "role": np.array([rank.role.encode() for rank in ranks], dtype="S"),
        "local_rank": np.array([rank.local_rank for rank in ranks], dtype="<i4"),
        "cores": np.array([rank.cores.encode() for rank in ranks], dtype="S"),
        "gpu": np.array([rank.gpu.encode() for rank in ranks], dtype="S"),
    }
    for name, column in columns.items():
        table.create_dataset(name, data=column).dims[0].attach_scale(table["rank"])
    declare_tables(root)

    _encode(root.create_group("scenarios"), "scenarios")
    for index, header in enumerate(scenarios):
        group = root.create_group(scenario_name(index))
        number = index if header.number is None else header.number
        group.attrs["number"] = number
        group.attrs["draws"] = number if header.draws is None else header.draws
        _declare_scenario(group, header)


def scenario_name(index: int) -> str:
    """Return the path of a scenario's group."""
    return f"scenarios/{index:04d}"


def _declare_scenario(group: h5py.Group, header: ScenarioHeader) -> None:
    _encode(group, "scenario")
    group.attrs["swept"] = json.dumps(dict(header.swept))
    group.attrs["parameters"] = json.dumps(dict(header.parameters))
    group.attrs["model_parameters"] = header.model_parameters
    group.attrs["model_buffers"] = header.model_buffers
    group.attrs["last_layer"] = header.last_layer
    group.attrs["privacy"] = json.dumps(dict(header.privacy))
    for axis, length in header.lengths.items():
        _scale(group, axis, length)
    for path, spec in header.arrays.items():
        shape = tuple(header.lengths[axis] for axis in spec.axes)
        dataset = group.create_dataset(
            path,
            shape,
            spec.dtype,
            # Of an array that can grow, the index of chunks lies in pieces of a page at most.
            maxshape=(None, *shape[1:]),
            chunks=chunk_shape(shape, np.dtype(spec.dtype).itemsize),
            fillvalue=spec.fill,
            compression="gzip" if spec.compressed else None,
            compression_opts=1 if spec.compressed else None,
            shuffle=spec.compressed,
            fletcher32=True,
        )
        for position, axis in enumerate(spec.axes):
            dataset.dims[position].attach_scale(group[axis])
    for name in ("truth", "observations", "attacks", "rounds", "updates", "timings"):
        _encode(group[name], name)
    _encode(group["timings/attacks"], "attack-timings")
    for label, attack in header.attacks.items():
        described = group[f"attacks/{label}"]
        _encode(described, "attack")
        described.attrs["name"] = attack.name
        described.attrs["title"] = attack.title
        described.attrs["knowledge"] = attack.knowledge
        described.attrs["source"] = attack.source
        described.attrs["options"] = json.dumps(dict(attack.options))
        described.attrs["answers"] = attack.answers
        described.attrs["observes"] = json.dumps(list(attack.observes))
        described.attrs["assumes"] = json.dumps(list(attack.assumes))
        described.attrs["broken_assumptions"] = json.dumps(dict(attack.broken))
        described.attrs["not_applicable"] = attack.not_applicable
        described.attrs["target"] = attack.target
        described.attrs["adapted"] = attack.adapted
        described.attrs["adaptation"] = json.dumps(list(attack.adaptation))
        if "calibration" in described:
            _encode(described["calibration"], "calibration")


def _encode(group: h5py.Group, kind: str) -> None:
    group.attrs["encoding-type"] = kind
    group.attrs["encoding-version"] = FILE_ENCODING[1]


def _scale(group: h5py.Group, name: str, length: int) -> None:
    group.create_dataset(name, data=np.arange(length, dtype="<i8")).make_scale(name)
