"""How far a job is: what is made of Slurm's words, and of results files that grow."""

import itertools
import re
import time

import pytest
from fakes import fake, script
from launching import PATIENCE
from written import HEADER, SMALL, make, rows_of

from launch.follow import Part, describe, follow, look, progress, read_part
from launch.words import Command
from testbed.errors import UserError

# What `scontrol --oneliner show job` of Slurm 22.05 says, here and there without the middle.
WAITING = (
    "JobId=16 ArrayJobId=16 ArrayTaskId=3-7%2 ArrayTaskThrottle=2 JobName=harr UserId=root(0) "
    "GroupId=root(0) MCS_label=N/A Priority=4294901747 Nice=0 Account=(null) QOS=(null) "
    "JobState=PENDING Reason=JobArrayTaskLimit Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 "
    "Reboot=0 ExitCode=0:0 RunTime=00:00:00 TimeLimit=UNLIMITED TimeMin=N/A "
    "SubmitTime=2026-11-26T13:02:36 EligibleTime=Unknown StartTime=Unknown EndTime=Unknown "
    "NodeList= NumNodes=1 NumCPUs=1 NumTasks=1 CPUs/Task=1 ReqB:S:C:T=0:0:*:* "
    "TRES=cpu=1,mem=4000M,node=1,billing=1 Command=/home/me/arr.sh WorkDir=/home/me "
    "StdErr=/home/me/harr-16_4294967294.out StdIn=/dev/null "
    "StdOut=/home/me/harr-16_4294967294.out Power= "
)
ELEMENT = (
    "JobId=21 ArrayJobId=16 ArrayTaskId=1 ArrayTaskThrottle=2 JobName=harr UserId=root(0) "
    "JobState=FAILED Reason=NonZeroExitCode Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 "
    "ExitCode=3:0 NodeList=n1 BatchHost=n1 Command=/home/me/arr.sh WorkDir=/home/me "
    "StdErr=/home/me/harr-16_1.out StdIn=/dev/null StdOut=/home/me/harr-16_1.out Power= "
)
SPACES = (
    "JobId=27 JobName=a b UserId=root(0) JobState=FAILED Reason=NonZeroExitCode "
    "Dependency=(null) Requeue=1 Restarts=0 ExitCode=3:0 Command=../bad.sh x.yaml seed=3 a b -o "
    "r.h5 WorkDir=/home/me/with space StdErr=/home/me/with space/a b-27.out StdIn=/dev/null "
    "StdOut=/home/me/with space/a b-27.out Power= "
)
FORGOTTEN = "slurm_load_jobs error: Invalid job id specified\n"
SILENT = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"


def job(state, number=12, reason="None", restarts=0, log="/absent/r-12.out", array=""):
    """Return a line of scontrol's."""
    return (
        f"JobId={number} {array}JobName=r JobState={state} Reason={reason} Dependency=(null) "
        f"Requeue=1 Restarts={restarts} ExitCode=0:0 StdIn=/dev/null StdOut={log} Power= \n"
    )


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Return the one folder in which programs are found."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def say_in_turn(path, *answers):
    """Write an scontrol that says one thing after the other, and the last for ever."""
    for number, answer in enumerate(answers):
        (path / f"answer{number}").write_text(answer)
    last = len(answers) - 1
    script(
        path,
        "scontrol",
        f'cd "{path}"; n=$(cat turn 2>/dev/null || echo 0); cat answer$n\n'
        f"[ $n = {last} ] || echo $((n + 1)) >turn",
    )


def hang_at(path, monkeypatch, number):
    """Number the programs that are started, and wait for no answer of one of them."""
    finish, calls = Command.finish, itertools.count()

    def asked(self):
        turn = next(calls)
        (path / "turn").write_text(str(turn))
        return finish(self, 0.5 if turn == number else PATIENCE)

    monkeypatch.setattr(Command, "finish", asked)


def lines(capsys):
    """Return what was followed, without the time of day."""
    printed = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in printed)
    return [line[9:] for line in printed]


# What Slurm says


def test_elements_that_wait_are_one_part():
    log = "/home/me/harr-16_4294967294.out"
    assert read_part(WAITING) == Part("16_3-7%2", "PENDING", 5, "JobArrayTaskLimit", log)


def test_an_element_has_a_name_and_a_log():
    assert read_part(ELEMENT) == Part("16_1", "FAILED", 1, "", "/home/me/harr-16_1.out")


def test_a_log_may_be_in_a_folder_with_spaces():
    assert read_part(SPACES) == Part("27", "FAILED", 1, "", "/home/me/with space/a b-27.out")


@pytest.mark.parametrize(
    ("elements", "count"), [("5", 1), ("3-7,9%2", 6), ("0-8:4", 3), ("0-2,5-6", 5), ("1,3,5", 3)]
)
def test_elements_are_counted(elements, count):
    line = job("PENDING", array=f"ArrayJobId=12 ArrayTaskId={elements} ")
    assert (read_part(line).name, read_part(line).count) == (f"12_{elements}", count)


def test_a_job_that_was_queued_again_is_told_from_one_that_waits_for_its_first_time():
    again = read_part(job("PENDING", reason="BeginTime", restarts=2))
    assert (again.state, again.reason) == ("REQUEUED", "")
    later = read_part(job("PENDING", reason="BeginTime"))
    assert (later.state, later.reason) == ("PENDING", "BeginTime")
    full = read_part(job("PENDING", reason="Resources", restarts=2))
    assert (full.state, full.reason) == ("PENDING", "Resources")


def test_states_are_counted():
    assert describe([Part("1", "PENDING", reason="Resources")]) == "pending (Resources)"
    assert describe([]) == "Slurm does not answer"
    parts = [read_part(WAITING), read_part(ELEMENT), Part("2", "RUNNING"), Part("3", "RUNNING")]
    assert describe(parts) == "1 failed, 5 pending (JobArrayTaskLimit), 2 running"


def test_a_job_that_slurm_has_forgotten_is_in_its_accounts(path):
    fake(path, "scontrol", "", FORGOTTEN, status=1)
    rows = "16_0|COMPLETED\n16_1|CANCELLED by 1000\n16_2|OUT_OF_MEMORY\n"
    noted = fake(path, "sacct", rows)
    assert look("16") == [
        Part("16_0", "COMPLETED"),
        Part("16_1", "CANCELLED"),
        Part("16_2", "OUT_OF_MEMORY"),
    ]
    assert noted.read_text().split()[-2:] == ["-j", "16"]


def test_a_job_that_nobody_remembers_is_an_error(path):
    fake(path, "scontrol", "", FORGOTTEN, status=1)
    with pytest.raises(UserError, match=r"^job 16: Slurm does not know it any more"):
        look("16")
    for said, status in (("Slurm accounting storage is disabled\n", 1), ("", 0)):
        fake(path, "sacct", "", said, status)
        with pytest.raises(UserError, match=r"^job 16: Slurm does not know it any more"):
            look("16")


def test_accounts_that_cannot_be_read_for_a_moment_are_read_later(path, monkeypatch, capsys):
    fake(path, "scontrol", "", FORGOTTEN, status=1)
    refused = "sacct: error: Problem talking to the database: Connection refused"
    script(
        path,
        "sacct",
        f"""case $(cat "{path}/turn") in
          1) echo '{refused}' >&2; exit 1 ;;
          3) exec sleep 9999 ;;
          *) echo '16|COMPLETED' ;;
        esac""",
    )
    hang_at(path, monkeypatch, 3)  # each look asks scontrol, and then sacct
    assert follow("16", [], pause=0) == 0
    assert [line.partition(";")[0] for line in lines(capsys)] == [
        "Slurm does not answer",
        "completed",
    ]
    assert (path / "turn").read_text() == "5"


def test_without_scontrol_nothing_can_be_followed(path):
    with pytest.raises(UserError, match=r"^scontrol: cannot be started"):
        follow("12", [])


# Results


def test_rounds_of_all_files_are_counted(path):
    assert progress([path / "r.h5"]) == "no results yet"
    writer = make(path / "r_0of2.h5", scenarios=[HEADER, SMALL])
    writer.append(0, 0, rows_of(HEADER, 0))
    writer.commit()
    planned = HEADER.lengths["round"] + SMALL.lengths["round"]
    outputs = [path / f"r_{number}of2.h5" for number in (0, 1)]
    assert progress(outputs[:1]) == f"1 of {planned} rounds"
    assert progress(outputs) == f"1 of {planned} rounds in 1 of 2 files"
    other = make(outputs[1], scenarios=[SMALL])
    other.append(0, 0, rows_of(SMALL, 0))
    other.append(0, 1, rows_of(SMALL, 1))
    other.complete()
    more = planned + SMALL.lengths["round"]
    assert progress(outputs) == f"3 of {more} rounds in 2 of 2 files"
    writer.close()
    outputs[1].write_text("no results")
    assert progress(outputs) == f"1 of {planned} rounds in 1 of 2 files"


# Following


def test_a_run_is_followed_to_its_end(path, monkeypatch, capsys):
    # It is stopped after its first round, and queued again.
    say_in_turn(
        path,
        job("PENDING", reason="Priority"),
        job("RUNNING"),
        job("RUNNING"),
        job("PENDING", reason="BeginTime", restarts=1),
        job("RUNNING", restarts=1),
        job("COMPLETED", restarts=1),
    )
    writers = []

    def begin():
        writers.append(make(path / "r.h5", scenarios=[SMALL]))

    def run(round_):
        writers[0].append(0, round_, rows_of(SMALL, round_))
        writers[0].commit()

    def end():
        run(1)
        writers[0].complete()

    steps = iter([begin, lambda: run(0), lambda: None, lambda: None, end])
    sleep = time.sleep

    def pause(seconds):
        if seconds == 7.0:
            next(steps)()
        else:  # of others, who wait for a program's end
            sleep(seconds)

    monkeypatch.setattr("launch.follow.time.sleep", pause)
    assert follow("12", [path / "r.h5"], pause=7.0) == 0
    assert lines(capsys) == [
        "pending (Priority); no results yet",
        "running; 0 of 2 rounds",
        "running; 1 of 2 rounds",
        "requeued; 1 of 2 rounds",
        "running; 1 of 2 rounds",
        "completed; 2 of 2 rounds",
    ]
    assert next(steps, None) is None


def test_what_does_not_change_is_told_once(path, capsys):
    say_in_turn(path, *[job("RUNNING")] * 5, job("COMPLETED"))
    assert follow("12", [path / "r.h5"], pause=0) == 0
    assert lines(capsys) == ["running; no results yet", "completed; no results yet"]


@pytest.mark.parametrize(
    ("state", "fix"),
    [
        ("FAILED", ""),
        ("CANCELLED", ""),
        ("NODE_FAIL", ""),
        ("PREEMPTED", ""),
        ("BOOT_FAIL", ""),
        ("DEADLINE", ""),
        ("TIMEOUT", "the run was not done with its round in time: a longer --warning; "),
        ("OUT_OF_MEMORY", "ask for more, as in --sbatch=--mem=32G; "),
    ],
)
def test_a_job_that_has_not_completed_is_a_failure_with_its_log(path, state, fix, capsys):
    log = path / "r 12.out"
    log.write_text("why")
    say_in_turn(path, job("RUNNING"), job(state, reason="Why", log=log))
    assert follow("12", [], pause=0) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"job 12: {state.lower()}; {fix}see {log}",
        "the same line goes on with what is there",
    ]


def test_a_job_that_could_not_be_started_says_what_to_look_at(path, capsys):
    say_in_turn(path, job("RUNNING"), job("FAILED", reason="JobLaunchFailure"))
    assert follow("12", [], pause=0) == 1
    said = capsys.readouterr().err
    assert (
        "job 12: failed; Slurm could not start it: is the folder of its log (--output) there?"
        in said
    )


@pytest.mark.parametrize(
    "state", ["SUSPENDED", "COMPLETING", "CONFIGURING", "STAGE_OUT", "NEW_ONE"]
)
def test_a_job_in_any_other_state_is_not_over(path, state, capsys):
    say_in_turn(path, job(state), job("COMPLETED"))
    assert follow("12", [], pause=0) == 0
    assert lines(capsys)[0].startswith(f"{state.lower()}; ")


def test_an_array_is_over_when_all_its_elements_are(path, capsys):
    def line(number, state):
        return job(state, number=20 + number, array=f"ArrayJobId=12 ArrayTaskId={number} ")

    waiting = job("PENDING", array="ArrayJobId=12 ArrayTaskId=2-7%2 ")
    failed = "".join(line(number, "FAILED") for number in range(1, 8))
    say_in_turn(
        path,
        waiting + line(0, "RUNNING") + line(1, "FAILED"),
        line(0, "COMPLETED") + failed.replace("FAILED", "RUNNING", 1),
        line(0, "COMPLETED") + failed,
    )
    outputs = [path / f"r_{number}of8.h5" for number in range(8)]
    assert follow("12", outputs, pause=0) == 1
    said = capsys.readouterr()
    assert [line[9:].partition(";")[0] for line in said.out.splitlines()] == [
        "1 failed, 6 pending, 1 running",
        "1 completed, 6 failed, 1 running",
        "1 completed, 7 failed",
    ]
    assert said.err.splitlines() == [
        *(f"job 12_{number}: failed" for number in range(1, 6)),
        "... and 2 more",
        "the same line goes on with what is there",
    ]


def test_a_controller_that_does_not_answer_for_a_while_ends_nothing(path, monkeypatch, capsys):
    # It says so, or says nothing at all.
    script(
        path,
        "scontrol",
        f"""case $(cat "{path}/turn") in
          0) echo '{job("RUNNING").strip()}' ;;
          1) printf '{SILENT.strip()}' >&2; exit 1 ;;
          2) exec sleep 9999 ;;
          *) echo '{job("COMPLETED").strip()}' ;;
        esac""",
    )
    hang_at(path, monkeypatch, 2)
    assert follow("12", [], pause=0) == 0
    assert [line.partition(";")[0] for line in lines(capsys)] == [
        "running",
        "Slurm does not answer",
        "completed",
    ]
    assert (path / "turn").read_text() == "3"


def test_ctrl_c_ends_the_looking_and_not_the_job(path, capsys):
    # When it has answered: while this process sleeps.
    later = "(sleep 0.5; kill -INT $PPID) >/dev/null 2>&1 &"
    script(path, "scontrol", f"echo '{job('RUNNING').strip()}'; {later}")
    assert follow("12", [], pause=60) == 130
    assert capsys.readouterr().err == "\njob 12 goes on; `scancel 12` ends it\n"
