"""What is in a results file, and how far it is."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.load import DEFENSES
from analysis.score import ACCUMULATED
from analysis.shares import ShareFile, share_file
from testbed.defenses.described import NONE, defense_label, named
from testbed.results.placed import describe_sharing

if TYPE_CHECKING:
    from testbed.results.reader import Results, Scenario
    from testbed.results.records import Rank, Start

# How many starts and losses at either end of a long list are shown.
_SHOWN = 4
# What was found instead, by obstacle and attack, and by scenario.
_Found = dict[tuple[str, str], dict[int, str]]


def show(path: str | Path) -> str:
    """Return a description of a results file.

    Raises
    ------
    UserError
        The file cannot be read.
    """
    from testbed.results.reader import open_results

    with open_results(path) as results:
        facts = [
            ("file", str(results.path)),
            ("state", progress(results)),
            *_share(share_file(str(results.path), results)),
            *_provenance(results),
        ]
        width = max(len(name) for name, _ in facts)
        return "\n".join(
            [
                results.title or "(untitled)",
                *(f"  {name.ljust(width)}  {value}" for name, value in facts),
                "",
                *describe_scenarios(results.scenarios),
                "",
            ]
        )


def describe_scenarios(scenarios: Sequence["Scenario"]) -> list[str]:
    """Return lines about attacks, what they lack, how clients train, and every scenario."""
    return [
        *_attacks(scenarios),
        "",
        *_obstacles(scenarios),
        *_federation(scenarios),
        *_scenarios(scenarios),
    ]


def progress(results: "Results") -> str:
    """Return whether the file is complete, and how far it is."""
    committed = sum(scenario.committed for scenario in results.scenarios)
    planned = sum(scenario.rounds for scenario in results.scenarios)
    # Rounded down: 100 % is said of nothing that lacks a round.
    percent = 100 * committed // planned if planned else 100
    far = f"{committed} of {planned} rounds, {percent} %"
    if results.complete:
        return f"complete ({far})"
    if committed == planned:
        return f"all rounds are there, but the run has not closed the file ({far})"
    return f"incomplete: still being written, or its run was stopped ({far})"


def _share(file: ShareFile) -> list[tuple[str, str]]:
    if file.count == 1:
        return []
    return [("share", f"{file.place}/{file.count} of the scenarios of the experiment")]


def _provenance(results: "Results") -> list[tuple[str, str]]:
    attributes = results.attributes

    def text(name: str) -> str:
        return str(attributes.get(name, ""))

    slurm = text("slurm_job")
    return [
        ("created", text("created") or "unknown"),
        ("command", text("command") or "unknown"),
        ("software", f"{text('software')} {text('software_version')}".strip() or "unknown"),
        ("commit", text("git_commit") or "unknown"),
        ("MPI", text("mpi_library") or "none (a single process)"),
        ("Slurm job", slurm or "none"),
        *_placement(results.ranks),
        *_starts(results.starts),
        *_losses(results),
        ("packages", list_packages(text("dependencies")) or "unknown"),
    ]


def _starts(starts: Sequence["Start"]) -> list[tuple[str, str]]:
    """Return when a run was started that was started more than once."""
    if len(starts) < 2:
        return []
    lines = []
    for start in starts:
        line = f"{start.time} with {number(start.ranks, 'rank')}"
        line += f", after {number(start.committed, 'round')}" if start.committed else ""
        lines.append(line + (f", Slurm job {start.slurm_job}" if start.slurm_job else ""))
    return [("started", f"{len(starts)} times"), *(("", line) for line in _ends(lines))]


def _losses(results: "Results") -> list[tuple[str, str]]:
    """Return which ranks a run lost, and where."""
    losses = results.losses
    if not losses:
        return []
    lines = []
    for loss in losses:
        where = f"rank {loss.rank} on {loss.host}, {loss.reason}"
        if len(results.starts) > 1:
            where += f" during start {loss.start + 1}"
        where += f" at round {loss.round}"
        if len(results.scenarios) > 1:
            where += f" of scenario {_sweep_number(results, loss.scenario)}"
        lines.append(f"{where}; the run went on after {loss.seconds:.2g} s")
    return [("lost", number(len(losses), "rank")), *(("", line) for line in _ends(lines))]


def _sweep_number(results: "Results", index: int) -> int:
    known = {scenario.index: scenario.number for scenario in results.scenarios}
    return known.get(index, index)


def _ends(lines: Sequence[str]) -> list[str]:
    """Return the first and the last lines of many."""
    if len(lines) <= 2 * _SHOWN:
        return list(lines)
    left = len(lines) - 2 * _SHOWN
    return [*lines[:_SHOWN], f"... {left} more ...", *lines[-_SHOWN:]]


def list_packages(dependencies: str) -> str:
    """Return names and versions: ``numpy 2.0, h5py 3.11``."""
    try:
        return ", ".join(f"{name} {version}" for name, version in json.loads(dependencies).items())
    except (ValueError, AttributeError):
        return dependencies


def _placement(ranks: Sequence["Rank"]) -> list[tuple[str, str]]:
    hosts = len({rank.host for rank in ranks})
    count = f"{number(len(ranks), 'rank')} on {number(hosts, 'host')}"
    sharing = [("", line) for line in describe_sharing(ranks)]
    if len(ranks) <= 8:
        each = [
            f"{rank.rank} {rank.role} on {rank.host}, {rank.device}"
            + (f", CPU{'' if rank.cores.isdecimal() else 's'} {rank.cores}" if rank.cores else "")
            for rank in ranks
        ]
        return [("ranks", count), *(("", line) for line in each), *sharing]
    return [("ranks", count), ("devices", count_devices(ranks)), *sharing]


def count_devices(ranks: Sequence["Rank"]) -> str:
    """Return how many ranks have which kind of device: ``8 x NVIDIA H200, 1 x cpu``."""
    # Indices of devices differ from rank to rank; their models are what a reader wants to know.
    kinds = Counter(rank.device.partition(" ")[2] or rank.device for rank in ranks)
    return ", ".join(f"{times} x {kind}" for kind, times in kinds.most_common())


def number(count: int, noun: str) -> str:
    """Return a number of things: ``1 rank``, ``2 ranks``."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _attacks(scenarios: Sequence["Scenario"]) -> list[str]:
    """One line per attack; an attack whose options change with the scenario has several."""
    lines: dict[tuple[str, ...], None] = {}
    for scenario in scenarios:
        for label, info in scenario.attacks.items():
            options = ", ".join(f"{name}={value}" for name, value in info.options.items())
            knows = f"knows {info.knowledge}" + (" and the defences" if info.adapted else "")
            answers = f"answers {info.answers}"
            if info.target == ACCUMULATED:
                answers += " of all updates so far"
            lines[label, info.title, knows, answers, options or "no options", info.source] = None
    return ["attacks", *aligned(lines)] if lines else ["attacks  none"]


def _obstacles(scenarios: Sequence["Scenario"]) -> list[str]:
    """Return where attacks were not run, and where a scenario breaks what they presume.

    One line for each set of attacks that have the same obstacle in the same scenarios.
    """
    idle: _Found = {}
    broken: _Found = {}
    for scenario in scenarios:
        for label, info in scenario.attacks.items():
            if info.not_applicable:
                idle.setdefault((info.not_applicable, label), {})[scenario.number] = ""
                continue
            for assumption, found in info.broken.items():
                broken.setdefault((assumption, label), {})[scenario.number] = found
    lines = []
    for head, obstacles in (("not applicable", idle), ("broken assumptions", broken)):
        if obstacles:
            lines += [head, *aligned(_alike(obstacles, len(scenarios))), ""]
    return lines


def _federation(scenarios: Sequence["Scenario"]) -> list[str]:
    """Return how clients train, divide the data and defend themselves, and what came of it.

    One line for each set of scenarios with the same.
    """
    lines = []
    for head, tell in (
        ("training", _training),
        ("partition", _partition),
        ("defences", _defences),
        ("adapted attacks", _adaptations),
        ("privacy", _privacy),
        ("drop-outs", _dropouts),
    ):
        found: dict[str, list[int]] = {}
        for scenario in scenarios:
            for text in tell(scenario):
                found.setdefault(text, []).append(scenario.number)
        if found and list(found) != [NONE]:
            told = [[text, _where(where, len(scenarios))] for text, where in found.items()]
            lines += [head, *aligned(told), ""]
    return lines


def _training(scenario: "Scenario") -> list[str]:
    told = scenario.parameters.get
    algorithm = told("federation.algorithm")
    if algorithm is None:
        return []
    words = [str(algorithm)]
    for key in ("local_steps", "local_epochs", "momentum", "weight_decay", "proximal"):
        value = told(f"federation.{key}")
        if value:
            words.append(f"{key.replace('_', ' ')} {value:g}")
    optimizer = told("federation.server.optimizer", "sgd")
    rate = told("federation.server.learning_rate", 1)
    if optimizer != "sgd" or rate != 1:
        words.append(f"server {optimizer}, rate {rate:g}")
    clients = number(scenario.members, "client")
    population = told("federation.population")
    words.append(f"{clients} of {population}" if population else clients)
    return [", ".join(words)]


def _partition(scenario: "Scenario") -> list[str]:
    section = {
        key.removeprefix("partition."): value
        for key, value in scenario.parameters.items()
        if key.startswith("partition.") and value is not None
    }
    kind = section.pop("kind", None)
    return [] if kind is None else [named(str(kind), section)]


def _defences(scenario: "Scenario") -> list[str]:
    if DEFENSES in scenario.swept:
        return []  # a column of the scenarios
    return [defense_label(scenario.parameters.get(DEFENSES))]


def _adaptations(scenario: "Scenario") -> list[str]:
    attacks = scenario.attacks.values()
    said = dict.fromkeys(sentence for info in attacks for sentence in info.adaptation)
    return ["; ".join(said)] if said else []


def _privacy(scenario: "Scenario") -> list[str]:
    told = dict(scenario.privacy)
    epsilon, delta, note = (told.pop(key, None) for key in ("epsilon", "delta", "note"))
    if epsilon is None:
        return []
    text = f"epsilon {_rounded(epsilon)}" + (f" at delta {delta:g}" if delta else "")
    rest = ", ".join(f"{key.replace('_', ' ')} {_rounded(value)}" for key, value in told.items())
    text += f" ({rest})" if rest else ""
    return [f"{text}: {note}" if note else text]


def _dropouts(scenario: "Scenario") -> list[str]:
    if not scenario.has("updates/arrived"):
        return []
    arrived = scenario.array("updates/arrived")
    lost = int((arrived == 0).sum())
    if not lost and not scenario.parameters.get("federation.dropout"):
        return []
    return [f"{lost:,} of {arrived.size:,} updates did not arrive"]


def _rounded(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _alike(obstacles: _Found, scenarios: int) -> list[list[str]]:
    groups: dict[tuple[str, tuple[tuple[int, str], ...]], list[str]] = {}
    for (obstacle, label), where in obstacles.items():
        groups.setdefault((obstacle, tuple(where.items())), []).append(label)
    lines = []
    for (obstacle, places), labels in groups.items():
        found = list(dict.fromkeys(text for _, text in places if text))
        says = found[0] if len(found) == 1 else f"{found[0]} ... {found[-1]}" if found else ""
        indices = [index for index, _ in places]
        lines.append([obstacle, ", ".join(labels), _where(indices, scenarios), says])
    return lines


def _where(indices: Sequence[int], scenarios: int) -> str:
    """Return which scenarios: ``in all scenarios``, ``in scenarios 0, 4-7``."""
    if len(indices) == scenarios:
        return "in all scenarios"
    starts = [at for at in indices if at - 1 not in indices]
    ends = [at for at in indices if at + 1 not in indices]
    runs = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return f"in scenario{'' if len(indices) == 1 else 's'} {', '.join(runs)}"


def _scenarios(scenarios: Sequence["Scenario"]) -> list[str]:
    keys = list(dict.fromkeys(key for scenario in scenarios for key in scenario.swept))
    head = ["#", *keys, "clients", "classes", "rounds"]
    body = [
        [
            str(scenario.number),
            *(_value(key, scenario.swept.get(key)) for key in keys),
            str(scenario.members),
            str(scenario.classes),
            f"{scenario.committed}/{scenario.rounds}",
        ]
        for scenario in scenarios
    ]
    return ["scenarios", *aligned([head, *body])]


def _value(key: str, value: Any) -> str:
    if key == DEFENSES:
        return defense_label(value)
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)


def aligned(lines: Iterable[Sequence[str]]) -> list[str]:
    """Return lines of cells as indented columns."""
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def clipped_entries(results: "Results") -> str:
    """Return in which scenarios secure sums clipped updates, and how much; empty where none did."""
    found = []
    for scenario in results.scenarios:
        if scenario.has("updates/clipped"):
            counts = scenario.array("updates/clipped")
            total = int(counts[counts > 0].sum())
            if total:
                found.append(f"{total:,} in scenario {scenario.number}")
    if not found:
        return ""
    return (
        f"secure sums clipped entries of updates ({'; '.join(found)}): set modulus_bits to 64, or "
        "fewer fraction_bits"
    )
