"""Defences by name, and what is said of knobs that are wrong."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass
from typing import ClassVar

import numpy as np
import pytest
from typing_extensions import override

from testbed.defenses import Stage, VectorDefense, defenses, make_defense, register
from testbed.errors import UserError

# Knobs that have no default.
NEEDED = {
    "clip": {"bound": 1.0},
    "noise": {"sigma": 0.1},
    "dp_paper": {"bound": 1.0},
    "top_k": {"theta": 0.9},
    "threshold": {"threshold": 0.1},
    "random_k": {"theta": 0.9},
    "gradient_dropout": {"p": 0.5},
    "reference_compression": {"theta": 0.2},
    "qsgd": {"levels": 8},
}
OURS = [*NEEDED, "dgc", "terngrad", "signsgd", "float16"]


@dataclass(frozen=True, kw_only=True)
class Halved(VectorDefense):
    """A defence of a user's own."""

    times: int = 1

    name: ClassVar[str] = "halved"
    title: ClassVar[str] = "Halved"
    source: ClassVar[str] = "none"
    stage: ClassVar[Stage] = Stage.CLIP

    @override
    def apply(self, vector, tensors, rng):
        vector *= np.float32(0.5) ** self.times


@pytest.mark.parametrize("name", OURS)
def test_every_defence_is_made_by_its_name_with_its_knobs(name):
    defense = make_defense(name, NEEDED.get(name, {}))
    assert isinstance(defense, defenses()[name])
    assert defense.name == name
    assert NEEDED.get(name, {}).items() <= defense.options().items()
    assert {"scope", "at"} <= set(defense.options())
    assert make_defense(name, defense.options()) == defense


def test_names_come_in_the_order_in_which_defences_are_applied():
    # In a process of its own: others have imported single families.
    code = (
        "from testbed.defenses import defenses\n"
        "print([int(defense.stage) for defense in defenses().values()])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    stages = json.loads(ran.stdout)
    assert stages == sorted(stages)
    assert len(stages) == len(defenses())


@pytest.mark.parametrize("name", OURS)
def test_every_defence_says_what_it_is(name):
    cls = defenses()[name]
    assert cls.title
    assert cls.source
    assert cls.adaptation == "" or cls.adaptation.endswith(".")
    # Where there is something to be undone or to be added up, it is said.
    undone = cls.undo is not VectorDefense.undo
    if undone or make_defense(name, NEEDED.get(name, {})).accumulates:
        assert cls.adaptation


@pytest.mark.parametrize("name", OURS)
def test_scope_and_place_are_knobs_of_every_defence(name):
    options = NEEDED.get(name, {}) | {"scope": "tensor", "at": "step"}
    defense = make_defense(name, options)
    assert (defense.scope, defense.at) == ("tensor", "step")
    for knob in ("scope", "at"):
        with pytest.raises(UserError, match=rf"defence '{name}', option '{knob}': found 'layer'"):
            make_defense(name, options | {knob: "layer"})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("top_k", {"theta": 1}, "option 'theta': found 1: Input should be less than 1"),
        (
            "top_k",
            {"theta": -0.1},
            "'theta': found -0.1: Input should be greater than or equal to 0",
        ),
        ("top_k", {"theta": float("nan")}, "'theta': found nan"),
        ("dgc", {"theta": 1.0}, "'theta': found 1.0: Input should be less than 1"),
        ("dgc", {"momentum": 1.0}, "'momentum': found 1.0: Input should be less than 1"),
        ("dgc", {"error_feedback": False}, "'error_feedback': found False"),
        ("random_k", {"theta": 1}, "'theta': found 1"),
        ("reference_compression", {"theta": 1}, "'theta': found 1"),
        ("gradient_dropout", {"p": 1}, "'p': found 1"),
        ("threshold", {"threshold": -1}, "'threshold': found -1"),
        ("clip", {"bound": 0}, "'bound': found 0: Input should be greater than 0"),
        ("clip", {"bound": float("inf")}, "'bound': found inf"),
        ("noise", {"sigma": 0}, "'sigma': found 0"),
        ("noise", {"sigma": 1, "distribution": "cauchy"}, "'distribution': found 'cauchy'"),
        ("dp_paper", {"bound": -1}, "'bound': found -1"),
        ("qsgd", {"levels": 0}, "'levels': found 0"),
        ("qsgd", {"levels": 40000}, "'levels': found 40000"),
        ("qsgd", {"levels": 2.5}, "'levels': found 2.5"),
    ],
)
def test_knobs_out_of_range_are_refused_with_what_was_found(name, options, message):
    with pytest.raises(UserError) as caught:
        make_defense(name, NEEDED.get(name, {}) | options)
    assert f"defence {name!r}" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", NEEDED)
def test_a_knob_without_a_default_has_to_be_given(name):
    with pytest.raises(UserError, match=rf"defence '{name}': the option '\w+' is missing"):
        make_defense(name, {})


def test_a_knob_that_is_not_known_is_answered_with_those_that_are():
    with pytest.raises(UserError, match=r"no option 'tetha': did you mean 'theta'\?"):
        make_defense("top_k", {"theta": 0.5, "tetha": 0.5})


def test_a_name_that_is_not_known_is_answered_with_those_that_are():
    with pytest.raises(UserError, match=r"unknown defence 'topk': did you mean 'top_k'\?"):
        make_defense("topk", {})


def test_a_name_is_given_away_once():
    with pytest.raises(ValueError, match="'top_k' is registered already"):
        register(type("Twin", (Halved,), {"name": "top_k"}))


def test_knobs_cannot_be_changed():
    defense = make_defense("top_k", {"theta": 0.5})
    with pytest.raises(FrozenInstanceError):
        defense.theta = 0.1


def test_a_defence_of_ones_own_is_named_by_its_import_path():
    defense = make_defense(f"{__name__}:Halved", {"times": 2})
    vector = np.ones(3, np.float32)
    defense.apply(vector, None, None)
    assert vector.tolist() == [0.25] * 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:Defense", "cannot be imported: ModuleNotFoundError"),
        ("testbed.defenses:NoSuchDefense", "cannot be imported: AttributeError"),
        ("testbed.errors:UserError", "no subclass of testbed.defenses.Defense"),
    ],
)
def test_an_import_path_to_something_else_is_refused(path, message):
    with pytest.raises(UserError, match=message):
        make_defense(path, {})
