import re
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from testbed.data import Parts, split
from testbed.errors import UserError


def cut(
    labels: NDArray[np.int64],
    classes: int,
    test_start: int | None = None,
    per_class: int = 0,
    fraction: float = 0.0,
    seed: int = 0,
) -> Parts:
    return split(
        labels,
        classes,
        test_start,
        auxiliary_per_class=per_class,
        test_fraction=fraction,
        rng=np.random.default_rng(seed),
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[NDArray[np.int64], int, int | None]:
    """Labels, classes, and where the official test split begins."""
    classes = draw(st.integers(1, 6))
    training = list(range(classes)) * draw(st.integers(1, 3))
    training += draw(st.lists(st.integers(0, classes - 1), max_size=30))
    training = draw(st.permutations(training))
    test = draw(st.none() | st.lists(st.integers(0, classes - 1), max_size=10))
    labels = np.array(training + (test or []), np.int64)
    return labels, classes, None if test is None else len(training)


@given(
    problem=problems(),
    per_class=st.integers(0, 8),
    fraction=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**32),
)
def test_parts(
    problem: tuple[NDArray[np.int64], int, int | None], per_class: int, fraction: float, seed: int
) -> None:
    labels, classes, test_start = problem
    counts = np.bincount(labels[:test_start], minlength=classes)
    for_test = np.minimum(np.rint(fraction * counts), counts - 1) * (test_start is None)
    room = int((counts - for_test).min()) - 1
    if per_class > room:
        with pytest.raises(UserError, match=f"set it to at most {room}$"):
            cut(labels, classes, test_start, per_class, fraction, seed)
        return
    parts = cut(labels, classes, test_start, per_class, fraction, seed)

    together = np.concatenate([parts.victim, parts.auxiliary, parts.test])
    assert np.sort(together).tolist() == list(range(len(labels)))
    assert {part.dtype for part in (parts.victim, parts.auxiliary, parts.test)} == {np.dtype("i8")}
    by_class = labels[parts.auxiliary].reshape(classes, per_class)
    assert (by_class == np.arange(classes)[:, None]).all()
    assert np.bincount(labels[parts.victim], minlength=classes).min() >= 1
    for part in (parts.victim, parts.test):
        assert (np.diff(part) > 0).all()
    if test_start is None:
        assert np.bincount(labels[parts.test], minlength=classes).tolist() == for_test.tolist()
    else:
        assert parts.test.tolist() == list(range(test_start, len(labels)))


@given(problem=problems(), fraction=st.floats(0, 0.9), seed=st.integers(0, 99))
def test_fewer_auxiliary_samples_are_a_subset(
    problem: tuple[NDArray[np.int64], int, int | None], fraction: float, seed: int
) -> None:
    labels, classes, test_start = problem
    none = cut(labels, classes, test_start, 0, fraction, seed)
    most = int(np.bincount(labels[none.victim]).min()) - 1
    assume(most >= 2)
    few = cut(labels, classes, test_start, 1, fraction, seed)
    many = cut(labels, classes, test_start, most, fraction, seed)
    assert many.auxiliary.reshape(classes, most)[:, :1].tolist() == few.auxiliary[:, None].tolist()
    assert none.test.tolist() == few.test.tolist() == many.test.tolist()


LABELS = np.random.default_rng(1).permutation(np.arange(1000) % 10)


def test_deterministic_and_seeded() -> None:
    first, again = cut(LABELS, 10, None, 5, 0.2, 3), cut(LABELS, 10, None, 5, 0.2, 3)
    other = cut(LABELS, 10, None, 5, 0.2, 4)
    for name in ("victim", "auxiliary", "test"):
        assert getattr(first, name).tolist() == getattr(again, name).tolist()
        assert getattr(first, name).tolist() != getattr(other, name).tolist()


def test_every_sample_is_as_likely_auxiliary() -> None:
    rng = np.random.default_rng(0)
    drawn = np.zeros(1000)
    for _ in range(400):
        parts = split(LABELS, 10, None, auxiliary_per_class=25, test_fraction=0, rng=rng)
        drawn[parts.auxiliary] += 1
    # Binomial(400, 1/4): mean 100, standard deviation 8.7; 5 of them for 1000 samples.
    assert abs(drawn - 100).max() < 5 * 8.7
    assert drawn.std() == pytest.approx(8.7, rel=0.15)


def failure(**values: Any) -> str:
    with pytest.raises(UserError) as caught:
        cut(values.pop("labels", LABELS), values.pop("classes", 10), **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_victim_left() -> None:
    labels = np.array([0] * 9 + [1] * 4 + [2] * 7)
    message = (
        "data.auxiliary_per_class: 4 leaves no victim sample of class 1, which has 4 training "
    )
    assert (
        failure(labels=labels, classes=3, per_class=4) == message + "samples; set it to at most 3"
    )
    assert cut(labels, 3, None, 3).auxiliary.shape == (9,)
    assert failure(labels=labels, classes=3, per_class=3, fraction=0.25) == (
        "data.auxiliary_per_class: 3 leaves no victim sample of class 1, which has 4 training "
        "samples, 1 of them in the test part; set it to at most 2"
    )


@pytest.mark.parametrize("test_start", [None, 5])
def test_class_without_training_samples(test_start: int | None) -> None:
    labels = np.array([0, 1, 3, 3, 1, 2 if test_start else 3])
    assert "class 2 has no training sample" in failure(
        labels=labels, classes=4, test_start=test_start
    )
    assert "class 4 has no training sample" in failure(
        labels=np.array([0, 1, 2, 3]), classes=5, test_start=None
    )


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_fraction_out_of_range(fraction: float) -> None:
    assert re.match(r"data\.test_fraction: .*\[0, 1\)", failure(fraction=fraction))


def test_negative_auxiliary_count() -> None:
    assert failure(per_class=-1).startswith("data.auxiliary_per_class: -1; expected")
