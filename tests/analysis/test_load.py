import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from build_file import Spec, build, paper_sweep

import analysis
from analysis.load import attack_names, column_names, load_attacked, varying_columns
from testbed.attacks import metrics
from testbed.errors import UserError
from testbed.results.reader import Scenario

ROOT = Path(__file__).parents[2]


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
        *("round", "client", "attack", "title", "knowledge"),
        *metrics.METRICS,
        *("random", "uniform", "oracle"),
    ]
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


def test_oracle_is_perfect_and_needs_a_bias(path):
    frame = analysis.load(path)
    assert (frame[frame["scenario"] == 0]["oracle"] == 1).all()
    assert frame[frame["scenario"] == 1]["oracle"].isna().all()


def test_oracle_takes_the_mean_over_local_steps(tmp_path):
    path = build(tmp_path / "run.h5", [Spec(local_steps=5, rounds=4)])
    frame = analysis.load(path)
    assert (frame["oracle"] == 1).all()


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


def test_several_files_share_their_columns(tmp_path):
    one = build(tmp_path / "one.h5", [Spec({"defense.noise": 0.5}, rounds=1)])
    two = build(tmp_path / "two.h5", [Spec({"labels.distribution": "natural"}, rounds=2)])
    frame = analysis.load(one, two)
    facts = frame[["file", "noise", "distribution"]].drop_duplicates()
    assert facts["file"].tolist() == [str(one), str(two)]
    assert facts["distribution"].tolist() == ["balanced", "natural"]
    assert facts["noise"].tolist() == pytest.approx([0.5, np.nan], nan_ok=True)


def test_swept_lists_can_be_grouped_by(tmp_path):
    defenses = [[], [{"name": "noise", "sigma": 0.1}]]
    path = build(tmp_path / "run.h5", [Spec({"defenses": value}, rounds=2) for value in defenses])
    groups = analysis.load(path).groupby("defenses").size()
    assert groups.index.tolist() == ["[]", '[{"name": "noise", "sigma": 0.1}]']


def test_column_names():
    swept = ["data.name", "defense.noise", "client.rate", "server.rate", "other.file", "seed"]
    assert column_names(swept, {"file"}) == {
        "data.name": "dataset",
        "labels.distribution": "distribution",
        "model.name": "model",
        "federation.batch_size": "batch_size",
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
