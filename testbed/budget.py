"""How much privacy the clients of a scenario spend, where they train with DP-SGD."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from testbed.data.batches import steps_of
from testbed.defenses.samples import DPSGD
from testbed.plan import ScenarioPlan
from testbed.privacy import describe_budget
from testbed.startup import ScenarioSetup


def scenario_budget(plan: ScenarioPlan, setup: ScenarioSetup) -> Mapping[str, Any]:
    """Return the budget of the sample that is used most, as `describe_budget`; {} without DP-SGD.

    Where clients have samples of their own, it is that of the client with the fewest, as often as
    the client that takes part most often; where all draw from the same samples, every batch of
    every client counts. Repetitions with fresh models are each a release of their own.
    """
    defense = next((one for one in plan.defenses if isinstance(one, DPSGD)), None)
    if defense is None:
        return {}
    federation = plan.scenario.federation
    rounds = 1 if plan.fresh_model else plan.rounds
    if setup.partition is None:
        samples = len(setup.parts.victim)
        steps = (plan.local_steps or 1) * rounds * plan.clients
    else:
        samples = min(len(own) for own in setup.partition.indices)
        largest = max(len(own) for own in setup.partition.indices)
        epochs = federation.local_epochs
        each = plan.local_steps or steps_of(largest, federation.batch_size, epochs or 1)
        taking_part = Counter(
            identity
            for number in range(rounds)
            for identity in plan.participants(number).identities
        )
        steps = each * max(taking_part.values())
    return describe_budget(
        noise_multiplier=defense.noise_multiplier,
        sampling_rate=min(1.0, federation.batch_size / samples),
        steps=steps,
        delta=defense.delta,
        accountant=defense.accountant,
    )
