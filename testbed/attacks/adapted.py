"""Attacks by someone who knows the clients' defences: the plain attack between `Defense`'s hooks.

What is observed is undone before the attack sees it, what the attack simulates is defended and
undone in the same way, and the label counts that it finds are restored behind it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray
from typing_extensions import override

from testbed.attacks.base import (
    Adversary,
    Array,
    Attack,
    Calibration,
    CalibrationArrays,
    Inferred,
    Knowledge,
    LabelCounts,
    LabelDistribution,
    LabelPresence,
    Observations,
    Observed,
)
from testbed.attacks.defended import (
    DefendedAdversary,
    any_overrides,
    changing_labels,
    undo,
)
from testbed.attacks.rounding import largest_remainder
from testbed.defenses.base import Defense, Known, Tensors

Floats = NDArray[np.float64]

# They make nothing of what they observe.
_BASELINES = frozenset({"random", "uniform", "prior", "oracle"})
# Those that learn from the last layer's gradients of simulated clients.
_SIMULATING = frozenset({"lmmse", "posterior_regression", "ldia", "batchnorm_joint"})
# How many dummy inputs tell the mean posterior where there are no auxiliary samples.
_DUMMIES = 32
# The calibration's arrays beside the wrapped attack's: a posterior, and batch size, mass, spread.
_POSTERIOR, _NUMBERS = "adapted_posterior", "adapted_numbers"
ADAPTED_ARRAYS: CalibrationArrays = {_POSTERIOR: (("class",), "f8"), _NUMBERS: ((3,), "f8")}


def adapts(attack: Attack, defenses: Sequence[Defense]) -> bool:
    """Return whether an attacker who knows the defences does anything else with this attack.

    Not with a baseline, nor with an attack on BatchNorm statistics, which defences leave as they
    are, nor where no defence has anything to undo, or to restore in answers of the attack's kind.
    To imitate a defence is of use to those attacks alone that learn from simulated gradients.
    """
    if attack.name in _BASELINES or attack.observes == {Observed.STATISTICS}:
        return False
    return (
        any_overrides(defenses, "undo")
        or (attack.name in _SIMULATING and any_overrides(defenses, "imitate"))
        or (attack.answers is not LabelPresence.answer and any_overrides(defenses, "restore"))
    )


@dataclass(frozen=True)
class AdaptedAttack(Attack):
    """An attack as it is run by someone who knows the defences.

    It is shown the bias gradient too, where the layer has one: the server sees it anyway, and it
    tells what a defence did. What `Attack` declares for a class is the wrapped attack's, and so
    differs from object to object. Defences are undone in NumPy; everything else is left to the
    wrapped attack's library.

    Attributes
    ----------
    attack
        The plain attack.
    defenses
        Of the clients, in the order in which they are applied.
    tensors
        Of the clients' updates.
    has_bias
        Whether the last layer has a bias.
    """

    attack: Attack
    defenses: tuple[Defense, ...]
    tensors: Tensors
    has_bias: bool

    def __post_init__(self) -> None:
        plain = self.attack
        decisive = plain.calibrated_by
        declared = {
            "name": plain.name,
            "title": f"{plain.title}, adapted",
            "knowledge": plain.knowledge,
            "source": plain.source,
            "observes": plain.observes | ({Observed.BIAS_GRADIENT} if self.has_bias else set()),
            "assumes": plain.assumes,
            "answers": plain.answers,
            "calibrated_by": None if decisive is None else (*decisive, "adapted"),
        }
        for name, value in declared.items():
            object.__setattr__(self, name, value)

    @override
    def options(self) -> dict[str, Any]:
        """Return the wrapped attack's knobs, and that it is adapted."""
        return {**self.attack.options(), "adapted": True}

    @override
    def arrays(self) -> CalibrationArrays:
        """Declare the wrapped attack's arrays, and what undoing takes beside the observations."""
        return {**self.attack.arrays(), **ADAPTED_ARRAYS}

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        known = self._known(adversary)
        return {
            **self.attack.calibrate(self._defended(adversary, known)),
            _POSTERIOR: known.posterior[None],
            _NUMBERS: np.array([[known.batch_size, known.mass, known.spread]]),
        }

    @override
    def calibrate_updates(self, adversary: Adversary, observations: Observations) -> Calibration:
        known = self._known(adversary)
        undone = self._undone(observations, known)
        return self.attack.calibrate_updates(self._defended(adversary, known), undone)

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> Inferred:
        known = [
            Known(np.asarray(posterior, np.float64), int(size), self.tensors, mass, spread)
            for posterior, (size, mass, spread) in zip(
                calibration[_POSTERIOR], calibration[_NUMBERS], strict=True
            )
        ]
        # One calibration for all updates, or one for each.
        undone = (
            self._undone(observations, known[0])
            if len(known) == 1
            else _joined(
                self._undone(observations.rows(slice(row, row + 1)), one)
                for row, one in enumerate(known)
            )
        )
        plain = {name: calibration[name] for name in self.attack.arrays()}
        return self._restored(self.attack.infer(undone, plain), observations.labels)

    def _known(self, adversary: Adversary) -> Known:
        even = np.full(adversary.classes, 1 / adversary.classes)
        nothing = Known(even, adversary.batch_size, self.tensors)
        if self.knowledge is Knowledge.AUXILIARY:
            outputs = adversary.on_auxiliary()
        elif self.knowledge is Knowledge.MODEL:
            outputs = adversary.on_dummy("random", _DUMMIES)
        else:
            return nothing
        mean = outputs.posterior.mean(axis=0)
        masses = outputs.features.sum(axis=1)
        mass = float(masses.mean())
        # A diverged model's outputs say nothing.
        if not np.isfinite([*mean, mass]).all():
            return nothing
        if mass == 0:
            return replace(nothing, posterior=mean)
        return replace(nothing, posterior=mean, mass=mass, spread=float(masses.std() / abs(mass)))

    def _defended(self, adversary: Adversary, known: Known) -> Adversary:
        """Return an adversary whose simulated clients are defended; itself where none would be."""
        if not (any_overrides(self.defenses, "imitate") or changing_labels(self.defenses)):
            return adversary
        return cast("Adversary", DefendedAdversary(adversary, self, self.defenses, known))

    def _undone(self, observations: Observations, known: Known) -> Observations:
        return undo(self.defenses, observations, known).restricted(self.attack)

    def _restored(self, inferred: Inferred, labels: Array) -> Inferred:
        """Return the answer for the clients' own labels in place of those they trained on."""
        if isinstance(inferred, LabelPresence) or not any_overrides(self.defenses, "restore"):
            return inferred
        if self.name in _SIMULATING:
            # It has learned the clients' own labels from clients that train on others.
            return inferred
        xp, where = array_namespace(inferred.values), device(inferred.values)
        totals = np.asarray(labels)
        if isinstance(inferred, LabelDistribution):
            shares = np.asarray(inferred.shares, np.float64)
            counts = self._restore(shares * totals[:, None], totals)
            return LabelDistribution(xp.asarray(_shares(counts), device=where))
        found = inferred.counts if inferred.scores is None else inferred.scores
        scores = xp.asarray(self._restore(np.asarray(found, np.float64), totals), device=where)
        return LabelCounts(largest_remainder(scores, labels), scores)

    def _restore(self, counts: Floats, labels: NDArray[np.int64]) -> Floats:
        for defense in reversed(self.defenses):
            counts = defense.restore(counts, labels)
        return counts


def _joined(parts: Iterable[Observations]) -> Observations:
    """Return the observations of several groups of updates as those of one."""
    first, *others = parts
    joined: dict[str, Any] = {
        name: np.concatenate([value, *(getattr(part, name) for part in others)])
        for name, value in vars(first).items()
        if name != "local_steps" and value is not None
    }
    return replace(first, **joined)


def _shares(counts: Floats) -> Floats:
    """Return counts [N, C] as shares: not negative, sum 1; even where nothing is positive."""
    positive = np.clip(np.nan_to_num(counts, posinf=0.0), 0.0, None)
    total = positive.sum(axis=1, keepdims=True)
    even = np.full_like(positive, 1 / counts.shape[1])
    return np.where(total > 0, positive / np.where(total > 0, total, 1.0), even)
