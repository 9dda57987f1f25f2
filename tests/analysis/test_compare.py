"""One attack against the best of the others: who is the other, and what the interval is of."""

import csv
import io

import h5py
import numpy as np
import pytest
from build_file import Spec, build
from sharing import share

import analysis
from analysis.bootstrap import bootstrap_interval
from analysis.compare import compare, render_comparison
from testbed.errors import UserError


@pytest.fixture
def path(tmp_path):
    specs = [Spec({"federation.batch_size": size}, rounds=10, accuracy=0.5) for size in (4, 16)]
    return build(tmp_path / "run.h5", specs)


@pytest.fixture
def frame(path):
    return analysis.load(path)


def scores(frame, label, scenario=0):
    rows = frame[(frame["attack"] == label) & (frame["scenario"] == scenario)]
    return rows.sort_values(["round", "client"])


def test_the_difference_is_taken_update_by_update(frame):
    row = compare(frame, "llg_plus").iloc[1]
    own, other = scores(frame, "llg_plus", 1), scores(frame, "llg_star", 1)
    assert (row["batch_size"], row["best"]) == (16, "llg_star")
    assert row["mean"] == pytest.approx(own["asr"].mean())
    assert row["best_mean"] == pytest.approx(other["asr"].mean())
    difference = own["asr"].to_numpy() - other["asr"].to_numpy()
    assert row["difference"] == pytest.approx(difference.mean())
    interval = bootstrap_interval(difference, own["round"])
    assert (row["difference_low"], row["difference_high"]) == pytest.approx(interval)
    assert row["uniform"] == pytest.approx(own["uniform"].mean())
    assert row["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("attack", "against", "best"),
    [
        ("llg_star", (), "llg"),  # llg_plus has auxiliary samples
        ("llg", (), "random"),
        ("llg_star", ("llg_plus", "random"), "llg_plus"),
        ("random", (), "llg"),
    ],
)
def test_the_best_other_knows_no_more_unless_it_is_named(frame, attack, against, best):
    assert compare(frame, attack, against=against)["best"].unique().tolist() == [best]


def test_of_a_distance_the_smallest_is_best(frame):
    assert compare(frame, "llg_plus", "total_variation")["best"].unique().tolist() == ["llg_star"]


def test_updates_that_one_of_both_lacks_do_not_count(path):
    with h5py.File(path, "a") as file:
        file["scenarios/0000/attacks/llg_plus/counts"][3:] = -1
        file["scenarios/0000/attacks/llg_star/counts"][:2] = -1
    frame = analysis.load(path)
    row = compare(frame, "llg_plus", against=["llg_star"]).iloc[0]
    own, other = scores(frame, "llg_plus"), scores(frame, "llg_star")
    third = slice(4, 6)  # two clients in the one round that both have
    gap = own["asr"].to_numpy()[third] - other["asr"].to_numpy()[third]
    assert row["difference"] == pytest.approx(gap.mean())
    assert np.isnan(row["difference_low"])


def test_a_table_of_it(frame):
    text = render_comparison(frame, "llg_plus")
    head, _, first, *_ = text.splitlines()
    assert head.split()[:4] == ["#", "batch_size", "accuracy", "LLG+"]
    assert "LLG*" in first
    assert "±" in first
    assert "+0." in first
    assert "flatters" in text
    assert "attack that knows no more, and" in text
    named = render_comparison(frame, "llg_plus", against=["llg", "random"])
    assert "attack of LLG, Random, and" in named
    tidy = list(csv.DictReader(io.StringIO(render_comparison(frame, "llg_plus", "csv"))))
    assert [row["best"] for row in tidy] == ["llg_star"] * 2
    assert float(tidy[0]["difference"]) == compare(frame, "llg_plus").iloc[0]["difference"]
    assert render_comparison(frame, "llg_plus", "markdown").startswith("| #")


@pytest.mark.parametrize(
    ("attack", "options", "reason"),
    [
        ("llgg", {}, "unknown attack 'llgg'"),
        ("llg", {"against": ["llgg"]}, "unknown attack 'llgg'"),
        ("llg", {"metric": "asrr"}, "unknown metric 'asrr'"),
        ("llg", {"style": "tex"}, "unknown format 'tex'"),
    ],
)
def test_what_is_refused(frame, attack, options, reason):
    with pytest.raises(UserError, match=reason):
        render_comparison(frame, attack, **options)


def test_nothing_to_compare_with(tmp_path):
    frame = analysis.load(build(tmp_path / "a.h5", [Spec(rounds=2, attacks=["llg"])]))
    with pytest.raises(UserError, match="no scenario in which 'llg' and another attack"):
        compare(frame, "llg")


def test_rivals_answer_about_the_same_labels_and_know_no_more(tmp_path):
    adapted = {"llg+adapted": "llg", "llg_plus+adapted": "llg_plus", "llg+rounds": "llg"}
    spec = Spec(
        {"defenses": [{"name": "clip"}]},
        rounds=6,
        attacks=["llg", "llg_plus", *adapted],
        adapted=adapted,
        accumulated=["llg+rounds"],
        errors={"llg": 0.5, "llg_plus": 0.3, "llg+adapted": 0.1, "llg_plus+adapted": 0.0},
    )
    frame = analysis.load(build(tmp_path / "run.h5", [spec]))
    # Not llg+adapted, which knows the defences, nor llg+rounds.
    assert compare(frame, "llg_plus")["best"].tolist() == ["llg"]
    assert compare(frame, "llg_plus+adapted")["best"].tolist() == ["llg+adapted"]
    assert compare(frame, "llg", against=["llg+adapted", "llg+rounds"])["best"].tolist() == [
        "llg+adapted"
    ]
    with pytest.raises(UserError, match="no scenario in which 'llg\\+rounds'"):
        compare(frame, "llg+rounds")


def test_several_files_have_their_names_beside_and_shares_have_not(tmp_path):
    specs = [Spec({"federation.batch_size": size}, rounds=2) for size in (4, 16)]
    paths = [build(tmp_path / f"{name}.h5", specs[:1]) for name in ("one", "two")]
    lines = render_comparison(analysis.load(*paths), "llg").splitlines()
    assert lines[0].split()[:2] == ["#", "file"]
    assert [line.split()[:2] for line in lines[2:4]] == [["0", "one.h5"], ["0", "two.h5"]]
    parts = [share(tmp_path, specs, place, (place, 2)) for place in (1, 0)]
    lines = render_comparison(analysis.load(*parts), "llg").splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["0", "4"], ["1", "16"]]
    assert lines[0].split()[:2] == ["#", "batch_size"]


def test_attacks_on_all_updates_so_far_have_no_interval(tmp_path):
    adapted = {"llg+rounds": "llg", "llg_plus+rounds": "llg_plus"}
    spec = Spec(
        rounds=6, attacks=["llg", "llg_plus", *adapted], adapted=adapted, accumulated=[*adapted]
    )
    frame = analysis.load(build(tmp_path / "run.h5", [spec]))
    row = compare(frame, "llg_plus+rounds").iloc[0]
    assert row["best"] == "llg+rounds"
    assert row.filter(regex="low|high").isna().all()
    assert "±" not in render_comparison(frame, "llg_plus+rounds").splitlines()[2]
