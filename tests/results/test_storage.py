"""How the file grows: with SWMR, or by copies where the file system has no order of writes."""

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
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
from testbed.results import filesystem, storage
from testbed.results import writer as writer_module
from testbed.results.filesystem import file_system, has_write_order, locks_meet
from testbed.results.reader import open_results
from testbed.results.room import reserve
from testbed.results.schema import PAGE_BYTES
from testbed.results.storage import CopyingStorage, SwmrStorage
from testbed.results.writer import partial_path

MODES = ["swmr", "flush"]
# Of this folder's modules, those of the tests, and the program.
FOLDERS = [str(folder) for folder in Path(__file__).parents[:3]]
ROUNDS = 60
LONG = replace(HEADER, lengths={**LENGTHS, "round": ROUNDS})


def check(path: Path) -> int:
    """Read every committed round, check each array, and return their number."""
    with open_results(path) as results:
        scenario = results.scenarios[0]
        for name in HEADER.arrays:
            expected = [rows_of(HEADER, round_)[name] for round_ in range(scenario.committed)]
            np.testing.assert_array_equal(
                scenario.array(name), np.array(expected).reshape(scenario.array(name).shape)
            )
        return scenario.committed


# Both ways


@pytest.mark.parametrize("commit_seconds", [0.0, 3600.0])
def test_copies_make_the_same_file(tmp_path: Path, commit_seconds: float) -> None:
    found = []
    for mode in MODES:
        path = tmp_path / f"{mode}.h5"
        writer = make(path, mode=mode, commit_seconds=commit_seconds, attributes={"created": "t"})
        fill(writer)
        fill(writer, SMALL, 1)
        writer.complete()
        writer.close()
        found.append(contents(path))
    assert found[0] == found[1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["flush.h5", "swmr.h5"]


WATCHER = """
import sys
sys.path[:0] = sys.argv[2:]
import itertools
from pathlib import Path
import numpy as np
from test_storage import LONG
from testbed.results.reader import open_results
path = Path(sys.argv[1])
results, seen = open_results(path), set()
print("ready", flush=True)
for again in itertools.cycle([True, False, False]):
    if results.complete:
        break
    if again:
        results.close()
        results = open_results(path)
    else:
        results.refresh()
    scenario = results.scenarios[0]
    rounds = scenario.committed
    for name in LONG.arrays:
        values = scenario.array(name)
        expected = np.arange(rounds).astype(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
        assert len(values) == rounds and (values == expected).all(), (name, rounds)
    if rounds not in seen:
        seen.add(rounds)
        print(rounds, flush=True)
"""


def tells(round_: int) -> dict[str, Any]:
    """Return rows all of whose values are the number of the round."""
    rows = {}
    for name, spec in LONG.arrays.items():
        shape = tuple(LONG.lengths[axis] for axis in spec.axes[1:])
        rows[name] = np.full(shape, round_, spec.dtype)
    return rows


@pytest.mark.parametrize("mode", MODES)
def test_readers_of_a_growing_file_never_see_half_a_round(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.h5"
    line = [sys.executable, "-c", WATCHER, str(path), *FOLDERS]
    with (
        opened(path, mode=mode, commit_seconds=0.0, scenarios=[LONG]) as writer,
        subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as watcher,
    ):
        try:
            assert watcher.stdout is not None
            assert watcher.stdout.readline() == "ready\n"
            seen = []
            for round_ in range(ROUNDS):
                if round_ in (20, 40):  # it may be slower than this process
                    seen.append(int(watcher.stdout.readline()))
                writer.append(0, round_, tells(round_))
                writer.commit()
            writer.complete()
            out, _ = watcher.communicate(timeout=PATIENCE)
            assert watcher.returncode == 0
            seen += map(int, out.split())
            assert len(seen) > 2
            assert seen == sorted(seen)
        finally:
            watcher.kill()


# Copies


def test_the_copy_is_a_closed_file_at_every_moment(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with opened(path, mode="flush") as writer:
        assert isinstance(writer._storage, CopyingStorage)
        for round_ in range(3):
            with h5py.File(partial_path(path), "r") as file:  # plainly
                assert not file.swmr_mode
                assert file["committed_rounds"][0] == round_
            writer.append(0, round_, rows_of(HEADER, round_))
            writer.commit()
        writer.append(0, 3, rows_of(HEADER, 3))
        assert check(path) == 3
    assert check(path) == 4
    assert [file.name for file in tmp_path.iterdir()] == ["a.h5.partial"]


@pytest.mark.parametrize("step", ["written", "half copied", "copied", "locked", "renamed"])
def test_a_kill_within_a_commit_loses_nothing(tmp_path: Path, step: str) -> None:
    path = tmp_path / "a.h5"

    def dies(original: Callable[..., Any], *, late: bool = True) -> Callable[..., Any]:
        def then(*arguments: Any, **options: Any) -> Any:
            if late:
                original(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        return then

    def half(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[: source.stat().st_size // 2])

    def work() -> None:
        writer = make(path, mode="flush")
        for round_ in range(4):
            writer.append(0, round_, rows_of(HEADER, round_))
            if round_ == 1:
                writer.commit()
        if step == "written":
            storage.shutil.copyfile = dies(storage.shutil.copyfile, late=False)
        elif step == "half copied":
            storage.shutil.copyfile = dies(half)
        elif step == "copied":
            storage.shutil.copyfile = dies(storage.shutil.copyfile)
        elif step == "locked":
            storage.os.fsync = dies(storage.os.fsync)
        else:
            storage._take = dies(storage._take)
        writer.commit()

    assert in_child(work) == -signal.SIGKILL
    rounds = 4 if step == "renamed" else 2
    assert check(path) == rounds
    writer = resume(path, mode="flush")
    assert writer.committed(0) == rounds
    for round_ in range(rounds, 7):
        writer.append(0, round_, rows_of(HEADER, round_))
    writer.complete()
    assert check(path) == 7
    assert [file.name for file in tmp_path.iterdir()] == ["a.h5"]


GOES_ON = """
import sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from written import make, resume
from test_storage import LONG, ROUNDS, tells
path, mode = Path(sys.argv[1]), sys.argv[2]
start = resume if path.with_name(path.name + ".partial").exists() else make
writer = start(path, mode=mode, scenarios=[LONG])
for round_ in range(writer.committed(0), ROUNDS):
    writer.append(0, round_, tells(round_))
    writer.commit()
    print(round_ + 1, flush=True)
    if round_ == ROUNDS - 1:
        sys.stdin.read()
"""


@pytest.mark.parametrize("mode", MODES)
def test_random_kills_lose_nothing(tmp_path: Path, mode: str) -> None:
    """As many as continuous integration has time for; measured over 100 of each, none did."""
    path = tmp_path / "a.h5"
    line = [sys.executable, "-c", GOES_ON, str(path), mode, *FOLDERS]
    moments = random.Random(3)
    before = 0
    for _ in range(4):
        with subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as run:
            assert run.stdout is not None
            said = [run.stdout.readline()]
            time.sleep(moments.uniform(0, 0.3))
            run.kill()
            said += run.stdout.readlines()
        told = max(int(word) for word in said if word.endswith("\n"))
        with open_results(path) as results:
            rounds = results.scenarios[0].committed
            assert rounds >= told > before
            for name in LONG.arrays:
                values = results.scenarios[0].array(name)
                expected = [tells(round_)[name] for round_ in range(rounds)]
                np.testing.assert_array_equal(values, expected)
        before = rounds
        if rounds == ROUNDS:
            break


def test_copies_take_a_tenth_of_the_time_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    copied: list[int] = []
    original = storage.shutil.copyfile

    def copy(source: Path, target: Path) -> None:
        copied.append(next(clock))
        for _ in range(2):
            next(clock)  # it takes 3 s
        original(source, target)

    monkeypatch.setattr(storage.shutil, "copyfile", copy)
    monkeypatch.setattr(storage.time, "monotonic", lambda: float(next(clock)))
    header = replace(HEADER, lengths={**LENGTHS, "round": 120})
    with opened(tmp_path / "a.h5", mode="flush", commit_seconds=0.0, scenarios=[header]) as writer:
        for round_ in range(120):
            writer.append(0, round_, tells(round_))
    gaps = np.diff(copied[1:-1])  # without the declaration and the end
    assert len(gaps) >= 2
    assert gaps.min() >= 30


def test_many_rounds_do_not_wait_in_memory_for_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(values.nbytes for values in rows_of(HEADER, 0).values())
    monkeypatch.setattr(writer_module, "_PENDING_BYTES", 2 * size)
    with opened(tmp_path / "a.h5", mode="flush") as writer:
        assert isinstance(writer._storage, CopyingStorage)
        writer.append(0, 0, rows_of(HEADER, 0))
        writer.commit()
        writer._storage.pause = 3600.0
        waiting = []
        for round_ in range(1, 7):
            writer.append(0, round_, rows_of(HEADER, round_))
            waiting.append(len(writer._pending))
        assert waiting == [1, 2, 0, 1, 2, 0]
        assert committed(partial_path(tmp_path / "a.h5")) == [1, 0]
        writer.commit()
        assert check(tmp_path / "a.h5") == 7


FULL = """
import resource, sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from written import HEADER, make, rows_of
from testbed.errors import UserError
writer = make(Path(sys.argv[1]), mode=sys.argv[2])
writer.append(0, 0, rows_of(HEADER, 0))
writer.commit()
# A limit on the size of files stands for a disk that is full.
size = Path(sys.argv[1] + ".partial").stat().st_size + 2000
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
for round_ in range(1, 5):
    writer.append(0, round_, rows_of(HEADER, round_))
try:
    writer.commit()
except UserError as error:
    writer.close()
    writer.close()
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("mode", MODES)
def test_a_disk_that_fills_up_within_a_commit(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.h5"
    line = [sys.executable, "-c", FULL, str(path), mode, *FOLDERS]
    done = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE, check=False)
    # HDF5 neither adds anything of its own, nor crashes at the end of the program.
    assert done.stderr == ""
    assert done.returncode == 2
    assert done.stdout == (
        f"{path}.partial: cannot write to the results file: File too large; rounds committed "
        "before stay readable, and `resume` goes on from there\n"
    )
    assert check(path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.h5.partial"]
    writer = resume(path, mode=mode)
    for round_ in range(1, 7):
        writer.append(0, round_, rows_of(HEADER, round_))
    writer.complete()
    assert check(path) == 7


@pytest.mark.parametrize("commit_every", [1, 7, 60])
@pytest.mark.parametrize("more", [{}, {"class": 300}, {"parameter": 300_000}])
def test_a_commit_takes_no_more_room_than_it_has_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, int], commit_every: int
) -> None:
    header = replace(HEADER, lengths={**LENGTHS, "round": 60, **more})
    reserved: list[int] = []

    def note(descriptor: int, size: int) -> None:
        reserved.append(os.fstat(descriptor).st_size + size)

    monkeypatch.setattr(writer_module, "reserve", note)
    path = tmp_path / "a.h5"
    with opened(path, scenarios=[header]) as writer:
        for round_ in range(60 if not more else 9):
            writer.append(0, round_, rows_of(header, round_))
            if round_ % commit_every == commit_every - 1:
                writer.commit()
                assert partial_path(path).stat().st_size <= reserved[-1]
        writer.commit()
        assert partial_path(path).stat().st_size <= reserved[-1]
        assert partial_path(path).stat().st_size > reserved[-1] / 20  # nor much less


def test_nothing_that_is_written_again_lies_across_pages(tmp_path: Path) -> None:
    """A kill can cut a write between two pages of memory, and leave half of it.

    Of all calls to pwrite(2) in 300 commits, none went over old bytes and across pages.
    """
    path = tmp_path / "a.h5"
    with opened(path, mode="swmr") as writer:
        fill(writer)
        plan = writer._storage.file.id.get_create_plist()
        assert plan.get_file_space_strategy()[0] == h5py.h5f.FSPACE_STRATEGY_PAGE
        assert plan.get_file_space_page_size() == PAGE_BYTES <= os.sysconf("SC_PAGE_SIZE")
        for name in HEADER.arrays:
            dataset = writer._storage.file[f"scenarios/0000/{name}"]
            once = dataset.chunks[0] == 1  # such a chunk is of one round
            assert once or np.prod(dataset.chunks) * dataset.dtype.itemsize <= PAGE_BYTES - 96
            assert dataset.maxshape == (None, *dataset.shape[1:])


def test_room_that_was_reserved_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with opened(path) as writer:
        fill(writer)
        writer.commit()
        size = partial_path(path).stat().st_size
        reserve(writer._storage.file.id.get_vfd_handle(), 10_000_000)
        assert partial_path(path).stat().st_size == size
    assert partial_path(path).stat().st_blocks * 512 < size + 1_000_000
    with path.open("wb") as file, pytest.raises(OSError, match=r"No space left|too large"):
        reserve(file.fileno(), 1 << 60)


def test_room_is_looked_up_where_it_cannot_be_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("testbed.results.room._allocate", lambda *_: errno.EOPNOTSUPP)
    with (tmp_path / "a").open("wb") as file:
        reserve(file.fileno(), 1000)
        with pytest.raises(OSError, match="No space left"):
            reserve(file.fileno(), 1 << 60)


# A file that is taken away


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["folder", "file", "renamed", "another"])
def test_a_file_that_is_taken_away_is_missed_at_the_next_commit(
    tmp_path: Path, mode: str, what: str
) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    path = folder / "a.h5"
    with opened(path, mode=mode) as writer:
        writer.append(0, 0, rows_of(HEADER, 0))
        writer.commit()
        if what == "folder":
            folder.rename(tmp_path / "moved")
        elif what == "file":
            partial_path(path).unlink()
        elif what == "renamed":
            partial_path(path).rename(partial_path(folder / "b.h5"))
        else:
            other = tmp_path / "other"
            other.write_text("mine")
            other.replace(partial_path(path))
        writer.append(0, 1, rows_of(HEADER, 1))
        with pytest.raises(UserError, match=r"a\.h5\.partial: the file is gone: .* under its new"):
            writer.commit()
    if what == "folder":
        assert check(tmp_path / "moved" / "a.h5") == 1
    elif what == "renamed":
        resume(folder / "b.h5", mode=mode).close()
        assert check(folder / "b.h5") == 1
    elif what == "another":
        assert partial_path(path).read_text() == "mine"


@pytest.mark.parametrize("mode", MODES)
def test_a_name_that_cannot_be_taken_in_the_end_is_one_message(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.h5"
    with opened(path, mode=mode) as writer:
        fill(writer)
        path.mkdir()  # meanwhile
        with pytest.raises(UserError, match=r"a\.h5\.partial: cannot write .*: Is a directory"):
            writer.complete()
    path.rmdir()
    assert check(path) == HEADER.lengths["round"]
    resume(path, mode=mode).complete()
    assert check(path) == HEADER.lengths["round"]


def test_a_file_that_is_closed_twice_is_not_mistaken_for_that_of_the_next_run(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.h5"
    writer = make(path, mode="flush")
    writer.append(0, 0, rows_of(HEADER, 0))
    writer.close()
    with closing(resume(path, mode="flush")) as following:
        writer.close()
        for round_ in range(1, HEADER.lengths["round"]):
            following.append(0, round_, rows_of(HEADER, round_))
        following.complete()
    assert check(path) == HEADER.lengths["round"]


def test_readers_notice_that_another_run_has_taken_the_name(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    make(path, attributes={"run": "one"}).complete()
    with open_results(path) as results:
        make(path, attributes={"run": "two"}, overwrite=True).complete()
        with pytest.raises(UserError, match="another run has taken the name"):
            results.refresh()
        assert len(results.scenarios[0].array("client")) == 3  # the old file is still open


@pytest.mark.parametrize("mode", MODES)
def test_readers_follow_a_run_that_goes_on(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.h5"
    with opened(path, mode=mode) as writer:
        writer.append(0, 0, rows_of(HEADER, 0))
    with open_results(path) as results:
        with opened(path, resume, mode=mode) as writer:
            writer.append(0, 1, rows_of(HEADER, 1))
            writer.commit()
            results.refresh()
            assert results.scenarios[0].committed == 2
            assert len(results.starts) == 2
            writer.complete()
        results.refresh()
        assert results.path == path
        np.testing.assert_array_equal(
            results.scenarios[0].array("updates/loss", 1), [rows_of(HEADER, 1)["updates/loss"]]
        )


# Which way


def test_swmr_is_taken_where_there_is_order_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ordered, mode, kind in (
        (True, "auto", SwmrStorage),
        (False, "auto", CopyingStorage),
        (False, "swmr", SwmrStorage),
        (True, "flush", CopyingStorage),
    ):
        monkeypatch.setattr(storage, "has_write_order", lambda _, ordered=ordered: ordered)
        with opened(tmp_path / "a.h5", mode=mode, overwrite=True) as writer:
            assert isinstance(writer._storage, kind)


@pytest.mark.parametrize("mode", ["auto", "swmr"])
def test_where_swmr_fails_there_are_copies_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Unable to start swmr writing")

    monkeypatch.setattr(storage, "has_write_order", lambda _: True)
    monkeypatch.setattr(h5py.File, "swmr_mode", property(lambda _: False, fail))
    path = tmp_path / "a.h5"
    if mode == "swmr":
        with pytest.raises(UserError, match="cannot create the results file: Unable to start"):
            make(path, mode=mode)
        assert list(tmp_path.iterdir()) == []
        return
    with opened(path, mode=mode) as writer:
        writer.append(0, 0, rows_of(HEADER, 0))
        writer.commit()
        assert check(path) == 1


MOUNTS = """\
22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
23 22 0:21 / /proc rw - proc proc rw
30 22 0:40 / /home rw,relatime shared:5 - nfs4 server:/home rw,vers=4.2
31 30 0:41 / /home/scratch rw - lustre 10.0.0.1@o2ib:/scratch rw,flock
32 22 0:42 / /mnt/a\\040b rw - fuse.sshfs user@host: rw
33 22 0:43 / /usb rw - fuseblk /dev/sdb1 rw
34 22 0:44 / /twice rw - ext4 /dev/sdc rw
35 34 0:45 / /twice rw - cifs //server/share rw
36 22 0:46 / /gluster rw - fuse.glusterfs server:/v rw
garbage
"""


@pytest.mark.parametrize(
    ("place", "kind", "ordered", "meet"),
    [
        ("/", "ext4", True, False),
        ("/homes", "ext4", True, False),
        ("/home/me", "nfs4", False, True),
        ("/home/scratch/me", "lustre", True, True),
        ("/mnt/a b/c", "fuse.sshfs", False, True),
        ("/usb", "fuseblk", True, False),
        ("/twice", "cifs", False, True),
        ("/gluster/x", "fuse.glusterfs", True, False),
    ],
)
def test_file_systems_without_order_or_with_one_kind_of_locks_are_known(
    tmp_path: Path, place: str, kind: str, ordered: bool, meet: bool
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert file_system(Path(place), mounts) == kind
    assert has_write_order(Path(place), mounts) is ordered
    assert locks_meet(Path(place), mounts) is meet


def test_a_link_is_on_the_file_system_of_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/home/scratch/me/a.h5")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert locks_meet(tmp_path / "link", mounts)


def test_a_file_system_that_cannot_be_found_out_has_order_and_two_kinds_of_locks(
    tmp_path: Path,
) -> None:
    assert file_system(tmp_path, tmp_path / "none") == ""
    assert has_write_order(tmp_path, tmp_path / "none")
    assert not locks_meet(tmp_path, tmp_path / "none")


def test_the_file_system_of_this_machine_is_found() -> None:
    assert file_system(Path("/proc")) == "proc"


# Where HDF5's lock meets the writer's

LOCKER = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("ready", flush=True)
sys.stdin.readline()
"""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Lock a file as HDF5 would find it on Lustre, where a writer's record lock looks like that."""
    line = [sys.executable, "-c", LOCKER, str(path)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        yield
        holder.communicate("end\n", timeout=PATIENCE)


@pytest.mark.parametrize(
    ("kind", "mode", "storage_"),
    [
        ("lustre", "auto", SwmrStorage),
        ("nfs4", "auto", CopyingStorage),
        ("nfs4", "swmr", SwmrStorage),
    ],
)
def test_runs_begin_go_on_and_are_read_where_both_kinds_of_locks_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mode: str, storage_: type
) -> None:
    monkeypatch.setattr(filesystem, "file_system", lambda *_: kind)
    path = tmp_path / "a.h5"
    with held(tmp_path / "a.h5.creating"), opened(path, mode=mode) as writer:
        assert isinstance(writer._storage, storage_)
        writer.append(0, 0, rows_of(HEADER, 0))
        writer.commit()
    with held(partial_path(path)):
        assert check(path) == 1
        with opened(path, resume, mode=mode) as writer:
            for round_ in range(1, 7):
                writer.append(0, round_, rows_of(HEADER, round_))
            writer.complete()
    assert check(path) == 7


def test_where_hdf5_cannot_lock_the_new_file_the_error_says_what_helps(tmp_path: Path) -> None:
    with (
        held(tmp_path / "a.h5.creating"),
        pytest.raises(UserError, match=r"HDF5 cannot lock it \(.*\): set HDF5_USE_FILE_LOCKING=FA"),
    ):
        make(tmp_path / "a.h5")
    assert list(tmp_path.iterdir()) == []
