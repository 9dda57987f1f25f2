"""The experiment files: all are valid, and what they describe runs, on a smaller scale."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import analysis
from testbed import sweep as sweeps
from testbed.__main__ import main
from testbed.defenses import defenses
from testbed.experiment import ResolvedExperiment, load_experiment
from testbed.run import RunOptions, run
from testbed.transport.local import LocalTransport

FILES = sorted((Path(__file__).parents[1] / "launch" / "experiments").glob("*.yaml"))
BY_NAME = {path.stem: path for path in FILES}
REDUCED = [
    *("svhn_batch_size", "celeba_batch_size", "training_mnist", "architectures_mnist"),
    *("noise_mnist", "compression_mnist", "dp_mnist", "federated_mnist", "local_steps_mnist"),
    *("occurrences_mnist", "secure_aggregation_mnist", "defences_mnist", "partitions_mnist"),
    "tradeoff_mnist",
]
# At most so much of each, where a file says something of it.
SMALL = {
    "pretraining.steps": 2,
    "federation.rounds": 2,
    "federation.clients": 3,
    "federation.population": 4,
    "federation.batch_size": 8,
    "federation.local_steps": 2,
    "federation.attack_every": 1,
    "federation.evaluate_every": 1,
}
# Attacks that learn, with next to nothing to learn from.
QUICK = {
    "lmmse": {"simulations": 40},
    "ldia": {"shadows": 20, "epochs": 1},
    "posterior_regression": {"simulations": 40, "forward_batches": 10, "steps": 4},
}


@cache
def read(name: str, profile: str | None = None) -> ResolvedExperiment:
    return load_experiment(BY_NAME[name], profile=profile)


def names(resolved: ResolvedExperiment) -> set[str]:
    """Return the names of all defences of an experiment."""
    return {defense.name for point in resolved.points for defense in point.scenario.defenses}


def test_there_are_files_and_all_that_have_a_reduced_profile_are_named_here() -> None:
    profiled = {path.stem for path in FILES if "profiles" in yaml.safe_load(path.read_text())}
    assert set(REDUCED) <= profiled


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_valid_in_full_and_in_every_profile(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(path.read_text())
    for profile in (None, *content.get("profiles", {})):
        swept = [sweeps.describe(point.swept) for point in read(path.stem, profile).points]
        assert len(set(swept)) == len(swept), "a scenario stands there twice"
    arguments = ["--profile", "reduced"] if "profiles" in content else []
    assert main(["check", str(path), *arguments]) == 0
    assert content["title"] in capsys.readouterr().out


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_says_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    if path.stem != "quickstart":
        assert f"python -m testbed run launch/experiments/{path.name} data.root=DIR -o " in text


@pytest.mark.parametrize("name", REDUCED)
def test_the_reduced_profile_asks_for_less(name: str) -> None:
    def updates(profile: str | None) -> int:
        sections = [point.scenario.federation for point in read(name, profile).points]
        return sum(section.rounds * section.clients for section in sections)

    assert 2 * updates("reduced") < updates(None)


@pytest.mark.parametrize("name", ["defences_mnist", "tradeoff_mnist"])
@pytest.mark.parametrize("profile", [None, "reduced"])
def test_every_defence_of_the_project_is_compared(name: str, profile: str | None) -> None:
    # In training, Soteria would take days.
    left_out = {"soteria"} if name == "tradeoff_mnist" else set()
    assert names(read(name, profile)) == defenses().keys() - left_out


def test_training_attacks_and_evaluates_its_last_round() -> None:
    for name in ("training_mnist", "federated_mnist", "partitions_mnist", "tradeoff_mnist"):
        for profile in (None, "reduced"):
            for point in read(name, profile).points:
                federation = point.scenario.federation
                assert (federation.rounds - 1) % federation.attack_every == 0
                assert (federation.rounds - 1) % federation.evaluate_every == 0


def shrunk(name: str) -> dict[str, Any]:
    """Return an experiment of the kind of a file's, that runs within seconds on the digits."""
    content = yaml.safe_load(BY_NAME[name].read_text())
    content = sweeps.override(content, content.pop("profiles")["reduced"], name)
    content["data"] = {"name": "digits", "auxiliary_per_class": 5}
    for key, most in SMALL.items():
        section, _, field = key.partition(".")
        if field in content.get(section, {}):
            content[section][field] = min(content[section][field], most)
    if content["federation"].get("fresh_model"):
        content["federation"]["rounds"] = 1
    content["attacks"] = [quick(attack) for attack in content["attacks"]]
    sweep = content["sweep"]
    for group in groups(sweep):
        group |= {key: small(key, values) for key, values in group.items() if key != "zip"}
    # What differed in size alone is now the same.
    sweep |= {key: sorted(set(sweep[key])) for key in SMALL if key in sweep}
    if "labels.distribution" in sweep:
        sweep["labels.distribution"] = ["unbalanced"]
    if name == "defences_mnist":
        sweep["pretraining.steps"] = [2]
    elif "defenses" in sweep:
        sweep["defenses"] = sweep["defenses"][::6]
    return content


def small(key: str, values: list[Any]) -> list[Any]:
    return [min(value, SMALL[key]) for value in values] if key in SMALL else values


def quick(attack: object) -> dict[str, Any]:
    section = {"name": attack} if isinstance(attack, str) else dict(attack)  # type: ignore[call-overload]
    return {**section, **QUICK.get(section["name"], {})}


def groups(sweep: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the parts of a sweep whose keys hold lists, to be changed in place."""
    zipped = sweep.get("zip", [])
    yield from zipped if isinstance(zipped, list) else [zipped]
    yield sweep


@pytest.mark.parametrize("name", REDUCED)
def test_a_smaller_version_runs_and_every_attack_answers(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    content = shrunk(name)
    if name == "architectures_mnist":  # LeNet does not take images as small as the digits
        root = request.getfixturevalue("data_root") / "mnist"
        content["data"] |= {"name": "mnist", "root": str(root), "limit": 1000}
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(content))
    options = RunOptions(tmp_path / "e.yaml", (), tmp_path / "r.h5", False, "none")
    assert run(LocalTransport(), options) == 0
    frame = analysis.load(tmp_path / "r.h5")
    resolved = load_experiment(tmp_path / "e.yaml")
    assert frame["scenario"].nunique() == len(resolved.points)
    labels = {attack.get("label", attack["name"]) for attack in content["attacks"]}
    assert set(frame["attack"]) >= labels
    applicable = frame[frame["applicable"]]
    score = np.where(
        applicable["answers"] == "presence", applicable["presence_f1"], applicable["asr"]
    )
    finite = np.isfinite(score)
    assert finite.all(), applicable[~finite][["scenario", "attack"]].drop_duplicates()
