"""Sums of a client's updates over the rounds: what adds up, and what is not counted."""

from typing import Any

import numpy as np
from small_run import plan_of

from testbed.accumulation import Accumulated
from testbed.plan import ScenarioPlan
from testbed.round import Round
from testbed.update import UpdateLayout

LAYOUT = UpdateLayout(parameters=33, buffers=0, classes=3, features=5, weight=7, bias=22)


def record(
    plan: ScenarioPlan,
    number: int,
    labels: dict[int, list[int]],
    *,
    steps: dict[int, int] | None = None,
    broken: int | None = None,
) -> Round:
    """Return a round in which clients sent updates with the given labels."""
    made = Round(plan, LAYOUT, number, keep_weights=True)
    rng = np.random.default_rng(number)
    for client, own in labels.items():
        payload = rng.normal(size=33).astype(np.float32)
        if client == broken:
            payload[0] = np.nan
        made.counts[client] = np.bincount(own, minlength=3)
        made.labels[client] = len(own)
        made.steps[client] = (steps or {}).get(client, 1)
        made.observe(client, payload, LAYOUT)
    return made


def added(total: Accumulated, made: Round, identities: Any) -> Round:
    """Add a round whose sizes the server knows."""
    total.add(made, np.asarray(identities), made.labels)
    return made


def observed(total: Accumulated, made: Round) -> Any:
    return total.observations(np.flatnonzero(made.seen))


def test_sums_are_of_each_client_and_of_its_rounds_alone() -> None:
    plan = plan_of("federation.clients=2", "federation.population=5")
    total = Accumulated(weights=True)
    identities = [np.array([0, 3]), np.array([1, 3]), np.array([0, 3])]
    rounds = [
        record(plan, number, {0: [0, 1], 1: [2, 2, number % 3]})
        for number in range(len(identities))
    ]
    for made, own in zip(rounds, identities, strict=True):
        added(total, made, own)
    last = rounds[2]
    np.testing.assert_array_equal(total.counts(last, 2), [[2, 2, 0], [1, 1, 7]])
    by_steps = {group.local_steps: group for group in observed(total, last)}
    assert sorted(by_steps) == [2, 3]
    for steps, client, chosen in ((2, 0, (0, 2)), (3, 1, (0, 1, 2))):
        group = by_steps[steps]
        assert group.keys.tolist() == [client]
        assert group.labels.tolist() == [2 * 2 if client == 0 else 3 * 3]
        for name, part in (
            ("row_sums", "row_sums"),
            ("bias_gradient", "bias"),
            ("weight_gradient", "weight"),
        ):
            expected = sum(getattr(rounds[n], part)[client].astype(np.float64) for n in chosen)
            np.testing.assert_allclose(getattr(group, name)[0], expected, rtol=1e-6)
            assert not getattr(group, name).flags.writeable
        assert group.update is None


def test_updates_that_do_not_come_or_are_not_finite_are_not_counted() -> None:
    plan = plan_of("federation.clients=3")
    total = Accumulated(weights=False)
    everyone = np.arange(3)
    added(total, record(plan, 0, {0: [0], 1: [1], 2: [2]}), everyone)
    added(total, record(plan, 1, {0: [0], 2: [1]}), everyone)
    last = record(plan, 2, {0: [0], 1: [1], 2: [2]}, broken=0)
    added(total, last, everyone)
    np.testing.assert_array_equal(total.counts(last, 3), [[-1, -1, -1], [0, 2, 0], [0, 1, 2]])
    groups = observed(total, last)
    assert [group.keys.tolist() for group in groups] == [[1], [2]]
    assert [group.local_steps for group in groups] == [2, 3]
    assert all(group.weight_gradient is None for group in groups)


def test_local_steps_add_up_and_clients_of_equally_many_are_one_group() -> None:
    plan = plan_of("federation.clients=3")
    total = Accumulated(weights=False)
    labels = {client: [0, 1] for client in range(3)}
    for number in range(2):
        last = record(plan, number, labels, steps={0: 4, 1: 4, 2: 1})
        added(total, last, range(3))
    groups = observed(total, last)
    assert [(group.local_steps, group.keys.tolist()) for group in groups] == [(2, [2]), (8, [0, 1])]


def test_a_server_that_guesses_sizes_adds_up_its_guesses() -> None:
    plan = plan_of("federation.clients=2")
    total = Accumulated(weights=False)
    for guesses in ([4, 8], [5, 7], [3, 12]):
        last = record(plan, guesses[0], {0: [0] * 4, 1: [1] * 8})
        total.add(last, np.arange(2), np.array(guesses))
    (group,) = observed(total, last)
    assert group.labels.tolist() == [12, 27]
    np.testing.assert_array_equal(total.counts(last, 2), [[12, 0, 0], [0, 24, 0]])
