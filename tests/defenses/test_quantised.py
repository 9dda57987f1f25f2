"""What quantisers send, that stochastic ones are right on average, and what an attacker does.

Statistical checks have fixed seeds; each would fail by chance once in 100 000 seeds or less often.
"""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from last_layers import SEEDS, agree, known, layout, layouts, normal, observe, rng_of, updates

from testbed.defenses import Levels
from testbed.defenses.quantised import QSGD, Float16, SignSGD, TernGrad
from testbed.encoding import decoded

SCOPES = st.sampled_from(["update", "tensor"])
STOCHASTIC = [QSGD(levels=1), QSGD(levels=8), QSGD(levels=8, scope="tensor"), TernGrad()]
ALL = [*STOCHASTIC, TernGrad(scope="tensor"), SignSGD(), SignSGD(scope="tensor"), Float16()]


def received(defense, update, tensors, seed=0):
    """Return updates as the server decodes them."""
    out = update.copy()
    bounds = tensors.bounds(defense.scope)
    for row, one in enumerate(out):
        values = one[: tensors.size].copy()
        one[: tensors.size] = decoded(defense.quantise(values, bounds, rng_of(seed + row)), bounds)
    return out


def parts(values, bounds):
    return np.split(values, bounds[1:-1])


@given(SEEDS, layouts(), SCOPES, st.sampled_from([1, 2, 8, 100, 32767]))
def test_qsgd_rounds_to_a_neighbouring_level_of_the_norm(seed, tensors, scope, levels):
    values = normal(seed, tensors.size)
    bounds = tensors.bounds(scope)
    found = QSGD(levels=levels, scope=scope).quantise(values, bounds, rng_of(seed))
    assert (found.levels, found.signs_only, found.codes.dtype) == (levels, False, np.int32)
    assert np.abs(found.codes).max() <= levels
    dense = decoded(found, bounds)
    for scale, part, sent in zip(
        found.scales, parts(values, bounds), parts(dense, bounds), strict=True
    ):
        norm = np.linalg.norm(part.astype(np.float64))
        assert scale == pytest.approx(norm, rel=1e-6)
        assert (np.abs(sent - part) <= norm / levels * 1.0001 + 1e-6 * norm).all()
        assert not ((sent != 0) & (np.sign(sent) != np.sign(part))).any()


@given(SEEDS, layouts(), SCOPES)
def test_terngrad_sends_0_or_the_largest_magnitude(seed, tensors, scope):
    values = normal(seed, tensors.size)
    bounds = tensors.bounds(scope)
    found = TernGrad(scope=scope).quantise(values, bounds, rng_of(seed))
    largest = [np.abs(part).max() for part in parts(values, bounds)]
    np.testing.assert_array_equal(found.scales, largest)
    for part, sent in zip(parts(values, bounds), parts(found.codes, bounds), strict=True):
        assert set(sent.tolist()) <= {-1, 0, 1}
        # The largest itself is always sent, and with its own sign.
        where = np.argmax(np.abs(part))
        assert sent[where] == np.sign(part[where])
        assert not ((sent != 0) & (sent != np.sign(part))).any()


@pytest.mark.parametrize("levels", [1, 4, 100])
def test_values_on_a_level_are_sent_as_they_are(levels):
    """Of the norm 1: a single entry, or as many equal ones as it has levels, squared."""
    for number in (1, levels**2):
        values = np.full(number, -1 / np.sqrt(number), np.float32)
        bounds = np.array([0, number])
        sent = decoded(QSGD(levels=levels).quantise(values, bounds, rng_of(0)), bounds)
        np.testing.assert_allclose(sent, values, rtol=1e-6)


@pytest.mark.parametrize("defense", STOCHASTIC, ids=str)
def test_stochastic_rounding_is_right_on_average(defense):
    tensors = layout()
    values = normal(1, tensors.size)
    bounds = tensors.bounds(defense.scope)
    draws, rng = 4000, rng_of(2)
    total, squares = np.zeros(len(values)), np.zeros(len(values))
    for _ in range(draws):
        sent = decoded(defense.quantise(values, bounds, rng), bounds).astype(np.float64)
        total += sent
        squares += sent**2
    found = defense.quantise(values, bounds, rng)
    step = np.repeat(found.scales, np.diff(bounds)) / found.levels
    height = np.abs(values) / step
    fraction = height - np.floor(height)
    # Up with the probability of the fraction: a Bernoulli variable times a step.
    far = scipy.stats.norm.isf(0.5e-5 / len(values))
    error = far * step * np.sqrt(fraction * (1 - fraction) / draws) + 1e-6
    assert (np.abs(total / draws - values) < error).all()
    variance = squares / draws - (total / draws) ** 2
    expected = (step**2 * fraction * (1 - fraction)).sum()
    assert variance.sum() == pytest.approx(expected, rel=0.05)


@given(SEEDS, layouts(), SCOPES)
def test_signs_are_sent_with_the_mean_magnitude(seed, tensors, scope):
    values = normal(seed, tensors.size)
    values[0] = 0
    bounds = tensors.bounds(scope)
    found = SignSGD(scope=scope).quantise(values, bounds, rng_of(0))
    assert (found.levels, found.signs_only, found.codes.dtype) == (1, True, np.int32)
    np.testing.assert_array_equal(found.codes, np.where(values < 0, -1, 1))
    expected = [np.abs(part.astype(np.float64)).mean() for part in parts(values, bounds)]
    np.testing.assert_allclose(found.scales, expected, rtol=1e-6)


def test_zeros_of_either_sign_count_as_positive():
    values = np.array([0.0, -0.0, -1.0], np.float32)
    found = SignSGD().quantise(values, np.array([0, 3]), rng_of(0))
    assert found.codes.tolist() == [1, 1, -1]


@given(SEEDS, st.integers(-12, 12))
def test_half_precision_rounds_to_the_nearest(seed, exponent):
    values = normal(seed, 50) * np.float32(10.0**exponent)
    half = Float16().quantise(values, np.array([0, 50]), rng_of(0))
    assert half.dtype == np.float16
    inside = np.abs(values) <= 65504
    np.testing.assert_array_equal(half[inside], values[inside].astype(np.float16))
    np.testing.assert_array_equal(half[~inside], np.sign(values[~inside]) * 65504)


def test_half_precision_saturates_what_is_finite_alone():
    values = np.array([1e6, -1e38, 65519, np.inf, -np.inf, np.nan], np.float32)
    half = Float16().quantise(values, np.array([0, 6]), rng_of(0))
    np.testing.assert_array_equal(half, [65504, -65504, 65504, np.inf, -np.inf, np.nan])


# What may come


@pytest.mark.parametrize("defense", ALL, ids=str)
def test_empty_parts_and_zeros_stay_so(defense):
    bounds = np.array([0, 0, 4, 4])
    values = np.zeros(4, np.float32)
    np.testing.assert_array_equal(decoded(defense.quantise(values, bounds, rng_of(0)), bounds), 0)
    none = values[:0]
    sent = defense.quantise(none, np.array([0, 0]), rng_of(0))
    assert decoded(sent, np.array([0, 0])).shape == (0,)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("defense", ALL, ids=str)
def test_divergence_shows_and_stays_in_its_part(defense, bad):
    bounds = np.array([0, 3, 6])
    values = np.array([1, bad, 2, 3, 4, 5], np.float32)
    sent = decoded(defense.quantise(values, bounds, rng_of(0)), bounds)
    assert not np.isfinite(sent[:3]).all()
    assert np.isfinite(sent[3:]).all()


@pytest.mark.parametrize("defense", ALL, ids=str)
@pytest.mark.parametrize("unit", [1e-44, 1e-30, 1e30])
def test_no_unit_is_too_small_or_too_large(defense, unit):
    values = np.array([1, -2, 3], np.float32) * np.float32(unit)
    bounds = np.array([0, 3])
    sent = decoded(defense.quantise(values, bounds, rng_of(0)), bounds)
    assert np.isfinite(sent).all()
    assert not np.any(np.sign(sent) * np.sign(values) < 0)


@pytest.mark.parametrize("defense", ALL, ids=str)
def test_draws_are_those_of_the_stream(defense):
    values, bounds = normal(0, 5000), np.array([0, 5000])
    first, same, other = (
        decoded(defense.quantise(values, bounds, rng_of(seed)), bounds) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert np.array_equal(first, other) != defense.accumulates


def test_values_beyond_a_block_are_treated_as_those_within():
    values = normal(0, 70_000)
    bounds = np.array([0, 100, 70_000])
    for defense in (QSGD(levels=2000), TernGrad()):
        found = defense.quantise(values, bounds, rng_of(0))
        sent = decoded(found, bounds)
        step = np.repeat(found.scales, np.diff(bounds)) / found.levels
        assert (np.abs(sent - values) <= step * 1.001).all()
        assert (sent[-4000:] != 0).any()


# What an attacker does


@pytest.mark.parametrize(
    ("defense", "gain"), list(zip(STOCHASTIC, [0.3, 0.3, 1.0, 0.3], strict=True)), ids=str
)
def test_rounded_row_sums_are_balanced_and_tell_the_bias_gradient(defense, gain):
    tensors = layout(features=600)
    plain = updates(0, tensors, rng_of(0).integers(4, size=(30, 8)))
    seen = observe(received(defense, plain, tensors), tensors)
    # Features are uniform in [0, 1).
    server = replace(known(tensors), mass=300.0, spread=0.04)
    assert defense.undo(seen, server) is seen
    shown = replace(seen, weight_gradient=None, update=None)
    undone, truth = defense.undo(shown, server), observe(plain, tensors)
    np.testing.assert_allclose(undone.row_sums.sum(axis=1), 0, atol=1e-2)
    np.testing.assert_allclose(undone.bias_gradient.sum(axis=1), 0, atol=1e-5)
    for name, most in (("bias_gradient", gain), ("row_sums", 1.0)):
        before = np.linalg.norm(getattr(seen, name) - getattr(truth, name))
        after = np.linalg.norm(getattr(undone, name) - getattr(truth, name))
        assert after < most * before
    without_model = defense.undo(shown, known(tensors))
    np.testing.assert_allclose(without_model.bias_gradient.sum(axis=1), 0, atol=1e-5)


@pytest.mark.parametrize("scope", ["update", "tensor"])
def test_signs_of_the_weight_are_projected_onto_what_sums_to_0(scope):
    tensors, defense = layout(), SignSGD(scope=scope)
    plain = updates(0, tensors, rng_of(0).integers(4, size=(3, 8)))
    seen = observe(received(defense, plain, tensors), tensors)
    undone = defense.undo(seen, known(tensors))
    agree(undone, tensors)
    np.testing.assert_allclose(undone.weight_gradient.sum(axis=1), 0, atol=1e-5)
    np.testing.assert_array_equal(undone.bias_gradient, seen.bias_gradient)


def test_nothing_of_half_precision_is_to_be_undone():
    tensors = layout()
    seen = observe(updates(0, tensors, np.zeros((1, 4), int)), tensors)
    assert Float16().undo(seen, known(tensors)) is seen
    assert Float16.adaptation == ""


def test_what_rounds_at_random_averages_out_over_rounds():
    assert QSGD(levels=4).accumulates
    assert TernGrad().accumulates
    for defense in (SignSGD, Float16):
        assert not defense().accumulates
        assert defense(error_feedback=True).accumulates


@pytest.mark.parametrize("defense", ALL, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_simulated_updates_lose_what_real_ones_of_a_last_layer_lose(defense, bias):
    tensors = layout(body=(), bias=bias)
    plain = updates(5, tensors, rng_of(5).integers(4, size=(1, 8)))
    before = replace(observe(plain, tensors), update=None, norm=None)
    after = defense.imitate(before, rng_of(7))
    expected = observe(received(defense, plain, tensors, 7), tensors)
    np.testing.assert_array_equal(after.weight_gradient, expected.weight_gradient)
    np.testing.assert_array_equal(after.bias_gradient, expected.bias_gradient)
    np.testing.assert_allclose(after.norm, expected.norm, rtol=1e-6)


def test_quantisers_say_what_they_send():
    values, bounds = normal(0, 10), np.array([0, 10])
    assert isinstance(QSGD(levels=3).quantise(values, bounds, rng_of(0)), Levels)
    assert Float16().quantise(values, bounds, rng_of(0)).dtype == np.float16
