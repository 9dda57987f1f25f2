"""Jobs: what sbatch is told, and what is made of what it says. Slurm itself is not needed."""

import argparse
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import fake, script
from hypothesis import given
from hypothesis import strategies as st
from launching import run_here, write_experiment

from launch.__main__ import main
from launch.asked import Asked
from launch.resources import Resources, check_numbers, choose_resources, read_time
from launch.slurm import (
    add_slurm,
    find_scripts,
    log_name,
    slurm_command,
)
from launch.submit import find_fix, submit
from launch.words import Command
from testbed.errors import UserError

ROOT = Path(__file__).parents[2]
ASKED = Asked(
    words=["e.yaml", "seed=3"],
    output=Path("r.h5"),
    threads=2,
    scenarios=16,
    most_ranks=None,
    complete=False,
    problem=[],
    tolerant=False,
)
# Of `sinfo -h -o '%P %c %X %Y'`: partition, CPUs, sockets, cores of each; the default has a star.
SINFO = "main* 4 4 1\nurgent 4 4 1\nclosed 4 4 1\n"


def told(*arguments):
    """Return the options of a command line."""
    parser = argparse.ArgumentParser()
    add_slurm(parser.add_subparsers())
    return parser.parse_args(["slurm", "e.yaml", *map(str, arguments)])


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Return the one folder in which programs are found."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("SBATCH_OUTPUT", "TESTBED_ROOT", "TESTBED_MPIRUN_ARGUMENTS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def folder(path, monkeypatch):
    """Return the current folder with an experiment, a sweep of three, and the programs."""
    monkeypatch.chdir(path)
    write_experiment(path / "e.yaml", sweep={"federation.batch_size": [1, 2, 4]})
    fake(path, "sinfo", SINFO)
    return path


# Numbers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--export=NONE", "--export=NONE: the job needs TESTBED_ROOT and more of this line"),
        ("--export=ALLX", "--export=ALLX: the job needs TESTBED_ROOT and more of this line"),
        ("--export NONE", "--export: the job needs TESTBED_ROOT and more of this line"),
        ("--mem=1G --wait", "--wait: use --follow"),
        ("-W", "-W: use --follow"),
        ("--wrap=hostname", "--wrap=hostname: the job is that of slurm/"),
        ("--array=0-3", "--array=0-3: of how many shares are the elements?"),
        ("-a 0-3", "-a: of how many shares are the elements?"),
    ],
)
def test_options_of_sbatch_that_would_do_harm_are_refused(words, message):
    with pytest.raises(UserError, match=f"^--sbatch={re.escape(message)}"):
        check_numbers(told(f"--sbatch={words}"))


def test_options_of_sbatch_that_begin_like_others_are_not_taken_for_them():
    for words in (
        "--export=ALL",
        "--export=ALL,MINE=1",
        "--wait-all-nodes=1",
        "--acctg-freq=30",
        "--account=a",
        "--exclusive",
        "-A a",
    ):
        check_numbers(told(f"--sbatch={words}"))
    check_numbers(told("--array", "4", "--sbatch=--array=0-3%2"))


def test_the_time_of_every_notation_of_sbatch():
    for text, seconds in {
        "90": 5400,
        "2:30": 150,
        "1:00:05": 3605,
        "1-12": 36 * 3600,
        "1-1:30": 25 * 3600 + 1800,
        "2-0:0:7": 2 * 86400 + 7,
        "0": None,  # no limit
        "UNLIMITED": None,
        "": None,
        "1:2:3:4": None,
        "-5": None,
        "2-": None,
        "1h": None,
    }.items():
        assert read_time(text) == seconds, text


@given(st.integers(1, 10**7))
def test_a_time_is_read_as_it_was_written(seconds):
    hours, rest = divmod(seconds, 3600)
    assert read_time(f"{hours}:{rest // 60:02}:{rest % 60:02}") == seconds
    assert read_time(f"{hours // 24}-{hours % 24}:{rest // 60}:{rest % 60}") == seconds


def test_a_job_has_time_before_it_is_warned(capsys):
    with pytest.raises(UserError, match=r"^--time 0:02:00: .* would be told so at its start"):
        check_numbers(told("--time", "0:02:00"))
    check_numbers(told("--time", "3"))
    assert capsys.readouterr().err.startswith("note: --time 3: Slurm warns --warning 120 seconds")
    check_numbers(told("--time", "0:03:01"))
    check_numbers(told("--time", "2", "--warning", "30"))
    check_numbers(told("--time", "soon"))  # of which sbatch knows more
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("option", "lowest"),
    [
        ("--nodes", 1),
        ("--ntasks-per-node", 1),
        ("--cpus-per-task", 1),
        ("--gpus-per-node", 0),
        ("--array", 1),
        ("--warning", 1),
        ("--max-requeues", 0),
    ],
)
def test_numbers_that_are_too_small_are_named(option, lowest):
    check_numbers(told(f"{option}={lowest}"))
    with pytest.raises(UserError, match=f"^{option} {lowest - 1}: expected at least {lowest}$"):
        check_numbers(told(f"{option}={lowest - 1}"))


@pytest.mark.parametrize("argument", ["mem=8G", "", "--comment='a"])
def test_an_argument_for_sbatch_is_an_option(argument):
    with pytest.raises(UserError, match=f"^--sbatch={re.escape(argument)}: "):
        check_numbers(told(f"--sbatch={argument}"))


# Resources


@pytest.mark.parametrize(
    ("sinfo", "arguments", "ranks"),
    [
        ("main* 4 4 1\n", [], 2),
        # Two hardware threads of a core are one.
        ("main* 128 2 32\n", [], 32),
        ("main* 64 2 32\n", [], 32),
        # Nodes that differ: as many as all have.
        ("main* 48+ 2+ 24+\nmain* 40 2 20\nbig 128 2 64\n", [], 20),
        ("main* 48 2 24\nbig 128 2 64\n", ["--cpus-per-task", 3], 16),
        ("big 128 2 64\n", ["--partition", "big"], 64),
    ],
)
def test_without_gpus_every_core_has_a_thread(path, sinfo, arguments, ranks):
    noted = fake(path, "sinfo", sinfo)
    found = choose_resources(told("--nodes", 3, *arguments), ASKED, {})
    assert found.nodes == 3
    assert found.ntasks_per_node == ranks
    assert found.ranks == 3 * ranks
    assert ("big" in noted.read_text().split()) == ("--partition" in arguments)


@pytest.mark.parametrize(
    ("arguments", "partition"),
    [
        ([], "big"),
        (["--partition=gpu"], "gpu"),
        (["--sbatch=-p gpu"], "gpu"),
        (["--sbatch=-pgpu"], "gpu"),
        (["--sbatch=--partition gpu"], "gpu"),
        (["--sbatch=--mem=1G --part=gpu"], "gpu"),
        # What comes last counts.
        (["--partition=other", "--sbatch=-p other", "--sbatch=--partition=gpu"], "gpu"),
        (["--sbatch=--parsable", "--sbatch=--profile=all"], "big"),
    ],
)
def test_the_cores_are_those_of_the_partition_that_sbatch_takes(path, arguments, partition):
    noted = fake(path, "sinfo", f"{partition} 8 1 8\n")
    environment = {"SBATCH_PARTITION": "big"}
    assert choose_resources(told(*arguments), ASKED, environment).ntasks_per_node == 4
    assert noted.read_text().split()[-2:] == ["-p", partition]


def test_gpus_have_a_rank_each_and_nobody_is_asked(path):
    found = choose_resources(told("--gpus-per-node", 4), ASKED, {})
    assert found == Resources(nodes=1, ntasks_per_node=4, cpus_per_task=2, gpus_per_node=4)
    found = choose_resources(told("--gpus-per-node", 2, "--ntasks-per-node", 6), ASKED, {})
    assert (found.ntasks_per_node, found.gpus_per_node) == (6, 2)


def test_no_ranks_are_chosen_that_have_no_work(path, capsys):
    fake(path, "sinfo", "main* 64 2 32\n")
    few = replace(ASKED, most_ranks=5)
    assert choose_resources(told(), few, {}).ntasks_per_node == 5
    assert choose_resources(told("--nodes", 2), few, {}).ranks == 6
    assert capsys.readouterr().err == (
        "note: 6 ranks, and 5 of them would have work: a round has 4 clients\n"
    )
    # What is asked for counts.
    alone = replace(ASKED, most_ranks=2)
    assert choose_resources(told("--ntasks-per-node", 8), alone, {}).ranks == 8
    assert capsys.readouterr().err.endswith("a round has 1 client\n")


def test_resources_that_do_not_fit_the_experiment_are_errors(path):
    fake(path, "sinfo", "main* 4 4 1\n")
    for arguments, asked, message in (
        (["--array", 17], ASKED, "--array 17: the sweep has 16 scenarios"),
        (["--cpus-per-task", 1], ASKED, "each rank computes with 2 threads"),
        ([], replace(ASKED, threads=8), "each rank has 8 CPUs, and a node of the partition 4"),
    ):
        with pytest.raises(UserError, match=message):
            choose_resources(told(*arguments), asked, {})


def test_nodes_that_are_not_known_are_errors_that_name_the_option(path):
    for out, err, arguments, message in (
        (None, "", [], r"^without sinfo .* by --ntasks-per-node$"),
        ("big 4 4 1\n", "", [], r"no default partition: name one with --partition; or say"),
        ("", "slurm_load_partitions: Unable to contact", [], r"Unable to contact; or say how many"),
    ):
        if out is not None:
            fake(path, "sinfo", out, err, status=int(bool(err)))
        with pytest.raises(UserError, match=message):
            choose_resources(told(*arguments), ASKED, {})
    script(path, "sinfo", 'case "$*" in *-p*) ;; *) printf "main\\nurgent\\nmain\\n" ;; esac')
    with pytest.raises(UserError, match=r"^partition nope: .* expected one of: main, urgent$"):
        choose_resources(told("--partition", "nope"), ASKED, {})


# The command


def command(*arguments, environment=None, **changes):
    """Return what is submitted, as options, words behind the script, and settings."""
    asked = replace(ASKED, **changes)
    resources = Resources(nodes=2, ntasks_per_node=4, cpus_per_task=2, gpus_per_node=0)
    found = slurm_command(told(*arguments), asked, resources, ROOT, environment or {})
    at = next(i for i, word in enumerate(found.words) if word.endswith(".sbatch"))
    assert Path(found.words[at]).is_file()
    return found.words[:at], [Path(found.words[at]).name, *found.words[at + 1 :]], found.settings


def test_a_run_is_one_job():
    options, words, settings = command()
    assert options == [
        *("sbatch", "--parsable", "--job-name=r", "--nodes=2", "--ntasks-per-node=4"),
        *("--cpus-per-task=2", "--signal=B:USR1@120"),
    ]
    assert words == ["run.sbatch", "e.yaml", "seed=3", "-o", "r.h5"]
    assert settings == {"TESTBED_ROOT": str(ROOT)}


def test_a_sweep_is_an_array_of_shares():
    options, words, settings = command("--array", 16)
    assert "--array=0-15" in options
    assert words == ["sweep.sbatch", "e.yaml", "seed=3", "-o", "r.h5"]
    assert settings == {"TESTBED_ROOT": str(ROOT), "TESTBED_SHARES": "16"}


def test_what_is_said_of_the_place_is_handed_on():
    names = ("--time=8:00:00", "--partition=gpu", "--account=me", "--qos=long")
    options, _, settings = command(*names, "--warning=300", "--with=mpirun", "--max-requeues=0")
    assert set(options) > {*names, "--signal=B:USR1@300"}
    assert settings["TESTBED_LAUNCHER"] == "mpirun"
    assert settings["TESTBED_MAX_REQUEUES"] == "0"


def test_arguments_for_sbatch_come_last_so_that_they_count():
    more = ("--sbatch=--mem=32G", "--sbatch=--comment 'two words' --exclusive")
    options, _, _ = command(*more)
    assert options[-4:] == ["--mem=32G", "--comment", "two words", "--exclusive"]


def test_the_survival_of_ranks_takes_mpirun():
    asked = {"tolerant": True, "words": ["e.yaml", "--on-rank-loss", "continue"]}
    _, words, settings = command(**asked)
    assert words[:4] == ["run.sbatch", "e.yaml", "--on-rank-loss", "continue"]
    assert settings["TESTBED_LAUNCHER"] == "mpirun"
    # The job adds what mpirun takes for it: what the site or the user has set is kept.
    assert "TESTBED_MPIRUN_ARGUMENTS" not in settings
    with pytest.raises(UserError, match="use --with mpirun"):
        command("--with", "srun", **asked)


def test_settings_reach_the_job_where_a_site_hands_nothing_down():
    assert command(environment={"SBATCH_EXPORT": "NONE"})[2] == {
        "TESTBED_ROOT": str(ROOT),
        "SBATCH_EXPORT": "ALL",
    }
    for name in ("ALL", "ALL,FOO=1", "FOO=1,ALL", "all"):
        assert command(environment={"SBATCH_EXPORT": name})[2] == {"TESTBED_ROOT": str(ROOT)}
    for name, expected in (("nil", "ALL"), ("FOO=1,BAR", "ALL,FOO=1,BAR")):
        assert command(environment={"SBATCH_EXPORT": name})[2]["SBATCH_EXPORT"] == expected


def test_the_log_is_named_as_the_scripts_name_it():
    for arguments, name, expected in (
        ([], "run", "r-12.out"),
        (["--array", 4], "sweep", "r-12_*.out"),
    ):
        text = (ROOT / f"slurm/{name}.sbatch").read_text()
        pattern = re.search(r"^#SBATCH --output=(\S+)", text, re.MULTILINE)[1]
        for sign, value in {"%x": "r", "%j": "12", "%A": "12", "%a": "*"}.items():
            pattern = pattern.replace(sign, value)
        assert log_name(told(*arguments), ASKED, "12", {}) == pattern == expected
    # Others are not known.
    assert log_name(told(), ASKED, "12", {"SBATCH_OUTPUT": "x"}) == ""
    for words in ("-o x", "-ox.out", "--output=x", "--mem=1G --output x", "--outp=x", "--exc -J x"):
        assert log_name(told(f"--sbatch={words}"), ASKED, "12", {}) == ""
    for words in ("-Jname", "--job-name=x", "--job=x", "-D/tmp", "--chd=/tmp"):
        assert log_name(told(f"--sbatch={words}"), ASKED, "12", {}) == ""
    for words in ("--overcommit", "--open-mode=truncate", "--cpus-per-gpu=2", "-d 7"):
        assert log_name(told(f"--sbatch={words}"), ASKED, "12", {}) == "r-12.out"


def test_the_scripts_are_those_of_the_repository(tmp_path):
    assert find_scripts({}) == ROOT
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/run.sbatch").touch()
    assert find_scripts({"TESTBED_ROOT": str(tmp_path)}) == tmp_path
    with pytest.raises(UserError, match=r"there is no slurm/run\.sbatch here: .* TESTBED_ROOT"):
        find_scripts({"TESTBED_ROOT": str(tmp_path / "slurm")})


# Submitting


@pytest.mark.parametrize("out", ["12\n", "12;cluster\n", "a site's greeting\n12\n"])
def test_a_job_has_the_number_that_sbatch_says(path, out, capsys):
    noted = fake(path, "sbatch", out, "sbatch: a warning\n")
    assert submit(Command(["sbatch", "--nodes=1", "a b"])) == "12"
    assert noted.read_text() == "--nodes=1\na b\n\n"
    assert capsys.readouterr().err == "sbatch: a warning\n"


@pytest.mark.parametrize("out", ["", "\n", "Submitted batch job\n"])
def test_an_answer_without_a_number_is_an_error(path, out):
    fake(path, "sbatch", out)
    with pytest.raises(UserError, match="expected the number of a job: `squeue --me`"):
        submit(Command(["sbatch"]))


def test_an_sbatch_that_does_not_answer_may_have_taken_the_job(path, monkeypatch):
    monkeypatch.setattr("launch.submit._PATIENCE", 0.2)
    script(path, "sbatch", "exec sleep 60")
    with pytest.raises(UserError, match=r"no answer within 0\.2 s; the job may have been taken"):
        submit(Command(["sbatch"]))


# What the sbatch of Slurm 22.05 has said, but for the last five, which are its library's texts.
FAILED = "sbatch: error: Batch job submission failed: "
REFUSED = {
    "sbatch: error: invalid partition specified: nope\n"
    f"{FAILED}Invalid partition name specified": "--partition takes one of: closed, main",
    f"{FAILED}Invalid account or account/partition combination specified": "--account takes one",
    f"{FAILED}Node count specification invalid": "--nodes is more than",
    f"{FAILED}More processors requested than permitted": "--ntasks-per-node times",
    "sbatch: error: Invalid generic resource (gres) specification": "no node has so many GPUs",
    "sbatch: error: Invalid --time specification": "--time takes minutes, HH:MM:SS",
    "sbatch: error: Batch script is empty!": "git checkout slurm",
    "sbatch: error: This does not look like a batch script.  The first\n"
    "sbatch: error: line must start with #! followed by the path to an interpreter.\n"
    "sbatch: error: For instance: #!/bin/sh": "git checkout slurm",
    "sbatch: error: Unable to open file absent.sh": "TESTBED_ROOT names the repository",
    "sbatch: unrecognized option '--bogus'\n"
    'Try "sbatch --help" for more information': "lacks an option of the line above",
    f"{FAILED}Invalid job array specification": "MaxArraySize",
    "sbatch: error: Memory specification can not be satisfied\n"
    f"{FAILED}Requested node configuration is not available": "--sbatch=--mem=32G",
    f"{FAILED}Requested node configuration is not available": "no partition has so many nodes",
    "sbatch: error: Invalid --signal specification": "--warning takes up to",
    f"{FAILED}Invalid feature specification": "--sbatch=ARGUMENT adds what your site asks for",
    f"{FAILED}Unable to contact slurm controller (connect failure)": "`scontrol ping`",
    f"{FAILED}Invalid qos specification": "--qos takes one that your account has",
    f"{FAILED}Job violates accounting/QOS policy (job submit limit, user's size and/or time "
    "limits)": "a limit of your account or of the QOS",
    f"{FAILED}Requested time limit is invalid (missing or exceeds some limit)": "--time is more",
    f"{FAILED}Requested partition configuration not available now": "the partition is down",
    f"{FAILED}User's group not permitted to use this partition": "of: closed, main",
    f"{FAILED}Socket timed out on send/recv operation": "`squeue --me` before you try again",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text.splitlines()[-1][-30:])
def test_every_refusal_has_a_line_that_helps(path, text):
    fake(path, "sinfo", "main\nclosed\nmain\n")
    fake(path, "sbatch", "", f"{text}\n", status=1)
    with pytest.raises(UserError) as caught:
        submit(Command(["sbatch"]))
    *said, fix = str(caught.value).splitlines()
    assert REFUSED[text] in fix
    # In as many lines as sbatch has said it, of which only the first says that it was sbatch.
    plain = [re.sub("^sbatch: (error: )?", "", line) for line in text.splitlines()]
    assert said == [f"sbatch: {plain[0]}", *plain[1:]]


def test_a_refusal_helps_where_sinfo_does_not_and_where_nothing_is_said(path):
    assert find_fix("Invalid partition name specified").endswith("one of: those that `sinfo` lists")
    fake(path, "sbatch", status=3)
    with pytest.raises(UserError, match=r"^sbatch: it ends with status 3\n"):
        submit(Command(["sbatch"]))


# The command line of the program


def test_a_line_is_printed_and_submitted(folder, capsys):
    script(folder, "sbatch", f'echo "$TESTBED_SHARES $TESTBED_ROOT $*" >"{folder}/told"; echo 12')
    arguments = ["--array", "2", "--time", "8:00:00", "seed=3", "-o", "r.h5"]
    assert main(["slurm", "e.yaml", *arguments]) == 0
    printed, said = capsys.readouterr().out.splitlines()
    assert said == "job 12; results: 'r_*of2.h5'; log: r-12_*.out"
    settings, _, words = printed.partition(" sbatch ")
    assert settings == f"TESTBED_ROOT={ROOT} TESTBED_SHARES=2"
    assert (folder / "told").read_text() == f"2 {ROOT} {' '.join(shlex.split(words))}\n"
    assert "--ntasks-per-node=4 --cpus-per-task=1 --time=8:00:00" in words
    assert words.endswith("/slurm/sweep.sbatch e.yaml seed=3 -o r.h5")


def test_what_the_job_of_the_caller_is_told_is_not_handed_down(folder, monkeypatch):
    noted = folder / "told"
    script(
        folder, "sbatch", f'echo "$SLURM_RESTART_COUNT$SLURM_ARRAY_TASK_ID." >"{noted}"; echo 12'
    )
    monkeypatch.setenv("SLURM_RESTART_COUNT", "20")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert main(["slurm", "e.yaml", "-o", "r.h5"]) == 0
    assert noted.read_text() == ".\n"


def test_a_dry_run_submits_nothing_and_takes_no_slurm(folder, capsys):
    noted = fake(folder, "sbatch", "12\n")
    assert main(["slurm", "e.yaml", "--dry-run"]) == 0
    assert "--ntasks-per-node=4 " in capsys.readouterr().out
    (folder / "sinfo").unlink()
    (folder / "sbatch").unlink()
    assert main(["slurm", "e.yaml", "--dry-run", "--ntasks-per-node", "2"]) == 0
    assert "--ntasks-per-node=2 " in capsys.readouterr().out
    assert not noted.exists()


def test_without_sbatch_the_other_launcher_is_named(folder, capsys):
    assert main(["slurm", "e.yaml", "-o", "r.h5"]) == 2
    assert "error: there is no sbatch here" in capsys.readouterr().err


def test_what_only_other_machines_have_is_a_note(folder, capsys):
    fake(folder, "sbatch", "12\n")
    assert main(["slurm", "e.yaml", "-o", "absent/r.h5"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("note: as seen from here, absent/r.h5: the folder absent does not")
    assert said.out.endswith("job 12; results: absent/r.h5; log: r-12.out\n")


def test_what_is_certain_to_fail_is_not_submitted(folder, capsys):
    noted = fake(folder, "sbatch", "12\n")
    assert main(["slurm", "e.yaml", "data.name=mnist"]) == 2
    assert "set data.root=FOLDER" in capsys.readouterr().err
    (folder / "e_1of3.h5").write_text("something else")
    assert main(["slurm", "e.yaml", "--array", "3"]) == 2
    assert capsys.readouterr().err.startswith("error: e_1of3.h5: this is no HDF5 file")
    assert not noted.exists()
    # Compute nodes may have what a login node has not.
    assert main(["slurm", "e.yaml", "data.name=mnist", "data.root=/nowhere"]) == 0
    assert capsys.readouterr().err == (
        "note: as seen from here, data.root=/nowhere does not exist: expected the data there\n"
    )


def test_what_is_complete_is_not_submitted(folder, capsys):
    noted = fake(folder, "sbatch", "12\n")
    small = ("e.yaml", "federation.rounds=1", "attacks=[random]")
    for index in range(3):
        share = ("--share", f"{index}/3", "-o", f"e_{index}of3.h5")
        assert run_here("run", *small, *share).status == 0
    assert main(["slurm", *small, "--array", "3", "--follow"]) == 0
    assert capsys.readouterr() == ("", "e_*of3.h5: the run is complete\n")
    assert not noted.exists()
    (folder / "e_2of3.h5").unlink()
    assert main(["slurm", *small, "--array", "3"]) == 0
    assert noted.exists()


def test_an_argument_for_sbatch_may_stand_behind_its_option(folder, capsys):
    noted = fake(folder, "sbatch", "12\n")
    line = ["slurm", "e.yaml", "--sbatch", "--mem=3G", "--sbatch", "-J x", "seed=3"]
    assert main(line) == 0
    assert set(noted.read_text().split("\n")) > {"--mem=3G", "-J", "x", "seed=3"}


def test_a_refusal_is_printed_in_lines(folder, capsys):
    fake(folder, "sbatch", "", f"{FAILED}Invalid account or account/partition combination\n", 1)
    assert main(["slurm", "e.yaml", "--account", "nobody"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: sbatch: Batch job submission failed: Invalid account")
    assert second.startswith("--account takes one that you belong to")


def test_a_followed_job_is_looked_at_by_its_number_and_results(folder, capsys):
    fake(folder, "sbatch", "12\n")
    noted = fake(folder, "scontrol", "JobId=12 JobState=COMPLETED Reason=None StdOut=/x Power= \n")
    assert main(["slurm", "e.yaml", "--array", "3", "--follow"]) == 0
    assert noted.read_text() == "--oneliner\nshow\njob\n12\n\n"
    assert capsys.readouterr().out.endswith(" completed; no results yet\n")
