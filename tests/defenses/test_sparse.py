"""What is left out of an update: which entries, how many, and what an attacker fills in.

Statistical checks have fixed seeds; each would fail by chance once in 100 000 seeds or less often.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from last_layers import (
    SEEDS,
    agree,
    known,
    layout,
    layouts,
    normal,
    observe,
    posteriors,
    rng_of,
    updates,
)

from testbed.defenses import Sparsifier, Tensors, make_defense
from testbed.defenses.sparse import (
    DeepGradientCompression,
    GradientDropout,
    RandomK,
    ReferenceCompression,
    Threshold,
    TopK,
)

THETAS = st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99]) | st.floats(0, 1, exclude_max=True)
SCOPES = st.sampled_from(["update", "tensor"])
# Many values are equal, and many are 0.
VECTORS = layouts().flatmap(
    lambda tensors: st.tuples(
        st.just(tensors), arrays(np.float32, tensors.size, elements=st.integers(-3, 3))
    )
)


def sent(defense: Sparsifier, update, tensors: Tensors, seed=0):
    """Return updates as the server decodes them."""
    out = update.copy()
    for row, one in enumerate(out):
        vector = one[: tensors.size]
        chosen = defense.select(vector, tensors, rng_of(seed + row))
        values = vector[chosen] * np.float32(defense.factor)
        vector[:] = 0
        vector[chosen] = values
    return out


def alike(seed, tensors):
    """Return updates [2, P + S] of clients whose samples all have the same features."""
    rng = rng_of(seed)
    out = updates(seed, tensors, rng.integers(4, size=(2, 8)))
    features = rng.uniform(0.5, 1, size=(tensors.weight.stop - tensors.weight.start) // 4)
    error = rng.uniform(0.1, 1, size=(2, 4)) * [1, -1, 1, -1]
    error[:, 3] -= error.sum(axis=1)
    out[:, tensors.bias] = error
    out[:, tensors.weight] = (error[:, :, None] * features).reshape(2, -1)
    return out


# Which entries


@given(VECTORS, THETAS, SCOPES)
def test_top_k_sends_the_first_of_the_largest(given_, theta, scope):
    tensors, vector = given_
    found = TopK(theta=theta, scope=scope).select(vector, tensors, rng_of(0))
    expected = []
    for start, stop in pairwise(tensors.bounds(scope)):
        number = max(round((1 - theta) * (stop - start)), 1)
        ranked = sorted(range(start, stop), key=lambda i: (-abs(vector[i]), i))
        expected += sorted(ranked[:number])
    assert found.dtype == np.int64
    assert found.tolist() == expected


def test_top_k_of_the_update_may_leave_out_a_tensor_that_top_k_of_each_does_not():
    tensors = layout(body=(4, 4), classes=2, features=1, bias=True)
    vector = np.concatenate([[100, 50, 3, 2], np.full(4, 1e-3), [9, 8], [1e-4, 1e-5]])
    vector = vector.astype(np.float32)
    whole = TopK(theta=2 / 3).select(vector, tensors, rng_of(0))
    each = TopK(theta=2 / 3, scope="tensor").select(vector, tensors, rng_of(0))
    assert whole.tolist() == [0, 1, 8, 9]
    assert each.tolist() == [0, 4, 8, 10]


def test_top_k_skips_empty_tensors_and_sends_one_entry_of_all_others():
    tensors = layout(body=(0, 1000))
    chosen = TopK(theta=0.9999, scope="tensor").select(normal(0, tensors.size), tensors, rng_of(0))
    assert np.histogram(chosen, tensors.offsets[1:])[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_sent_first(bad):
    tensors = layout()
    vector = normal(1, tensors.size) * np.float32(1e30)
    vector[[3, 17]] = bad
    assert TopK(theta=0.95).select(vector, tensors, rng_of(0)).tolist() == [3, 17]
    assert Threshold(threshold=1e38).select(vector, tensors, rng_of(0)).tolist() == [3, 17]


@given(VECTORS, THETAS, SCOPES)
def test_deep_gradient_compression_selects_as_top_k_does(given_, theta, scope):
    tensors, vector = given_
    found = DeepGradientCompression(theta=theta, scope=scope).select(vector, tensors, rng_of(0))
    same = TopK(theta=theta, scope=scope).select(vector, tensors, rng_of(0))
    assert found.tolist() == same.tolist()


def test_deep_gradient_compression_always_keeps_what_it_did_not_send():
    defense = make_defense("dgc", {})
    assert (defense.theta, defense.momentum, defense.error_feedback) == (0.99, 0.0, True)
    assert defense.accumulates


@given(VECTORS, st.integers(0, 4))
def test_threshold_sends_what_reaches_it(given_, threshold):
    tensors, vector = given_
    chosen = Threshold(threshold=threshold).select(vector, tensors, rng_of(0))
    assert chosen.tolist() == [i for i, v in enumerate(vector) if abs(v) >= threshold]


@given(SEEDS, layouts(), THETAS, SCOPES)
def test_random_k_sends_the_share_of_each_part_up_to_rounding(seed, tensors, theta, scope):
    vector = normal(seed, tensors.size)
    chosen = RandomK(theta=theta, scope=scope).select(vector, tensors, rng_of(seed))
    assert chosen.dtype == np.int64
    assert (np.diff(chosen) > 0).all()
    bounds = tensors.bounds(scope)
    numbers = np.diff(np.searchsorted(chosen, bounds))
    exact = (1 - theta) * np.diff(bounds)
    assert (np.abs(numbers - exact) < 1).all()


@pytest.mark.parametrize(
    "defense",
    [
        RandomK(theta=0.7),
        RandomK(theta=0.7, scope="tensor"),
        RandomK(theta=0.95, scope="tensor"),
        GradientDropout(p=0.7),
    ],
    ids=str,
)
def test_every_entry_is_sent_with_the_same_probability(defense):
    """Even of a tensor with too few entries for a share of them."""
    tensors = layout(body=(3, 50))
    vector, rng, draws = normal(0, tensors.size), rng_of(9), 5000
    number = np.zeros(tensors.size)
    for _ in range(draws):
        number[defense.select(vector, tensors, rng)] += 1
    tail = 1e-5 / tensors.size
    low, high = scipy.stats.binom.interval(1 - tail, draws, defense.sent)
    assert ((number >= low) & (number <= high)).all()


def test_gradient_dropout_draws_for_each_entry_by_itself():
    tensors = layout(body=(20,))
    vector, rng = normal(0, tensors.size), rng_of(4)
    defense = GradientDropout(p=0.5)
    numbers = [len(defense.select(vector, tensors, rng)) for _ in range(5000)]
    expected = tensors.size / 4
    # The variance of a sample variance of normal numbers, 4.5 standard errors.
    assert np.var(numbers) == pytest.approx(expected, rel=4.5 * np.sqrt(2 / 5000))


@pytest.mark.parametrize(
    ("defense", "factor"),
    [
        (RandomK(theta=0.75), 1.0),
        (RandomK(theta=0.75, unbiased=True), 4.0),
        (GradientDropout(p=0.75), 1.0),
        (GradientDropout(p=0.75, rescale=True), 4.0),
        (TopK(theta=0.75), 1.0),
        (DeepGradientCompression(), 1.0),
    ],
    ids=str,
)
def test_only_unbiased_options_multiply_what_is_sent(defense, factor):
    assert defense.factor == factor


@pytest.mark.parametrize(
    "defense",
    [
        RandomK(theta=0.8, unbiased=True),
        RandomK(theta=0.8, unbiased=True, scope="tensor"),
        GradientDropout(p=0.8, rescale=True),
    ],
    ids=str,
)
def test_unbiased_options_are_right_on_average(defense):
    tensors = layout()
    vector = normal(2, tensors.size)[None]
    draws = 4000
    total = sum(sent(defense, vector, tensors, seed) for seed in range(draws))
    # Each entry is v / .2 with the probability .2: a variance of 4 v^2.
    far = scipy.stats.norm.isf(0.5e-5 / tensors.size)
    error = far * 2 * np.abs(vector) / np.sqrt(draws)
    assert (np.abs(total / draws - vector) < error).all()


# The reference's "compression"


def reference(vector, tensors, theta):
    """The reference code, its loop kept: classes are zipped with parameter tensors."""
    gradient = [part.copy() for part in np.split(vector, tensors.offsets[1:-1])]
    rows = vector[tensors.weight].reshape(tensors.classes, -1).astype(np.float64).sum(axis=1)
    magnitudes = [abs(row) for row in rows]
    number = int(len(magnitudes) * theta)
    threshold = sorted(magnitudes)[number - 1]
    for magnitude, tensor in zip(magnitudes, gradient, strict=False):
        if magnitude <= threshold:
            tensor[:] = 0
    return np.concatenate(gradient)


@given(SEEDS, layouts(), st.floats(0, 1, exclude_max=True))
def test_reference_compression_drops_whole_tensors_as_the_reference_does(seed, tensors, theta):
    vector = normal(seed, tensors.size)
    defense = ReferenceCompression(theta=theta)
    found = sent(defense, vector[None], tensors)[0]
    if int(tensors.classes * theta):
        np.testing.assert_array_equal(found, reference(vector, tensors, theta))
    else:  # where the reference drops everything
        np.testing.assert_array_equal(found, vector)


def test_reference_compression_keeps_all_of_the_last_layer_or_none_of_it():
    """Eight tensors and ten classes as in the paper: class 6 decides on the weight."""
    tensors = layout(body=(5,) * 6, classes=10, features=4)
    update = normal(0, tensors.size)
    for largest in (6, 2):
        weight = np.full((10, 4), 0.1, np.float32)
        weight[[largest, 7]] = 5
        update[tensors.weight] = weight.reshape(-1)
        found = sent(ReferenceCompression(theta=0.8), update[None], tensors)[0]
        kept = found[tensors.weight] != 0
        assert kept.all() if largest == 6 else not kept.any()
        assert found[tensors.bias].all()


def test_reference_compression_keeps_tensors_beyond_the_classes():
    tensors = layout(body=(5,) * 6, classes=2, features=4)
    chosen = ReferenceCompression(theta=0.5).select(normal(3, tensors.size), tensors, rng_of(0))
    assert set(range(10, tensors.size)) <= set(chosen.tolist())
    assert len(chosen) == tensors.size - 5


def test_a_missing_weight_gradient_is_replaced_by_the_bias_gradient():
    tensors = layout()
    plain = updates(0, tensors, rng_of(0).integers(4, size=(2, 8)))
    plain[0, tensors.weight] = 0
    seen = observe(plain, tensors)
    undone = ReferenceCompression(theta=0.5).undo(seen, known(tensors))
    np.testing.assert_allclose(undone.row_sums[0], seen.bias_gradient[0], rtol=1e-6)
    np.testing.assert_array_equal(undone.row_sums[1], seen.row_sums[1])
    np.testing.assert_array_equal(undone.bias_gradient, seen.bias_gradient)
    agree(undone, tensors)


@given(SEEDS, st.integers(1, 3))
def test_a_missing_bias_gradient_is_restored_from_row_sums_where_a_class_is_absent(seed, steps):
    """With the same features for all samples, row sums are the bias gradient times a number."""
    tensors = layout(classes=5, features=1)
    rng = rng_of(seed)
    posterior = posteriors(rng, 1, 5)[0]
    plain = updates(seed, tensors, rng.integers(1, 5, size=(2, 8)), posterior, steps)
    bias = plain[:, tensors.bias].copy()
    plain[:, tensors.weight] = bias * np.float32(17)
    plain[0, tensors.bias] = 0
    seen = observe(plain, tensors, steps)
    undone = ReferenceCompression(theta=0.5).undo(seen, known(tensors, posterior))
    np.testing.assert_allclose(undone.bias_gradient, bias, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(undone.row_sums, seen.row_sums)
    agree(undone, tensors)


# What is undone


@given(SEEDS, st.floats(0.05, 0.95), st.booleans())
def test_what_the_bias_gradient_lacks_is_read_from_the_row_sums(seed, theta, scaled_up):
    """Exactly, where all samples have the same features and one entry at least is there."""
    tensors = layout(body=(4,))
    plain = alike(seed, tensors)
    for defense in (
        RandomK(theta=theta, unbiased=scaled_up),
        GradientDropout(p=theta, rescale=scaled_up),
        TopK(theta=theta),
    ):
        seen = plain * np.float32(defense.factor)
        # As many row sums as are sent on average.
        share = getattr(defense, "sent", 1.0)
        seen[:, tensors.weight] *= np.float32(share)
        seen[:, tensors.bias.start + 1 : tensors.bias.stop] = 0
        shown = replace(observe(seen, tensors), weight_gradient=None, update=None)
        undone = defense.undo(shown, known(tensors))
        np.testing.assert_allclose(
            undone.bias_gradient, plain[:, tensors.bias], rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize(
    "defense",
    [
        GradientDropout(p=0.5),
        GradientDropout(p=0.5, rescale=True),
        RandomK(theta=0.5, scope="tensor"),
        RandomK(theta=0.5, unbiased=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 4])
def test_what_is_sent_of_the_bias_stays_and_the_weight_is_divided(defense, steps):
    """Of several local steps too: it is drawn once what is sent of their sum."""
    tensors = layout(features=200)
    plain = updates(3, tensors, rng_of(3).integers(4, size=(5, 8)), steps=steps)
    seen = observe(sent(defense, plain, tensors), tensors, steps)
    undone = defense.undo(seen, known(tensors))
    expected = observe(plain, tensors, steps)
    there = seen.bias_gradient != 0
    np.testing.assert_allclose(
        undone.bias_gradient[there], expected.bias_gradient[there], rtol=1e-6
    )
    there = seen.weight_gradient != 0
    np.testing.assert_allclose(
        undone.weight_gradient[there], 2 * expected.weight_gradient[there], rtol=1e-6
    )
    assert (undone.weight_gradient[~there] == 0).all()
    agree(undone, tensors)


@pytest.mark.parametrize("p", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("rescale", [False, True])
def test_sums_of_several_updates_are_divided_by_the_share(p, rescale):
    tensors = layout(features=200)
    plain = updates(4, tensors, rng_of(4).integers(4, size=(1, 8)))
    defense = GradientDropout(p=p, rescale=rescale)
    total = sum(sent(defense, plain, tensors, seed) for seed in range(30))
    seen = observe(total, tensors, steps=30)
    undone = defense.undo(seen, known(tensors))
    share = 1.0 if rescale else 1 - p
    np.testing.assert_allclose(undone.bias_gradient, seen.bias_gradient / share, rtol=1e-6)
    np.testing.assert_allclose(undone.weight_gradient, seen.weight_gradient / share, rtol=1e-6)
    np.testing.assert_allclose(undone.row_sums, seen.row_sums / share, rtol=1e-5)
    body = slice(0, tensors.weight.start)
    np.testing.assert_allclose(undone.update[:, body], total[:, body] / share, rtol=1e-6)
    agree(undone, tensors)


def test_the_bias_gradient_is_nearer_to_the_truth_when_it_is_filled_in():
    tensors = layout(classes=10, features=400)
    plain = updates(5, tensors, rng_of(5).integers(10, size=(40, 8)))
    bias = plain[:, tensors.bias]
    for defense, most in (
        (RandomK(theta=0.6, scope="tensor"), 0.5),
        (GradientDropout(p=0.6), 0.5),
        (TopK(theta=0.8, scope="tensor"), 0.9),
    ):
        seen = observe(sent(defense, plain, tensors), tensors)
        undone = defense.undo(replace(seen, weight_gradient=None, update=None), known(tensors))
        left = np.linalg.norm(seen.bias_gradient - bias, axis=1).mean()
        assert np.linalg.norm(undone.bias_gradient - bias, axis=1).mean() < most * left


@pytest.mark.parametrize(
    "defense",
    [
        TopK(theta=0.5, error_feedback=True),
        Threshold(threshold=0.1, error_feedback=True),
        RandomK(theta=0.5, error_feedback=True),
        DeepGradientCompression(theta=0.5),
    ],
    ids=str,
)
def test_with_error_feedback_what_is_sent_is_left_alone_and_added_up(defense):
    tensors = layout()
    plain = updates(0, tensors, rng_of(0).integers(4, size=(2, 8)))
    seen = observe(sent(defense, plain, tensors), tensors)
    assert defense.undo(seen, known(tensors)) is seen
    assert defense.accumulates


def test_what_is_small_never_comes_without_error_feedback():
    tensors = layout()
    seen = observe(updates(0, tensors, rng_of(0).integers(4, size=(2, 8))), tensors)
    undone = TopK(theta=0.5).undo(seen, known(tensors))
    np.testing.assert_array_equal(undone.weight_gradient, seen.weight_gradient)
    assert not TopK(theta=0.5).accumulates
    assert not Threshold(threshold=0.5).accumulates
    assert not ReferenceCompression(theta=0.5).accumulates
    assert RandomK(theta=0.5).accumulates
    assert GradientDropout(p=0.5).accumulates


ALL = [
    TopK(theta=0.6),
    Threshold(threshold=0.02),
    DeepGradientCompression(theta=0.6),
    RandomK(theta=0.6),
    GradientDropout(p=0.6, rescale=True),
    ReferenceCompression(theta=0.6),
]


@pytest.mark.parametrize("defense", ALL, ids=str)
@pytest.mark.parametrize(
    "hidden",
    [
        ("update",),
        ("update", "norm", "weight_gradient"),
        ("update", "norm", "bias_gradient"),
        ("update", "norm", "weight_gradient", "bias_gradient"),
    ],
    ids=len,
)
def test_parts_that_are_not_observed_stay_none(defense, hidden):
    tensors = layout()
    plain = updates(1, tensors, rng_of(1).integers(4, size=(3, 8)))
    seen = replace(observe(sent(defense, plain, tensors), tensors), **dict.fromkeys(hidden))
    undone = defense.undo(seen, known(tensors))
    assert all(getattr(undone, name) is None for name in hidden)
    assert np.isfinite(undone.row_sums).all()


@pytest.mark.parametrize("defense", ALL, ids=str)
def test_updates_are_undone_one_by_one(defense):
    tensors = layout()
    plain = updates(2, tensors, rng_of(2).integers(4, size=(4, 8)))
    plain[1] = np.nan
    plain[2, tensors.bias] = 0
    plain[3, tensors.weight] = 0
    seen = observe(plain, tensors)
    together = defense.undo(seen, known(tensors))
    for row in range(4):
        one = defense.undo(seen.rows(slice(row, row + 1)), known(tensors))
        np.testing.assert_array_equal(one.update[0], together.update[row])
        np.testing.assert_array_equal(one.row_sums[0], together.row_sums[row])


@pytest.mark.parametrize("defense", ALL[:-1], ids=str)
def test_simulated_updates_lose_what_real_ones_of_a_last_layer_lose(defense):
    tensors = layout(body=())
    plain = updates(5, tensors, rng_of(5).integers(4, size=(1, 8)))
    before = replace(observe(plain, tensors), update=None, norm=None)
    after = defense.imitate(before, rng_of(7))
    expected = observe(sent(defense, plain, tensors, 7), tensors)
    np.testing.assert_array_equal(after.weight_gradient, expected.weight_gradient)
    np.testing.assert_array_equal(after.bias_gradient, expected.bias_gradient)
    np.testing.assert_allclose(after.row_sums, expected.row_sums, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(after.norm, expected.norm, rtol=1e-6)
