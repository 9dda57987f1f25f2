import numpy as np
import pytest

from analysis import bootstrap
from analysis.bootstrap import bootstrap_interval


@pytest.mark.parametrize("count", [2, 3, 5, 19, 40])
def test_intervals_cover_as_often_as_they_say(count):
    generator = np.random.default_rng(3)
    covered = []
    for _ in range(400):
        rounds = generator.normal(0.5, 0.1, size=count)
        values = (rounds[:, None] + generator.normal(0, 0.02, size=(count, 5))).ravel()
        clusters = np.repeat(np.arange(count), 5)
        low, high = bootstrap_interval(values, clusters, resamples=300)
        covered.append(low <= 0.5 <= high)
    assert 0.90 <= np.mean(covered) <= 0.99


def test_bootstrap_resamples_clusters_and_not_values():
    values = np.repeat(np.arange(10) / 10, 50)
    wide = bootstrap_interval(values, np.repeat(np.arange(10), 50))
    narrow = bootstrap_interval(values, np.arange(500))
    assert wide[1] - wide[0] > 4 * (narrow[1] - narrow[0])
    assert wide[0] < values.mean() < wide[1]


def test_bootstrap_weighs_clusters_by_their_size():
    values, clusters = np.array([1.0] + [0.0] * 9), np.array([0] + [1] * 9)
    low, high = bootstrap_interval(values, clusters)
    assert (low + high) / 2 == pytest.approx(0.1)
    # Thirty small clusters of ones, and a hundred times as many zeros in thirty large ones.
    values = np.concatenate([np.ones(30), np.zeros(3000)])
    clusters = np.concatenate([np.arange(30), 30 + np.arange(3000) // 100])
    low, high = bootstrap_interval(values, clusters)
    assert 0.005 < low < 30 / 3030 < high < 0.016


def test_bootstrap_of_degenerate_samples():
    nan = float("nan")
    assert bootstrap_interval([0.1] * 30, np.arange(30)) == (0.1, 0.1)
    assert bootstrap_interval([0.1, nan, 0.1], [0, 1, 2]) == (0.1, 0.1)
    for values, clusters in [([], []), ([0.5, 0.7], [3, 3]), ([0.5, nan], [0, 1])]:
        assert np.isnan(bootstrap_interval(values, clusters)).all()


def test_bootstrap_is_repeatable_and_works_in_blocks(monkeypatch):
    values, clusters = np.random.default_rng(0).random(90), np.arange(90) // 3
    whole = bootstrap_interval(values, clusters)
    assert whole == bootstrap_interval(values, clusters)
    assert whole != bootstrap_interval(values, clusters, seed=1)
    monkeypatch.setattr(bootstrap, "_BLOCK", 300)
    assert whole == bootstrap_interval(values, clusters)
