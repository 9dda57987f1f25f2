import itertools
import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from build_file import Spec, age, build, paper_sweep
from hypothesis import given
from hypothesis import strategies as st

import analysis
from analysis.load import (
    attack_names,
    column_names,
    family_order,
    load_attacked,
    varying_columns,
)
from testbed.attacks import metrics
from testbed.errors import UserError
from testbed.results.reader import Scenario

ROOT = Path(__file__).parents[2]
ALTERED = ["federation.momentum", "federation.weight_decay", "federation.proximal"]


@pytest.fixture
def path(tmp_path):
    specs = [
        Spec({"federation.batch_size": 4, "defense.noise": 0.1}, rounds=3),
        Spec({"federation.batch_size": 8, "defense.noise": 0.1}, rounds=5, clients=3, bias=False),
    ]
    return build(tmp_path / "run.h5", specs)


def test_a_row_per_scenario_round_client_and_attack(path):
    frame = analysis.load(path)
    assert len(frame) == (3 * 2 + 5 * 3) * 4
    assert list(frame.columns) == [
        *("file", "scenario", "dataset", "distribution", "model", "batch_size", "noise"),
        *("round", "client", "identity", "attack", "title", "knowledge", "answers"),
        *("target", "adapted", "applicable", "obstacle", "broken", "accuracy", "residual"),
        *metrics.METRICS,
        *("random", "uniform", "oracle"),
        *("random_presence_f1", "uniform_presence_f1", "oracle_presence_f1"),
    ]
    assert frame.attrs["columns"]["federation.batch_size"] == "batch_size"
    assert not frame.duplicated(["file", "scenario", "round", "client", "attack"]).any()
    assert frame["file"].unique().tolist() == [str(path)]
    assert frame.groupby("scenario")["batch_size"].unique().tolist() == [[4], [8]]
    assert frame["attack"].unique().tolist() == ["random", "llg", "llg_star", "llg_plus"]
    llg_plus = frame[frame["attack"] == "llg_plus"]
    assert llg_plus[["title", "knowledge"]].drop_duplicates().to_numpy().tolist() == [
        ["LLG+", "auxiliary"]
    ]


def test_every_row_is_what_the_arrays_say(path):
    frame = analysis.load(path)
    with h5py.File(path) as file:
        for row in frame.to_dict("records"):
            group = file[f"scenarios/000{row['scenario']}"]
            at = (row["round"], row["client"])
            truth = group["truth/counts"][at]
            inferred = group[f"attacks/{row['attack']}/counts"][at]
            assert row["asr"] == np.minimum(truth, inferred).sum() / truth.sum()
            assert row["exact"] == (truth == inferred).all()
            assert row["random"] == metrics.expected_random_asr(truth)
            assert row["uniform"] == metrics.expected_uniform_asr(truth)
            assert row["random_presence_f1"] == metrics.expected_random_f1(truth)
            assert row["uniform_presence_f1"] == metrics.expected_uniform_f1(truth)


def test_oracle_is_perfect_and_needs_a_bias(path):
    frame = analysis.load(path)
    assert (frame[frame["scenario"] == 0]["oracle"] == 1).all()
    assert frame[frame["scenario"] == 1]["oracle"].isna().all()


def test_oracle_takes_the_mean_over_local_steps(tmp_path):
    path = build(tmp_path / "run.h5", [Spec(local_steps=5, rounds=4)])
    frame = analysis.load(path)
    assert (frame["oracle"] == 1).all()


def test_answers_of_every_kind_are_scored_as_what_they_are(tmp_path):
    kinds = {"llg": "counts", "there": "presence", "shares": "distribution"}
    spec = Spec(rounds=3, attacks=list(kinds), answers=kinds, believed=1.5)
    path = build(tmp_path / "run.h5", [spec])
    frame = analysis.load(path).set_index(["attack", "round", "client"])
    assert frame.groupby("attack", sort=False)["answers"].first().to_dict() == kinds
    with h5py.File(path, "r") as file:
        group = file["scenarios/0000"]
        assert (group["observations/labels"][:] == 12).all()
        for at in np.ndindex(3, 2):
            truth = group["truth/counts"][at].astype(int)
            shares = group["attacks/shares/distribution"][at]
            found = frame.loc[("shares", *at)]
            assert found["hellinger"] == metrics.hellinger(truth, shares)
            # Shares of twelve labels, of which eight can be right.
            assert found["asr"] == metrics.asr(truth, np.rint(shares * 12).astype(int))
            there = frame.loc[("there", *at)]
            presence = group["attacks/there/presence"][at]
            assert there["presence_f1"] == metrics.presence_f1(truth, presence)
            assert np.isnan(there["asr"])
    assert analysis.load(path).query("attack == 'llg'")["asr"].max() <= 8 / 12


def test_a_distribution_in_a_file_of_version_1_0_has_as_many_labels_as_the_truth(tmp_path):
    kinds = {"shares": "distribution"}
    path = build(tmp_path / "run.h5", [Spec(rounds=3, attacks=["shares"], answers=kinds)])
    whole = analysis.load(path)
    with h5py.File(path, "a") as file:
        del file["scenarios/0000/observations/labels"]
    assert analysis.load(path).equals(whole)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_file_of_an_older_version(path, version):
    new = analysis.load(path)
    old = analysis.load(age(path, version))
    assert old.equals(new)
    assert (old["answers"] == "counts").all()
    assert (old["target"] == "update").all()
    assert (old["adapted"] == "").all()


def test_attacks_that_were_not_run_have_rows_without_scores(tmp_path):
    found = {"llg": {"one label per update": "8 labels per update"}}
    spec = Spec(rounds=2, attacks=["llg", "idle"], idle={"idle": "no bias"}, broken=found)
    frame = analysis.load(build(tmp_path / "run.h5", [spec]))
    idle, llg = (frame[frame["attack"] == label] for label in ("idle", "llg"))
    assert len(idle) == len(llg) == 4
    assert idle[list(metrics.METRICS)].isna().all(axis=None)
    assert idle["uniform"].tolist() == llg["uniform"].tolist()
    assert (idle["applicable"].unique().tolist(), idle["obstacle"].iloc[0]) == ([False], "no bias")
    assert (llg["applicable"].unique().tolist(), llg["obstacle"].iloc[0]) == ([True], "")
    assert json.loads(llg["broken"].iloc[0]) == found["llg"]
    assert (idle["broken"] == "{}").all()


def test_accuracy_is_that_of_the_round_s_model(tmp_path):
    path = build(tmp_path / "run.h5", [Spec(rounds=3, accuracy=0.5), Spec(rounds=2)])
    with h5py.File(path, "a") as file:
        file["scenarios/0000/rounds/accuracy"][:] = [0.1, np.nan, 0.9]
    frame = analysis.load(path)
    means = frame[frame["scenario"] == 0].groupby("round")["accuracy"].unique()
    assert [float(each[0]) for each in means] == pytest.approx([0.1, np.nan, 0.9], nan_ok=True)
    assert frame[frame["scenario"] == 1]["accuracy"].isna().all()


def test_residual_is_nearly_zero_for_plain_gradients_and_unknown_for_others(tmp_path):
    specs = [
        *(Spec(rounds=3), Spec({"defense.noise": 0.1}, rounds=3)),
        *(Spec({key: 0.1}, rounds=3, local_steps=2) for key in ALTERED),
        Spec({"defenses": [{"name": "clip"}]}, rounds=3),
    ]
    path = build(tmp_path / "run.h5", specs)
    with h5py.File(path, "a") as file:
        sums = file["scenarios/0000/observations/row_sums"]
        sums[0, 0] = [3, -1, *[0] * 8]
        sums[0, 1] = 0
        sums[1, 0, 3] = np.nan
        file["scenarios/0000/observations/bias_gradient"][1, 0, 3] = np.nan
    frame = analysis.load(path)
    plain = frame[(frame["scenario"] == 0) & (frame["attack"] == "llg")]["residual"].to_numpy()
    assert plain[0] == pytest.approx(0.5)
    assert np.isnan(plain[2])
    assert (plain[[1, 3, 4, 5]] < 1e-6).all()
    assert frame[frame["scenario"] != 0]["residual"].isna().all()


def test_residual_is_nearly_zero_for_several_plain_local_steps(tmp_path):
    path = build(tmp_path / "run.h5", [Spec(rounds=3, steps=(1, 5)), Spec(rounds=3, local_steps=4)])
    frame = analysis.load(path)
    assert (frame["oracle"] == 1).all()
    assert (frame["residual"] < 1e-6).all()
    with h5py.File(path, "a") as file:
        # Of a last, smaller batch the mean over steps makes too much.
        file["scenarios/0000/truth/counts"][:, :, 0] += 3
    frame = analysis.load(path)
    first = frame[frame["scenario"] == 0].groupby("client")["residual"]
    assert first.apply(lambda residual: residual.notna().all()).tolist() == [True, False]


def test_rounds_read_in_blocks_are_the_same(path, monkeypatch):
    whole = analysis.load(path)
    monkeypatch.setattr(
        Scenario, "blocks", lambda self: ((r, r + 1) for r in range(self.committed))
    )
    key = ["scenario", "attack", "round", "client"]
    blocks = analysis.load(path)
    assert whole.sort_values(key, ignore_index=True).equals(
        blocks.sort_values(key, ignore_index=True)
    )


def test_rounds_without_attack_have_no_rows(tmp_path):
    path = build(tmp_path / "run.h5", [Spec(rounds=7, attack_every=3)])
    assert analysis.load(path)["round"].unique().tolist() == [0, 3, 6]


def test_updates_that_were_not_finite_have_no_score(path):
    with h5py.File(path, "a") as file:
        file["scenarios/0000/attacks/llg/counts"][1, 1] = -1
    frame = analysis.load(path)
    lost = frame[frame["asr"].isna()]
    assert lost[["scenario", "round", "client", "attack"]].to_numpy().tolist() == [[0, 1, 1, "llg"]]
    assert lost[list(metrics.METRICS)].isna().all(axis=None)
    assert lost["random"].notna().all()


def test_only_committed_rounds_count(tmp_path):
    build(tmp_path / "run.h5.partial", [Spec(rounds=6), Spec(rounds=6)], committed=[4, 0])
    frame = analysis.load(tmp_path / "run.h5")
    assert frame["scenario"].unique().tolist() == [0]
    assert frame["round"].max() == 3


def test_nothing_committed(tmp_path):
    path = build(tmp_path / "run.h5.partial", [Spec()], committed=[0])
    frame = analysis.load(path)
    assert len(frame) == 0
    assert {"asr", "attack", "batch_size"} <= set(frame.columns)
    with pytest.raises(UserError, match=r"run\.h5\.partial: no round with an attack"):
        load_attacked(path)


def test_no_update_in_a_whole_run(tmp_path):
    path = build(tmp_path / "run.h5", [Spec(rounds=3, dropout=1.0), Spec(rounds=2, dropout=1.0)])
    with pytest.raises(UserError, match=r"no update arrived.*complete.*lower federation\.dropout"):
        load_attacked(path)
    path = build(tmp_path / "none.h5", [Spec(rounds=3, attacks=[])])
    with pytest.raises(UserError, match=r"no attack was run in any round.* again with attacks$"):
        load_attacked(path)
    path = build(tmp_path / "new.h5.partial", [Spec(rounds=3, dropout=1.0)])
    with pytest.raises(UserError, match="try again when the run is further"):
        load_attacked(path)


def test_several_files_share_their_columns(tmp_path):
    one = build(tmp_path / "one.h5", [Spec({"defense.noise": 0.5}, rounds=1)])
    two = build(tmp_path / "two.h5", [Spec({"labels.distribution": "natural"}, rounds=2)])
    frame = analysis.load(one, two)
    facts = frame[["file", "noise", "distribution"]].drop_duplicates()
    assert facts["file"].tolist() == [str(one), str(two)]
    assert facts["distribution"].tolist() == ["balanced", "natural"]
    assert facts["noise"].tolist() == pytest.approx([0.5, np.nan], nan_ok=True)


def test_swept_lists_can_be_grouped_by(tmp_path):
    values = [[1, 2], {"a": 3}]
    path = build(tmp_path / "run.h5", [Spec({"model.sizes": value}, rounds=2) for value in values])
    groups = analysis.load(path).groupby("sizes").size()
    assert groups.index.tolist() == ["[1, 2]", '{"a": 3}']


def test_defences_have_a_short_column_where_there_are_any(tmp_path):
    noise = [{"name": "noise", "sigma": 0.1}]
    old = build(tmp_path / "old.h5", [Spec(rounds=1)])
    assert "defenses" not in analysis.load(old)
    swept = [Spec({"defenses": value}, rounds=1) for value in ([], noise)]
    path = build(tmp_path / "run.h5", [*swept, Spec(rounds=1, other={"defenses": noise})])
    frame = analysis.load(old, path)
    facts = frame.drop_duplicates(["file", "scenario"])["defenses"].tolist()
    assert facts == ["none", "none", "noise(0.1)", "noise(0.1)"]
    assert varying_columns(frame) == ["defenses"]


def test_clients_that_dropped_out_have_no_rows(tmp_path):
    path = build(tmp_path / "run.h5", [Spec(rounds=8, clients=5, population=9, dropout=0.4)])
    frame = analysis.load(path)
    with h5py.File(path) as file:
        group = file["scenarios/0000/updates"]
        arrived, identity = group["arrived"][:] == 1, group["identity"][:]
    assert 0 < arrived.sum() < arrived.size
    rows = frame[frame["attack"] == "llg"]
    assert rows[["round", "client"]].to_numpy().tolist() == np.argwhere(arrived).tolist()
    assert rows["identity"].tolist() == identity[arrived].tolist()
    assert frame[["asr", "random", "oracle"]].notna().all(axis=None)


def test_a_cohort_is_one_client_of_all_labels(tmp_path):
    spec = Spec(rounds=4, cohort=6, local_steps=3, dropout=0.3)
    path = build(tmp_path / "run.h5", [spec])
    frame = analysis.load(path)
    assert len(frame) == 4 * 4
    assert (frame["client"] == 0).all()
    assert (frame["identity"] == -1).all()
    assert (frame["oracle"] == 1).all()
    with h5py.File(path) as file:
        group = file["scenarios/0000"]
        assert group["updates/arrived"].shape == (4, 6)
        labels = group["truth/counts"][:].sum(axis=-1)[:, 0]
        assert (labels == 24 * group["updates/arrived"][:].sum(axis=1)).all()


def test_accumulated_answers_are_scored_against_all_labels_so_far(tmp_path):
    spec = Spec(
        rounds=6,
        clients=3,
        population=4,
        attack_every=2,
        attacks=["llg", "llg+adapted", "llg+rounds"],
        adapted={"llg+adapted": "llg", "llg+rounds": "llg"},
        accumulated=["llg+rounds"],
        believed=0.5,
    )
    path = build(tmp_path / "run.h5", [spec])
    frame = analysis.load(path).set_index(["attack", "round", "client"])
    assert frame.groupby("attack")["target"].first().to_dict() == {
        **dict.fromkeys(("llg", "llg+adapted"), "update"),
        "llg+rounds": "accumulated",
    }
    assert frame.groupby("attack")["adapted"].first().tolist() == ["", "llg", "llg"]
    with h5py.File(path) as file:
        group = file["scenarios/0000"]
        whole, single = group["truth/accumulated"][:], group["truth/counts"][:]
        answers = group["attacks/llg+rounds/counts"][:]
    more = 0
    for at in itertools.product((0, 2, 4), range(3)):
        row = frame.loc[("llg+rounds", *at)]
        assert row["asr"] == metrics.asr(whole[at], answers[at])
        taken = np.array(whole[at].sum() // 2)
        assert row["uniform"] == metrics.expected_uniform_asr(whole[at], taken)
        assert row["random"] == metrics.expected_random_asr(whole[at], taken)
        assert np.isnan(row["oracle"])
        other = frame.loc[("llg+adapted", *at)]
        assert other["uniform"] == metrics.expected_uniform_asr(single[at], np.array(4))
        assert other["oracle"] == 1
        more += whole[at].sum() > single[at].sum()
    assert more >= 5


def test_column_names():
    swept = [
        "partition.kind",
        "data.name",
        "defense.noise",
        "client.rate",
        "server.rate",
        "other.file",
        "seed",
    ]
    assert column_names(swept, {"file"}) == {
        "data.name": "dataset",
        "labels.distribution": "distribution",
        "model.name": "model",
        "federation.batch_size": "batch_size",
        "partition.kind": "partition",
        "defense.noise": "noise",
        "client.rate": "client.rate",
        "server.rate": "server.rate",
        "other.file": "other.file",
        "seed": "seed",
    }


def test_varying_columns(path):
    assert varying_columns(analysis.load(path)) == ["batch_size"]


def test_attacks_are_called_by_title_unless_two_share_one(path):
    frame = analysis.load(path)
    assert attack_names(frame) == {
        "random": "Random",
        "llg": "LLG",
        "llg_star": "LLG*",
        "llg_plus": "LLG+",
    }
    frame["title"] = frame["title"].replace("LLG*", "LLG+")
    assert attack_names(frame)["llg_plus"] == "llg_plus"


def test_adapted_attacks_stand_behind_the_plain_ones(tmp_path):
    plain = ["llg", "llg_plus"]
    adapted = {"llg+rounds": "llg", "llg+adapted": "llg", "llg_plus+adapted": "llg_plus"}
    spec = Spec(rounds=1, attacks=[*plain, *adapted], adapted=adapted, accumulated=["llg+rounds"])
    frame = analysis.load(build(tmp_path / "run.h5", [spec]))
    names = {
        "llg": "LLG",
        "llg+adapted": "LLG, adapted",
        "llg+rounds": "LLG, accumulated",
        "llg_plus": "LLG+",
        "llg_plus+adapted": "LLG+, adapted",
    }
    assert list(attack_names(frame).items()) == list(names.items())
    # Where there is nothing to adapt, the attack on all rounds has the title of the plain one.
    frame.loc[frame["attack"] == "llg+rounds", "title"] = "LLG"
    assert attack_names(frame) == names


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_families_hold_every_attack_once_and_the_plain_one_first(parents):
    labels = [f"a{number}" for number in range(len(parents))]
    # Each adapts an earlier one, or none.
    plain = {
        label: f"a{parent}" if parent < number else ""
        for number, (label, parent) in enumerate(zip(labels, parents, strict=True))
    }
    order = family_order(labels, plain)
    assert sorted(order) == sorted(labels)
    for label, parent in plain.items():
        if parent:
            between = order[order.index(parent) + 1 : order.index(label)]
            assert all(plain[other] for other in between)
    assert [label for label in order if not plain[label]] == [
        label for label in labels if not plain[label]
    ]


def test_the_frame_reproduces_the_paper_s_random_baseline(tmp_path):
    path = build(tmp_path / "run.h5", paper_sweep(40))
    means = analysis.load(path).groupby(["distribution", "batch_size"])["random"].mean()
    for key, measured in {
        ("unbalanced", 1): 0.10,
        ("unbalanced", 8): 0.31,
        ("unbalanced", 128): 0.40,
        ("balanced", 8): 0.45,
        ("balanced", 128): 0.85,
    }.items():
        assert means[key] == pytest.approx(measured, abs=0.04)


def test_neither_torch_nor_mpi_nor_solvers_are_imported(path):
    code = (
        "import sys, analysis, analysis.__main__, analysis.figures, analysis.table\n"
        f"analysis.load({str(path)!r})\n"
        "heavy = {'torch', 'mpi4py', 'scipy', 'sklearn', 'matplotlib.pyplot'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
