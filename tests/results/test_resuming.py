"""Going on with a results file: the old or the new one is there at any moment, and it is the same.

The finished file is that of a run which was never stopped, but for what is said of its starts.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from launching import PATIENCE
from written import (
    HEADER,
    LENGTHS,
    RANKS,
    SMALL,
    committed,
    contents,
    fill,
    in_child,
    make,
    opened,
    resume,
    rows_of,
)

from testbed.errors import UserError
from testbed.results import resuming, storage
from testbed.results.opening import open_file
from testbed.results.reader import open_results
from testbed.results.schema import FILE_ENCODING, scenario_arrays
from testbed.results.writer import ResultsWriter, partial_path

TOLD = {"title": "A title", "experiment": "seed: 1\nrounds: 7\n", "share": "0/1", "created": "then"}
MODES = ["swmr", "flush"]


def killed(path: Path, rounds: int = 3, more: int = 2, **options: Any) -> None:
    """Leave the file of a writer that was killed within a commit, before it counted the rounds."""

    def work() -> None:
        writer = make(path, **{"attributes": TOLD, **options})
        for round_ in range(rounds):
            writer.append(0, round_, rows_of(HEADER, round_))
        writer.commit()
        for round_ in range(rounds, rounds + more):
            writer.append(0, round_, rows_of(HEADER, round_))
        writer._write_pending()
        writer._storage.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == -signal.SIGKILL


def finish(writer: ResultsWriter) -> None:
    for index, header in ((0, HEADER), (1, SMALL)):
        for round_ in range(writer.committed(index), header.lengths["round"]):
            writer.append(index, round_, rows_of(header, round_))
    writer.complete()


def undisturbed(path: Path, **options: Any) -> dict[str, Any]:
    """Return what is in the file of a run that was never stopped, but for its starts."""
    writer = make(path, **{"attributes": TOLD, **options})
    fill(writer)
    fill(writer, SMALL, 1)
    writer.complete()
    return but_starts(path)


def but_starts(path: Path) -> dict[str, Any]:
    return {name: item for name, item in contents(path).items() if not name.startswith("starts/")}


@pytest.mark.parametrize("before", MODES)
@pytest.mark.parametrize("after", MODES)
def test_a_resumed_file_is_that_of_a_run_that_was_never_stopped(
    tmp_path: Path, before: str, after: str
) -> None:
    path = tmp_path / "a.h5"
    killed(path, mode=before)
    writer = resume(path, attributes=TOLD, mode=after)
    assert [writer.committed(index) for index in range(2)] == [3, 0]
    finish(writer)
    assert [file.name for file in tmp_path.iterdir()] == ["a.h5"]
    assert but_starts(path) == undisturbed(tmp_path / "plain.h5")


@pytest.mark.parametrize("rounds", [0, 1, 7])
def test_a_stopped_run_goes_on_after_any_round(tmp_path: Path, rounds: int) -> None:
    path = tmp_path / "a.h5"
    with opened(path, attributes=TOLD) as writer:
        for round_ in range(rounds):
            writer.append(0, round_, rows_of(HEADER, round_))
    for _ in range(2):  # and is stopped at once
        resume(path, attributes=TOLD).close()
        assert committed(partial_path(path)) == [rounds, 0]
    writer = resume(path, attributes=TOLD)
    if rounds < 7:
        with pytest.raises(ValueError, match=f"expected round {rounds}: rounds must be appended"):
            writer.append(0, rounds + 1, {"rounds/loss": 1.0})
    if rounds:
        with pytest.raises(ValueError, match=f"round {rounds - 1} of 7, expected round {rounds}"):
            writer.append(0, rounds - 1, {"rounds/loss": 1.0})
    finish(writer)
    assert but_starts(path) == undisturbed(tmp_path / "plain.h5")


def test_what_a_dead_writer_wrote_but_did_not_commit_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    killed(path)
    with open_file(partial_path(path)) as file:
        assert np.isfinite(file["scenarios/0000/rounds/loss"][4])
    with opened(path, resume, attributes=TOLD) as writer:
        for name in HEADER.arrays:
            values = writer._storage.file[f"scenarios/0000/{name}"]
            rest = values[3:]
            np.testing.assert_array_equal(rest, np.full_like(rest, values.fillvalue))


def test_the_table_of_starts_has_them_all_and_the_rest_is_that_of_the_first(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.h5"
    killed(path, attributes={**TOLD, "mpi_library": "Open MPI 5", "slurm_job": "1"})
    third = [*RANKS, replace(RANKS[0], host="node3", role="client")]
    now = {**TOLD, "created": "now", "mpi_library": "MPICH 4", "slurm_job": "2"}
    now |= {"software_version": "9", "dependencies": '{"numpy": "3"}', "command": "testbed é"}
    writer = resume(path, attributes=now, ranks=third)
    with open_results(path) as results:
        first, second = results.starts
        assert (first.time, first.ranks, first.committed) == ("then", 2, 0)
        assert (first.library, first.slurm_job) == ("Open MPI 5", "1")
        assert (second.time, second.ranks, second.committed) == ("now", 3, 3)
        assert second.hosts == "node1, a-longer-name, node3"
        assert (second.library, second.slurm_job) == ("MPICH 4", "2")
        assert json.loads(second.software) == {
            "software_version": "9",
            "git_commit": "",
            "numpy": "3",
        }
        assert second.command == r"testbed \xe9"
        assert results.attributes["created"] == "then"
        assert results.attributes["mpi_library"] == "Open MPI 5"
        assert [rank.host for rank in results.ranks] == ["node1", "a-longer-name", "node3"]
    finish(writer)
    with open_results(path) as results:
        assert [start.time for start in results.starts] == ["then", "now"]


def test_what_another_machine_rounds_otherwise_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    killed(path)
    other = [replace(HEADER, privacy={"epsilon": 1.5000000000000002}), SMALL]
    finish(resume(path, attributes=TOLD, scenarios=other))
    with open_results(path) as results:
        assert results.scenarios[0].privacy == {"epsilon": 1.5}


# At any moment


STEPS = [
    *(("swmr", step) for step in ("declared", "half copied", "copied", "locked", "renamed")),
    *(("flush", step) for step in ("copied", "locked", "renamed")),
]


@pytest.mark.parametrize(("mode", "step"), STEPS)
def test_a_kill_while_resuming_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, mode: str
) -> None:
    path = tmp_path / "a.h5"
    killed(path)

    def dies(original: Callable[..., Any], *, late: bool = True) -> Callable[..., Any]:
        def then(*arguments: Any, **options: Any) -> Any:
            if late:
                original(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        return then

    def work() -> None:
        if step == "declared":
            resuming._difference = dies(resuming._difference)
        elif step == "half copied":
            resuming._clear = dies(resuming._clear)
        elif step == "copied":
            storage._take = dies(storage._take, late=False)
        elif step == "locked":
            storage.os.fsync = dies(storage.os.fsync)
        else:
            storage._take = dies(storage._take)
        resume(path, attributes=TOLD, mode=mode)

    assert in_child(work) == -signal.SIGKILL
    assert committed(partial_path(path)) == [3, 0]
    with open_results(path) as results:
        assert len(results.starts) == (2 if step == "renamed" else 1)
        counts = results.scenarios[0].array("truth/counts")
        expected = [rows_of(HEADER, round_)["truth/counts"] for round_ in range(3)]
        np.testing.assert_array_equal(counts, expected)
    finish(resume(path, attributes=TOLD))
    assert [file.name for file in tmp_path.iterdir()] == ["a.h5"]
    assert but_starts(path) == undisturbed(tmp_path / "plain.h5")


@pytest.mark.parametrize("room", [0.1, 0.95])
def test_without_room_for_the_copy_the_old_file_stays_as_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], room: float
) -> None:
    path = tmp_path / "a.h5"
    killed(path)
    partial = partial_path(path)
    before = partial.read_bytes()
    resume(shutil.copy(partial, tmp_path / "b.h5.partial").with_suffix(""), attributes=TOLD).close()
    needed = (tmp_path / "b.h5.partial").stat().st_size

    def work() -> None:
        # A limit on the size of files stands for a disk that is full.
        limit = int(room * needed)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        resume(path, attributes=TOLD)

    assert in_child(work) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"{path}.creating: cannot create the results file: ")
    assert said.count("\n") == 1
    assert partial.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.h5.partial", "b.h5.partial"]
    finish(resume(path, attributes=TOLD))
    assert but_starts(path) == undisturbed(tmp_path / "plain.h5")


# What is refused


def refuses(path: Path, *words: str, **options: Any) -> None:
    partial = partial_path(path)
    before = partial.read_bytes() if partial.exists() else None
    with pytest.raises(UserError) as caught:
        resume(path, **{"attributes": TOLD, **options})
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert (partial.read_bytes() if partial.exists() else None) == before
    assert not path.with_name(path.name + ".creating").exists()


FEWER = {name: spec for name, spec in HEADER.arrays.items() if "bias_gradient" not in name}
OTHERS: list[tuple[dict[str, Any], list[str]]] = [
    ({"scenarios": [HEADER]}, ["number of scenarios: found 2, expected 1"]),
    (
        {"attributes": {**TOLD, "experiment": "seed: 1\nrounds: 9\n"}},
        ["experiment, line 2: found 'rounds: 7', expected 'rounds: 9'"],
    ),
    ({"attributes": {**TOLD, "share": "1/2"}}, ["share", "found '0/1', expected '1/2'"]),
    (
        {"scenarios": [replace(HEADER, parameters={"seed": 2}), SMALL]},
        ["scenarios/0000, parameters, seed: found 0, expected 2"],
    ),
    ({"scenarios": [replace(HEADER, number=4, draws=0), SMALL]}, ["number: found 0, expected 4"]),
    ({"scenarios": [replace(HEADER, draws=4), SMALL]}, ["draws: found 0, expected 4"]),
    ({"scenarios": [replace(HEADER, last_layer="fc"), SMALL]}, ["last_layer", "'classifier'"]),
    (
        {"scenarios": [replace(HEADER, arrays=FEWER), SMALL]},
        ["bias_gradient: found 'there', expected 'not there'"],
    ),
    (
        {"scenarios": [replace(HEADER, lengths={**LENGTHS, "round": 8}), SMALL]},
        ["scenarios/0000", "shape (7, ", "shape (8, "],
    ),
    (
        {"scenarios": [replace(HEADER, attacks={**HEADER.attacks, "llg": SMALL.attacks["llg"]}),
                       replace(SMALL, attacks={"llg": HEADER.attacks["plus"]},
                               arrays=scenario_arrays(bias=False, weight=False,
                                                      attacks={"llg": ("counts", {})}))]},
        ["scenarios/0001/attacks/llg, ", "found "],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), OTHERS)
def test_the_file_of_another_run_is_refused(
    tmp_path: Path, options: dict[str, Any], words: list[str]
) -> None:
    path = tmp_path / "a.h5"
    with opened(path, attributes=TOLD) as writer:
        writer.append(0, 0, rows_of(HEADER, 0))
    refuses(path, "a.h5.partial: this is the file of another run", *words, **options)
    finish(resume(path, attributes=TOLD))


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    refuses(path, f"{path}.partial: no such file", "start one with `run`")
    refuses(tmp_path / "no" / "a.h5", "does not exist")
    refuses(tmp_path, "this is a folder")
    undisturbed(path)
    refuses(path, f"{path}: the run is complete: there is nothing to resume")


def test_a_file_of_an_older_version_is_only_read(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    make(path, attributes=TOLD).close()
    with h5py.File(partial_path(path), "a") as file:
        file.attrs["encoding-version"] = "1.2"
    refuses(path, "of version 1.2", f"expected {FILE_ENCODING[1]}")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.6])
def test_a_damaged_file_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "a.h5"
    with opened(path, attributes=TOLD) as writer:
        writer.append(0, 0, rows_of(HEADER, 0))
    content = partial_path(path).read_bytes()
    partial_path(path).write_bytes(content[: int(kept * len(content))])
    refuses(path, str(path))


HOLDER = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from written import make
writer = make(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
"""


def test_a_file_that_a_run_is_writing_is_refused(tmp_path: Path) -> None:
    path, here = tmp_path / "a.h5", Path(__file__).parent
    line = [sys.executable, "-c", HOLDER, str(path), str(here), str(here.parent)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        refuses(path, "a run is writing this file")
        run.communicate("end\n", timeout=PATIENCE)
    resume(path, attributes={"title": "A title"}).close()


def test_who_comes_second_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.h5"
    killed(path)
    original, others = resuming.hold, []

    def late(descriptor: int) -> bool:
        # Between opening the old file and locking it, another process has gone on with it.
        if not others:
            others.append(None)
            others.append(resume(path, attributes=TOLD))
        return original(descriptor)

    monkeypatch.setattr(resuming, "hold", late)
    with pytest.raises(UserError, match="a run is writing this file"):
        resume(path, attributes=TOLD)
    first = others[1]
    assert isinstance(first, ResultsWriter)
    finish(first)
    assert but_starts(path) == undisturbed(tmp_path / "plain.h5")


# Says whether another process may lock a file.
ANOTHER = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    print("locked")
"""


def another(path: Path) -> str:
    words = [sys.executable, "-c", ANOTHER, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=PATIENCE)
    return done.stdout


def test_the_lock_outlasts_everything_that_is_read_of_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    killed(path)
    with resuming.unfinished(path):
        assert another(partial_path(path)) == "locked\n"
    assert another(partial_path(path)) == ""


@pytest.mark.parametrize("suffix", [".creating", ".working"])
def test_a_file_that_another_process_is_creating_is_not_taken_from_it(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / "a.h5"
    other = path.with_name(path.name + suffix)
    holder = ANOTHER + "print('ready', flush=True); sys.stdin.readline()"
    other.write_bytes(b"of another process")
    line = [sys.executable, "-c", holder, str(other)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match="a run is writing this file"):
            make(path)
        assert other.read_bytes() == b"of another process"
        run.communicate("end\n", timeout=PATIENCE)
    make(path).close()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.h5.partial"]


def test_what_a_writer_left_that_died_while_compacting_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    killed(path)
    path.with_name("a.h5.compact").write_bytes(b"half of a file")
    finish(resume(path, attributes=TOLD))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.h5"]
