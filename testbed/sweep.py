"""Dotted keys: YAML without surprises, overrides on the command line, and the points of a sweep."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import yaml

from testbed.errors import UserError

_MAX_POINTS = 100_000


class _Loader(yaml.SafeLoader):
    """The safe loader, but for a key that stands twice: an error, where YAML keeps the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is no text", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} stands there twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML, safely; `UserError` with file, line and reason where it is malformed."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name}, line {mark.line + 1}" if mark else name
        raise UserError(f"{where}: {error.problem or 'malformed YAML'}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name}: malformed YAML: {reason}") from None


def apply_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the content with ``key=value`` overrides applied.

    An override of a swept key fixes it: were the sweep to win, the user's setting would be
    dropped silently.
    """
    result = copy.deepcopy(dict(content))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"override {override!r}: expected key=value, as in data.root=DIR")
        value = parse_yaml(text, f"override {override!r}")
        sweep = result.get("sweep")
        if key.startswith("sweep."):
            result["sweep"] = {**(sweep or {}), key.removeprefix("sweep."): value}
            continue
        if isinstance(sweep, dict):
            result["sweep"] = _without(sweep, key)
        result = set_keys(result, {key: value})
    return result


def set_keys(content: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of nested mappings with dotted keys set; missing levels are made."""
    result = copy.deepcopy(dict(content))
    for key, value in values.items():
        *path, last = key.split(".")
        level = result
        for part in path:
            inner = level.setdefault(part, {})
            if not isinstance(inner, dict):
                raise UserError(f"{key}: {part!r} holds a value, so it has no keys to set")
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
        or belongs to the run as a whole (``run_keys``).
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


def describe(swept: Mapping[str, Any]) -> str:
    """Return swept values as one line of text."""
    return ", ".join(f"{key}={value}" for key, value in swept.items())


def _without(sweep: Mapping[str, Any], key: str) -> dict[str, Any]:
    result = {name: value for name, value in sweep.items() if name != key}
    zipped = result.get("zip")
    if isinstance(zipped, dict):
        zipped = [zipped]
    if isinstance(zipped, list):
        rest = [
            {name: value for name, value in group.items() if name != key}
            if isinstance(group, dict)
            else group
            for group in zipped
        ]
        result["zip"] = [group for group in rest if group]
    return result
