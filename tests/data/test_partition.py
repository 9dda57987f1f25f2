import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from testbed.data import load
from testbed.data.partition import PARTITIONS, Partition, partition
from testbed.errors import UserError

LABELS = np.random.default_rng(1).permutation(np.arange(6000) % 10)
PART = np.sort(np.random.default_rng(2).permutation(6000)[:5000])
USERS = np.random.default_rng(3).integers(-1, 40, size=6000)


def divide(kind: str, clients: int = 20, seed: int = 0, **values: Any) -> Partition:
    arguments: dict[str, Any] = {"labels": LABELS, "part": PART, "classes": 10} | values
    if kind.startswith("dirichlet"):
        arguments.setdefault("alpha", 0.5)
    if kind == "shards":
        arguments.setdefault("classes_per_client", 2)
    arguments.setdefault("users", USERS if kind == "user" else None)
    return partition(kind, clients=clients, rng=np.random.default_rng(seed), **arguments)


def tops(divided: Partition) -> NDArray[np.float64]:
    """The share of each client's most frequent class."""
    counts = divided.counts(LABELS, 10)
    shares: NDArray[np.float64] = counts.max(axis=1) / counts.sum(axis=1)
    return shares


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Labels, the victims' part of them, classes, and a population that fits."""
    classes = draw(st.integers(1, 6))
    labels = np.array(
        draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=60)), np.int64
    )
    size = draw(st.integers(1, len(labels)))
    order = np.random.default_rng(draw(st.integers(0, 99))).permutation(len(labels))
    return {
        "labels": labels,
        "part": np.sort(order[:size]),
        "classes": classes,
        "clients": draw(st.integers(1, size)),
        "rng": np.random.default_rng(draw(st.integers(0, 2**32))),
    }


def assert_covers(divided: Partition, problem: dict[str, Any]) -> None:
    assert len(divided.indices) == problem["clients"]
    for indices in divided.indices:
        assert indices.dtype == np.int64
        assert (np.diff(indices) > 0).all()
    assert np.sort(np.concatenate(divided.indices)).tolist() == problem["part"].tolist()
    counts = divided.counts(problem["labels"], problem["classes"])
    assert (counts.dtype, divided.sizes.dtype) == (np.int64, np.int64)
    assert counts.sum(axis=1).tolist() == divided.sizes.tolist()
    for indices, row in zip(divided.indices, counts, strict=True):
        expected = np.bincount(problem["labels"][indices], minlength=problem["classes"])
        assert row.tolist() == expected.tolist()


@given(problem=problems())
def test_iid_covers_with_equal_sizes(problem: dict[str, Any]) -> None:
    divided = partition("iid", **problem)
    assert_covers(divided, problem)
    assert np.ptp(divided.sizes) <= 1


@given(problem=problems(), exponent=st.floats(-300, 300))
def test_dirichlet_covers_with_equal_sizes(problem: dict[str, Any], exponent: float) -> None:
    divided = partition("dirichlet", **problem, alpha=10**exponent)
    assert_covers(divided, problem)
    assert np.ptp(divided.sizes) <= 1


@given(problem=problems(), exponent=st.floats(-3, 3), minimum=st.integers(1, 3))
def test_dirichlet_over_classes_covers_with_the_minimum(
    problem: dict[str, Any], exponent: float, minimum: int
) -> None:
    problem["clients"] = max(1, min(4, problem["clients"] // minimum))
    if minimum > len(problem["part"]):
        with pytest.raises(UserError, match=r"federation\.population"):
            partition("dirichlet_classes", **problem, alpha=1.0, minimum=minimum)
        return
    try:
        divided = partition("dirichlet_classes", **problem, alpha=10**exponent, minimum=minimum)
    except UserError:
        # Few clients of many samples each get the minimum in some draw, unless alpha is small.
        assert exponent < 1 or len(problem["part"]) < 3 * minimum * problem["clients"]
        return
    assert_covers(divided, problem)
    assert divided.sizes.min() >= minimum


@given(problem=problems(), data=st.data())
def test_shards_cover_and_hold_few_classes(problem: dict[str, Any], data: st.DataObject) -> None:
    samples = len(problem["part"])
    s = data.draw(st.integers(1, min(problem["classes"], samples // problem["clients"])))
    divided = partition("shards", **problem, classes_per_client=s)
    assert_covers(divided, problem)
    assert np.ptp(divided.sizes) <= s
    counts = np.bincount(problem["labels"][problem["part"]])
    longest = -(-samples // (s * problem["clients"]))
    # So many classes can lie in a shard of that length: all but the outer two lie in it whole.
    inner = int((np.cumsum(np.sort(counts[counts > 0])) <= longest - 2).sum())
    held = np.count_nonzero(divided.counts(problem["labels"], problem["classes"]), axis=1)
    assert held.max() <= s * (inner + 2)


def test_shards_of_the_paper_have_one_class_each() -> None:
    # 100 clients with two shards of 30 each: 20 shards of every class, none across a border.
    divided = divide("shards", 100, part=np.arange(6000))
    counts = divided.counts(LABELS, 10)
    assert set(counts.ravel().tolist()) == {0, 30, 60}
    assert divided.sizes.tolist() == [60] * 100
    classes = np.count_nonzero(counts, axis=1)
    # Of two shards, the second is of the same class with probability 19 / 199.
    assert 0 < (classes == 1).sum() < 30
    assert classes.max() == 2


@given(
    users=st.lists(st.integers(-1, 8), min_size=1, max_size=60),
    minimum=st.integers(1, 3),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_a_client_has_all_samples_of_one_user(
    users: list[int], minimum: int, seed: int, data: st.DataObject
) -> None:
    of_all = np.array(users, np.int64)
    part = np.flatnonzero(np.random.default_rng(seed).random(len(users)) < 0.8)
    counts = np.bincount(of_all[part][of_all[part] >= 0], minlength=9)
    eligible = np.flatnonzero(counts >= minimum)
    clients = data.draw(st.integers(1, len(eligible))) if len(eligible) else 1
    values = {
        "labels": np.zeros(len(users), np.int64),
        "part": part,
        "classes": 1,
        "minimum": minimum,
        "users": of_all,
    }
    if not len(eligible):
        with pytest.raises(UserError, match=r"users"):
            divide("user", clients, seed, **values)
        return
    divided = divide("user", clients, seed, **values)
    owners = [set(of_all[indices].tolist()) for indices in divided.indices]
    assert all(len(owner) == 1 for owner in owners)
    chosen = [owner.pop() for owner in owners]
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(eligible.tolist())
    for user, indices in zip(chosen, divided.indices, strict=True):
        assert indices.tolist() == part[of_all[part] == user].tolist()


def test_every_user_is_as_likely_in_a_smaller_population() -> None:
    chosen = np.zeros(40)
    for seed in range(400):
        for indices in divide("user", 10, seed).indices:
            chosen[USERS[indices[0]]] += 1
    # Binomial(400, 1/4): mean 100, standard deviation 8.7; 5 of them for 40 users.
    assert abs(chosen - 100).max() < 5 * 8.7
    assert chosen.std() == pytest.approx(8.7, rel=0.4)


@pytest.mark.parametrize("kind", PARTITIONS)
def test_deterministic_and_seeded(kind: str) -> None:
    first, again, other = (divide(kind, 20, seed) for seed in (3, 3, 4))
    lists = [[indices.tolist() for indices in p.indices] for p in (first, again, other)]
    assert lists[0] == lists[1]
    assert lists[0] != lists[2]


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "dirichlet_classes", "shards"])
def test_every_sample_is_as_likely_of_each_client(kind: str) -> None:
    labels = np.repeat(np.arange(3), 10)
    drawn = np.zeros(30)
    for seed in range(600):
        values: dict[str, Any] = {"labels": labels, "part": np.arange(30), "classes": 3}
        drawn[divide(kind, 3, seed, **values).indices[1]] += 1
    # Mean 200. The samples of a class go together, so that only differences within one are
    # binomial: standard deviation 11.5, and 5 of them.
    within = drawn.reshape(3, 10) - drawn.reshape(3, 10).mean(axis=1, keepdims=True)
    assert abs(within).max() < 5 * 11.5
    assert abs(drawn.reshape(3, 10).mean(axis=1) - 200).max() < 60
    assert within.std() > 3


def test_dirichlet_with_small_alpha_gives_a_client_one_class() -> None:
    # Every class is enough for two clients exactly, so that no client has to take what is left.
    assert (tops(divide("dirichlet", 20, alpha=1e-300, part=np.arange(6000))) == 1).all()
    # Where it is not, few clients have to.
    assert np.median(tops(divide("dirichlet", 20, alpha=1e-3))) == 1


def test_dirichlet_with_large_alpha_approaches_the_prior() -> None:
    skewed = np.random.default_rng(0).choice(4, p=[0.5, 0.3, 0.15, 0.05], size=20_000)
    values: dict[str, Any] = {"labels": skewed, "part": np.arange(20_000), "classes": 4}
    prior = np.bincount(skewed) / len(skewed)
    for alpha in (1e9, 1e300):
        counts = divide("dirichlet", 20, alpha=alpha, **values).counts(skewed, 4)
        # Multinomial(1000, prior), but for the client that comes last and gets what is left.
        error = np.sort(abs(counts - 1000 * prior).max(axis=1))
        assert error[-3] < 5 * math.sqrt(250)
        assert error[0] > 0


def test_any_client_may_be_the_last_that_gets_what_is_left() -> None:
    prior = np.bincount(LABELS[PART]) / len(PART)
    last = set()
    for seed in range(30):
        counts = divide("dirichlet", 5, seed, alpha=1e9).counts(LABELS, 10)
        last.add(int(abs(counts - 1000 * prior).sum(axis=1).argmax()))
    assert last == set(range(5))


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_draws_labels_from_a_dirichlet_multinomial(alpha: float) -> None:
    labels = np.repeat(np.arange(2), [8000, 2000])
    values: dict[str, Any] = {"labels": labels, "part": np.arange(10_000), "classes": 2}
    drawn = np.zeros(21)
    for seed in range(12):
        counts = divide("dirichlet", 500, seed, alpha=alpha, **values).counts(labels, 2)[:, 1]
        drawn += np.bincount(counts, minlength=21)
    expected = stats.betabinom.pmf(np.arange(21), 20, 0.2 * alpha, 0.8 * alpha)
    # Total variation: 0.02 by chance, and as much by the clients that get what is left.
    assert abs(drawn / drawn.sum() - expected).sum() / 2 < 0.05
    other = stats.betabinom.pmf(np.arange(21), 20, 0.4 * alpha, 1.6 * alpha)
    assert abs(drawn / drawn.sum() - other).sum() / 2 > 0.06


@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_dirichlet_over_classes_has_the_moments_of_the_dirichlet(alpha: float) -> None:
    draws = np.concatenate(
        [divide("dirichlet_classes", 5, seed, alpha=alpha).counts(LABELS, 10) for seed in range(80)]
    )
    totals = np.bincount(LABELS[PART], minlength=10)
    shares = (draws / totals).ravel()
    assert shares.mean() == pytest.approx(0.2)
    assert shares.var() == pytest.approx(0.16 / (5 * alpha + 1), rel=0.1)


def test_dirichlet_over_classes_with_large_alpha_divides_every_class_evenly() -> None:
    counts = divide("dirichlet_classes", 20, alpha=1e12).counts(LABELS, 10)
    assert abs(counts - np.bincount(LABELS[PART]) / 20).max() < 1.01


def test_classes_smaller_than_the_population_go_to_no_client_rather_than_another() -> None:
    # Every client should have 0.4 samples of each of 50 classes.
    labels = np.repeat(np.arange(50), 40)
    values: dict[str, Any] = {"labels": labels, "part": np.arange(2000), "classes": 50}
    counts = divide("dirichlet_classes", 100, alpha=1e9, **values).counts(labels, 50)
    assert counts.max() == 1
    assert abs(counts.sum(axis=1) - 20).max() < 5 * math.sqrt(50 * 0.4 * 0.6)


def test_iid_shares_of_classes_are_those_of_the_victims() -> None:
    counts = divide("iid", 10).counts(LABELS, 10)
    assert abs(counts - np.bincount(LABELS[PART]) / 10).max() < 5 * math.sqrt(500 * 0.1 * 0.9)
    assert abs(counts - np.bincount(LABELS[PART]) / 10).max() > 1


def test_all_kinds_on_mnist(data_root: Path) -> None:
    labels = load("mnist", data_root / "mnist").labels[:60_000]
    part = np.arange(60_000)
    values: dict[str, Any] = {"labels": labels, "part": part}
    assert divide("iid", 100, **values).sizes.tolist() == [600] * 100
    shards = divide("shards", 100, **values).counts(labels, 10)
    assert shards.sum(axis=1).tolist() == [600] * 100
    assert np.median(np.count_nonzero(shards, axis=1)) == 2
    top = [
        np.median(divide("dirichlet", 100, alpha=alpha, **values).counts(labels, 10).max(axis=1))
        for alpha in (0.1, 1, 10, 1000)
    ]
    assert top == sorted(top, reverse=True)
    assert top[0] > 500
    assert top[-1] < 100
    assert np.ptp(divide("dirichlet_classes", 100, **values).sizes) > 300


def failure(kind: str, clients: int = 20, **values: Any) -> str:
    with pytest.raises(UserError) as caught:
        divide(kind, clients, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "dirichlet_classes", "shards"])
def test_more_clients_than_samples(kind: str) -> None:
    assert failure(kind, 5001) == (
        "federation.population: 5001 clients cannot have 1 sample each, as the victims have 5000 "
        "in all; set it to at most 5000"
    )
    assert failure(kind, 1001, minimum=5).endswith("set it to at most 1000")


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_as_many_clients_as_samples(kind: str) -> None:
    assert divide(kind, 5000).sizes.tolist() == [1] * 5000


@pytest.mark.parametrize("kind", ["dirichlet", "dirichlet_classes"])
@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan, None])
def test_alpha_out_of_range(kind: str, alpha: float | None) -> None:
    found = "not set" if alpha is None else alpha
    assert failure(kind, alpha=alpha) == (
        f"partition.alpha: {found}; expected a finite number above 0 for the kind {kind}"
    )


def test_alpha_too_small_for_the_minimum() -> None:
    message = failure("dirichlet_classes", 200, alpha=1e-3)
    assert re.match(
        r"partition\.alpha: 0\.001 left .* fewer than 1 sample in each of 1000", message
    )
    assert "set it higher, or federation.population, now 200, lower" in message
    assert divide("dirichlet_classes", 200, alpha=1.0).sizes.min() >= 1


@pytest.mark.parametrize("s", [0, 11, None])
def test_classes_per_client_out_of_range(s: int | None) -> None:
    assert failure("shards", classes_per_client=s) == (
        f"partition.classes_per_client: {'not set' if s is None else s}; expected 1..10 for the "
        "kind shards"
    )


def test_more_shards_than_samples() -> None:
    assert failure("shards", 600, classes_per_client=10) == (
        "partition.classes_per_client: 10 for each of 600 clients are 6000 shards, cut from 5000 "
        "samples, too few for 1 sample per client; lower it, or federation.population"
    )
    assert divide("shards", 500, classes_per_client=10).sizes.tolist() == [10] * 500


@pytest.mark.parametrize("users", [None, np.full(6000, -1)])
def test_data_set_without_users(users: NDArray[np.int64] | None) -> None:
    assert failure("user", users=users) == (
        "partition.kind: user, but this data set does not say whose its samples are; expected one "
        "of iid, dirichlet, dirichlet_classes, shards here, or a data set with users"
    )


def test_more_clients_than_users() -> None:
    assert failure("user", 41) == (
        "federation.population: 41 clients, but 40 users have 1 sample or more among the victims'; "
        "set it to at most 40"
    )
    sizes = divide("user", 40).sizes
    assert failure("user", 40, minimum=int(sizes.min()) + 1).endswith(
        f"set it to at most {(sizes > sizes.min()).sum()}"
    )


def test_no_clients() -> None:
    assert failure("iid", 0) == "federation.population: 0; expected 1 client or more"


def test_unknown_kind() -> None:
    assert failure("dirichlets").startswith(
        "partition.kind: unknown kind 'dirichlets'; did you mean 'dirichlet'?"
    )


def test_minimum_below_one() -> None:
    with pytest.raises(ValueError, match="minimum of 0"):
        divide("iid", minimum=0)
