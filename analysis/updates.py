"""Attacks on updates from elsewhere: arrays in, labels out. No torch, no model, no results file."""

import csv
import io
import json
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from testbed.errors import UserError

if TYPE_CHECKING:
    from analysis.given import Given
    from testbed.attacks import Attack
    from testbed.attacks.offline import ArrayAdversary

# With more classes, the text table lists the largest only.
_MOST_COLUMNS, _LISTED = 16, 8


class UpdateWarning(UserWarning):
    """An update does not look like a gradient of the cross entropy."""


@dataclass(frozen=True)
class Outcome:
    """What came of an attack.

    Attributes
    ----------
    label, attack
        Which one.
    values
        [N, C]: int64 counts, bool presence, or float64 shares. None where it could not be run.
    reason
        Why it could not be run.
    broken
        Assumptions of the attack that do not hold, and what was found instead.
    """

    label: str
    attack: "Attack"
    values: NDArray[Any] | None = None
    reason: str = ""
    broken: Mapping[str, str] = field(default_factory=dict)


def attack_update(
    weight_gradient: ArrayLike,
    *,
    batch_size: int,
    bias_gradient: ArrayLike | None = None,
    local_steps: int = 1,
    learning_rate: float | None = None,
    model_weights: ArrayLike | None = None,
    model_bias: ArrayLike | None = None,
    auxiliary_features: ArrayLike | None = None,
    auxiliary_labels: ArrayLike | None = None,
    auxiliary_posterior: ArrayLike | None = None,
    attacks: Sequence[str | Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> dict[str, NDArray[Any]]:
    """Infer the labels behind gradients of a last layer ``z = W h + b``.

    >>> import numpy as np
    >>> from analysis import attack_update
    >>> posterior, features = np.array([0.2, 0.5, 0.3]), np.array([1.0, 2.0])
    >>> gradient = np.outer(posterior - np.eye(3)[1], features)
    >>> attack_update(gradient, batch_size=1, attacks=["llg"])["llg"].tolist()
    [0, 1, 0]

    Parameters
    ----------
    weight_gradient
        [C, D], or [N, C, D] for N updates: the gradient of the mean cross entropy of a batch with
        respect to W. For an update of several local steps, the sum of their gradients: weights
        before minus weights after, over the learning rate.
    batch_size
        B.
    bias_gradient
        [C] or [N, C], likewise with respect to b.
    local_steps, learning_rate
        E, and the rate of these steps; needed for more than one.
    model_weights, model_bias
        W [C, D] and b [C] before the update, for attacks that know the model.
    auxiliary_features, auxiliary_labels, auxiliary_posterior
        [n, D], [n] and [n, C]: what the same model makes of samples of the attacker's own: inputs
        of the last layer, labels, and softmax outputs (by default computed from the weights).
    attacks
        Names or import paths, or mappings as in an experiment file: ``name``, ``label``, options.
        By default every attack of this package that can do with what is given.
    seed
        For attacks that draw.

    Returns
    -------
    dict[str, numpy.ndarray]
        By label, [C] or [N, C]: int64 counts (rows sum to B * E), bool presence, or float64
        shares, whichever the attack answers.

    Raises
    ------
    UserError
        Arrays do not fit together or are no finite numbers, or an attack that was named is
        unknown or needs more than is given.

    Warns
    -----
    UpdateWarning
        An update does not look like a gradient of the cross entropy.
    """
    from analysis.given import take

    given = take(
        weight_gradient,
        batch_size=batch_size,
        bias_gradient=bias_gradient,
        local_steps=local_steps,
        learning_rate=learning_rate,
        model_weights=model_weights,
        model_bias=model_bias,
        auxiliary_features=auxiliary_features,
        auxiliary_labels=auxiliary_labels,
        auxiliary_posterior=auxiliary_posterior,
    )
    for doubt in given.doubts:
        warnings.warn(doubt, UpdateWarning, stacklevel=2)
    single = np.ndim(weight_gradient) == 2
    return {
        outcome.label: outcome.values[0] if single else outcome.values
        for outcome in run_attacks(given, attacks, seed)
        if outcome.values is not None
    }


def run_attacks(
    given: "Given", attacks: Sequence[str | Mapping[str, Any]] | None, seed: int
) -> list[Outcome]:
    """Return the outcome of each attack; see `attack_update`."""
    from analysis.given import is_whole

    if not is_whole(seed) or seed < 0:
        raise UserError(f"seed: found {seed!r}, expected a whole number, 0 or more")
    if isinstance(attacks, str):
        raise UserError(f"attacks: found {attacks!r}, expected a list of names")
    from analysis.choice import attack_sections
    from analysis.threads import limited
    from testbed.attacks import attacks as registered

    outcomes = []
    # Numbers of a user's may be anything; what comes of them is checked.
    with limited(1), np.errstate(all="ignore"):
        for section in attack_sections(list(registered()) if attacks is None else attacks):
            outcome = _run(given, section.label, section.make(), seed)
            if outcome.reason and attacks is not None:
                raise UserError(f"attack {outcome.label!r}: {outcome.reason}")
            outcomes.append(outcome)
    return outcomes


def _run(given: "Given", label: str, attack: "Attack", seed: int) -> Outcome:
    from testbed.attacks.assumptions import broken_assumptions
    from testbed.attacks.checks import check_calibration
    from testbed.attacks.inference import infer_in_chunks
    from testbed.attacks.offline import NotGivenError

    reason = _missing(given, attack)
    if reason:
        return Outcome(label, attack, reason=reason)
    observations = given.observations.restricted(attack)
    adversary = _adversary(given, label, attack, seed)
    try:
        calibration = {
            **attack.calibrate(adversary),
            **attack.calibrate_updates(adversary, observations),
        }
    except NotGivenError as error:
        return Outcome(label, attack, reason=str(error))
    lengths = {
        "client": len(observations.keys),
        "class": given.facts.classes,
        "feature": given.facts.features,
    }
    check_calibration(label, attack, calibration, lengths)
    values = infer_in_chunks(label, attack, observations, calibration)
    return Outcome(label, attack, values, broken=broken_assumptions(attack, given.facts))


def _missing(given: "Given", attack: "Attack") -> str:
    """Return what an attack looks at and is not given; empty for nothing."""
    from testbed.attacks import Knowledge, Observed

    if Observed.BIAS_GRADIENT in attack.observes and not given.facts.bias:
        return "it needs the bias gradient"
    for part in (Observed.STATISTICS, Observed.UPDATE):
        if part in attack.observes:
            return f"it looks at the {part.value}, run it live"
    if attack.knowledge is Knowledge.TRUTH:
        return "it is told the truth, run it live"
    return ""


def _adversary(given: "Given", label: str, attack: "Attack", seed: int) -> "ArrayAdversary":
    from testbed.attacks.offline import ArrayAdversary
    from testbed.seeds import Purpose, seed64

    return ArrayAdversary(
        attack.knowledge,
        given.facts.classes,
        batch_size=given.facts.batch_size,
        local_steps=given.facts.local_steps,
        learning_rate=given.learning_rate,
        seed=seed64(seed, Purpose.ATTACK, 0, 0, zlib.crc32(label.encode())),
        head=given.head,
        auxiliary=given.auxiliary,
    )


def render(given: "Given", outcomes: Sequence[Outcome], style: str) -> str:
    """Return outcomes as ``text``, ``csv`` (a row per update, attack and class), or ``json``."""
    return _RENDERERS[style](given, outcomes)


def _text(given: "Given", outcomes: Sequence[Outcome]) -> str:
    classes, updates = given.facts.classes, len(given.observations.keys)
    wide = classes <= _MOST_COLUMNS
    rows = [
        ["attack", "knows", "answers", *(map(str, range(classes)) if wide else ["largest classes"])]
    ]
    if updates > 1:
        rows[0].insert(0, "update")
    notes = [f"{given.facts.labels} labels per update; columns are classes"]
    if not wide:
        notes = [f"{given.facts.labels} labels per update; class:count, the largest of {classes}"]
    for row in range(updates):
        for outcome in outcomes:
            if outcome.values is None:
                continue
            attack, values = outcome.attack, outcome.values[row]
            cells = [outcome.label, attack.knowledge.value, attack.answers.value]
            cells += [_cell(value) for value in values] if wide else [_largest(values)]
            rows.append([str(row), *cells] if updates > 1 else cells)
    for outcome in outcomes:
        notes += [
            f"{outcome.label} assumes {what}, found {was}" for what, was in outcome.broken.items()
        ]
    for reason in dict.fromkeys(outcome.reason for outcome in outcomes if outcome.reason):
        labels = [outcome.label for outcome in outcomes if outcome.reason == reason]
        notes.append(f"not run, since {reason}: {', '.join(labels)}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in rows
    ]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    return "\n".join([head, rule, *body, rule, *notes]) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, np.bool_):
        return "yes" if value else "-"
    return f"{value:.3f}" if isinstance(value, np.floating) else str(value)


def _largest(values: NDArray[Any]) -> str:
    order = np.argsort(-values.astype(np.float64), kind="stable")
    found = [index for index in order if values[index] > 0]
    shown = [
        str(index) if values.dtype == np.bool_ else f"{index}:{_cell(values[index])}"
        for index in found[:_LISTED]
    ]
    more = len(found) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _csv(given: "Given", outcomes: Sequence[Outcome]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["update", "attack", "title", "knowledge", "answers", "class", "value"])
    for row in range(len(given.observations.keys)):
        for outcome in outcomes:
            attack = outcome.attack
            head = [row, outcome.label, attack.title, attack.knowledge.value, attack.answers.value]
            for index, value in enumerate(() if outcome.values is None else outcome.values[row]):
                shown = float(value) if value.dtype.kind == "f" else int(value)
                writer.writerow([*head, index, shown])
    return out.getvalue()


def _json(given: "Given", outcomes: Sequence[Outcome]) -> str:
    attacks = {
        outcome.label: {
            "name": outcome.attack.name,
            "title": outcome.attack.title,
            "knowledge": outcome.attack.knowledge.value,
            "options": outcome.attack.options(),
            "answers": outcome.attack.answers.value,
            "broken_assumptions": dict(outcome.broken),
            "values": outcome.values.tolist(),
        }
        for outcome in outcomes
        if outcome.values is not None
    }
    content = {
        "updates": len(given.observations.keys),
        "classes": given.facts.classes,
        "labels_per_update": given.facts.labels,
        "attacks": attacks,
        "not_run": {outcome.label: outcome.reason for outcome in outcomes if outcome.reason},
        "warnings": list(given.doubts),
    }
    return json.dumps(content, indent=1) + "\n"


_RENDERERS: Mapping[str, Callable[["Given", Sequence[Outcome]], str]] = {
    "text": _text,
    "csv": _csv,
    "json": _json,
}
FORMATS = tuple(_RENDERERS)
