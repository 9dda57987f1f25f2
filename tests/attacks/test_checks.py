"""Attacks that answer wrongly, or reach for what they should not, end the run with their name."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from launching import run_here, write_experiment

from analysis import load
from testbed.attacks import (
    Answer,
    Attack,
    Knowledge,
    LabelCounts,
    LabelDistribution,
    LabelPresence,
    Observations,
    attacks,
)
from testbed.attacks.checks import check_answer, check_calibration, check_declaration
from testbed.errors import UserError

OBSERVED = Observations(np.zeros((2, 3)), None, None, np.array([4, 4]), np.arange(2))

HEAD = """
from dataclasses import dataclass
from typing import ClassVar
import numpy as np
from testbed.attacks import Attack, Knowledge, LabelCounts

@dataclass(frozen=True)
class Mine(Attack):
    name: ClassVar = "mine"
    title: ClassVar = "Mine"
    knowledge: ClassVar = Knowledge.GRADIENTS
    source: ClassVar = "this test"
"""


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.full((2, 3), 4), "sum to the update's 4 labels"),
        (np.array([[5, -1, 0], [4, 0, 0]]), "natural numbers"),
        (np.array([4, 0, 0]), "infer returned (3,), expected counts (2, 3)"),
        (np.array([[4.0, 0, 0], [4, 0, 0]]), "float64 counts, expected integers"),
        ([[4, 0, 0], [4, 0, 0]], "infer returned list"),
    ],
)
def test_counts_that_are_none(counts, message):
    with pytest.raises(UserError) as error:
        check_answer("mine", attacks()["llg"](), LabelCounts(counts), OBSERVED)
    assert "attack 'mine'" in str(error.value)
    assert message in str(error.value)


def test_counts_that_are_some():
    counts = LabelCounts(np.array([[4, 0, 0], [1, 1, 2]]))
    check_answer("mine", attacks()["llg"](), counts, OBSERVED)


@dataclass(frozen=True)
class Sees(Attack):
    name: ClassVar = "sees"
    title: ClassVar = "Sees"
    knowledge: ClassVar = Knowledge.GRADIENTS
    source: ClassVar = "this test"
    answers: ClassVar = Answer.PRESENCE

    def infer(self, observations, calibration):
        raise NotImplementedError


@dataclass(frozen=True)
class Shares(Sees):
    answers: ClassVar = Answer.DISTRIBUTION


def test_presence_and_shares_that_are_some():
    check_answer("mine", Sees(), LabelPresence(np.zeros((2, 3), bool)), OBSERVED)
    check_answer("mine", Shares(), LabelDistribution(np.full((2, 3), 1 / 3)), OBSERVED)


@pytest.mark.parametrize(
    ("attack", "answer", "message"),
    [
        (Sees(), LabelCounts(np.full((2, 3), 4)), "LabelCounts, but the attack declares"),
        (Sees(), np.zeros((2, 3), bool), "ndarray, but the attack declares"),
        (Sees(), LabelPresence(np.zeros((2, 3))), "float64 for presence, expected bool"),
        (Sees(), LabelPresence(np.zeros((3, 2), bool)), "(3, 2), expected presence (2, 3)"),
        (Shares(), LabelDistribution(np.full((2, 3), 0.5)), "sum to 1"),
        (Shares(), LabelDistribution(np.full((2, 3), np.nan)), "sum to 1"),
        (Shares(), LabelDistribution(np.array([[2, -1, 0.0]] * 2)), "none negative"),
    ],
)
def test_presence_and_shares_that_are_none(attack, answer, message):
    with pytest.raises(UserError) as error:
        check_answer("mine", attack, answer, OBSERVED)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({}, "['impact', 'offset'] are declared"),
        ({"impact": np.zeros(1), "offset": np.zeros(3)}, "'offset' has shape (3,)"),
        ({"impact": np.zeros(2), "offset": np.zeros((1, 3))}, "'impact' has shape (2,)"),
    ],
)
def test_calibrations_that_are_not_as_declared(calibration, message):
    with pytest.raises(UserError) as error:
        check_calibration("mine", attacks()["llg_plus"](), calibration, {"class": 3})
    assert message in str(error.value)


def test_declarations_of_axes_that_do_not_exist():
    wrong = type("Wrong", (), {"calibration_arrays": {"x": (("sample",), "f8")}})
    with pytest.raises(UserError, match="expected axes among"):
        check_declaration("mine", wrong.calibration_arrays)
    with pytest.raises(UserError, match="client first"):
        check_declaration("mine", {"x": (("class", "client"), "f8")})
    with pytest.raises(UserError, match="a dtype among"):
        check_declaration("mine", {"x": (("class",), "f4")})
    for name, attack in attacks().items():
        check_declaration(name, attack().arrays())


def run_with(tmp_path, body, attack_list):
    (tmp_path / "mine.py").write_text(HEAD + body)
    experiment = write_experiment(
        tmp_path / "e.yaml",
        federation={"rounds": 10, "fresh_model": True, "batch_size": 8},
        attacks=attack_list,
    )
    return run_here("run", experiment, "-o", "r.h5", "--overwrite", cwd=tmp_path)


def test_a_wrong_answer_ends_the_run_instead_of_being_scored(tmp_path):
    body = """
    def infer(self, observations, calibration):
        return LabelCounts(np.full(observations.row_sums.shape, 8))
"""
    done = run_with(tmp_path, body, ["llg", "mine:Mine"])
    assert done.status == 2
    assert "scenario 0, round 0: attack 'Mine': infer returned the counts [8, 8" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    "act",
    [
        "observations.row_sums[:] = 1",
        "observations.labels[:] = 3",
        "observations.keys[:] = 0",
        "self.calibrated.posterior[:] = 0.1",
    ],
)
def test_no_attack_can_change_what_the_next_one_sees(tmp_path, act):
    body = f"""
    def calibrate(self, adversary):
        object.__setattr__(self, "calibrated", adversary.on_dummy("zeros", 1))
        return {{}}
    def infer(self, observations, calibration):
        {act}
"""
    body = body.replace(
        "\n    def calibrate", "\n    knowledge: ClassVar = Knowledge.MODEL\n    def calibrate"
    )
    done = run_with(tmp_path, body, ["mine:Mine", "llg"])
    assert done.status != 0
    assert "read-only" in done.err


def test_more_than_what_is_declared_is_refused(tmp_path):
    body = """
    def calibrate(self, adversary):
        adversary.on_auxiliary()
        return {}
    def infer(self, observations, calibration):
        raise AssertionError
"""
    done = run_with(tmp_path, body, ["mine:Mine"])
    assert done.status != 0
    assert "PermissionError: the attack declares knowledge of 'gradients'" in done.err


def test_a_file_that_is_no_python_is_one_line(tmp_path):
    done = run_with(tmp_path, "    def infer(self:", ["mine:Mine"])
    assert done.status == 2
    assert "cannot be imported: SyntaxError" in done.err
    assert "Traceback" not in done.err


def test_a_calibration_with_a_feature_axis_is_stored(tmp_path):
    body = """
    calibration_arrays: ClassVar = {"direction": (("feature",), "f8")}
    def calibrate(self, adversary):
        return {"direction": np.arange(48.0)[None, :]}
    def infer(self, observations, calibration):
        counts = np.zeros(observations.row_sums.shape, int)
        counts[:, 0] = observations.labels
        return LabelCounts(counts)
"""
    done = run_with(tmp_path, body, ["mine:Mine"])
    assert done.status == 0, done.err
    import h5py

    with h5py.File(tmp_path / "r.h5") as file:
        stored = file["scenarios/0000/attacks/Mine/calibration/direction"]
        assert (stored[:] == np.arange(48)).all()
        assert stored.dims[1].keys() == ["feature"] or len(stored.dims[1]) == 1
    assert set(load(tmp_path / "r.h5").attack) == {"Mine"}
