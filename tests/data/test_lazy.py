import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from testbed.data import Dataset, load, open_dataset
from testbed.data.dataset import Images, number_users
from testbed.data.lazy import LazyDataset, in_memory, spread
from testbed.errors import UserError

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=80).map(np.array)


def made(train: list[int], test: list[int], users: list[int] | None = None) -> Dataset:
    """Return a data set whose images hold their index."""
    labels = np.array(train + test)
    return Dataset(
        name="made",
        images=np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1),
        labels=labels,
        classes=8,
        scale=1 / 255,
        test_start=len(train) if test else None,
        users=None if users is None else np.array(users),
    )


@given(LABELS, st.data())
def test_every_class_keeps_its_share(labels: np.ndarray, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(0, len(labels)))
    kept = spread(labels, wanted)
    assert len(kept) == wanted
    assert (np.diff(kept) > 0).all()
    assert set(kept) <= set(range(len(labels)))
    counts = np.bincount(labels, minlength=7)
    chosen = np.bincount(labels[kept], minlength=7)
    if wanted >= np.count_nonzero(counts):
        assert ((chosen > 0) == (counts > 0)).all()
        # One each is set aside; the rest is shared in proportion, rounded.
        least = counts > 0
        above = counts - least
        exact = above * (wanted - least.sum()) / max(above.sum(), 1)
        assert (np.abs(chosen - least - exact) < 1).all()


@given(st.integers(1, 60), st.data())
def test_those_kept_of_a_class_are_evenly_spaced(count: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, count))
    gaps = np.diff([*spread(np.zeros(count, np.int64), wanted), count])
    assert gaps.max() - gaps.min() <= 1


def test_half_of_two_classes_by_hand() -> None:
    assert spread(np.array([0, 0, 0, 0, 1, 1]), 3).tolist() == [0, 2, 4]
    assert spread(np.array([0, 1, 0, 1, 0, 1, 0, 1]), 4).tolist() == [0, 1, 4, 5]


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=50),
    st.lists(st.integers(0, 7), max_size=50),
    st.integers(5, 60),
)
def test_limit_keeps_images_labels_and_users_together(
    train: list[int], test: list[int], limit: int
) -> None:
    users = [7 * i % 10 - 1 for i in range(len(train) + len(test))]
    whole = made(train, test, users)
    part = in_memory(whole).limited(limit).load()
    index = part.images.ravel()
    np.testing.assert_array_equal(part.labels, whole.labels[index])
    kept = min(limit, len(train))
    if test:
        assert part.test_start == kept
        assert len(part.labels) - kept == -(-len(test) * kept // len(train))
        assert (index[:kept] < len(train)).all()
        assert (index[kept:] >= len(train)).all()
    else:
        assert part.test_start is None
        assert len(part.labels) == kept
    assert part.users is not None
    assert whole.users is not None
    pairs = set(zip(part.users.tolist(), whole.users[index].tolist(), strict=True))
    # Users stay apart, nobody stays nobody, and there are no gaps.
    assert len(pairs) == len({new for new, _ in pairs}) == len({old for _, old in pairs})
    assert all((new == -1) == (old == -1) for new, old in pairs)
    if limit < len(train):
        known = np.unique(part.users[:kept][part.users[:kept] >= 0])
        assert known.tolist() == list(range(len(known)))


def test_without_limit_nothing_is_copied() -> None:
    whole = made([0, 1], [0])
    assert np.shares_memory(in_memory(whole).load().images, whole.images)
    assert np.shares_memory(in_memory(whole).limited(2).load().images, whole.images)
    assert in_memory(whole).load().images.flags.c_contiguous


def test_limits_that_leave_a_class_without_samples() -> None:
    data = in_memory(made([0, 1, 5, 5], [2]))
    for limit in (0, -1):
        with pytest.raises(UserError, match=rf"data\.limit: {limit}; expected at least 1"):
            data.limited(limit)
    with pytest.raises(UserError, match="less than the 3 classes of the training samples"):
        data.limited(2)
    assert data.limited(3).load().labels.tolist() == [0, 1, 5, 2]


def test_limits_combine() -> None:
    data = open_dataset("digits", None).limited(200)
    assert data.limited(50).load().labels.shape == (50,)
    assert set(load("digits", None, limit=10).labels) == set(range(10))


def test_note_tells_that_it_is_of_the_whole() -> None:
    data = dataclasses.replace(in_memory(made([0, 1, 5, 5], [2])), note="4 of 9 are used")
    assert data.limited(4).note == "4 of 9 are used"
    assert data.limited(3).note == "4 of 9 are used (before the limit)"
    assert in_memory(made([0, 0], [])).limited(1).note == ""
    twice = dataclasses.replace(in_memory(made([0] * 4, [])), note="all").limited(3).limited(2)
    assert twice.note == "all (before the limit)"


def test_blocks_are_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_dataset("digits", None)
    monkeypatch.setattr("testbed.data.lazy._BLOCK_BYTES", 100 * 64 + 63)
    starts, blocks = zip(*data.blocks(), strict=True)
    assert starts == tuple(range(0, 1797, 100))
    np.testing.assert_array_equal(np.concatenate(blocks), data.load().images)


def test_numbers_of_users_by_hand() -> None:
    keys = np.array([40, 7, -1, 40, 9, 7, 3])
    assert number_users(keys, None).tolist() == [3, 1, -1, 3, 2, 1, 0]
    # Users 9 and 3 are of the test part alone.
    assert number_users(keys, 4).tolist() == [1, 0, -1, 1, 3, 0, 2]
    assert number_users(np.array([-1, -1]), 1).tolist() == [-1, -1]


def test_images_that_memory_cannot_hold_are_the_user_s_to_mend() -> None:
    def read(chosen: slice | NDArray[np.int64]) -> Images:
        raise MemoryError

    data = LazyDataset(
        name="some",
        labels=np.arange(3),
        classes=3,
        scale=1.0,
        test_start=None,
        shape=(1, 2, 2),
        dtype=np.dtype(np.float32),
        read=read,
    )
    with pytest.raises(
        UserError, match="'some': 3 images of 16 bytes do not fit into memory: set "
    ):
        data.load()
