"""iLRG against the published answers, its definition in a loop, and where it is exact."""

from pathlib import Path

import numpy as np
import pytest
import torch
from closed_form import (
    SEEDS,
    Federation,
    attack_once,
    gradient,
    observe,
)
from hypothesis import given
from hypothesis import strategies as st

from testbed.attacks import Head, Knowledge, attacks, make_attack
from testbed.attacks.checks import check_answer, check_calibration, check_declaration
from testbed.attacks.metrics import asr
from testbed.attacks.rounding import largest_remainder
from testbed.attacks.simulation import softmax

ORACLE = Path(__file__).parent / "oracle"
SIZES = (8, 32, 128)
VARIANTS = ("corrected", "released")


class LastLayer:
    """An adversary with no more than a last layer."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias

    def head(self):
        return Head(self.weight, self.bias)


def infer(observed, weight, bias, **options):
    """Return the whole answer, checked."""
    attack = make_attack("ilrg", options)
    calibration = attack.calibrate(LastLayer(weight, bias))
    shown = observed.restricted(attack)
    lengths = {"client": 1, "class": weight.shape[0], "feature": weight.shape[1]}
    check_calibration("ilrg", attack, calibration, lengths)
    answer = attack.infer(shown, calibration)
    check_answer("ilrg", attack, answer, shown)
    return answer


@pytest.fixture(scope="module", params=SIZES)
def oracle(request):
    size = request.param
    with np.load(ORACLE / f"ilrg_rlu_mnist_b{size}.npz") as stored:
        cases = dict(stored)
    observed = observe(cases["grad_w"], cases["grad_b"], size)
    return size, cases, observed


def on_oracle(cases, observed, **options):
    answers = [
        infer(observed.rows(slice(i, i + 1)), cases["W"][i], cases["b"][i], **options)
        for i in range(len(cases["W"]))
    ]
    counts = np.concatenate([answer.counts for answer in answers])
    return counts, np.concatenate([answer.scores for answer in answers])


def test_the_released_variant_answers_as_published(oracle):
    size, cases, observed = oracle
    counts, scores = on_oracle(cases, observed, variant="released")
    np.testing.assert_array_equal(np.round(np.maximum(scores, 0)), cases["ilrg"])
    whole = cases["ilrg"].sum(axis=1) == size
    assert whole.sum() >= len(whole) - 1
    np.testing.assert_array_equal(counts[whole], cases["ilrg"][whole])
    # Not wholly: the published counts fall one label short.
    np.testing.assert_array_less(cases["ilrg"][~whole].sum(axis=1), size)
    assert (counts[~whole] >= cases["ilrg"][~whole]).all()


def test_success_is_that_of_the_published_code(oracle):
    size, cases, observed = oracle
    for variant in VARIANTS:
        counts, _ = on_oracle(cases, observed, variant=variant)
        rates = asr(cases["counts"], counts)
        assert rates.mean() >= {8: 1.0, 32: 1.0, 128: 0.99}[size]


@given(SEEDS, st.integers(1, 40), st.sampled_from([0.1, 3.0]))
def test_exact_where_all_samples_have_the_same_features(seed, samples, sharpness):
    rng = np.random.default_rng(seed)
    classes, width = int(rng.integers(2, 12)), int(rng.integers(1, 9))
    weight, bias = rng.normal(size=(classes, width)) * sharpness, rng.normal(size=classes)
    features = np.tile(rng.normal(size=width), (samples, 1))
    posterior = softmax(features @ weight.T + bias)
    labels = rng.integers(classes, size=samples)
    observed = observe(*gradient(posterior, features, labels), samples)
    truth = np.bincount(labels, minlength=classes)
    if posterior.max() < 0.99:  # else the gradient has nothing but rounding errors
        for variant in VARIANTS:
            counts = infer(observed, weight, bias, variant=variant).counts
            assert asr(truth[None], counts)[0] > 1 - 1e-9


def random_update(rng, classes=7, width=5, samples=30, sharpness=1.0):
    weight = rng.normal(size=(classes, width)) * sharpness
    bias = rng.normal(size=classes) * sharpness
    labels = rng.integers(classes, size=samples)
    features = np.eye(classes, width)[labels] + rng.normal(size=(samples, width)) * 0.2
    posterior = softmax(features @ weight.T + bias)
    return weight, bias, labels, gradient(posterior, features, labels)


def test_confident_models_break_it():
    rng = np.random.default_rng(0)
    means = []
    for sharpness in (0.01, 5.0):
        rates = []
        for _ in range(40):
            weight, bias, labels, update = random_update(rng, sharpness=sharpness)
            counts = infer(observe(*update, 30), weight, bias).counts
            rates.append(asr(np.bincount(labels, minlength=7)[None], counts)[0])
        means.append(np.mean(rates))
    assert means[0] > 0.97
    assert means[1] < 0.8


def solve_by_loop(weight_gradient, bias_gradient, weight, bias, labels):
    """Return the least-squares counts of one update, an equation at a time."""
    classes = len(bias_gradient)
    posterior = []
    for c in range(classes):
        quotient = weight_gradient[c] / bias_gradient[c] if bias_gradient[c] else 0 * weight[0]
        posterior.append(softmax(np.array([row @ quotient for row in weight]) + bias))
    left, right = [[1.0] * classes], [labels]
    for i in range(classes):
        left.append([posterior[c][i] - (c == i) for c in range(classes)])
        right.append(labels * bias_gradient[i])
    return np.linalg.lstsq(np.array(left), np.array(right), rcond=None)[0]


@given(SEEDS, st.integers(1, 4))
def test_scores_are_the_least_squares_solution(seed, steps):
    rng = np.random.default_rng(seed)
    weight, bias, _, update = random_update(rng, sharpness=0.5)
    dead = int(rng.integers(-1, 7))
    for part in update:
        if dead >= 0:
            part[dead] = 0
    # An update of several local steps is a sum.
    observed = observe(*(steps * part for part in update), 30 * steps, steps)
    scores = infer(observed, weight, bias).scores[0]
    exact = (part.astype(np.float32).astype(float) for part in update)
    np.testing.assert_allclose(scores, steps * solve_by_loop(*exact, weight, bias, 30), rtol=1e-4)


def released_quotient(numerator, divisor):
    """Divide as the published code does, by decimal digits."""
    divisor = divisor or 1e-64
    up, down = f"{numerator:.14e}".split("e"), f"{divisor:.14e}".split("e")
    orders = min(max(int(up[1]) - int(down[1]), -10), 10) if numerator else 0
    return float(up[0]) / float(down[0]) * 10.0**orders


def test_the_released_variant_divides_digit_by_digit():
    rng = np.random.default_rng(3)
    weight, bias, _, (weight_gradient, bias_gradient) = random_update(rng, sharpness=1e-10)
    bias_gradient[[0, 2]] = 0
    weight_gradient[2] = 0
    weight_gradient[1] *= 1e-25
    bias_gradient[3] *= 1e-30
    observed = observe(weight_gradient, bias_gradient, 30)
    left, right = observed.weight_gradient[0].astype(float), observed.bias_gradient[0].astype(float)
    features = np.array(
        [[released_quotient(g, b) for g in row] for row, b in zip(left, right, strict=True)]
    )
    assert np.abs(features).max() > 1e9
    posterior = softmax(features @ weight.T + bias)
    system = np.vstack([np.ones(7), posterior.T - np.eye(7)])
    expected = np.linalg.lstsq(system, np.append(1.0, right) * 30, rcond=None)[0]
    answer = infer(observed, weight, bias, variant="released")
    np.testing.assert_allclose(answer.scores[0], expected, rtol=1e-6, atol=1e-9)
    other = infer(observed, weight, bias, variant="corrected").scores[0]
    assert not np.allclose(other, expected)


@pytest.mark.parametrize(
    ("scores", "counts"),
    [
        ([2.4, 1.6, -0.1, 0.1], [2, 2, 0, 0]),
        # More than N counts as nothing; what is left is scaled to N.
        ([4.6, 1.2, 0.9, -2.7], [0, 2, 2, 0]),
        ([1.6, 1.6, 1.6, -0.8], [2, 1, 1, 0]),
        ([1.4, 1.4, 1.4, -0.2], [2, 1, 1, 0]),
        ([-1.0, 4.9, -1.0, 1.1], [0, 0, 0, 4]),
    ],
)
def test_the_released_rounding(scores, counts):
    # With P = 1/C the scores are N (1/C - b).
    bias = 0.25 - np.array(scores) / 4
    observed = observe(np.zeros((4, 2)), bias, 4)
    head = np.zeros((4, 2)), np.zeros(4)
    answer = infer(observed, *head, variant="released", estimate=True)
    np.testing.assert_allclose(answer.scores[0], scores, atol=1e-5)
    assert answer.counts[0].tolist() == counts
    plain = infer(observed, *head, estimate=True)
    expected = largest_remainder(np.array([scores]), np.array([4]))
    np.testing.assert_array_equal(plain.counts, expected)


def test_the_estimate_is_exact_for_a_model_without_an_opinion():
    rng = np.random.default_rng(1)
    labels = rng.integers(6, size=50)
    update = gradient(np.full((50, 6), 1 / 6), rng.normal(size=(50, 3)), labels)
    counts = attack_once(
        "ilrg", LastLayer(np.ones((6, 3)), np.ones(6)), observe(*update, 50), estimate=True
    )
    np.testing.assert_array_equal(counts[0], np.bincount(labels, minlength=6))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("estimate", [False, True])
def test_rows_do_not_depend_on_each_other_nor_on_the_library(variant, estimate):
    rng = np.random.default_rng(5)
    weight, bias, *_ = random_update(rng)
    updates = [random_update(rng)[3] for _ in range(4)]
    observed = observe(*map(np.stack, zip(*updates, strict=True)), [30, 30, 7, 1])
    options = {"variant": variant, "estimate": estimate}
    together = infer(observed, weight, bias, **options)
    for i in range(4):
        alone = infer(observed.rows(slice(i, i + 1)), weight, bias, **options)
        np.testing.assert_array_equal(alone.scores[0], together.scores[i])
    attack = make_attack("ilrg", options)
    names = ("row_sums", "bias_gradient", "weight_gradient", "labels", "keys")
    tensors = {name: torch.from_numpy(np.array(getattr(observed, name))) for name in names}
    found = attack.infer(type(observed)(**tensors), attack.calibrate(LastLayer(weight, bias)))
    np.testing.assert_array_equal(found.counts.numpy(), together.counts)
    np.testing.assert_allclose(found.scores.numpy(), together.scores, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e37, 1e-45])
@pytest.mark.parametrize("where", ["weight", "bias", "both", "head"])
def test_degenerate_input_has_a_valid_answer(variant, value, where):
    weight, bias, _, (weight_gradient, bias_gradient) = random_update(np.random.default_rng(2))
    if where in ("weight", "both"):
        weight_gradient[:] = value
    if where in ("bias", "both"):
        bias_gradient[:] = value
    if where == "head":
        weight[0], bias[:] = value, value
    infer(observe(weight_gradient, bias_gradient, 30), weight, bias, variant=variant)


def test_one_sample_of_a_real_model():
    federation = Federation(seed=4, classes=5)
    observed, counts = federation.round(clients=6, batch_size=1)
    found = attack_once("ilrg", federation.adversary("ilrg", 1), observed)
    np.testing.assert_array_equal(found, counts)


def test_declaration():
    attack = attacks()["ilrg"]
    check_declaration("ilrg", attack.calibration_arrays)
    assert attack.knowledge is Knowledge.MODEL


def test_fresh_models_on_mnist(data_root):
    from testbed.data import load

    dataset = load("mnist", data_root / "mnist")
    images = torch.from_numpy(dataset.images[:4000]).float() * dataset.scale
    targets = torch.from_numpy(dataset.labels[:4000])
    rng = np.random.default_rng(0)
    for size, least in ((8, 1.0), (32, 0.995), (128, 0.96)):
        rates = []
        for seed in range(6):
            torch.manual_seed(seed)
            module = torch.nn.Sequential(
                torch.nn.Conv2d(1, 12, 5, 2, 2),
                torch.nn.ReLU(),
                torch.nn.Conv2d(12, 12, 5, 2, 2),
                torch.nn.ReLU(),
                torch.nn.Flatten(),
                torch.nn.Linear(588, 10),
            )
            batch = torch.from_numpy(rng.integers(4000, size=size))
            loss = torch.nn.functional.cross_entropy(module(images[batch]), targets[batch])
            last = module[-1]
            update = [g.numpy() for g in torch.autograd.grad(loss, [last.weight, last.bias])]
            head = (part.detach().double().numpy() for part in (last.weight, last.bias))
            counts = infer(observe(*update, size), *head).counts
            truth = np.bincount(targets[batch].numpy(), minlength=10)
            rates.append(asr(truth[None], counts)[0])
        assert np.mean(rates) >= least
