"""The command line: what it prints, how fast, and what it does without."""

import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from launching import command, environment, finish, run_here, run_testbed, write_experiment

EXPERIMENTS = sorted(Path("launch/experiments").glob("*.yaml"))
# Makes a package impossible to import, as on a machine where it is not installed.
WITHOUT = (
    "import sys\n"
    "for name in {names}: sys.modules[name] = None\n"
    "sys.argv[0] = {module!r}\n"
    "import runpy; runpy.run_module({module!r}, run_name='__main__')\n"
)


def without(names, module, *arguments):
    """Run a module as a program on a machine that lacks some packages."""
    code = WITHOUT.format(names=names, module=module)
    return finish([sys.executable, "-c", code, *map(str, arguments)])


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_that_comes_with_the_testbed_is_valid(experiment):
    done = run_here("check", experiment)
    assert done.status == 0, done.err
    assert "scenarios" in done.out


def test_check_prints_the_plan_without_torch_and_mpi():
    done = without(
        ["torch", "mpi4py", "sklearn"],
        "testbed",
        *("check", "launch/experiments/mnist_batch_size.yaml", "data.root=DIR"),
    )
    assert done.status == 0, done.err
    figures = dict(line.split(maxsplit=1) for line in done.out.splitlines() if "  " in line[:15])
    assert figures["rounds"] == "1600"
    assert figures["updates"] == "1600"
    assert "labels.distribution=unbalanced, federation.batch_size=128" in done.out
    # 13,426 parameters of four bytes.
    assert "53.7 kB" in done.out


def seconds_used(*line):
    """Return the processor's time that a program takes, which the load of others hardly changes."""
    before = os.times()
    assert finish(line).status == 0
    after = os.times()
    used = after.children_user + after.children_system
    return used - before.children_user - before.children_system


def test_check_is_quick():
    line = command("check", "launch/experiments/mnist_batch_size.yaml", "data.root=DIR")
    finish(line)  # compiles what it imports, where that has not been done
    imports = seconds_used(sys.executable, "-c", "import numpy, pydantic, rich, yaml")
    # Measured: 0.6 s, 3 times what it has to import; PyTorch alone would take 11 times as much.
    assert seconds_used(*line) < 7 * imports


NEEDS_A_NAME = "expected that of a results file"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", f"found an empty name, {NEEDS_A_NAME}"),
        ("sub/", f"sub/: this is no name of a file, {NEEDS_A_NAME}"),
        ("here/", "here/: this is a folder, expected a results file"),
        ("here", "here: this is a folder, expected a results file"),
        ("..", "..: this is a folder, expected a results file"),
        (".partial", f".partial: this is no name of a file, {NEEDS_A_NAME}"),
        ("x" * 250, "no results file can have this name: File name too long"),
    ],
)
def test_a_name_that_no_results_file_can_have_is_one_error(tmp_path, name, expected):
    experiment = write_experiment(tmp_path / "e.yaml")
    (tmp_path / "here").mkdir()
    for line in (["run", experiment, "-o", name], ["resume", name]):
        done = run_here(*line, cwd=tmp_path)
        assert done.status == 2
        assert done.err.startswith("error: ")
        assert expected in done.err
        assert len(done.err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"e.yaml", "here"}


def test_a_name_with_partial_stands_for_the_results_file(tmp_path):
    experiment = write_experiment(tmp_path / "e.yaml")
    for name in ("a.h5.partial", "b.h5.partial.partial"):
        assert run_here("run", experiment, "-o", name, cwd=tmp_path).status == 0
    assert {path.name for path in tmp_path.iterdir()} == {"e.yaml", "a.h5", "b.h5"}


def test_names_of_what_runs_keep_beside_their_results_are_refused(tmp_path):
    experiment = write_experiment(tmp_path / "e.yaml")
    for ending in ("checkpoint", "pretrained", "creating", "working", "compact", "new"):
        for more in ([], ["--resume"], ["--overwrite"]):
            done = run_here("run", experiment, "-o", f"r.h5.{ending}", *more, cwd=tmp_path)
            assert done.status == 2
            assert f"error: r.h5.{ending}: names that end in .{ending} are" in done.err
            assert len(done.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [experiment]


def test_overwriting_replaces_results_alone(tmp_path):
    experiment = write_experiment(tmp_path / "e.yaml")
    (tmp_path / "link.yaml").symlink_to("e.yaml")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other.h5.partial").write_text("mine as well")
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["mine"] = [1, 2, 3]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for more in ([], ["--overwrite"], ["--resume"]):
        for name in ("e.yaml", "link.yaml", "./e.yaml"):
            done = run_here("run", experiment, "-o", name, *more, cwd=tmp_path)
            assert done.status == 2
            assert "this is the experiment file: choose another name" in done.err
    os.mkfifo(tmp_path / "pipe.h5")
    os.mkfifo(tmp_path / "half.h5.partial")
    for name, found in (("pipe.h5",) * 2, ("half.h5", "half.h5.partial")):
        done = run_here("run", experiment, "-o", name, "--overwrite", cwd=tmp_path)
        assert done.status == 2
        assert f"error: {found}: this is a device, a pipe or a socket" in done.err
        (tmp_path / found).unlink()
    for name, found in (("notes.txt",) * 2, ("data.h5",) * 2, ("other.h5", "other.h5.partial")):
        done = run_here("run", experiment, "-o", name, "--overwrite", cwd=tmp_path)
        assert done.status == 2
        assert f"error: {found}: this is no results file: it is not replaced" in done.err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_overwriting_replaces_results_that_are_damaged_and_files_that_are_empty(tmp_path):
    experiment = write_experiment(tmp_path / "e.yaml")
    line = ("run", experiment, "-o", tmp_path / "r.h5", "--overwrite")
    (tmp_path / "r.h5").touch()
    assert run_here(*line).status == 0
    whole = (tmp_path / "r.h5").read_bytes()
    (tmp_path / "r.h5").write_bytes(whole[: len(whole) // 2])
    assert run_here(*line).status == 0
    assert run_here(*line).status == 0
    with h5py.File(tmp_path / "r.h5") as file:
        assert file["committed_rounds"][...].tolist() == [6]


def test_sizes_that_only_running_tells_are_unknown(tmp_path):
    experiment = write_experiment(
        tmp_path / "e.yaml",
        data={"name": "npz", "root": str(tmp_path / "later.npz")},
        model={"name": "somewhere:Model"},
    )
    done = run_here("check", experiment)
    assert done.status == 0, done.err
    assert "results file  unknown (1 of 1 scenarios" in done.out


@pytest.mark.parametrize(
    ("observations", "commit_seconds"),
    # Few commits leave no waste, and as many as there are rounds leave most.
    [("summary", 3600), ("last_layer", 3600), ("full", 3600), ("full", 0)],
)
def test_the_promised_size_is_an_upper_bound_and_not_far_off(
    tmp_path, observations, commit_seconds
):
    experiment = write_experiment(
        tmp_path / "e.yaml",
        federation={"rounds": 60, "clients": 3, "batch_size": 8},
        results={"observations": observations, "commit_seconds": commit_seconds},
        sweep={"labels.distribution": ["balanced", "unbalanced"]},
    )
    done = run_here("check", experiment)
    line = next(line for line in done.out.splitlines() if line.startswith("results file"))
    number, unit = line.split("at most ")[1].split(" when complete")[0].split()
    promised = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    assert run_here("run", experiment, "-o", tmp_path / "r.h5").status == 0
    size = (tmp_path / "r.h5").stat().st_size
    assert promised / 5 < size <= promised * 1.005  # three digits are printed


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("attacks", ["random", "llg_star", "dummy=zeros", "auxiliary", "PoPETs 2022"]),
        ("models", ["cnn", "fcnn", "lenet", "resnet20", "package.module:callable"]),
        ("datasets", ["digits", "mnist", "cifar100", "npz", "3x32x32"]),
    ],
)
def test_list_needs_neither_torch_nor_mpi(kind, expected):
    done = without(["torch", "mpi4py", "sklearn"], "testbed", "list", kind)
    assert done.status == 0, done.err
    for word in expected:
        assert word in done.out
    assert "_config__" not in done.out


def test_a_run_without_torch_says_what_to_install(tmp_path):
    experiment = write_experiment(tmp_path / "e.yaml")
    done = without(["torch"], "testbed", "run", experiment, "-o", tmp_path / "r.h5")
    assert done.status == 2
    assert "pip install" in done.err
    assert "[run]" in done.err
    assert "Traceback" not in done.err


def test_ranks_without_mpi4py_say_what_to_install(tmp_path):
    experiment = write_experiment(tmp_path / "e.yaml")
    code = WITHOUT.format(names=["mpi4py"], module="testbed")
    line = [sys.executable, "-c", code, "run", str(experiment), "-o", str(tmp_path / "r.h5")]
    done = finish(line, env={**environment(), "PMIX_RANK": "0"})
    assert done.status == 2
    assert "mpi4py cannot be imported" in done.err
    assert "[run]" in done.err


def test_analysis_needs_neither_torch_nor_mpi(tmp_path):
    experiment = write_experiment(tmp_path / "e.yaml")
    assert run_here("run", experiment, "-o", tmp_path / "r.h5").status == 0
    missing = ["torch", "mpi4py", "sklearn"]
    for arguments in (["show"], ["table"], ["figures", "-o", str(tmp_path / "figures")]):
        done = without(missing, "analysis", arguments[0], tmp_path / "r.h5", *arguments[1:])
        assert done.status == 0, done.err
    figures = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert figures == {"r-rounds", "r-occurrences", "r-success"}


def test_a_folder_that_is_called_like_the_program_is_not_taken_for_it(tmp_path):
    (tmp_path / "testbed").mkdir()
    for program in (("testbed", "list", "models"), ("launch", "--help"), ("analysis", "--help")):
        (tmp_path / program[0]).mkdir(exist_ok=True)
        done = finish([sys.executable, "-m", *program], cwd=tmp_path)
        assert done.status == 0, done.err


def test_words_that_are_missing_and_options_that_are_cut_short_are_told():
    done = finish(command("run", "-o", "r.h5"))
    assert done.status == 2
    assert done.err.endswith("the following arguments are required: experiment\n")
    # What is written to another file than --output says would be lost on a batch script.
    done = finish(command("run", "e.yaml", "--out=r.h5"))
    assert done.status == 2
    assert "required: -o/--output" in done.err


def test_console_scripts_are_the_modules():
    folder = Path(sys.executable).parent
    for script in ("testbed", "analysis"):
        by_script = finish([str(folder / script), "--help"])
        by_module = finish([sys.executable, "-m", script, "--help"])
        assert by_script.status == by_module.status == 0
        assert by_script.out == by_module.out


def test_a_reader_that_goes_away_is_no_error():
    first = subprocess.run(
        f"{' '.join(command('list', 'attacks'))} | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert first.stdout.startswith("name")
    assert first.stderr == ""


@pytest.mark.mpi
def test_progress_in_a_log_is_lines_from_the_root_alone(tmp_path):
    experiment = write_experiment(tmp_path / "e.yaml")
    done = run_testbed("run", experiment, "-o", tmp_path / "r.h5", ranks=3)
    assert done.status == 0
    # What of the processors the ranks share depends on the machine.
    # Where rounds take their time, there are lines on the way.
    lines = [line for line in done.err.splitlines() if not re.search("rounds/(s|min|h)", line)]
    first, *_, title, last = lines
    assert "3 ranks on 1 host" in first
    assert title.endswith("a test: 6 rounds")
    assert "6/6 rounds in" in last
    assert sum(line.count(" rounds") for line in lines) == 2
    assert done.out == ""


@pytest.mark.mpi
def test_progress_on_a_terminal_is_one_live_line(tmp_path):
    """Run under a pseudo-terminal: mpirun's ranks find out through their parent."""
    experiment = write_experiment(tmp_path / "e.yaml")
    line = " ".join(command("run", experiment, "-o", tmp_path / "r.h5", ranks=2))
    done = finish(["script", "-qec", line, str(tmp_path / "typescript")])
    assert done.status == 0, done.out
    assert "6/6" in done.out
    assert "\x1b[" in done.out
    assert re.search("rounds/(s|min)", done.out)
