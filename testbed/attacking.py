"""The attacks on a round's updates: plain, adapted to the defences, and on sums over rounds."""

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.accumulation import Accumulated
from testbed.attacks.adapted import AdaptedAttack, adapts
from testbed.attacks.adversary import GlobalModel
from testbed.attacks.assumptions import Facts, not_applicable
from testbed.attacks.base import Attack, Observations, Observed
from testbed.attacks.batch_size import estimate_labels
from testbed.attacks.checks import check_calibration
from testbed.attacks.inference import infer_in_chunks
from testbed.attacks.restricted import RestrictedAdversary
from testbed.plan import ScenarioPlan
from testbed.results.schema import ACCUMULATED, ADAPTED
from testbed.round import Round
from testbed.seeds import Purpose, seed64
from testbed.startup import ScenarioSetup


@dataclass(frozen=True)
class Entry:
    """An attack as it is run in a scenario.

    Attributes
    ----------
    attack
        The attack.
    adapted
        Label of the plain attack that this one adapts; empty for a plain one.
    accumulated
        Whether it looks at a client's updates of all rounds so far, added up, and infers the labels
        behind all of them.
    adaptation
        What it does about each defence.
    """

    attack: Attack
    adapted: str = ""
    accumulated: bool = False
    adaptation: Sequence[str] = ()


def attack_entries(plan: ScenarioPlan, setup: ScenarioSetup) -> dict[str, Entry]:
    """Return every attack that a scenario runs or would run, by label, in the order of tables.

    Beside each plain attack stands the adapted one, where some defence gives it something to do,
    and, where a defence only delays or blurs what averages out, one on the sum over the rounds; not
    of attacks that look at whole updates or statistics, nor of those that would simulate as many
    local steps.
    """
    entries: dict[str, Entry] = {}
    defenses, layout = plan.defenses, setup.layout
    sentences = [f"{one.name}: {one.adaptation}" for one in defenses if one.adaptation]
    sums = not plan.fresh_model and plan.rounds > 1 and any(one.accumulates for one in defenses)
    for label, attack in setup.attacks.items():
        entries[label] = Entry(attack)
        if not plan.scenario.adversary.adaptive or not defenses:
            continue
        adapted = attack
        if adapts(attack, defenses):
            adapted = AdaptedAttack(
                attack, defenses, setup.model.tensors, has_bias=layout.bias is not None
            )
            entries[label + ADAPTED] = Entry(adapted, label, False, sentences)
        whole = {Observed.UPDATE, Observed.STATISTICS} & attack.observes
        if sums and attack.name not in _BASELINES and not whole and not attack.simulates:
            entries[label + ACCUMULATED] = Entry(adapted, label, True, sentences)
    return entries


_BASELINES = ("random", "uniform", "prior", "oracle")


class RoundAttacks:
    """Runs the attacks of one scenario on the root.

    Parameters
    ----------
    plan, setup
        Of the scenario.
    adversary
        Holds the global model of the round that is attacked.
    facts
        What decides which attacks are of no use.
    """

    def __init__(
        self, plan: ScenarioPlan, setup: ScenarioSetup, adversary: GlobalModel, facts: Facts
    ) -> None:
        self._plan = plan
        self._layout = setup.layout
        self._adversary = adversary
        self._entries = {
            label: entry
            for label, entry in attack_entries(plan, setup).items()
            if not not_applicable(entry.attack, facts)
        }
        observed = {part for entry in self._entries.values() for part in entry.attack.observes}
        self._estimates = plan.scenario.adversary.batch_size == "estimated"
        self.needs_weights = (
            plan.keeps_weights or self._estimates or Observed.WEIGHT_GRADIENT in observed
        )
        self.needs_updates = plan.keeps_updates or Observed.UPDATE in observed
        summed = [entry.attack for entry in self._entries.values() if entry.accumulated]
        self._accumulated: Accumulated | None = None
        if summed:
            weights = any(Observed.WEIGHT_GRADIENT in attack.observes for attack in summed)
            self._accumulated = Accumulated(weights=weights)

    @property
    def needs_every_round(self) -> bool:
        """Whether rounds count for later attacks even where they are not attacked themselves."""
        return self._accumulated is not None

    def take(self, record: Round) -> None:
        """Add a round, attacked or not, to the sums over rounds."""
        if self._accumulated is not None:
            # A cohort's sum has no identity: cohorts are all one.
            cohort = self._plan.summed is not None
            identities = np.zeros(1, np.int64) if cohort else record.identity
            self._accumulated.add(record, identities, self._believed_labels(record))

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the sums over rounds, for a checkpoint."""
        return {} if self._accumulated is None else self._accumulated.state()

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `state` returned; `KeyError` or `ValueError` if that makes no sense."""
        if self._accumulated is not None:
            self._accumulated.restore(state)

    def run(self, number: int, record: Round, sent: NDArray[np.float32]) -> dict[str, Any]:
        """Attack a round; return the rows of its truth, observations and answers.

        Parameters
        ----------
        number, record
            Of the round.
        sent
            float32 [P + S]: the global model that went out.
        """
        rows = self._observed(record, sent)
        if self._accumulated is not None:
            rows["truth/accumulated"] = self._accumulated.counts(record, self._plan.observed)
        seen = np.flatnonzero(record.seen)
        if len(seen) == 0:
            return rows
        with record.clock.phase("attack"):
            rows |= self._answers(number, record, seen, sent)
        return rows

    def _observed(self, record: Round, sent: NDArray[np.float32]) -> dict[str, Any]:
        rows: dict[str, Any] = {
            "truth/counts": record.counts,
            "truth/posterior": record.posterior,
            "observations/row_sums": record.row_sums,
            "observations/norm": record.norm,
        }
        if record.bias is not None:
            rows["observations/bias_gradient"] = record.bias
        if self._plan.keeps_weights and record.weight is not None:
            rows["observations/weight_gradient"] = record.weight
        if self._plan.keeps_weights and record.statistics is not None:
            rows["observations/statistics"] = record.statistics
            # A copy: the row waits for the next commit, and the slot for a later model.
            rows["observations/statistics_sent"] = sent[self._layout.parameters :].copy()
        if self._plan.keeps_updates and record.update is not None:
            rows["observations/update"] = record.update
        return rows

    def _answers(
        self,
        number: int,
        record: Round,
        seen: NDArray[np.int64],
        sent: NDArray[np.float32],
    ) -> dict[str, Any]:
        plan = self._plan
        believed = self._believed_labels(record)
        labels = np.full(plan.observed, -1, np.int32)
        labels[seen] = believed[seen]
        answers = _Answers(plan.observed, {"observations/labels": labels})
        self._adversary.enter(sent, plan.scenario.seed, (plan.draws, number))
        groups = _by_steps(record, seen, believed)
        later: Sequence[Observations] = []
        if self._accumulated is not None:
            later = self._accumulated.observations(seen)
        for label, entry in self._entries.items():
            for observations in later if entry.accumulated else groups:
                self._adversary.local_steps = observations.local_steps
                self._run(label, entry.attack, number, observations, answers)
        return answers.rows

    def _believed_labels(self, record: Round) -> NDArray[np.int64]:
        """Return how many labels the server takes each update to have, [observed]."""
        labels = record.labels.copy()
        if self._estimates and record.weight is not None:
            for steps in np.unique(record.steps[record.seen]):
                rows = np.flatnonzero(record.seen & (record.steps == steps))
                bias = None if record.bias is None else record.bias[rows]
                labels[rows] = estimate_labels(record.weight[rows], bias, int(steps))
        factor = self._plan.scenario.adversary.batch_size_factor
        believed: NDArray[np.int64] = np.maximum(np.rint(labels * factor), 1).astype(np.int64)
        return believed

    def _run(
        self,
        label: str,
        attack: Attack,
        number: int,
        whole: Observations,
        answers: "_Answers",
    ) -> None:
        started = time.perf_counter()
        observations = whole.restricted(attack)
        name = zlib.crc32(label.encode())
        seed = seed64(self._plan.scenario.seed, Purpose.ATTACK, self._plan.draws, number, name)
        # A calibration serves all updates of a round: where the sizes differ, that of the middle.
        batch_size = max(1, round(float(np.median(observations.labels)) / observations.local_steps))
        adversary = RestrictedAdversary(self._adversary, attack.knowledge, batch_size, seed)
        calibration = {
            **attack.calibrate(adversary),
            **attack.calibrate_updates(adversary, observations),
        }
        lengths = {
            "client": len(observations.keys),
            "class": self._layout.classes,
            "feature": self._layout.features,
            "buffer": self._layout.buffers,
        }
        check_calibration(label, attack, calibration, lengths)
        values = infer_in_chunks(label, attack, observations, calibration)
        rows = observations.keys
        answers.put(f"attacks/{label}/{attack.answers.value}", values, rows)
        declared = attack.arrays()
        for array, values in calibration.items():
            path = f"attacks/{label}/calibration/{array}"
            if declared[array][0][:1] == ("client",):
                answers.put(path, values, rows)
            elif self._plan.varying_steps or label.endswith(ACCUMULATED):
                answers.put(path, np.broadcast_to(values, (len(rows), *values.shape[1:])), rows)
            else:
                answers.rows[path] = values[0]
        timing = f"timings/attacks/{label}"
        spent = answers.rows.get(timing, 0.0) + time.perf_counter() - started
        answers.rows[timing] = spent


class _Answers:
    """Rows that several groups of updates fill."""

    def __init__(self, observed: int, rows: dict[str, Any]) -> None:
        self._observed = observed
        self.rows = rows

    def put(self, path: str, values: NDArray[Any], rows: NDArray[np.int64]) -> None:
        """Set an array's values of some updates; those of others keep the fill value."""
        if values.dtype == np.bool_:
            values = values.astype(np.int8)
        if path not in self.rows:
            fill = {"f": np.nan, "i": -1, "u": 0}[values.dtype.kind]
            shape = (self._observed, *values.shape[1:])
            self.rows[path] = np.full(shape, fill, values.dtype)
        self.rows[path][rows] = values


def _by_steps(
    record: Round, seen: NDArray[np.int64], believed: NDArray[np.int64]
) -> list[Observations]:
    """Return the observations of a round's updates, those of equally many local steps together."""
    groups = []
    for steps in np.unique(record.steps[seen]):
        chosen = seen[record.steps[seen] == steps]
        # Mostly all of them: views, as whole updates of many clients are large.
        part = slice(None) if len(chosen) == len(record.seen) else chosen
        arrays: Mapping[str, NDArray[Any] | None] = {
            "row_sums": record.row_sums,
            "bias_gradient": record.bias,
            "weight_gradient": record.weight,
            "statistics": record.statistics,
            "update": record.update,
            "posterior": record.posterior,
            "norm": record.norm,
        }
        shown = {name: None if a is None else _locked(a[part]) for name, a in arrays.items()}
        groups.append(
            Observations(
                **shown,
                labels=_locked(believed[chosen]),
                keys=_locked(chosen),
                local_steps=int(steps),
            )
        )
    return groups


def _locked(array: NDArray[Any]) -> NDArray[Any]:
    """Return a view that cannot be written to: every attack is given the same arrays."""
    view = array.view()
    view.flags.writeable = False
    return view
