"""What an experiment would do, and what there is to choose from. Costs neither torch nor MPI."""

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from itertools import islice
from typing import Any

from testbed.attacks import Assumption, Observed, attacks
from testbed.attacks.adapted import ADAPTED_ARRAYS
from testbed.attacks.assumptions import Facts, assumptions, broken_assumptions, not_applicable
from testbed.data import DATASETS, describe
from testbed.defenses import defenses
from testbed.experiment import ResolvedExperiment
from testbed.models.catalog import MODELS, check_input
from testbed.plan import ScenarioPlan, make_plan
from testbed.results.schema import (
    ACCUMULATED,
    ADAPTED,
    Calibrations,
    scenario_arrays,
    uncompressed_bytes,
)
from testbed.sweep import describe as describe_swept

_MOST_SCENARIOS = 40


def describe_experiment(resolved: ResolvedExperiment) -> str:
    """Return the resolved plan as text: scenarios, rounds, updates, size of the results file."""
    plans = make_plan(resolved)
    rounds = sum(plan.rounds for plan in plans)
    updates = sum(plan.rounds * plan.clients for plan in plans)
    shown = [["scenario", "rounds", "clients", "labels", "update", "size", "what"]]
    shown += [_row(plan) for plan in islice(plans, _MOST_SCENARIOS)]
    lines = [resolved.experiment.title, "", *_table(shown)]
    if len(plans) > _MOST_SCENARIOS:
        lines.append(f"... and {len(plans) - _MOST_SCENARIOS} more")
    sizes = [_results_bytes(plan) for plan in plans]
    known = [size for size in sizes if size is not None]
    total = f"at most {_bytes(sum(known))} when complete, less by compression"
    if len(known) < len(sizes):
        unknown = len(sizes) - len(known)
        total = f"unknown ({unknown} of {len(sizes)} scenarios have shapes that only running tells)"
    compute = resolved.experiment.compute
    lines += [
        "",
        f"scenarios     {len(plans)}",
        f"rounds        {rounds}",
        f"updates       {updates}",
        f"results file  {total}",
        f"compute       device={compute.device}, threads={compute.threads} per rank",
        "",
        "labels: that one update gives away; update: its length before defences; size: of the "
        "scenario's arrays",
        *_notes(plans),
    ]
    return "\n".join(lines)


def describe_known(kind: str) -> str:
    """Return the table of ``attacks``, ``defenses``, ``models`` or ``datasets``."""
    if kind == "attacks":
        rows = [["name", "knows", "answers", "looks at", "assumes", "options", "source"]]
        for name, attack in attacks().items():
            knobs = ", ".join(f"{field.name}={field.default}" for field in fields(attack))
            looks = ", ".join(part.value for part in Observed if part in attack.observes)
            assumes = ", ".join(item.value for item in Assumption if item in assumptions(attack))
            answers, knows = attack.answers.value, attack.knowledge.value
            source = attack.source
            rows.append([name, knows, answers, looks, assumes or "-", knobs or "-", source])
    elif kind == "defenses":
        rows = [["name", "works on", "options", "adapted attacker", "source"]]
        for name, defense in defenses().items():
            knobs = ", ".join(map(_knob, fields(defense)))
            adaptation = defense.adaptation or "nothing to adapt to"
            rows.append([name, defense.stage.name.lower(), knobs, adaptation, defense.source])
    elif kind == "models":
        rows = [["name", "activation", "smallest image", "what"]]
        for model in MODELS.values():
            size = f"{model.min_size}x{model.min_size}"
            rows.append([model.name, model.default_activation, size, model.description])
        rows.append(["package.module:callable", "-", "-", "any torch.nn.Module of yours"])
    else:
        rows = [["name", "variants", "classes", "image", "data.root", "what"]]
        for data in DATASETS.values():
            shape = "x".join(map(str, data.shape)) if data.shape else "of the file"
            classes = str(data.classes) if data.classes else "of the file"
            variants = "/".join(data.variants) or "-"
            rows.append([data.name, variants, classes, shape, data.root or "-", data.description])
    return "\n".join(_table(rows))


def _knob(field: "Field[Any]") -> str:
    return field.name if field.default is MISSING else f"{field.name}={field.default}"


def _notes(plans: Sequence[ScenarioPlan]) -> list[str]:
    """Return which attacks will be left out and which assumptions broken, as far as is known."""
    found: dict[str, tuple[dict[str, None], set[int]]] = {}
    for plan in plans:
        facts = _facts(plan)
        if facts is None:
            continue
        for section in plan.scenario.attacks:
            attack = section.make()
            reason = not_applicable(attack, facts)
            facts_of_it = [f"not run, since {reason}"] if reason else []
            if not reason:
                broken = broken_assumptions(attack, facts)
                facts_of_it = [f"{name}: assumed, and does not hold" for name in broken]
            for text in facts_of_it:
                labels, scenarios = found.setdefault(text, ({}, set()))
                labels[section.label] = None
                scenarios.add(plan.index)
    return [
        f"note: {text} (in {len(scenarios)} of {len(plans)} scenarios: {', '.join(labels)})"
        for text, (labels, scenarios) in found.items()
    ]


def _facts(plan: ScenarioPlan) -> Facts | None:
    """Return what is known of a scenario before its model is built."""
    classes, shape = _outline(plan)
    info = MODELS.get(plan.scenario.model.name)
    if info is None or classes is None or shape is None:
        return None
    adversary = plan.scenario.adversary
    return Facts(
        classes=classes,
        features=info.features(shape),
        bias=True,
        statistics=info.buffers if plan.scenario.federation.shares_statistics else 0,
        batch_size=plan.scenario.federation.batch_size
        * (1 if plan.summed is None else plan.clients),
        local_steps=plan.local_steps or 1,
        known_size=adversary.knows_size,
        fair_samples=adversary.has_fair_samples,
        statistics_noise=plan.scenario.federation.statistics_noise,
        withheld=any(one.name == "withhold_last_layer" for one in plan.defenses),
    )


def _outline(plan: ScenarioPlan) -> tuple[int | None, tuple[int, int, int] | None]:
    data = plan.scenario.data
    return describe(data.name, data.root, data.variant)


def _row(plan: ScenarioPlan) -> list[str]:
    size, length = _results_bytes(plan), _update_bytes(plan)
    return [
        str(plan.index),
        str(plan.rounds),
        str(plan.clients),
        _labels(plan),
        "unknown" if length is None else _bytes(length),
        "unknown" if size is None else _bytes(size),
        describe_swept(plan.swept) or "the only one",
    ]


def _labels(plan: ScenarioPlan) -> str:
    labels = plan.labels_per_update
    if labels is None:
        return "varies"
    return str(labels if plan.summed is None else labels * plan.clients)


def _update_bytes(plan: ScenarioPlan) -> int | None:
    classes, shape = _outline(plan)
    info = MODELS.get(plan.scenario.model.name)
    if info is None or classes is None or shape is None:
        return None
    check_input(info, shape, classes)
    shared = info.buffers if plan.scenario.federation.shares_statistics else 0
    return 4 * (info.parameters(shape, classes) + shared)


def _results_bytes(plan: ScenarioPlan) -> int | None:
    scenario = plan.scenario
    classes, shape = _outline(plan)
    info = MODELS.get(scenario.model.name)
    if classes is None:
        return None
    attacks = _answers(plan)
    # A layer without bias is possible in a user's own model; the estimate is an upper bound.
    arrays = scenario_arrays(
        bias=True,
        weight=plan.keeps_weights,
        statistics=plan.keeps_weights and (info is None or info.buffers > 0),
        update=plan.keeps_updates,
        member=plan.summed is not None,
        accumulated=any(label.endswith(ACCUMULATED) for label in attacks),
        varying=plan.varying_steps,
        attacks=attacks,
    )
    lengths = {"round": plan.rounds, "client": plan.observed, "class": classes}
    lengths["member"] = plan.clients
    if any({"feature", "buffer", "parameter"} & {*spec.axes} for spec in arrays.values()):
        if info is None or shape is None:
            return None
        check_input(info, shape, classes)
        lengths["feature"] = info.features(shape)
        lengths["buffer"] = info.buffers
        lengths["parameter"] = info.parameters(shape, classes) + info.buffers
    attacked = -(-plan.rounds // scenario.federation.attack_every)
    return uncompressed_bytes(arrays, lengths, attacked)


def _answers(plan: ScenarioPlan) -> dict[str, tuple[str, Calibrations]]:
    """Return what the attacks answer and derive, those beside the plain ones too."""
    found: dict[str, tuple[str, Calibrations]] = {}
    adaptive = plan.scenario.adversary.adaptive and bool(plan.defenses)
    sums = not plan.fresh_model and any(one.accumulates for one in plan.defenses)
    for section in plan.scenario.attacks:
        attack = section.make()
        own = {**attack.arrays(), **ADAPTED_ARRAYS}
        found[section.label] = (attack.answers.value, attack.arrays())
        # As many as there may be: which attacks adapt is known when the model is.
        if adaptive:
            found[section.label + ADAPTED] = (attack.answers.value, own)
        if adaptive and sums:
            found[section.label + ACCUMULATED] = (attack.answers.value, own)
    return found


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:  # what is above is shown as 1e+03
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
