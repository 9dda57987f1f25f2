"""DP-SGD as the rest of the testbed sees it: bounds, noise, and what an attacker undoes.

Statistical checks have fixed seeds; each would fail by chance once in 100 000 seeds or less often.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from testbed.attacks.base import Observations
from testbed.data import load
from testbed.defenses import Known, Tensors, make_defense
from testbed.defenses.samples import DPSGD
from testbed.defenses.scale import centred, scale_estimate, scaled
from testbed.errors import UserError
from testbed.models.build import build
from testbed.models.flat import FlatModel
from testbed.models.last_layer import find_last_layer
from testbed.per_sample import PerSampleGradients
from testbed.samples import Samples

CLASSES, FEATURES, BELOW, BUFFERS = 4, 6, 7, 3
# Standard deviations beyond which a normal variable is with a probability of 7e-6.
FAR = 4.5

TENSORS = Tensors(
    names=("body.weight", "head.weight", "head.bias"),
    offsets=np.cumsum([0, BELOW, CLASSES * FEATURES, CLASSES]),
    weight=slice(BELOW, BELOW + CLASSES * FEATURES),
    bias=slice(BELOW + CLASSES * FEATURES, BELOW + CLASSES * (FEATURES + 1)),
    classes=CLASSES,
)


def rng_of(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def known(posterior: NDArray[np.float64]) -> Known:
    return Known(posterior=posterior, batch_size=8, tensors=TENSORS)


def observe(
    weight: NDArray[np.floating],
    bias: NDArray[np.floating],
    *,
    labels: int = 8,
    steps: int = 1,
    seed: int = 0,
) -> Observations:
    """Return observations with all parts, the rest of the update at random."""
    rows = len(bias)
    body = rng_of(seed).standard_normal((rows, BELOW))
    rest = rng_of(seed + 1).standard_normal((rows, BUFFERS))
    gradient = np.concatenate([body, weight.reshape(rows, -1), bias], axis=1)
    return Observations(
        row_sums=weight.sum(axis=2),
        bias_gradient=bias,
        weight_gradient=weight,
        labels=np.full(rows, labels),
        keys=np.arange(rows),
        local_steps=steps,
        update=np.concatenate([gradient, rest], axis=1).astype(np.float32),
        norm=np.linalg.norm(gradient, axis=1),
    )


def exact(counts: NDArray[np.int64], posterior: NDArray[np.float64], steps: int = 1) -> Any:
    """Return the sum of steps' gradients of batches, every sample with the mean posterior."""
    totals = counts.sum(axis=1, keepdims=True)
    bias = steps * (posterior - counts / totals)
    features = rng_of(2).random((len(counts), 1, FEATURES))
    return observe(bias[:, :, None] * features, bias, labels=int(totals[0, 0]) * steps, steps=steps)


def test_the_whole_gradient_is_bounded_whatever_the_scope() -> None:
    whole = DPSGD(bound=3.0, noise_multiplier=0.5)
    places, bound = whole.bounds(TENSORS)
    np.testing.assert_array_equal(places, [0, TENSORS.size])
    assert bound == 3.0
    places, bound = DPSGD(bound=3.0, noise_multiplier=0.5, scope="tensor").bounds(TENSORS)
    np.testing.assert_array_equal(places, TENSORS.offsets)
    assert np.sqrt(3 * bound**2) == pytest.approx(3.0)


def test_noise_on_the_mean_is_that_of_the_sum_over_the_batch() -> None:
    defense = DPSGD(bound=2.0, noise_multiplier=1.5)
    assert defense.noise_std(1) == 3.0
    assert defense.noise_std(12) == 0.25
    mean = np.full(200_000, 5.0, np.float32)
    defense.disturb(mean, 12, rng_of(0))
    noise = mean - 5.0
    assert abs(noise.mean()) < FAR * 0.25 / np.sqrt(noise.size)
    assert abs(noise.std() - 0.25) < FAR * 0.25 / np.sqrt(2 * noise.size)


def test_noise_is_its_streams_and_none_is_none() -> None:
    one, same, other = (np.zeros(50, np.float32) for _ in range(3))
    defense = DPSGD(bound=2.0, noise_multiplier=1.5)
    for mean, seed in ((one, 1), (same, 1), (other, 2)):
        defense.disturb(mean, 4, rng_of(seed))
    np.testing.assert_array_equal(one, same)
    assert (one != other).all()
    silent = np.arange(50, dtype=np.float32)
    DPSGD(bound=2.0, noise_multiplier=0.0).disturb(silent, 4, rng_of(1))
    np.testing.assert_array_equal(silent, np.arange(50))


@given(
    arrays(np.int64, (3, CLASSES - 1), elements=st.integers(0, 6)),
    arrays(np.float64, 3, elements=st.floats(0.01, 1)),
    st.integers(1, 3),
)
def test_a_shrunk_gradient_with_an_absent_class_is_restored(others, shrunk, steps):
    counts = np.zeros((3, CLASSES), np.int64)
    counts[:, 1:] = others
    counts[:, 2] += 19 - others.sum(axis=1)  # class 0 is absent, and all batches are of 19
    posterior = np.array([0.4, 0.3, 0.2, 0.1])
    plain = exact(counts, posterior, steps)
    seen = scaled(plain, shrunk, TENSORS)
    np.testing.assert_allclose(scale_estimate(seen, posterior), 1 / shrunk, rtol=1e-9)
    restored = DPSGD(bound=1.0, noise_multiplier=0.0).undo(seen, known(posterior))
    for name in ("row_sums", "bias_gradient", "weight_gradient", "norm"):
        np.testing.assert_allclose(
            getattr(restored, name), getattr(plain, name), rtol=1e-9, atol=1e-12
        )
    np.testing.assert_allclose(restored.update, plain.update, rtol=1e-5, atol=1e-6)


def test_the_estimated_scale_is_as_large_as_leaves_no_class_a_negative_count() -> None:
    posterior = np.array([0.4, 0.3, 0.2, 0.1])
    seen = scaled(exact(np.array([[2, 3, 4, 10]]), posterior), np.array([0.25]), TENSORS)
    factor = scale_estimate(seen, posterior)[0]
    shares = posterior - factor * seen.bias_gradient[0]
    assert factor > 4  # no class is absent
    assert shares.min() == pytest.approx(0, abs=1e-12)


def test_gradients_that_tell_no_scale_are_left_alone() -> None:
    posterior = np.full(CLASSES, 0.25)
    bias = np.zeros((4, CLASSES))
    bias[1] = [np.nan, 0.1, -0.1, 0]
    bias[2] = [np.inf, 0.1, -0.1, 0]
    bias[3] = [0.5, -0.5, 0, 0]  # larger than any gradient of this posterior
    seen = observe(bias[:, :, None] * np.ones(FEATURES), bias)
    np.testing.assert_array_equal(scale_estimate(seen, posterior), np.ones(4))
    unbiased = Observations(seen.row_sums, None, None, seen.labels, seen.keys)
    np.testing.assert_array_equal(scale_estimate(unbiased, posterior), np.ones(4))
    undone = DPSGD(bound=1.0, noise_multiplier=0.0).undo(unbiased, known(posterior))
    np.testing.assert_array_equal(undone.row_sums, unbiased.row_sums)
    assert undone.bias_gradient is None
    assert undone.update is None


def test_scaling_leaves_buffers_and_what_it_is_given_as_they_are() -> None:
    seen = exact(np.array([[0, 3, 4, 1]]), np.array([0.4, 0.3, 0.2, 0.1]))
    before = {name: np.array(value) for name, value in vars(seen).items() if value is not None}
    larger = scaled(seen, np.array([2.0]), TENSORS)
    np.testing.assert_array_equal(larger.update[:, TENSORS.size :], seen.update[:, TENSORS.size :])
    np.testing.assert_allclose(
        larger.update[:, : TENSORS.size], 2 * seen.update[:, : TENSORS.size], rtol=1e-6
    )
    centred(seen, TENSORS)
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(seen, name), value)


def test_centring_removes_what_noise_adds_to_sums_over_classes() -> None:
    rng = rng_of(4)
    rows = 20_000
    noise = rng.standard_normal((rows, CLASSES, FEATURES)), rng.standard_normal((rows, CLASSES))
    left = centred(observe(*noise), TENSORS)
    weight = left.update[:, TENSORS.weight].reshape(rows, CLASSES, FEATURES)
    for part, alike in ((left.weight_gradient, weight), (left.bias_gradient, None)):
        np.testing.assert_allclose(part.sum(axis=1), 0, atol=1e-12)
        wanted = (CLASSES - 1) / CLASSES
        # Of every entry's variance; entries of a column depend on each other.
        spread = wanted * np.sqrt(2 / rows)
        assert np.abs(part.var(axis=0) - wanted).max() < FAR * spread
        if alike is not None:
            np.testing.assert_allclose(alike, part, atol=1e-5)
    np.testing.assert_allclose(left.row_sums, left.weight_gradient.sum(axis=2), atol=1e-12)
    np.testing.assert_allclose(left.update[:, TENSORS.bias], left.bias_gradient, atol=1e-5)


@given(arrays(np.int64, (2, CLASSES), elements=st.integers(1, 9)))
def test_centring_leaves_a_gradient_of_a_cross_entropy_as_it_is(counts):
    counts[1, 0] += counts[0].sum() - counts[1].sum()
    plain = exact(np.abs(counts), np.array([0.4, 0.3, 0.2, 0.1]))
    left = centred(plain, TENSORS)
    for name in ("row_sums", "bias_gradient", "weight_gradient", "update"):
        np.testing.assert_allclose(getattr(left, name), getattr(plain, name), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
def test_simulated_updates_get_the_noise_of_their_batches_and_steps(steps: int) -> None:
    rows, size = 4000, 16
    defense = DPSGD(bound=2.0, noise_multiplier=1.5)
    zeros = np.zeros((rows, CLASSES, FEATURES)), np.zeros((rows, CLASSES))
    simulated = observe(*zeros, labels=size * steps, steps=steps)
    noisy = defense.imitate(simulated, rng_of(6))
    std = defense.noise_std(size) * np.sqrt(steps)
    for part in (noisy.weight_gradient, noisy.bias_gradient):
        assert abs(part.std() / std - 1) < FAR / np.sqrt(2 * part.size)
        assert abs(part.mean()) < FAR * std / np.sqrt(part.size)
    np.testing.assert_allclose(noisy.row_sums, noisy.weight_gradient.sum(axis=2), atol=1e-5)
    assert not simulated.weight_gradient.any()
    assert not simulated.bias_gradient.any()


def test_an_attacker_who_rescales_what_dp_sgd_clipped_counts_better(data_root: Path) -> None:
    dataset = load("mnist", data_root / "mnist")
    samples = Samples(dataset, torch.device("cpu"))
    shape = dataset.shape
    module = build(
        "cnn", shape=shape, classes=10, activation=None, arguments={}, init="uniform", seed=1
    )
    model = FlatModel(module, find_last_layer(module, shape, 10), torch.device("cpu"))
    layout = model.layout
    assert layout.bias is not None
    tensors = Tensors(
        names=("all",),
        offsets=np.array([0, layout.parameters]),
        weight=slice(layout.weight, layout.weight + 10 * layout.features),
        bias=slice(layout.bias, layout.bias + 10),
        classes=10,
    )
    # Three classes of ten, so that some are absent.
    chosen = np.concatenate(
        [np.flatnonzero(dataset.labels == c)[:n] for c, n in ((1, 8), (4, 20), (7, 4))]
    )
    counts = np.bincount(dataset.labels[chosen], minlength=10)
    defense = DPSGD(bound=1.0, noise_multiplier=0.0)
    out = torch.empty(layout.parameters)
    targets = torch.eye(10)[torch.from_numpy(dataset.labels[chosen])]
    _, logits = PerSampleGradients(model).mean_clipped(
        samples.inputs(chosen), targets, *defense.bounds(tensors), out
    )
    bias = out.numpy()[None, tensors.bias]
    weight = layout.weight_gradient(out.numpy())[None]
    seen = Observations(weight.sum(axis=2), bias, weight, np.array([32]), np.array([0]))
    posterior = torch.softmax(logits.double(), dim=1).mean(dim=0).numpy()
    undone = defense.undo(seen, Known(posterior, 32, tensors))
    plain, adapted = (
        np.abs(32 * (posterior - found.bias_gradient[0]) - counts).sum() for found in (seen, undone)
    )
    assert plain > 32
    assert adapted < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound": 0.0, "noise_multiplier": 1.0}, "option 'bound': found 0.0"),
        ({"bound": 1.0, "noise_multiplier": -1.0}, "option 'noise_multiplier': found -1.0"),
        ({"bound": 1.0}, "option 'noise_multiplier' is missing"),
        ({"bound": 1.0, "noise_multiplier": 1.0, "delta": 0.0}, "option 'delta': found 0.0"),
        ({"bound": 1.0, "noise_multiplier": 1.0, "delta": 1.0}, "option 'delta': found 1.0"),
        ({"bound": 1.0, "noise_multiplier": 1.0, "accountant": "gdp"}, "'rdp' or 'prv'"),
        ({"bound": 1.0, "noise_multiplier": 1.0, "at": "update"}, "option 'at': found 'update'"),
        ({"bound": 1.0, "noise_multiplier": 1.0, "scope": "layer"}, "option 'scope'"),
    ],
)
def test_knobs_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_defense("dp_sgd", options)
