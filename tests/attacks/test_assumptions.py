"""A scenario that breaks an attack's assumptions is told so, in the results."""

from dataclasses import replace
from pathlib import Path

import pytest
from launching import run_here, write_experiment

from testbed.attacks import Assumption, Knowledge, Observed, attacks, make_attack
from testbed.attacks.assumptions import Facts, broken_assumptions, not_applicable
from testbed.attacks.base import Attack
from testbed.results.reader import open_results

UNBIASED = """
from torch import nn

def unbiased():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12), nn.Sigmoid(), nn.Linear(12, 10, bias=False)
    )
"""
FACTS = Facts(classes=10, features=48, bias=True, statistics=6, batch_size=1, lowest_feature=0.0)


class Assumes(Attack):
    name = "assumes"
    title = "Assumes"
    knowledge = Knowledge.GRADIENTS
    source = "this test"
    assumes = frozenset(Assumption)

    def infer(self, observations, calibration):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("assumption", "holds", "breaks", "found"),
    [
        (Assumption.NON_NEGATIVE_FEATURES, FACTS, {"lowest_feature": -0.5}, "down to -0.5"),
        (Assumption.ONE_LABEL, FACTS, {"batch_size": 2}, "2 labels per update"),
        (Assumption.ONE_LABEL, FACTS, {"local_steps": 3}, "3 labels per update"),
        (Assumption.DISTINCT_LABELS, FACTS, {"batch_size": 4}, "may repeat"),
        (
            Assumption.FEWER_LABELS_THAN_RANK,
            replace(FACTS, batch_size=8),
            {"batch_size": 9},
            "at most 9",
        ),
        (
            Assumption.ABSENT_CLASS,
            replace(FACTS, batch_size=20),
            {"batch_size": 60},
            "0.02 absent",
        ),
        (Assumption.FEATURES_FOR_CLASSES, FACTS, {"features": 9}, "9 features for 10 classes"),
        (Assumption.ONE_STEP, FACTS, {"local_steps": 2}, "2 local steps"),
        (Assumption.SEVERAL_STEPS, replace(FACTS, local_steps=2), {"local_steps": 1}, "one local"),
        (Assumption.KNOWN_SIZE, FACTS, {"known_size": False}, "guesses it"),
        (Assumption.FIVE_CLASSES, replace(FACTS, classes=5), {"classes": 4}, "4 classes"),
        (Assumption.FAIR_SAMPLES, FACTS, {"fair_samples": False}, "some missing"),
        (Assumption.EXACT_STATISTICS, FACTS, {"statistics_noise": 0.1}, "noise of 0.1"),
        (Assumption.KNOWN_MOMENTUM, FACTS, {"undoable": False}, "runs once with a momentum"),
    ],
)
def test_each_assumption_holds_and_breaks(assumption, holds, breaks, found):
    attack = type("Just", (Assumes,), {"assumes": frozenset({assumption})})()
    assert broken_assumptions(attack, holds) == {}
    (text,) = broken_assumptions(attack, replace(holds, **breaks)).values()
    assert found in text


def test_features_that_nobody_has_seen_break_nothing():
    facts = replace(FACTS, lowest_feature=None)
    assert Assumption.NON_NEGATIVE_FEATURES.value not in broken_assumptions(Assumes(), facts)


def test_all_broken_assumptions_are_named_in_order():
    facts = replace(
        FACTS,
        classes=4,
        batch_size=64,
        features=3,
        lowest_feature=-1.0,
        local_steps=2,
        known_size=False,
        fair_samples=False,
        statistics_noise=0.1,
        undoable=False,
    )
    found = list(broken_assumptions(Assumes(), facts))
    assert found == sorted(found)
    assert {*found} == {item.value for item in Assumption} - {Assumption.SEVERAL_STEPS.value}


@pytest.mark.parametrize(
    ("declared", "lacks", "reason"),
    [
        ({"observes": frozenset({Observed.BIAS_GRADIENT})}, {"bias": False}, "has no bias"),
        ({"observes": frozenset({Observed.STATISTICS})}, {"statistics": 0}, "no BatchNorm"),
        ({"knowledge": Knowledge.MALICIOUS}, {"planted": False}, "a model of its own"),
    ],
)
def test_what_an_attack_cannot_do_without(declared, lacks, reason):
    attack = type("Needs", (Assumes,), declared)()
    assert reason in not_applicable(attack, replace(FACTS, **lacks))
    assert not not_applicable(attack, replace(FACTS, planted=True))


def test_every_attack_declares_what_is_known():
    for name, cls in attacks().items():
        attack = cls()
        assert attack.name == name
        assert attack.observes <= set(Observed)
        assert attack.assumes <= set(Assumption)
        assert attack.source
        assert attack.title
        by = attack.calibrated_by
        assert by is None or {*by} <= {*attack.options()}, name
    titles = [cls.title for cls in attacks().values()]
    assert len(set(titles)) == len(titles)


def test_the_results_say_what_was_broken_and_what_was_not_run(tmp_path: Path):
    experiment = write_experiment(
        tmp_path / "e.yaml",
        data={"name": "digits"},
        model={"name": "mine:unbiased"},
        federation={"fresh_model": True, "rounds": 3, "batch_size": 8},
        attacks=["llg", "llg_plus", "ebi", "idlg", "gradinversion_presence"],
    )
    (tmp_path / "mine.py").write_text(UNBIASED)
    done = run_here("run", experiment, "-o", "a.h5", cwd=tmp_path)
    assert done.status == 0, done.err
    with open_results(tmp_path / "a.h5") as results:
        (scenario,) = results.scenarios
        ebi, idlg = scenario.attacks["ebi"], scenario.attacks["idlg"]
        assert ebi.not_applicable == "the last layer has no bias"
        assert (scenario.array("attacks/ebi/counts") == -1).all()
        assert idlg.not_applicable == ""
        assert idlg.broken == {"one label per update": "8 labels per update"}
        assert (scenario.array("attacks/idlg/counts").sum(axis=2) == 8).all()
        seen = scenario.attacks["gradinversion_presence"]
        assert seen.answers == "presence"
        assert set(scenario.array("attacks/gradinversion_presence/presence").ravel()) <= {0, 1}
        assert scenario.attacks["llg"].broken == {}


def test_negative_features_are_found_by_a_trial_run(tmp_path: Path):
    experiment = write_experiment(
        tmp_path / "e.yaml",
        data={"name": "digits"},
        model={"name": "cnn"},
        federation={"fresh_model": True, "rounds": 2, "batch_size": 1},
        attacks=["llg"],
        sweep={"model.activation": ["sigmoid", "relu", "tanh"]},
    )
    done = run_here("run", experiment, "-o", "a.h5", cwd=tmp_path)
    assert done.status == 0, done.err
    with open_results(tmp_path / "a.h5") as results:
        broken = [scenario.attacks["llg"].broken for scenario in results.scenarios]
    assert [*map(list, broken)] == [[], [], ["non-negative features"]]
    assert make_attack("llg", {}).assumes == {Assumption.NON_NEGATIVE_FEATURES}
