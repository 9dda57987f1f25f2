import csv
import io
import json

import h5py
import numpy as np
import pytest
from build_file import Spec, build
from sharing import share

import analysis
from analysis.bootstrap import bootstrap_interval
from analysis.notes import self_test
from analysis.table import STYLES, render, summarise
from testbed.errors import UserError


@pytest.fixture
def path(tmp_path):
    specs = [Spec({"federation.batch_size": size}, rounds=10, accuracy=0.5) for size in (4, 16)]
    return build(tmp_path / "run.h5", specs)


@pytest.fixture
def frame(path):
    return analysis.load(path)


def test_summary_of_a_scenario_and_attack(frame):
    summary = summarise(frame)
    assert len(summary) == 2 * 4
    row = summary[(summary["scenario"] == 1) & (summary["attack"] == "llg")].iloc[0]
    rows = frame[(frame["scenario"] == 1) & (frame["attack"] == "llg")]
    assert row["mean"] == pytest.approx(rows["asr"].mean())
    assert (row["low"], row["high"]) == bootstrap_interval(rows["asr"], rows["round"])
    assert row["low"] < row["mean"] < row["high"]
    assert (row["repetitions"], row["rounds"]) == (20, 10)
    assert row["batch_size"] == 16
    for name in ("random", "uniform", "oracle"):
        assert row[name] == pytest.approx(rows[name].mean())
    assert row["advantage"] == pytest.approx((row["mean"] - row["uniform"]) / (1 - row["uniform"]))


def test_updates_without_score_are_left_out_of_the_baselines_too(path):
    with h5py.File(path, "a") as file:
        file["scenarios/0000/attacks/llg/counts"][3:] = -1
    frame = analysis.load(path)
    row = summarise(frame).query("scenario == 0 and attack == 'llg'").iloc[0]
    rows = frame.query("scenario == 0 and attack == 'llg' and round < 3")
    assert (row["repetitions"], row["rounds"]) == (6, 3)
    assert row["random"] == pytest.approx(rows["random"].mean())


def test_an_attack_that_never_answered(path):
    with h5py.File(path, "a") as file:
        file["scenarios/0000/attacks/llg/counts"][...] = -1
    frame = analysis.load(path)
    row = summarise(frame).query("scenario == 0 and attack == 'llg'").iloc[0]
    assert row["repetitions"] == 0
    assert np.isnan(row["mean"])
    cells = render(frame).splitlines()[2].split()
    assert cells[:5] == ["0", "4", cells[2], cells[3], "-"]
    assert "nan" not in render(frame)


def test_presence_has_baselines_of_its_own(frame):
    summary = summarise(frame, "presence_f1")
    row = summary.query("scenario == 1 and attack == 'llg'").iloc[0]
    rows = frame.query("scenario == 1 and attack == 'llg'")
    for name in ("random", "uniform", "oracle"):
        assert row[name] == pytest.approx(rows[f"{name}_presence_f1"].mean())
        assert row[name] > rows[name].mean() or name == "oracle"
    text = render(frame, "text", "presence_f1")
    assert "no baselines" not in text
    assert f"{row['uniform']:.3f}" in text


def test_other_metrics_have_no_baselines(frame):
    summary = summarise(frame, "hellinger")
    assert set(summary["metric"]) == {"hellinger"}
    assert not {"random", "uniform", "oracle", "advantage"} & set(summary.columns)
    text = render(frame, "text", "hellinger")
    assert "no baselines" in text
    assert "oracle " not in text.splitlines()[0]


def test_unknown_names(frame):
    with pytest.raises(UserError, match="did you mean 'jaccard'"):
        summarise(frame, "jacard")
    with pytest.raises(UserError, match="did you mean 'latex'"):
        render(frame, "latx")
    with pytest.raises(UserError, match="no rows"):
        summarise(frame[:0])


def test_text_is_aligned_and_complete(frame):
    lines = render(frame).splitlines()
    head, rule, first, second, rule_again, note, fixed, test = lines
    assert rule == rule_again
    assert set(rule) == {"-"}
    assert head.split("  ")[0] == "#"
    for name in ("batch_size", "Random", "LLG*", "random guess", "uniform guess", "oracle"):
        assert name in head
    mean = frame.query("scenario == 1 and attack == 'llg'")["asr"].mean()
    at = head.index("LLG ")
    assert second[at:].startswith(f"{mean:.3f} ±0.")
    assert first[head.index("oracle") :] == "1.000"
    assert "mean of 20 updates" in note
    assert fixed == "dataset digits, distribution balanced, model cnn"
    assert test.startswith("self-test: oracle 1.000 in all 40 updates; sums of gradients")


def test_half_width_is_the_larger_side(tmp_path):
    path = build(tmp_path / "run.h5", [Spec(rounds=30, clients=1, attacks=["llg"])])
    frame = analysis.load(path).assign(asr=[1.0] * 27 + [0.0] * 3)
    row = summarise(frame).iloc[0]
    assert row["mean"] - row["low"] > row["high"] - row["mean"]
    assert f"0.900 ±{row['mean'] - row['low']:.3f}" in render(frame)


def test_one_round_has_no_interval(tmp_path):
    path = build(tmp_path / "run.h5", [Spec(rounds=1, clients=1)])
    text = render(analysis.load(path))
    assert "±" not in text
    assert "mean of 1 update; no interval" in text


def test_csv_is_the_tidy_summary_at_full_precision(frame):
    rows = list(csv.DictReader(io.StringIO(render(frame, "csv"))))
    summary = summarise(frame)
    assert list(rows[0]) == list(summary.columns)
    assert len(rows) == len(summary)
    for row, expected in zip(rows, summary.to_dict("records"), strict=True):
        for name, value in expected.items():
            assert type(value)(row[name]) == value


def test_markdown(frame):
    lines = render(frame, "markdown").splitlines()
    assert lines[0].startswith("| # |")
    assert r"LLG\*" in lines[0]
    assert set(lines[1]) == {"|", "-"}
    assert len({line.replace(r"\|", "").count("|") for line in lines[:4]}) == 1
    assert len(lines[:4]) == 4
    assert lines[4] == ""


def test_latex_is_booktabs_and_escaped(tmp_path):
    hostile = r"50% & $x_1$ #{~^\}"
    path = build(tmp_path / "run.h5", [Spec({"a.b_c": v}, rounds=2) for v in (hostile, "plain")])
    text = render(analysis.load(path), "latex")
    assert r"50\% \& \$x\_1\$ \#\{\textasciitilde{}\textasciicircum{}\textbackslash{}\}" in text
    assert r"b\_c" in text
    assert r" $\pm$" in text
    for rule in ("toprule", "midrule", "bottomrule"):
        assert text.count(f"\\{rule}") == 1
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    columns = text.split(r"\begin{tabular}{")[1].partition("}")[0]
    assert len(body) == 3
    assert {line.replace(r"\&", "").count("&") + 1 for line in body} == {len(columns)}


def test_scenarios_with_different_attacks_and_several_files(tmp_path):
    one = build(tmp_path / "one.h5", [Spec(rounds=2, attacks=["llg", "random"])])
    two = build(tmp_path / "two.h5", [Spec(rounds=2, attacks=["llg", "llg_plus"])])
    lines = render(analysis.load(one, two)).splitlines()
    assert str(one) in lines[2]
    assert str(two) in lines[3]
    at = lines[0].index("LLG+")
    assert lines[2][at] == "-"
    assert lines[3][at : at + 2] in ("0.", "1.")


@pytest.mark.parametrize("style", STYLES)
def test_tables_are_repeatable_and_end_in_a_newline(frame, style):
    assert render(frame, style) == render(frame, style)
    assert render(frame, style).endswith("\n")


MANY = ["llg", "llg_star", "llg_plus", *(f"attack_{index}" for index in range(6))]


def many(tmp_path, **options):
    specs = [
        Spec(
            {"labels.distribution": distribution, "federation.batch_size": size},
            rounds=3,
            clients=1,
            attacks=MANY,
            **options,
        )
        for distribution in ("balanced", "unbalanced")
        for size in (1, 2, 4, 8, 16)
    ]
    return analysis.load(build(tmp_path / "many.h5", specs))


def test_many_attacks_have_a_row_each_on_pages_of_the_outermost_key(tmp_path):
    frame = many(tmp_path)
    text = render(frame)
    assert text == render(frame, rows="attacks")
    assert text != render(frame, rows="scenarios")
    first, second, _ = text.split("\n\n")[0], *text.split("\n\n")[1:], ""
    for page, distribution, numbers in [
        (first, "balanced", ["#0", "#1", "#2", "#3", "#4"]),
        (second, "unbalanced", ["#5", "#6", "#7", "#8", "#9"]),
    ]:
        title, sizes, head, _, *rows = page.splitlines()
        assert title == f"distribution {distribution}"
        assert sizes.split() == ["batch_size", "1", "2", "4", "8", "16"]
        assert head.split() == ["attack", "knows", "answers", *numbers]
        assert [row.split()[0] for row in rows[:9]] == ["LLG", "LLG*", "LLG+", *MANY[3:]]
        assert set(rows[9]) == {"-"}
        assert [row.split()[0] for row in rows[10:13]] == ["random", "uniform", "oracle"]
        assert rows[2].split()[:3] == ["LLG+", "auxiliary", "counts"]
    summary = summarise(frame)
    row = summary.query("scenario == 7 and attack == 'llg_plus'").iloc[0]
    line = second.splitlines()[6]
    assert line[second.splitlines()[2].index("#7") :].startswith(f"{row['mean']:.3f} ±")


def test_eight_attacks_still_have_a_column_each(tmp_path):
    frame = many(tmp_path)
    eight = frame[frame["attack"] != MANY[-1]]
    assert render(eight) == render(eight, rows="scenarios")
    assert render(eight) != render(eight, rows="attacks")
    with pytest.raises(UserError, match="did you mean 'attacks'"):
        render(frame, rows="attack")


@pytest.mark.parametrize("rows", ["scenarios", "attacks"])
def test_broken_assumptions_and_attacks_that_were_not_run(tmp_path, rows):
    lone = {"one label per update": "8 labels per update"}
    specs = [
        Spec(
            {"federation.batch_size": size},
            rounds=4,
            attacks=["llg", "bias", "lone"],
            idle={"bias": "the last layer has no bias"},
            broken={"lone": lone} if size > 1 else {},
        )
        for size in (1, 8)
    ]
    frame = analysis.load(build(tmp_path / "run.h5", specs))
    text = render(frame, rows=rows)
    assert "† the scenario breaks an assumption: one label per update (lone)\n" in text
    assert "- not applicable: the last layer has no bias (bias)\n" in text
    table = text.partition("attack success rate")[0]
    assert table.count("†") == 1
    marked = next(line for line in table.splitlines() if "†" in line)
    assert marked.split()[0] == ("1" if rows == "scenarios" else "lone")
    assert "nan" not in text
    assert r"$\dagger$" in render(frame, "latex", rows=rows)
    tidy = list(csv.DictReader(io.StringIO(render(frame, "csv"))))
    assert len(tidy) == 6
    assert [row["broken"] for row in tidy if row["attack"] == "lone"] == ["{}", json.dumps(lone)]
    assert [row["mean"] for row in tidy if row["attack"] == "bias"] == ["", ""]


def test_presence_is_left_out_where_the_metric_is_of_counts(tmp_path):
    spec = Spec(rounds=3, attacks=["llg", "there"], answers={"there": "presence"}, accuracy=0.75)
    frame = analysis.load(build(tmp_path / "run.h5", [spec]))
    text = render(frame)
    assert "there" not in text.splitlines()[0]
    assert "left out, with presence alone to score by presence_f1: there\n" in text
    text = render(frame, metric="presence_f1")
    assert "there" in text.splitlines()[0]
    assert "left out" not in text
    tidy = list(csv.DictReader(io.StringIO(render(frame, "csv"))))
    assert [row["answers"] for row in tidy] == ["counts", "presence"]
    assert [row["accuracy"] for row in tidy] == ["0.75", "0.75"]
    with pytest.raises(UserError, match="choose presence_f1"):
        render(frame[frame["attack"] == "there"])


def test_seeds_are_averaged_unless_they_are_asked_for(tmp_path):
    specs = [
        Spec({"seed": seed, "federation.batch_size": size}, rounds=4)
        for seed in (1, 2, 3)
        for size in (4, 8)
    ]
    frame = analysis.load(build(tmp_path / "run.h5", specs))
    text = render(frame)
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["#", "batch_size", "Random"]
    assert [line.split()[:2] for line in lines[2:4]] == [["0", "4"], ["1", "8"]]
    assert "mean of 24 updates" in text
    assert "averaged over 3 seeds" in text
    rows = frame.query("batch_size == 4 and attack == 'llg'")
    clusters = rows["round"] + 4 * (rows["seed"] - 1)
    low, high = bootstrap_interval(rows["asr"], clusters)
    half = max(rows["asr"].mean() - low, high - rows["asr"].mean())
    assert f"{rows['asr'].mean():.3f} ±{half:.3f}" in lines[2]
    apart = render(frame, per_seed=True)
    assert len(apart.splitlines()[2:8]) == 6
    assert apart.splitlines()[0].split()[:3] == ["#", "batch_size", "seed"]


def test_the_self_test_tells_what_fails(path):
    assert self_test(analysis.load(path)).startswith("self-test: oracle 1.000 in all 40 updates")
    with h5py.File(path, "a") as file:
        group = file["scenarios/0001"]
        counts = group["truth/counts"][:]
        counts[:3] = np.roll(counts[:3], 1, axis=-1)
        group["truth/counts"][...] = counts
        sums = group["observations/row_sums"][:]
        sums[0, 0] = [1, -0.5, *[0] * 8]
        group["observations/row_sums"][...] = sums
    frame = analysis.load(path)
    failed = (frame[frame["attack"] == "llg"]["oracle"] < 1).sum()
    assert 3 <= failed <= 6
    says = self_test(frame)
    assert f"oracle BELOW 1 in {failed} of 40 updates" in says
    assert "at most 3e-01 of their size" in says


def test_the_self_test_of_updates_that_are_no_plain_gradients(tmp_path):
    altered = {"federation.weight_decay": 0.01}
    specs = [Spec(altered, rounds=3, local_steps=2), Spec({"defense.noise": 0.1}, rounds=3)]
    frame = analysis.load(build(tmp_path / "run.h5", specs))
    none = "self-test: none, since no update is the plain, finite gradient of local steps"
    assert self_test(frame) == none
    frame = analysis.load(build(tmp_path / "steps.h5", [Spec(rounds=3, local_steps=2)]))
    assert self_test(frame).startswith("self-test: oracle 1.000 in all 6 updates; ")
    spec = Spec(rounds=1, clients=1, bias=False)
    frame = analysis.load(build(tmp_path / "no_bias.h5", [spec]))
    assert self_test(frame).startswith(
        "self-test: no oracle, since the last layer has no bias; sums of gradients over classes at "
    )


def test_updates_that_were_not_finite_are_counted(path):
    with h5py.File(path, "a") as file:
        for attack in ("random", "llg", "llg_star", "llg_plus"):
            file[f"scenarios/0000/attacks/{attack}/counts"][2:5] = -1
    assert "6 of 40 updates held NaN or infinity: not attacked" in render(analysis.load(path))


def test_no_interval_leaves_what_a_metric_can_be(tmp_path):
    frame = analysis.load(build(tmp_path / "run.h5", [Spec(rounds=2, clients=1, attacks=["llg"])]))
    row = summarise(frame.assign(asr=[1.0, 0.5])).iloc[0]
    assert (row["low"], row["high"]) == (0, 1)


@pytest.mark.parametrize("rows", ["scenarios", "attacks"])
def test_attacks_on_all_updates_so_far_have_a_guess_of_their_own(tmp_path, rows):
    adapted = {"llg+adapted": "llg", "llg+rounds": "llg"}
    specs = [
        Spec({"defenses": []}, rounds=5, attacks=["llg"]),
        Spec(
            {"defenses": [{"name": "top_k", "theta": 0.9}]},
            rounds=5,
            attacks=["llg", *adapted],
            adapted=adapted,
            accumulated=["llg+rounds"],
        ),
    ]
    frame = analysis.load(build(tmp_path / "run.h5", specs))
    text = render(frame, rows=rows)
    assert "scored otherwise: about all updates of a client so far, with guesses of their own" in (
        text
    )
    own = frame[(frame["scenario"] == 1) & (frame["attack"] == "llg+rounds")]["uniform"].mean()
    single = frame[(frame["scenario"] == 1) & (frame["attack"] == "llg")]["uniform"].mean()
    assert own > single + 0.05
    lines = text.splitlines()
    if rows == "scenarios":
        heads = ["LLG ", "LLG, adapted ", "LLG, accumulated ", "uniform guess ", "accumulated"]
        places = [lines[0].rindex(head) for head in heads]
        assert places == sorted(places)
        assert lines[3].split()[:2] == ["1", "top_k(0.9)"]
        assert lines[3].split()[-3:] == [f"{single:.3f}", "1.000", f"{own:.3f}"]
        assert lines[2].split()[-1] == "-"
    else:
        assert lines[0].split() == ["defenses", "none", "top_k(0.9)"]
        last = next(line for line in lines if line.startswith("uniform guess, accumulated"))
        assert last.split()[-2:] == ["-", f"{own:.3f}"]
    assert self_test(frame).startswith("self-test: oracle 1.000 in all 10 updates")


def test_shares_of_an_experiment_are_one_file(tmp_path):
    specs = [Spec({"federation.batch_size": size}, rounds=2) for size in (2, 4, 8, 16)]
    parts = [share(tmp_path, specs, place, (place, 2)) for place in (1, 0)]
    frame = analysis.load(*parts)
    for per_seed in (False, True):
        lines = render(frame, per_seed=per_seed).splitlines()
        assert lines[0].split()[:2] == ["#", "batch_size"]
        assert [line.split()[:2] for line in lines[2:6]] == [
            *(["0", "2"], ["1", "4"], ["2", "8"], ["3", "16"])
        ]
    head = render(frame, rows="attacks").splitlines()[1]
    assert head.split()[3:] == ["#0", "#1", "#2", "#3"]


def test_scenarios_without_rows_are_told(tmp_path):
    lost = Spec(rounds=3, dropout=1.0)
    specs = [Spec(rounds=3), lost, Spec(rounds=3, attacks=[]), lost]
    lines = render(analysis.load(build(tmp_path / "run.h5", specs))).splitlines()
    assert "scenarios 1, 3: no update arrived to be attacked" in lines
    assert "scenario 2: no attack was run" in lines
    # Of several files, which one; of what is not committed yet, nothing.
    other = build(tmp_path / "other.h5", specs[:2], committed=[3, 0])
    one = build(tmp_path / "one.h5", specs[:2])
    text = render(analysis.load(other, one))
    assert "scenario 1 of one.h5: no update arrived to be attacked\n" in text
    assert "of other.h5" not in text


def test_rounds_of_one_training_are_pointed_out(tmp_path):
    says = "rounds of one training are not independent: its intervals are about this training"
    frames = {
        (trained, rounds): analysis.load(
            build(tmp_path / "run.h5", [Spec(rounds=rounds, trained=trained)])
        )
        for trained in (False, True)
        for rounds in (1, 3)
    }
    assert [says in render(frame).splitlines() for frame in frames.values()] == [
        *(False, False, False, True)
    ]


def test_attacks_on_all_updates_so_far_have_no_interval(tmp_path):
    adapted = {"llg+rounds": "llg"}
    spec = Spec(rounds=5, attacks=["llg", *adapted], adapted=adapted, accumulated=[*adapted])
    frame = analysis.load(build(tmp_path / "run.h5", [spec]))
    summary = summarise(frame).set_index("attack")
    assert summary[["low", "high"]].notna().all(axis=1).to_dict() == {
        "llg": True,
        "llg+rounds": False,
    }
    assert render(frame).splitlines()[2].count("±") == 1
    alone = render(frame[frame["attack"] == "llg+rounds"])
    assert "5 updates" not in alone
    assert "mean of 10 updates; no interval\n" in alone
