"""What the results file says of a scenario before its first round."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from testbed.attacks.assumptions import assumptions, broken_assumptions, not_applicable
from testbed.experiment import Scenario
from testbed.plan import ScenarioPlan
from testbed.results.records import AttackInfo, ScenarioHeader
from testbed.results.schema import scenario_arrays, used_lengths

if TYPE_CHECKING:  # it imports torch
    from testbed.startup import Setups


def scenario_header(
    plan: ScenarioPlan, setups: "Setups", begun: Scenario | None = None
) -> ScenarioHeader:
    """Return the header of a scenario.

    Parameters
    ----------
    plan
        Of the scenario.
    setups
        Makes its model and attacks: an error of the user's is told before any rank computes.
    begun
        The scenario as the run was begun with it, where data have moved since.
    """
    from testbed.attacking import attack_entries
    from testbed.budget import scenario_budget
    from testbed.server import scenario_facts
    from testbed.startup import lowest_feature

    setup = setups.make(plan)
    setup.auxiliary()
    layout = setup.layout
    entries = attack_entries(plan, setup)
    facts = scenario_facts(plan, setup, lowest_feature(plan, setup))
    idle = {label: not_applicable(entry.attack, facts) for label, entry in entries.items()}
    arrays = scenario_arrays(
        bias=layout.bias is not None,
        weight=plan.keeps_weights,
        statistics=plan.keeps_weights and layout.buffers > 0,
        update=plan.keeps_updates,
        member=plan.summed is not None,
        accumulated=any(entry.accumulated for entry in entries.values()),
        varying=plan.varying_steps,
        attacks={
            label: (entry.attack.answers.value, {} if idle[label] else entry.attack.arrays())
            for label, entry in entries.items()
        },
    )
    lengths = used_lengths(
        arrays,
        {
            "round": plan.rounds,
            "client": plan.observed,
            "member": plan.clients,
            "class": layout.classes,
            "feature": layout.features,
            "buffer": layout.buffers,
            "parameter": layout.size,
        },
    )
    return ScenarioHeader(
        number=plan.index,
        draws=plan.draws,
        swept=plan.swept,
        parameters={
            **_flatten((begun or plan.scenario).model_dump(mode="json")),
            "model.init": plan.scenario.model.initialisation,
        },
        model_parameters=layout.parameters,
        model_buffers=layout.buffers,
        last_layer=setup.model.last_layer.name,
        lengths=lengths,
        arrays=arrays,
        attacks={
            label: AttackInfo(
                name=entry.attack.name,
                title=entry.attack.title,
                knowledge=entry.attack.knowledge.value,
                source=entry.attack.source,
                options=entry.attack.options(),
                answers=entry.attack.answers.value,
                observes=sorted(part.value for part in entry.attack.observes),
                assumes=sorted(item.value for item in assumptions(entry.attack)),
                broken=broken_assumptions(entry.attack, facts),
                not_applicable=idle[label],
                target="accumulated" if entry.accumulated else "update",
                adapted=entry.adapted,
                adaptation=entry.adaptation,
            )
            for label, entry in entries.items()
        },
        privacy=scenario_budget(plan, setup),
    )


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
