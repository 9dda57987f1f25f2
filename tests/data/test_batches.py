from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils.data import DataLoader, TensorDataset

from testbed.data.batches import labels_of, local_batches, steps_of

SAMPLES = st.integers(1, 40)
BATCH = st.integers(1, 50)
SEED = st.integers(0, 2**32)


def own(samples: int) -> NDArray[np.int64]:
    """A client's samples, anywhere in the data set."""
    return np.sort(np.random.default_rng(samples).choice(1000, samples, replace=False))


@given(samples=SAMPLES, batch_size=BATCH, epochs=st.integers(1, 4), seed=SEED)
def test_epochs_are_full_passes(samples: int, batch_size: int, epochs: int, seed: int) -> None:
    indices = own(samples)
    batches = local_batches(indices, batch_size, np.random.default_rng(seed), epochs=epochs)
    loader = DataLoader(TensorDataset(torch.arange(samples)), batch_size, shuffle=True)
    sizes = [len(chosen) for (chosen,) in loader]
    assert [len(batch) for batch in batches] == sizes * epochs
    assert len(batches) == steps_of(samples, batch_size, epochs)
    together = np.concatenate(batches)
    assert together.dtype == np.int64
    assert len(together) == labels_of(samples, batch_size, epochs=epochs)
    for one_pass in together.reshape(epochs, samples):
        assert np.sort(one_pass).tolist() == indices.tolist()


@given(samples=SAMPLES, batch_size=BATCH, steps=st.integers(1, 12), seed=SEED)
def test_steps_have_full_batches_with_the_fewest_repetitions(
    samples: int, batch_size: int, steps: int, seed: int
) -> None:
    indices = own(samples)
    batches = local_batches(indices, batch_size, np.random.default_rng(seed), steps=steps)
    assert [len(batch) for batch in batches] == [batch_size] * steps
    assert steps * batch_size == labels_of(samples, batch_size, steps=steps)
    fewest = batch_size // samples
    for batch in batches:
        assert batch.dtype == np.int64
        counts = Counter(batch.tolist())
        assert set(counts) <= set(indices.tolist())
        assert set(counts.values()) <= {fewest, fewest + 1} - {0}
        assert fewest == 0 or len(counts) == samples


@given(samples=SAMPLES, batch_size=BATCH, steps=st.integers(1, 12), seed=SEED)
def test_steps_are_consecutive_passes(samples: int, batch_size: int, steps: int, seed: int) -> None:
    indices = own(samples)
    batches = local_batches(indices, batch_size, np.random.default_rng(seed), steps=steps)
    together = np.concatenate(batches)
    for start in range(0, len(together), samples):
        one_pass = together[start : start + samples].tolist()
        assert len(set(one_pass)) == len(one_pass)


@given(batch_size=st.integers(1, 12), full=st.integers(1, 6), epochs=st.integers(1, 4), seed=SEED)
def test_steps_of_whole_passes_are_epochs(
    batch_size: int, full: int, epochs: int, seed: int
) -> None:
    indices = own(batch_size * full)
    by_epoch = local_batches(indices, batch_size, np.random.default_rng(seed), epochs=epochs)
    by_step = local_batches(indices, batch_size, np.random.default_rng(seed), steps=full * epochs)
    assert [batch.tolist() for batch in by_epoch] == [batch.tolist() for batch in by_step]


def test_a_batch_of_all_samples_is_a_pass() -> None:
    rng = np.random.default_rng(0)
    (batch,) = local_batches(own(17), 17, rng, epochs=1)
    assert np.sort(batch).tolist() == own(17).tolist()


def test_same_generator_state_same_batches() -> None:
    for length in ({"steps": 9}, {"epochs": 3}):
        first, again, other = (
            np.concatenate(local_batches(own(20), 8, np.random.default_rng(seed), **length))
            for seed in (1, 1, 2)
        )
        assert first.tolist() == again.tolist()
        assert first.tolist() != other.tolist()


def test_every_pass_has_an_order_of_its_own() -> None:
    orders = np.concatenate(local_batches(own(30), 7, np.random.default_rng(0), epochs=4))
    assert len({tuple(order) for order in orders.reshape(4, 30).tolist()}) == 4


@pytest.mark.parametrize(("samples", "batch_size"), [(6, 4), (5, 3), (4, 6)])
def test_every_sample_is_as_likely_in_every_batch(samples: int, batch_size: int) -> None:
    runs, steps = 3000, 4
    counts = np.zeros((steps, samples))
    rng = np.random.default_rng(samples)
    for _ in range(runs):
        batches = local_batches(np.arange(samples), batch_size, rng, steps=steps)
        counts += [np.bincount(batch, minlength=samples) for batch in batches]
    expected = runs * batch_size / samples
    # Of each sample the copies beyond the certain ones are binomial.
    extra = batch_size / samples % 1
    assert abs(counts - expected).max() < 5 * np.sqrt(runs * extra * (1 - extra))


def test_what_a_batch_holds_back_comes_anywhere_in_the_rest_of_the_pass() -> None:
    # Of 5 samples in batches of 3, the second batch begins with two of the first pass, takes one of
    # the other three, and leaves four for places 6 to 9: at each, one of the two with chance 1/2.
    rng = np.random.default_rng(5)
    held_back, places = np.zeros(3), np.zeros((9, 5))
    for _ in range(4000):
        together = np.concatenate(local_batches(np.arange(5), 3, rng, steps=3))
        held_back += np.isin(together[6:9], together[3:5])
        places[np.arange(9), together] += 1
    assert abs(held_back - 2000).max() < 5 * np.sqrt(4000 * 0.5 * 0.5)
    assert abs(places - 800).max() < 5 * np.sqrt(4000 * 0.2 * 0.8)


@pytest.mark.parametrize(
    "length", [{}, {"steps": 1, "epochs": 1}, {"steps": 0}, {"epochs": 0}, {"steps": -1}]
)
def test_exactly_one_length(length: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="either steps or epochs"):
        local_batches(own(5), 2, np.random.default_rng(0), **length)
    with pytest.raises(ValueError, match="either steps or epochs"):
        labels_of(5, 2, **length)


def test_client_without_samples() -> None:
    with pytest.raises(ValueError, match="without samples"):
        local_batches(own(5)[:0], 2, np.random.default_rng(0), epochs=1)


def test_batch_size_below_one() -> None:
    with pytest.raises(ValueError, match="batch size of 0"):
        local_batches(own(5), 0, np.random.default_rng(0), steps=1)
