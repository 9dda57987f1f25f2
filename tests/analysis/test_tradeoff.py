import csv
import dataclasses
import io

import h5py
import numpy as np
import pytest
from build_file import Spec, build
from sharing import share

import analysis
from analysis.bootstrap import bootstrap_interval
from analysis.tradeoff import render_tradeoff, tradeoff
from testbed.errors import UserError

PLAIN = ["random", "llg", "llg_plus", "told"]
ADAPTED = {"llg+adapted": "llg", "llg_plus+adapted": "llg_plus", "llg+rounds": "llg"}
CLIP = [{"name": "clip", "bound": 1.0}]
DP = [{"name": "dp_sgd", "bound": 1.0, "noise_multiplier": 0.5}]


def defended(defenses, rounds=12, errors=None, **options):
    return Spec(
        {"defenses": defenses, **options.pop("swept", {})},
        rounds=rounds,
        attacks=[*PLAIN, *(ADAPTED if defenses else {})],
        adapted=ADAPTED,
        accumulated=["llg+rounds"] if defenses else [],
        errors={"random": 0.0, "told": 0.0, "llg": 0.4, "llg_plus": 0.6, **(errors or {})},
        accuracy=[0.5 if r % 2 else float("nan") for r in range(rounds - 1)] + [0.75],
        trained=True,
        **options,
    )


SPECS = [
    defended([]),
    defended(CLIP, errors={"llg+adapted": 0.3, "llg_plus+adapted": 0.1, "llg_plus": 0.2}),
    defended(DP, privacy={"epsilon": 3.25, "delta": 1e-5}, bytes_on_wire=100, dropout=0.3),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build(tmp_path_factory.mktemp("t") / "run.h5", SPECS)


@pytest.fixture(scope="module")
def frame(path):
    frame = analysis.load(path)
    frame.loc[frame["attack"] == "told", "knowledge"] = "truth"
    return frame


def test_the_strongest_attack_of_each_kind(frame):
    found = tradeoff(frame).set_index(["scenario", "kind"])
    assert found.index.tolist() == [
        (0, "plain"),
        *((index, kind) for index in (1, 2) for kind in ("plain", "adapted", "accumulated")),
    ]
    # Neither the guess that happens to be right, nor who is told.
    assert found["attack"].tolist()[:4] == ["llg", "llg_plus", "llg_plus+adapted", "llg+rounds"]
    for (scenario, _), row in found.iterrows():
        rows = frame[(frame["scenario"] == scenario) & (frame["attack"] == row["attack"])]
        assert row["mean"] == pytest.approx(rows["asr"].mean())
        low, high = bootstrap_interval(rows["asr"], rows["round"])
        if row["attack"] == "llg+rounds":  # whose rounds contain each other
            low = high = np.nan
        clipped = np.clip((low, high), 0, 1)
        assert [row["low"], row["high"]] == pytest.approx(clipped, nan_ok=True)
        assert row["uniform"] == pytest.approx(rows["uniform"].mean())
        assert row["random"] == pytest.approx(rows["random"].mean())
        assert row["repetitions"] == len(rows)
    assert found["defenses"].unique().tolist() == [
        *("none", "clip(1)", "dp_sgd(bound=1, noise_multiplier=0.5)")
    ]


def test_costs(path, frame):
    found = tradeoff(frame).drop_duplicates("scenario").set_index("scenario")
    assert found["accuracy"].tolist() == [0.75] * 3
    # Updates that did not arrive cost nothing, and are no updates of 0 bytes.
    assert found["bytes"].tolist() == [400, 400, 100]
    assert found["epsilon"].tolist() == pytest.approx([np.nan, np.nan, 3.25], nan_ok=True)
    assert found["delta"].tolist() == pytest.approx([np.nan, np.nan, 1e-5], nan_ok=True)
    assert tradeoff(frame, last=2)["accuracy"].iloc[0] == pytest.approx((0.5 + 0.75) / 2)
    with h5py.File(path) as file:
        arrived = file["scenarios/0002/updates/arrived"][:]
    assert 0 < arrived.sum() < arrived.size


def test_the_accuracy_of_repetitions_is_that_of_all_models(tmp_path):
    spec = dataclasses.replace(defended([]), trained=False)
    frame = analysis.load(build(tmp_path / "run.h5", [spec]))
    known = [0.5] * 5 + [0.75]
    assert tradeoff(frame)["accuracy"].tolist() == pytest.approx([np.mean(known)])


def test_chosen_attacks_with_those_that_adapt_them(frame):
    found = tradeoff(frame, ["llg"]).set_index(["scenario", "kind"])["attack"]
    assert found.loc[1].to_dict() == {
        "plain": "llg",
        "adapted": "llg+adapted",
        "accumulated": "llg+rounds",
    }
    assert tradeoff(frame, ["random", "told"])["attack"].unique().tolist() == ["random"]
    with pytest.raises(UserError, match="did you mean 'llg_plus'"):
        tradeoff(frame, ["llg_pluss"])


def test_a_scenario_to_which_no_attack_applies_has_its_guesses_and_costs(tmp_path):
    spec = defended([])
    idle = dict.fromkeys(PLAIN, "the last layer is withheld")
    frame = analysis.load(build(tmp_path / "run.h5", [dataclasses.replace(spec, idle=idle)]))
    (row,) = tradeoff(frame).to_dict("records")
    assert (row["attack"], row["repetitions"], row["accuracy"]) == ("", 0, 0.75)
    assert np.isnan(row["mean"])
    assert row["uniform"] == pytest.approx(frame["uniform"].mean())
    assert " -  " in render_tradeoff(frame).splitlines()[2]


def test_seeds_are_averaged(tmp_path):
    specs = [defended(CLIP, swept={"seed": seed}, bytes_on_wire=100 * seed) for seed in (1, 2)]
    specs[1] = dataclasses.replace(specs[1], accuracy=0.25)
    frame = analysis.load(build(tmp_path / "run.h5", specs))
    found = tradeoff(frame, ["llg_plus"])
    assert found[["scenario", "kind"]].to_numpy().tolist() == [[0, "plain"], [0, "adapted"]]
    row = found.iloc[0]
    assert (row["accuracy"], row["bytes"], row["repetitions"]) == (0.5, 150, 48)
    assert row["mean"] == pytest.approx(frame[frame["attack"] == "llg_plus"]["asr"].mean())
    assert "averaged over 2 seeds" in render_tradeoff(frame)


def test_the_table(frame):
    text = render_tradeoff(frame)
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "#"
    heads = ["defenses", "plain attack", "its asr ", "uniform guess", "random guess"]
    heads += ["adapted attack", "its asr, adapted", "accumulated attack", "its asr, accumulated"]
    heads += ["uniform guess, accumulated", "accuracy", "bytes", "epsilon"]
    places = [lines[0].index(head) for head in heads]
    assert places == sorted(places)
    found = tradeoff(frame).set_index(["scenario", "kind"])
    row = found.loc[(1, "adapted")]
    half = max(row["mean"] - row["low"], row["high"] - row["mean"])
    assert lines[3][places[5] :].startswith("LLG+, adapted ")
    assert lines[3][places[6] :].startswith(f"{row['mean']:.3f} ±{half:.3f}")
    assert lines[2][places[5] :].split()[:4] == ["-"] * 4
    assert lines[4].split()[-3:] == ["0.750", "100", "3.25"]
    for note in ("which flatters it", "knows the defences", "epsilon at delta 1e-05"):
        assert note in text
    assert "dataset digits, distribution balanced, model cnn, batch_size 8" in lines[-1]


def test_the_table_of_a_single_attack_has_its_name_above(frame):
    lines = render_tradeoff(frame, attacks=["llg_plus"]).splitlines()
    assert "LLG+ " in lines[0]
    assert "LLG+, adapted" in lines[0]
    assert "attack" not in lines[0]
    assert "flatters" not in "".join(lines)


def test_csv_is_the_tidy_form(frame):
    rows = list(csv.DictReader(io.StringIO(render_tradeoff(frame, "csv", last=3))))
    found = tradeoff(frame, last=3)
    assert list(rows[0]) == list(found.columns)
    assert [float(row["accuracy"]) for row in rows] == found["accuracy"].tolist()
    assert [row["kind"] for row in rows] == found["kind"].tolist()


@pytest.mark.parametrize("style", ["markdown", "latex"])
def test_other_styles(frame, style):
    text = render_tradeoff(frame, style)
    assert text.endswith("\n")
    assert "nan" not in text


def test_files_side_by_side(tmp_path):
    one = build(tmp_path / "one.h5", [defended([])])
    two = build(tmp_path / "two.h5", [defended(CLIP)])
    lines = render_tradeoff(analysis.load(one, two)).splitlines()
    assert [line.split()[:3] for line in lines[2:4]] == [
        ["0", "one.h5", "none"],
        ["0", "two.h5", "clip(1)"],
    ]


def test_presence_has_its_own_guesses(frame):
    found = tradeoff(frame, metric="presence_f1").iloc[0]
    rows = frame[(frame["scenario"] == 0) & (frame["attack"] == found["attack"])]
    assert found["uniform"] == pytest.approx(rows["uniform_presence_f1"].mean())
    with pytest.raises(UserError, match="unknown metric 'hellinger'"):
        tradeoff(frame, metric="hellinger")
    with pytest.raises(UserError, match="expected at least 1 evaluated round"):
        tradeoff(frame, last=0)
    with pytest.raises(UserError, match="did you mean 'latex'"):
        render_tradeoff(frame, "latx")


def test_without_evaluation_and_bytes_the_costs_are_unknown(tmp_path):
    path = build(tmp_path / "run.h5", [dataclasses.replace(defended([]), accuracy=None)])
    with h5py.File(path, "a") as file:
        del file["scenarios/0000/updates/bytes_on_wire"], file["scenarios/0000/rounds/accuracy"]
    frame = analysis.load(path)
    assert tradeoff(frame)[["accuracy", "bytes"]].isna().all(axis=None)
    assert render_tradeoff(frame).splitlines()[2].split()[-2:] == ["-", "-"]


def test_shares_of_an_experiment_are_one_file_with_the_costs_of_each(tmp_path):
    specs = [
        defended(defenses, rounds=3, swept={"seed": seed}, bytes_on_wire=100 * seed)
        for seed in (1, 2)
        for defenses in ([], CLIP)
    ]
    # Seeds of a setting in the same share; then in two.
    for numbers in ((0, 1, 2, 3), (0, 2, 1, 3)):
        chosen = [specs[number] for number in numbers]
        parts = [share(tmp_path, chosen, place, (place, 2)) for place in (1, 0)]
        whole = tradeoff(analysis.load(build(tmp_path / "whole.h5", chosen)))
        found = tradeoff(analysis.load(*parts))
        for name in ("scenario", "defenses", "kind", "repetitions", "bytes"):
            assert found[name].tolist() == whole[name].tolist()
        assert found["bytes"].unique().tolist() == [150]
        lines = render_tradeoff(analysis.load(*parts)).splitlines()
        assert lines[0].split()[:2] == ["#", "defenses"]
        assert [line.split()[0] for line in lines[2:4]] == whole["scenario"].unique().astype(
            str
        ).tolist()
        assert "averaged over 2 seeds" in lines


def test_why_a_cell_is_empty(tmp_path):
    adapted = ["llg+adapted", "llg_plus+adapted"]
    idle = dict.fromkeys(adapted, "nothing of the last layer is left")
    spec = dataclasses.replace(defended(CLIP), idle=idle)
    path = build(tmp_path / "run.h5", [spec, defended([], rounds=3)])
    note = "- not applicable: nothing of the last layer is left (LLG, adapted; LLG+, adapted)"
    assert note in render_tradeoff(analysis.load(path)).splitlines()
    with h5py.File(path, "a") as file:
        for label in PLAIN:
            file[f"scenarios/0001/attacks/{label}/counts"][:2] = -1
    text = render_tradeoff(analysis.load(path))
    assert "4 of 30 updates held NaN or infinity: not attacked" in text
    # One of the kind has a score: its cell is not empty.
    only = dataclasses.replace(spec, idle={"llg+adapted": "no"})
    assert "not applicable" not in render_tradeoff(analysis.load(build(path, [only])))


def test_what_an_interval_is_of(frame, tmp_path):
    text = render_tradeoff(frame)
    assert "95 % interval over rounds\n" in text
    assert "rounds of one training are not independent: its intervals are about this tr" in text
    at = text.splitlines()[0].index("its asr, accumulated")
    assert "±" not in text.splitlines()[3][at : at + 12]
    spec = dataclasses.replace(defended(CLIP), trained=False)
    text = render_tradeoff(analysis.load(build(tmp_path / "run.h5", [spec])))
    assert "one training" not in text


def test_scenarios_without_an_update_are_told(tmp_path):
    specs = [defended([]), dataclasses.replace(defended(CLIP), dropout=1.0)]
    text = render_tradeoff(analysis.load(build(tmp_path / "run.h5", specs)))
    assert "\nscenario 1: no update arrived to be attacked\n" in text


def test_keys_that_follow_another_one_are_no_columns(tmp_path):
    zipped = [
        {"federation.algorithm": "fedsgd", "federation.learning_rate": 0.5},
        {"federation.algorithm": "fedavg", "federation.learning_rate": 0.25},
    ]
    specs = [defended(x, rounds=3, swept=keys) for keys in zipped for x in ([], CLIP)]
    frame = analysis.load(build(tmp_path / "run.h5", specs))
    text = render_tradeoff(frame)
    assert text.splitlines()[0].split()[:3] == ["#", "defenses", "algorithm"]
    assert "\nalgorithm fedsgd: learning_rate 0.5\nalgorithm fedavg: learning_rate 0.25\n" in text
    assert "learning_rate" not in text.splitlines()[0]
    assert "learning_rate" in tradeoff(frame)
    # What tells all scenarios apart determines everything.
    few = frame[frame["scenario"].isin([0, 3])]
    assert render_tradeoff(few).splitlines()[0].split()[:4] == [
        *("#", "defenses", "algorithm", "learning_rate")
    ]
