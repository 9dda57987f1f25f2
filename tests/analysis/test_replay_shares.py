import h5py
import pytest
from build_file import Spec, build
from launching import assert_same_results
from sharing import share, shares

import analysis
from analysis.__main__ import main
from analysis.replay import replay
from analysis.replay_shares import replay_shares
from analysis.shares import find_sets
from testbed.errors import UserError
from testbed.results.reader import open_results

SPECS = [Spec({"federation.batch_size": n}, rounds=2, attacks=["llg"]) for n in (1, 2, 4, 8)]
AGAIN = [{"name": "llg", "label": "again"}]


def test_several_shares_become_one_file_each_that_are_a_set_of_their_own(tmp_path):
    paths = shares(tmp_path, SPECS, 2)
    replayed = [*replay_shares(paths[::-1], tmp_path / "more.h5", AGAIN)]
    outputs = [tmp_path / f"more_{i}of2.h5" for i in range(2)]
    assert replayed == [(str(path), new) for path, new in zip(paths, outputs, strict=True)]
    sets = find_sets([*paths, *outputs])
    assert [one.files for one in sets] == [[*map(str, paths)], [*map(str, outputs)]]
    for path, new in zip(paths, outputs, strict=True):
        alone = replay(path, tmp_path / "alone.h5", AGAIN, overwrite=True)
        assert_same_results(new, alone)
    frame = analysis.load(*outputs)
    assert set(frame["attack"]) == {"llg", "again"}
    assert sorted(set(frame["scenario"])) == [0, 1, 2, 3]


def test_a_share_and_the_replay_of_another_one_are_no_set(tmp_path):
    paths = shares(tmp_path, SPECS, 2)
    ((_, new),) = replay_shares(paths[:1], tmp_path / "run_new.h5", AGAIN)
    assert len(find_sets([new, paths[1]])) == 2


def test_one_share_alone_keeps_the_name_that_is_given(tmp_path):
    path = share(tmp_path, SPECS, "run_1of2", (1, 2))
    assert [*replay_shares([path], tmp_path / "x.h5", AGAIN)] == [(str(path), tmp_path / "x.h5")]
    with h5py.File(tmp_path / "x.h5") as file:
        assert file.attrs["share"] == "1/2"


def test_what_is_unfinished_stays_so(tmp_path, capsys):
    share(tmp_path, SPECS, "run_0of2", (0, 2))
    share(tmp_path, SPECS, "run_1of2", (1, 2), committed=[2, 1])
    arguments = ["replay", str(tmp_path / "run_*of2.h5"), "--attack", "llg", "--only"]
    assert main([*arguments, "-o", str(tmp_path / "new")]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(tmp_path / f"new_{i}of2") for i in range(2)]
    assert err.count("note: ") == 1
    assert "note: share 1 of 0-1 is incomplete, with 3 of 4 rounds\n" in err
    with open_results(tmp_path / "new_1of2") as results:
        assert [scenario.committed for scenario in results.scenarios] == [2, 1]


def test_nothing_is_written_where_one_of_the_files_exists(tmp_path):
    paths = shares(tmp_path, SPECS, 2)
    (tmp_path / "more_1of2.h5").write_text("something else")
    with pytest.raises(UserError, match=r"more_1of2\.h5: the file exists"):
        [*replay_shares(paths, tmp_path / "more.h5", AGAIN)]
    assert not (tmp_path / "more_0of2.h5").exists()
    with pytest.raises(UserError, match=r"more_1of2\.h5: this is no results file"):
        [*replay_shares(paths, tmp_path / "more.h5", AGAIN, overwrite=True)]
    assert (tmp_path / "more_1of2.h5").read_text() == "something else"
    shares(tmp_path, SPECS, 2, stem="more")
    assert len([*replay_shares(paths, tmp_path / "more.h5", AGAIN, overwrite=True)]) == 2


def test_a_replay_replaces_nothing_but_results(tmp_path):
    (path,) = shares(tmp_path, SPECS, 1)
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text("title: mine")
    with pytest.raises(UserError, match="this is no results file"):
        [*replay_shares([path], experiment, AGAIN, overwrite=True)]
    assert experiment.read_text() == "title: mine"
    with pytest.raises(UserError, match=r"names that end in \.checkpoint"):
        [*replay_shares([path], tmp_path / "r.h5.checkpoint", AGAIN, overwrite=True)]
    ((_, new),) = replay_shares([path], tmp_path / "new.h5.partial", AGAIN)
    assert new == tmp_path / "new.h5"
    assert new.exists()


@pytest.mark.parametrize(
    ("output", "word"),
    [
        ("run.h5", r"run_0of2\.h5: this is a file to replay"),
        ("folder", "this is a folder"),
        ("no/such.h5", "does not exist"),
    ],
)
def test_outputs_that_cannot_be(tmp_path, output, word):
    (tmp_path / "folder").mkdir()
    paths = shares(tmp_path, SPECS, 2)
    before = [path.read_bytes() for path in paths]
    with pytest.raises(UserError, match=word):
        [*replay_shares(paths, tmp_path / output, AGAIN, overwrite=True)]
    assert [path.read_bytes() for path in paths] == before


def test_files_that_are_no_set_are_refused(tmp_path):
    halves, thirds = (shares(tmp_path, SPECS, count) for count in (2, 3))
    other = share(tmp_path, SPECS, "other_1of2", (1, 2), experiment="Another")
    whole = build(tmp_path / "whole.h5", SPECS)
    twice = share(tmp_path, SPECS, "copy_1of2", (1, 2))
    for further in (thirds[1], other, whole, twice):
        with pytest.raises(UserError, match="are no shares of one run, or the same ones"):
            [*replay_shares([*halves, further], tmp_path / "more.h5", AGAIN)]
