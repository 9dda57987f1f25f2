"""What is to be run: it is what `testbed run` would be told."""

import argparse

import pytest
from launching import write_experiment

from launch.asked import add_run, read_run
from testbed.__main__ import _parser
from testbed.errors import UserError

TRAINING = {"rounds": 6, "clients": 3, "batch_size": 8, "algorithm": "fedsgd"}


def asked(*arguments):
    parser = argparse.ArgumentParser()
    add_run(parser)
    return read_run(parser.parse_args([*map(str, arguments)]))


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Write an experiment into the current folder."""
    monkeypatch.chdir(tmp_path)
    write_experiment(tmp_path / "e.yaml")
    return "e.yaml"


def test_the_testbed_is_told_what_the_launcher_was(experiment):
    given = ["seed=3", "--on-rank-loss", "continue", "--deadline", "2.50"]
    found = asked(experiment, *given, "-o", "r.h5")
    told = _parser().parse_args(["run", *found.words, "-o", str(found.output)])
    assert (str(told.experiment), told.overrides, told.output) == ("e.yaml", ["seed=3"], "r.h5")
    assert (told.on_rank_loss, told.deadline, told.profile) == ("continue", 2.5, None)
    assert found.tolerant
    assert list(asked(experiment).words) == ["e.yaml"]
    assert not asked(experiment).tolerant


def test_a_profile_is_handed_on_and_applied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = {"federation.batch_size": [1, 2, 4]}
    write_experiment(tmp_path / "e.yaml", profiles={"wide": {"sweep": sweep}})
    found = asked("e.yaml", "--profile", "wide")
    assert list(found.words) == ["e.yaml", "--profile", "wide"]
    assert (found.scenarios, asked("e.yaml").scenarios) == (3, 1)


def test_results_are_named_like_the_experiment_in_the_current_folder(experiment, tmp_path):
    (tmp_path / "folder").mkdir()
    write_experiment(tmp_path / "folder/other.v2.yaml")
    assert str(asked("folder/other.v2.yaml").output) == "other.v2.h5"
    # A run that goes on is named as it will be in the end.
    assert str(asked(experiment, "-o", "r.h5.partial").output) == "r.h5"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("e.yaml", "e.yaml: this is the experiment file"),
        ("r.checkpoint", "choose another name"),
        ("folder", "folder: this is a folder"),
        ("", "found an empty name"),
    ],
)
def test_a_name_that_no_results_can_have_is_an_error(experiment, tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=message):
        asked(experiment, "-o", name)


def test_what_may_be_otherwise_on_another_machine_is_no_error(experiment, tmp_path):
    assert list(asked(experiment).problem) == []
    (problem,) = asked(experiment, "-o", "absent/r.h5").problem
    assert problem == "absent/r.h5: the folder absent does not exist: create it first"
    write_experiment(tmp_path / "m.yaml", data={"name": "mnist"})
    (problem,) = asked("m.yaml").problem
    assert problem.endswith("set data.root=FOLDER")
    assert list(asked("m.yaml", "data.root=DIR").problem) == []


def test_no_more_ranks_have_work_than_a_round_has_clients(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_experiment(tmp_path / "t.yaml", federation=TRAINING, compute={"threads": 2})
    assert (asked("t.yaml").most_ranks, asked("t.yaml").threads) == (4, 2)
    write_experiment(
        tmp_path / "s.yaml", federation=TRAINING, sweep={"federation.clients": [2, 5, 1]}
    )
    assert (asked("s.yaml").most_ranks, asked("s.yaml").scenarios) == (6, 3)
    # Repetitions with models of their own are under way side by side, as many as there are ranks.
    mixed = {"federation.fresh_model": [True, False]}
    write_experiment(tmp_path / "f.yaml", federation=TRAINING, sweep=mixed)
    assert asked("f.yaml").most_ranks is None


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_deadline_is_a_time(experiment, seconds, capsys):
    with pytest.raises(SystemExit):
        asked(experiment, f"--deadline={seconds}")
    assert f"found '{seconds}', expected seconds above 0" in capsys.readouterr().err
