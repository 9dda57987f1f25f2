"""The command line of the launchers: what it takes, and what it does without."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import PATIENCE, environment, finish, write_experiment

from launch.__main__ import main

ROOT = Path(__file__).parents[2]
# As where a launcher was started by an interpreter that has no packages at all.
BARE = [sys.executable, "-S", "-m", "launch"]


def bare(*arguments, cwd=ROOT):
    """Run the program without any package but those of the repository."""
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    done = finish([*BARE, *map(str, arguments)], cwd=cwd, env=env)
    assert "Traceback" not in done.err
    return done


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Return the name of an experiment in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_experiment(tmp_path / "e.yaml")
    return "e.yaml"


def test_help_takes_no_packages():
    for arguments in ([], ["local"], ["slurm"], ["doctor"]):
        done = bare(*arguments, "--help")
        assert done.status == 0, done.err
        assert done.out.startswith(f"usage: {' '.join(['launch', *arguments])} [-h]")


def test_the_doctor_takes_no_packages_and_says_which_are_missing(tmp_path):
    done = bare("doctor", "--json", tmp_path)
    states = {finding["what"]: finding["state"] for finding in json.loads(done.out)}
    assert states["Python"] == "ok"
    # Where not even the testbed is installed, what it needs is not known.
    assert states.get("pydantic", "missing") == "missing"
    assert ("pydantic" in states) != ("packages" in states)
    assert done.status == int("missing" in states.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["local"], "the following arguments are required: experiment\n"),
        (["local", "-n", "two", "e.yaml"], "invalid int value: 'two'"),
        (["local", "e.yaml", "--nodes", "2"], "unrecognized arguments: --nodes"),
        (["doctor", ".", "elsewhere"], "unrecognized arguments: elsewhere"),
        (["doctor", "--patience", "long"], "found 'long': expected a number from 1 to 30"),
        (["doctor", "--patience", "nan"], "found 'nan': expected a number from 1 to 30"),
        (["slurm", "e.yaml", "--with", "ssh"], "invalid choice: 'ssh'"),
        (["slurm", "e.yaml", "--sbatch"], "--sbatch: expected one argument"),
        (["slurm", "e.yaml", "--array", "0-7"], "'0-7', expected how many: --array 8"),
        (["slurm", "e.yaml", "--array", "1,3"], "'1,3', expected how many: --array 16"),
        (["slurm", "e.yaml", "--array", "0-7%2"], "--array 8 --sbatch=--array=0-7%2\n"),
        # To sbatch they are not what these options begin with.
        (["slurm", "e.yaml", "--gpus", "4"], "unrecognized arguments: --gpus"),
        (["slurm", "e.yaml", "--ntasks", "4"], "unrecognized arguments: --ntasks"),
    ],
)
def test_wrong_arguments_are_told_with_the_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: launch")
    assert message in said


def test_wrong_arguments_are_told_without_packages():
    done = bare("local", "-n", "two", "e.yaml")
    assert done.status == 2
    assert "invalid int value" in done.err


def test_a_run_without_its_packages_is_one_line_that_says_how_to_install_them(experiment, tmp_path):
    for launcher in ("local", "slurm"):
        done = bare(launcher, experiment, "--dry-run", cwd=tmp_path)
        assert done.status == 2
        (line,) = done.err.splitlines()
        assert re.match(r"error: .* has no module \w+: .* pip install '\.\[run\]' in the", line)
        assert sys.executable in line


def test_a_module_of_its_own_that_is_missing_is_no_matter_of_the_user(experiment, monkeypatch):
    monkeypatch.setitem(sys.modules, "testbed.plan", None)
    with pytest.raises(ModuleNotFoundError, match="testbed"):
        main(["local", experiment])


def test_an_older_python_says_which_it_has_to_be():
    text = (ROOT / "launch/__init__.py").read_text()
    # In what Python 2 understands as well, as far as this one can tell.
    tree = ast.parse(text, feature_version=(3, 0))
    assert not any(isinstance(node, (ast.JoinedStr, ast.AnnAssign)) for node in ast.walk(tree))
    code = "import sys; sys.version_info = (3, 10, 9); import launch.doctor"
    done = finish([sys.executable, "-c", code], cwd=ROOT)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: found Python 3.")
    assert done.err.endswith(
        "expected 3.11 or newer: PYTHON=python3.12 launch/quickstart makes a .venv\n"
    )


def test_overrides_may_stand_anywhere(experiment, capsys):
    line = ["local", "seed=1", "-n", "1", "--dry-run", "federation.rounds=2"]
    assert main([line[0], experiment, *line[1:]]) == 0
    printed = capsys.readouterr().out
    assert " testbed run e.yaml seed=1 federation.rounds=2 -o e.h5 --resume" in printed


def test_errors_of_several_lines_are_lines(experiment, capsys):
    assert main(["local", experiment, "seed=x", "federation.rounds=-1"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert "seed" in first
    assert "federation.rounds" in second


def test_a_pipe_that_nobody_reads_is_no_traceback(experiment, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "launch", "local", "-n", "1", experiment, "--dry-run"],
            stdout=writing,
            stderr=subprocess.PIPE,
            env={**environment(), "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            timeout=PATIENCE,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_ctrl_c_is_no_traceback(experiment, monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.local.read_run", interrupted)
    assert main(["local", experiment]) == 130
    assert capsys.readouterr().err == ""
