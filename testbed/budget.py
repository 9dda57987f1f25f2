"""How much privacy the clients of a scenario spend, where they train with DP-SGD."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from testbed.data.batches import steps_of
from testbed.defenses.samples import DPSGD
from testbed.plan import ScenarioPlan
from testbed.privacy import describe_budget
from testbed.startup import ScenarioSetup


@dataclass(frozen=True, order=True)
class _Use:
    """How a client uses a sample.

    Attributes
    ----------
    rate
        Probability that the sample is in a batch.
    steps
        How many batches there are.
    rows
        How many rows of a batch the sample may fill: it then moves the sum as far as that many.
    """

    rate: float
    steps: int
    rows: int


def scenario_budget(plan: ScenarioPlan, setup: ScenarioSetup) -> Mapping[str, Any]:
    """Return the largest budget that a sample spends, as `describe_budget`; {} without DP-SGD.

    Where clients have samples of their own, each client's samples count its own batches. Where all
    draw from the same samples, every batch of every client counts, at the rate of a sample of the
    class that is drawn most: an upper bound for labels that are not ``natural``. Repetitions with
    fresh models are each a release of their own.
    """
    defense = next((one for one in plan.defenses if isinstance(one, DPSGD)), None)
    if defense is None:
        return {}
    budgets = [
        describe_budget(
            noise_multiplier=defense.noise_multiplier / use.rows,
            sampling_rate=use.rate,
            steps=use.steps,
            delta=defense.delta,
            accountant=defense.accountant,
        )
        for use in sorted(_uses(plan, setup))
    ]
    largest = max(budgets, key=lambda budget: float(budget["epsilon"]))
    if plan.pretraining_steps:
        # Plain SGD on the victims' samples: what it gives away is in every later model.
        largest["note"] += (
            f"; the model was first trained for {plan.pretraining_steps} steps on the same samples "
            "without noise, which is not accounted"
        )
    return largest


def _uses(plan: ScenarioPlan, setup: ScenarioSetup) -> set[_Use]:
    federation = plan.scenario.federation
    rounds, size = 1 if plan.fresh_model else plan.rounds, federation.batch_size
    if setup.partition is None:
        steps = (plan.local_steps or 1) * rounds * plan.clients
        return {_Use(_highest_rate(plan, setup), steps, 1)}
    taking_part = Counter(
        identity for number in range(rounds) for identity in plan.participants(number).identities
    )
    uses = set()
    for identity, times in taking_part.items():
        own = len(setup.partition.indices[identity])
        each = plan.local_steps or steps_of(own, size, federation.local_epochs or 1)
        rows = 1 if plan.varying_steps else -(-size // own)
        uses.add(_Use(min(1.0, size / own), each * times, rows))
    return uses


def _highest_rate(plan: ScenarioPlan, setup: ScenarioSetup) -> float:
    """Return how often a sample of the class that is drawn most is in a batch, on average."""
    size, kind = plan.scenario.federation.batch_size, plan.scenario.labels.distribution
    labels, classes = setup.samples.labels[setup.parts.victim], setup.layout.classes
    if kind == "natural":
        return min(1.0, size / len(labels))
    skewed = (size // 2, size // 4) if kind == "unbalanced" else (0, 0)
    rows = skewed[0] + (size - sum(skewed)) / classes
    return min(1.0, rows / int(np.bincount(labels, minlength=classes).min()))
