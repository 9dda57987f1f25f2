"""Who takes part in a round, whose update arrives, and what becomes of the others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import plan_of
from whole_run import gradient_of, run_whole

from testbed.plan import ScenarioPlan, Task
from testbed.seeds import Purpose


def population(clients: int, size: int, dropout: float = 0.0, seed: int = 0) -> ScenarioPlan:
    return plan_of(
        f"federation.clients={clients}",
        f"federation.population={size}",
        f"federation.dropout={dropout}",
        f"seed={seed}",
        "federation.rounds=400",
    )


@settings(max_examples=30)
@given(st.integers(1, 8), st.integers(0, 20), st.sampled_from([0.0, 0.3, 0.9]), st.integers(0, 99))
def test_sample_is_of_different_clients_of_the_population(
    clients: int, others: int, dropout: float, seed: int
) -> None:
    size = clients + others
    plan, again = (population(clients, size, dropout, seed) for _ in range(2))
    for number in range(20):
        chosen = plan.participants(number)
        assert chosen == again.participants(number)
        assert len(set(chosen.identities)) == len(chosen.identities) == clients
        assert list(chosen.identities) == sorted(chosen.identities)
        assert set(chosen.identities) <= set(range(size))
        assert set(chosen.arriving) <= set(range(clients))
        assert [task.client for task in plan.round_tasks(number)] == list(chosen.arriving)
    if dropout == 0:
        assert chosen.arriving == tuple(range(clients))


def test_sampling_and_dropping_out_are_uniform_and_of_the_seed() -> None:
    plan = population(4, 10, dropout=0.25)
    rounds = [plan.participants(number) for number in range(400)]
    taken = np.bincount([i for one in rounds for i in one.identities], minlength=10)
    # 400 rounds of a probability 0.4: five standard deviations are 49.
    assert np.abs(taken - 160).max() < 49
    arrived = sum(len(one.arriving) for one in rounds)
    assert abs(arrived - 1200) < 5 * np.sqrt(1600 * 0.25 * 0.75)
    other = population(4, 10, dropout=0.25, seed=1)
    assert [other.participants(n).identities for n in range(9)] != [
        one.identities for one in rounds[:9]
    ]
    assert [other.participants(n).arriving for n in range(9)] != [
        one.arriving for one in rounds[:9]
    ]


def test_skew_stays_with_the_client_of_the_population_and_batches_do_not() -> None:
    plan = population(2, 6)
    keys: dict[int, set[Any]] = {}
    batches = set()
    for number in range(30):
        for task in plan.round_tasks(number):
            identity = plan.participants(number).identities[task.client]
            keys.setdefault(identity, set()).add(plan.key(Purpose.SKEW, task))
            batches.add(plan.key(Purpose.BATCH, task))
    assert sorted(keys) == list(range(6))
    assert all(len(found) == 1 for found in keys.values())
    assert len(set.union(*keys.values())) == 6
    assert len(batches) == 60


def test_unbalanced_classes_stay_with_each_client_of_the_population(tmp_path: Path) -> None:
    federation = {"population": 6, "clients": 3, "rounds": 8, "batch_size": 40}
    labels = {"distribution": "unbalanced"}
    run = run_whole(tmp_path, federation=federation, labels=labels, model={"name": "cnn"})
    identities, counts = run["updates/identity"], run["truth/counts"]
    classes: dict[int, set[int]] = {}
    for place in np.ndindex(identities.shape):
        classes.setdefault(int(identities[place]), set()).add(int(counts[place].argmax()))
    assert len(classes) == 6
    assert all(len(found) == 1 for found in classes.values())
    assert len(set.union(*classes.values())) > 1


@pytest.mark.parametrize("partitioned", [False, True])
def test_rows_of_clients_that_drop_out_hold_nothing_and_the_mean_is_of_the_others(
    tmp_path: Path, partitioned: bool
) -> None:
    changes: dict[str, Any] = {}
    if partitioned:
        changes = {
            "partition": {"kind": "dirichlet_classes", "alpha": 0.5},
            "labels": {"distribution": "natural"},
        }
    federation = {"clients": 3, "population": 5, "dropout": 0.5, "rounds": 7}
    attacks = ["llg", "random"]
    run = run_whole(tmp_path, federation=federation, attacks=attacks, **changes)
    arrived = run["updates/arrived"]
    assert 0 < arrived.sum() < arrived.size
    some = 0
    for number in range(7):
        chosen = run.plan.participants(number)
        np.testing.assert_array_equal(np.flatnonzero(arrived[number]), chosen.arriving)
        np.testing.assert_array_equal(run["updates/identity"][number], chosen.identities)
        if number < 6 and chosen.arriving:
            some += len(chosen.arriving) < 3
            updates = [run.plain(task) for task in run.plan.round_tasks(number)]
            weights = [1.0] * len(updates)
            if run.setup.partition is not None:
                sizes = run.setup.partition.sizes
                weights = [sizes[chosen.identities[c]] for c in chosen.arriving]
            mean = np.average(np.array(updates, np.float64), axis=0, weights=weights)
            expected = run.models[number] - 0.5 * mean
            np.testing.assert_allclose(run.models[number + 1], expected, atol=1e-6)
    assert some > 0
    gone = arrived == 0
    for name, fill in (
        ("truth/counts", -1),
        ("truth/posterior", np.nan),
        ("observations/labels", -1),
        ("observations/row_sums", np.nan),
        ("observations/bias_gradient", np.nan),
        ("observations/norm", np.nan),
        ("attacks/llg/counts", -1),
        ("attacks/random/counts", -1),
        ("updates/loss", np.nan),
        ("updates/local_steps", -1),
        ("updates/bytes_on_wire", 0),
        ("updates/finite", 0),
        ("timings/client_rank", -1),
    ):
        values = run[name]
        np.testing.assert_array_equal(values[gone], np.full_like(values[gone], fill))
        assert not np.array_equal(values[~gone], np.full_like(values[~gone], fill))


@pytest.mark.parametrize("server", ["sgd", "momentum", "adam"])
def test_a_round_in_which_nobody_is_left_changes_nothing(tmp_path: Path, server: str) -> None:
    federation = {"clients": 2, "dropout": 0.7, "rounds": 10, "server": {"optimizer": server}}
    run = run_whole(tmp_path, federation=federation)
    empty = [n for n in range(9) if not run.plan.participants(n).arriving]
    full = [n for n in range(9) if run.plan.participants(n).arriving]
    assert empty
    assert full
    for number in range(9):
        before, after = run.models[number], run.models[number + 1]
        assert np.array_equal(before, after) == (number in empty)
    assert np.isnan(run["rounds/loss"][empty]).all()
    assert np.isfinite(run["rounds/loss"][full]).all()


def test_what_a_client_remembers_stays_with_it(tmp_path: Path) -> None:
    federation = {"clients": 2, "population": 5, "dropout": 0.2, "rounds": 12}
    defenses = [{"name": "dgc", "theta": 0.9}]
    run = run_whole(tmp_path, federation=federation, defenses=defenses)
    gathered: dict[int, Any] = {}
    shown: dict[int, Any] = {}
    rests: dict[int, Any] = {}
    rounds: dict[int, int] = {}
    for task in run.plan.tasks():
        identity = run.plan.participants(task.round).identities[task.client]
        (batch,) = run.batches(task)
        gradient = gradient_of(run.module(run.models[task.round]), batch).astype(np.float64)
        gathered[identity] = gathered.get(identity, 0) + gradient
        shown[identity] = shown.get(identity, 0) + run.decoded(task).astype(np.float64)
        rests[identity] = run.states[task]["residual"]
        rounds[identity] = rounds.get(identity, 0) + 1
        np.testing.assert_allclose(shown[identity] + rests[identity], gathered[identity], atol=1e-6)
        assert np.count_nonzero(rests[identity]) > 1000
    assert max(rounds.values()) > 2
    assert sorted(run.memory) == sorted(rounds)


def test_memory_is_computed_where_it_is_kept() -> None:
    plan = plan_of(
        "federation.clients=3",
        "federation.population=7",
        "federation.rounds=50",
        "defenses=[dgc]",
    )
    for workers in (1, 2, 3, 5):
        places: dict[int, set[int]] = {}
        for task in plan.tasks():
            identity = plan.participants(task.round).identities[task.client]
            places.setdefault(identity, set()).add(plan.worker(task, workers))
        assert all(len(found) == 1 for found in places.values())
        assert len(set.union(*places.values())) == workers


def test_repetitions_remember_nothing(tmp_path: Path) -> None:
    federation = {"fresh_model": True, "rounds": 3}
    run = run_whole(tmp_path, federation=federation, defenses=[{"name": "dgc", "theta": 0.9}])
    assert all(state == {} for state in run.states.values())
    gradient = gradient_of(run.module(run.models[2]), run.batches(Task(0, 2, 1))[0])
    decoded = run.decoded(Task(0, 2, 1))
    there = np.flatnonzero(decoded)
    np.testing.assert_array_equal(decoded[there], gradient[there])
