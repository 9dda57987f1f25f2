"""What to run: an experiment file, or what an earlier start of it has left."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from testbed.data.dataset import kind_of
from testbed.errors import UserError
from testbed.experiment import ResolvedExperiment, parse_experiment
from testbed.results.opening import PARTIAL
from testbed.results.output import partial_path
from testbed.results.reader import Results, open_results

# How the run is called, where the data lie and how the file is written may change from start to
# start; nothing else.
MOVABLE = (
    "title",
    "data.root",
    "adversary.auxiliary_root",
    "compute.receive_buffers",
    "results.commit_seconds",
    "results.checkpoint_seconds",
    "results.mode",
)


@dataclass(frozen=True)
class Begun:
    """A run as its results file knows it.

    Attributes
    ----------
    run
        What tells it from other runs, also of the same experiment.
    experiment
        As YAML, as it was begun with.
    share
        (i, n): which scenarios are in the file.
    complete
        Whether nothing is left to be done.
    """

    run: str
    experiment: str
    share: tuple[int, int]
    complete: bool


def new_run(resolved: ResolvedExperiment, share: tuple[int, int]) -> Begun:
    """Return a run that begins now."""
    return Begun(uuid.uuid4().hex, resolved.to_yaml(), share, complete=False)


def find_begun(path: Path) -> Begun | None:
    """Return the run that a results file belongs to, by its final name; None if there is none.

    Raises
    ------
    UserError
        The file cannot be read, was written by a version that could not resume, or is incomplete
        and has the name of a complete one.
    """
    partial = partial_path(path)
    found = partial if partial.is_file() else path
    if not found.is_file():
        return None
    with open_results(found) as results:
        told = results.attributes
        first, _, last = str(told.get("share", "0/1")).partition("/")
        try:
            share = (int(first), int(last))
            run, experiment = str(told["run"]), str(told["experiment"])
        except (KeyError, ValueError):
            raise UserError(
                f"{found}: the file does not say which run it is of: it was written by a version "
                "of this program that could not resume"
            ) from None
        if not results.complete and not results.path.name.endswith(PARTIAL):
            raise _misnamed(path, results)
        return Begun(run, experiment, share, results.complete)


def _misnamed(path: Path, results: Results) -> UserError:
    """Return the error of an incomplete file with the name of a complete one."""
    done = sum(scenario.committed for scenario in results.scenarios)
    rounds = sum(scenario.rounds for scenario in results.scenarios)
    if "replayed_from" in results.attributes:
        return UserError(
            f"{path}: a replay of an unfinished run ({done} of {rounds} rounds), which cannot go "
            "on: resume the run itself, and replay that again"
        )
    found = f"incomplete ({done} of {rounds} rounds), but it has the name of a complete file"
    real = path.resolve()
    if real.name.endswith(PARTIAL):
        real = real.with_name(real.name.removesuffix(PARTIAL))
        return UserError(f"{path}: {found}: it is a link: resume {real}")
    return UserError(
        f"{path}: {found}: rename it {path.name}{PARTIAL}, and its checkpoint "
        f"{path.name}.checkpoint if there is one, and resume"
    )


def find_same(path: Path, wanted: ResolvedExperiment, share: tuple[int, int]) -> Begun | None:
    """Return the run that a results file belongs to, which is that of an experiment; or None.

    Raises
    ------
    UserError
        It is the run of another experiment, or of another share; or see `find_begun`.
    """
    begun = find_begun(path)
    if begun is None:
        return None
    check_same(path, begun.experiment, wanted)
    if begun.share != share:
        found, expected = ("{}/{}".format(*pair) for pair in (begun.share, share))
        raise UserError(
            f"{path}: the file has the share {found} of the run, expected {expected}: choose "
            "another name"
        )
    return begun


def check_roots(resolved: ResolvedExperiment, overrides: Sequence[str]) -> None:
    """Raise `UserError` where data that a run was begun with are no longer there.

    Parameters
    ----------
    resolved
        The experiment as the results file has it, with the overrides of this start.
    overrides
        What they name is left to who reads the data.
    """
    given = {override.partition("=")[0] for override in overrides}
    for key, root in resolved.roots():
        if key in given or kind_of(root):
            continue
        where = "" if root.is_absolute() else f", from the current folder {Path.cwd()}"
        raise UserError(
            f"{key}: the run was begun with {root}, which does not exist{where}: give its place as "
            f"{key}=DIR behind the file's name"
        )


def check_same(path: Path, begun: str, wanted: ResolvedExperiment) -> None:
    """Raise where an experiment is not the one that a run was begun with.

    Parameters
    ----------
    path
        Of the results file.
    begun
        The experiment as the file has it, YAML.
    wanted
        What is to be gone on with.
    """
    difference = first_difference(parse_experiment(begun, name=str(path)), wanted)
    if difference:
        raise UserError(
            f"{path}: the run was begun with another experiment: {difference}; go on with the "
            "same one, or choose another name"
        )


def first_difference(
    before: ResolvedExperiment, after: ResolvedExperiment, *, now: str = "now"
) -> str:
    """Return what tells an experiment ``there`` from another one ``now``; empty if nothing.

    Parameters
    ----------
    before, after
        The two.
    now
        What the second is called.
    """
    flat = [_without(_flat(yaml.safe_load(one.to_yaml()))) for one in (before, after)]
    return next(_differences("", flat[0], flat[1], now), "")


def _without(flat: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flat.items() if key not in MOVABLE}


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix.removesuffix("."): content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        # The keys of a sweep are dotted themselves.
        flat |= _flat(value, f"{prefix}{key}.")
    return flat


def _differences(
    prefix: str, before: Mapping[str, Any], after: Mapping[str, Any], now: str
) -> Iterator[str]:
    """Yield where two flat mappings differ, as phrases."""
    for key in dict.fromkeys([*before, *after]):
        name = prefix + key
        if key not in after:
            yield f"{name} is {before[key]!r} there, and absent {now}"
        elif key not in before:
            yield f"{name} is absent there, and {after[key]!r} {now}"
        elif before[key] != after[key]:
            pair = _labelled(before[key]), _labelled(after[key])
            if pair[0] is None or pair[1] is None:
                yield f"{name} is {before[key]!r} there, and {after[key]!r} {now}"
            else:
                yield from _differences_of_lists(name, pair[0], pair[1], now)


def _differences_of_lists(
    name: str, before: Mapping[str, Any], after: Mapping[str, Any], now: str
) -> Iterator[str]:
    gone = [key for key in before if key not in after]
    new = [key for key in after if key not in before]
    if gone or new:
        parts = [(gone, "only there"), (new, f"only {now}")]
        yield f"{name}: " + "; ".join(f"{', '.join(keys)} {side}" for keys, side in parts if keys)
        return
    for key, item in before.items():
        yield from _differences(f"{name}.{key}.", _flat(item), _flat(after[key]), now)
    if list(before) != list(after):
        yield f"the order of {name} is {', '.join(before)} there, and {', '.join(after)} {now}"


def _labelled(value: Any) -> dict[str, Any] | None:
    """Return the attacks or defences of a list by label; None where it is something else."""
    if not isinstance(value, list):
        return None
    found: dict[str, Any] = {}
    for item in value:
        if not isinstance(item, dict) or "name" not in item:
            return None
        label = str(item.get("label", item["name"]))
        while label in found:  # one that stands there twice
            label += "'"
        found[label] = item
    return found
