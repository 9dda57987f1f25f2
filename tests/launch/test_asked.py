"""What is to be run: it is what `testbed run` would be told."""

import argparse
import subprocess
from pathlib import Path

import pytest
from launching import run_here, write_experiment

from launch.asked import add_run, read_run, share_output, shown_output
from testbed.__main__ import _parser
from testbed.errors import UserError

ROOT = Path(__file__).parents[2]
TRAINING = {"rounds": 6, "clients": 3, "batch_size": 8, "algorithm": "fedsgd"}


def asked(*arguments, shares=None):
    parser = argparse.ArgumentParser()
    add_run(parser)
    return read_run(parser.parse_args([*map(str, arguments)]), shares)


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
    assert list(asked("m.yaml", "data.root=.").problem) == []
    others = ("adversary.auxiliary_data=mnist", "adversary.auxiliary_root=gone")
    assert list(asked("m.yaml", "sweep.data.root=[., a, b, a]", *others).problem) == [
        "adversary.auxiliary_root=gone does not exist: expected the data there",
        "data.root=a does not exist: expected the data there",
        "data.root=b does not exist: expected the data there",
    ]


def test_data_without_a_place_are_nowhere(experiment, tmp_path):
    with pytest.raises(
        UserError, match=r"'mnist' is read from a folder .*: set data\.root=FOLDER$"
    ):
        asked(experiment, "data.name=mnist")


SWEEP = {"federation.batch_size": [1, 2, 4]}
SMALL = {"federation": {"rounds": 1, "clients": 1, "batch_size": 2}, "attacks": ["random"]}


def test_what_is_complete_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_experiment(tmp_path / "e.yaml", **SMALL, sweep=SWEEP)
    assert not asked("e.yaml").complete
    assert run_here("run", "e.yaml", "-o", "e.h5").status == 0
    assert asked("e.yaml").complete
    assert not asked("e.yaml", shares=2).complete
    assert run_here("run", "e.yaml", "-o", "e_0of4.h5", "--share", "0/4").status == 0
    assert not asked("e.yaml", shares=4).complete
    for index in (1, 2):
        assert not asked("e.yaml", shares=4).complete
        run_here("run", "e.yaml", "-o", f"e_{index}of4.h5", "--share", f"{index}/4")
    # The fourth share has no scenario.
    assert asked("e.yaml", shares=4).complete
    # What is done takes no data.
    assert list(asked("e.yaml", "data.root=absent").problem) == []


def test_results_of_another_run_are_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_experiment(tmp_path / "e.yaml", **SMALL, sweep=SWEEP)
    assert run_here("run", "e.yaml", "-o", "e_1of2.h5", "--share", "1/2").status == 0
    assert not asked("e.yaml", shares=2).complete
    with pytest.raises(UserError, match=r"^e_1of2\.h5: the run was begun with another experiment"):
        asked("e.yaml", "seed=8", shares=2)
    with pytest.raises(UserError, match=r"^e_1of2\.h5: the file has the share 1/2"):
        asked("e.yaml", "-o", "e_1of2.h5")
    (tmp_path / "e.h5").write_text("something else")
    with pytest.raises(UserError, match=r"^e\.h5: this is no HDF5 file"):
        asked("e.yaml")


@pytest.mark.parametrize("name", ["r.h5", "deep/er/r.h5", "r", "r.h5.h5", "a b.h5"])
def test_shares_are_named_as_the_script_names_them(name):
    lines = (ROOT / "slurm/sweep.sbatch").read_text().splitlines()
    (naming,) = [line for line in lines if line.startswith("output=")]
    said = subprocess.run(
        ["bash", "-c", f'SLURM_ARRAY_TASK_ID=3 TESTBED_SHARES=16\n{naming}\necho "$output"'],
        env={"output": name},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(share_output(Path(name), 3, 16)) == said.rstrip("\n")
    assert shown_output(Path(name), 16) == said.rstrip("\n").replace("_3of16", "_*of16")
    assert share_output(Path(name), 0, None) == Path(name)
    assert shown_output(Path(name), None) == name


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


@pytest.mark.parametrize("seconds", [1234567, 0.1234567, 1e-7, 3600.0])
def test_a_deadline_is_handed_on_to_the_last_digit(experiment, seconds):
    *_, name, told = asked(experiment, "--deadline", seconds).words
    assert (name, float(told)) == ("--deadline", seconds)


def test_a_run_goes_on_whether_it_is_told_so_or_not(experiment):
    assert list(asked(experiment, "--resume").words) == ["e.yaml"]
