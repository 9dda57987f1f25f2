"""The plan: who computes what, in which order, and what it depends on."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import plan_of, resolve

from testbed.plan import ScenarioPlan, Task, make_plan
from testbed.seeds import Purpose

GIB = 1 << 30


def make(rounds: int, clients: int, fresh: bool, *others: str) -> ScenarioPlan:
    return plan_of(
        f"federation.rounds={rounds}",
        f"federation.clients={clients}",
        f"federation.fresh_model={str(fresh).lower()}",
        *others,
    )


TRAINING, REPETITIONS = (
    st.builds(make, st.integers(1, 7), st.integers(1, 9), st.just(fresh)) for fresh in (False, True)
)
PLANS = TRAINING | REPETITIONS
WORKERS = st.integers(1, 12)


@given(PLANS)
def test_tasks_are_all_clients_of_all_rounds_in_order(plan: ScenarioPlan) -> None:
    pairs = itertools.product(range(plan.rounds), range(plan.clients))
    assert list(plan.tasks()) == [Task(0, round_, client) for round_, client in pairs]


@given(PLANS, WORKERS)
def test_every_task_is_given_to_exactly_one_worker(plan: ScenarioPlan, workers: int) -> None:
    shares = [list(plan.share(worker, workers)) for worker in range(workers)]
    given_out = [task for share in shares for _, tasks in share for task in tasks]
    assert sorted(given_out, key=lambda task: (task.round, task.client)) == list(plan.tasks())
    for worker, share in enumerate(shares):
        assert all(
            plan.worker(task, workers) == worker and task.round == round_
            for round_, tasks in share
            for task in tasks
        )


@given(PLANS, WORKERS)
def test_a_worker_sends_in_the_order_in_which_the_root_takes(
    plan: ScenarioPlan, workers: int
) -> None:
    for worker in range(workers):
        sent = [task for _, tasks in plan.share(worker, workers) for task in tasks]
        taken = [task for task in plan.tasks() if plan.worker(task, workers) == worker]
        assert sent == taken


@given(PLANS, WORKERS)
def test_a_model_goes_to_the_workers_that_have_a_task_in_its_round(
    plan: ScenarioPlan, workers: int
) -> None:
    shares = [{round_ for round_, _ in plan.share(worker, workers)} for worker in range(workers)]
    for round_ in range(plan.rounds):
        tasks = [Task(0, round_, client) for client in range(plan.clients)]
        owners = sorted({plan.worker(task, workers) for task in tasks})
        assert plan.needed_by(round_, workers) == owners
        assert [worker for worker in range(workers) if round_ in shares[worker]] == owners


@given(PLANS, WORKERS, st.integers(1, 10**9))
def test_a_broadcast_reaches_only_workers_that_wait_for_it(
    plan: ScenarioPlan, workers: int, model_bytes: int
) -> None:
    everyone = all(
        plan.needed_by(round_, workers) == list(range(workers)) for round_ in range(plan.rounds)
    )
    large = workers * model_bytes > 4 * 2**20
    expected = everyone and large and not plan.fresh_model
    assert plan.broadcasts(workers, model_bytes) == expected


@given(TRAINING, WORKERS)
def test_training_keeps_a_client_with_its_worker(plan: ScenarioPlan, workers: int) -> None:
    owners = [
        {plan.worker(Task(0, round_, client), workers) for round_ in range(plan.rounds)}
        for client in range(plan.clients)
    ]
    assert all(len(workers_of) == 1 for workers_of in owners)


@given(REPETITIONS, WORKERS)
def test_repetitions_are_dealt_out_evenly(plan: ScenarioPlan, workers: int) -> None:
    tasks = list(plan.tasks())
    for start in range(len(tasks)):
        # However many tasks are under way, no worker has two more of them than another.
        part = [plan.worker(task, workers) for task in tasks[start : start + 2 * workers]]
        loads = [part.count(worker) for worker in range(workers)]
        assert max(loads) - min(loads) <= 1


@given(TRAINING, WORKERS, st.integers(1, 2 * GIB))
def test_training_has_one_round_in_flight(
    plan: ScenarioPlan, workers: int, model_bytes: int
) -> None:
    assert plan.in_flight(workers, model_bytes) == 1


@given(REPETITIONS, WORKERS, st.integers(1, 2 * GIB))
def test_repetitions_in_flight(plan: ScenarioPlan, workers: int, model_bytes: int) -> None:
    number = plan.in_flight(workers, model_bytes)
    assert 1 <= number <= plan.rounds
    assert number == 1 or number * model_bytes <= GIB
    enough = number * plan.clients >= 2 * workers
    assert enough or number == plan.rounds or (number + 1) * model_bytes > GIB
    assert (number - 1) * plan.clients < 2 * workers


def test_rounds_in_flight_of_a_model_without_size() -> None:
    assert make(7, 1, True).in_flight(2, 0) == 4


@pytest.mark.parametrize("fresh", [False, True])
def test_draws_of_different_tasks_are_different(fresh: bool) -> None:
    plan = make(3, 3, fresh)
    for purpose in (Purpose.BATCH, Purpose.LOCAL):
        keys = [plan.key(purpose, task) for task in plan.tasks()]
        assert keys == [(0, task.round, task.client) for task in plan.tasks()]
    initial = [plan.initial_key(round_) for round_ in range(3)]
    assert initial == [(0, 0), (0, 1), (0, 2)]


def test_skew_stays_with_the_client_in_training_only() -> None:
    training = [make(3, 2, False).key(Purpose.SKEW, Task(0, round_, 1)) for round_ in range(3)]
    assert training == [(0, 1)] * 3
    repetitions = [make(3, 2, True).key(Purpose.SKEW, Task(0, round_, 1)) for round_ in range(3)]
    assert repetitions == [(0, 0, 1), (0, 1, 1), (0, 2, 1)]


SWEPT = (
    "sweep.federation.batch_size=[4, 8]",
    "sweep.defenses=[[], [{name: clip, bound: 1}], [float16]]",
)


def test_scenarios_that_differ_in_defences_alone_draw_the_same() -> None:
    plans = make_plan(resolve(*SWEPT))
    assert [plan.draws for plan in plans] == [0, 0, 0, 3, 3, 3]
    keys = {plan.key(Purpose.BATCH, Task(plan.index, 2, 1)) for plan in plans[:3]}
    assert keys == {(0, 2, 1)}
    assert {plan.initial_key(0) for plan in plans[3:]} == {(3, 0)}


def test_shares_are_all_scenarios_as_a_whole_run_has_them() -> None:
    whole = make_plan(resolve(*SWEPT))
    shares = [make_plan(resolve(*SWEPT), (i, 4)) for i in range(4)]
    assert sorted(plan.index for share in shares for plan in share) == list(range(6))
    for share in shares:
        assert [plan.position for plan in share] == list(range(len(share)))
        for plan in share:
            assert plan.draws == whole[plan.index].draws
            assert plan.scenario == whole[plan.index].scenario


@pytest.mark.parametrize(
    ("every", "attacked"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])]
)
def test_attacked_rounds(every: int, attacked: list[int]) -> None:
    plan = make(5, 1, False, f"federation.attack_every={every}")
    assert [round_ for round_ in range(5) if plan.is_attacked(round_)] == attacked


@pytest.mark.parametrize(("every", "evaluated"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4])])
def test_evaluated_rounds(every: int, evaluated: list[int]) -> None:
    plan = make(5, 1, False, f"federation.evaluate_every={every}")
    assert [round_ for round_ in range(5) if plan.is_evaluated(round_)] == evaluated


def test_plans_follow_the_sweep() -> None:
    plans = make_plan(resolve("sweep.federation.rounds=[4, 2]", "results.observations=last_layer"))
    assert [(plan.index, plan.rounds, plan.keeps_weights) for plan in plans] == [
        (0, 4, True),
        (1, 2, True),
    ]
    assert [plan.swept for plan in plans] == [{"federation.rounds": 4}, {"federation.rounds": 2}]
    assert next(iter(plans[1].tasks())) == Task(1, 0, 0)
    assert plans[1].initial_key(1) == (1, 1)
    assert not plan_of().keeps_weights


def test_labels_per_update() -> None:
    assert plan_of("federation.batch_size=32").labels_per_update == 32
