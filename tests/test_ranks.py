"""The same bits for any number of ranks, and where each rank was."""

import os
import socket
import subprocess
import sys

import h5py
import pytest
import torch
from launching import (
    assert_same_results,
    finish,
    is_open_mpi,
    result_arrays,
    run_here,
    run_testbed,
    under_mpirun,
    write_experiment,
    zipped,
)

from testbed.results.placed import write_ranges
from testbed.results.reader import open_results

PROBE = {"rounds": 8, "clients": 1, "fresh_model": True, "batch_size": 8}
COHORTS = {"rounds": 5, "clients": 3, "fresh_model": True, "batch_size": 4}
TRAINING = {"rounds": 7, "clients": 5, "batch_size": 4, "attack_every": 2, "evaluate_every": 3}
CNN, FCNN = {"name": "cnn"}, {"name": "fcnn"}
# What ranks could confuse: repetitions that overtake each other, more and fewer clients than
# ranks, running statistics, several scenarios, rounds without attacks; in training, models that
# are small enough to be sent to each worker (cnn), and at five ranks too large for it (fcnn).
SCENARIOS = [
    {"federation": federation, "model": model, "labels.distribution": labels}
    for federation, model, labels in (
        (PROBE, CNN, "balanced"),
        (PROBE, CNN, "unbalanced"),
        (PROBE, CNN, "natural"),
        (COHORTS, {"name": "cnn", "init": "torch", "activation": "relu"}, "unbalanced"),
        (TRAINING, CNN, "balanced"),
        (TRAINING, FCNN, "balanced"),
        (TRAINING, CNN, "unbalanced"),
        (TRAINING, FCNN, "unbalanced"),
    )
]
EXPERIMENTS = {
    "probes_and_training": {
        "results": {"observations": "last_layer"},
        "sweep": zipped(SCENARIOS),
    },
    "training_with_statistics": {
        "model": {"name": "resnet20", "init": "torch"},
        "federation": {"rounds": 3, "clients": 2, "batch_size": 4, "evaluate_every": 1},
        "compute": {"receive_buffers": 2},
    },
    "stages_with_shifted_knowledge": {
        "model": {"name": "cnn_bn", "init": "torch"},
        "data": {"name": "digits", "auxiliary_per_class": 5},
        "pretraining": {"steps": 0, "batch_size": 8},
        "federation": {
            "rounds": 3,
            "clients": 3,
            "batch_size": 6,
            "fresh_model": True,
            "statistics_noise": 0.01,
        },
        "adversary": {
            "auxiliary_noise": 0.1,
            "auxiliary_missing": 2,
            "batch_size": "estimated",
        },
        "attacks": [
            *("prior", "zlg", "ilrg", "rlg", "aux_ls", "class_basis", "lmmse"),
            {"name": "ldia", "shadows": 50, "epochs": 2},
            {"name": "posterior_regression", "simulations": 50, "steps": 20},
            {"name": "batchnorm_joint", "batches": 20, "noise": 0.01},
            *("batchnorm_conditioned_joint", "gradient_bridge"),
        ],
        "results": {"observations": "full"},
        "sweep": {"pretraining.steps": [0, 15]},
    },
}


# More and fewer workers than clients, and one; one rank under mpirun is tried once.
RANKS = {
    "probes_and_training": (1, 2, 3, 5),
    "training_with_statistics": (3, 5),
    "stages_with_shifted_knowledge": (2, 5),
}


@pytest.mark.mpi
def test_mpirun_and_the_library_are_of_the_mpi_that_the_pass_is_about():
    code = "from mpi4py import MPI; world = MPI.COMM_WORLD; "
    code += "world.rank or print(world.size, MPI.Get_library_version())"
    done = finish(under_mpirun([sys.executable, "-c", code], 2))
    assert done.status == 0, done.err
    launched = "openmpi" if is_open_mpi() else "mpich"
    assert launched == os.environ.get("TESTBED_TEST_MPI", launched)
    library = {"openmpi": "Open MPI v", "mpich": "MPICH Version:"}[launched]
    assert done.out.startswith(f"2 {library}")


@pytest.mark.mpi
@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_results_are_bitwise_equal_for_any_number_of_ranks(name, tmp_path):
    experiment = write_experiment(tmp_path / "experiment.yaml", **EXPERIMENTS[name])
    alone = tmp_path / "alone.h5"
    done = run_here("run", experiment, "-o", alone)
    assert done.status == 0, done.err
    for ranks in RANKS[name]:
        output = tmp_path / f"{ranks}.h5"
        done = run_testbed("run", experiment, "-o", output, ranks=ranks)
        assert done.status == 0, done.err
        assert_same_results(alone, output)


def test_another_seed_gives_other_results(tmp_path):
    experiment = write_experiment(tmp_path / "experiment.yaml")
    arrays = []
    for seed in (1, 2):
        output = tmp_path / f"{seed}.h5"
        assert run_here("run", experiment, f"seed={seed}", "-o", output).status == 0
        arrays.append(result_arrays(output))
    for name in ("truth/counts", "observations/row_sums", "updates/loss"):
        path = f"scenarios/0000/{name}"
        assert arrays[0][path].tobytes() != arrays[1][path].tobytes()


@pytest.mark.mpi
def test_ranks_hosts_and_devices_stand_in_the_file(tmp_path):
    experiment = write_experiment(tmp_path / "experiment.yaml")
    output = tmp_path / "results.h5"
    done = run_testbed("run", experiment, "compute.device=cpu", "-o", output, ranks=3)
    assert done.status == 0, done.err
    assert f"3 ranks on 1 host: {socket.gethostname()} (3); cpu" in done.err
    assert not (tmp_path / "results.h5.partial").exists()
    with h5py.File(output) as file:
        ranks = file["ranks"]
        assert ranks["role"][:].tolist() == [b"server", b"client", b"client"]
        assert ranks["device"][:].tolist() == [b"cpu"] * 3
        assert ranks["local_rank"][:].tolist() == [0, 1, 2]
        assert len(set(ranks["host"][:])) == 1
        here = write_ranges(sorted(os.sched_getaffinity(0))).encode()
        assert ranks["cores"][:].tolist() == [here] * 3
        assert ranks["gpu"][:].tolist() == [b""] * 3
        assert "MPI" in file.attrs["mpi_library"]
        timings = file["scenarios/0000/timings"]
        # Clients 0, 1, 2 over two workers, and the same ones in every round.
        assert (timings["client_rank"][:] == [1, 2, 1]).all()
        assert (timings["client_seconds"][:] > 0).all()
        assert file["committed_rounds"][:].tolist() == [6]
        # What crossed the wire: the update, and no truth.
        parameters = file["scenarios/0000"].attrs["model_parameters"]
        assert (file["scenarios/0000/updates/bytes_on_wire"][:] == 4 * parameters).all()


@pytest.mark.gpu
@pytest.mark.mpi
def test_results_on_a_gpu_are_bitwise_equal_for_any_number_of_ranks(tmp_path):
    experiment = write_experiment(
        tmp_path / "e.yaml", compute={"device": "cuda"}, **EXPERIMENTS["probes_and_training"]
    )
    for ranks in (1, 3):
        output = tmp_path / f"{ranks}.h5"
        done = run_testbed("run", experiment, "-o", output, ranks=ranks)
        assert done.status == 0, done.err
    assert_same_results(tmp_path / "1.h5", tmp_path / "3.h5")
    with h5py.File(tmp_path / "3.h5") as file:
        assert all(device.startswith(b"cuda:") for device in file["ranks/device"][:])


@pytest.mark.gpu
@pytest.mark.mpi
def test_ranks_that_share_a_gpu_name_it_as_the_driver_does(tmp_path):
    experiment = write_experiment(tmp_path / "e.yaml")
    ranks = 2 * torch.cuda.device_count()
    done = run_testbed("run", experiment, "-o", tmp_path / "r.h5", ranks=ranks)
    assert done.status == 0, done.err
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    with open_results(tmp_path / "r.h5") as results:
        gpus = [rank.gpu for rank in results.ranks]
    assert len(set(gpus)) == ranks // 2
    assert all(f"UUID: {gpu})" in listed.stdout for gpu in gpus)
    assert done.err.count(" share a GPU of ") == ranks // 2


@pytest.mark.gpu
@pytest.mark.mpi
def test_a_gpu_infers_what_the_cpu_does(tmp_path):
    """Rounding differs between devices; the labels that are inferred hardly do."""
    experiment = write_experiment(
        tmp_path / "e.yaml", federation={"rounds": 50, "fresh_model": True, "batch_size": 8}
    )
    for device in ("cpu", "cuda"):
        output = tmp_path / f"{device}.h5"
        done = run_testbed("run", experiment, f"compute.device={device}", "-o", output, ranks=2)
        assert done.status == 0, done.err
    cpu, gpu = result_arrays(tmp_path / "cpu.h5"), result_arrays(tmp_path / "cuda.h5")
    for name in ("truth/counts", "attacks/random/counts"):
        assert (cpu[f"scenarios/0000/{name}"] == gpu[f"scenarios/0000/{name}"]).all()
    sums = "scenarios/0000/observations/row_sums"
    assert abs(cpu[sums] - gpu[sums]).max() < 1e-3 * abs(cpu[sums]).max()
    for attack in ("llg", "llg_plus"):
        name = f"scenarios/0000/attacks/{attack}/counts"
        assert (cpu[name] == gpu[name]).all(axis=2).mean() > 0.9
