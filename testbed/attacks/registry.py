"""Attacks by name."""

import functools
import importlib
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from testbed.attacks.base import Attack
from testbed.attacks.checks import check_declaration
from testbed.errors import UserError, suggest

_ATTACKS: dict[str, type[Attack]] = {}
A = TypeVar("A", bound=Attack)

# In the order of `testbed list attacks`.
_FAMILIES = (
    "baselines",
    "llg",
    "presence",
    "bias",
    "zlg",
    "auxiliary_counts",
    "rlg",
    "ilrg",
    "rlu",
    "soft_labels",
    "batchnorm",
    "batchnorm_conditioned",
    "class_basis",
    "ldia",
    "posterior_regression",
    "gradient_bridge",
    "secure_sums",
    "dlg",
)


def register(attack: type[A]) -> type[A]:
    """Make an attack available under its name; use it as a class decorator."""
    if attack.name in _ATTACKS:
        raise ValueError(f"an attack named {attack.name!r} is registered already")
    _ATTACKS[attack.name] = attack
    return attack


def attacks() -> Mapping[str, type[Attack]]:
    """Return every registered attack by name."""
    for family in _FAMILIES:  # they register themselves on import
        importlib.import_module(f"testbed.attacks.{family}")
    return dict(_ATTACKS)


def make_attack(name: str, options: Mapping[str, Any]) -> Attack:
    """Return an attack with its knobs set.

    Parameters
    ----------
    name
        A registered name, or the import path ``package.module:Class`` of an attack of your own.
    options
        Values of its knobs.

    Raises
    ------
    UserError
        The name is unknown, or a knob is unknown or out of range.
    """
    known = attacks()
    cls = _import_attack(name) if ":" in name else known.get(name)
    if cls is None:
        raise UserError(f"unknown attack {name!r}: {suggest(name, known)}")
    try:
        return _adapter(cls).validate_python(dict(options))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0])
        if first["type"] == "unexpected_keyword_argument":
            knobs = [field.name for field in fields(cls)]
            known_options = suggest(option, knobs) if knobs else "it has no options"
            raise UserError(f"attack {name!r} has no option {option!r}: {known_options}") from None
        raise UserError(
            f"attack {name!r}, option {option!r}: found {first['input']!r}: {first['msg']}"
        ) from None


@functools.cache
def _adapter(cls: type[Attack]) -> pydantic.TypeAdapter[Attack]:
    # Building one takes longer than all of a small experiment's validation.
    return pydantic.TypeAdapter(cls)


def _import_attack(path: str) -> type[Attack]:
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # console scripts, unlike `python -m`, do not look here
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"attack {path!r} cannot be imported: {reason}") from None
    if not (isinstance(found, type) and issubclass(found, Attack)):
        raise UserError(f"attack {path!r} is no subclass of testbed.attacks.Attack")
    check_declaration(path, found.calibration_arrays)
    return found
