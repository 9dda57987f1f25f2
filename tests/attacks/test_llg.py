"""LLG, LLG* and LLG+ against the paper's properties and the published implementation's answers."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from closed_form import server
from definition import decode_by_loop, decode_released_by_loop, has_near_tie
from hypothesis import assume, given
from hypothesis import strategies as st

from testbed.attacks import Knowledge, Observations, Outputs, attacks, make_attack
from testbed.attacks.decoding import decode
from testbed.attacks.metrics import asr
from testbed.errors import UserError

ORACLE = Path(__file__).parent / "oracle"


def observe(row_sums, labels, local_steps=1, bias=None):
    row_sums = np.atleast_2d(row_sums)
    labels = np.broadcast_to(np.asarray(labels, np.int64), len(row_sums))
    return Observations(row_sums, bias, None, labels, np.arange(len(row_sums)), local_steps)


def last_layer_gradient(posterior, features, labels):
    """Return the closed form: mean over samples of (p - onehot(y)) h^T, and of p - onehot(y)."""
    error = posterior - np.eye(posterior.shape[1])[labels]
    return error.T @ features / len(labels), error.mean(axis=0)


SIZES = st.integers(1, 40)


@st.composite
def batches(draw, features_min=0.0, size=SIZES):
    """Draw a batch with any posteriors and features: what a last layer can meet."""
    classes, width, samples = draw(st.integers(2, 10)), draw(st.integers(1, 6)), draw(size)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(size=(samples, classes)) * draw(st.sampled_from([0.1, 1.0, 5.0]))
    posterior = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    features = rng.uniform(features_min, 1.0, size=(samples, width))
    labels = rng.integers(classes, size=samples)
    return posterior, features, labels


# Identities (A) and the two properties


@given(batches(features_min=-1.0))
def test_identities_of_the_last_layer_gradient(batch):
    posterior, _, labels = batch
    weight, bias = last_layer_gradient(*batch)
    counts = np.bincount(labels, minlength=posterior.shape[1])
    assert weight.sum() == pytest.approx(0, abs=1e-9)
    assert bias.sum() == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(len(labels) * (posterior.mean(axis=0) - bias), counts, atol=1e-9)


@given(batches())
def test_property_1_a_negative_row_sum_is_a_class_in_the_batch(batch):
    weight, _ = last_layer_gradient(*batch)
    negative = weight.sum(axis=1) < -1e-12
    present = np.bincount(batch[2], minlength=len(negative)) > 0
    assert (present | ~negative).all()


def test_property_1_fails_for_features_of_either_sign():
    # tanh and SELU: the single sample of class 0 has a positive row sum.
    weight, _ = last_layer_gradient(np.array([[0.5, 0.5]]), np.array([[-1.0]]), np.array([0]))
    assert weight.sum(axis=1).tolist() == [0.5, -0.5]
    assert make_attack("llg", {}).infer(observe(weight.sum(axis=1), 1), {}).counts[0, 0] == 0


@given(batches(size=st.just(1)))
def test_llg_is_exact_for_a_single_sample(batch):
    posterior, features, labels = batch
    assume(posterior[0].max() < 1 - 1e-9)
    assume(features.sum() > 1e-6)
    weight, _ = last_layer_gradient(*batch)
    counts = make_attack("llg", {}).infer(observe(weight.sum(axis=1), 1), {}).counts
    assert counts[0].tolist() == np.eye(posterior.shape[1], dtype=int)[labels[0]].tolist()


@given(st.integers(2, 10), st.integers(1, 64), st.integers(0, 2**32 - 1))
def test_llg_plus_is_exact_where_property_2_is(classes, samples, seed):
    """All samples with the same features and posterior, as nearly in an untrained model.

    The paper's factor 1 + 1/C is (1 - 1/C^2) of the exact one, so that counts up to about C^2 / 2
    survive the rounding.
    """
    rng = np.random.default_rng(seed)
    q = rng.dirichlet(np.ones(classes))
    h = rng.uniform(0.1, 1.0, size=4)
    labels = rng.integers(classes, size=samples)
    counts = np.bincount(labels, minlength=classes)
    weight, _ = last_layer_gradient(np.tile(q, (samples, 1)), np.tile(h, (samples, 1)), labels)
    adversary = FixedAdversary(classes, samples, q, h)
    attack = make_attack("llg_plus", {})
    calibration = attack.calibrate(adversary)
    expected_impact = -h.sum() * (classes - 1) / (classes * samples) * (1 + 1 / classes)
    np.testing.assert_allclose(calibration["impact"], [expected_impact])
    np.testing.assert_allclose(calibration["offset"], [h.sum() * q])
    if counts.max() < classes**2 / 2:
        inferred = attack.infer(observe(weight.sum(axis=1), samples), calibration).counts[0]
        assert inferred.tolist() == counts.tolist()


class FixedAdversary:
    """A model with one posterior and one feature vector for every input."""

    def __init__(self, classes, batch_size, q, h):
        self.classes, self.batch_size, self.seed = classes, batch_size, 7
        self._q, self._h = q, h

    def on_dummy(self, _kind, samples):
        return Outputs(np.tile(self._q, (samples, 1)), np.tile(self._h, (samples, 1)), None)

    def on_auxiliary(self, **_):
        labels = np.repeat(np.arange(self.classes), 3)
        outputs = self.on_dummy("", len(labels))
        return Outputs(outputs.posterior, outputs.features, labels)


@pytest.mark.parametrize("name", ["llg_star", "llg_plus"])
def test_features_of_either_sign_break_what_is_exact_without_signs(name):
    """Samples with one posterior, and tanh features that differ in their sign alone."""
    rng = np.random.default_rng(0)
    posterior, features = rng.dirichlet(np.full(6, 3.0)), np.abs(np.tanh(rng.normal(size=5)))
    success = {}
    for case, signs in {"non-negative": np.ones(3), "either": np.array([1, 1, -1])}.items():
        own = np.tile(signs, 6)[:, None] * features
        adversary = server(
            Outputs(np.tile(posterior, (18, 1)), own, np.repeat(np.arange(6), 3)), 12
        )
        attack, found = make_attack(name, {}), []
        for _ in range(40):
            labels = rng.integers(6, size=12)
            batch = rng.choice(signs, size=(12, 1)) * features
            weight, _ = last_layer_gradient(np.tile(posterior, (12, 1)), batch, labels)
            inferred = attack.infer(observe(weight.sum(axis=1), 12), attack.calibrate(adversary))
            found.append(asr(np.bincount(labels, minlength=6), inferred.counts[0]))
        success[case] = np.mean(found)
    assert success["non-negative"] == 1
    assert success["either"] < 0.75


# Calibration


def random_outputs(seed, classes=4, per_class=5, width=3):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    posterior = rng.dirichlet(np.ones(classes), size=len(labels))
    return Outputs(posterior, rng.uniform(0, 1, (len(labels), width)), labels)


def test_calibration_is_the_paper_s_average_over_class_pure_batches():
    outputs, batch_size = random_outputs(3), 8
    classes = 4
    rng = np.random.default_rng(0)
    # The definition: R repetitions of a batch of B samples of one class, for each class.
    m, s, repetitions = 0.0, np.zeros(classes), 4000
    for _ in range(repetitions):
        for c in range(classes):
            chosen = rng.choice(np.flatnonzero(outputs.labels == c), size=batch_size)
            weight, _ = last_layer_gradient(
                outputs.posterior[chosen], outputs.features[chosen], outputs.labels[chosen]
            )
            g = weight.sum(axis=1)
            m += g[c] / (classes * batch_size * repetitions)
            s += np.where(np.arange(classes) == c, 0, g) / (repetitions * (classes - 1))
    m *= 1 + 1 / classes
    adversary = SimpleNamespace(
        classes=classes, batch_size=batch_size, on_auxiliary=lambda **_: outputs
    )
    calibration = make_attack("llg_plus", {}).calibrate(adversary)
    assert calibration["impact"][0] == pytest.approx(m, rel=0.01)
    np.testing.assert_allclose(calibration["offset"][0], s, rtol=0.02)


@given(st.integers(0, 1000), st.integers(1, 512))
def test_the_batch_size_enters_the_calibration_as_one_over_b(seed, batch_size):
    outputs = random_outputs(seed)
    attack = make_attack("llg_plus", {})

    def calibrate(size):
        return attack.calibrate(
            SimpleNamespace(classes=4, batch_size=size, on_auxiliary=lambda **_: outputs)
        )

    one, many = calibrate(1), calibrate(batch_size)
    np.testing.assert_allclose(many["impact"] * batch_size, one["impact"])
    np.testing.assert_array_equal(many["offset"], one["offset"])


def test_a_class_without_auxiliary_samples_is_taken_for_the_mean_of_the_others():
    outputs = random_outputs(6)
    kept = outputs.labels != 2
    adversary = SimpleNamespace(
        classes=4,
        batch_size=8,
        on_auxiliary=lambda **_: Outputs(
            outputs.posterior[kept], outputs.features[kept], outputs.labels[kept]
        ),
    )
    weighted, mass = np.empty((4, 4)), np.empty(4)
    for c in (0, 1, 3):
        own = outputs.labels == c
        h = outputs.features[own].sum(axis=1)
        weighted[c], mass[c] = (outputs.posterior[own] * h[:, None]).mean(axis=0), h.mean()
    weighted[2], mass[2] = weighted[[0, 1, 3]].mean(axis=0), mass[[0, 1, 3]].mean()
    pure = weighted - np.diag(mass)
    calibration = make_attack("llg_plus", {}).calibrate(adversary)
    np.testing.assert_allclose(calibration["impact"], np.trace(pure) / 32 * 1.25)
    offset = (pure.sum(axis=0) - np.diagonal(pure)) / 3
    np.testing.assert_allclose(calibration["offset"], [offset])


# Breaching's decoding


def test_the_released_variant_repeats_one_class():
    data, row_sums, labels = oracle_cases("llg_mnist.npz")
    released = make_attack("llg", {"variant": "released"})
    found = released.infer(observe(row_sums, labels), {}).counts
    classes = row_sums.shape[1]
    impact = np.clip(row_sums.astype(float), None, 0).sum(axis=1) * (1 + 1 / classes) / labels
    for row in range(len(labels)):
        expected = decode_released_by_loop(row_sums[row], impact[row], labels[row])
        assert found[row].tolist() == expected.tolist()
    large = labels >= 8
    success = asr(data["true"], found)[large].mean()
    assert success < asr(data["true"], data["llg"])[large].mean() - 0.1


# Updates of several local steps


def summed_update(steps, classes=5, batch_size=8, seed=0):
    """Make an update of model (A): the same features and posterior in every step, labels differ."""
    rng = np.random.default_rng(seed)
    q, h = rng.dirichlet(np.ones(classes)), rng.uniform(0.2, 1, size=3)
    labels = rng.integers(classes, size=(steps, batch_size))
    total = sum(
        last_layer_gradient(np.tile(q, (batch_size, 1)), np.tile(h, (batch_size, 1)), step)[0]
        for step in labels
    )
    return total.sum(axis=1), np.bincount(labels.ravel(), minlength=classes), q, h


@pytest.mark.parametrize("name", ["llg_star", "llg_plus"])
def test_consistent_scaling_is_exact_for_a_sum_of_steps_and_the_reference_s_is_not(name):
    row_sums, counts, q, h = summed_update(steps=5)
    adversary = FixedAdversary(5, 8, q, h)
    found = {}
    for scaling in ("consistent", "reference"):
        attack = make_attack(name, {"scaling": scaling})
        observed = observe(row_sums, 40, local_steps=5)
        found[scaling] = attack.infer(observed, attack.calibrate(adversary)).counts[0]
    assert found["consistent"].tolist() == counts.tolist()
    assert found["reference"].tolist() != counts.tolist()
    assert found["reference"].sum() == 40


def test_reference_scaling_divides_the_impact_and_leaves_the_offset():
    row_sums = np.array([0.3, -1.0, 0.7])
    calibration = {"impact": np.array([-0.5]), "offset": np.array([[0.1, 0.2, 0.05]])}
    attack = make_attack("llg_plus", {"scaling": "reference"})
    counts = attack.infer(observe(row_sums, 12, local_steps=4), calibration).counts[0]
    expected = decode_by_loop(row_sums, -0.125, calibration["offset"][0], 12)
    assert counts.tolist() == expected.tolist()


# Invariances


@given(batches(size=st.integers(2, 40)), st.integers(-8, 8))
def test_scaling_the_gradient_leaves_llg_unchanged(batch, exponent):
    g = last_layer_gradient(*batch)[0].sum(axis=1)
    attack, labels = make_attack("llg", {}), len(batch[2])
    plain = attack.infer(observe(g, labels), {}).counts
    scaled = attack.infer(observe(g * 2.0**exponent, labels), {}).counts
    assert plain.tolist() == scaled.tolist()


@given(batches(size=st.integers(2, 40)), st.randoms(use_true_random=False))
def test_permuting_the_classes_permutes_the_counts(batch, random):
    g = last_layer_gradient(*batch)[0].sum(axis=1)
    labels = len(batch[2])
    impact = np.clip(g, None, 0).sum() * (1 + 1 / len(g)) / labels
    assume(impact < 0)
    value = g - impact * (g < 0)
    assume(not has_near_tie(value, impact, np.zeros_like(g), labels))
    assume((np.diff(np.sort(g)) > 1e-12).all())
    order = list(range(len(g)))
    random.shuffle(order)
    attack = make_attack("llg", {})
    plain = attack.infer(observe(g, labels), {}).counts[0]
    permuted = attack.infer(observe(g[order], labels), {}).counts[0]
    assert plain[order].tolist() == permuted.tolist()


# The published implementation's answers on real updates


def oracle_cases(file):
    data = np.load(ORACLE / file)
    weight = data["weight"]
    row_sums = weight.sum(axis=2) if weight.ndim == 3 else weight
    return data, row_sums, data["batch_size"].astype(np.int64)


@pytest.mark.parametrize(
    ("file", "cases"), [("llg_mnist.npz", 20), ("llg_cifar100_rowsums.npz", 4)]
)
def test_llg_equals_the_reference_on_every_real_update(file, cases):
    data, row_sums, labels = oracle_cases(file)
    # Where the reference's answer is longer than the batch, it lacks the cap that ours has; where
    # no row sum is negative, its loop repeats one class. Neither occurs in these updates.
    assert data["llg"].sum(axis=1).tolist() == labels.tolist()
    assert (row_sums < 0).any(axis=1).all()
    assert len(row_sums) == cases
    counts = make_attack("llg", {}).infer(observe(row_sums, labels), {}).counts
    np.testing.assert_array_equal(counts, data["llg"])


def test_llg_plus_equals_the_reference_given_its_impact_and_offset():
    data, row_sums, labels = oracle_cases("llg_mnist.npz")
    run = (data["llg_plus"] >= 0).all(axis=1)
    assert run.sum() == 5
    calibration = {"impact": data["impact"][run], "offset": data["offset"][run]}
    found = make_attack("llg_plus", {}).infer(observe(row_sums[run], labels[run]), calibration)
    np.testing.assert_array_equal(found.counts, data["llg_plus"][run])


def test_decoding_the_oracle_equals_the_loop():
    for file in ("llg_mnist.npz", "llg_cifar100_rowsums.npz"):
        _, row_sums, labels = oracle_cases(file)
        row_sums = row_sums.astype(np.float64)
        classes = row_sums.shape[1]
        impact = np.clip(row_sums, None, 0).sum(axis=1) * (1 + 1 / classes) / labels
        counts = decode(row_sums, impact, np.zeros_like(row_sums), labels)
        for row in range(len(labels)):
            expected = decode_by_loop(row_sums[row], impact[row], np.zeros(classes), labels[row])
            assert counts[row].tolist() == expected.tolist()


# Declarations


def test_calibrations_depend_on_the_knobs_of_the_inputs_alone():
    declared = {name: attacks()[name].calibrated_by for name in ("llg", "llg_star", "llg_plus")}
    assert declared == {"llg": (), "llg_star": ("dummy", "samples"), "llg_plus": ()}


def test_knowledge_is_declared():
    known = {name: attack.knowledge for name, attack in attacks().items()}
    assert known["random"] is known["llg"] is Knowledge.GRADIENTS
    assert known["llg_star"] is Knowledge.MODEL
    assert known["llg_plus"] is Knowledge.AUXILIARY
    assert Knowledge.AUXILIARY.includes(Knowledge.MODEL)
    assert not Knowledge.GRADIENTS.includes(Knowledge.MODEL)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llg_pluss", {}, "unknown attack 'llg_pluss': did you mean 'llg_plus'"),
        ("llg", {"dummy": "zeros"}, "attack 'llg' has no option 'dummy': known: variant"),
        ("llg_plus", {"samples": 3}, "attack 'llg_plus' has no option 'samples': known: scaling"),
        ("random", {"seed": 3}, "attack 'random' has no option 'seed': it has no options"),
        ("llg", {"variant": "fixed"}, "option 'variant': found 'fixed'"),
        ("llg_star", {"dumy": "ones"}, "no option 'dumy': did you mean 'dummy'"),
        ("llg_star", {"dummy": "twos"}, "option 'dummy': found 'twos'"),
        ("llg_star", {"samples": 0}, "option 'samples': found 0"),
        ("nowhere_to_be_found:Attack", {}, "cannot be imported"),
        ("testbed.seeds:Purpose", {}, "no subclass of testbed.attacks.Attack"),
    ],
)
def test_wrong_names_and_options_are_explained(name, options, message):
    with pytest.raises(UserError) as error:
        make_attack(name, options)
    assert message in str(error.value)


def test_an_attack_of_a_user_s_own_is_found_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "own_attack.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from testbed.attacks import Attack, Knowledge, LabelCounts\n"
        "@dataclass(frozen=True)\n"
        "class First(Attack):\n"
        "    shift: int = 0\n"
        "    name: ClassVar = 'first'\n"
        "    title: ClassVar = 'First'\n"
        "    knowledge: ClassVar = Knowledge.GRADIENTS\n"
        "    source: ClassVar = 'this test'\n"
        "    def infer(self, observations, calibration):\n"
        "        counts = observations.labels[:, None] * (observations.row_sums * 0).astype(int)\n"
        "        counts[:, self.shift] = observations.labels\n"
        "        return LabelCounts(counts)\n"
    )
    monkeypatch.chdir(tmp_path)
    attack = make_attack("own_attack:First", {"shift": 2})
    counts = attack.infer(observe(np.zeros((2, 4)), 9), {}).counts
    assert counts.tolist() == [[0, 0, 9, 0]] * 2
    assert attack.options() == {"shift": 2}
