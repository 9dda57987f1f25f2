"""Which stored calibration serves an attack that is run again."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from analysis.choice import Replayed
from testbed.errors import UserError

if TYPE_CHECKING:
    from analysis.stored import StoredScenario


def stored_calibration(one: Replayed, stored: "StoredScenario", where: str) -> str | None:
    """Return the label of the stored attack whose calibration to use, or None for one to be made.

    Parameters
    ----------
    one
        The attack, and what was asked for.
    stored
        The scenario.
    where
        Its file and number, for messages.

    Raises
    ------
    UserError
        The one asked for does not fit, or there is none and it takes the model.
    """
    from testbed.attacks import Knowledge

    declared = set(one.attack.arrays())
    attacks = stored.scenario.attacks
    # Calibrations for sums over rounds are of other steps than those of the round.
    fitting: list[str] = [
        label
        for label, info in attacks.items()
        if info.target == "update" and declared == stored.calibration(label)
    ]
    if one.calibration:
        if one.calibration in fitting:
            return one.calibration
        found = sorted(stored.calibration(one.calibration))
        raise UserError(
            f"{where}: the attack {one.label!r} needs a calibration with the arrays "
            f"{sorted(declared)}, that of {one.calibration!r} has {found} (stored attacks "
            f"with such arrays: {', '.join(fitting) or 'none'})"
        )
    if not declared:
        return None
    decisive = one.attack.calibrated_by
    # As they are stored: a tuple becomes a list.
    options = json.loads(json.dumps(one.attack.options()))
    wanted = {name: options[name] for name in (options if decisive is None else decisive)}
    namesakes = {
        label: {name: attacks[label].options.get(name) for name in wanted}
        for label in fitting
        if attacks[label].name == one.attack.name
    }
    for label, stored_options in namesakes.items():
        if stored_options == wanted:
            return label
    if one.attack.knowledge is Knowledge.GRADIENTS:
        return None
    others = "; ".join(f"{label!r} has {_listed(has)}" for label, has in namesakes.items())
    raise UserError(
        f"{where} has no calibration for the attack {one.label!r} with "
        f"{_listed(wanted)}, which takes the model: add the attack to the run, or name a "
        f"stored attack with --calibration (of the same name: {others or 'none'})"
    )


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "no options"
