"""What to run: an experiment file, or what an earlier start of it has left."""

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from testbed.errors import UserError
from testbed.experiment import ResolvedExperiment, parse_experiment
from testbed.results.output import partial_path
from testbed.results.reader import open_results

# Where the data lie and how the file is written may change from start to start; nothing else.
MOVABLE = (
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
        The file cannot be read, or was written by a version that could not resume.
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
        return Begun(run, experiment, share, results.complete)


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
    before = _flat(yaml.safe_load(parse_experiment(begun, name=str(path)).to_yaml()))
    after = _flat(yaml.safe_load(wanted.to_yaml()))
    for key in [*before, *after]:
        found, expected = before.get(key), after.get(key)
        if key not in MOVABLE and found != expected:
            raise UserError(
                f"{path}: the run was begun with another experiment: {key} is {found!r} there, and "
                f"{expected!r} now; go on with the same one, or choose another name"
            )


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict) or not content:
        return {prefix.removesuffix("."): content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        # The keys of a sweep are dotted themselves.
        flat |= _flat(value, f"{prefix}{key}.")
    return flat
