"""The shell scripts: what a checker says of them, and what they say where something is missing."""

import os
import re
import shutil
import signal
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


def test_arrays_that_may_be_empty_are_guarded():
    """Before Bash 4.4 they count as not set."""
    never_empty = {"start", "todo"}
    for script in ("slurm/job.sh", "slurm/run.sbatch", "slurm/sweep.sbatch", "launch/mpirun"):
        used = re.findall(r'(?<!\+)"\$\{(\w+)\[@\]\}"', (ROOT / script).read_text())
        assert set(used) <= never_empty, script


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
        return subprocess.run(
            line, env=env, cwd=tmp_path, capture_output=True, text=True, start_new_session=True
        )

    # What srun was asked for, in place of starting it.
    told = 'printf "%s\\n" srun "$@" "export $SLURM_EXPORT_ENV"; touch e.h5'
    program("srun", f"{LISTED}; {told}")
    program("scontrol", "exit 1")
    run.program = program
    return run


@pytest.mark.parametrize(
    ("words", "settings", "said"),
    [
        ((), {}, "error: which experiment? sbatch slurm/run.sbatch FILE.yaml"),
        (("none.yaml",), {}, "error: none.yaml: no such file, seen from"),
        (("e.yaml", "f.yaml"), {}, "error: found f.yaml behind e.yaml, expected key=value"),
        (("e.yaml", "-o"), {}, "error: -o wants a file name"),
        (
            ("e.yaml",),
            {"SLURM_ARRAY_TASK_ID": "3"},
            "error: this is for one job: slurm/sweep.sbatch is for arrays",
        ),
        *(
            (
                ("e.yaml",),
                {"TESTBED_MAX_REQUEUES": number},
                f"error: TESTBED_MAX_REQUEUES={number}: expected a number",
            )
            for number in ("many", "-1", "1e3", "9" * 20)
        ),
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


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--time", ("e.yaml", "--time", "1:00")),
        ("--nodes", ("--nodes", "2", "e.yaml")),
        ("-n", ("e.yaml", "-n", "2")),
        # Abbreviated, which `testbed run` would take for the output; and misspelt.
        ("--out=x.h5", ("e.yaml", "--out=x.h5")),
        ("--progess=none", ("e.yaml", "--progess=none")),
    ],
)
def test_options_that_are_not_those_of_a_run_are_told(batch, option, words):
    done = batch("run.sbatch", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: unknown option {option}: those of sbatch go before slurm/run.sbatch, those of "
        "`testbed run` behind it, in full\n"
    )


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


def test_a_folder_of_the_name_is_not_the_testbed(batch, tmp_path):
    (tmp_path / "testbed").mkdir()
    modules = tmp_path / "modules"
    modules.mkdir()
    for name in ("h5py.py", "pydantic.py"):
        (modules / name).touch()
    # Without the packages of this Python, among them the testbed.
    batch.program("python", f'PYTHONPATH="{modules}" exec "{sys.executable}" -S "$@"')
    done = batch("run.sbatch", "e.yaml", TESTBED_VENV=str(tmp_path))
    assert done.returncode == 2
    assert "error: no Python with the testbed on" in done.stderr


def test_arguments_go_to_the_testbed_as_they_are(batch, tmp_path):
    (tmp_path / "seed=3").mkdir()
    experiment = shutil.copy(tmp_path / "e.yaml", tmp_path / "seed=3")
    words = ["--profile", "reduced", experiment, "title=a b", "sweep.seed=[1, 2]", "-o", "e.h5"]
    words += ["--progress=log", "--deadline=5", "--on-rank-loss=end", "--share=0/1", "--resume"]
    done = batch("run.sbatch", *words, SLURM_CPUS_PER_TASK="3", TESTBED_SRUN_ARGUMENTS="-c 1 -v")
    assert done.returncode == 0, done.stderr
    step = ["srun", "--cpu-bind=cores", "--mpi=pmix", "--cpus-per-task=3", "-c", "1", "-v"]
    run = ["python", "-m", "testbed", "run", experiment, "-o", "e.h5", "--resume"]
    rest = ["--profile", "reduced", "title=a b", "sweep.seed=[1, 2]", *words[7:]]
    assert done.stdout.splitlines() == [*map(str, [*step, *run, *rest]), "export ALL"]


def test_another_plugin_of_srun_can_be_asked_for(batch):
    batch.program("srun", '[ "$1" = --mpi=list ] && echo pmi2 && exit; echo "$*"; touch e.h5')
    settings = {"TESTBED_LAUNCHER": "srun", "TESTBED_SRUN_ARGUMENTS": "--mpi=pmi2"}
    done = batch("run.sbatch", "e.yaml", "-oe.h5.partial", **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("--cpu-bind=cores --mpi=pmi2 python -m testbed run e.yaml")


# Asks for the job to be stopped: as Slurm does when the time is nearly up.
WARN = 'kill -USR1 "$(sed -n "s/^PPid:\\t//p" /proc/$$/status)"; sleep 1'
# The end of all processes of the job's script but itself, which hears of it.
END = "kill -TERM 0; sleep 1"
LISTED = '[ "$1" = --mpi=list ] && echo pmix && exit'
# Has the job for running, and ends its script where it is to be queued again, as Slurm does.
ALIVE = (
    'echo "$*" >>said; case $1 in show) echo "JobState=RUNNING Reason=None" ;; '
    "requeue) kill -TERM $PPID ;; esac"
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        # While the modules of the site are loaded, and while srun creates the step.
        ("python", WARN),
        ("srun", f"{LISTED}; trap : USR1; {WARN}; exit $SLURM_EXIT_ERROR"),
        # By the run itself; and by the launcher, for ranks that it met while they were starting.
        ("srun", f"{LISTED}; exit 75"),
        ("srun", f"{LISTED}; {WARN}"),
        # A launcher that forgets of them that they were ended.
        ("srun", f"{LISTED}; trap : USR1; {WARN}; exit 0"),
        # All processes of the job are told: while Python is looked for, and PMIx.
        ("python", END),
        ("srun", f'[ "$1" = --mpi=list ] || exit 1; {END}'),
    ],
)
def test_a_warning_at_any_moment_queues_the_job_again(batch, tmp_path, name, text):
    batch.program(name, text)
    batch.program("scontrol", ALIVE)
    done = batch("run.sbatch", "e.yaml", TESTBED_VENV=str(tmp_path), TESTBED_LAUNCHER="srun")
    assert done.returncode == -signal.SIGTERM, done.stderr  # as Slurm ends what it queues again
    assert "into the queue again, for the 1. time of 20 at most" in done.stderr
    assert (tmp_path / "said").read_text() == "show job 7\nrequeue 7\n"


@pytest.mark.parametrize("end", ["exit 0", "exit 1", "exit 137", f"trap : TERM; {END}; exit 143"])
def test_a_run_that_is_ended_as_the_job_is_preempted_queues_again(batch, tmp_path, end):
    """Slurm tells the steps alone; where mpirun is the launcher, one is a daemon of its own."""
    batch.program("srun", f"{LISTED}; {end}")
    batch.program("scontrol", ALIVE.replace("Reason=None", "PreemptTime=2026-11-26T20:00:00"))
    done = batch("run.sbatch", "e.yaml")
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert (tmp_path / "said").read_text().endswith("requeue 7\n")


@pytest.mark.parametrize(
    ("state", "status", "text"),
    [
        ("CANCELLED", 75, "exit 75"),
        ("RUNNING", 1, "exit 1"),
        ("RUNNING", 2, f"trap : USR1; {WARN}; exit 2"),
        ("RUNNING", 137, "exit 137"),
        ("RUNNING PreemptTime=2026-11-26T20:00:00", 2, "exit 2"),
        ("RUNNING PreemptTime=2026-11-26T20:00:00 SuspendTime=2026-11-26T20:00:00", 1, "exit 1"),
        ("RUNNING PreemptEligibleTime=2026-11-26T20:00:00 PreemptTime=None", 1, "exit 1"),
        # It was asked to, and was complete by then.
        ("RUNNING", 0, f"trap : USR1; {WARN}; touch e.h5"),
    ],
)
def test_other_ends_do_not(batch, tmp_path, state, status, text):
    batch.program("srun", f"{LISTED}; {text}")
    batch.program("scontrol", f'echo "$*" >>said; echo "JobState={state} Reason=None"')
    done = batch("run.sbatch", "e.yaml")
    assert done.returncode == status, done.stderr
    said = tmp_path / "said"
    assert not said.exists() or "requeue" not in said.read_text()


@pytest.mark.parametrize("silent", [4, 5])
def test_a_controller_that_restarts_is_asked_again(batch, tmp_path, silent):
    batch.program("sleep", 'echo "$1" >>slept')  # does not
    batch.program("srun", f"{LISTED}; exit 75")
    batch.program("scontrol", f"[ $(wc -l <slept) -le {silent} ] && exit 1; {ALIVE}")
    done = batch("run.sbatch", "e.yaml")
    slept = (tmp_path / "slept").read_text().split()
    assert slept[:5] == ["0", "2", "10", "20", "40"]
    said = "the controller does not answer: not queued again; the same sbatch line goes on"
    if silent < 5:
        assert done.returncode == -signal.SIGTERM, done.stderr
        assert (tmp_path / "said").read_text() == "show job 7\nrequeue 7\n"
        assert said not in done.stderr
    else:
        assert done.returncode == 75, done.stderr
        assert said in done.stderr
        assert len(slept) == 5


def test_an_element_of_an_array_is_queued_again_alone(batch, tmp_path):
    """Its number may be that of the whole array."""
    batch.program("srun", f"{LISTED}; exit 75")
    batch.program("scontrol", ALIVE)
    ends = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "1"}
    element = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    batch("sweep.sbatch", "e.yaml", **element, **ends)
    assert (tmp_path / "said").read_text() == "show job 7_1\nrequeue 7_1\n"


def test_a_job_does_not_queue_again_for_ever(batch, tmp_path):
    batch.program("srun", f"{LISTED}; exit 75")
    batch.program("scontrol", 'echo "$*" >>said; echo "JobState=RUNNING"')
    settings = {"TESTBED_MAX_REQUEUES": "3", "SLURM_RESTART_COUNT": "3"}
    done = batch("run.sbatch", "e.yaml", **settings)
    assert done.returncode == 75
    assert "not queued again: it was 3 times (TESTBED_MAX_REQUEUES)" in done.stderr
    assert (tmp_path / "said").read_text() == "show job 7\n"


def test_what_a_site_sets_may_read_what_is_not_set(batch, tmp_path):
    shutil.copytree(ROOT / "slurm", tmp_path / "site/slurm")
    with (tmp_path / "site/slurm/env.sh").open("a") as file:
        file.write('export OF_THE_SITE="$NOWHERE_SET"\n')
    done = batch("run.sbatch", "e.yaml", TESTBED_ROOT=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr


def test_a_launcher_that_says_that_all_is_well_is_not_believed(batch):
    done = batch("run.sbatch", "e.yaml", "-o", "other.h5")
    assert done.returncode == 1
    assert "srun says that all is well, but other.h5 is not complete" in done.stderr


def test_a_share_has_a_file_of_its_own(batch):
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    ends = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "7"}
    done = batch("sweep.sbatch", "e.yaml", **array, **ends)
    *_, output, resume, share, number, _ = done.stdout.splitlines()
    assert Path(output).name == "e_3of8.h5"
    assert [resume, share, number] == ["--resume", "--share", "3/8"]
    done = batch("sweep.sbatch", "e.yaml", **array, TESTBED_SHARES="4")
    assert done.stdout.splitlines()[-2] == "3/4"


@pytest.mark.parametrize(
    ("words", "settings", "said"),
    [
        ((), {"SLURM_ARRAY_TASK_ID": ""}, "this is for a job array"),
        (
            (),
            {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "8"},
            "elements count from 0: --array 0-7; for some of the shares alone, set TESTBED_SHARES",
        ),
        ((), {"TESTBED_SHARES": "abc"}, "TESTBED_SHARES=abc: expected a number"),
        ((), {"TESTBED_SHARES": "3"}, "element 3 of TESTBED_SHARES=3: elements count from 0"),
        (("--share", "0/2"), {}, "--share is what each element of the array gets by itself"),
        (("--share=0/2",), {}, "--share is what each element of the array gets by itself"),
        (
            ("--mem=8G",),
            {},
            "unknown option --mem=8G: those of sbatch go before slurm/sweep",
        ),
    ],
)
def test_what_does_not_go_with_an_array_is_told(batch, words, settings, said):
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    ends = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "7"}
    done = batch("sweep.sbatch", "e.yaml", *words, **{**array, **ends, **settings})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {said}")


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
