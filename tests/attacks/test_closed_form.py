"""What every closed-form attack has to do: keep to its declaration, on any update and any model."""

import numpy as np
import pytest
import torch
from closed_form import NAMES, Federation, constant_outputs, observe, server

from testbed.attacks import Answer, Knowledge, Observed, attacks, make_attack
from testbed.attacks.checks import check_answer, check_calibration, check_declaration
from testbed.attacks.inference import infer_in_chunks

BATCH = 6


@pytest.fixture(scope="module", params=[1, 3])
def federation(request):
    return Federation(local_steps=request.param, missing=[2])


def calibrate(attack, adversary, observations):
    return {
        **attack.calibrate(adversary),
        **attack.calibrate_updates(adversary, observations),
    }


def lengths(observations):
    clients, classes, features = observations.weight_gradient.shape
    return {"client": clients, "class": classes, "feature": features, "buffer": 0}


@pytest.mark.parametrize("name", NAMES)
def test_answers_and_calibrations_are_as_declared(name, federation):
    attack = make_attack(name, {})
    check_declaration(name, attack.arrays())
    observations, _ = federation.round(4, BATCH)
    shown = observations.restricted(attack)
    calibration = calibrate(attack, federation.adversary(name, BATCH), shown)
    check_calibration(name, attack, calibration, lengths(observations))
    answer = attack.infer(shown, calibration)
    check_answer(name, attack, answer, shown)
    for array, values in calibration.items():
        assert values.dtype == np.dtype(attack.arrays()[array][1])
        assert np.isfinite(values).all()
    if attack.answers is Answer.COUNTS:
        assert answer.counts.dtype == np.int64
    if getattr(answer, "scores", None) is not None:
        assert answer.scores.dtype == np.float64


@pytest.mark.parametrize("name", NAMES)
def test_each_update_is_inferred_as_if_alone(name, federation):
    attack = make_attack(name, {})
    observations, _ = federation.round(5, BATCH)
    shown = observations.restricted(attack)
    adversary = federation.adversary(name, BATCH)
    together = infer_in_chunks(name, attack, shown, calibrate(attack, adversary, shown))
    for row in range(5):
        part = shown.rows(slice(row, row + 1))
        alone = infer_in_chunks(name, attack, part, calibrate(attack, adversary, part))
        assert alone[0].tolist() == together[row].tolist()


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("aux_ls")])
def test_torch_observations_give_the_same_answers(name, federation):
    attack = make_attack(name, {})
    observations, _ = federation.round(3, BATCH)
    shown = observations.restricted(attack)
    calibration = calibrate(attack, federation.adversary(name, BATCH), shown)
    tensors = {
        part: torch.from_numpy(values.copy()) if isinstance(values, np.ndarray) else values
        for part, values in vars(shown).items()
    }
    found = attack.infer(type(shown)(**tensors), calibration).values
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == attack.infer(shown, calibration).values.tolist()


def degenerate_updates(classes=4, features=3):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(7, classes, features))
    bias = rng.normal(size=(7, classes))
    weight[0], bias[0] = 0, 0
    weight[1], bias[1] = np.abs(weight[1]), np.abs(bias[1])
    weight[2], bias[2] = -np.abs(weight[2]), -np.abs(bias[2])
    weight[3] *= 1e30
    bias[3] *= 1e30
    weight[4] *= 1e-42
    bias[4] *= 1e-42
    weight[5], bias[5] = 1.0, 1.0
    labels = [5, 7, 3, 40, 11, 1, 1]
    return observe(
        weight, bias, labels, posterior=np.full_like(bias, 1 / classes), update=np.zeros((7, 9))
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, 1.0, 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_any_update_and_any_calibration_give_a_valid_answer(name, value):
    attack = make_attack(name, {})
    observations = degenerate_updates()
    calibration = {}
    for array, (axes, dtype) in attack.arrays().items():
        rows = len(observations.keys) if axes[:1] == ("client",) else 1
        rest = axes[1:] if axes[:1] == ("client",) else axes
        content = 3 if dtype == "u8" else value
        calibration[array] = np.full((rows, *(4 for _ in rest)), content, dtype)
    shown = observations.restricted(attack)
    check_answer(name, attack, attack.infer(shown, calibration), shown)


@pytest.mark.parametrize("name", NAMES)
def test_a_diverged_model_gives_a_calibration(name):
    attack = make_attack(name, {})
    broken = constant_outputs(np.full(4, np.nan), np.full(3, np.nan))
    adversary = server(broken, local_steps=2)
    adversary.after = lambda _: adversary
    observations = degenerate_updates()
    shown = observations.restricted(attack)
    calibration = calibrate(attack, adversary, shown)
    check_calibration(name, attack, calibration, lengths(observations))
    check_answer(name, attack, attack.infer(shown, calibration), shown)


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_that_is_shown_too_little_says_what_it_lacks(name):
    attack = make_attack(name, {})
    missing = {
        Observed.BIAS_GRADIENT: "bias gradient",
        Observed.WEIGHT_GRADIENT: "weight gradient",
        Observed.UPDATE: "whole update",
    }
    needed = [text for part, text in missing.items() if part in attack.observes]
    if not needed:
        return
    outputs = constant_outputs(np.full(4, 0.25), np.ones(3))
    nothing = make_attack("random", {})
    shown = degenerate_updates().restricted(nothing)
    adversary = server(outputs, local_steps=2)
    with pytest.raises(ValueError, match=" or ".join(needed).replace(" or ", "|")):
        attack.infer(shown, calibrate(attack, adversary, shown))


def test_the_truth_is_shown_to_the_oracle_alone():
    observations = degenerate_updates()
    seeing = {
        name
        for name, attack in attacks().items()
        if observations.restricted(attack).posterior is not None
    }
    assert seeing == {
        name for name, attack in attacks().items() if attack.knowledge is Knowledge.TRUTH
    }
    assert "oracle" in seeing


def test_gradients_sum_to_zero_over_the_classes(federation):
    observations, _ = federation.round(3, BATCH)
    for part in (observations.row_sums, observations.bias_gradient):
        assert np.abs(part.sum(axis=1)).max() < 1e-5 * np.abs(part).max()
    assert np.abs(observations.weight_gradient.sum(axis=1)).max() < 1e-6
