"""Replays give what the run gave, to the bit, without torch and MPI."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import h5py
import numpy as np
import pytest
from build_file import Spec, build
from launching import run_here, write_experiment
from sharing import share

import analysis
from analysis.__main__ import main
from analysis.replay import replay
from testbed.attacks import Knowledge, attacks, make_attack
from testbed.errors import UserError
from testbed.results.reader import open_results

ROOT = Path(__file__).parents[2]
BLOCKED = """
import sys
sys.modules.update(dict.fromkeys(["torch", "mpi4py"]))
from analysis.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
FEDERATION = {"rounds": 3, "clients": 2, "batch_size": 4, "attack_every": 2}
# Of attacks that train or optimise, just enough to have an answer.
STORED = ["dice", "llg_star", "ones", "plus"]
QUICK = {
    "iterations": 2,
    "restarts": 1,
    "shadows": 12,
    "simulations": 40,
    "batches": 40,
    "epochs": 2,
    "hidden": 4,
}
ATTACKS = """
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from testbed.attacks import Attack, Knowledge, LabelPresence, Observed


@dataclass(frozen=True)
class Own(Attack):
    above: float = 0.0

    name: ClassVar = "own"
    title: ClassVar = "Own"
    knowledge: ClassVar = Knowledge.GRADIENTS
    source: ClassVar = "nobody"
    observes: ClassVar = frozenset({Observed.BIAS_GRADIENT})
    answers: ClassVar = LabelPresence.answer
    calibration_arrays: ClassVar = {"seed": ((), "u8"), "noise": (("client", 3), "f8")}

    def calibrate(self, adversary):
        return {"seed": np.array([adversary.seed], np.uint64)}

    def calibrate_updates(self, adversary, observations):
        rng = np.random.default_rng(adversary.seed + adversary.batch_size)
        return {"noise": rng.normal(size=(len(observations.keys), 3))}

    def infer(self, observations, calibration):
        noise = calibration["noise"].sum(axis=1) + float(calibration["seed"][0] % 7)
        return LabelPresence(observations.bias_gradient > self.above + 0.01 * noise[:, None])


class Broken(Own):
    def infer(self, observations, calibration):
        return None


class Curious(Own):
    name: ClassVar = "curious"

    def calibrate_updates(self, adversary, observations):
        return {"noise": adversary.bias_gradient(None)}
"""
MODELS = """
import torch


class Diverging(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = torch.nn.Linear(64, 10)
        self.calls = 0

    def forward(self, images):
        self.calls += self.training
        logits = self.classifier(images.flatten(1))
        return logits * float("nan") if self.calls > 3 else logits


def unbiased():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10, bias=False))
"""


def quick(name):
    """Return an attack as an experiment file has it, with knobs that make it quick."""
    content = {"name": name}
    for knob in {field.name for field in fields(attacks()[name])} & QUICK.keys():
        try:
            make_attack(name, {knob: QUICK[knob]})
        except UserError:
            continue
        content[knob] = QUICK[knob]
    return content


def words(content):
    """Return an attack as the command line has it."""
    options = [f"{key}={value}" for key, value in content.items() if key not in ("name", "label")]
    label = ["--label", content["label"]] if "label" in content else []
    return ["--attack", content["name"], *options, *label]


def replay_blocked(*arguments, cwd=ROOT):
    """Run the command line in a process that has neither torch nor MPI."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, "replay", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def contents(path):
    """Return all arrays and all groups' attributes, timings aside."""
    arrays, attributes = {}, {}

    def visit(name, item):
        if "timings" in name:
            return
        if isinstance(item, h5py.Dataset):
            arrays[name] = item[()]
        else:
            attributes[name] = dict(item.attrs)

    with h5py.File(path) as file:
        file.visititems(visit)
    return arrays, attributes


def assert_same_attack(first, second, label, other=None):
    """Assert that an attack says the same of itself in two files, and answers the same bits."""
    (arrays, attributes), (others, described) = first, second
    compared = 0
    for name in attributes:
        if not name.endswith(f"/attacks/{label}"):
            continue
        twin = name.replace(f"attacks/{label}", f"attacks/{other or label}")
        assert attributes[name] == described[twin]
        found = [path for path in arrays if path.startswith(f"{name}/")]
        for path in found:
            compared += 1
            assert arrays[path].tobytes() == others[path.replace(name, twin)].tobytes(), path
    assert compared


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Run every attack, on a model with and one without BatchNorm."""
    folder = tmp_path_factory.mktemp("full")
    experiment = write_experiment(
        folder / "x.yaml",
        data={"name": "digits", "auxiliary_per_class": 8},
        federation=FEDERATION,
        results={"observations": "full"},
        sweep={"model.name": ["cnn", "cnn_bn"]},
        attacks=[quick(name) for name in attacks()],
    )
    done = run_here("run", experiment, "-o", folder / "run.h5", cwd=ROOT)
    assert done.status == 0, done.err
    return folder / "run.h5"


@pytest.fixture(scope="module")
def ran(full):
    """Return what is in that run's file."""
    return contents(full)


def first_scenario(parts):
    return tuple(
        {k: v for k, v in part.items() if k.startswith("scenarios/0000")} for part in parts
    )


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    """Run a few attacks; the first scenario is that of `full`, but for what it keeps."""
    folder = tmp_path_factory.mktemp("summary")
    experiment = write_experiment(
        folder / "x.yaml",
        data={"name": "digits", "auxiliary_per_class": 8},
        federation=FEDERATION,
        model={"name": "cnn"},
        attacks=[
            {"name": "random", "label": "dice"},
            "llg_star",
            {"name": "llg_star", "label": "ones", "dummy": "ones"},
            {"name": "llg_plus", "label": "plus"},
        ],
    )
    done = run_here("run", experiment, "-o", folder / "run.h5", cwd=ROOT)
    assert done.status == 0, done.err
    return folder / "run.h5"


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Run an attack of one's own on a model that diverges, and on one without bias."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "mine.py").write_text(ATTACKS)
    (folder / "models.py").write_text(MODELS)
    experiment = write_experiment(
        folder / "x.yaml",
        federation={"rounds": 3, "clients": 2, "batch_size": 4},
        sweep={"model.name": ["models:Diverging", "models:unbiased"]},
        attacks=["mine:Own", "llg"],
    )
    done = run_here("run", experiment, "-o", folder / "run.h5", cwd=folder)
    assert done.status == 0, done.err
    return folder / "run.h5"


def test_every_attack_answers_as_in_the_run(full, ran, tmp_path):
    chosen = [word for name in attacks() for word in words(quick(name))]
    out = replay_blocked(full, *chosen, "--only", "-o", tmp_path / "more.h5")
    assert out == f"{tmp_path / 'more.h5'}\n"
    before, after = ran, contents(tmp_path / "more.h5")
    for name in attacks():
        assert_same_attack(before, after, name)
    left_out = {"weight_gradient", "update", "statistics", "statistics_sent"}
    for path in before[0].keys() - after[0].keys():
        axis = path.rpartition("/")[2] in ("feature", "buffer", "parameter")
        assert axis or path.rpartition("/")[2] in left_out
    for path, values in after[0].items():
        assert values.tobytes() == before[0][path].tobytes(), path
    assert analysis.load(tmp_path / "more.h5")["attack"].unique().tolist() == [
        name for name in analysis.load(full)["attack"].unique() if name in attacks()
    ]


@pytest.mark.parametrize("name", sorted(attacks().keys() - {"random", "llg_star", "llg_plus"}))
def test_what_a_summary_suffices_for(ran, summary, tmp_path, name):
    attack, output = make_attack(name, {}), tmp_path / "more.h5"
    wanted = {**quick(name), "label": name + "_again"}
    idle = ran[1][f"scenarios/0000/attacks/{name}"]["not_applicable"]
    kept_by = None
    for part in attack.observes:
        if part.value in ("weight gradient", "BatchNorm statistics"):
            kept_by = kept_by or "last_layer"
        elif part.value == "whole update":
            kept_by = "full"
    if not idle and kept_by:
        with pytest.raises(UserError, match=r"scenario 0 has no observations/.*, which the attack"):
            replay(summary, output, [wanted])
    elif not idle and attack.arrays() and attack.knowledge is not Knowledge.GRADIENTS:
        with pytest.raises(
            UserError, match=r"has no calibration for the attack .* takes the model"
        ):
            replay(summary, output, [wanted])
    else:
        replay(summary, output, [quick(name)])
        assert_same_attack(first_scenario(ran), contents(output), name)
        return
    assert list(tmp_path.iterdir()) == []


def test_seeds_are_those_of_the_run(ran, summary, tmp_path):
    # Without a stored calibration, `random` draws what a run under that label would have drawn.
    copy = tmp_path / "run.h5"
    shutil.copy(summary, copy)
    with h5py.File(copy, "r+") as file:
        del file["scenarios/0000/attacks/dice"], file["scenarios/0000/timings/attacks/dice"]
    replay(copy, tmp_path / "more.h5", ["random", {"name": "random", "label": "other"}])
    more = contents(tmp_path / "more.h5")
    assert_same_attack(first_scenario(ran), more, "random")
    path = "scenarios/0000/attacks/{}/counts"
    assert (more[0][path.format("random")] != more[0][path.format("other")]).any()


def test_a_stored_calibration_serves_under_another_label(summary, tmp_path):
    more = tmp_path / "more.h5"
    replay(
        summary,
        more,
        [
            {"name": "random", "label": "again"},
            {"name": "llg_star", "label": "zeros_again"},
            {"name": "llg_star", "label": "ones_again", "dummy": "ones"},
        ],
    )
    before, after = contents(summary), contents(more)
    for label, twin in (("dice", "again"), ("llg_star", "zeros_again"), ("ones", "ones_again")):
        assert_same_attack(before, after, label, twin)


def test_another_calibration_by_name(summary, tmp_path, capsys):
    more, base = tmp_path / "more.h5", ["replay", str(summary), "-o", str(tmp_path / "more.h5")]
    wanted = ["--attack", "llg_star", "dummy=random", "--label", "x"]
    assert main([*base, *wanted]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "no calibration for the attack 'x'" in err
    assert "'ones' has" in err
    assert "dummy=ones" in err
    assert main([*base, *wanted, "--calibration", "dice"]) == 2
    assert "needs a calibration with the arrays ['impact', 'offset'], that of 'dice' has" in (
        capsys.readouterr().err
    )
    assert main([*base, *wanted, "--calibration", "nobody"]) == 2
    assert "stored attacks with such arrays: llg_star, ones" in capsys.readouterr().err
    assert main([*base, *wanted, "--calibration", "ones"]) == 0
    arrays, attributes = contents(more)
    for name in ("counts", "calibration/offset"):
        path = "scenarios/0000/attacks/{}/" + name
        np.testing.assert_array_equal(arrays[path.format("x")], arrays[path.format("ones")])
    options = json.loads(attributes["scenarios/0000/attacks/x"]["options"])
    assert options["dummy"] == "random"


def test_options_that_do_not_decide_on_a_calibration(summary, tmp_path):
    # llg_plus is calibrated alike for either scaling, and with one local step both are one.
    wanted = {"name": "llg_plus", "label": "x", "scaling": "reference"}
    replay(summary, tmp_path / "more.h5", [wanted])
    arrays, attributes = contents(tmp_path / "more.h5")
    path = "scenarios/0000/attacks/{}/counts"
    np.testing.assert_array_equal(arrays[path.format("x")], arrays[path.format("plus")])
    assert '"reference"' in attributes["scenarios/0000/attacks/x"]["options"]


def test_attacks_of_ones_own_and_updates_that_are_not_finite(odd, tmp_path):
    copy, more = tmp_path / "run.h5", tmp_path / "more.h5"
    (tmp_path / "mine.py").write_text(ATTACKS.replace("import torch", ""))
    shutil.copy(odd, copy)
    before = contents(odd)
    np.testing.assert_array_equal(
        before[0]["scenarios/0000/updates/finite"], [[1, 1], [1, 0], [0, 0]]
    )
    with h5py.File(copy, "r+") as file:
        for scenario in file["scenarios"].values():
            for label in ("Own", "llg"):
                del scenario[f"attacks/{label}"], scenario[f"timings/attacks/{label}"]
    replay_blocked(copy, "--attack", "mine:Own", "--attack", "llg", "-o", more, cwd=tmp_path)
    after = contents(more)
    for label in ("Own", "llg"):
        assert_same_attack(before, after, label)
    answers = after[0]["scenarios/0000/attacks/Own/presence"]
    assert set(answers[0].ravel()) == {0, 1}
    assert (answers[1, 1] == -1).all()
    assert (answers[2] == -1).all()
    assert after[1]["scenarios/0001/attacks/Own"]["not_applicable"] == "the last layer has no bias"
    assert (after[0]["scenarios/0001/attacks/Own/presence"] == -1).all()
    assert "scenarios/0001/attacks/Own/calibration/seed" not in after[0]
    assert (after[0]["scenarios/0001/attacks/llg/counts"] >= 0).all()


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        ("Broken", "attack 'Broken': infer returned NoneType"),
        ("Curious", "scenario 0: attack 'Curious': it needs the whole model"),
    ],
)
def test_a_failing_attack_leaves_no_file_behind(odd, tmp_path, monkeypatch, capsys, attack, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "failing.py").write_text(ATTACKS)
    assert main(["replay", str(odd), "--attack", f"failing:{attack}", "-o", "more.h5"]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("more.h5*"))


def test_the_new_file_is_a_results_file_with_both(summary, tmp_path, capsys):
    more, most = tmp_path / "more.h5", tmp_path / "most.h5"
    arguments = ["--attack", "llg", "--attack", "uniform", "--label", "even", "-o"]
    assert main(["replay", str(summary), *arguments, str(more)]) == 0
    capsys.readouterr()
    with open_results(summary) as old, open_results(more) as new:
        assert new.complete
        assert list(new.scenarios[0].attacks) == [*STORED, "llg", "even"]
        listed = new.scenarios[0].parameters["attacks"]
        assert listed[-2:] == [
            {"name": "llg", "label": "llg"},
            {"name": "uniform", "label": "even"},
        ]
        kept = {**old.attributes, "replayed_from": "run.h5"}
        assert {name: new.attributes[name] for name in kept} == kept
        assert new.ranks == old.ranks
        seconds = new.scenarios[0].array("timings/attacks/llg")
        assert (np.isfinite(seconds) == [True, False, True]).all()
        for name in ("timings/attacks/ones", "timings/wait", "rounds/loss"):
            np.testing.assert_array_equal(
                new.scenarios[0].array(name), old.scenarios[0].array(name)
            )
    frame = analysis.load(more)
    assert frame["attack"].unique().tolist() == [*STORED, "llg", "even"]
    assert frame["asr"].notna().all()
    assert main(["table", str(more)]) == 0
    assert main(["show", str(more)]) == 0
    assert main(["figures", str(more), "-o", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["replay", str(more), "--attack", "llg", "--label", "x", "-o", str(most)]) == 0
    with open_results(most) as results:
        replays = json.loads(results.attributes["replays"])
    assert [entry["from"] for entry in replays] == ["run.h5", "more.h5"]
    assert [entry["attacks"] for entry in replays] == [["llg", "even"], ["x"]]
    assert_same_attack(contents(more), contents(most), "llg", "x")


LOCAL_EPOCHS = {
    "partition": {"kind": "dirichlet_classes", "alpha": 0.5},
    "labels": {"distribution": "natural"},
    "federation": {"algorithm": "fedavg", "local_epochs": 1, "population": 6},
}
DEFENCES = [
    [{"name": "top_k", "theta": 0.9, "error_feedback": True}],
    [{"name": "secure_aggregation"}],
    [{"name": "withhold_last_layer"}],
    [{"name": "dp_sgd", "bound": 1.0, "noise_multiplier": 1.0}],
]


@pytest.mark.parametrize("settings", [LOCAL_EPOCHS, {"sweep": {"defenses": DEFENCES}}])
def test_federated_and_defended_rounds_with_drop_outs(tmp_path, settings):
    federation = {"rounds": 3, "clients": 4, "batch_size": 8, "dropout": 0.3}
    again = {"llg": "llg_again", "llg_plus": "plus_again", "ilrg": "ilrg_again"}
    run, more = tmp_path / "run.h5", tmp_path / "more.h5"
    experiment = write_experiment(
        tmp_path / "x.yaml",
        **{
            "data": {"name": "digits", "auxiliary_per_class": 8},
            "results": {"observations": "last_layer"},
            **settings,
            "federation": {**federation, **settings.get("federation", {})},
            "attacks": list(again),
        },
    )
    done = run_here("run", experiment, "-o", run, cwd=ROOT)
    assert done.status == 0, done.err
    replay(run, more, [{"name": name, "label": label} for name, label in again.items()])
    before, after = contents(run), contents(more)
    for name, label in again.items():
        assert_same_attack(before, after, name, label)
    with open_results(run) as old, open_results(more) as new:
        assert any((one.array("updates/arrived") == 0).any() for one in old.scenarios)
        for first, second in zip(old.scenarios, new.scenarios, strict=True):
            assert second.privacy == first.privacy
            assert second.attacks.keys() == first.attacks.keys() | set(again.values())
            for label, info in first.attacks.items():
                assert second.attacks[label] == info
    frame = analysis.load(more)
    for name, label in again.items():
        scores = [frame[frame["attack"] == one]["asr"].tolist() for one in (name, label)]
        assert scores[0] == pytest.approx(scores[1], nan_ok=True)


def test_files_that_are_not_complete(tmp_path, capsys):
    build(tmp_path / "run.h5.partial", [Spec(rounds=5), Spec(rounds=4)], committed=[5, 2])
    more = tmp_path / "more.h5"
    arguments = ["--attack", "llg", "--only", "-o", str(more)]
    assert main(["replay", str(tmp_path / "run.h5"), *arguments]) == 0
    with open_results(more) as results:
        assert [scenario.committed for scenario in results.scenarios] == [5, 2]
        assert not results.complete
        assert (results.scenarios[1].array("attacks/llg/counts") >= 0).all()
        assert list(results.scenarios[0].attacks) == ["llg"]
    assert "7 of 9 rounds" in capsys.readouterr().err


def test_a_file_that_is_being_written(tmp_path):
    script = Path(__file__).parents[1] / "results" / "build_file.py"
    path = tmp_path / "run.h5.partial"
    writer = subprocess.Popen(
        [sys.executable, str(script), str(path), "6"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdin
    assert writer.stdout
    writer.stdout.readline()
    for rounds in (2, 4):
        print(rounds, file=writer.stdin, flush=True)
        writer.stdout.readline()
        replay(tmp_path / "run.h5", tmp_path / f"{rounds}.h5", ["llg"], only=True)
        with open_results(tmp_path / f"{rounds}.h5") as results:
            assert results.scenarios[0].committed == rounds
            assert (results.scenarios[0].array("attacks/llg/counts") >= 0).all()
    writer.communicate()


def test_nothing_committed_yet(tmp_path):
    build(tmp_path / "run.h5.partial", [Spec(rounds=5)], committed=[0])
    replay(tmp_path / "run.h5", tmp_path / "more.h5", ["llg"], only=True)
    with open_results(tmp_path / "more.h5") as results:
        assert results.scenarios[0].committed == 0


def test_facts_from_the_file(tmp_path):
    path, more = build(tmp_path / "run.h5", [Spec(local_steps=3)]), tmp_path / "more.h5"
    replay(path, more, [{"name": "idlg", "label": "x"}])
    with open_results(more) as results:
        info = results.scenarios[0].attacks["x"]
        assert info.broken == {"one label per update": "24 labels per update"}
        assert (results.scenarios[0].array("attacks/x/counts").sum(axis=-1) == 24).all()


def test_version_1_0_has_no_labels(tmp_path):
    path, more = build(tmp_path / "run.h5", [Spec()]), tmp_path / "more.h5"
    with h5py.File(path, "r+") as file:
        file.pop("scenarios/0000/observations/labels", None)
    replay(path, more, ["llg"], only=True)
    with open_results(more) as results:
        assert (results.scenarios[0].array("attacks/llg/counts").sum(axis=-1) == 8).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{path}", "--attack", "llgg", "-o", "more.h5"], ["unknown attack 'llgg'", "'llg'"]),
        (["{path}", "--attack", "llg", "x=1", "-o", "more.h5"], ["no option 'x'"]),
        (["{path}", "--attack", "llg_star", "samples=0", "-o", "more.h5"], ["samples", "found 0"]),
        (["{path}", "--attack", "llg_star", "x", "-o", "more.h5"], ["'x'", "expected KEY=VALUE"]),
        (["{path}", "--attack", "llg_star", "a=1", "a=2", "-o", "more.h5"], ["'a'", "twice"]),
        (["{path}", "--attack", "llg_star", "a=[", "-o", "more.h5"], ["llg_star", "a=["]),
        (["{path}", "--attack", "llg", "-o", "more.h5"], ["'llg' already", "--label"]),
        (["{path}", "--attack", "llg", "--label", "a b", "-o", "more.h5"], ["label", "'a b'"]),
        (
            ["{path}", *["--attack", "llg", "--label", "x"] * 2, "-o", "more.h5"],
            ["'x' stands there twice"],
        ),
        (["{path}", "--attack", "llg", "--only", "-o", "{path}"], ["this is the file to replay"]),
        (
            ["{path}", "--attack", "llg", "--only", "-o", "{path}", "--overwrite"],
            ["this is the file to replay"],
        ),
        (["{path}", "--attack", "llg", "--only", "-o", "there.h5"], ["exists", "--overwrite"]),
        (["{path}", "--attack", "llg", "--only", "-o", "no/more.h5"], ["no does not exist"]),
        (["nothing.h5", "--attack", "llg", "-o", "more.h5"], ["nothing.h5", "no such file"]),
        (["there.h5", "--attack", "llg", "-o", "more.h5"], ["no HDF5 file"]),
        (["{cut}", "--attack", "llg", "--only", "-o", "more.h5"], ["truncated or damaged"]),
    ],
)
def test_mistakes_get_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    path, cut = build(tmp_path / "run.h5", [Spec(rounds=5)]), tmp_path / "cut.h5"
    cut.write_bytes(path.read_bytes()[:-5000])
    Path("there.h5").write_text("something else")
    before = path.read_bytes()
    assert main(["replay", *(argument.format(path=path, cut=cut) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert path.read_bytes() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["cut.h5", "run.h5", "there.h5"]
    assert Path("there.h5").read_text() == "something else"


def test_overwrite(tmp_path):
    path = build(tmp_path / "run.h5", [Spec(rounds=5)])
    (tmp_path / "more.h5").write_text("something else")
    replay(path, tmp_path / "more.h5", ["llg"], only=True, overwrite=True)
    with open_results(tmp_path / "more.h5") as results:
        assert results.complete


@pytest.mark.parametrize(
    "arguments",
    [
        ["run.h5", "-o", "x.h5"],
        ["run.h5", "--attack", "llg"],
        ["--label", "x", "run.h5", "--attack", "llg", "-o", "x.h5"],
    ],
)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["replay", *arguments])
    assert caught.value.code == 2
    assert "usage: analysis replay" in capsys.readouterr().err


def test_what_a_share_lacks_is_told_of_the_number_in_the_sweep(tmp_path):
    path = share(tmp_path, [Spec(rounds=1)] * 2, "run", (1, 2))
    with pytest.raises(UserError, match=r"scenario 1 has no observations/weight_gradient"):
        replay(path, tmp_path / "more.h5", [{"name": "rlg"}])


def _without_row_sums(file):
    del file["scenarios/0000/observations/row_sums"]


def _without_axes(file):
    file["scenarios/0000/updates/other"] = 1.0


def _with_broken_versions(file):
    file.attrs["dependencies"] = "{torch"


def _with_broken_replays(file):
    file.attrs["replays"] = "7"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_without_row_sums, "observations/row_sums is missing"),
        (_without_axes, "updates/other has no axis of rounds"),
        (_with_broken_versions, "dependencies"),
        (_with_broken_replays, "replays"),
    ],
)
def test_files_that_are_damaged_are_told_apart(tmp_path, damage, reason):
    path = build(tmp_path / "run.h5", [Spec(rounds=5)])
    with h5py.File(path, "a") as file:
        damage(file)
    with pytest.raises(UserError, match=rf"truncated or damaged \(.*{reason}"):
        replay(path, tmp_path / "new.h5", ["llg"], only=True)
    assert not list(tmp_path.glob("new*"))
