"""Wrong training, partitions and defences: one clear message and status 2, before any round."""

from pathlib import Path
from typing import Any

import pytest
from launching import run_testbed, write_experiment

from testbed.__main__ import main

NATURAL = "labels.distribution=natural"
FEDAVG = "federation.algorithm=fedavg"
CASES: dict[str, tuple[list[str], list[str]]] = {
    "alpha is 0": (
        ["partition={kind: dirichlet, alpha: 0}", NATURAL],
        ["partition.alpha: found 0: ", "greater than 0"],
    ),
    "alpha is negative": (
        ["partition={kind: dirichlet_classes, alpha: -1.5}", NATURAL],
        ["partition.alpha: found -1.5: ", "greater than 0"],
    ),
    "alpha is infinite": (
        ["partition={kind: dirichlet, alpha: .inf}", NATURAL],
        ["partition.alpha: found inf: ", "finite"],
    ),
    "alpha is missing": (
        ["partition.kind=dirichlet", NATURAL],
        ["partition.alpha is missing"],
    ),
    "alpha of a partition without": (
        ["partition={kind: iid, alpha: 1}", NATURAL],
        ["partition.alpha belongs to dirichlet", "'iid'"],
    ),
    "shards of more classes than there are": (
        ["partition={kind: shards, classes_per_client: 11}", NATURAL],
        ["partition.classes_per_client", "11", "10"],
    ),
    "theta is above 1": (
        ["defenses=[{name: top_k, theta: 1.5}]"],
        ["defenses.0", "'top_k'", "'theta'", "found 1.5"],
    ),
    "theta is 1": (
        ["defenses=[{name: dgc, theta: 1}]"],
        ["defenses.0", "'dgc'", "'theta'", "found 1"],
    ),
    "theta is negative": (
        ["defenses=[{name: random_k, theta: -0.1}]"],
        ["defenses.0", "'theta'", "found -0.1"],
    ),
    "theta is missing": (
        ["defenses=[top_k]"],
        ["defenses.0", "'top_k'", "the option 'theta' is missing"],
    ),
    "a knob that there is not": (
        ["defenses=[{name: noise, sigma: 1, distributions: laplace}]"],
        ["defenses.0", "'noise'", "no option 'distributions'", "did you mean 'distribution'"],
    ),
    "an unknown defence": (
        ["defenses=[top_kk]"],
        ["defenses.0", "unknown defence 'top_kk'", "did you mean 'top_k'"],
    ),
    "a wrong order": (
        ["defenses=[{name: top_k, theta: 0.5}, {name: clip, bound: 1}]"],
        ["defenses: 'clip' (clip) stands after 'top_k' (sparsify)", "the order is: labels, "],
    ),
    "two quantisers": (
        ["defenses=[{name: qsgd, levels: 4}, float16]"],
        ["defenses: qsgd and float16 do not go together"],
    ),
    "DP-SGD twice": (
        [
            "defenses=[{name: dp_sgd, bound: 1, noise_multiplier: 1},"
            " {name: dp_sgd, bound: 1, noise_multiplier: 1}]"
        ],
        ["defenses: dp_sgd and dp_sgd do not go together"],
    ),
    "DP-SGD with BatchNorm": (
        ["defenses=[{name: dp_sgd, bound: 1, noise_multiplier: 1}]", "model.name=cnn_bn"],
        ["defenses: dp_sgd", "BatchNorm2d", "federation.batch_norm: frozen"],
    ),
    "DP-SGD with mixup": (
        ["defenses=[{name: mixup, alpha: 1}, {name: dp_sgd, bound: 1, noise_multiplier: 1}]"],
        ["defenses: dp_sgd and mixup do not go together"],
    ),
    "error feedback of steps": (
        ["defenses=[{name: top_k, theta: 0.5, error_feedback: true, at: step}]"],
        ["defenses: top_k: error_feedback", "at: update"],
    ),
    "error feedback of what is scaled up": (
        ["defenses=[{name: random_k, theta: 0.9, unbiased: true, error_feedback: true}]"],
        ["defenses: random_k: error feedback", "leave out unbiased"],
    ),
    "mixup twice": (
        ["defenses=[{name: mixup, alpha: 1}, {name: mixup, alpha: 1}]"],
        ["defenses: mixup stands there twice"],
    ),
    "a sum of one": (
        ["defenses=[secure_aggregation]", "federation.clients=1"],
        ["defenses: secure_aggregation of one client hides nothing", "federation.clients"],
    ),
    "a sum over epochs": (
        [
            "defenses=[secure_aggregation]",
            FEDAVG,
            "federation.local_epochs=1",
            "partition.kind=iid",
            NATURAL,
        ],
        ["defenses: secure_aggregation", "federation.local_steps in place of local_epochs"],
    ),
    "fraction bits beyond the modulus": (
        ["defenses=[{name: secure_aggregation, modulus_bits: 32, fraction_bits: 31}]"],
        ["defenses.0", "fraction_bits = 31 does not fit modulus_bits = 32"],
    ),
    "epochs of samples that nobody owns": (
        [FEDAVG, "federation.local_epochs=2"],
        ["federation.local_epochs", "partition.kind is 'shared'"],
    ),
    "FedAvg without steps": (
        [FEDAVG],
        ["federation: fedavg needs one of", "local_steps", "local_epochs", "found none"],
    ),
    "FedAvg with both": (
        [FEDAVG, "federation.local_steps=2", "federation.local_epochs=2"],
        ["federation: fedavg needs one of", "local_steps", "local_epochs", "found both"],
    ),
    "FedSGD of five steps": (
        ["federation.local_steps=5"],
        ["federation.local_steps and local_epochs belong to fedavg"],
    ),
    "momentum of a single step": (
        ["federation.momentum=0.9"],
        ["federation.momentum has no effect on a single local step"],
    ),
    "a population smaller than a round": (
        ["federation.population=2"],
        ["federation.population: 2 clients altogether, and 3 in each round"],
    ),
    "everyone drops out": (
        ["federation.dropout=1"],
        ["federation.dropout: found 1: ", "less than 1"],
    ),
    "users of data without users": (
        ["partition.kind=user", NATURAL],
        ["partition.kind: user", "a data set with users"],
    ),
    "more clients than samples": (
        ["partition.kind=iid", NATURAL, "federation.population=5000"],
        ["federation.population", "5000"],
    ),
    "labels that are not the clients' own": (
        ["partition.kind=iid", "labels.distribution=unbalanced"],
        ["labels.distribution", "partition.kind 'iid'", "set it to natural"],
    ),
    "an unknown partition": (
        ["partition.kind=dirichet", NATURAL],
        ["partition.kind: found 'dirichet'", "did you mean 'dirichlet'"],
    ),
    "an unknown server optimiser": (
        ["federation.server.optimizer=adma"],
        ["federation.server.optimizer: found 'adma'", "did you mean 'adam'"],
    ),
    "momentum of a server without": (
        ["federation.server.momentum=0.5"],
        ["federation.server.momentum belongs to momentum", "'sgd'"],
    ),
    "an unknown variant": (
        ["data={name: emnist, root: somewhere, variant: byklass}"],
        ["data", "variant", "'byklass'", "byclass"],
    ),
    "noise on statistics that stay": (
        ["federation.batch_norm=local", "federation.statistics_noise=0.1"],
        ["federation.statistics_noise is of no use", "'local'"],
    ),
}


def refused(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    status = main(["run", *map(str, arguments)])
    message = capsys.readouterr().err
    assert status == 2, message
    return message


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_refused_before_any_round(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, expected = CASES[name]
    experiment = write_experiment(tmp_path / "e.yaml")
    message = refused([experiment, *overrides, "-o", tmp_path / "r.h5"], capsys)
    assert message.startswith("error: ")
    assert "Traceback" not in message
    for part in expected:
        assert part in message
    assert len(message) < 700
    assert [path.name for path in tmp_path.iterdir()] == ["e.yaml"]


def test_data_folder_of_another_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data_root: Path
) -> None:
    experiment = write_experiment(tmp_path / "e.yaml")
    folder = data_root / "mnist"
    for name in ("svhn", "cifar10", "femnist", "celeba", "cifar100"):
        data = f"data={{name: {name}, root: '{folder}'}}"
        message = refused([experiment, data, "-o", tmp_path / "r.h5"], capsys)
        assert message.startswith("error: ")
        assert "data.root" in message
        assert str(folder) in message
        assert "mnist" in message.replace(str(folder), "")
        assert [path.name for path in tmp_path.iterdir()] == ["e.yaml"]


def test_unknown_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiles = {"small": {"federation.rounds": 1}}
    experiment = write_experiment(tmp_path / "e.yaml", profiles=profiles)
    message = refused([experiment, "--profile", "smal", "-o", tmp_path / "r.h5"], capsys)
    assert "unknown profile 'smal'" in message
    assert "did you mean 'small'" in message
    bare = write_experiment(tmp_path / "bare.yaml")
    message = refused([bare, "--profile", "small", "-o", tmp_path / "r.h5"], capsys)
    assert "unknown profile 'small': the file has none" in message


# What only the set-up finds comes with the data and the model, on every rank.
@pytest.mark.ranks
@pytest.mark.parametrize(
    "name",
    ["theta is above 1", "DP-SGD with BatchNorm", "users of data without users"],
)
def test_all_ranks_end_with_one_message(name: str, tmp_path: Path) -> None:
    overrides, expected = CASES[name]
    experiment = write_experiment(tmp_path / "e.yaml")
    done = run_testbed("run", experiment, *overrides, "-o", tmp_path / "r.h5", ranks=2)
    assert done.status == 2, done.err
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for part in expected:
        assert part in lines[0]
    assert "Traceback" not in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["e.yaml"]


def test_withholding_the_last_layer_is_no_error_for_attacks_on_it(tmp_path: Path) -> None:
    experiment = write_experiment(tmp_path / "e.yaml")
    output = tmp_path / "r.h5"
    overrides = ["defenses=[withhold_last_layer]", "federation.rounds=1", "--progress=none"]
    assert main(["run", str(experiment), *overrides, "-o", str(output)]) == 0
    assert output.exists()
