"""What the file of a replay says of a scenario before its first round."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from analysis.choice import Replayed

if TYPE_CHECKING:
    from analysis.stored import StoredScenario
    from testbed.results.records import AttackInfo, ScenarioHeader
    from testbed.results.schema import ArraySpec


def replay_header(
    stored: "StoredScenario",
    chosen: Sequence[Replayed],
    kept: Sequence[str],
    copied: Mapping[str, "ArraySpec"],
    idle: Mapping[str, str],
) -> "ScenarioHeader":
    """Return the header of the scenario in the new file.

    Parameters
    ----------
    stored
        The scenario in the old file.
    chosen
        The attacks to run.
    kept
        Labels of the stored attacks that are in the new file too.
    copied
        The arrays to copy, by path.
    idle
        Of each attack to run, by label, why it is not applicable; empty where it is.
    """
    from testbed.results.records import ScenarioHeader
    from testbed.results.schema import scenario_arrays, used_lengths

    scenario = stored.scenario
    made = scenario_arrays(
        bias=False,
        weight=False,
        varying=stored.varying,
        attacks={
            one.label: (
                one.attack.answers.value,
                {} if idle[one.label] else one.attack.arrays(),
            )
            for one in chosen
        },
    )
    new = {path: spec for path, spec in made.items() if "attacks/" in path}
    arrays = {**copied, **new}
    listed = scenario.parameters.get("attacks") or ()
    entries = [entry for entry in listed if _label(entry) in kept]
    lengths = {"feature": stored.facts.features, **stored.lengths}
    return ScenarioHeader(
        number=scenario.number,
        draws=scenario.draws,
        swept=scenario.swept,
        parameters={
            **scenario.parameters,
            "attacks": [*entries, *(one.entry for one in chosen)],
        },
        model_parameters=int(stored.attributes["model_parameters"]),
        model_buffers=int(stored.attributes["model_buffers"]),
        last_layer=str(stored.attributes["last_layer"]),
        lengths=used_lengths(arrays, lengths),
        arrays=arrays,
        attacks={
            **{label: scenario.attacks[label] for label in kept},
            **{one.label: _described(one, stored, idle[one.label]) for one in chosen},
        },
        privacy=scenario.privacy,
    )


def _described(one: Replayed, stored: "StoredScenario", idle: str) -> "AttackInfo":
    from testbed.attacks.assumptions import assumptions
    from testbed.results.records import AttackInfo

    attack = one.attack
    return AttackInfo(
        name=attack.name,
        title=attack.title,
        knowledge=attack.knowledge.value,
        source=attack.source,
        options=attack.options(),
        answers=attack.answers.value,
        observes=sorted(part.value for part in attack.observes),
        assumes=sorted(item.value for item in assumptions(attack)),
        broken=stored.broken(attack),
        not_applicable=idle,
    )


def _label(entry: object) -> str:
    return str(entry.get("label", "")) if isinstance(entry, Mapping) else ""
