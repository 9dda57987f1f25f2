"""Secure aggregation in whole runs: both protocols, drop-outs, lost rounds, attacks on sums."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from whole_run import WholeRun, run_whole

from testbed.defenses.sums import SecureAggregation
from testbed.plan import Task

ATTACKS = ["oracle", "random", "llg", "llg_plus"]
BN = {"name": "cnn_bn", "init": "torch"}
FRESH = {"fresh_model": True, "rounds": 5, "clients": 4}
DIVIDED = {
    "partition": {"kind": "dirichlet_classes", "alpha": 0.5},
    "labels": {"distribution": "natural"},
}


def secure(protocol: str, **options: Any) -> list[dict[str, Any]]:
    return [{"name": "secure_aggregation", "protocol": protocol, **options}]


def arrays(run: WholeRun) -> dict[str, Any]:
    """Return what both protocols have to agree in, by name."""
    found = {}

    def visit(name: str, item: Any) -> None:
        apart = name.startswith("timings/") or name == "updates/bytes_on_wire"
        if isinstance(item, h5py.Dataset) and not apart:
            found[name] = item[()]

    with h5py.File(run.path) as file:
        file["scenarios/0000"].visititems(visit)
    return found


@pytest.mark.parametrize(
    "federation",
    [
        {"evaluate_every": 2},
        {"algorithm": "fedavg", "local_steps": 3, "clients": 4, "dropout": 0.2, "rounds": 6},
    ],
)
def test_masks_and_reduction_give_the_same_bits(tmp_path: Path, federation: dict[str, Any]) -> None:
    runs = [
        run_whole(
            tmp_path / protocol,
            federation=federation,
            model=BN,
            attacks=ATTACKS,
            defenses=secure(protocol),
            results={"observations": "full"},
            **DIVIDED,
        )
        for protocol in ("masks", "reduction")
    ]
    one, two = map(arrays, runs)
    assert one.keys() == two.keys()
    assert {"truth/counts", "observations/update", "rounds/accuracy"} <= one.keys()
    assert [name for name in one if one[name].tobytes() != two[name].tobytes()] == []
    for number, model in runs[0].models.items():
        np.testing.assert_array_equal(model, runs[1].models[number])
    assert np.abs(runs[0].final - runs[0].models[0]).max() > 1e-3
    assert np.isfinite(one["observations/update"]).any()


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_sum_is_the_plain_weighted_mean_of_those_that_are_left(
    tmp_path: Path, weighting: str, dropout: float
) -> None:
    federation = {**FRESH, "weighting": weighting, "dropout": dropout}
    options = {"model": BN, "results": {"observations": "full"}, "attacks": ATTACKS, **DIVIDED}
    plain = run_whole(tmp_path / "plain", federation=federation, **options)
    summed = run_whole(
        tmp_path / "summed",
        federation=federation,
        defenses=secure("masks", threshold=0.5),
        **options,
    )
    missing = 0
    for number in range(5):
        np.testing.assert_array_equal(plain.models[number], summed.models[number])
        tasks = plain.plan.round_tasks(number)
        missing += 4 - len(tasks)
        assert len(tasks) >= 2
        assert plain.setup.partition is not None
        sizes = plain.setup.partition.sizes
        weights = [sizes[t.client] if weighting == "samples" else 1 for t in tasks]
        updates = [plain.plain(task).astype(np.float64) for task in tasks]
        mean = np.average(updates, axis=0, weights=weights)
        found = summed["observations/update"][number, 0]
        # Rounded to 32 binary digits behind the point, then to single precision.
        bound = 2.0**-32 + np.abs(mean) * 2.0**-24
        assert (np.abs(found - mean) <= bound).all()
        counts = [plain.sent[task].counts for task in tasks]
        np.testing.assert_array_equal(summed["truth/counts"][number, 0], np.sum(counts, axis=0))
    assert (missing > 0) == (dropout > 0)


def test_training_by_sums_is_training_by_updates_to_rounding(tmp_path: Path) -> None:
    federation = {"rounds": 5, "dropout": 0.1, "clients": 4}
    plain = run_whole(tmp_path / "plain", federation=federation, **DIVIDED)
    for protocol in ("masks", "reduction"):
        run = run_whole(
            tmp_path / protocol, federation=federation, defenses=secure(protocol), **DIVIDED
        )
        np.testing.assert_allclose(run.final, plain.final, atol=1e-6)
        assert np.abs(run.final - run.models[0]).max() > 1e-3


@pytest.mark.parametrize("protocol", ["masks", "reduction"])
def test_a_round_with_too_few_survivors_is_lost_and_the_run_goes_on(
    tmp_path: Path, protocol: str
) -> None:
    federation = {"clients": 4, "dropout": 0.3, "rounds": 9, "server": {"optimizer": "momentum"}}
    run = run_whole(
        tmp_path,
        federation=federation,
        attacks=["random", "llg"],
        defenses=secure(protocol, threshold=0.75),
    )
    lost = [n for n in range(9) if len(run.plan.participants(n).arriving) < 3]
    kept = sorted(set(range(9)) - set(lost))
    assert lost
    assert kept
    assert any(run.plan.participants(n).arriving for n in lost)
    for number in range(8):
        same = np.array_equal(run.models[number], run.models[number + 1])
        assert same == (number in lost)
    for name in ("attacks/llg/counts", "attacks/random/counts", "truth/counts"):
        assert (run[name][lost] == -1).all()
        assert (run[name][kept] >= 0).all()
    assert np.isnan(run["observations/row_sums"][lost]).all()
    assert np.isfinite(run["observations/row_sums"][kept]).all()
    # Clients that are there, and see that they are too few, send no vector, or zeros.
    sent, arrived = run["updates/bytes_on_wire"][lost], run["updates/arrived"][lost].astype(int)
    np.testing.assert_array_equal(sent, arrived * (8 * 8026 if protocol == "reduction" else 0))


def test_attacks_infer_the_cohorts_labels(tmp_path: Path) -> None:
    federation = {"clients": 4, "rounds": 3, "batch_size": 8, "algorithm": "fedavg"}
    run = run_whole(
        tmp_path,
        federation={**federation, "local_steps": 2},
        attacks=ATTACKS,
        defenses=secure("masks"),
    )
    truth = run["truth/counts"]
    assert truth.shape == (3, 1, 10)
    assert run["updates/arrived"].shape == (3, 4)
    for number in range(3):
        counts = [run.sent[task].counts for task in run.plan.round_tasks(number)]
        np.testing.assert_array_equal(truth[number, 0], np.sum(counts, axis=0))
    assert (run["observations/labels"] == 4 * 2 * 8).all()
    for label in ("random", "llg", "llg_plus", "oracle"):
        assert (run[f"attacks/{label}/counts"].sum(axis=2) == 4 * 2 * 8).all()
    # Fixed point is fine enough for the identity of the last layer.
    np.testing.assert_array_equal(run["attacks/oracle/counts"], truth)
    assert run.attributes("attacks/llg")["target"] == "update"


def test_server_is_given_no_update_without_a_mask(tmp_path: Path) -> None:
    federation = {**FRESH, "rounds": 2}
    plain = run_whole(tmp_path / "plain", federation=federation)
    run = run_whole(tmp_path / "masks", federation=federation, defenses=secure("masks"))
    defense = run.plan.summed
    assert isinstance(defense, SecureAggregation)
    masked = []
    for task in run.plan.tasks():
        everyone = range(4)
        message = defense.secure_round(everyone, everyone, 8026)
        body = run.sent[task].body
        assert len(body) == -(-message.message_bytes // 4) * 4
        vector = message.vector(body[: message.message_bytes])
        encoded = np.empty(8026, np.uint64)
        # Equal batches weigh 1 each, in units of their greatest common divisor.
        defense.fixed_point(4).encode(plain.plain(task), 1, encoded)
        assert not (vector == encoded).any()
        # A mask is uniform: half of all bits are set, those on top included.
        bits = np.unpackbits(vector.view(np.uint8)).reshape(8026, 8, 8)
        assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(8026)
        masked.append(vector.astype(np.float64))
        words = body.view(np.uint32)
        secret = plain.plain(task).view(np.uint32)
        assert not np.isin(secret[secret != 0], words[16:]).sum() > 5
    # Neither do two masked vectors resemble each other, of one round or of one client.
    close = np.corrcoef(masked) - np.eye(len(masked))
    assert np.abs(close).max() < 5 / np.sqrt(8026)


def test_reduction_sends_nothing_but_its_share_of_the_sum(tmp_path: Path) -> None:
    run = run_whole(tmp_path, federation={"rounds": 2}, defenses=secure("reduction"))
    assert all(len(sent.body) == 0 for sent in run.sent.values())
    assert (run["updates/bytes_on_wire"] == 8 * 8026).all()
    narrow = run_whole(
        tmp_path / "narrow",
        federation={"rounds": 2},
        defenses=secure("reduction", modulus_bits=32),
    )
    assert (narrow["updates/bytes_on_wire"] == 4 * 8026).all()
    np.testing.assert_allclose(narrow.models[1], run.models[1], atol=2.0**-16)


def test_a_cohort_that_diverges_loses_the_round(tmp_path: Path) -> None:
    federation = {"algorithm": "fedavg", "local_steps": 3, "learning_rate": 1e30, "rounds": 2}
    for protocol in ("masks", "reduction"):
        run = run_whole(tmp_path / protocol, federation=federation, defenses=secure(protocol))
        assert (run["updates/arrived"] == 1).all()
        assert (run["updates/finite"] == 0).all()
        assert (run["truth/counts"] == -1).all()
        np.testing.assert_array_equal(run.models[1], run.models[0])


def test_a_client_whose_update_is_not_finite_abstains(tmp_path: Path) -> None:
    runs = {}
    for broken in (False, True):
        model = {
            "name": "whole_run:Breaking",
            "init": "torch",
            "arguments": {"broken": broken},
        }
        runs[broken] = run_whole(
            tmp_path / str(broken),
            federation={"clients": 5, "rounds": 1, "batch_size": 2, "fresh_model": True},
            model=model,
            defenses=secure("masks"),
            labels={"distribution": "natural"},
        )
    finite = runs[True]["updates/finite"][0]
    assert 0 < finite.sum() < 5
    counts = [runs[True].sent[Task(0, 0, c)].counts for c in np.flatnonzero(finite)]
    np.testing.assert_array_equal(runs[True]["truth/counts"][0, 0], np.sum(counts, axis=0))
    assert runs[False]["updates/finite"].all()


def test_values_beyond_the_range_are_clipped_and_counted(tmp_path: Path) -> None:
    options = {"modulus_bits": 32, "fraction_bits": 30}
    federation = {"rounds": 1, "clients": 3}
    for protocol in ("masks", "reduction"):
        run = run_whole(
            tmp_path / protocol,
            federation=federation,
            defenses=secure(protocol, **options),
            results={"observations": "full"},
        )
        # Less than 2^31 / (3 * 2^30) each.
        assert np.abs(run["observations/update"]).max() <= 2 / 3
        assert (run["updates/clipped"] >= 0).all()
    plain = run_whole(tmp_path / "plain", federation=federation)
    expected = [(np.abs(plain.plain(t)) > 2 / 3).sum() for t in plain.plan.tasks()]
    np.testing.assert_array_equal(run["updates/clipped"][0], expected)
