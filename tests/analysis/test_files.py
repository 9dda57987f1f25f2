from pathlib import Path

import pytest

from analysis.files import expand_files
from testbed.errors import UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names):
    for path in map(Path, names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_pattern_stands_for_the_files_in_the_order_of_their_numbers(here):
    touch(*(f"m_{i}of12.h5" for i in range(12) if i != 5), "m_5of12.h5.partial", "n_0of12.h5")
    expected = [f"m_{i}of12.h5" + ".partial" * (i == 5) for i in range(12)]
    assert expand_files(["m_*of12.h5"]) == expected
    assert expand_files([str(here / "m_*of12.h5")]) == [str(here / name) for name in expected]
    assert expand_files(["m_?of12.h5.partial"]) == ["m_5of12.h5.partial"]


def test_of_a_file_and_its_partial_one_the_file_is_taken():
    touch("a.h5", "a.h5.partial", "b.h5.partial")
    assert expand_files(["*"]) == ["a.h5", "b.h5.partial"]
    assert expand_files(["*.h5"]) == ["a.h5", "b.h5.partial"]
    # Unless it is asked for.
    assert expand_files(["a.h5.partial"]) == ["a.h5.partial"]


def test_a_folder_stands_for_the_results_files_in_it():
    touch("d/b.h5", "d/a_10of11.hdf5", "d/a_9of11.hdf5", "d/e.yaml", "d/c.h5.partial", "d/in/x.h5")
    names = ["a_9of11.hdf5", "a_10of11.hdf5", "b.h5", "c.h5.partial"]
    assert expand_files(["d"]) == [f"d/{name}" for name in names]
    assert expand_files(["d/**/x.h5", "d/i*/*"]) == ["d/in/x.h5"]


def test_experiments_and_logs_beside_results_are_left_out():
    touch("m.yaml", "m.h5", "m.out", "other", "another")
    assert expand_files(["m*"]) == ["m.h5"]
    # Results may have any name.
    assert expand_files(["*other"]) == ["another", "other"]


def test_names_are_kept_as_they_are_where_there_is_such_a_file():
    touch("a[1].h5", "b.h5.partial", "a1.h5")
    assert expand_files(["b.h5", "a[1].h5"]) == ["b.h5", "a[1].h5"]
    assert expand_files(["missing.h5"]) == ["missing.h5"]


def test_a_file_is_read_once_by_whatever_names():
    touch("d/a.h5", "d/b.h5.partial")
    Path("link.h5").symlink_to("d/a.h5")
    names = ["d/a.h5", "d/../d/a.h5", "link.h5", "d/b.h5", "d/b.h5.partial", "d/*", "d"]
    assert expand_files(names) == ["d/a.h5", "d/b.h5"]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("m_*of4.h5", "no file matches this pattern, with or without .partial behind it"),
        ("empty", "there is no results file in this folder"),
        ("empt*", "no file matches"),
    ],
)
def test_what_stands_for_nothing_is_an_error(name, word):
    Path("empty").mkdir()
    with pytest.raises(UserError, match=word) as caught:
        expand_files([name])
    assert str(caught.value).startswith(f"{name}: ")
