"""Observations, real and simulated, with the clients' defences undone."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.attacks.base import Adversary, Attack, Observations
from testbed.defenses.base import Defense, Known, LabelDefense, Targets


def undo(defenses: Sequence[Defense], observations: Observations, known: Known) -> Observations:
    """Return observations [N, ...] with the defences undone, the last one first."""
    for defense in reversed(defenses):
        observations = defense.undo(observations, known)
    return observations


def any_overrides(defenses: Iterable[Defense], hook: str) -> bool:
    """Return whether one of the defences has something to do in a hook of `Defense`."""
    return any(getattr(type(defense), hook) is not getattr(Defense, hook) for defense in defenses)


def changing_labels(defenses: Iterable[Defense]) -> list[LabelDefense]:
    """Return the defences by which clients train on other label counts than they have."""
    return [
        defense
        for defense in defenses
        if isinstance(defense, LabelDefense) and any_overrides([defense], "restore")
    ]


class DefendedAdversary:
    """An adversary whose simulated clients defend themselves as the real ones do.

    `simulate` returns what is left of the simulated updates when the defences have been applied and
    undone; they train on other labels where real clients do. All else is the wrapped adversary's
    (`testbed.attacks.Adversary`): `local_update` too,
    since attacks train on one class, or on all, to learn of a mean update, and that is known best
    without a defence's noise.

    Parameters
    ----------
    adversary
        Without defences.
    attack
        For whom: its simulated updates have the parts that it is shown of real ones.
    defenses
        In the order in which they are applied.
    known
        For undoing.
    """

    def __init__(
        self, adversary: Adversary, attack: Attack, defenses: Sequence[Defense], known: Known
    ) -> None:
        self._adversary = adversary
        self._attack = attack
        self._defenses = defenses
        self._known = known
        # Apart from the stream that the attack itself makes of the seed.
        sequence = np.random.SeedSequence(adversary.seed, spawn_key=(1,))
        self._rng = np.random.Generator(np.random.PCG64(sequence))
        self._labels = changing_labels(defenses)
        self._samples = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adversary, name)

    def after(self, update: NDArray[np.float32]) -> "DefendedAdversary":
        """Return the same adversary at the model that a client ended with."""
        later = self._adversary.after(update)
        return DefendedAdversary(later, self._attack, self._defenses, self._known)

    def simulate(self, batches: NDArray[np.int64]) -> Observations:
        """Observe simulated clients [S, E, B], defended and undone."""
        simulated = (
            self._adversary.simulate(batches, self._targets(batches))
            if self._labels
            else self._adversary.simulate(batches)
        )
        for defense in self._defenses:
            simulated = defense.imitate(simulated, self._rng)
        return undo(self._defenses, simulated.restricted(self._attack), self._known)

    def _targets(self, batches: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the label distributions that simulated clients train on, [S, E, B, C]."""
        own = self._adversary.on_auxiliary().labels
        if own is None:
            raise ValueError("clients cannot be simulated with inputs that have no labels")
        one_hot = np.eye(self._adversary.classes, dtype=np.float32)[own[batches]]
        size = batches.shape[2]
        for batch in one_hot.reshape(-1, *one_hot.shape[2:]):
            targets = Targets(batch.copy())
            # What clients draw once per sample and remember is drawn anew: the victims have other
            # samples than these few.
            samples = np.arange(self._samples, self._samples + size)
            self._samples += size
            for place, defense in enumerate(self._labels):
                seed = self._adversary.seed ^ place
                targets = defense.transform(targets, samples, self._rng, seed)
            batch[:] = targets.probabilities
        return one_hot


def is_defended(adversary: Adversary) -> bool:
    """Return whether simulated clients defend themselves.

    An attack that has a closed form for the gradients of others then has to ask
    `Adversary.simulate` for these.
    """
    return isinstance(adversary, DefendedAdversary)
