"""EBI and LLBG against their loops, and where the step of 1/B is exact."""

import numpy as np
import pytest
from closed_form import (
    SEEDS,
    attack_once,
    constant_outputs,
    gradient,
    observe,
    random_posterior,
    server,
)
from definition import decode_by_loop, has_near_tie
from hypothesis import assume, given
from hypothesis import strategies as st

from testbed.attacks import Outputs, make_attack
from testbed.attacks.metrics import asr
from testbed.errors import UserError


def random_bias(seed, classes=7):
    bias = np.random.default_rng(seed).normal(size=classes).astype(np.float32)
    return bias, observe(np.zeros((classes, 1)), bias, 25)


@given(SEEDS)
def test_ebi_is_llg_s_loop_on_the_bias(seed):
    bias, observed = random_bias(seed)
    impact = np.float64(bias[bias < 0].astype(float).sum()) / 25
    assume(impact < 0)
    zeros = np.zeros(len(bias))
    assume(not has_near_tie(bias - impact * (bias < 0), impact, zeros, 25))
    expected = decode_by_loop(bias, impact, zeros, 25)
    assert attack_once("ebi", None, observed)[0].tolist() == expected.tolist()


@given(SEEDS, st.integers(-10, 10))
def test_scaling_the_gradient_leaves_ebi_unchanged(seed, exponent):
    bias, observed = random_bias(seed)
    scaled = observe(np.zeros((7, 1)), bias * np.float32(2.0**exponent), 25)
    plain = attack_once("ebi", None, observed)
    assert plain.tolist() == attack_once("ebi", None, scaled).tolist()


@pytest.mark.parametrize("name", ["ebi", "llbg"])
@given(seed=SEEDS, samples=st.integers(1, 60))
def test_one_sample_or_no_opinion_is_what_it_takes_to_be_exact(name, seed, samples):
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 12))
    if name == "ebi":
        samples = 1
    posterior = np.full((samples, classes), 1 / classes)
    if samples == 1:
        posterior = random_posterior(rng, 1, classes)
    labels = rng.integers(classes, size=samples)
    # Of any sign, as of tanh: the bias gradient does not depend on the features.
    observed = observe(*gradient(posterior, rng.normal(size=(samples, 3)), labels), samples)
    expected = np.bincount(labels, minlength=classes)
    assert attack_once(name, None, observed)[0].tolist() == expected.tolist()


def test_llbg_is_exact_for_a_sum_of_steps():
    rng = np.random.default_rng(3)
    labels = rng.integers(6, size=(5, 8))
    flat = np.full((8, 6), 1 / 6)
    parts = [gradient(flat, np.ones((8, 2)), step) for step in labels]
    observed = observe(sum(w for w, _ in parts), sum(b for _, b in parts), 40, local_steps=5)
    expected = np.bincount(labels.ravel(), minlength=6)
    assert attack_once("llbg", None, observed)[0].tolist() == expected.tolist()


def test_clipping_defeats_llbg_and_not_ebi_s_order():
    counts = np.array([[0, 9, 3, 0, 0, 0]])
    bias = 1 / 6 - counts / 12
    success = {
        (name, scale): asr(
            counts, attack_once(name, None, observe(np.zeros((6, 1)), bias * scale, 12))
        )[0]
        for name in ("ebi", "llbg")
        for scale in (1, 0.05)
    }
    assert success["llbg", 1] == 1
    assert success["llbg", 0.05] < 0.6
    assert success["ebi", 0.05] == success["ebi", 1] > 0.8


@given(SEEDS, st.floats(0, 0.95))
def test_llbg_is_its_loop(seed, confidence):
    bias, _ = random_bias(seed)
    impact = -(1 - confidence) / 5
    stepped = observe(np.zeros((7, 1)), bias, 25, local_steps=5)
    zeros = np.zeros(7)
    assume(not has_near_tie(bias - impact * (bias < 0), impact, zeros, 25))
    expected = decode_by_loop(bias, impact, zeros, 25)
    found = attack_once("llbg", None, stepped, confidence=confidence)
    assert found[0].tolist() == expected.tolist()
    # The paper's lowering of all entries by E / C before the second step decides nothing.
    lowered = decode_by_loop(bias, impact, np.full(7, 5 / 7), 25)
    assert found[0].tolist() == lowered.tolist()


@given(SEEDS)
def test_llbg_plus_is_the_loop_with_a_step_per_class(seed):
    rng = np.random.default_rng(seed)
    classes = 7
    labels = np.repeat(np.arange(classes), 4)
    posterior = random_posterior(rng, len(labels), classes, 3.0)
    adversary = server(Outputs(posterior, np.ones((len(labels), 2)), labels))
    confidence = [posterior[labels == c, c].mean() for c in range(classes)]
    bias, observed = random_bias(seed)
    expected = decode_by_loop(bias, (np.array(confidence) - 1) / 25, np.zeros(classes), 25)
    assert attack_once("llbg_plus", adversary, observed)[0].tolist() == expected.tolist()


def test_llbg_plus_with_a_model_that_is_sure_of_a_class():
    sure = np.array([1.0, 0, 0, 0])
    _, observed = random_bias(5, classes=4)
    counts = attack_once("llbg_plus", server(constant_outputs(sure, np.ones(2))), observed)
    assert counts.sum() == 25


@given(SEEDS, st.integers(3, 9), st.integers(1, 40))
def test_llbg_plus_is_exact_where_samples_have_the_confidence_of_the_auxiliary_ones(
    seed, classes, samples
):
    """What a sample is not of its class, the model takes for class 0, which is absent."""
    rng = np.random.default_rng(seed)
    confidence = np.append(1.0, rng.uniform(0, 0.9, classes - 1))
    posterior = np.diag(confidence)
    posterior[:, 0] = np.where(np.arange(classes) == 0, 1.0, 1 - confidence)
    own = np.repeat(np.arange(classes), 2)
    adversary = server(Outputs(posterior[own], np.ones((len(own), 2)), own))
    labels = rng.integers(1, classes, size=samples)
    observed = observe(*gradient(posterior[labels], rng.normal(size=(samples, 2)), labels), samples)
    found = attack_once("llbg_plus", adversary, observed)
    assert found[0].tolist() == np.bincount(labels, minlength=classes).tolist()


def test_one_step_for_all_classes_is_not_exact_where_confidences_differ():
    posterior = np.array([[1.0, 0, 0], [0.9, 0.1, 0], [0.1, 0, 0.9]])
    labels = np.repeat([1, 2], [4, 12])
    observed = observe(*gradient(posterior[labels], np.ones((16, 2)), labels), 16)
    own = np.arange(3)
    adversary = server(Outputs(posterior, np.ones((3, 2)), own))
    assert attack_once("llbg_plus", adversary, observed).tolist() == [[0, 4, 12]]
    for name in ("ebi", "llbg"):
        assert np.abs(attack_once(name, None, observed)[0] - [0, 4, 12]).max() >= 4


@pytest.mark.parametrize("name", ["ebi", "llbg", "llbg_plus"])
def test_a_class_that_the_model_expects_has_no_negative_entry_and_is_missed(name):
    posterior, labels = np.array([0.9, 0.05, 0.05]), np.repeat([0, 1], 5)
    observed = observe(*gradient(np.tile(posterior, (10, 1)), np.ones((10, 2)), labels), 10)
    assert observed.bias_gradient[0, 0] == pytest.approx(0.4)
    adversary = server(constant_outputs(posterior, np.ones(2)))
    found = attack_once(name, adversary, observed)
    assert found[0, 0] == 0
    assert asr(np.array([[5, 5, 0]]), found) <= 0.5
    # It is the model behind the decoding that fails: the bias tells all.
    assert attack_once("aux_mean", adversary, observed).tolist() == [[5, 5, 0]]


@pytest.mark.parametrize("confidence", [-0.1, 1.0, "high"])
def test_confidence_is_a_share(confidence):
    with pytest.raises(UserError, match="option 'confidence'"):
        make_attack("llbg", {"confidence": confidence})
