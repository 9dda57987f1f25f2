"""Defences by name."""

import functools
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from testbed.defenses.base import Defense
from testbed.errors import UserError, suggest

_DEFENSES: dict[str, type[Defense]] = {}
D = TypeVar("D", bound=Defense)

# In the order of `testbed list defenses`: that of their stages.
_FAMILIES: Sequence[str] = (
    "labels",
    "samples",
    "vectors",
    "withholding",
    "sparse",
    "quantised",
    "sums",
)


def register(defense: type[D]) -> type[D]:
    """Make a defence available under its name; use it as a class decorator."""
    if defense.name in _DEFENSES:
        raise ValueError(f"a defence named {defense.name!r} is registered already")
    _DEFENSES[defense.name] = defense
    return defense


def defenses() -> Mapping[str, type[Defense]]:
    """Return every registered defence by name, in the order of their stages."""
    for family in _FAMILIES:  # they register themselves on import
        importlib.import_module(f"testbed.defenses.{family}")
    # Another module may have imported some of them before.
    order = {f"testbed.defenses.{family}": place for place, family in enumerate(_FAMILIES)}
    known = sorted(_DEFENSES.items(), key=lambda item: order.get(item[1].__module__, len(order)))
    return dict(known)


def make_defense(name: str, options: Mapping[str, Any]) -> Defense:
    """Return a defence with its knobs set.

    Parameters
    ----------
    name
        A registered name, or the import path ``package.module:Class`` of a defence of your own.
    options
        Values of its knobs.

    Raises
    ------
    UserError
        The name is unknown, or a knob is unknown or out of range.
    """
    known = defenses()
    cls = _import_defense(name) if ":" in name else known.get(name)
    if cls is None:
        raise UserError(f"unknown defence {name!r}: {suggest(name, known)}")
    try:
        return _adapter(cls).validate_python(dict(options))
    except pydantic.ValidationError as error:
        found = error.errors()
        # A misspelt option is both unknown and, under its right name, missing.
        unknown = [one for one in found if one["type"] == "unexpected_keyword_argument"]
        first = (unknown or found)[0]
        option = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "unexpected_keyword_argument":
            knobs = [field.name for field in fields(cls)]
            raise UserError(
                f"defence {name!r} has no option {option!r}: {suggest(option, knobs)}"
            ) from None
        if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
            raise UserError(f"defence {name!r}: the option {option!r} is missing") from None
        message = first["msg"].removeprefix("Value error, ")
        where = f", option {option!r}: found {first['input']!r}" if option else ""
        raise UserError(f"defence {name!r}{where}: {message}") from None


@functools.cache
def _adapter(cls: type[Defense]) -> pydantic.TypeAdapter[Defense]:
    # Building one takes longer than all of a small experiment's validation.
    return pydantic.TypeAdapter(cls)


def _import_defense(path: str) -> type[Defense]:
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # console scripts, unlike `python -m`, do not look here
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"defence {path!r} cannot be imported: {reason}") from None
    if not (isinstance(found, type) and issubclass(found, Defense)):
        raise UserError(f"defence {path!r} is no subclass of testbed.defenses.Defense")
    return found
