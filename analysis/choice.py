"""Attacks that a user names, checked as those of an experiment file are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from testbed.errors import UserError

if TYPE_CHECKING:
    from testbed.attacks import Attack
    from testbed.sections import AttackSection


@dataclass(frozen=True)
class Replayed:
    """An attack to run again.

    Attributes
    ----------
    label, attack
        What to call it, and the attack with its knobs.
    entry
        What the scenario's parameters say of it.
    calibration
        Label of the stored attack whose calibration it is to use; empty for one that fits.
    """

    label: str
    attack: "Attack"
    entry: Mapping[str, Any]
    calibration: str = ""


def attack_sections(wanted: Iterable[str | Mapping[str, Any]]) -> "list[AttackSection]":
    """Return attacks as an experiment file's section on them does.

    Parameters
    ----------
    wanted
        Names or import paths, or mappings with ``name``, ``label`` and the attack's options.

    Raises
    ------
    UserError
        An attack or an option is unknown, a value out of range, or a label stands there twice.
    """
    import pydantic

    from testbed.sections import AttackSection

    sections: list[AttackSection] = []
    for content in wanted:
        try:
            section = AttackSection.model_validate(content)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            if where:
                message = f"attack: {where}: found {first['input']!r}: {message}"
            raise UserError(message) from None
        if section.label in {earlier.label for earlier in sections}:
            raise UserError(
                f"the attack {section.label!r} stands there twice: give each a label of its own"
            )
        sections.append(section)
    return sections


def replayed_attacks(attacks: Sequence[str | Mapping[str, Any]]) -> list[Replayed]:
    """Return attacks to run again; beside `attack_sections`, mappings may hold ``calibration``."""
    contents = [{"name": one} if isinstance(one, str) else dict(one) for one in attacks]
    calibrations = [str(content.pop("calibration", "")) for content in contents]
    return [
        Replayed(section.label, section.make(), section.model_dump(mode="json"), calibration)
        for section, calibration in zip(attack_sections(contents), calibrations, strict=True)
    ]
