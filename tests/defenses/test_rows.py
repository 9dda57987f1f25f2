"""Bias gradient and row sums: what one tells of the other."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from last_layers import SEEDS, known, layout, observe, rng_of, updates

from testbed.defenses.rows import balanced, filled_from_rows, merged

GRADIENTS = arrays(np.float64, (3, 5), elements=st.integers(-8, 8).map(float))


@given(GRADIENTS)
def test_balanced_gradients_sum_to_0_and_keep_zeros_and_signs(gradient):
    found = balanced(gradient)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-12)
    assert (found[gradient == 0] == 0).all()
    assert (found * gradient >= 0).all()


def test_a_balanced_gradient_stays():
    gradient = np.array([[1.0, -3.0, 2.0], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(balanced(gradient), gradient)


@given(SEEDS, st.floats(-50, 50).filter(lambda mass: abs(mass) > 0.1), st.booleans())
def test_missing_entries_are_row_sums_over_the_mass(seed, mass, keep_empty):
    rng = rng_of(seed)
    bias = rng.normal(size=(4, 6))
    bias -= bias.mean(axis=1, keepdims=True)
    shown = bias * (rng.random(bias.shape) < 0.5)
    shown[:, 0] = bias[:, 0]
    found = filled_from_rows(shown, mass * bias, keep_empty=keep_empty)
    np.testing.assert_allclose(found, bias, atol=1e-9)


def test_entries_that_are_there_stay_and_what_the_sum_lacks_is_shared_out():
    bias, rows = np.array([[0.4, 0.0, 0.0, 0.0]]), np.array([[4.0, -2.0, 0.0, 0.0]])
    found = filled_from_rows(bias, rows, keep_empty=False)
    np.testing.assert_allclose(found, [[0.4, -0.2 - 0.2 / 3, -0.2 / 3, -0.2 / 3]])
    found = filled_from_rows(bias, rows, keep_empty=True)
    np.testing.assert_allclose(found, [[0.4, -0.4, 0.0, 0.0]])
    nothing = filled_from_rows(np.zeros((1, 4)), rows, keep_empty=False)
    np.testing.assert_array_equal(nothing, np.zeros((1, 4)))


def test_the_surer_of_bias_and_row_sums_decides():
    tensors = layout()
    seen = observe(updates(0, tensors, rng_of(0).integers(4, size=(2, 8))), tensors)
    shown = replace(seen, weight_gradient=None, update=None)
    server = replace(known(tensors), mass=3.0)
    none, much = np.zeros((2, 4)), np.full((2, 4), 1e9)
    by_rows = merged(shown, server, much, none).bias_gradient
    np.testing.assert_allclose(by_rows, shown.row_sums / 3, atol=1e-6)
    by_bias = merged(shown, server, none, much).bias_gradient
    np.testing.assert_allclose(by_bias, shown.bias_gradient, atol=1e-6)
    half = merged(shown, server, np.full((2, 4), 1.0), np.full((2, 4), 9.0)).bias_gradient
    np.testing.assert_allclose(half, (by_rows + by_bias) / 2, atol=1e-6)
    # Masses that differ from sample to sample make the row sums less sure.
    spread = merged(shown, replace(server, spread=1e6), much * 0 + 1.0, none).bias_gradient
    np.testing.assert_allclose(spread, by_bias, atol=1e-4)


def test_without_a_mass_or_with_the_weight_gradient_the_bias_stays():
    tensors = layout()
    seen = observe(updates(0, tensors, rng_of(0).integers(4, size=(2, 8))), tensors)
    shown = replace(seen, weight_gradient=None)
    even = np.ones((2, 4))
    assert merged(shown, known(tensors), even, even) is shown
    assert merged(seen, replace(known(tensors), mass=3.0), even, even) is seen
