"""Federated training with defences: the same bits for any number of ranks, and bytes as moved."""

import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from launching import (
    assert_same_results,
    finish,
    run_here,
    run_testbed,
    under_mpirun,
    write_experiment,
    zipped,
)

pytestmark = pytest.mark.mpi

FEDAVG = {"algorithm": "fedavg", "local_steps": 3, "learning_rate": 0.2, "momentum": 0.5}
BASE = {"rounds": 5, "batch_size": 4, "clients": 5}
OWN = {"kind": "dirichlet_classes", "alpha": 0.5}
# What ranks could confuse: who remembers what, who has dropped out, sums in another order, clients
# with different numbers of steps, heads of one's own, draws of noise.
SCENARIOS: list[dict[str, Any]] = [
    {
        "federation": {**BASE, **FEDAVG, "population": 9, "dropout": 0.3, "evaluate_every": 2},
        "defenses": [{"name": "dgc", "theta": 0.9, "momentum": 0.5}, {"name": "qsgd", "levels": 7}],
        "partition": OWN,
    },
    {
        "federation": {**BASE, **FEDAVG, "dropout": 0.2, "server": {"optimizer": "adam"}},
        "defenses": [{"name": "secure_aggregation", "protocol": "reduction"}],
        "partition": OWN,
    },
    {
        "federation": {**BASE, "dropout": 0.2, "population": 7},
        "defenses": [
            {"name": "top_k", "theta": 0.5, "error_feedback": True},
            {"name": "secure_aggregation", "protocol": "masks"},
        ],
        "partition": OWN,
    },
    {
        "federation": {
            "rounds": 3,
            "clients": 5,
            "batch_size": 32,
            "algorithm": "fedavg",
            "local_epochs": 1,
            "proximal": 0.1,
            "weight_decay": 0.01,
        },
        "defenses": [{"name": "noise", "sigma": 0.01, "at": "step"}],
        "partition": OWN,
    },
    {
        "federation": {**BASE, **FEDAVG, "population": 8, "evaluate_every": 2},
        "defenses": [{"name": "withhold_last_layer", "head": "personal"}],
        "partition": {"kind": "shards", "classes_per_client": 2},
    },
    {
        "federation": {**BASE, "batch_norm": "frozen"},
        "defenses": [
            {"name": "randomised_response", "epsilon": 2.0},
            {"name": "dp_sgd", "bound": 1.0, "noise_multiplier": 0.5},
        ],
        "partition": {"kind": "iid"},
    },
    {
        "federation": {**BASE, "fresh_model": True, "dropout": 0.3},
        "defenses": [
            {"name": "mixup", "alpha": 1.0},
            {"name": "soteria", "percentile": 30},
            {"name": "gradient_dropout", "p": 0.5},
        ],
        "partition": {"kind": "iid"},
    },
]


def test_defended_training_is_bitwise_equal_for_any_number_of_ranks(tmp_path: Path) -> None:
    experiment = write_experiment(
        tmp_path / "e.yaml",
        model={"name": "cnn_bn", "init": "torch"},
        labels={"distribution": "natural"},
        attacks=["random", "llg", "llg_plus"],
        federation={"rounds": 1, "batch_size": 4},
        results={"observations": "full"},
        sweep=zipped(SCENARIOS),
    )
    alone = tmp_path / "alone.h5"
    done = run_here("run", experiment, "-o", alone)
    assert done.status == 0, done.err
    # Other numbers: tests/test_ranks.py.
    for ranks in (3, 5):
        output = tmp_path / f"{ranks}.h5"
        done = run_testbed("run", experiment, "-o", output, ranks=ranks)
        assert done.status == 0, done.err
        assert_same_results(alone, output)
    with h5py.File(alone) as file:
        assert len(file["scenarios"]) == len(SCENARIOS)
        assert "llg+rounds" in file["scenarios/0000/attacks"]
        for scenario in file["scenarios"].values():
            assert (scenario["updates/finite"][:] == scenario["updates/arrived"][:]).all()
            assert scenario["updates/finite"][:].any()


COMPRESSIONS: list[list[dict[str, Any]]] = [
    [],
    [{"name": "top_k", "theta": 0.99}],
    [{"name": "top_k", "theta": 0.5}],
    [{"name": "random_k", "theta": 0.9}],
    [{"name": "dgc", "theta": 0.999}],
    [{"name": "threshold", "threshold": 0.01}],
    [{"name": "gradient_dropout", "p": 0.9}],
    [{"name": "qsgd", "levels": 4}],
    [{"name": "qsgd", "levels": 500, "scope": "tensor"}],
    [{"name": "terngrad"}],
    [{"name": "signsgd"}],
    [{"name": "float16"}],
    [{"name": "top_k", "theta": 0.99}, {"name": "qsgd", "levels": 4}],
    [{"name": "withhold_last_layer"}],
    [{"name": "reference_compression", "theta": 0.5}],
    [{"name": "secure_aggregation", "protocol": "masks"}],
]
# Runs the testbed, and writes down what MPI itself says each message of the root's had.
WITNESS = """
import sys
import numpy as np
from mpi4py import MPI
from testbed.transport.downlink import MPIDownlink
from testbed.__main__ import main
real, moved = MPIDownlink._wait, []
def wait(self, request, status=None):
    real(self, request, status)
    if status is not None:
        moved.append((status.Get_elements(MPI.BYTE), status.Get_source()))
MPIDownlink._wait = wait
status = main(sys.argv[2:])
if MPI.COMM_WORLD.rank == 0:
    np.save(sys.argv[1], moved)
sys.exit(status)
"""
# Has rank 1 claim more than it sends.
LIAR = """
import sys
from testbed.transport import uplink
from testbed.__main__ import main
real = uplink.sent
def sent(message):
    items = real(message)
    message.header["payload_bytes"] += int(sys.argv[1])
    return items
uplink.sent = sent
sys.exit(main(sys.argv[2:]))
"""


def with_script(text: str, *arguments: Any, ranks: int) -> Any:
    return finish(under_mpirun([sys.executable, "-c", text, *map(str, arguments)], ranks))


def test_bytes_in_the_file_are_those_that_mpi_moved(tmp_path: Path) -> None:
    experiment = write_experiment(
        tmp_path / "e.yaml",
        federation={"rounds": 2, "clients": 3, "batch_size": 4},
        attacks=["random"],
        sweep={"defenses": COMPRESSIONS},
    )
    witness, output = tmp_path / "moved.npy", tmp_path / "r.h5"
    done = with_script(WITNESS, witness, "run", experiment, "-o", output, ranks=3)
    assert done.status == 0, done.err
    moved = np.load(witness)
    with h5py.File(output) as file:
        counted = [file[f"scenarios/{i:04d}/updates/bytes_on_wire"][:] for i in range(16)]
        size = 4 * int(file["scenarios/0000"].attrs["model_parameters"])
    flat = np.concatenate([rows.reshape(-1) for rows in counted])
    assert len(moved) == len(flat) == 16 * 2 * 3
    # Beside the update, a message has its header and its truth: the same for every message.
    around = moved[:, 0] - flat
    assert set(around) == {around[0]}
    assert 0 < around[0] < 300
    assert set(moved[:, 1]) == {1, 2}
    assert (counted[0] == size).all()
    most = {1: 0.021, 2: 0.55, 3: 0.14, 4: 0.003, 6: 0.14, 7: 0.126, 9: 0.064, 10: 0.033}
    for number, share in {**most, 8: 0.35, 11: 0.501, 12: 0.012}.items():
        assert (counted[number] <= share * size).all(), COMPRESSIONS[number]
        assert (counted[number] > 0.2 * share * size).all(), COMPRESSIONS[number]
    # Masks are as long as the integers that they hide.
    assert (counted[15] > 2 * size).all()


def test_a_message_of_another_length_than_it_says_ends_the_run(tmp_path: Path) -> None:
    experiment = write_experiment(
        tmp_path / "e.yaml", defenses=[{"name": "top_k", "theta": 0.9}], attacks=["random"]
    )
    output = tmp_path / "r.h5"
    arguments = (4, "run", experiment, "-o", output)
    done = with_script(LIAR, *arguments, ranks=2)
    assert done.status not in (0, 2)
    assert "an update of Task(scenario=0, round=0, client=0) says" in done.err
    assert not output.exists()
