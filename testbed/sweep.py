"""Dotted keys: YAML without surprises, overrides on the command line, and the points of a sweep."""

import copy
import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import yaml

from testbed.defenses.described import defense_label
from testbed.errors import UserError

_MAX_POINTS = 100_000
# Values of the file, times points: each point is a copy.
MAX_COPIED = 1 << 25
# Aliases make a short text stand for an exponentially long one, and what validates and writes
# the content follows them one by one.
_MAX_NODES, _MAX_DEPTH = 100_000, 40
# Reading YAML takes seconds per megabyte.
MAX_LENGTH = 1 << 18
_MAX_DIGITS = 100
_PLAIN = {
    f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")
}


class _Loader(yaml.SafeLoader):
    """The safe loader, but for a key that stands twice: an error, where YAML keeps the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise _refusal(f"the key {key!r} is no text", key_node)
        if key in seen:
            raise _refusal(f"the key {key!r} stands there twice", key_node)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return how many values a node stands for, aliases followed, and how deeply they nest.

    Raises where that is too much, or a value is neither text, number, yes or no, list nor mapping:
    dates and the like would not survive being written to the results file and read again.
    """
    if id(node) in known:
        return known[id(node)]
    if node.tag not in _PLAIN:
        kind = node.tag.rpartition(":")[2]
        raise _refusal(f"found a value of the YAML type {kind!r}: put text in quotes", node)
    children: list[yaml.Node] = []
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node)
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    known[id(node)] = (_MAX_NODES + 1, 0)  # stays so while a node that contains itself is measured
    size, depth = 1, 1
    for child in children:
        inner, below = _measure(child, known)
        size, depth = size + inner, max(depth, below + 1)
        if size > _MAX_NODES or depth > _MAX_DEPTH:
            limits = f"at most {_MAX_NODES} values, nested {_MAX_DEPTH} deep"
            raise _refusal(f"too much content, aliases followed: {limits}, are allowed", node)
    known[id(node)] = size, depth
    return size, depth


def _check_scalar(node: yaml.ScalarNode) -> None:
    if node.tag.endswith(":int") and len(node.value) > _MAX_DIGITS:
        raise _refusal(f"found a number of {len(node.value)} digits: nothing is so large", node)
    odd = [c for c in node.value if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    if odd:
        raise _refusal(f"found text with the character {odd[0]!r}: leave it out", node)


def _refusal(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML, safely; `UserError` with file, line and reason where it is malformed."""
    if len(text) > MAX_LENGTH:
        raise UserError(f"{name}: more than {MAX_LENGTH} characters: put data into files of data")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name}, line {mark.line + 1}" if mark else name
        raise UserError(f"{where}: {error.problem or 'malformed YAML'}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name}: malformed YAML: {reason}") from None


def apply_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the content with ``key=value`` overrides applied; see `override`."""
    result = copy.deepcopy(dict(content))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"override {text!r}: expected key=value, as in data.root=DIR")
        name = f"override {text!r}"
        result = override(result, {key: parse_yaml(value, name)}, name)
    return result


def override(content: Mapping[str, Any], values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the content with dotted keys set; ``sweep.KEY`` sweeps a key.

    An override of a swept key fixes it: were the sweep to win, the user's setting would be
    dropped silently. ``name`` says in an error's message where the values come from.
    """
    result = copy.deepcopy(dict(content))
    for key, value in values.items():
        sweep = result.get("sweep")
        if key.startswith("sweep."):
            if sweep is not None and not isinstance(sweep, dict):
                raise UserError(
                    f"{name}: `sweep` holds {sweep!r}, expected a mapping of keys to lists"
                )
            result["sweep"] = {**(sweep or {}), key.removeprefix("sweep."): value}
            continue
        if isinstance(sweep, dict):
            result["sweep"] = _without(sweep, key, name)
        result = set_keys(result, {key: value}, name)
    return result


def set_keys(content: Mapping[str, Any], values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a copy of nested mappings with dotted keys set; missing levels are made.

    ``name`` says in an error's message where the values come from.
    """
    result = copy.deepcopy(dict(content))
    for key, value in values.items():
        *path, last = key.split(".", _MAX_DEPTH + 1)
        if len(path) > _MAX_DEPTH:
            raise UserError(f"{name}: {key}: more than {_MAX_DEPTH} parts, no key has so many")
        level = result
        for part in path:
            inner = level.setdefault(part, {})
            if not isinstance(inner, dict):
                raise UserError(
                    f"{name}: {key}: {part!r} holds {inner!r}, expected a mapping of keys"
                )
            level = inner
        level[last] = copy.deepcopy(value)
    return result


def expand(
    sweep: object, name: str, run_keys: AbstractSet[str] = frozenset()
) -> list[dict[str, Any]]:
    """Return the points of a sweep, each a mapping of dotted keys to values.

    Keys of ``sweep`` hold lists and are combined as a product, the last one varying fastest.
    ``zip`` holds one mapping of lists, or a list of such mappings; the keys of a mapping advance
    together, and count as one key of the product.

    Raises
    ------
    UserError
        Something is no list, is empty, the lists of a zip differ in length, a key is swept twice
        or as a part of another, or belongs to the run as a whole (``run_keys``).
    """
    if not isinstance(sweep, Mapping):
        raise UserError(f"{name}: sweep: expected a mapping of keys to lists")
    groups = [{key: value} for key, value in sweep.items() if key != "zip"]
    zipped = sweep.get("zip", [])
    groups += zipped if isinstance(zipped, list) else [zipped]
    axes: list[list[dict[str, Any]]] = []
    seen: set[str] = set()
    for group in groups:
        if not isinstance(group, Mapping) or not group:
            raise UserError(f"{name}: sweep.zip: expected a mapping of keys to lists")
        for key, values in group.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"{name}: sweep.{key}: found {values!r}, expected a list of values")
            if key.split(".")[0] in run_keys:
                raise UserError(
                    f"{name}: sweep.{key}: this key belongs to the run as a whole and cannot be "
                    "swept: run the experiment once for each of its values"
                )
            if key in seen:
                raise UserError(f"{name}: sweep.{key}: this key is swept twice")
            for other in seen:
                if _is_within(key, other) or _is_within(other, key):
                    outer, inner = sorted((key, other), key=len)
                    raise UserError(
                        f"{name}: sweep.{inner}: this key is part of {outer!r}, which is swept as "
                        "well: sweep one of the two"
                    )
            seen.add(key)
        lengths = {key: len(values) for key, values in group.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"{name}: sweep.zip: the lists differ in length: {lengths}")
        axes.append(
            [dict(zip(group, values, strict=True)) for values in zip(*group.values(), strict=True)]
        )
    total = 1
    for axis in axes:
        total *= len(axis)
    if total > _MAX_POINTS:
        raise UserError(f"{name}: sweep: {total} scenarios, at most {_MAX_POINTS} are allowed")
    return [
        {key: value for part in point for key, value in part.items()}
        for point in itertools.product(*axes)
    ]


def size(value: object) -> int:
    """Return how many values there are in nested lists and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return 1 + sum(map(size, value)) if isinstance(value, list) else 1


def describe(swept: Mapping[str, Any]) -> str:
    """Return swept values as one line of text."""
    shown = {
        key: defense_label(value) if key == "defenses" else value for key, value in swept.items()
    }
    return ", ".join(f"{key}={value}" for key, value in shown.items())


def _is_within(key: str, outer: str) -> bool:
    return key.startswith(outer + ".")


def _without(sweep: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return a sweep without the keys that an override of a key fixes."""

    def stays(name: str) -> bool:
        if _is_within(key, name):
            raise UserError(
                f"{where}: {name!r} is swept as a whole, which would undo it: "
                f"override {name} or sweep.{name}"
            )
        return name != key and not _is_within(name, key)

    result = {name: value for name, value in sweep.items() if stays(name)}
    zipped = result.get("zip")
    if isinstance(zipped, dict):
        zipped = [zipped]
    if isinstance(zipped, list):
        rest = [
            {name: value for name, value in group.items() if stays(name)}
            if isinstance(group, dict)
            else group
            for group in zipped
        ]
        result["zip"] = [group for group in rest if group]
    return result
