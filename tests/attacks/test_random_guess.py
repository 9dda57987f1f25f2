"""The random guess: uniform, reproducible, and as good as theory says."""

from types import SimpleNamespace

import numpy as np

from testbed.attacks import Observations, make_attack
from testbed.attacks.metrics import asr, expected_random_asr


def guess(seed, rows, classes, labels, first_key=0):
    attack = make_attack("random", {})
    observed = Observations(
        np.zeros((rows, classes)), None, None, np.full(rows, labels), np.arange(rows) + first_key
    )
    return attack.infer(observed, attack.calibrate(SimpleNamespace(seed=seed))).counts


def test_the_same_seed_and_client_give_the_same_guess_whoever_else_is_there():
    counts = guess(11, 6, 10, 50)
    assert (counts == guess(11, 6, 10, 50)).all()
    assert (counts[2:] == guess(11, 4, 10, 50, first_key=2)).all()
    assert (counts != guess(12, 6, 10, 50)).any()
    assert len({tuple(row) for row in counts}) == 6


def test_seeds_of_64_bits_are_kept_whole():
    assert (guess(2**63 + 1, 3, 10, 50) != guess(2**63, 3, 10, 50)).any()


def test_success_agrees_with_the_closed_form():
    rng = np.random.default_rng(0)
    for classes, labels in ((10, 8), (10, 128), (100, 32)):
        truth = rng.multinomial(labels, np.full(classes, 1 / classes), size=4000)
        success = asr(truth, guess(3, 4000, classes, labels))
        expected = expected_random_asr(truth).mean()
        error = success.std() / np.sqrt(len(success))
        assert abs(success.mean() - expected) < 4 * error
