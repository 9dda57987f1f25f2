import errno
import shutil
import subprocess
import sys
from pathlib import Path

import build_file
import h5py
import numpy as np
import pytest
from build_file import Spec, age, build

from testbed.errors import UserError
from testbed.results.reader import open_results


@pytest.fixture
def path(tmp_path):
    specs = [
        Spec({"federation.batch_size": 4, "labels.distribution": "unbalanced"}, rounds=6),
        Spec({"federation.batch_size": 8, "labels.distribution": "balanced"}, bias=False, rounds=5),
    ]
    return build(tmp_path / "run.h5", specs)


class Writer:
    """A process that writes in SWMR mode; it has declared the file when this is entered."""

    def __init__(self, path: Path, rounds: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, build_file.__file__, str(path), str(rounds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Writer":
        self.wait_for(0)
        return self

    def start(self, rounds: int) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{rounds}\n")
        self.process.stdin.flush()

    def wait_for(self, rounds: int) -> None:
        assert self.process.stdout
        assert int(self.process.stdout.readline()) == rounds

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __exit__(self, *error: object) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()


def test_what_a_complete_file_says(path):
    with open_results(path) as results:
        assert results.complete
        assert results.title == "A title"
        assert results.attributes["slurm_job"] == "4711"
        assert "encoding-type" not in results.attributes
        assert [rank.host for rank in results.ranks] == ["node1", "node1", "node22"]
        assert results.ranks[1].device == "cuda:0 NVIDIA H200"
        assert [rank.role for rank in results.ranks] == ["server", "client", "client"]
        assert [rank.local_rank for rank in results.ranks] == [0, 1, 0]
        assert [rank.cores for rank in results.ranks] == ["0", "1-3,8", ""]
        assert [rank.gpu for rank in results.ranks] == ["", "GPU-1", "GPU-1"]
        first, second = results.scenarios
        assert (first.index, first.rounds, first.clients, first.classes) == (0, 6, 2, 10)
        assert (second.index, second.committed) == (1, 5)
        assert first.swept == {"federation.batch_size": 4, "labels.distribution": "unbalanced"}
        assert first.parameters["model.name"] == "cnn"


def test_attacks_come_in_the_order_of_the_experiment(path):
    with open_results(path) as results:
        attacks = results.scenarios[0].attacks
        assert list(attacks) == ["random", "llg", "llg_star", "llg_plus"]
        assert attacks["llg_plus"].title == "LLG+"
        assert attacks["llg_plus"].knowledge == "auxiliary"
        assert attacks["llg_plus"].options == {}


def test_a_file_before_version_1_4_does_not_know_cores_and_gpus(tmp_path):
    with open_results(age(build(tmp_path / "run.h5", [Spec(rounds=1)]), "1.3")) as results:
        assert [(rank.cores, rank.gpu) for rank in results.ranks] == [("", "")] * 3
        assert len(results.starts) == 1


def test_what_is_new_in_version_1_2_and_what_older_files_stand_for(tmp_path):
    told = {"epsilon": 1.5, "delta": 1e-5}
    spec = Spec(
        rounds=2,
        cohort=7,
        attacks=["llg", "llg+rounds"],
        adapted={"llg+rounds": "llg"},
        accumulated=["llg+rounds"],
        privacy=told,
    )
    path = build(tmp_path / "run.h5", [spec, Spec(rounds=2, clients=3)])
    with open_results(path) as results:
        cohort, clients = results.scenarios
        assert (cohort.clients, cohort.members, cohort.privacy) == (1, 7, told)
        assert (clients.clients, clients.members, clients.privacy) == (3, 3, {})
        assert list(cohort.attacks) == ["llg", "llg+rounds"]
        info = cohort.attacks["llg+rounds"]
        assert (info.target, info.adapted) == ("accumulated", "llg")
        assert info.adaptation == ["undoes what it can"]
        assert cohort.array("updates/arrived", 0, 1).shape == (1, 7)
    with open_results(age(path, "1.1")) as results:
        old = results.scenarios[0].attacks["llg+rounds"]
        assert (old.target, old.adapted, old.adaptation) == ("update", "", [])
        assert results.scenarios[0].privacy == {}


def test_arrays(path):
    with open_results(path) as results, h5py.File(path) as file:
        for index, scenario in enumerate(results.scenarios):
            for name in ("truth/counts", "attacks/llg/counts", "attacks/llg/calibration/impact"):
                assert np.array_equal(scenario.array(name), file[f"scenarios/000{index}/{name}"])
        first, second = results.scenarios
        assert first.array("truth/counts", 2, 4).shape == (2, 2, 10)
        assert first.array("truth/counts", 5, 99).shape == (1, 2, 10)
        assert first.array("client").tolist() == [0, 1]
        assert first.has("observations/bias_gradient")
        assert not second.has("observations/bias_gradient")


def test_blocks_cover_the_committed_rounds_once(path):
    with open_results(path) as results:
        scenario = results.scenarios[0]
        assert list(scenario.blocks(entries=45)) == [(0, 2), (2, 4), (4, 6)]
        assert list(scenario.blocks(entries=1)) == [(r, r + 1) for r in range(6)]
        assert list(scenario.blocks()) == [(0, 6)]


def test_nothing_beyond_the_committed_rounds_is_returned(tmp_path):
    build(tmp_path / "run.h5.partial", [Spec(rounds=6), Spec(rounds=6)], committed=[4, 0])
    with open_results(tmp_path / "run.h5") as results:
        assert results.path.name == "run.h5.partial"
        assert not results.complete
        first, second = results.scenarios
        assert (first.committed, first.rounds) == (4, 6)
        for name in ("truth/counts", "observations/row_sums", "updates/finite", "round"):
            assert len(first.array(name)) == 4
            assert len(first.array(name, 3, 6)) == 1
            assert len(first.array(name, 5)) == 0
            assert len(second.array(name)) == 0
        assert first.array("truth/counts").max() <= 8
        assert len(first.array("class")) == 10


def test_a_file_of_the_final_name_without_all_rounds_is_not_complete(tmp_path):
    build(tmp_path / "run.h5", [Spec(rounds=6)], committed=[5])
    with open_results(tmp_path / "run.h5") as results:
        assert not results.complete


def test_a_partial_file_with_all_rounds_is_not_complete_until_it_is_renamed(tmp_path):
    build(tmp_path / "run.h5.partial", [Spec(rounds=3)])
    with open_results(tmp_path / "run.h5") as results:
        assert not results.complete
        results.path.rename(tmp_path / "run.h5")
        results.refresh()
        assert results.complete
    with open_results(tmp_path / "run.h5.partial") as results:
        assert results.path == tmp_path / "run.h5"


def test_a_file_that_grows(tmp_path):
    with (
        Writer(tmp_path / "run.h5.partial", rounds=150) as writer,
        open_results(tmp_path / "run.h5") as results,
    ):
        scenario = results.scenarios[0]
        assert scenario.committed == 0
        for goal in (50, 100, 150):
            writer.start(goal)
            while scenario.committed < goal:
                results.refresh()
                counts = scenario.array("attacks/llg/counts")
                expected = np.arange(scenario.committed)[:, None, None]
                assert np.array_equal(counts, np.broadcast_to(expected, counts.shape))
            writer.wait_for(goal)
        assert not results.complete


def test_rounds_committed_since_the_last_refresh_are_not_returned(tmp_path):
    with (
        Writer(tmp_path / "run.h5.partial", rounds=20) as writer,
        open_results(tmp_path / "run.h5") as results,
    ):
        for goal in (7, 20):
            before = results.scenarios[0].committed
            writer.start(goal)
            writer.wait_for(goal)
            assert len(results.scenarios[0].array("truth/counts")) == before
            results.refresh()
            assert len(results.scenarios[0].array("truth/counts")) == goal


@pytest.mark.parametrize("rounds", [0, 1, 60])
def test_a_file_whose_writer_was_killed(tmp_path, rounds):
    with Writer(tmp_path / "run.h5.partial", rounds=100) as writer:
        writer.start(rounds)
        writer.wait_for(rounds)
        writer.start(100)
        writer.kill()
        with open_results(tmp_path / "run.h5") as results:
            scenario = results.scenarios[0]
            assert rounds <= scenario.committed <= 100
            counts = scenario.array("attacks/llg/counts")[:, 0, 0]
            assert counts.tolist() == list(range(scenario.committed))


def test_a_closed_file_says_so(path):
    results = open_results(path)
    results.close()
    with pytest.raises(ValueError, match="closed"):
        results.refresh()


def refuses(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        open_results(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (*words, path.name):
        assert word in message


def test_no_such_file(tmp_path):
    refuses(tmp_path / "run.h5", "no such file", "run.h5.partial")
    refuses(tmp_path, "folder")


def test_no_permission(path, monkeypatch):
    def deny(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Unable to synchronously open file")

    # Root may read everything, so a mode of 0 would not do.
    monkeypatch.setattr(h5py, "File", deny)
    refuses(path, "permission")


@pytest.mark.parametrize("content", [b"", b"title: an experiment\n" * 50])
def test_no_hdf5_file(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    refuses(path, "no HDF5 file")


def test_hdf5_file_of_another_kind(tmp_path):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["x"] = [1, 2]
    refuses(path, "no results file", "encoding-type")
    with h5py.File(path, "a") as file:
        file.attrs["encoding-type"], file.attrs["encoding-version"] = "anndata", "0.1.0"
    refuses(path, "no results file", "anndata")


@pytest.mark.parametrize("where", ["/", "/ranks", "/scenarios", "/scenarios/0001"])
def test_unknown_major_version(path, where):
    with h5py.File(path, "a") as file:
        file[where].attrs["encoding-version"] = "2.1"
    refuses(path, "2.1", "reads version 1", where)


def test_a_newer_minor_version_may_add_groups_and_attributes(path):
    with h5py.File(path, "a") as file:
        file.attrs["encoding-version"] = "1.7"
        file.attrs["mood"] = "good"
        added = file.create_group("scenarios/0000/novelty")
        added.attrs["encoding-type"], added.attrs["encoding-version"] = "novelty", "1.0"
        added["x"] = [1]
    with open_results(path) as results:
        assert results.attributes["mood"] == "good"
        assert len(results.scenarios[0].array("truth/counts")) == 6
        with pytest.raises(UserError, match="novelty"):
            results.scenarios[0].array("novelty/x")


def test_an_array_of_an_unknown_version_is_refused(path):
    with h5py.File(path, "a") as file:
        file["scenarios/0000/truth"].attrs["encoding-version"] = "3.0"
    with open_results(path) as results:
        assert len(results.scenarios[0].array("updates/finite")) == 6
        with pytest.raises(UserError, match=r"truth .*version 3\.0"):
            results.scenarios[0].array("truth/counts")


def test_unknown_array_names_the_nearest(path):
    with open_results(path) as results:
        for name in ("truth/count", "nothing/at/all", "truth"):
            with pytest.raises(UserError, match="scenario 0 has no array"):
                results.scenarios[0].array(name)
        with pytest.raises(UserError, match=r"did you mean 'truth/counts'\?"):
            results.scenarios[0].array("truth/count")


@pytest.mark.parametrize("kept", [0.0005, 0.3, 0.99])
def test_truncated_file(path, kept):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    refuses(path, "truncated or damaged")


def test_damaged_chunk_names_the_array(path):
    with h5py.File(path) as file:
        chunk = file["scenarios/0000/truth/counts"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 9] ^= 0xFF
    path.write_bytes(content)
    with open_results(path) as results:
        assert len(results.scenarios[1].array("truth/counts")) == 5
        with pytest.raises(UserError, match=r"damaged.*truth/counts"):
            results.scenarios[0].array("truth/counts")


@pytest.mark.parametrize("attribute", ["parameters", "swept"])
def test_damaged_attributes(path, attribute):
    with h5py.File(path, "a") as file:
        file["scenarios/0000"].attrs[attribute] = "{"
    refuses(path, "damaged")


@pytest.mark.parametrize("count", [-1, 7])
def test_impossible_counts_of_committed_rounds(path, count):
    with h5py.File(path, "a") as file:
        file["committed_rounds"][0] = count
    refuses(path, f"{count} committed of 6 rounds")


HOLD = """
import sys, h5py
file = h5py.File(sys.argv[1], "a", libver=("v110", "v110"))
print("open", flush=True)
sys.stdin.read()
"""


def test_a_file_that_is_open_without_swmr(path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()
        refuses(path, "locked", "HDF5_USE_FILE_LOCKING")
        process.kill()
    refuses(path, "h5clear -s")


def test_reading_changes_nothing(path):
    copy = shutil.copy(path, path.with_name("copy.h5"))
    with open_results(path) as results:
        results.scenarios[0].array("truth/counts")
    assert path.read_bytes() == copy.read_bytes()


def test_a_cohort_that_is_more_than_one_update_is_refused(tmp_path):
    path = build(tmp_path / "run.h5", [Spec(rounds=2, clients=3)])
    with h5py.File(path, "a") as file:
        group = file["scenarios/0000"]
        group["member"] = np.arange(7)
        group["member"].make_scale("member")
    with pytest.raises(UserError, match="7 members and 3 clients"):
        open_results(path)
