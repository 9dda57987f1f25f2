"""Which attacks a scenario has no use for, and which of their assumptions it breaks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from testbed.attacks.base import Answer, Assumption, Attack, Knowledge, Observed


@dataclass(frozen=True)
class Facts:
    """What of a scenario decides about assumptions.

    Attributes
    ----------
    classes, features
        Shape of the last layer, C and D.
    bias
        Whether it has one.
    statistics
        How many values of BatchNorm statistics come with an update.
    batch_size, local_steps
        B and E.
    known_size
        Whether the server knows B.
    fair_samples
        Whether the auxiliary samples are the victims' kind, and of every class.
    statistics_noise
        On shared BatchNorm statistics.
    undoable
        Whether some BatchNorm layer's running averages tell of a single batch.
    lowest_feature
        The smallest feature seen in a trial run of the initial model, or None where none was made.
    planted
        Whether the server gives every client a model of its own.
    withheld
        Whether the last layer is not shared.
    """

    classes: int
    features: int
    bias: bool
    statistics: int
    batch_size: int
    local_steps: int = 1
    known_size: bool = True
    fair_samples: bool = True
    statistics_noise: float = 0.0
    undoable: bool = True
    lowest_feature: float | None = None
    planted: bool = False
    withheld: bool = False

    @property
    def labels(self) -> int:
        """Labels behind one update, N."""
        return self.batch_size * self.local_steps


_OF_LAST_LAYER = {Observed.ROW_SUMS, Observed.BIAS_GRADIENT, Observed.WEIGHT_GRADIENT}


def not_applicable(attack: Attack, facts: Facts) -> str:
    """Return why an attack cannot be run in a scenario; empty where it can."""
    if facts.withheld and attack.observes & _OF_LAST_LAYER:
        return "the last layer is withheld"
    if Observed.BIAS_GRADIENT in attack.observes and not facts.bias:
        return "the last layer has no bias"
    if Observed.STATISTICS in attack.observes and not facts.statistics:
        return "no BatchNorm statistics come with the updates"
    if attack.knowledge is Knowledge.MALICIOUS and not facts.planted:
        return "the server does not give each client a model of its own"
    return ""


def assumptions(attack: type[Attack] | Attack) -> frozenset[Assumption]:
    """Return what an attack assumes: what it declares, and what its kind implies.

    Who answers more than presence knows how many labels there are; who has auxiliary samples takes
    them for the victims' kind; who looks at statistics, for exact.
    """
    implied = {
        Assumption.KNOWN_SIZE: attack.answers is not Answer.PRESENCE,
        Assumption.FAIR_SAMPLES: attack.knowledge is Knowledge.AUXILIARY,
        Assumption.EXACT_STATISTICS: Observed.STATISTICS in attack.observes,
    }
    return attack.assumes | {item for item, holds in implied.items() if holds}


def broken_assumptions(attack: Attack, facts: Facts) -> Mapping[str, str]:
    """Return the assumptions of an attack that a scenario breaks, and what was found instead."""
    broken = {}
    for assumption in sorted(assumptions(attack), key=lambda item: item.value):
        found = _CHECKS[assumption](facts)
        if found:
            broken[assumption.value] = found
    return broken


def _non_negative(facts: Facts) -> str:
    lowest = facts.lowest_feature
    return f"features down to {lowest:.2g}" if lowest is not None and lowest < 0 else ""


def _absent(facts: Facts) -> str:
    expected = facts.classes * (1 - 1 / facts.classes) ** facts.labels
    return f"{expected:.1g} absent classes expected" if expected < 0.5 else ""


def _labels(facts: Facts) -> str:
    return f"{facts.labels} labels per update"


_CHECKS: Mapping[Assumption, Callable[[Facts], str]] = {
    Assumption.NON_NEGATIVE_FEATURES: _non_negative,
    Assumption.ONE_LABEL: lambda facts: "" if facts.labels == 1 else _labels(facts),
    Assumption.DISTINCT_LABELS: lambda facts: (
        "" if facts.labels == 1 else f"{_labels(facts)} may repeat"
    ),
    Assumption.FEWER_LABELS_THAN_RANK: lambda facts: (
        ""
        if facts.labels < min(facts.classes - 1, facts.features)
        else f"{_labels(facts)}, rank at most {min(facts.classes - 1, facts.features)}"
    ),
    Assumption.ABSENT_CLASS: _absent,
    Assumption.FEATURES_FOR_CLASSES: lambda facts: (
        ""
        if facts.features >= facts.classes
        else f"{facts.features} features for {facts.classes} classes"
    ),
    Assumption.ONE_STEP: lambda facts: (
        "" if facts.local_steps == 1 else f"{facts.local_steps} local steps"
    ),
    Assumption.SEVERAL_STEPS: lambda facts: "" if facts.local_steps > 1 else "one local step",
    Assumption.KNOWN_SIZE: lambda facts: "" if facts.known_size else "the server guesses it",
    Assumption.FAIR_SAMPLES: lambda facts: (
        "" if facts.fair_samples else "others, or some missing (section `adversary`)"
    ),
    Assumption.EXACT_STATISTICS: lambda facts: (
        f"noise of {facts.statistics_noise:g}" if facts.statistics_noise else ""
    ),
    Assumption.KNOWN_MOMENTUM: lambda facts: (
        "" if facts.undoable else "no BatchNorm layer that runs once with a momentum"
    ),
    Assumption.FIVE_CLASSES: lambda facts: "" if facts.classes >= 5 else f"{facts.classes} classes",
}
