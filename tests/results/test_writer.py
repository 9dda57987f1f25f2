"""The results file as it is written: declared, filled round by round, readable at any moment."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray
from launching import PATIENCE
from written import (
    DECLARED,
    FILLS,
    HEADER,
    LENGTHS,
    SMALL,
    committed,
    contents,
    fill,
    make,
    opened,
    rows_of,
)

from testbed.errors import UserError
from testbed.results import writer as writer_module
from testbed.results.opening import open_file
from testbed.results.provenance import provenance
from testbed.results.records import ScenarioHeader
from testbed.results.schema import (
    FILE_ENCODING,
    chunk_shape,
    scenario_arrays,
    uncompressed_bytes,
)
from testbed.results.writer import check_output, partial_path

# What is declared


def test_arrays_have_the_declared_axes_types_and_fills(tmp_path: Path) -> None:
    writer = make(tmp_path / "a.h5")
    writer.close()
    with open_file(partial_path(tmp_path / "a.h5")) as file:
        for index, header in enumerate((HEADER, SMALL)):
            group = file[f"scenarios/{index:04d}"]
            for name, spec in header.arrays.items():
                dataset = group[name]
                assert dataset.dtype == np.dtype(spec.dtype)
                assert dataset.shape == tuple(header.lengths[axis] for axis in spec.axes)
                scales = [[scale.name for scale in dim.values()] for dim in dataset.dims]
                assert scales == [[f"{group.name}/{axis}"] for axis in spec.axes]
                expected = np.full(dataset.shape, FILLS[dataset.dtype.kind], dataset.dtype)
                np.testing.assert_array_equal(dataset[...], expected)
                assert dataset.fletcher32
                large = ("weight_gradient", "observations/statistics", "observations/update")
                assert (dataset.compression == "gzip") == (not name.endswith(large))
            for axis, length in header.lengths.items():
                np.testing.assert_array_equal(group[axis][...], np.arange(length))
                assert group[axis].dtype == np.int64
                assert group[axis].is_scale


def test_arrays_are_those_of_the_format() -> None:
    page = (Path(__file__).parents[2] / "docs/file-format.md").read_text()
    table = page.split("## A scenario")[1].split("| dataset")[1].split("Each `attacks/LABEL`")[0]
    described: dict[str, tuple[list[str], list[str]]] = {}
    for line in table.splitlines():
        if line.startswith("| `"):
            name, axes, dtype, meaning = (cell.strip() for cell in line.split("|")[1:5])
            names = [name.strip("`")]
            if names == ["timings/NAME"]:
                names = [f"timings/{phase}" for phase in re.findall("`([a-z]+)`", meaning)]
            kind = axes.partition(" [")[0].split(", "), dtype.split(" or ")
            described |= dict.fromkeys(names, kind)
    found: set[str] = set()
    for array, spec in HEADER.arrays.items():
        general = re.sub("attacks/[a-z]+", "attacks/LABEL", array)
        general = re.sub("calibration/[a-z]+", "calibration/NAME", general)
        general_axes, dtypes = described[general]
        assert list(spec.axes[: len(general_axes)]) == general_axes, array
        more = spec.axes[len(general_axes) :]
        assert more in ((), ("class",), ("client", "class", "length_4")), array
        assert np.dtype(spec.dtype).name in dtypes, array
        assert spec.dtype[0] in "<|", array
        found.add(general)
    assert found == described.keys()


def test_what_is_known_of_a_cohort_s_members_has_an_axis_of_its_own() -> None:
    plain, summed = (
        scenario_arrays(bias=True, weight=False, attacks=DECLARED, member=member)
        for member in (False, True)
    )
    assert {*summed} - {*plain} == {"updates/clipped"}
    for name, spec in summed.items():
        of_members = name.startswith(("updates/", "timings/client_"))
        assert ("member" in spec.axes) == of_members
        if name in plain and of_members:
            assert plain[name].axes == ("round", "client")
            assert spec == replace(plain[name], axes=("round", "member"))
        elif name in plain:
            assert spec == plain[name]


def test_calibrations_are_each_update_s_own_where_local_steps_vary() -> None:
    usual, varying = (
        scenario_arrays(bias=True, weight=False, attacks=DECLARED, varying=varying)
        for varying in (False, True)
    )
    assert usual.keys() == varying.keys()
    changed = {name: spec.axes for name, spec in varying.items() if spec != usual[name]}
    assert changed == {
        "attacks/plus/calibration/impact": ("round", "client"),
        "attacks/plus/calibration/offset": ("round", "client", "class"),
        "attacks/random/calibration/seed": ("round", "client"),
    }
    for name, axes in changed.items():
        assert (axes[0], *axes[2:]) == usual[name].axes


def test_no_array_is_partly_scaled(tmp_path: Path) -> None:
    writer = make(tmp_path / "a.h5")
    writer.complete()
    found = contents(tmp_path / "a.h5")
    arrays = {name: item[2]["scales"] for name, item in found.items() if "scales" in item[2]}
    assert set(arrays) >= {"committed_rounds", "ranks/host", "ranks/local_rank"}
    assert len(arrays) == 23 + len(HEADER.arrays) + len(SMALL.arrays)
    assert all(len(scales) == 1 for axes in arrays.values() for scales in axes)
    assert arrays["committed_rounds"] == [["/scenario"]]
    assert arrays["ranks/host"] == [["/ranks/rank"]]
    assert arrays["starts/time"] == [["/starts/start"]]
    assert arrays["losses/seconds"] == [["/losses/loss"]]


def test_groups_say_how_they_are_encoded(tmp_path: Path) -> None:
    make(tmp_path / "a.h5").complete()
    own = "truth", "observations", "attacks", "rounds", "updates", "timings"
    expected = {"/": "testbed-results", "starts": "starts", "losses": "losses"}
    expected |= {"ranks": "ranks", "scenarios": "scenarios"}
    for index, header in ((0, HEADER), (1, SMALL)):
        scenario = f"scenarios/{index:04d}"
        expected[scenario] = "scenario"
        expected |= {f"{scenario}/{name}": name for name in own}
        expected[f"{scenario}/timings/attacks"] = "attack-timings"
        expected |= {f"{scenario}/attacks/{label}": "attack" for label in header.attacks}
    for label in ("plus", "random", "shares"):
        expected[f"scenarios/0000/attacks/{label}/calibration"] = "calibration"
    found = {}
    with h5py.File(tmp_path / "a.h5") as file:
        groups = {"/": file}
        file.visititems(
            lambda name, item: groups.update({name: item} if isinstance(item, h5py.Group) else {})
        )
        for name, group in groups.items():
            found[name] = group.attrs["encoding-type"]
            assert group.attrs["encoding-version"] == FILE_ENCODING[1]
    assert found == expected


def test_attributes(tmp_path: Path) -> None:
    make(tmp_path / "a.h5", attributes={"title": "Größe", "slurm_job": ""}).complete()
    with h5py.File(tmp_path / "a.h5") as file:
        assert (file.attrs["title"], file.attrs["slurm_job"]) == ("Größe", "")
        scenario = file["scenarios/0000"].attrs
        assert json.loads(scenario["swept"]) == {"federation.batch_size": 4}
        assert json.loads(scenario["parameters"]) == {"seed": 0, "attacks": ["llg"]}
        assert (scenario["model_parameters"], scenario["model_buffers"]) == (100, 7)
        assert scenario["last_layer"] == "classifier"
        attack = dict(file["scenarios/0000/attacks/plus"].attrs)
        assert json.loads(attack.pop("options")) == {"scaling": "consistent"}
        assert {key: attack[key] for key in ("name", "title", "knowledge", "source")} == {
            "name": "llg_plus",
            "title": "LLG+",
            "knowledge": "auxiliary",
            "source": "a paper",
        }
        shares = dict(file["scenarios/0000/attacks/shares"].attrs)
        assert (shares["answers"], shares["not_applicable"]) == ("distribution", "")
        assert json.loads(shares["observes"]) == ["whole update"]
        assert json.loads(shares["assumes"]) == ["distinct labels"]
        assert json.loads(shares["broken_assumptions"]) == {"distinct labels": "8 labels"}
        assert (shares["target"], shares["adapted"]) == ("accumulated", "llg")
        assert json.loads(shares["adaptation"]) == ["noise: waits"]
        assert (attack["target"], attack["adapted"]) == ("update", "")
        assert json.loads(attack["adaptation"]) == []
        assert json.loads(scenario["privacy"]) == {"epsilon": 1.5}
        assert json.loads(file["scenarios/0001"].attrs["privacy"]) == {"epsilon": 1.5}


def test_ranks(tmp_path: Path) -> None:
    make(tmp_path / "a.h5").complete()
    with h5py.File(tmp_path / "a.h5") as file:
        ranks = file["ranks"]
        assert ranks["host"][...].tolist() == [b"node1", b"a-longer-name"]
        assert ranks["device"][...].tolist() == [b"cpu", b"cuda:0 NVIDIA H200"]
        assert ranks["role"][...].tolist() == [b"server", b"client"]
        assert ranks["local_rank"][...].tolist() == [0, 3]
        assert ranks["local_rank"].dtype == np.int32


def test_provenance_has_every_attribute_of_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    attributes = provenance("A title", "seed: 0\n", "Open MPI 5")
    page = (Path(__file__).parents[2] / "docs/file-format.md").read_text()
    table = page.split("## Root")[1].split("| dataset")[0]
    named = {
        name.strip(" `")
        for line in table.splitlines()
        if line.startswith("| `")
        for name in line.split("|")[1].split(",")
    }
    assert {*attributes, "run", "share"} == named  # which run and share it is, the run says
    assert attributes["slurm_job"] == "4711"
    assert attributes["mpi_library"] == "Open MPI 5"
    assert attributes["created"].endswith("+00:00")
    assert json.loads(attributes["dependencies"])["numpy"] == np.__version__
    assert all(isinstance(value, str) for value in attributes.values())
    monkeypatch.delenv("SLURM_JOB_ID")
    assert provenance("", "", "")["slurm_job"] == ""


# What is written


def test_rounds_come_back_as_they_were_given(tmp_path: Path) -> None:
    writer = make(tmp_path / "a.h5")
    fill(writer)
    fill(writer, SMALL, 1)
    writer.complete()
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["committed_rounds"][...].tolist() == [7, 2]
        for index, header in ((0, HEADER), (1, SMALL)):
            for round_ in range(header.lengths["round"]):
                for name, row in rows_of(header, round_).items():
                    stored = file[f"scenarios/{index:04d}/{name}"][round_]
                    np.testing.assert_array_equal(stored, row)


def test_absent_rows_keep_their_fill_value(tmp_path: Path) -> None:
    # Some in every commit, so that a block is written in which a row is missing.
    given: list[set[str]] = [
        {"rounds/loss", "attacks/llg/counts"},
        {"updates/finite"},
        {"rounds/loss", "attacks/random/calibration/seed"},
        {"attacks/llg/counts"},
    ]
    writer = make(tmp_path / "a.h5")
    for round_, names in enumerate(given):
        rows = rows_of(HEADER, round_)
        writer.append(0, round_, {name: rows[name] for name in names})
        if round_ == 1:
            writer.commit()
    writer.complete()
    with h5py.File(tmp_path / "a.h5") as file:
        for name in HEADER.arrays:
            values = file[f"scenarios/0000/{name}"][...]
            for round_, names in enumerate([*given, set(), set(), set()]):
                if name in names:
                    expected = rows_of(HEADER, round_)[name]
                else:
                    expected = np.full_like(values[round_], FILLS[values.dtype.kind])
                np.testing.assert_array_equal(values[round_], expected)


def test_rows_may_be_numbers(tmp_path: Path) -> None:
    writer = make(tmp_path / "a.h5")
    writer.append(0, 0, {"rounds/loss": 0.5, "attacks/random/calibration/seed": 2**64 - 1})
    writer.complete()
    with h5py.File(tmp_path / "a.h5") as file:
        group = file["scenarios/0000"]
        assert group["rounds/loss"][0] == 0.5
        assert group["attacks/random/calibration/seed"][0] == 2**64 - 1


def test_undeclared_arrays_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "a.h5") as writer:
        with pytest.raises(KeyError, match=r"not declared: \['rounds/lost', 'x'\]"):
            writer.append(0, 0, {"rounds/loss": 1.0, "rounds/lost": 1.0, "x": 1})
        with pytest.raises(KeyError, match="bias_gradient"):
            writer.append(1, 0, {"observations/bias_gradient": np.zeros((1, 3))})
        # A refused round is as if it had not been given.
        writer.append(0, 0, {"rounds/loss": 1.0})


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("wrong", [0, 1, 3, 6, -1])
def test_rounds_come_in_order(tmp_path: Path, wrong: int, committed: bool) -> None:
    with opened(tmp_path / "a.h5") as writer:
        for round_ in range(2):
            writer.append(0, round_, {"rounds/loss": 1.0})
        if committed:
            writer.commit()
        with pytest.raises(ValueError, match=f"scenario 0: round {wrong} of 7, expected round 2"):
            writer.append(0, wrong, {"rounds/loss": 9.0})
        writer.append(0, 2, {"rounds/loss": 3.0})
        writer.append(1, 0, {"rounds/loss": 4.0})
        writer.complete()
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["committed_rounds"][...].tolist() == [3, 1]
        losses = file["scenarios/0000/rounds/loss"][...]
        np.testing.assert_array_equal(losses, [1, 1, 3, *[np.nan] * 4])


def test_there_are_no_rounds_beyond_the_last(tmp_path: Path) -> None:
    with opened(tmp_path / "a.h5") as writer:
        fill(writer, SMALL, 1)
        with pytest.raises(ValueError, match="scenario 1: round 2 of 2"):
            writer.append(1, 2, {"rounds/loss": 1.0})


def test_commits_come_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [100.0]
    monkeypatch.setattr("testbed.results.writer.time.monotonic", lambda: seconds[0])
    partial = partial_path(tmp_path / "a.h5")
    with opened(tmp_path / "a.h5", commit_seconds=5.0) as writer:
        seen = []
        for round_ in range(7):
            seconds[0] += 2
            writer.append(0, round_, rows_of(HEADER, round_))
            seen.append(committed(partial)[0])
        assert seen == [0, 0, 3, 3, 3, 6, 6]
        writer.commit()
        assert committed(partial) == [7, 0]
    assert committed(partial) == [7, 0]


def test_large_rounds_do_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = rows_of(HEADER, 0)
    size = sum(values.nbytes for values in row.values())
    monkeypatch.setattr(writer_module, "_PENDING_BYTES", 2 * size)
    partial = partial_path(tmp_path / "a.h5")
    with opened(tmp_path / "a.h5") as writer:
        seen = []
        for round_ in range(7):
            writer.append(0, round_, row)
            seen.append(committed(partial)[0])
        assert seen == [0, 0, 3, 3, 3, 6, 6]


def test_commit_without_rounds_changes_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "a.h5") as writer:
        writer.append(0, 0, {"rounds/loss": 1.0})
        for _ in range(3):
            writer.commit()
        assert committed(partial_path(tmp_path / "a.h5")) == [1, 0]


def test_nothing_is_created_once_readers_may_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path / "a.h5", commit_seconds=0.0) as writer:
        before = set(contents(partial_path(tmp_path / "a.h5")))

        def refuse(*_: object, **__: object) -> None:
            pytest.fail("SWMR supports no new object")

        for owner, name in (
            (h5py.Group, "create_dataset"),
            (h5py.Group, "create_group"),
            (h5py.Group, "__setitem__"),
            (h5py.AttributeManager, "create"),
            (h5py.AttributeManager, "__setitem__"),
            (h5py.Dataset, "resize"),
        ):
            monkeypatch.setattr(owner, name, refuse)
        fill(writer)
        writer.commit()
        assert set(contents(partial_path(tmp_path / "a.h5"))) == before


# Its life


READER = """
import sys, h5py, numpy as np
file = h5py.File(sys.argv[1], "r", swmr=True)
rounds, losses = file["committed_rounds"], file["scenarios/0000/updates/loss"]
for line in sys.stdin:
    rounds.refresh()
    losses.refresh()
    done = int(rounds[0])
    print(done, *losses[:done, 0], int(np.isnan(losses[done:]).all()), flush=True)
"""


def test_a_reader_sees_the_committed_rounds_of_a_run(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "a.h5") as writer,
        subprocess.Popen(
            [sys.executable, "-c", READER, str(partial_path(tmp_path / "a.h5"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as reader,
    ):
        assert reader.stdin is not None
        assert reader.stdout is not None

        def look() -> list[float]:
            print(file=reader.stdin, flush=True)
            assert reader.stdout is not None
            return [float(word) for word in reader.stdout.readline().split()]

        losses = [rows_of(HEADER, round_)["updates/loss"] for round_ in range(7)]
        assert look() == [0, 1]
        for round_ in range(7):
            writer.append(0, round_, rows_of(HEADER, round_))
            if round_ in (1, 2, 5):
                writer.commit()
                assert look() == [round_ + 1, *(loss[0] for loss in losses[: round_ + 1]), 1]
        assert look()[0] == 6
        reader.stdin.close()
        assert reader.wait(PATIENCE) == 0


def test_an_incomplete_file_keeps_every_round_that_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with opened(path) as writer:
        writer.append(0, 0, rows_of(HEADER, 0))
        writer.commit()
        writer.append(0, 1, rows_of(HEADER, 1))
    assert not path.exists()
    assert committed(partial_path(path)) == [2, 0]
    writer.close()  # once more does no harm


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from written import HEADER, make, rows_of
writer = make(Path(sys.argv[1]))
for round_ in range(5):
    writer.append(0, round_, rows_of(HEADER, round_))
    if round_ == 2:
        writer.commit()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_its_committed_rounds(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), str(here), str(here.parents[1])],
        capture_output=True,
        check=False,
        env=os.environ,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    partial = partial_path(path)
    assert committed(partial) == [3, 0]
    with open_file(partial) as file:
        stored = file["scenarios/0000/observations/weight_gradient"][2]
        expected = rows_of(HEADER, 2)["observations/weight_gradient"]
        np.testing.assert_array_equal(stored, expected)


def test_a_complete_file_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with opened(path) as writer:
        assert [file.name for file in tmp_path.iterdir()] == ["a.h5.partial"]
        fill(writer)
        writer.complete()
        assert [file.name for file in tmp_path.iterdir()] == ["a.h5"]
    with h5py.File(path, "r") as file:  # plainly: no writer has it open
        assert file["committed_rounds"][0] == 7


LONG = replace(HEADER, lengths={**LENGTHS, "round": 80})
# Whole updates of 4 MB: five clients fill two chunks of three, and the axis counts too.
WIDE = replace(HEADER, lengths={**LENGTHS, "round": 1, "client": 5, "parameter": 1_000_000})


@pytest.mark.parametrize("commit_seconds", [0.0, 3600.0])
def test_a_compact_copy_is_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit_seconds: float
) -> None:
    copied: list[int] = []
    original = writer_module.copy_all

    def spy(source: h5py.File, target: h5py.File) -> None:
        copied.append(partial_path(path).stat().st_size)
        original(source, target)

    monkeypatch.setattr(writer_module, "copy_all", spy)
    path, plain = tmp_path / "a.h5", tmp_path / "plain.h5"
    options: dict[str, Any] = {"scenarios": [LONG, SMALL]}
    with opened(path, commit_seconds=commit_seconds, **options) as writer:
        fill(writer, LONG)
        before = contents(partial_path(path)) if commit_seconds == 0 else None
        writer.complete()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.h5"]
    if before is None:  # one commit wastes nothing
        assert copied == []
        return
    assert len(copied) == 1
    assert path.stat().st_size < 0.7 * copied[0]
    assert contents(path) == before
    with opened(plain, **options) as writer:
        fill(writer, LONG)
        writer.complete()
    assert len(copied) == 1
    one, other = contents(path), contents(plain)
    for name in ("starts/time",):  # when it was
        del one[name], other[name]
    assert one == other
    assert path.stat().st_size == pytest.approx(plain.stat().st_size, rel=0.2)


@pytest.mark.parametrize(
    "header", [LONG, replace(HEADER, lengths={**LENGTHS, "class": 100}), SMALL, WIDE]
)
@pytest.mark.parametrize("commit_seconds", [0.0, 3600.0])
def test_a_file_is_no_larger_than_check_says(
    tmp_path: Path, header: ScenarioHeader, commit_seconds: float
) -> None:
    path = tmp_path / "a.h5"
    sizes = []
    for number in (1, 2):  # what a scenario adds to a file
        options: dict[str, Any] = {"scenarios": [header] * number, "overwrite": True}
        with opened(path, commit_seconds=commit_seconds, **options) as writer:
            for scenario in range(number):
                fill(writer, header, scenario)
            writer.complete()
        sizes.append(path.stat().st_size)
    bound = uncompressed_bytes(header.arrays, header.lengths, header.lengths["round"])
    assert bound / 4 < sizes[1] - sizes[0] <= bound


# Names that are taken


def test_existing_files_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    for taken, way in ((path, "choose another name"), (partial_path(path), "by `resume`")):
        taken.write_text("mine")
        with pytest.raises(UserError, match=f"^{taken}: the file exists: .*{way}.*--overwrite"):
            make(path)
        assert taken.read_text() == "mine"
        taken.unlink()
    make(path).complete()


def test_overwriting_replaces_a_file_only_when_the_run_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    path.write_text("mine")
    partial_path(path).write_text("left over")
    with opened(path, overwrite=True) as writer:
        fill(writer)
        assert path.read_text() == "mine"
        writer.complete()
    assert committed(path) == [7, 0]
    assert not partial_path(path).exists()


HOLDER = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from written import HEADER, make, rows_of
writer = make(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
writer.append(0, 0, rows_of(HEADER, 0))
writer.commit()
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_a_run_is_writing_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    path, here = tmp_path / "a.h5", Path(__file__).parent
    line = [sys.executable, "-c", HOLDER, str(path), str(here), str(here.parent)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match="a run is writing this file"):
            check_output(path, overwrite=overwrite)
        with pytest.raises(UserError, match="a run is writing this file"):
            make(path, overwrite=overwrite)
        run.communicate("go on\n", timeout=PATIENCE)
    assert run.returncode == 0
    assert committed(partial_path(path)) == [1, 0]
    if not overwrite:
        with pytest.raises(UserError, match="left by a run that was stopped"):
            check_output(path, overwrite=False)
    else:
        check_output(path, overwrite=True)


def test_a_file_has_its_name_only_when_it_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, names = tmp_path / "a.h5", []
    original = os.fsync

    def look(descriptor: int) -> None:
        names.append(sorted(file.name for file in tmp_path.iterdir()))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    with opened(path):
        assert committed(partial_path(path)) == [0, 0]
    assert names == [["a.h5.creating"]]


@pytest.mark.parametrize("overwrite", [False, True])
def test_places_where_no_file_can_be(tmp_path: Path, overwrite: bool) -> None:
    missing = tmp_path / "no" / "a.h5"
    with pytest.raises(UserError, match=f"^{missing}: the folder {missing.parent} does not exist"):
        check_output(missing, overwrite=overwrite)
    with pytest.raises(UserError, match=f"^{tmp_path}: this is a folder"):
        check_output(tmp_path, overwrite=overwrite)
    partial_path(tmp_path / "b.h5").mkdir()
    with pytest.raises(UserError, match=f"^{tmp_path / 'b.h5'}.partial: "):
        make(tmp_path / "b.h5", overwrite=overwrite)


# Other readers


def test_xarray_opens_every_group_with_named_axes(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    writer = make(path)
    fill(writer)
    fill(writer, SMALL, 1)
    writer.complete()
    for index, header in ((0, HEADER), (1, SMALL)):
        for folder in sorted({name.rpartition("/")[0] for name in header.arrays}):
            group = f"scenarios/{index:04d}/{folder}"
            with xarray.open_dataset(path, engine="h5netcdf", group=group) as dataset:
                inside = {name: spec for name, spec in header.arrays.items()
                          if name.rpartition("/")[0] == folder}  # fmt: skip
                assert set(dataset.variables) == {name.rpartition("/")[2] for name in inside}
                for name, spec in inside.items():
                    array = dataset[name.rpartition("/")[2]]
                    assert array.dims == spec.axes
                    expected = rows_of(header, 1)[name]
                    np.testing.assert_array_equal(array.isel(round=1).values, expected)
    with xarray.open_dataset(path, engine="h5netcdf") as dataset:
        assert dataset["committed_rounds"].dims == ("scenario",)
    with xarray.open_dataset(path, engine="h5netcdf", group="ranks") as dataset:
        assert dataset["host"].dims == ("rank",)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1000, 1, 10), (100, 1, 10)),  # many small rounds, in equal parts
        ((5, 1, 10), (5, 1, 10)),  # never longer than the array
        ((1000,), (1000,)),
        ((9000,), (1000,)),
        ((50, 3, 500), (1, 3, 500)),  # as soon as one is larger than a page
        ((50, 1000, 10), (1, 1000, 10)),  # a round of many clients
        ((50, 100_000, 100, 768), (1, 54, 100, 768)),  # 30 GB a round: some clients of it
    ],
)
def test_chunks_hold_many_small_rounds_or_some_clients_of_a_large_one(
    shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert chunk_shape(shape, 4) == expected


def test_no_room_for_a_compact_copy_costs_nothing_but_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.h5"
    monkeypatch.setattr("testbed.results.writer._OVERHEAD", -(10**9))  # always wasteful
    monkeypatch.setattr("testbed.results.writer.copy_all", full)
    writer = make(path)
    fill(writer)
    writer.complete()
    assert committed(path) == [7, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["a.h5"]


def test_a_file_that_cannot_be_declared_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("testbed.results.declaring._declare_scenario", full)
    with pytest.raises(UserError, match=r"cannot create the results file: .*No space left"):
        make(tmp_path / "a.h5")
    assert list(tmp_path.iterdir()) == []
