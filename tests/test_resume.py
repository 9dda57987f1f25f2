"""A run that is stopped and goes on leaves what one leaves that nothing disturbed, bit by bit."""

import shutil

import h5py
import numpy as np
import pytest
import yaml
from launching import assert_same_results, run_testbed, write_experiment

from testbed.results.reader import open_results
from testbed.run import RunOptions, run
from testbed.signals import EXIT_STOPPED, StopSignal
from testbed.transport.local import LocalTransport

TRAINING = {"rounds": 9, "clients": 3, "batch_size": 8, "fresh_model": False, "evaluate_every": 3}
POPULATION = {**TRAINING, "population": 8, "dropout": 0.2}
FEDAVG = {**TRAINING, "algorithm": "fedavg", "local_steps": 2}
EXPERIMENTS = {
    "probe": {
        "federation": {"rounds": 4, "clients": 2, "batch_size": 8, "fresh_model": True},
        "sweep": {"federation.batch_size": [4, 8]},
    },
    "sgd": {"federation": TRAINING},
    "momentum": {"federation": {**FEDAVG, "server": {"optimizer": "momentum"}}},
    "adam": {"federation": {**POPULATION, "server": {"optimizer": "adam"}}},
    "error feedback": {
        "federation": {**POPULATION, "algorithm": "fedavg", "local_steps": 2},
        "defenses": [{"name": "dgc", "theta": 0.9, "momentum": 0.5}],
    },
    "sums over rounds": {
        "federation": FEDAVG,
        "attacks": ["llg", "llg_plus", "ilrg"],
        "defenses": [{"name": "noise", "sigma": 0.001}],
    },
    "personal heads": {
        "federation": FEDAVG,
        "defenses": [{"name": "withhold_last_layer", "head": "personal"}],
        "attacks": ["random"],
    },
    "secure sums": {"federation": TRAINING, "defenses": ["secure_aggregation"]},
    "attacked now and then": {"federation": {**TRAINING, "attack_every": 3}},
    "pretrained": {
        "federation": {"rounds": 3, "clients": 2, "batch_size": 8, "fresh_model": True},
        "pretraining": {"batch_size": 8},
        "sweep": {"pretraining.steps": [0, 3, 6]},
    },
}


class StopAt(StopSignal):
    """Comes at the n-th time that somebody looks; never, if that is too late."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    @property
    def requested(self):
        self.left -= 1
        if self.left < 0:
            self.name = "SIGUSR2"
        return bool(self.name)


def options(experiment, output, **changes):
    return RunOptions(experiment, [], output, overwrite=False, progress="none", **changes)


def written(tmp_path, name):
    changes = {"results": {"commit_seconds": 3600, "checkpoint_seconds": 0}, **EXPERIMENTS[name]}
    return write_experiment(tmp_path / "e.yaml", **changes)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_run_that_is_stopped_again_and_again_equals_one_that_was_not(name, tmp_path):
    experiment = written(tmp_path, name)
    assert run(LocalTransport(), options(experiment, tmp_path / "whole.h5")) == 0
    output, starts = tmp_path / "stopped.h5", 0
    while not output.exists():
        starts += 1
        stop = StopAt(3)
        status = run(LocalTransport(), options(experiment, output, resume=True), stop)
        assert status == (0 if output.exists() else EXIT_STOPPED)
        assert starts < 40
    assert starts > 2
    assert_same_results(tmp_path / "whole.h5", output)
    # Nothing is left beside the results.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.yaml", "stopped.h5", "whole.h5"]
    with open_results(output) as results:
        assert len(results.starts) == starts
        done = [one.committed for one in results.starts]
        assert done == sorted(done)
        assert done[0] == 0


@pytest.mark.parametrize("name", ["momentum", "error feedback", "sums over rounds"])
def test_without_its_checkpoint_a_run_goes_through_its_rounds_again(name, tmp_path, capfd):
    experiment = written(tmp_path, name)
    assert run(LocalTransport(), options(experiment, tmp_path / "whole.h5")) == 0
    for damage in ("gone", "cut", "changed"):
        output = tmp_path / f"{damage}.h5"
        assert run(LocalTransport(), options(experiment, output), StopAt(4)) == EXIT_STOPPED
        checkpoint = tmp_path / f"{damage}.h5.checkpoint"
        content = bytearray(checkpoint.read_bytes())
        content[len(content) // 2] ^= 1
        if damage == "gone":
            checkpoint.unlink()
        else:
            checkpoint.write_bytes(content if damage == "changed" else content[:-100])
        capfd.readouterr()
        assert run(LocalTransport(), options(None, output, resume=True)) == 0
        said = capfd.readouterr().err
        assert ("checksum is wrong" in said) == (damage != "gone")
        assert_same_results(tmp_path / "whole.h5", output)


def test_a_checkpoint_of_another_run_is_not_used(tmp_path):
    experiment = written(tmp_path, "momentum")
    for name in ("one.h5", "other.h5"):
        assert run(LocalTransport(), options(experiment, tmp_path / name), StopAt(4)) == 75
    shutil.copy(tmp_path / "other.h5.checkpoint", tmp_path / "one.h5.checkpoint")
    assert run(LocalTransport(), options(None, tmp_path / "one.h5", resume=True)) == 0
    assert run(LocalTransport(), options(experiment, tmp_path / "whole.h5")) == 0
    assert_same_results(tmp_path / "whole.h5", tmp_path / "one.h5")


def test_rounds_are_done_from_the_checkpoint_on_and_not_from_the_first(tmp_path):
    experiment = written(tmp_path, "error feedback")
    output = tmp_path / "r.h5"
    assert run(LocalTransport(), options(experiment, output), StopAt(9)) == EXIT_STOPPED
    computed = []
    transport = LocalTransport()
    opened = transport.open

    def noting(*arguments, start, **settings):
        computed.append(start)
        return opened(*arguments, start=start, **settings)

    transport.open = noting
    assert run(transport, options(None, output, resume=True)) == 0
    assert computed
    assert computed[0] > 1


def test_models_that_were_trained_before_a_stop_are_not_trained_again(tmp_path, monkeypatch):
    import testbed.pretraining

    monkeypatch.setattr(testbed.pretraining, "_STEPS_AT_ONCE", 1)  # one model at a time
    experiment = written(tmp_path, "pretrained")
    trained = []
    train = testbed.pretraining._train
    monkeypatch.setattr(testbed.pretraining, "_train", lambda *a: trained.append(a[2]) or train(*a))
    output = tmp_path / "r.h5"
    starts = 0
    while not output.exists():
        run(LocalTransport(), options(experiment, output, resume=True), StopAt(2))
        starts += 1
    assert starts > 3
    # One training of each of the three models serves all stages of all scenarios.
    assert sorted(trained) == [0, 1, 2]


@pytest.mark.mpi
def test_resume_is_one_line_for_a_batch_script(tmp_path):
    experiment = written(tmp_path, "sgd")
    line = ("run", experiment, "-o", tmp_path / "r.h5", "--resume")
    assert run_testbed(*line).status == 0
    before = (tmp_path / "r.h5").read_bytes()
    again = run_testbed(*line, ranks=2)
    assert again.status == 0
    assert "the run is complete" in again.err
    assert (tmp_path / "r.h5").read_bytes() == before
    other = run_testbed(*line, "seed=8")
    assert other.status == 2
    assert "seed is 7 there, and 8 now" in other.err
    assert (tmp_path / "r.h5").read_bytes() == before


@pytest.mark.mpi
def test_what_is_not_there_cannot_be_resumed(tmp_path):
    done = run_testbed("resume", tmp_path / "r.h5", ranks=2)
    assert done.status == 2
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "there is nothing to resume" in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_only_keys_without_a_part_in_the_results_may_change(tmp_path):
    experiment = written(tmp_path, "sgd")
    output = tmp_path / "r.h5"
    assert run(LocalTransport(), options(experiment, output), StopAt(3)) == EXIT_STOPPED
    done = run_testbed("resume", output, "federation.rounds=10")
    assert done.status == 2
    assert "federation.rounds is 9 there, and 10 now" in done.err
    done = run_testbed("resume", f"{output}.partial", "results.commit_seconds=0")
    assert done.status == 0, done.err
    with h5py.File(output) as file:
        assert yaml.safe_load(file.attrs["experiment"])["results"]["commit_seconds"] == 3600
        assert np.all(file["committed_rounds"][...] == 9)
