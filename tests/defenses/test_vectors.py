"""Clipping and noise: closed forms, and what an attacker who knows of them gets back.

Statistical checks have fixed seeds; each would fail by chance once in 100 000 seeds or less often.
"""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from last_layers import (
    SEEDS,
    agree,
    applied,
    known,
    layout,
    layouts,
    normal,
    observe,
    posteriors,
    rng_of,
    updates,
)

from testbed.defenses import make_defense
from testbed.defenses.observed import euclidean_norm
from testbed.defenses.vectors import Clip, Noise, PaperDP

LARGE = 200_000


def split(vector, bounds):
    return np.split(vector, bounds[1:-1])


@given(SEEDS, layouts(), st.sampled_from(["update", "tensor"]), st.floats(0.1, 20))
def test_clipping_scales_each_part_to_the_bound_or_leaves_it_alone(seed, tensors, scope, bound):
    before = normal(seed, tensors.size)
    after = before.copy()
    Clip(bound=bound, scope=scope).apply(after, tensors, rng_of(0))
    bounds = tensors.bounds(scope)
    for old, new in zip(split(before, bounds), split(after, bounds), strict=True):
        norm = np.linalg.norm(old.astype(np.float64))
        np.testing.assert_allclose(new, old / max(1, norm / bound), rtol=1e-6)
        if norm <= bound:
            np.testing.assert_array_equal(new, old)


def test_clipping_leaves_zeros_and_empty_tensors():
    tensors = layout(body=(0, 3))
    vector = np.zeros(tensors.size, np.float32)
    Clip(bound=1.0, scope="tensor").apply(vector, tensors, rng_of(0))
    assert not vector.any()


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_clipping_hides_no_divergence(bad):
    tensors = layout()
    vector = np.ones(tensors.size, np.float32)
    vector[2] = bad
    Clip(bound=1.0).apply(vector, tensors, rng_of(0))
    assert not np.isfinite(vector).all()


@given(SEEDS, st.integers(0, 200_000), st.integers(-25, 25))
def test_norms_are_exact_whatever_the_size_and_the_unit(seed, size, exponent):
    vector = normal(seed, size) * np.float32(10.0**exponent)
    expected = np.sqrt(np.square(vector.astype(np.longdouble)).sum())
    assert euclidean_norm(vector) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("sigma", [0.1, 3.0])
@pytest.mark.parametrize(
    ("distribution", "reference"),
    [("gaussian", scipy.stats.norm()), ("laplace", scipy.stats.laplace(scale=0.5**0.5))],
)
def test_noise_has_its_distribution_with_sigma_as_standard_deviation(
    distribution, reference, sigma
):
    tensors = layout(body=(LARGE,))
    vector = np.ones(tensors.size, np.float32)
    Noise(sigma=sigma, distribution=distribution).apply(vector, tensors, rng_of(1))
    drawn = (vector.astype(np.float64) - 1) / sigma
    assert scipy.stats.kstest(drawn, reference.cdf).pvalue > 1e-5
    # 4.5 standard errors of a mean square.
    error = 4.5 * np.sqrt((reference.stats("k") + 2) / len(drawn))
    assert np.mean(drawn**2) == pytest.approx(1, abs=error)


@pytest.mark.parametrize(
    "defense",
    [Noise(sigma=1.0), Noise(sigma=1.0, distribution="laplace"), PaperDP(bound=1.0)],
    ids=str,
)
def test_noise_is_the_same_for_the_same_stream_alone(defense):
    tensors = layout()
    first, same, other = (np.zeros(tensors.size, np.float32) for _ in range(3))
    for vector, seed in ((first, 1), (same, 1), (other, 2)):
        defense.apply(vector, tensors, rng_of(seed))
    np.testing.assert_array_equal(first, same)
    assert not np.any(first == other)


@given(SEEDS, layouts(), st.floats(0.1, 10))
def test_the_papers_dp_clips_each_tensor_and_adds_the_same_noise_for_every_bound(
    seed, tensors, bound
):
    defense = make_defense("dp_paper", {"bound": bound})
    assert (defense.sigma, defense.scope) == (0.1, "tensor")
    vector = normal(seed, tensors.size) * 5
    expected = vector.copy()
    defense.apply(vector, tensors, rng_of(seed))
    Clip(bound=bound, scope="tensor").apply(expected, tensors, rng_of(0))
    noise = np.zeros_like(expected)
    Noise(sigma=0.1).apply(noise, tensors, rng_of(seed))
    np.testing.assert_allclose(vector, expected + noise, rtol=1e-6, atol=1e-7)


def test_the_papers_dp_says_that_it_is_not_private():
    assert "no (epsilon, delta) guarantee" in PaperDP.__doc__


# What is undone


def without_a_class(seed, tensors, steps=1):
    """Return updates of clients that all lack class 0, and the posterior of all their samples."""
    rng = rng_of(seed)
    posterior = posteriors(rng, 1, tensors.classes)[0]
    labels = rng.integers(1, tensors.classes, size=(3, 8))
    return updates(seed, tensors, labels, posterior, steps), posterior


@given(SEEDS, st.floats(0.01, 2), st.integers(1, 4))
def test_clipping_of_the_update_is_undone_where_a_class_is_absent(seed, bound, steps):
    tensors = layout()
    plain, posterior = without_a_class(seed, tensors, steps)
    defense = Clip(bound=bound)
    seen = observe(applied(defense, plain, tensors), tensors, steps)
    undone = defense.undo(seen, known(tensors, posterior))
    np.testing.assert_allclose(undone.update, plain, rtol=1e-3, atol=1e-5)
    expected = np.linalg.norm(plain[:, : tensors.size], axis=1)
    np.testing.assert_allclose(undone.norm, expected, rtol=1e-3)
    agree(undone, tensors)


@pytest.mark.parametrize("scope", ["update", "tensor"])
@given(SEEDS)
def test_what_is_below_the_bound_is_left_alone(scope, seed):
    tensors = layout()
    plain, posterior = without_a_class(seed, tensors)
    seen = observe(plain, tensors)
    undone = Clip(bound=1e3, scope=scope).undo(seen, known(tensors, posterior))
    for name in ("update", "row_sums", "bias_gradient", "weight_gradient", "norm"):
        np.testing.assert_array_equal(getattr(undone, name), getattr(seen, name))


@given(SEEDS)
def test_updates_are_undone_one_by_one(seed):
    """Of three updates, two are clipped; each is treated as if it were alone."""
    tensors = layout()
    plain, posterior = without_a_class(seed, tensors)
    plain[:, : tensors.size] *= np.array([[1], [10], [0.001]], np.float32)
    defense = Clip(bound=0.5)
    seen = observe(applied(defense, plain, tensors), tensors)
    assert (seen.norm > 0.499).tolist() == [True, True, False]
    together = defense.undo(seen, known(tensors, posterior))
    for row in range(3):
        one = defense.undo(seen.rows(slice(row, row + 1)), known(tensors, posterior))
        np.testing.assert_array_equal(one.update[0], together.update[row])
    np.testing.assert_array_equal(together.update[2], seen.update[2])


@given(SEEDS, st.floats(0.01, 0.1))
def test_tensor_by_tensor_the_bias_gets_its_own_factor_and_others_stay(seed, bound):
    tensors = layout()
    plain, posterior = without_a_class(seed, tensors)
    defense = Clip(bound=bound, scope="tensor")
    seen = observe(applied(defense, plain, tensors), tensors)
    undone = defense.undo(seen, known(tensors, posterior))
    np.testing.assert_allclose(undone.bias_gradient, plain[:, tensors.bias], rtol=1e-3, atol=1e-5)
    body, head = slice(0, tensors.weight.start), tensors.weight
    np.testing.assert_array_equal(undone.update[:, body], seen.update[:, body])
    # The weight gets one factor, of at least 1: the sum of the features is not known.
    ratio = undone.update[:, head] / seen.update[:, head]
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-4)
    assert (ratio > 1 - 1e-5).all()
    agree(undone, tensors)


@given(SEEDS, st.floats(0.02, 0.3))
def test_without_a_bias_the_factor_is_exact_for_features_that_sum_to_1(seed, bound):
    tensors = layout(classes=5, features=1, bias=False)
    rng = rng_of(seed)
    posterior = posteriors(rng, 1, 5)[0]
    labels = rng.integers(1, 5, size=8)
    plain = updates(seed, tensors, labels[None], posterior)
    plain[0, tensors.weight] = posterior - np.bincount(labels, minlength=5) / 8
    for scope in ("update", "tensor"):
        defense = Clip(bound=bound, scope=scope)
        seen = observe(applied(defense, plain, tensors), tensors)
        undone = defense.undo(seen, known(tensors, posterior))
        np.testing.assert_allclose(
            undone.row_sums[0], plain[0, tensors.weight], rtol=1e-3, atol=1e-6
        )


@given(SEEDS, layouts(), st.sampled_from(["gaussian", "laplace"]))
def test_undoing_noise_leaves_real_gradients_and_makes_others_sum_to_0(seed, tensors, distribution):
    labels = rng_of(seed).integers(tensors.classes, size=(2, 8))
    plain = updates(seed, tensors, labels)
    little = Noise(sigma=1e-6, distribution=distribution)
    untouched = little.undo(observe(plain, tensors), known(tensors))
    np.testing.assert_allclose(untouched.update, plain, atol=1e-5)
    defense = Noise(sigma=0.5, distribution=distribution)
    noisy = observe(applied(defense, plain, tensors, seed), tensors)
    undone = defense.undo(noisy, known(tensors))
    agree(undone, tensors)
    np.testing.assert_allclose(undone.weight_gradient.sum(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(undone.row_sums.sum(axis=1), 0, atol=1e-4)
    if tensors.bias is not None:
        np.testing.assert_allclose(undone.bias_gradient.sum(axis=1), 0, atol=1e-5)


def test_noise_averages_out_in_row_sums():
    tensors = layout(classes=10, features=600)
    plain = updates(1, tensors, rng_of(1).integers(10, size=(50, 8)))
    defense, truth = Noise(sigma=0.1), observe(plain, tensors)
    noisy = observe(applied(defense, plain, tensors), tensors)
    server = replace(known(tensors), mass=300.0, spread=0.04)
    shown = replace(noisy, weight_gradient=None, update=None)
    undone = defense.undo(shown, server)
    before = np.linalg.norm(noisy.bias_gradient - truth.bias_gradient)
    assert np.linalg.norm(undone.bias_gradient - truth.bias_gradient) < 0.3 * before
    whole = defense.undo(noisy, server)
    before = np.linalg.norm(noisy.weight_gradient - truth.weight_gradient)
    assert np.linalg.norm(whole.weight_gradient - truth.weight_gradient) < 0.8 * before


def test_row_sums_that_noise_may_have_made_negative_count_as_none():
    tensors = layout(classes=4, features=100)
    defense = Noise(sigma=0.01)
    rows = np.array([[-8.0, -0.08, 0.1, 7.98], [-0.15, -0.1, 0.1, 0.15]], np.float32)
    shown = observe(np.zeros((2, tensors.size + 3), np.float32), tensors)
    shown = replace(shown, row_sums=rows, weight_gradient=None, update=None, bias_gradient=None)
    found = defense.undo(shown, known(tensors)).row_sums
    np.testing.assert_allclose(found[0], [-8.0, 0.0, 0.1, 7.98], atol=1e-6)
    # A label takes no more than 0.03 from its row here: this is no noise.
    np.testing.assert_allclose(found[1], rows[1], atol=1e-6)


def test_tensors_that_were_clipped_each_get_their_ratio_back():
    tensors = layout(features=50)
    plain, posterior = without_a_class(4, tensors)
    clipped = applied(Clip(bound=0.05, scope="tensor"), plain, tensors)
    rows = plain[:, tensors.weight].reshape(len(plain), 4, -1).sum(axis=2)
    bias = plain[:, tensors.bias]
    mass = float((rows * bias).sum() / (bias**2).sum())
    server = replace(known(tensors, posterior), mass=mass)
    undone = Clip(bound=0.05, scope="tensor").undo(observe(clipped, tensors), server)
    np.testing.assert_allclose(undone.row_sums, rows, rtol=0.1, atol=0.05)
    agree(undone, tensors)


def test_undoing_the_papers_dp_projects_and_scales_up():
    tensors = layout()
    plain, posterior = without_a_class(3, tensors)
    defense = PaperDP(bound=0.05, sigma=1e-6)
    undone = defense.undo(
        observe(applied(defense, plain, tensors), tensors), known(tensors, posterior)
    )
    np.testing.assert_allclose(undone.bias_gradient, plain[:, tensors.bias], rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(undone.bias_gradient.sum(axis=1), 0, atol=1e-6)


@pytest.mark.parametrize(
    "defense",
    [Clip(bound=0.1), Clip(bound=0.1, scope="tensor"), Noise(sigma=0.1), PaperDP(bound=0.1)],
    ids=str,
)
@pytest.mark.parametrize("shown", [("row_sums",), ("row_sums", "bias_gradient")], ids=len)
def test_parts_that_are_not_observed_stay_none(defense, shown):
    tensors = layout()
    plain, posterior = without_a_class(1, tensors)
    hidden = {"bias_gradient", "weight_gradient", "update", "norm"} - set(shown)
    seen = replace(observe(plain, tensors), **dict.fromkeys(hidden))
    undone = defense.undo(seen, known(tensors, posterior))
    assert all(getattr(undone, name) is None for name in hidden)
    assert all(np.isfinite(getattr(undone, name)).all() for name in shown)


# What is imitated


def simulated(seed, tensors, steps=1):
    labels = rng_of(seed).integers(tensors.classes, size=(4, 8))
    seen = observe(updates(seed, tensors, labels, steps=steps), tensors, steps)
    return replace(seen, update=None, norm=None)


@pytest.mark.parametrize("bias", [True, False])
def test_simulated_updates_are_clipped_by_their_last_layer(bias):
    tensors = layout(body=(), bias=bias)
    before = simulated(5, tensors)
    for scope in ("update", "tensor"):
        after = Clip(bound=0.2, scope=scope).imitate(before, rng_of(0))
        parts = [before.weight_gradient.reshape(4, -1)] + [before.bias_gradient] * bias
        expected = np.concatenate(parts, axis=1)
        for row in expected:
            Clip(bound=0.2, scope=scope).apply(row, tensors, rng_of(0))
        weight = expected[:, tensors.weight].reshape(before.weight_gradient.shape)
        np.testing.assert_array_equal(after.weight_gradient, weight)
        np.testing.assert_allclose(after.row_sums, weight.sum(axis=2), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(after.norm, np.linalg.norm(expected, axis=1), rtol=1e-6)
        assert (after.bias_gradient is None) == (not bias)


def test_what_is_imitated_at_each_step_adds_up():
    """Noise of four steps has twice the standard deviation; clipping is that of the mean step."""
    tensors = layout(body=(), features=5000)
    before = simulated(6, tensors, steps=4)
    for at, factor in (("step", 2.0), ("update", 1.0)):
        noisy = Noise(sigma=0.1, at=at).imitate(before, rng_of(0))
        noise = (noisy.weight_gradient - before.weight_gradient).reshape(-1)
        error = 4.5 / np.sqrt(2 * noise.size)
        assert noise.std() / 0.1 == pytest.approx(factor, rel=error)
    clipped = Clip(bound=0.01, at="step").imitate(before, rng_of(0))
    np.testing.assert_allclose(clipped.norm, 0.04, rtol=1e-5)


def test_imitation_changes_nothing_that_it_is_given():
    tensors = layout(body=())
    before = simulated(7, tensors)
    kept = before.bias_gradient.copy(), before.weight_gradient.copy()
    PaperDP(bound=0.1).imitate(before, rng_of(0))
    np.testing.assert_array_equal(before.bias_gradient, kept[0])
    np.testing.assert_array_equal(before.weight_gradient, kept[1])


def test_imitating_takes_the_weight_gradient():
    seen = replace(simulated(8, layout(body=())), weight_gradient=None)
    with pytest.raises(ValueError, match="weight gradients"):
        Noise(sigma=1.0).imitate(seen, rng_of(0))


def test_noise_averages_out_over_rounds_and_clipping_does_not():
    assert not Clip(bound=1.0).accumulates
    assert Noise(sigma=1.0).accumulates
    assert PaperDP(bound=1.0).accumulates
