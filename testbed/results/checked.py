"""Takes things out of an HDF5 file that anyone may have written: nothing is believed unchecked.

HDF5 follows links into other files, makes arrays of whatever size from a few bytes, and gives
attributes of any type. A file of this testbed has nothing of the kind, so it is refused. All of it
raises `ValueError`, which the reader turns into a message about the file.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import h5py
import numpy as np

from testbed.results.schema import ANSWERS, ArraySpec, scenario_arrays

H = TypeVar("H", bound=h5py.Group | h5py.Dataset)
T = TypeVar("T", int, str, dict[str, Any], list[Any])

# Deflate cannot do better than 1032 to 1; what claims more does not hold what it claims.
_MOST_RATIO = 1040
# Of arrays that were never written, and of what is read at a time of those that were.
_FREE_BYTES = 1 << 28
_MOST_CHUNK_BYTES = 1 << 24
# For each piece that is read HDF5 takes some 6 KB, whether it was written or not.
_MOST_PIECES = 1 << 15
_FILTERS = {h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_FLETCHER32}
_MOST_DEPTH = 40


def member(group: h5py.Group, name: str, kind: type[H]) -> H:
    """Return a group or dataset by its name in a group, or `ValueError`.

    What a link leads to, in this file or in another one, is not looked at.
    """
    if not has(group, name):
        raise ValueError(f"{group.name.rstrip('/')}/{name} is missing")
    item = group[name]
    if not isinstance(item, kind):
        raise ValueError(f"{item.name} is no {kind.__name__.lower()}")
    if isinstance(item, h5py.Dataset):
        _check_stored(item)
    return cast("H", item)


def has(group: h5py.Group, name: str) -> bool:
    """Return whether a group has a member of that name; refuses a link, which ``in`` follows."""
    links, key = group.id.links, name.encode()
    if not links.exists(key):
        return False
    if links.get_info(key).type != h5py.h5l.TYPE_HARD:
        raise ValueError(f"{group.name.rstrip('/')}/{name} is a link")
    return True


def find(group: h5py.Group, path: str) -> h5py.Group | h5py.Dataset | None:
    """Return what has a path in a group, or None; as `member`, but for the elements."""
    item = group
    for part in path.split("/"):
        if not isinstance(item, h5py.Group) or not has(item, part):
            return None
        item = item[part]
    return item


def _check_stored(dataset: h5py.Dataset) -> None:
    """Raise where the elements are elsewhere, or unpacking a few may take much memory."""
    creation, shape, dtype = dataset.id.get_create_plist(), dataset.shape, dataset.dtype
    if shape is None or dtype.kind not in "iufS":
        raise ValueError(f"{dataset.name} holds no array of numbers or text")
    layout = creation.get_layout()
    if layout == h5py.h5d.VIRTUAL or creation.get_external_count():
        raise ValueError(f"{dataset.name} has its elements in other places")
    filters = {creation.get_filter(place)[0] for place in range(creation.get_nfilters())}
    if not filters <= _FILTERS:
        raise ValueError(f"{dataset.name} is packed by the filters {sorted(filters)}")
    if layout == h5py.h5d.CHUNKED:
        chunk = math.prod(creation.get_chunk()) * dtype.itemsize
        if chunk > max(_MOST_CHUNK_BYTES, math.prod(shape) * dtype.itemsize):
            raise ValueError(f"{dataset.name} has pieces of {chunk} bytes")


def check_claim(dataset: h5py.Dataset, nbytes: int) -> None:
    """Raise where so many bytes of an array are more than the file can hold of it."""
    stored = dataset.id.get_storage_size()
    if nbytes > max(_FREE_BYTES, _MOST_RATIO * stored):
        raise ValueError(f"{dataset.name} announces {nbytes} bytes, the file holds {stored} of it")
    pieces = nbytes // (math.prod(dataset.chunks or dataset.shape) * dataset.dtype.itemsize or 1)
    if pieces > _MOST_PIECES and pieces > 2 * dataset.id.get_num_chunks():
        raise ValueError(f"{dataset.name} announces {pieces} pieces, most of them never written")


def length(group: h5py.Group, axis: str) -> int:
    """Return the length of an axis of a scenario."""
    scale = member(group, axis, h5py.Dataset)
    if scale.ndim != 1 or not scale.is_scale or scale.dtype.kind not in "iu":
        raise ValueError(f"{scale.name} is no axis")
    if not 0 < scale.shape[0] < 1 << 31:
        raise ValueError(f"{scale.name} has the length {scale.shape[0]}")
    return int(scale.shape[0])


def scales(scenario: h5py.Group) -> dict[int, str]:
    """Return the axes of a scenario by where in the file they are."""
    found = {}
    for name in scenario:
        item = scenario[name] if has(scenario, name) else None
        if isinstance(item, h5py.Dataset) and item.is_scale:
            found[h5py.h5o.get_info(item.id).addr] = name
    return found


def axes(path: str, dataset: h5py.Dataset, known: Mapping[int, str]) -> tuple[str, ...]:
    """Return the names of an array's axes, once it is what the format says of it.

    Parameters
    ----------
    path
        Of the array in its scenario.
    known
        The scenario's axes, as of `scales`.
    """
    _check_stored(dataset)
    if dataset.dtype.kind == "S":
        raise ValueError(f"{dataset.name} holds no numbers")
    names = []
    for place, size in enumerate(dataset.shape):
        attached: list[h5py.h5d.DatasetID] = []
        h5py.h5ds.iterate(dataset.id, place, attached.append, 0)
        places = [h5py.h5o.get_info(scale).addr for scale in attached]
        if len(places) != 1 or places[0] not in known or attached[0].shape != (size,):
            raise ValueError(f"{dataset.name} has an axis without a dimension scale of its length")
        names.append(known[places[0]])
    forms = _specified(path)
    if forms and not any(
        names == list(spec.axes) and dataset.dtype.kind == np.dtype(spec.dtype).kind
        for spec in forms
    ):
        raise ValueError(f"{dataset.name} is {dataset.dtype} with the axes {', '.join(names)}")
    return tuple(names)


def _specified(path: str) -> list[ArraySpec]:
    """Return what the format says of an array, one for each form that it may have."""
    first, _, rest = path.partition("/")
    last = rest.partition("/")[2]
    if first == "attacks" and last in ANSWERS:
        return [ArraySpec(("round", "client", "class"), ANSWERS[last])]
    return [known[path] for known in _KNOWN if path in known]


_KNOWN = [
    scenario_arrays(
        bias=True,
        weight=True,
        attacks={},
        statistics=True,
        update=True,
        member=cohort,
        accumulated=True,
    )
    for cohort in (False, True)
]


def text(attributes: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """Return an attribute that is text."""
    value = attributes.get(name, default)
    if not isinstance(value, str) or not _is_encodable(value):
        problem = "no text" if name in attributes else "missing"
        raise ValueError(f"the attribute {name!r} is {problem}")
    return value


def scalars(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return all attributes, once they are known to be texts or numbers."""
    for name, value in attributes.items():
        if isinstance(value, str):
            text(attributes, name)
        elif not isinstance(value, (np.integer, np.floating, np.bool_)):
            raise ValueError(f"the attribute {name!r} is neither text nor number")
        if not _is_encodable(name):
            raise ValueError(f"the attribute {name!r} has a name that is no text")
    return dict(attributes)


def _is_encodable(value: str) -> bool:
    """Return whether something is text: HDF5 has bytes, and what is no UTF-8 among them is not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole(attributes: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Return an attribute that is a natural number."""
    value = attributes.get(name, default)
    if not isinstance(value, (int, np.integer)) or not 0 <= value < 1 << 63:
        raise ValueError(f"the attribute {name!r} is no natural number")
    return int(value)


def parsed(
    attributes: Mapping[str, Any], name: str, kind: type[T], default: str | None = None
) -> T:
    """Return an attribute that is JSON for a mapping or a list."""
    try:
        value = json.loads(text(attributes, name, default))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the attribute {name!r}: {error}") from None
    if not isinstance(value, kind) or _is_deep(value):
        raise ValueError(f"the attribute {name!r} is no {kind.__name__} of plain values")
    return value


def _is_deep(value: object) -> bool:
    level: list[object] = [value]
    for _ in range(_MOST_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Raise where a value that readers rely on is none that an experiment can have."""
    for key, value in parameters.items():
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise ValueError(f"the parameter {key!r} is a number of {value.bit_length()} bits")
        for keys, accepts in _ACCEPTED.items():
            if key in keys and not accepts(value):
                raise ValueError(f"the parameter {key!r} is {value!r:.40}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and _is_number(value)


def _is_named(value: object) -> bool:
    """Return whether something is a list of names, or of mappings with names."""
    return isinstance(value, list) and all(
        isinstance(entry.get("name") if isinstance(entry, dict) else entry, str) for entry in value
    )


_ACCEPTED: Mapping[tuple[str, ...], Callable[[Any], bool]] = {
    (
        *("federation.rounds", "federation.clients", "federation.batch_size"),
        *("federation.attack_every", "federation.evaluate_every", "seed"),
    ): _is_whole,
    (
        *("federation.population", "federation.local_steps", "federation.local_epochs"),
        "pretraining.steps",
    ): lambda value: value is None or _is_whole(value),
    (
        *("federation.learning_rate", "federation.momentum", "federation.weight_decay"),
        *("federation.proximal", "federation.dropout", "federation.statistics_noise"),
        *("federation.server.learning_rate", "adversary.batch_size_factor", "epsilon", "delta"),
    ): lambda value: value is None or _is_number(value),
    (
        *("data.name", "model.name", "labels.distribution", "federation.algorithm"),
        *("federation.batch_norm", "federation.server.optimizer", "partition.kind", "note"),
    ): lambda value: isinstance(value, str),
    ("data.root", "data.variant"): lambda value: value is None or isinstance(value, str),
    ("federation.fresh_model",): lambda value: isinstance(value, bool),
    ("attacks", "defenses"): lambda value: value is None or _is_named(value),
}
