"""The failure contract: a clear message, a status that is not 0, no hang, nothing lost."""

import shutil
import socket
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from launching import (
    command,
    environment,
    finish,
    is_open_mpi,
    run_here,
    run_testbed,
    write_experiment,
)

# Seconds from the fault to the end of all ranks. Measured: under 5, with the start of the run.
LIMIT = 100


@pytest.fixture
def failing(tmp_path):
    """Return a function that writes an experiment whose model fails on rank 2."""
    shutil.copy(Path(__file__).with_name("failing_model.py"), tmp_path)

    def write(fault, rank=2, rounds=100):
        return write_experiment(
            tmp_path / "experiment.yaml",
            model={
                "name": "failing_model:Failing",
                "init": "torch",
                "arguments": {"fault": fault, "rank": rank},
            },
            federation={"rounds": rounds, "clients": 2, "batch_size": 8},
            results={"commit_seconds": 0},
        )

    return write


def seconds_since_the_fault(folder):
    """Return the time since the moment that the model noted on disk: start-up does not count."""
    return time.time() - (folder / "fault").stat().st_mtime


def committed(path):
    """Return the committed rounds of the only scenario, which must all be readable."""
    with h5py.File(path, "r", swmr=True) as file:
        rounds = int(file["committed_rounds"][0])
        counts = file["scenarios/0000/truth/counts"][:rounds]
        assert (counts.sum(axis=2) == 8).all()
        return rounds


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", "failed with ValueError: this model fails on purpose"),
        ("sys.exit", "left early, by sys.exit(0)"),
    ],
)
def test_a_rank_that_fails_ends_all_ranks_and_says_where_it_was(failing, tmp_path, fault, message):
    done = run_testbed("run", failing(fault), "-o", "r.h5", ranks=3, cwd=tmp_path)
    assert done.status not in (0, 124)
    assert f"error: rank 2 of 3 on {_host()}, scenario 0, round 3, client 1: {message}" in done.err
    assert "Traceback" in done.err
    assert seconds_since_the_fault(tmp_path) < LIMIT
    assert not (tmp_path / "r.h5").exists()
    assert 1 <= committed(tmp_path / "r.h5.partial") <= 3


@pytest.mark.mpi
def test_a_rank_that_vanishes_ends_all_ranks(failing, tmp_path):
    done = run_testbed("run", failing("os._exit"), "-o", "r.h5", ranks=3, cwd=tmp_path)
    assert seconds_since_the_fault(tmp_path) < LIMIT
    assert not (tmp_path / "r.h5").exists()
    if is_open_mpi():  # of a rank that has left with status 0, MPICH's mpirun says nothing
        assert done.status != 0
        assert "process rank 2" in done.err
    assert committed(tmp_path / "r.h5.partial") >= 1


@pytest.mark.mpi
def test_a_failure_on_the_root_ends_all_ranks(failing, tmp_path):
    (tmp_path / "failing_attack.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from testbed.attacks import Attack, Knowledge\n"
        "@dataclass(frozen=True)\n"
        "class Failing(Attack):\n"
        "    name: ClassVar = 'failing'\n"
        "    title: ClassVar = 'Failing'\n"
        "    knowledge: ClassVar = Knowledge.GRADIENTS\n"
        "    source: ClassVar = 'this test'\n"
        "    def infer(self, observations, calibration):\n"
        "        raise ArithmeticError('this attack fails on purpose')\n"
    )
    done = run_testbed(
        "run",
        failing("none"),
        "attacks=[llg, {name: 'failing_attack:Failing'}]",
        *("-o", "r.h5"),
        ranks=3,
        cwd=tmp_path,
    )
    assert done.status != 0
    expected = "scenario 0, round 0: failed with ArithmeticError: this attack fails on purpose"
    assert f"error: rank 0 of 3 on {_host()}, {expected}" in done.err


@pytest.mark.mpi
def test_a_model_that_one_rank_cannot_build_is_an_error_before_there_is_a_file(failing, tmp_path):
    done = run_testbed("run", failing("build"), "-o", "r.h5", ranks=3, cwd=tmp_path)
    assert done.status == 2
    assert "error: rank 2: " in done.err
    assert "this model cannot be built on purpose" in done.err
    assert list(tmp_path.glob("r.h5*")) == []


def test_a_failure_in_a_run_of_one_process(failing, tmp_path):
    done = run_testbed("run", failing("raise", rank=0), "-o", "r.h5", cwd=tmp_path)
    assert done.status == 1
    assert "error: rank 0 of 1" in done.err
    assert "round 1, client 1: failed with ValueError" in done.err
    assert (tmp_path / "r.h5.partial").exists()


@pytest.mark.mpi
def test_nan_updates_are_flagged_left_out_and_the_run_goes_on(failing, tmp_path):
    done = run_testbed("run", failing("nan", rounds=10), "-o", "r.h5", ranks=3, cwd=tmp_path)
    assert done.status == 0, done.err
    with h5py.File(tmp_path / "r.h5") as file:
        scenario = file["scenarios/0000"]
        finite = scenario["updates/finite"][:]
        # Rank 2 works for client 1 alone, and fails from its fourth round on.
        expected = np.ones((10, 2))
        expected[3:, 1] = 0
        assert (finite == expected).all()
        for attack in ("random", "llg", "llg_star", "llg_plus"):
            total = scenario[f"attacks/{attack}/counts"][:].sum(axis=2)
            assert (total == np.where(finite, 8, -10)).all()
        # The others go on: losses stay finite, and so does the mean over them.
        loss = scenario["updates/loss"][:]
        assert (np.isnan(loss) == (finite == 0)).all()
        assert np.isfinite(scenario["rounds/loss"][:]).all()


WRONG = {
    "unknown key": (["federation.batchsize=8"], ["'batchsize': did you mean 'batch_size'"]),
    "two at once": (["federation.rounds=0", "model.name=cn"], ["rounds: found 0", "mean 'cnn'"]),
    "no data root": (["data.name=mnist"], ["data.root"]),
    "missing data": (["data.name=mnist", "data.root=nowhere"], ["nowhere does not exist"]),
    "small images": (["model.name=lenet"], ["lenet", "8x8"]),
    "missing model": (["model.name='failing_model:Nothing'"], ["failing_model", "Nothing"]),
    "little data": (["data.auxiliary_per_class=5000"], ["auxiliary_per_class"]),
    "no such device": (["compute.device=tpu"], ["compute.device: found 'tpu'"]),
    "no folder": (["-o", "no/folder/r.h5"], ["the folder no/folder does not exist"]),
}


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        *((case, None) for case in WRONG),
        # Found by the parser, by a loader, and by building the model.
        pytest.param("two at once", 2, marks=pytest.mark.ranks),
        pytest.param("missing data", 2, marks=pytest.mark.ranks),
        pytest.param("missing model", 3, marks=pytest.mark.mpi),
    ],
)
def test_wrong_input_is_one_message_and_status_2_before_anything_is_computed(
    failing, tmp_path, case, ranks
):
    arguments, messages = WRONG[case]
    failing("none")  # leaves failing_model.py there
    experiment = write_experiment(tmp_path / "experiment.yaml")
    output = [] if "-o" in arguments else ["-o", "r.h5"]
    line = ("run", experiment, *arguments, *output)
    done = run_testbed(*line, ranks=ranks, cwd=tmp_path) if ranks else run_here(*line, cwd=tmp_path)
    assert done.status == 2, done.err
    for message in messages:
        assert message in done.err
    assert "Traceback" not in done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(set(errors))  # by the root alone
    assert list(tmp_path.glob("*.h5*")) == []


@pytest.mark.ranks
def test_a_gpu_that_is_not_there(tmp_path):
    experiment = write_experiment(tmp_path / "experiment.yaml")
    line = command("run", experiment, "compute.device=cuda", "-o", tmp_path / "r.h5", ranks=2)
    done = finish(line, env={**environment(), "CUDA_VISIBLE_DEVICES": ""})
    assert done.status == 2
    assert "compute.device=cuda" in done.err
    assert "compute.device=auto" in done.err


@pytest.mark.ranks
def test_damaged_data_are_one_line(tmp_path, data_root):
    for name in (data_root / "mnist").iterdir():
        shutil.copy(name, tmp_path / name.name)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.chmod(0o600)
    images.write_bytes(images.read_bytes()[:100_000])
    experiment = write_experiment(
        tmp_path / "e.yaml", data={"name": "mnist", "root": str(tmp_path)}
    )
    done = run_testbed("run", experiment, "-o", tmp_path / "r.h5", ranks=2)
    assert done.status == 2
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "train-images-idx3-ubyte.gz" in errors[0]


def test_a_results_file_is_never_overwritten_unasked(tmp_path):
    experiment = write_experiment(tmp_path / "experiment.yaml")
    output = tmp_path / "r.h5"
    assert run_here("run", experiment, "-o", output).status == 0
    before = output.read_bytes()
    again = run_here("run", experiment, "seed=8", "-o", output)
    assert again.status == 2
    assert "--overwrite" in again.err
    assert output.read_bytes() == before
    assert run_here("run", experiment, "seed=8", "-o", output, "--overwrite").status == 0
    assert output.read_bytes() != before
    assert list(tmp_path.glob("r.h5.*")) == []


def test_the_old_results_stay_until_the_new_ones_are_complete(failing, tmp_path):
    output = tmp_path / "experiment.h5"
    assert run_here("run", failing("none", rounds=3), "-o", output, cwd=tmp_path).status == 0
    before = output.read_bytes()
    done = run_here("run", failing("raise", rank=0), "-o", output, "--overwrite", cwd=tmp_path)
    assert done.status == 1
    assert output.read_bytes() == before


def test_single_processes_under_srun_are_told_apart_from_one_on_purpose(tmp_path):
    experiment = write_experiment(tmp_path / "experiment.yaml")
    line = command("run", experiment, "-o", tmp_path / "r.h5")
    step = {"SLURM_JOB_ID": "9", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}
    done = finish(line, env={**environment(), **step})
    assert done.status == 2
    assert "srun started 4 single processes" in done.err
    assert "--mpi=pmix" in done.err
    other = finish(line, env={**environment(), **step, "SLURM_PROCID": "3"})
    assert (other.status, other.err) == (2, "")
    batch_shell = {"SLURM_JOB_ID": "9", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    done = finish(line, env={**environment(), **batch_shell})
    assert done.status == 0, done.err


@pytest.mark.mpi
def test_a_launcher_of_another_mpi_is_detected(tmp_path):
    experiment = write_experiment(tmp_path / "experiment.yaml")
    line = command("run", experiment, "-o", tmp_path / "r.h5")
    other = "PMI_" if is_open_mpi() else "OMPI_COMM_WORLD_"
    step = {f"{other}SIZE": "4", f"{other}RANK": "0"}
    done = finish(line, env={**environment(), **step})
    assert done.status == 2
    assert "belong to different MPI libraries" in done.err


def _host():
    return socket.gethostname()
