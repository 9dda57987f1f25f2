"""The shell scripts: what a checker says of them, and what they say where something is missing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import write_experiment

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("slurm/*.s*", "launch/*", "tests/run", "tests/slurm/cluster", ".ci/run")
    for path in ROOT.glob(pattern)
    if path.is_file() and path.suffix != ".py"
)


def test_all_scripts_are_known():
    assert {"slurm/run.sbatch", "slurm/job.sh", "launch/mpirun", ".ci/run"} < set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_nothing_to_say(script):
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("there is no shellcheck here")
    line = [program, "--external-sources", f"--source-path={ROOT}", "--source-path=SCRIPTDIR"]
    done = subprocess.run([*line, ROOT / script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def batch(tmp_path):
    """Return a function that runs a batch script here, as if Slurm had started it."""
    write_experiment(tmp_path / "e.yaml")
    programs = tmp_path / "bin"
    programs.mkdir()

    def program(name, text):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)

    def run(script, *words, **settings):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TESTBED"))}
        env = {
            **kept,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "TESTBED_ROOT": str(ROOT),
            "TESTBED_VENV": str(Path(sys.executable).parents[1]),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "7",
            **settings,
        }
        line = ["bash", ROOT / "slurm" / script, *words]
        return subprocess.run(line, env=env, cwd=tmp_path, capture_output=True, text=True)

    # What srun was asked for, in place of starting it.
    program(
        "srun",
        '[ "$1" = --mpi=list ] && printf "MPI\\n\\tpmix\\n" && exit; echo "srun $*"; touch e.h5',
    )
    program("scontrol", "exit 1")
    run.program = program
    return run


@pytest.mark.parametrize(
    ("words", "settings", "said"),
    [
        ((), {}, "error: which experiment? sbatch slurm/SCRIPT FILE.yaml"),
        (("none.yaml",), {}, "error: none.yaml: no such file, seen from"),
        (("e.yaml", "f.yaml"), {}, "error: found f.yaml behind e.yaml, expected key=value"),
        (("e.yaml", "-o"), {}, "error: -o wants a file name"),
        (("e.yaml",), {"TESTBED_ROOT": "/"}, "error: there is no slurm/job.sh in /: submit from"),
        (("e.yaml",), {"TESTBED_LAUNCHER": "ssh"}, "TESTBED_LAUNCHER=ssh: expected srun or mpirun"),
        (
            ("e.yaml", "--on-rank-loss", "continue"),
            {"TESTBED_LAUNCHER": "srun"},
            "error: --on-rank-loss continue: srun ends all ranks when one dies",
        ),
    ],
)
def test_what_is_missing_is_told(batch, words, settings, said):
    done = batch("run.sbatch", *words, **settings)
    assert done.returncode == 2
    assert said in done.stderr
    assert "srun" not in done.stdout


def test_srun_without_pmix_is_told_with_the_fix(batch):
    batch.program("srun", 'printf "MPI plugin types are...\\n\\tnone\\n\\tpmi2\\n"')
    done = batch("run.sbatch", "e.yaml", TESTBED_LAUNCHER="srun")
    assert done.returncode == 2
    expected = "error: srun has no PMIx plugin, only: none pmi2: set TESTBED_LAUNCHER=mpirun"
    assert done.stderr == expected + "\n"


def test_a_python_without_the_testbed_is_told(batch, tmp_path):
    batch.program("python", "exit 1")
    done = batch("run.sbatch", "e.yaml", TESTBED_VENV=str(tmp_path))
    assert done.returncode == 2
    assert "error: no Python with the testbed on" in done.stderr


def test_arguments_go_to_the_testbed_as_they_are(batch, tmp_path):
    (tmp_path / "seed=3").mkdir()
    experiment = shutil.copy(tmp_path / "e.yaml", tmp_path / "seed=3")
    words = ("--profile", "reduced", experiment, "title=a b", "sweep.seed=[1, 2]", "-o", "e.h5")
    done = batch("run.sbatch", *words, SLURM_CPUS_PER_TASK="3", TESTBED_SRUN_ARGUMENTS="-c 1 -v")
    assert done.returncode == 0, done.stderr
    run = f"python -m testbed run {experiment} -o e.h5 --resume --profile reduced"
    started = f"srun --mpi=pmix --cpu-bind=cores --cpus-per-task=3 -c 1 -v {run} title=a b sweep.seed=[1, 2]\n"
    assert done.stdout == started


def test_a_launcher_that_says_that_all_is_well_is_not_believed(batch):
    done = batch("run.sbatch", "e.yaml", "-o", "other.h5")
    assert done.returncode == 1
    assert "srun says that all is well, but other.h5 is not complete" in done.stderr


def test_a_share_has_a_file_of_its_own(batch):
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    ends = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "7"}
    done = batch("sweep.sbatch", "e.yaml", **array, **ends)
    assert "-o " + str(Path(done.args[1]).parents[1]) not in done.stdout
    assert done.stdout.rstrip().endswith("e_3of8.h5 --resume --share 3/8")
    done = batch("sweep.sbatch", "e.yaml", **array, **{**ends, "SLURM_ARRAY_TASK_MAX": "9"})
    assert (done.returncode, done.stdout) == (2, "")
    done = batch("sweep.sbatch", "e.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "this is for a job array" in done.stderr


def test_the_errors_of_the_page_for_cluster_users_are_those_of_the_programs():
    page = (ROOT / "docs/cluster.md").read_text()
    shown = re.findall(r"^\| `([^`]+)` \|", page[page.index("## Errors") :], re.MULTILINE)
    assert len(shown) > 8
    files = [*ROOT.glob("slurm/*.s*"), *ROOT.glob("launch/*.py"), *ROOT.glob("testbed/**/*.py")]
    # Texts that go over several lines of Python are one.
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in files))
    for error in shown:
        pieces = re.split(r"\.\.\.|\d+|NODE|FILE\.h5", error)
        if not error.startswith("Sorry!"):  # Open MPI's
            assert max(pieces, key=len).strip() in source, error
