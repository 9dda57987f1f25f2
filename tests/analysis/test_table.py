import csv
import io

import h5py
import numpy as np
import pandas as pd
import pytest
from build_file import Spec, build

import analysis
from analysis.table import STYLES, render, summarise
from testbed.attacks.metrics import bootstrap_interval
from testbed.errors import UserError


@pytest.fixture
def path(tmp_path):
    specs = [Spec({"federation.batch_size": size}, rounds=10) for size in (4, 16)]
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
    head, rule, first, second, rule_again, note, fixed = lines
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


def test_half_width_is_the_larger_side():
    rows = [("f", 0, "d", "b", "m", 8, r, 0, "a", "A", "k", v, 0, 0, 0)
            for r, v in enumerate([1.0] * 9 + [0.0])]  # fmt: skip
    columns = ["file", "scenario", "dataset", "distribution", "model", "batch_size", "round"]
    columns += ["client", "attack", "title", "knowledge", "asr", "random", "uniform", "oracle"]
    frame = pd.DataFrame(rows, columns=columns)
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
