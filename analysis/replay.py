"""Runs attacks again on the observations of a results file, into a results file of the same kind.

NumPy only: no model is run. What an attack derived from the model is taken from the file.
"""

import json
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from analysis.calibrations import stored_calibration
from analysis.choice import Replayed, replayed_attacks
from analysis.replay_header import replay_header
from testbed.errors import UserError

if TYPE_CHECKING:
    import h5py

    from analysis.stored import StoredScenario
    from testbed.attacks import Attack, Calibration, Observations
    from testbed.results.reader import Results
    from testbed.results.writer import ResultsWriter

# Of a block of rounds, all arrays together; a single round may be larger.
_BLOCK_BYTES = 1 << 27


def replay(
    path: str | Path,
    output: str | Path,
    attacks: Sequence[str | Mapping[str, Any]],
    *,
    only: bool = False,
    overwrite: bool = False,
) -> Path:
    """Run attacks on the stored observations, and write their answers beside the stored ones.

    With the same observations and calibration, answers are those of the run, to the bit.

    Parameters
    ----------
    path
        A results file, complete or not; committed rounds are used.
    output
        The new file: everything of the old one but for weight gradients, whole updates and
        BatchNorm's statistics, and the new answers.
    attacks
        Names or import paths, or mappings as in an experiment file: ``name``, ``label``, options;
        beside these ``calibration``, the label of the stored attack whose calibration to use. By
        default that is one of the same name and the same options, as far as they decide on it.
        An attack that knows the gradients alone makes its own.
    only
        Whether the stored attacks are left out of the new file.
    overwrite
        Whether the new file may replace one that exists.

    Returns
    -------
    Path
        Of the new file.

    Raises
    ------
    UserError
        A file cannot be read or written, an attack or its options are unknown, a label exists
        already, or the file lacks an observation or a calibration.
    """
    from analysis.stored import StoredScenario
    from analysis.threads import limited
    from testbed.results.opening import open_file
    from testbed.results.reader import open_results
    from testbed.results.writer import ResultsWriter, partial_path

    chosen, output = replayed_attacks(attacks), Path(output)
    with open_results(path) as results, open_file(results.path) as file:
        if results.path.resolve() in (output.resolve(), partial_path(output).resolve()):
            raise UserError(f"{output}: this is the file to replay: choose another name")
        scenarios = [
            _Scenario(StoredScenario(scenario, file), str(results.path), chosen, only=only)
            for scenario in results.scenarios
        ]
        writer = ResultsWriter(
            output,
            attributes=_attributes(results, file, chosen),
            ranks=results.ranks,
            scenarios=[scenario.header for scenario in scenarios],
            overwrite=overwrite,
        )
        try:
            with limited(_threads(str(results.attributes.get("experiment", "")))):
                for scenario in scenarios:
                    scenario.write(writer)
            writer.complete()
        except BaseException:
            writer.close()
            # Unlike a run's, these rounds are made again in no time.
            partial_path(output).unlink(missing_ok=True)
            raise
    return output


class _Scenario:
    """A scenario to copy, and the attacks to run in it."""

    def __init__(
        self, stored: "StoredScenario", path: str, chosen: Sequence[Replayed], *, only: bool
    ) -> None:
        from testbed.attacks.assumptions import not_applicable

        self._stored = stored
        self._where = f"{path}: scenario {stored.scenario.number}"
        kept = () if only else tuple(stored.scenario.attacks)
        for one in chosen:
            if one.label in kept:
                raise UserError(
                    f"{path} holds answers of an attack {one.label!r} already: give the new one "
                    "another name with --label, or leave all stored ones out with --only"
                )
        for label in kept:
            path = f"attacks/{label}/{stored.scenario.attacks[label].answers}"
            if path not in stored.arrays:
                raise stored.scenario.damaged(f"{path} is missing")
        self._idle = {one.label: not_applicable(one.attack, stored.facts) for one in chosen}
        self._active = [one for one in chosen if not self._idle[one.label]]
        for one in self._active:
            self._require_observations(one)
        # Per label: whose calibration to use, or None for one to be made.
        self._sources = {
            one.label: stored_calibration(one, stored, self._where) for one in self._active
        }
        self._copied = stored.copied(kept)
        self.header = replay_header(stored, chosen, kept, self._copied, self._idle)

    def write(self, writer: "ResultsWriter") -> None:
        """Append all committed rounds."""
        scenario = self._stored.scenario
        used = {"updates/finite", "truth/counts", "observations/row_sums", *self._observed()}
        for one in self._active:
            source = self._sources[one.label]
            if source is not None:
                used |= {f"attacks/{source}/calibration/{name}" for name in one.attack.arrays()}
        read = sorted(used | self._copied.keys())
        for name in read:
            if name not in self._stored.arrays:
                raise scenario.damaged(f"{name} is missing")
        step = max(1, _BLOCK_BYTES // self._stored.bytes_per_round(read))
        for start in range(0, scenario.committed, step):
            stop = min(start + step, scenario.committed)
            block = {name: scenario.array(name, start, stop) for name in read}
            for number in range(start, stop):
                rows = {name: values[number - start] for name, values in block.items()}
                copied: dict[str, Any] = {name: rows[name] for name in self._copied}
                writer.append(scenario.index, number, copied | self._run(number, rows))

    def _run(self, number: int, rows: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """Return what the attacks add to a round; nothing where no update was attacked."""
        attacked: NDArray[np.bool_] = np.all(rows["truth/counts"] >= 0, axis=-1)
        if "observations/labels" in rows:
            attacked &= rows["observations/labels"] >= 0
        elif rows["updates/finite"].shape == attacked.shape:  # version 1.0
            attacked &= rows["updates/finite"] == 1
        else:
            raise self._stored.scenario.damaged("observations/labels is missing")
        seen, steps = np.flatnonzero(attacked), self._steps(rows)
        if (steps[seen] < 1).any():
            raise self._stored.scenario.damaged("an update of less than one local step")
        added: dict[str, Any] = {}
        # A calibration serves all updates of equally many local steps.
        for count in np.unique(steps[seen]):
            group = seen[steps[seen] == count]
            whole = self._observations(rows, group, int(count))
            for one in self._active:
                started = time.perf_counter()
                # Numbers of a file may be anything; what comes of them is checked.
                with np.errstate(all="ignore"):
                    found = self._answer(one, number, rows, whole)
                for path, (values, each) in found.items():
                    if each:
                        kept = added.get(path)
                        added[path] = _spread(values, group, len(attacked), kept)
                    else:
                        added[path] = values[0]
                timing = f"timings/attacks/{one.label}"
                added[timing] = added.get(timing, 0.0) + time.perf_counter() - started
        return added

    def _answer(
        self,
        one: Replayed,
        number: int,
        rows: Mapping[str, NDArray[Any]],
        whole: "Observations",
    ) -> dict[str, tuple[NDArray[Any], bool]]:
        """Return answers and calibration of a group by path, and whether they have clients."""
        from testbed.attacks.checks import check_calibration
        from testbed.attacks.inference import infer_in_chunks

        label, attack, source = one.label, one.attack, self._sources[one.label]
        group, observations = whole.keys, whole.restricted(attack)
        each = {name for name, (axes, _) in attack.arrays().items() if axes[:1] == ("client",)}
        if source is None:
            calibration = self._calibrate(one, number, observations)
        else:
            calibration = {}
            for name in attack.arrays():
                path = f"attacks/{source}/calibration/{name}"
                if name in each:
                    calibration[name] = rows[path][group]
                elif self._stored.arrays[path].axes[1:2] == ("client",):
                    # Where steps vary, each update has a copy of what is one for its group.
                    calibration[name] = rows[path][group[:1]]
                else:
                    calibration[name] = rows[path][None]
        lengths = {**self._stored.lengths, "client": len(group)}
        check_calibration(label, attack, calibration, lengths)
        answers = infer_in_chunks(label, attack, observations, calibration)
        found = {f"attacks/{label}/{attack.answers.value}": (answers, True)}
        for name, values in calibration.items():
            path = f"attacks/{label}/calibration/{name}"
            if self._stored.varying and name not in each:
                values = np.broadcast_to(values, (len(group), *values.shape[1:]))
            found[path] = (values, self._stored.varying or name in each)
        return found

    def _steps(self, rows: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """Return the local steps of each update, [client]."""
        clients = len(rows["truth/counts"])
        if "updates/local_steps" in rows and len(rows["updates/local_steps"]) == clients:
            return rows["updates/local_steps"].astype(np.int64)
        return np.full(clients, self._stored.facts.local_steps)

    def _calibrate(self, one: Replayed, number: int, observations: "Observations") -> "Calibration":
        """Make a calibration that takes no model, with the seed that a run would have used."""
        from testbed.attacks.offline import ArrayAdversary, NotGivenError
        from testbed.seeds import Purpose, seed64

        scenario, steps = self._stored.scenario, observations.local_steps
        key = (scenario.draws, number, zlib.crc32(one.label.encode()))
        adversary = ArrayAdversary(
            one.attack.knowledge,
            scenario.classes,
            batch_size=max(1, round(float(np.median(observations.labels)) / steps)),
            local_steps=steps,
            learning_rate=float(scenario.parameters.get("federation.learning_rate", 0.1)),
            seed=seed64(int(scenario.parameters.get("seed", 0)), Purpose.ATTACK, *key),
        )
        try:
            return {
                **one.attack.calibrate(adversary),
                **one.attack.calibrate_updates(adversary, observations),
            }
        except NotGivenError as error:
            raise UserError(f"{self._where}: attack {one.label!r}: {error}") from None

    def _observations(
        self, rows: Mapping[str, NDArray[Any]], seen: NDArray[np.int64], steps: int
    ) -> "Observations":
        from testbed.attacks import Observations

        def part(name: str) -> NDArray[Any] | None:
            return rows[name][seen] if name in rows else None

        labels = part("observations/labels")
        if labels is None:  # version 1.0, in which the server always knew
            labels = np.full(len(seen), self._stored.facts.labels)
        observations = Observations(
            row_sums=rows["observations/row_sums"][seen],
            bias_gradient=part("observations/bias_gradient"),
            weight_gradient=part("observations/weight_gradient"),
            labels=labels.astype(np.int64),
            keys=seen,
            local_steps=steps,
            statistics=part("observations/statistics"),
            update=part("observations/update"),
            posterior=part("truth/posterior"),
            norm=part("observations/norm"),
        )
        for array in vars(observations).values():
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
        return observations

    def _observed(self) -> set[str]:
        """Return the paths of what the attacks look at, as far as there is such a thing."""
        names = {"truth/posterior", "updates/local_steps"}
        names |= {f"observations/{name}" for name in ("row_sums", "labels", "norm")}
        names |= {path for one in self._active for path in _observed_paths(one.attack)}
        return names & self._stored.arrays.keys()

    def _require_observations(self, one: Replayed) -> None:
        for path, kept_by in _observed_paths(one.attack).items():
            if path not in self._stored.arrays:
                raise UserError(
                    f"{self._where} has no {path}, which the attack {one.label!r} looks at: a run "
                    f"with results.observations={kept_by} keeps it"
                )


def _observed_paths(attack: "Attack") -> dict[str, str]:
    """Return the arrays that an attack looks at, and which setting keeps those not always kept."""
    from testbed.attacks import Observed

    paths = {
        Observed.BIAS_GRADIENT: ("bias_gradient", "summary"),
        Observed.WEIGHT_GRADIENT: ("weight_gradient", "last_layer"),
        Observed.STATISTICS: ("statistics", "last_layer"),
        Observed.UPDATE: ("update", "full"),
    }
    shown = [paths[part] for part in Observed if part in attack.observes and part in paths]
    return {f"observations/{name}": kept_by for name, kept_by in shown}


def _spread(
    values: NDArray[Any], seen: NDArray[np.int64], clients: int, kept: NDArray[Any] | None
) -> NDArray[Any]:
    """Return values of the attacked updates as those of all clients, as the server does.

    ``kept`` holds those of other updates of the round, if there are any.
    """
    if values.dtype == np.bool_:
        values = values.astype(np.int8)
    if kept is None:
        fill = {"f": np.nan, "i": -1, "u": 0}[values.dtype.kind]
        kept = np.full((clients, *values.shape[1:]), fill, values.dtype)
    kept[seen] = values
    return kept


def _attributes(
    results: "Results", file: "h5py.File", chosen: Sequence[Replayed]
) -> dict[str, str]:
    """Return the run's attributes, and the provenance of this replay and those before it."""
    from testbed.results import checked
    from testbed.results.encodings import reading
    from testbed.results.provenance import provenance

    with reading(file):
        before = checked.parsed(file.attrs, "replays", list, "[]")
        checked.parsed(file.attrs, "dependencies", dict, "{}")  # which the writer takes apart

    now = provenance(results.title, "", "")
    kept = ("created", "command", "software_version", "git_commit", "dependencies")
    this = {"from": results.path.name, "attacks": [one.label for one in chosen]}
    return {
        **results.attributes,
        "replayed_from": results.path.name,
        "replays": json.dumps([*before, this | {name: now[name] for name in kept}]),
    }


def _threads(experiment: str) -> int:
    """Return how many threads the run computed with, on which the last bits depend."""
    from testbed.sweep import parse_yaml

    try:
        return int(parse_yaml(experiment, "experiment")["compute"]["threads"])
    except (UserError, TypeError, KeyError, ValueError):
        return 1
