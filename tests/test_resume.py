"""A run that is stopped and goes on leaves what one leaves that nothing disturbed, bit by bit."""

import contextlib
import os
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import yaml
from launching import assert_same_results, run_here, run_testbed, write_experiment

from analysis.replay import replay
from testbed.begun import check_same
from testbed.checkpoint import CHECKPOINT
from testbed.errors import UserError
from testbed.experiment import load_experiment
from testbed.results.container import read_container
from testbed.results.reader import open_results
from testbed.run import RunOptions, run
from testbed.signals import EXIT_STOPPED, StopSignal
from testbed.startup import Setups
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
    for damage, why in (
        ("gone", "missing"),
        ("cut", "truncated or damaged (checkpoint): the checksum"),
        ("changed", "truncated or damaged (checkpoint): the checksum"),
        ("pipe", "cannot be read: it is no regular file"),
    ):
        output = tmp_path / f"{damage}.h5"
        assert run(LocalTransport(), options(experiment, output), StopAt(4)) == EXIT_STOPPED
        checkpoint = tmp_path / f"{damage}.h5.checkpoint"
        content = bytearray(checkpoint.read_bytes())
        content[len(content) // 2] ^= 1
        if damage in ("gone", "pipe"):
            checkpoint.unlink()
            if damage == "pipe":
                os.mkfifo(checkpoint)
        else:
            checkpoint.write_bytes(content if damage == "changed" else content[:-100])
        capfd.readouterr()
        assert run(LocalTransport(), options(None, output, resume=True)) == 0
        said = capfd.readouterr().err
        assert f"{checkpoint}: {why}" in said
        assert said.count("; going through scenario 0 from its first round") == 1
        assert_same_results(tmp_path / "whole.h5", output)


def test_a_folder_in_the_way_of_a_checkpoint_is_named_with_the_fix(tmp_path, capfd):
    experiment, output = written(tmp_path, "sgd"), tmp_path / "r.h5"
    for name in ("r.h5.checkpoint", "r.h5.checkpoint.new"):
        (tmp_path / name).mkdir()
        assert run(LocalTransport(), options(experiment, output, resume=True), StopAt(4)) == 2
        told = (
            f"{tmp_path / name}: cannot be written: Is a directory: remove the folder of that name"
        )
        assert told in capfd.readouterr().err
        (tmp_path / name).rmdir()
    assert run(LocalTransport(), options(None, output, resume=True)) == 0


def test_pipes_of_the_runs_own_names_are_not_waited_for(tmp_path):
    experiment, output = written(tmp_path, "sgd"), tmp_path / "r.h5"
    for ending in ("creating", "checkpoint.new"):
        os.mkfifo(tmp_path / f"r.h5.{ending}")
    assert run(LocalTransport(), options(experiment, output), StopAt(4)) == EXIT_STOPPED
    assert run(LocalTransport(), options(None, output, resume=True)) == 0


def test_what_links_of_the_runs_own_names_lead_to_is_left_alone(tmp_path):
    experiment, output = written(tmp_path, "sgd"), tmp_path / "r.h5"
    for ending in ("creating", "checkpoint.new"):
        (tmp_path / ending).write_text("mine")
        (tmp_path / f"r.h5.{ending}").symlink_to(tmp_path / ending)
    assert run(LocalTransport(), options(experiment, output), StopAt(4)) == EXIT_STOPPED
    assert run(LocalTransport(), options(None, output, resume=True)) == 0
    for ending in ("creating", "checkpoint.new"):
        assert (tmp_path / ending).read_text() == "mine"


def behind(tmp_path):
    """Leave a training, r.h5, whose checkpoint is some rounds older than its results."""
    experiment, output = written(tmp_path, "momentum"), tmp_path / "r.h5"
    checkpoint = tmp_path / "r.h5.checkpoint"
    assert run(LocalTransport(), options(experiment, output), StopAt(3)) == EXIT_STOPPED
    older = checkpoint.read_bytes()
    first = read_container(checkpoint, CHECKPOINT).content["round"]
    assert run(LocalTransport(), options(None, output, resume=True), StopAt(5)) == EXIT_STOPPED
    checkpoint.write_bytes(older)
    with open_results(output) as results:
        (scenario,) = results.scenarios
        assert 0 < first < scenario.committed - 1
        return first, scenario.committed


def test_rounds_that_are_gone_through_again_are_told(tmp_path, capfd):
    first, committed = behind(tmp_path)
    capfd.readouterr()
    resumed = options(None, tmp_path / "r.h5", resume=True)
    assert run(LocalTransport(), replace(resumed, progress="log")) == 0
    said = capfd.readouterr().err
    again = f"going through rounds {first} to {committed - 1} of scenario 0 again"
    assert f" {again}, from the checkpoint\n" in said
    assert "from its first round" not in said
    assert "9/9 rounds in" in said
    whole = tmp_path / "whole.h5"
    assert run(LocalTransport(), options(tmp_path / "e.yaml", whole)) == 0
    assert_same_results(whole, tmp_path / "r.h5")


def test_a_stop_while_rounds_are_gone_through_again_tells_what_is_committed(tmp_path, capfd):
    first, committed = behind(tmp_path)
    capfd.readouterr()
    stop = StopAt(2)
    assert run(LocalTransport(), options(None, tmp_path / "r.h5", resume=True), stop) == 75
    said = capfd.readouterr().err
    assert not stop.heeded  # a second signal interrupts no run that has stopped
    assert (
        f"stopped by SIGUSR2 in scenario 0, round {first + 1}, which is gone through again" in said
    )
    assert f"; {committed} of 9 rounds are committed; go on with: python -m testbed resume" in said


def test_nothing_is_said_of_a_checkpoint_that_nothing_depends_on(tmp_path, capfd):
    for name in ("probe", "momentum"):
        folder = tmp_path / name
        folder.mkdir()
        output = folder / "r.h5"
        experiment = written(folder, name)
        after = 1 if name == "probe" else 0  # in the first round there is nothing to go through
        assert run(LocalTransport(), options(experiment, output), StopAt(after)) == EXIT_STOPPED
        (folder / "r.h5.checkpoint").unlink(missing_ok=True)
        capfd.readouterr()
        assert run(LocalTransport(), options(None, output, resume=True)) == 0
        assert capfd.readouterr().err == ""


def test_an_unfinished_file_with_the_name_of_a_complete_one_is_told_apart(tmp_path):
    experiment = written(tmp_path, "sgd")
    output, other = tmp_path / "r.h5", tmp_path / "c.h5"
    assert run(LocalTransport(), options(experiment, output), StopAt(3)) == EXIT_STOPPED
    partial = tmp_path / "r.h5.partial"
    with open_results(output) as results:
        found = f"incomplete ({results.scenarios[0].committed} of 9 rounds), but it has the name"
    lines = [["resume", other], ["run", experiment, "-o", other, "--resume"]]
    other.symlink_to(partial)
    for line in lines:
        done = run_here(*line)
        assert done.status == 2
        assert f"error: {other}: {found}" in done.err
        assert done.err.endswith(f"it is a link: resume {output}\n")
    other.unlink()
    partial.rename(other)
    for line in lines:
        done = run_here(*line)
        assert done.status == 2
        assert f"error: {other}: {found}" in done.err
        assert f"rename it c.h5.partial, and its checkpoint {other.name}.checkpoint" in done.err
    other.rename(tmp_path / "c.h5.partial")
    (tmp_path / "r.h5.checkpoint").rename(tmp_path / "c.h5.checkpoint")
    done = run_here("resume", other, "--progress", "none")
    assert (done.status, done.err) == (0, "")


def test_what_a_killed_run_left_beside_its_complete_file_is_removed(tmp_path):
    experiment = written(tmp_path, "sgd")
    for line in (["resume", "r.h5"], ["run", experiment, "-o", "r.h5", "--resume"]):
        assert run_here("run", experiment, "-o", "r.h5", "--overwrite", cwd=tmp_path).status == 0
        for left in ("checkpoint", "checkpoint.new", "pretrained"):
            (tmp_path / f"r.h5.{left}").write_bytes(b"old")
        done = run_here(*line, cwd=tmp_path)
        assert (done.status, done.err) == (0, "r.h5: the run is complete\n")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["e.yaml", "r.h5"]


def test_a_stop_tells_the_command_that_goes_on(tmp_path, capfd):
    experiment, output = written(tmp_path, "sgd"), tmp_path / "of mine.h5"
    overrides = ["results.commit_seconds=60", "federation.rounds=8"]
    first = replace(options(experiment, output), overrides=overrides, deadline=2.5)
    over = " in place of --overwrite"
    command = f"python -m testbed resume '{output}' results.commit_seconds=60 --deadline 2.5\n"
    for start, lead in (
        (first, "go on with the same command and --resume, or: "),
        (replace(first, overwrite=True), f"go on with the same command and --resume{over}, or: "),
        (replace(first, resume=True), "go on with the same command, or: "),
        (replace(first, resume=True, experiment=None), "go on with: "),
    ):
        assert run(LocalTransport(), start, StopAt(1)) == EXIT_STOPPED
        assert capfd.readouterr().err.endswith(f"; {lead}{command}")


def test_a_file_that_another_run_has_made_meanwhile_is_left_alone(tmp_path, monkeypatch, capfd):
    experiment, output = write_experiment(tmp_path / "e.yaml"), tmp_path / "r.h5"
    load = Setups.load_data

    def slowly(self, plans):
        load(self, plans)
        output.write_text("another's")

    monkeypatch.setattr(Setups, "load_data", slowly)
    assert run(LocalTransport(), options(experiment, output, resume=True), StopAt(99)) == 2
    assert "r.h5: another run has made this file meanwhile: the same line" in capfd.readouterr().err
    assert output.read_text() == "another's"


def test_a_replay_of_an_unfinished_run_cannot_be_resumed(tmp_path):
    experiment = write_experiment(tmp_path / "e.yaml")
    assert run(LocalTransport(), options(experiment, tmp_path / "r.h5"), StopAt(3)) == 75
    replay(tmp_path / "r.h5", tmp_path / "new.h5", ["idlg"])
    done = run_here("resume", tmp_path / "new.h5")
    assert done.status == 2
    assert "new.h5: a replay of an unfinished run (3 of 6 rounds), which cannot go on" in done.err


def test_data_that_have_moved_are_told_how_to_find(tmp_path):
    rng = np.random.default_rng(1)
    (tmp_path / "data").mkdir()
    np.savez(
        tmp_path / "data" / "own.npz",
        images=rng.integers(0, 256, (400, 1, 8, 8), dtype=np.uint8),
        labels=np.arange(400) % 10,
    )
    experiment = write_experiment(tmp_path / "e.yaml", data={"name": "npz", "root": "data/own.npz"})
    with contextlib.chdir(tmp_path):
        assert run(LocalTransport(), options(experiment, tmp_path / "r.h5"), StopAt(3)) == 75
    (tmp_path / "elsewhere").mkdir()
    done = run_here("resume", "../r.h5", cwd=tmp_path / "elsewhere")
    assert done.status == 2
    assert "data.root: the run was begun with data/own.npz, which does not exist" in done.err
    assert f"from the current folder {tmp_path / 'elsewhere'}: give its place as data.root=DIR" in (
        done.err
    )
    done = run_here("resume", "../r.h5", "data.root=../none.npz", cwd=tmp_path / "elsewhere")
    assert done.status == 2
    assert "none.npz does not exist" in done.err
    done = run_here("resume", "../r.h5", "data.root=../data/own.npz", cwd=tmp_path / "elsewhere")
    assert done.status == 0, done.err


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


def test_trained_models_that_are_damaged_are_trained_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("testbed.pretraining._STEPS_AT_ONCE", 1)
    experiment, output = written(tmp_path, "pretrained"), tmp_path / "r.h5"
    assert run(LocalTransport(), options(experiment, output), StopAt(1)) == EXIT_STOPPED
    models = tmp_path / "r.h5.pretrained"
    models.write_bytes(models.read_bytes()[:-100])
    capfd.readouterr()
    assert run(LocalTransport(), options(None, output, resume=True)) == 0
    told = f"{models}: truncated or damaged (pretrained models): the checksum is wrong; training"
    assert capfd.readouterr().err == f"{told} them again\n"


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
    done = run_testbed("resume", f"{output}.partial", "results.commit_seconds=0", "title=other")
    assert done.status == 0, done.err
    with h5py.File(output) as file:
        assert yaml.safe_load(file.attrs["experiment"])["results"]["commit_seconds"] == 3600
        assert file.attrs["title"] == "a test"
        assert np.all(file["committed_rounds"][...] == 9)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sweep": {"federation.batch_size": [8, 16]}}, "sweep.federation.batch_size is absent "
         "there, and [8, 16] now"),
        ({"attacks": ["random", "ilrg"]}, "attacks: llg only there; ilrg only now"),
        ({"attacks": ["random"]}, "attacks: llg only there;"),
        ({"attacks": ["llg", "random"]}, "the order of attacks is random, llg there, and llg, "
         "random now"),
        ({"attacks": ["random", {"name": "llg_star", "label": "llg"}]}, "attacks.llg.name is 'llg' "
         "there, and 'llg_star' now"),
        ({"attacks": ["random", {"name": "llg_star", "dummy": "zeros"}]}, "attacks: llg only "
         "there; llg_star only now"),
        ({"defenses": [{"name": "noise", "sigma": 0.1}]}, "defenses: noise only now;"),
        ({"seed": 8}, "seed is 7 there, and 8 now"),
    ],
)  # fmt: skip
def test_another_experiment_is_told_by_what_differs(tmp_path, changes, expected):
    before = {"attacks": ["random", "llg"]}
    begun = load_experiment(write_experiment(tmp_path / "a.yaml", **before)).to_yaml()
    wanted = load_experiment(write_experiment(tmp_path / "b.yaml", **{**before, **changes}))
    with pytest.raises(UserError) as found:
        check_same(tmp_path / "r.h5", begun, wanted)
    assert f": the run was begun with another experiment: {expected}" in str(found.value)
    assert len(str(found.value)) < 300 + len(str(tmp_path))
    check_same(tmp_path / "r.h5", wanted.to_yaml(), wanted)


def test_of_two_defences_with_one_name_the_one_that_differs_is_told(tmp_path):
    two = [{"name": "noise", "sigma": 0.1}, {"name": "noise", "sigma": 0.2}]
    begun = load_experiment(write_experiment(tmp_path / "a.yaml", defenses=two)).to_yaml()
    two[1]["sigma"] = 0.3
    wanted = load_experiment(write_experiment(tmp_path / "b.yaml", defenses=two))
    with pytest.raises(UserError, match=r"defenses.noise'.sigma is 0.2 there, and 0.3 now"):
        check_same(tmp_path / "r.h5", begun, wanted)
