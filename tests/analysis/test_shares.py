import dataclasses
import itertools

import h5py
import pandas as pd
import pytest
from build_file import Spec, build
from hypothesis import given
from hypothesis import strategies as st
from launching import run_here, write_experiment
from layout import check_layout
from sharing import share, shares

import analysis
import analysis.figures
from analysis.__main__ import main
from analysis.compare import render_comparison
from analysis.figures import figures
from analysis.scenarios import merge_seeds, seeds_note
from analysis.share_notes import share_notes
from analysis.shares import ShareFile, find_sets, join_shares, share_sets
from analysis.table import render
from analysis.tradeoff import render_tradeoff
from analysis.tradeoff_figure import save_tradeoff

FILE = ShareFile(
    file="", place=0, count=1, run="x", scenarios=8, committed=5, planned=5, complete=True
)


def told(file, part, **changes):
    place, count = part
    return dataclasses.replace(FILE, file=file, place=place, count=count, **changes)


def grouped(files):
    return [one.files for one in share_sets(files)]


def drawn_numbers(figure):
    """Return all that a figure shows, as text and numbers."""
    found = [figure.get_suptitle(), [text.get_text() for text in figure.findobj() if
                                     hasattr(text, "get_text")]]  # fmt: skip
    for axes in figure.axes:
        found += [line.get_xydata().tolist() for line in axes.get_lines()]
        found += [path.vertices.tolist() for one in axes.collections for path in one.get_paths()]
        found += [one.get_offsets().tolist() for one in axes.collections]
        found += [patch.get_bbox().bounds for patch in axes.patches if hasattr(patch, "get_bbox")]
    return repr(found)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Return the file of a real sweep over four scenarios, and the two of its shares."""
    folder = tmp_path_factory.mktemp("sweep")
    experiment = write_experiment(
        folder / "e.yaml",
        sweep={"federation.batch_size": [2, 8], "federation.learning_rate": [0.1, 0.2]},
        federation={"rounds": 3, "clients": 2, "fresh_model": False, "evaluate_every": 1},
        attacks=["random", "llg", "ilrg"],
    )
    assert run_here("run", experiment, "-o", folder / "whole.h5").status == 0
    parts = [folder / f"part_{i}of2.h5" for i in range(2)]
    for i, part in enumerate(parts):
        assert run_here("run", experiment, "-o", part, "--share", f"{i}/2").status == 0
    return folder / "whole.h5", parts


def test_tables_of_the_shares_of_a_run_are_those_of_the_whole_to_the_byte(sweep, capsys):
    whole, parts = sweep
    tables = [
        *(["table", "--rows", "attacks"], ["table", "--per-seed", "--format", "latex"]),
        *(["compare", "--attack", "ilrg"], ["tradeoff"]),
    ]
    for arguments in tables:
        texts = []
        for files in ([whole], parts[::-1]):
            assert main([*arguments, *map(str, files)]) == 0
            texts.append(capsys.readouterr())
        assert texts[0] == texts[1]
        assert "share" not in texts[0].out
        assert texts[0].err == ""


def test_the_tidy_table_of_shares_differs_in_the_name_of_the_file_alone(sweep):
    whole, parts = sweep
    found, expected = (render(analysis.load(*files), "csv") for files in (parts, [whole]))
    assert found.replace(str(parts[0].with_name("part_*of2.h5")), str(whole)) == expected


def test_figures_of_shares_are_one_set_with_the_numbers_of_the_whole(sweep, tmp_path, monkeypatch):
    whole, parts = sweep
    drawn = {}
    monkeypatch.setattr(
        analysis.figures,
        "save_figure",
        lambda figure, path: drawn.setdefault(path, drawn_numbers(figure)) and path,
    )
    kinds = ("success", "rounds", "occurrences")
    for files, stem in ([whole], "whole"), (parts[::-1], "part"):
        names = [path.name for path in figures(files, tmp_path)]
        assert names == [f"{stem}-{kind}.png" for kind in kinds]
    for kind in kinds:
        one, other = (drawn[tmp_path / f"{stem}-{kind}.png"] for stem in ("whole", "part"))
        assert one == other
        assert len(one) > 1000


def test_shares_of_an_experiment_are_one_file_in_the_order_of_the_sweep(tmp_path):
    specs = [Spec({"seed": seed, "a.b": value}, rounds=2) for seed in (1, 2) for value in (0, 1, 2)]
    whole = analysis.load(build(tmp_path / "whole.h5", specs))
    parts = [share(tmp_path, specs, place, (place, 2)) for place in (1, 0)]
    frame = analysis.load(*parts)
    assert frame["scenario"].unique().tolist() == [1, 3, 5, 0, 2, 4]
    joined = join_shares(frame)
    assert joined["file"].unique().tolist() == [str(parts[1])]
    assert joined["scenario"].unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert joined["b"].tolist() == whole["b"].tolist()
    assert sorted(joined.index) == frame.index.tolist()
    merged = merge_seeds(joined)
    assert merged["scenario"].unique().tolist() == [0, 1, 2]
    assert seeds_note(joined, merged) == ["averaged over 2 seeds"]
    assert join_shares(whole) is whole


def test_columns_are_in_the_order_of_the_sweep_whichever_file_is_first(tmp_path):
    specs = [Spec({"a.b": 1}, rounds=1), Spec({"c.d": 2, "a.b": 1}, rounds=1)]
    columns = [
        [*analysis.load(*files).columns]
        for files in itertools.permutations(shares(tmp_path, specs, 2))
    ]
    whole = analysis.load(build(tmp_path / "whole.h5", specs))
    assert columns == [[*whole.columns]] * 2


def test_which_files_belong_together():
    files = [
        told("a", (1, 2)),
        told("other", (0, 2), run="y"),
        told("b", (0, 2)),
        told("again", (0, 2)),
        told("thirds", (2, 3)),
        told("whole", (0, 1)),
        told("another whole", (0, 1)),
        told("old", (0, 1), run=""),
        told("older", (0, 1), run=""),
        told("also", (1, 2)),
    ]
    assert grouped(files) == [
        *(["b", "a"], ["other"], ["again", "also"], ["thirds"]),
        *(["whole"], ["another whole"], ["old"], ["older"]),
    ]


@given(st.permutations([(folder, i) for folder in "pq" for i in range(3)]))
def test_copies_in_two_folders_are_never_mixed(order):
    files = [told(f"{folder}/run_{i}of3.h5", (i, 3)) for folder, i in order]
    expected = [[f"{folder}/run_{i}of3.h5" for i in range(3)] for folder in "pq"]
    assert sorted(grouped(files)) == expected
    assert {one.name for one in share_sets(files)} == {"p/run_*of3.h5", "q/run_*of3.h5"}


@given(
    st.lists(
        st.tuples(st.sampled_from("xy"), st.sampled_from([(0, 2), (1, 2), (0, 3), (2, 3)])),
        max_size=12,
    )
)
def test_every_file_is_in_one_set_and_no_share_is_there_twice(parts):
    files = [told(str(i), part, run=run) for i, (run, part) in enumerate(parts)]
    sets = share_sets(files)
    assert sorted(itertools.chain(*(one.files for one in sets))) == sorted(f.file for f in files)
    assert len({one.name for one in sets}) == len(sets)
    for one in sets:
        assert len({(member.run, member.count) for member in one.members}) == 1
        places = [member.place for member in one.members]
        assert places == sorted(set(places))
    for run, count in itertools.product("xy", (2, 3)):
        own = [file.place for file in files if (file.run, file.count) == (run, count)]
        fewest = max((own.count(place) for place in own), default=0)
        assert sum(one.members[0].run == run and one.count == count for one in sets) == fewest


@pytest.mark.parametrize(
    ("names", "name", "stem"),
    [
        (["d/mnist_0of4.h5", "d/mnist_3of4.h5"], "d/mnist_*of4.h5", "mnist"),
        (["mnist_0of4.h5.partial", "mnist_3of4.h5"], "mnist_*of4.h5", "mnist"),
        (["a-00of04.hdf5", "a-03of04.hdf5"], "a-*of4.hdf5", "a"),
        (["c/mnist_0of4.h5", "d/mnist_3of4.h5"], "c/mnist_0of4.h5", "mnist"),
        (["0of4.h5", "3of4.h5"], "*of4.h5", "0of4"),
        (["cifar10-first.h5", "cifar10-last.h5"], "cifar10-first.h5", "cifar10"),
        (["part10.h5", "part13.h5"], "part10.h5", "part"),
        (["one.h5", "two.h5"], "one.h5", "one"),
        (["mnist_0of4.h5"], "mnist_0of4.h5", "mnist_0of4"),
        (["mnist_1of4.h5", "mnist_2of4.h5"], "mnist_1of4.h5", "mnist"),
    ],
)
def test_what_a_set_and_its_figures_are_called(names, name, stem):
    files = [told(file, (place, 4)) for file, place in zip(names, (0, 3), strict=False)]
    (one,) = share_sets(files[::-1])
    assert (one.name, one.stem) == (name, stem)


def test_shares_without_a_scenario_are_not_missing():
    def missing(scenarios):
        return share_sets([told("a", (1, 4), scenarios=scenarios)])[0].missing

    assert [missing(n) for n in (9, 3, 2, 0)] == [[0, 2, 3], [0, 2], [0], [0, 2, 3]]


def test_what_a_file_is_a_share_of(tmp_path):
    specs = [Spec(rounds=4)] * 5
    (one,) = find_sets([share(tmp_path, specs, "x", (1, 2), committed=[4, 3])])
    (file,) = one.members
    assert (file.place, file.count, file.scenarios) == (1, 2, 5)
    assert (file.committed, file.planned, file.complete) == (7, 8, False)
    (whole,) = find_sets([build(tmp_path / "whole.h5", specs)])
    assert (whole.count, whole.missing, share_notes([whole])) == (1, [], [])


def notes(*files):
    return share_notes(find_sets(files))


def test_missing_and_incomplete_shares_are_told(tmp_path):
    specs = [Spec({"a.b": value}, rounds=2) for value in range(6)]
    parts = shares(tmp_path, specs, 4)
    assert notes(*parts) == []
    assert notes(*parts[:3]) == [
        "share 3 of 0-3 is not among the files, with 1 of the 6 scenarios (run_3of4.h5 is there)"
    ]
    for part in parts[1:]:
        part.unlink()
    assert notes(parts[0]) == [
        "shares 1-3 of 0-3 are not among the files, with 4 of the 6 scenarios"
    ]
    parts[1] = share(tmp_path, specs, "run_1of4", (1, 4), committed=[1, 0])
    parts[2] = share(tmp_path, specs, "run_2of4", (2, 4), committed=[0])
    assert notes(parts[0])[0].endswith("(run_1of4.h5.partial, run_2of4.h5.partial are there)")
    assert notes(*parts[:3]) == [
        "share 3 of 0-3 is not among the files, with 1 of the 6 scenarios",
        "shares 1-2 of 0-3 are incomplete, with 1 of 6 rounds",
    ]


def test_a_share_of_another_run_with_the_name_of_one_that_is_missing_is_told(tmp_path):
    specs = [Spec({"a.b": value}, rounds=2) for value in range(6)]
    parts = shares(tmp_path, specs, 3)
    begun = ["seed: 1", "seed: 2", "seed: 1"]
    for part, line in zip(parts, begun, strict=True):
        with h5py.File(part, "a") as file:
            file.attrs["experiment"] = (
                f"{line}\ndata: {{name: digits}}\nmodel: {{name: cnn}}\nattacks: [llg]\n"
                "federation: {rounds: 2}\n"
                "sweep: {federation.batch_size: [1, 2, 3, 4, 5, 6]}\n"
            )
    first, second = notes(*parts)
    assert first == (
        "share 1 of 0-2 of run_*of3.h5 is not among the files, with 2 of the 6 scenarios "
        "(run_1of3.h5 is of another run: seed is 2 there, and 1 in the others)"
    )
    assert second.endswith(
        "(run_0of3.h5, run_2of3.h5 are of another run: seed is 1 there, and 2 in the others)"
    )
    parts[1].unlink()
    parts[2].rename(parts[1])
    assert notes(*parts[:2])[0].endswith("(run_1of3.h5 is share 2 of 0-2)")


def test_shares_may_be_started_with_their_data_in_different_places(tmp_path):
    specs = [Spec({"a.b": value}, rounds=2) for value in range(2)]
    parts = shares(tmp_path, specs, 2)
    for part, root in zip(parts, ("/scratch/1", "/scratch/2"), strict=True):
        with h5py.File(part, "a") as file:
            file.attrs["experiment"] = f"title: {root}\ndata: {{name: mnist, root: {root}}}\n"
    assert notes(*parts) == []


def test_a_share_that_is_there_twice_and_other_divisions_are_told(tmp_path):
    specs = [Spec({"a.b": value}, rounds=2) for value in range(6)]
    halves, thirds = (shares(tmp_path, specs, count) for count in (2, 3))
    (tmp_path / "copy").mkdir()
    copy = share(tmp_path / "copy", specs, "run_1of2", (1, 2))
    twice = notes(*halves, copy)
    assert twice == [
        "share 0 of 0-1 of run_1of2.h5 is not among the files, with 3 of the 6 scenarios",
        f"share 1 of 0-1 is there twice, in {tmp_path / 'run_*of2.h5'} and in {copy}: two runs",
    ]
    (divided,) = notes(*halves, *thirds)
    assert divided == (
        f"the same experiment is there in 2 shares, {tmp_path / 'run_*of2.h5'}, and in 3 shares, "
        f"{tmp_path / 'run_*of3.h5'}: two runs"
    )
    other = share(tmp_path, specs, "other_0of2", (0, 2), experiment="Another")
    assert notes(*halves, other) == [
        "share 1 of 0-1 of other_0of2.h5 is not among the files, with 3 of the 6 scenarios"
    ]
    frame = join_shares(analysis.load(*halves, copy, *thirds, other))
    assert [len(part["scenario"].unique()) for _, part in frame.groupby("file", sort=False)] == [
        *(6, 3, 6, 3)
    ]


def test_all_tables_and_figures_of_an_incomplete_set_say_so(tmp_path, monkeypatch):
    specs = [Spec({"federation.batch_size": n}, rounds=3, accuracy=0.5) for n in (1, 2, 4, 8)]
    paths = [*shares(tmp_path, specs, 4)[:2]]
    paths.append(share(tmp_path, specs, "run_2of4", (2, 4), committed=[1]))
    (tmp_path / "run_2of4.h5").unlink()
    (tmp_path / "run_3of4.h5").unlink()
    frame = analysis.load(*paths)
    expected = [
        "share 3 of 0-3 is not among the files, with 1 of the 4 scenarios",
        "share 2 of 0-3 is incomplete, with 1 of 3 rounds",
    ]
    for text in (render(frame), render_comparison(frame, "llg"), render_tradeoff(frame)):
        assert [line for line in text.splitlines() if line in expected] == expected
    drawn = []
    for name in ("figures", "tradeoff_figure"):
        monkeypatch.setattr(
            f"analysis.{name}.save_figure", lambda figure, path: drawn.append(figure) or path
        )
    assert len(figures(paths, tmp_path)) == 2
    save_tradeoff(frame, tmp_path / "x.png")
    for figure in drawn:
        # A long line is broken at the figure's width.
        assert figure.get_suptitle().split() == " ".join(["A title", *expected]).split()
        check_layout(figure)


def test_a_name_that_is_there_twice_is_read_once(tmp_path):
    path = build(tmp_path / "run.h5", [Spec(rounds=2)])
    frame = analysis.load(path, str(path))
    pd.testing.assert_frame_equal(frame, analysis.load(path))


def test_replays_that_no_program_has_written_do_no_harm(tmp_path):
    specs = [Spec({"a.b": value}, rounds=2) for value in range(2)]
    parts = shares(tmp_path, specs, 2)
    for part in parts:
        with h5py.File(part, "a") as file:
            file.attrs["replays"] = "[" * 20_000
    assert notes(*parts) == []
