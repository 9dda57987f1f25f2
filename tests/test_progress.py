"""Progress on a terminal and in a log, on a clock of the test's own."""

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_run import plan_of, resolve

from testbed import progress
from testbed.plan import make_plan
from testbed.progress import Progress


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def strftime(self, template: str) -> str:
        return template.replace("%H:%M:%S", "clock")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def run(clock: Clock, mode: str, rounds: int, seconds: float) -> None:
    plan = plan_of()
    with Progress("title", rounds, mode) as shown:
        for _ in range(rounds):
            clock.now += seconds
            shown.advance(plan)


def test_none_is_silent(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    run(clock, "none", 10, 100.0)
    assert capfd.readouterr() == ("", "")


def test_log_has_lines_at_growing_intervals(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    run(clock, "log", 1500, 1.0)
    out, err = capfd.readouterr()
    assert out == ""
    first, *between, last = err.splitlines()
    assert first == "clock title: 1500 rounds"
    assert last == "clock 1500/1500 rounds in 25:00"
    # Pauses of 5, 10, 20 ... seconds, at most 300.
    counts = [int(line.split()[1].split("/")[0]) for line in between]
    assert counts == [5, 15, 35, 75, 155, 315, 615, 915, 1215]
    assert between[0] == "clock 5/1500 rounds, 1.0 rounds/s, 24:55 left; scenario 0"


def test_log_of_a_short_run_has_two_lines(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    run(clock, "log", 3, 1.0)
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_log_of_a_long_run_counts_hours(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    run(clock, "log", 2, 1862.0)
    lines = capfd.readouterr().err.splitlines()
    assert lines[1] == "clock 1/2 rounds, 1.9 rounds/h, 31:02 left; scenario 0"
    assert lines[-1] == "clock 2/2 rounds in 1:02:04"


def test_time_apart_does_not_slow_the_rounds(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    with Progress("title", 100, "log") as shown:
        with shown.apart():
            clock.now += 500.0
        clock.now += 4.0
        shown.advance(plan_of())
    lines = capfd.readouterr().err.splitlines()
    assert lines[1] == "clock 1/100 rounds, 15.0 rounds/min, 6:36 left; scenario 0"
    assert lines[-1] == "clock 1/100 rounds in 8:24"


def test_rounds_that_are_repeated_are_told_and_do_not_slow_the_new_ones(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    with Progress("title", 100, "log", done=50) as shown:
        with shown.apart():
            clock.now += 100.0
        for number in range(20, 50):
            clock.now += 2.0
            shown.repeat(plan_of(), number, 50)
        clock.now += 4.0
        shown.advance(plan_of())
    lines = capfd.readouterr().err.splitlines()
    assert lines[:2] == [
        "clock title: 100 rounds, 50 done before",
        "clock round 20 again, of 50 that were recorded; scenario 0",
    ]
    # Pauses of 10, 20 ... seconds, as between other lines.
    assert [line.split()[2] for line in lines[1:-1]] == ["20", "25", "35"]
    with Progress("title", 100, "log", done=50) as shown:
        clock.now += 2.0
        shown.repeat(plan_of(), 49, 50)
        clock.now += 6.0
        shown.advance(plan_of())
    lines = capfd.readouterr().err.splitlines()
    assert lines[1] == "clock 51/100 rounds, 10.0 rounds/min, 4:54 left; scenario 0"


def test_the_live_line_tells_of_rounds_that_are_repeated(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    with Progress("title", 100, "live", done=50) as shown:
        clock.now += 2.0
        shown.repeat(plan_of(), 49, 50)
        clock.now += 2.0
        shown.advance(plan_of())
    err = capfd.readouterr().err
    assert "round 49 again, of 50 that were recorded" in err
    assert "51/100" in err


def test_a_run_that_goes_on_after_a_loss_does_not_begin_again(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = Progress("title", 3, "log")

    def lose() -> None:
        with shown:
            shown.advance(plan_of())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        lose()
    with shown:
        shown.advance(plan_of())
    assert capfd.readouterr().err.splitlines() == [
        "clock title: 3 rounds",
        "clock going on: 1 of 3 rounds done",
        "clock 2/3 rounds in 0:00",
    ]


def test_log_names_the_swept_values(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(resolve("sweep.federation.batch_size=[4, 8]", "sweep.model.name=[cnn]"))[1]
    with Progress("title", 10, "log") as shown:
        clock.now += 60
        shown.advance(plan)
    assert "left; scenario 1 (batch_size=8, name=cnn)\n" in capfd.readouterr().err


def test_rates_are_told_where_no_time_has_passed(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    run(clock, "log", 4, 0.0)
    run(clock, "live", 4, 0.0)
    assert "4/4 rounds in 0:00" in capfd.readouterr().err


def test_failed_run_is_not_reported_as_done(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        with Progress("title", 2, "log") as shown:
            shown.advance(plan_of())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert capfd.readouterr().err == "clock title: 2 rounds\n"


def test_live_line_ends_with_all_rounds(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    run(clock, "live", 7, 0.01)
    out, err = capfd.readouterr()
    assert out == ""
    assert "7/7" in err
    assert "100.0 rounds/s" in err
    assert "6/7" not in err


def test_live_line_is_not_drawn_for_every_round(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    run(clock, "live", 100, 0.1)
    drawn = [
        f" {count}/100 " in capfd_text
        for capfd_text in [capfd.readouterr().err]
        for count in range(1, 100)
    ]
    assert 40 <= sum(drawn) <= 60


@contextmanager
def terminal() -> Iterator[int]:
    ours, theirs = pty.openpty()
    try:
        yield theirs
    finally:
        os.close(ours)
        os.close(theirs)


def mode_of(stderr: int, environment: dict[str, str]) -> str:
    """Return which mode `auto` is, in a process with that standard error."""
    code = "from testbed.progress import Progress; print(Progress('t', 1, 'auto')._mode)"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("OMPI_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=clean | environment,
        cwd=Path(__file__).parent.parent,
        check=True,
        text=True,
    ).stdout.strip()


def test_auto_is_live_on_a_terminal_and_a_log_elsewhere() -> None:
    with terminal() as stderr:
        assert mode_of(stderr, {}) == "live"
    assert mode_of(subprocess.DEVNULL, {}) == "log"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")
def test_auto_looks_through_mpirun(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open("w") as pipe, terminal() as stderr:
        monkeypatch.setattr(sys, "stderr", pipe)
        for parents, expected in ((stderr, True), (subprocess.DEVNULL, False)):
            with subprocess.Popen(["sleep", "60"], stderr=parents) as parent:
                monkeypatch.setattr(os, "getppid", lambda pid=parent.pid: pid)
                monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
                assert progress._on_terminal() == expected
                monkeypatch.delenv("OMPI_COMM_WORLD_RANK")
                assert not progress._on_terminal()
                parent.kill()
        monkeypatch.setattr(os, "getppid", lambda: 2**22 + 1)
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
        assert not progress._on_terminal()
