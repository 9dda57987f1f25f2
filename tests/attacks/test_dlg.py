"""DLG: recovers the labels of tiny batches, whatever its optimisation runs into."""

import numpy as np
import pytest
import torch
from global_models import CLASSES, Federation, infer, perceptron, success
from torch import nn

from testbed.attacks.base import LabelCounts
from testbed.attacks.dlg import DLG

QUICK = DLG(iterations=2)


@pytest.fixture(scope="module")
def single():
    return Federation(perceptron(), batch_size=1)


def test_labels_of_single_samples(single):
    observations, truth = single.clients(np.arange(CLASSES)[:, None, None])
    inferred = single.run(DLG(iterations=20), observations)
    np.testing.assert_array_equal(inferred.counts, truth)


def test_labels_of_pairs():
    federation = Federation(perceptron(), batch_size=2)
    observations, truth = federation.draw(5)
    inferred = federation.run(DLG(iterations=20), observations)
    assert success(inferred.counts, truth) >= 0.9


@pytest.mark.parametrize("frozen", ["1.weight", "1.bias"])
def test_labels_where_a_parameter_is_frozen(frozen):
    module = perceptron()
    module.get_parameter(frozen).requires_grad_(requires_grad=False)
    federation = Federation(module, batch_size=1)
    observations, truth = federation.clients(np.arange(CLASSES)[:, None, None])
    inferred = federation.run(DLG(iterations=20), observations)
    np.testing.assert_array_equal(inferred.counts, truth)


def test_single_samples_with_norms():
    federation = Federation(perceptron(norm=True), batch_size=1)
    observations, truth = federation.clients(np.arange(4)[:, None, None])
    inferred = federation.run(DLG(iterations=5), observations)
    np.testing.assert_array_equal(inferred.counts, truth)


def test_samples_that_the_model_is_sure_of_are_not_found():
    found = {}
    for training in (0, 1500):
        federation = Federation(perceptron(nn.ReLU), training=training, batch_size=8)
        observations, truth = federation.draw(5)
        found[training] = success(federation.run(DLG(iterations=3), observations).counts, truth)
    assert found[1500] < found[0] - 0.3


def test_scores_are_the_soft_labels_sums(single):
    observations, _ = single.draw(3)
    inferred = single.run(QUICK, observations)
    np.testing.assert_allclose(inferred.scores.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(inferred.scores.argmax(axis=1), inferred.counts.argmax(axis=1))


def test_the_start_depends_on_seed_and_client_alone(single):
    observations, _ = single.draw(4)
    first = single.calibrate(QUICK, observations)["scores"]
    np.testing.assert_array_equal(single.calibrate(QUICK, observations)["scores"], first)
    some = single.calibrate(QUICK, observations.rows(slice(2, 4)))["scores"]
    np.testing.assert_array_equal(some, first[2:])
    other = single.calibrate(QUICK, observations, seed=2)["scores"]
    assert not np.array_equal(other, first)


def test_torchs_random_state_is_left_alone(single):
    observations, _ = single.draw(1)
    before = torch.default_generator.get_state()
    single.calibrate(QUICK, observations)
    assert torch.equal(torch.default_generator.get_state(), before)


def test_the_nearest_of_several_starts_counts(single):
    ends = iter([(2.0, 1), (0.5, 4), (np.inf, 7), (1e-5, 8), (1e-6, 9)])

    class Ends(DLG):
        def _match(self, *_):
            distance, label = next(ends)
            return distance, np.eye(CLASSES)[[label]]

    observations, _ = single.draw(1)
    adversary = single.adversary(QUICK)
    for expected in (4, 8):  # the second stops at the first match
        calibration = Ends(restarts=3).calibrate_updates(adversary, observations)
        assert calibration["counts"].argmax() == expected
    assert next(ends) == (1e-6, 9)


def test_restarts_help():
    federation = Federation(perceptron(width=16), batch_size=4)
    observations, truth = federation.draw(4)
    once, often = (
        success(federation.run(DLG(iterations=5, restarts=n), observations).counts, truth)
        for n in (1, 6)
    )
    assert once < often


def test_every_optimisation_ends_nearer_than_it_started(single):
    observations, _ = single.draw(3)
    model = single.adversary(QUICK).white_box()
    for update in observations.update:
        first, longer = (
            DLG(iterations=n)._match(model, update, (1, CLASSES), np.random.default_rng(0))[0]
            for n in (1, 5)
        )
        assert longer <= first < 1


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e30])
def test_updates_that_cannot_be_matched(single, value):
    observations, _ = single.draw(2)
    update = np.full_like(observations.update, value)
    single.run(QUICK, single.observe(update))


def test_activations_without_a_second_derivative():
    federation = Federation(perceptron(nn.ReLU), batch_size=2)
    observations, _ = federation.draw(2)
    federation.run(QUICK, observations)


def test_norms_and_their_statistics():
    federation = Federation(perceptron(norm=True), batch_size=3)
    observations, _ = federation.draw(1)
    federation.run(QUICK, observations)


def test_inference_reads_the_calibration(single):
    observations, truth = single.draw(2)
    stored = {"counts": truth.astype(float), "scores": truth / 2}
    inferred = infer(QUICK, observations, stored)
    assert isinstance(inferred, LabelCounts)
    np.testing.assert_array_equal(inferred.counts, truth)
    np.testing.assert_array_equal(inferred.scores, truth / 2)
