"""The tables that grow: starts of a run, and ranks that it lost."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray
from build_file import START, Spec, age, build
from written import HEADER, RANKS, committed, in_child, make, opened, resume, rows_of

from testbed.results.events import LOSSES, STARTS
from testbed.results.opening import open_file
from testbed.results.reader import open_results
from testbed.results.records import Loss, Start
from testbed.results.writer import partial_path


def numbered(number: int) -> Loss:
    """Return a loss all of whose values tell its number."""
    return Loss(
        rank=number,
        host=f"node{number}",
        reason=f"killed {number}",
        scenario=number,
        round=number,
        seconds=number / 4,
        time=f"t{number}",
    )


def as_read(number: int, start: int = 0) -> Loss:
    return replace(numbered(number), start=start)


@pytest.mark.parametrize("mode", ["swmr", "flush"])
def test_a_loss_is_there_at_once_and_stays(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.h5"
    with opened(path, mode=mode) as writer, open_results(path) as results:
        assert (len(results.starts), results.losses) == (1, [])
        writer.append(0, 0, rows_of(HEADER, 0))
        writer.record_loss(numbered(3))
        results.refresh()
        assert results.losses == [as_read(3)]
        assert results.scenarios[0].committed == 1  # what was appended before is there too
        writer.record_loss(numbered(1))
        results.refresh()
        assert results.losses == [as_read(3), as_read(1)]
    with opened(path, resume, mode=mode) as writer:
        writer.record_loss(numbered(2))
        writer.complete()
    with open_results(path) as results:
        assert results.losses == [as_read(3), as_read(1), as_read(2, start=1)]
        assert [start.committed for start in results.starts] == [0, 1]


WATCHER = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from test_events import as_read
from testbed.results.reader import open_results
results, seen = open_results(Path(sys.argv[1])), set()
print("ready", flush=True)
while len(results.losses) < 40:
    results.refresh()
    assert list(results.losses) == [as_read(k) for k in range(len(results.losses))], results.losses
    if len(results.losses) not in seen:
        seen.add(len(results.losses))
        print(len(results.losses), flush=True)
"""


def test_a_reader_never_sees_a_part_of_a_row(tmp_path: Path) -> None:
    path, here = tmp_path / "a.h5", Path(__file__).parent
    with opened(path, mode="swmr") as writer:
        line = [sys.executable, "-c", WATCHER, str(path), str(here), str(here.parents[1])]
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as watcher:
            assert watcher.stdout is not None
            assert watcher.stdout.readline() == "ready\n"
            seen = []
            for number in range(40):
                if number == 20:  # it may be slower than this process
                    seen.append(int(watcher.stdout.readline()))
                writer.record_loss(numbered(number))
            seen += map(int, watcher.stdout.readlines())
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert watcher.returncode == 0


def test_a_row_that_a_dead_writer_did_not_finish_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"

    def work() -> None:
        writer = make(path)
        writer.record_loss(numbered(0))
        losses = writer._storage.file["losses"]
        for name in list(LOSSES)[:4]:
            losses[name].resize((2,))
        writer._storage.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == -signal.SIGKILL
    with open_results(path) as results:
        assert results.losses == [as_read(0)]
    with opened(path, resume) as writer:
        with open_file(partial_path(path)) as file:
            assert {len(column) for column in file["losses"].values()} == {1}
        writer.record_loss(numbered(1))
        with open_results(path) as results:
            assert results.losses == [as_read(0), as_read(1, start=1)]


def test_text_is_cut_to_fit_and_what_is_not_ascii_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    told = {"command": "x" * 3000, "slurm_job": "größe"}
    with opened(path, attributes=told, ranks=RANKS[:1] * 3) as writer:
        writer.record_loss(Loss(1, "h" * 300, "stuck", 0, 0, float("nan")))
        with open_results(path) as results:
            (start,), (loss,) = results.starts, results.losses
    assert start.command == "x" * 1024
    assert start.slurm_job == r"gr\xf6\xdfe"
    assert (start.ranks, start.hosts) == (3, "node1")
    assert start.time.endswith("+00:00")
    assert loss.host == "h" * 256
    assert np.isnan(loss.seconds)
    assert loss.time.endswith("+00:00")


def test_xarray_opens_the_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    make(path).close()
    with opened(path, resume) as writer:
        writer.record_loss(numbered(7))
        writer.complete()
    for group, axis, columns, rows in (
        ("starts", "start", STARTS, 2),
        ("losses", "loss", LOSSES, 1),
    ):
        with xarray.open_dataset(path, engine="h5netcdf", group=group) as dataset:
            assert set(dataset.data_vars) == set(columns)
            assert dict(dataset.sizes) == {axis: rows}
            assert all(array.dims == (axis,) for array in dataset.variables.values())
            if group == "losses":
                assert dataset["host"].values.tolist() == [b"node7"]


def test_the_tables_are_those_of_the_format(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/file-format.md").read_text()
    table = page.split("Since version 1.3\nthere are two tables more")[1].split("\n\n")[1]
    types = {}
    for line in table.splitlines()[2:]:
        names, _, kinds, _ = (cell.strip(" `") for cell in line.split("|")[1:-1])
        several = [kind.strip() for kind in kinds.split(",")]
        for number, name in enumerate(names.replace("`", "").split(", ")):
            types[name] = several[min(number, len(several) - 1)]
    make(tmp_path / "a.h5").complete()
    found = {}
    with open_file(tmp_path / "a.h5") as file:
        for group in ("starts", "losses"):
            for name, column in file[group].items():
                text = column.dtype.kind == "S"
                found[f"{group}/{name}"] = "fixed-length ASCII" if text else column.dtype.name
                assert column.maxshape == (None,)
    assert found == types


def test_what_the_page_describes_is_read(tmp_path: Path) -> None:
    again = {**START, "ranks": 2, "committed": 5}
    loss = {"time": "t", "rank": 1, "host": "node22", "reason": "stuck", "start": 1}
    loss |= {"scenario": 0, "round": 4, "seconds": 0.5}
    path = build(tmp_path / "a.h5", [Spec(rounds=6)], starts=[START, again], losses=[loss])
    with open_results(path) as results:
        assert results.starts == [Start(**START), Start(**again)]  # type: ignore[arg-type]
        assert results.losses == [Loss(**loss)]  # type: ignore[arg-type]
    for version in ("1.2", "1.1", "1.0"):
        old = age(build(tmp_path / f"{version}.h5", [Spec(rounds=6)]), version)
        with open_results(old) as results:
            assert (results.starts, results.losses) == ((), ())
            assert results.scenarios[0].committed == 6


def test_a_loss_without_a_round_is_committed_too(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with opened(path, mode="flush") as writer:
        writer.record_loss(numbered(0))
        assert committed(partial_path(path)) == [0, 0]
        with open_results(path) as results:
            assert results.losses == [as_read(0)]
