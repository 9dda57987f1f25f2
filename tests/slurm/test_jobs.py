"""The batch scripts on a real two-node cluster: started, shared out, warned, preempted, cut off."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import h5py
import pytest
from launching import assert_same_results, run_here, wait_until, write_experiment

from testbed.results.reader import open_results

# Error feedback: what the clients remember has to survive a stop too.
TRAINING = {
    "federation": {
        "rounds": 150,
        "clients": 4,
        "population": 6,
        "batch_size": 8,
        "algorithm": "fedavg",
        "local_steps": 2,
        "server": {"optimizer": "momentum"},
    },
    "model": {"name": "slow_model:Slow", "init": "torch"},
    "defenses": [{"name": "top_k", "theta": 0.9, "error_feedback": True}],
    "results": {"commit_seconds": 0.1, "checkpoint_seconds": 0.5},
}
# So that there is time to disturb it.
SLOWLY = {"SECONDS_PER_STEP": "0.02"}
PLACES = ("--nodes", "2", "--ntasks-per-node", "2")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return a folder with an experiment that takes its time, and its results without any."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(Path(__file__).parents[1] / "slow_model.py", folder)
    write_experiment(folder / "training.yaml", **TRAINING)
    done = run_here("run", "training.yaml", "-o", "undisturbed.h5", cwd=folder)
    assert done.status == 0, done.err
    return folder


@pytest.fixture
def training(cluster, undisturbed):
    """Return the experiment, copied with its results to where the cluster is used."""
    shutil.copytree(undisturbed, cluster.folder, dirs_exist_ok=True)
    return "training.yaml"


def committed(path):
    """Return how many rounds a results file has, complete or not."""
    with open_results(path) as results:
        return sum(scenario.committed for scenario in results.scenarios)


def begun(cluster, number, name="training.h5"):
    """Wait until a run has committed rounds and its first checkpoint."""
    cluster.until(cluster.folder / f"{name}.checkpoint", number)
    wait_until(lambda: committed(cluster.folder / name), pause=0.1)


def test_a_run_over_two_nodes_is_that_of_one_process_by_srun_and_by_mpirun(cluster):
    write_experiment(cluster.folder / "e.yaml")
    assert run_here("run", "e.yaml", "-o", "here.h5", cwd=cluster.folder).status == 0
    script = cluster.script("run.sbatch")
    numbers = {
        launcher: cluster.submit(
            *PLACES, script, "e.yaml", "-o", f"{launcher}.h5", TESTBED_LAUNCHER=launcher
        )
        for launcher in ("srun", "mpirun")
    }
    for launcher, number in numbers.items():
        (job,) = cluster.finish(number)
        assert job.state == "COMPLETED", job.log
        assert "4 ranks on 2 hosts: n1 (2), n2 (2); cpu" in job.log
        assert "Sorry!" not in job.log  # of PMIx, for modules that it does not have
        with open_results(cluster.folder / f"{launcher}.h5") as results:
            assert [rank.host for rank in results.ranks] == ["n1", "n1", "n2", "n2"]
            assert [rank.local_rank for rank in results.ranks] == [0, 1, 0, 1]
            assert all(rank.cores for rank in results.ranks)
            assert results.starts[0].slurm_job == number
        assert_same_results(cluster.folder / "here.h5", cluster.folder / f"{launcher}.h5")


def test_an_array_over_a_sweep_is_read_as_one_run(cluster):
    sweep = {"federation.batch_size": [2, 4, 8]}
    write_experiment(cluster.folder / "e.yaml", sweep=sweep)
    assert run_here("run", "e.yaml", "-o", "whole.h5", cwd=cluster.folder).status == 0
    launch = [sys.executable, "-m", "launch", "slurm", "e.yaml", "--array", "2"]
    done = cluster.call(*launch, "--ntasks-per-node", "2", "--time", "5", "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "18 of 18 rounds in 2 of 2 files" in done.stdout
    assert "2 completed" in done.stdout.splitlines()[-1]
    tables = [
        cluster.call(sys.executable, "-m", "analysis", "table", *files, "--format", "csv").stdout
        for files in (["whole.h5"], ["e_0of2.h5", "e_1of2.h5"])
    ]
    # All but the first column, which is the name of the file or files.
    whole, shared = ([row.partition(",")[2] for row in table.splitlines()] for table in tables)
    assert len(whole) > 3
    assert shared == whole
    with (
        h5py.File(cluster.folder / "whole.h5") as whole,
        h5py.File(cluster.folder / "e_1of2.h5") as share,
    ):
        counts = [
            file[f"scenarios/{name}/truth/counts"][...]
            for file, name in ((whole, "0001"), (share, "0000"))
        ]
        assert counts[0].tobytes() == counts[1].tobytes()


def test_elements_of_an_array_alone_want_to_know_of_how_many_shares_they_are(cluster):
    write_experiment(cluster.folder / "e.yaml", sweep={"federation.batch_size": [2, 4, 8]})
    script = cluster.script("sweep.sbatch")
    (job,) = cluster.finish(cluster.submit("--array", "1", script, "e.yaml"))
    assert job.state == "FAILED"
    assert "error: elements count from 0: --array 0-0; for some of the shares alone, set" in job.log
    (job,) = cluster.finish(cluster.submit("--array", "1", script, "e.yaml", TESTBED_SHARES="2"))
    assert job.state == "COMPLETED", job.log
    assert committed(cluster.folder / "e_1of2.h5") == 6


def test_jobs_whose_time_is_nearly_up_save_themselves_and_are_queued_again(cluster, training):
    """Elements of an array each by itself, also the one that has the number of the whole array."""
    write_experiment(cluster.folder / "e.yaml", **TRAINING, sweep={"seed": [1, 2]})
    # Slurm looks at the time of its jobs now and then, and may warn half a minute early: between 30
    # and 60 s after the start. The rounds of each run sleep for 60 s in all, on any machine.
    limits = ("--time", "2", "--signal", "B:USR1@60")
    script = cluster.script("run.sbatch")
    number = cluster.submit(*PLACES, *limits, script, training, SECONDS_PER_STEP="0.1")
    script = cluster.script("sweep.sbatch")
    places = ("--array", "0-1", "--ntasks", "2")
    array = cluster.submit(*places, *limits, script, "e.yaml", SECONDS_PER_STEP="0.05")
    names = ("e_0of2", "e_1of2")
    for share, name in enumerate(names):
        words = ("run", "e.yaml", "--share", f"{share}/2", "-o", f"undisturbed_{name}.h5")
        assert run_here(*words, cwd=cluster.folder).status == 0
    jobs = [*cluster.finish(number), *cluster.finish(array)]
    for job in jobs:
        assert job.state == "COMPLETED", job.log
        assert job.restarts >= 1
        assert "stopped by SIGUSR1" in job.log
        assert "into the queue again, for the 1. time of 20 at most" in job.log
    with open_results(cluster.folder / "training.h5") as results:
        assert {start.slurm_job for start in results.starts} == {number}
        assert len(results.starts) >= 2
    assert_same_results(cluster.folder / "undisturbed.h5", cluster.folder / "training.h5")
    for name in names:
        undisturbed = cluster.folder / f"undisturbed_{name}.h5"
        assert_same_results(undisturbed, cluster.folder / f"{name}.h5")
    assert not list(cluster.folder.glob("*.h5.*"))


def test_a_job_that_may_not_queue_again_says_how_it_goes_on(cluster, training):
    script = cluster.script("run.sbatch")
    settings = {"TESTBED_LAUNCHER": "mpirun", "TESTBED_MAX_REQUEUES": "0"}
    number = cluster.submit(*PLACES, script, training, **SLOWLY, **settings)
    begun(cluster, number)
    # What --signal does when the time is nearly up.
    assert cluster.call("scancel", "--batch", "--signal=USR1", number).returncode == 0
    (job,) = cluster.finish(number)
    assert (job.state, job.facts["ExitCode"], job.restarts) == ("FAILED", "75:0", 0)
    assert "not queued again: it was 0 times (TESTBED_MAX_REQUEUES); the same" in job.log
    (job,) = cluster.finish(cluster.submit(*PLACES, script, training))
    assert job.state == "COMPLETED", job.log
    assert_same_results(cluster.folder / "undisturbed.h5", cluster.folder / "training.h5")
    (again,) = cluster.finish(cluster.submit(*PLACES, script, training))
    assert again.state == "COMPLETED"
    assert "training.h5: the run is complete" in again.log


def test_preempted_jobs_are_queued_again_and_go_on(cluster, training):
    """By srun the run saves itself; Slurm ends the daemons of mpirun, which end the run."""
    script = cluster.script("run.sbatch")
    numbers = {
        launcher: cluster.submit(
            *(*PLACES, script, training, "-o", f"{launcher}.h5"),
            TESTBED_LAUNCHER=launcher,
            SECONDS_PER_STEP="0.05",
        )
        for launcher in ("srun", "mpirun")
    }
    for launcher, number in numbers.items():
        begun(cluster, number, f"{launcher}.h5")
    urgent = cluster.submit(
        "--partition", "urgent", "--nodes", "2", "--exclusive", "--wrap", "sleep 1"
    )
    (other,) = cluster.finish(urgent)
    assert other.state == "COMPLETED"
    for launcher, number in numbers.items():
        (job,) = cluster.finish(number)
        assert job.state == "COMPLETED", job.log
        assert job.restarts == 1, job.log
        assert {"srun": "stopped by", "mpirun": "the job is preempted"}[launcher] in job.log
        results = cluster.folder / f"{launcher}.h5"
        assert_same_results(cluster.folder / "undisturbed.h5", results)


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_cancelled_job_is_not_queued_again_and_can_be_resumed(cluster, training, launcher):
    script = cluster.script("run.sbatch")
    number = cluster.submit(*PLACES, script, training, TESTBED_LAUNCHER=launcher, **SLOWLY)
    begun(cluster, number)
    assert cluster.call("scancel", number).returncode == 0
    (job,) = cluster.finish(number)
    assert job.state == "CANCELLED"
    assert "into the queue again" not in job.log
    before = committed(cluster.folder / "training.h5")
    assert 0 < before < 150
    if launcher == "srun":  # mpirun itself gets the signal too, and ends its ranks
        assert "stopped" in job.log
    done = run_here("resume", "training.h5", cwd=cluster.folder)
    assert done.status == 0, done.err
    assert_same_results(cluster.folder / "undisturbed.h5", cluster.folder / "training.h5")


def test_a_run_that_fails_is_not_queued_again(cluster):
    write_experiment(cluster.folder / "e.yaml", data={"name": "mnist", "root": "nowhere"})
    (job,) = cluster.finish(cluster.submit(*PLACES, cluster.script("run.sbatch"), "e.yaml"))
    assert (job.state, job.facts["ExitCode"], job.restarts) == ("FAILED", "2:0", 0)
    assert job.log.count("error: data.root") == 1


def test_a_node_that_is_cut_off_sends_the_job_back_into_the_queue(cluster, training):
    script = cluster.script("run.sbatch")
    number = cluster.submit(*PLACES, script, training, **SLOWLY)
    begun(cluster, number)
    cluster.cut(2)
    cluster.wait(number, "PENDING")
    assert "NODE FAILURE" in cluster.job(number).log
    assert committed(cluster.folder / "training.h5") > 0
    cluster.mend(2)
    (job,) = cluster.finish(number)
    assert job.state == "COMPLETED", job.log
    assert_same_results(cluster.folder / "undisturbed.h5", cluster.folder / "training.h5")


@pytest.mark.ulfm
def test_with_fault_tolerance_a_cut_off_node_is_named_and_ends_the_run(cluster, training):
    """Its ranks cannot be killed from here, so that the others cannot take over for sure."""
    script = cluster.script("run.sbatch")
    settings = {"TESTBED_LAUNCHER": "mpirun"}
    options = ("--on-rank-loss", "continue", "--deadline", "5")
    number = cluster.submit("--no-kill", *PLACES, script, training, *options, **SLOWLY, **settings)
    begun(cluster, number)
    cluster.cut(2)
    (job,) = cluster.finish(number)
    assert job.state in ("FAILED", "NODE_FAIL")
    named = r"rank 2 on n2, rank 3 on n2 gave no answer within 5 s, and n2 has no other rank"
    assert re.search(named, job.log), job.log
    assert committed(cluster.folder / "training.h5") > 0
    cluster.mend(2)
    (job,) = cluster.finish(cluster.submit(*PLACES, script, training))
    assert job.state == "COMPLETED", job.log
    assert_same_results(cluster.folder / "undisturbed.h5", cluster.folder / "training.h5")


def test_single_processes_under_srun_are_told_what_is_wrong(cluster):
    write_experiment(cluster.folder / "e.yaml")
    words = [sys.executable, "-m", "testbed", "run", "e.yaml", "-o", "r.h5"]
    done = cluster.call("srun", "--nodes", "2", "--ntasks", "4", "--mpi=none", *words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("srun started 4 single processes instead of one run of 4 ranks") == 1
    assert "Use `srun --mpi=pmix`" in done.stderr
    assert not (cluster.folder / "r.h5.partial").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--partition", "nowhere"), "--partition takes one of: closed, main, urgent"),
        (("--partition", "closed"), "--account takes one that you belong to"),
        (("--nodes", "3", "--ntasks-per-node", "1"), "--nodes is more than the partition has"),
    ],
)
def test_what_slurm_refuses_is_told_with_the_fix(cluster, options, said):
    write_experiment(cluster.folder / "e.yaml")
    words = [sys.executable, "-m", "launch", "slurm", "e.yaml", "--ntasks-per-node", "1"]
    done = cluster.call(*words, *options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert cluster.call("squeue", "-h").stdout == ""


def test_the_doctor_finds_what_a_job_needs(cluster):
    words = f"{sys.executable} -m launch doctor . --json --patience 10"
    number = cluster.submit("--nodes", "2", "--ntasks-per-node", "1", "--wrap", words)
    (job,) = cluster.finish(number)
    assert job.state == "COMPLETED", job.log
    findings = {(found["section"], found["what"]): found for found in json.loads(job.log)}
    for what in (("slurm", "PMIx"), ("slurm", "two ranks"), ("mpi", "two ranks")):
        assert findings[what]["state"] == "ok", findings[what]


def mappings(pid):
    """Return the parts of a process's memory: whether shared, and bytes by ``Size``, ``Pss``..."""
    found = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            found.append({"shared": "s" in rest[0], "heap": rest[-1] == "[heap]"})
        elif rest[-1] == "kB":
            found[-1][name[:-1]] = 1024 * int(rest[0])
    return found


def ranks_of(output):
    """Return the processes that run the testbed for a results file, but for their launchers."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if b"testbed" in words and str(output).encode() in words and b"python" in words[0]:
            found.append(int(entry.name))
    return found


def test_a_data_set_is_in_the_memory_of_a_node_once(cluster, data_root):
    """With four ranks on the node: by proportional set size, which divides what is shared."""
    size = 70_000 * 28 * 28
    write_experiment(
        cluster.folder / "e.yaml",
        data={"name": "mnist", "root": str(data_root / "mnist")},
        federation={"rounds": 20000, "clients": 3, "batch_size": 8, "fresh_model": True},
        attacks=["llg"],
    )
    output = cluster.folder / "e.h5"
    places = ("--nodes", "1", "--ntasks-per-node", "4")
    number = cluster.submit(*places, cluster.script("run.sbatch"), "e.yaml", "-o", output)
    cluster.until(output.with_name("e.h5.partial"), number)
    pids = ranks_of(output)
    assert len(pids) == 4
    # At one moment: a page that another rank begins to use meanwhile would be counted again.
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    parts = [mappings(pid) for pid in pids]
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    windows = [[part for part in of if part["shared"] and part["Size"] >= size] for of in parts]
    assert all(len(found) == 1 for found in windows)
    held = sum(part["Pss"] for (part,) in windows)
    print(f"the data set has {size} bytes, and takes {held} of the node")
    assert 0.95 * size < held < 1.05 * size
    # No rank has a copy of its own; so large an array would not be in the heap.
    own = [part for of in parts for part in of if not part["shared"] and not part["heap"]]
    assert max(part["Anonymous"] for part in own) < size
