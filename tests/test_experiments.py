"""The experiment files: all are valid, and what they describe runs, on a smaller scale."""

import copy
from collections.abc import Iterator
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
    "posterior_regression": {"simulations": 40, "forward_batches": 4, "steps": 4},
}


def read(name: str, profile: str | None = "reduced") -> ResolvedExperiment:
    path = next(path for path in FILES if path.stem == name)
    return load_experiment(path, profile=profile)


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
        resolved = load_experiment(path, profile=profile)
        arguments = [] if profile is None else ["--profile", profile]
        assert main(["check", str(path), *arguments]) == 0
        assert resolved.experiment.title in capsys.readouterr().out
        # None that repeats another one.
        swept = [sweeps.describe(point.swept) for point in resolved.points]
        assert len(set(swept)) == len(swept)


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
    path = next(path for path in FILES if path.stem == name)
    content = yaml.safe_load(path.read_text())
    content = sweeps.override(content, content.pop("profiles")["reduced"], name)
    content["data"] = {"name": "digits", "auxiliary_per_class": 5}
    for key, most in SMALL.items():
        section, _, field = key.partition(".")
        if field in content.get(section, {}):
            content[section][field] = min(content[section][field], most)
    content["attacks"] = [quick(attack) for attack in content["attacks"]]
    for group in groups(content["sweep"]):
        for key, values in group.items():
            small = SMALL.get(key)
            group[key] = values if small is None else [min(value, small) for value in values]
    # What differed in size alone is now the same; every defence stays.
    for key in [key for key in SMALL if key in content["sweep"]]:
        content["sweep"][key] = sorted(set(content["sweep"][key]))
    if "labels.distribution" in content["sweep"]:
        content["sweep"]["labels.distribution"] = ["unbalanced"]
    return content


def quick(attack: object) -> dict[str, Any]:
    section = {"name": attack} if isinstance(attack, str) else dict(attack)  # type: ignore[call-overload]
    return {**section, **QUICK.get(section["name"], {})}


def groups(sweep: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the parts of a sweep whose keys hold lists, to be changed in place."""
    if "zip" in sweep:
        yield sweep["zip"]
    product = {key: values for key, values in sweep.items() if key != "zip"}
    yield product
    sweep |= product


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
    assert set(frame["attack"]) >= {attack["name"] for attack in map(labelled, content["attacks"])}
    applicable = frame[frame["applicable"]]
    score = np.where(
        applicable["answers"] == "presence", applicable["presence_f1"], applicable["asr"]
    )
    finite = np.isfinite(score)
    assert finite.all(), applicable[~finite][["scenario", "attack"]].drop_duplicates()


def labelled(attack: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({**attack, "name": attack.get("label", attack["name"])})
