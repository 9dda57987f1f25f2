"""The root's optimisers against their closed forms and against a reference in double precision."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from testbed.errors import UserError
from testbed.server_optimizer import SERVER_OPTIMIZERS, ServerOptimizer, make_server_optimizer

# Several blocks, the last of which is not full.
SIZE = 70_001
DEFAULTS = {"learning_rate": 0.1, "momentum": 0.9, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-3}
KINDS = pytest.mark.parametrize("kind", SERVER_OPTIMIZERS)


def make(kind: str, size: int = SIZE, **values: float) -> ServerOptimizer:
    return make_server_optimizer(kind, size=size, **(DEFAULTS | values))


def vectors(seed: int, count: int, size: int = SIZE) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)


def run(
    optimizer: ServerOptimizer, start: NDArray[np.float32], deltas: NDArray[np.float32]
) -> NDArray[np.float32]:
    model = start.copy()
    for delta in deltas:
        after = np.full_like(model, np.nan)
        optimizer.step(model, delta, after)
        model = after
    return model


def reference(
    kind: str, start: NDArray[np.float32], deltas: NDArray[np.float32], **values: float
) -> NDArray[np.float64]:
    """Plain formulas in double precision, element by element the papers' lines."""
    knobs = DEFAULTS | values
    w = start.astype(np.float64)
    velocity, m, v = np.zeros_like(w), np.zeros_like(w), np.full_like(w, knobs["epsilon"] ** 2)
    for delta in deltas.astype(np.float64):
        if kind == "sgd":
            w = w - knobs["learning_rate"] * delta
        elif kind == "momentum":
            velocity = knobs["momentum"] * velocity + delta
            w = w - knobs["learning_rate"] * velocity
        else:
            m = knobs["beta1"] * m + (1 - knobs["beta1"]) * delta
            v = knobs["beta2"] * v + (1 - knobs["beta2"]) * delta**2
            w = w - knobs["learning_rate"] * m / (np.sqrt(v) + knobs["epsilon"])
    return w


@KINDS
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_steps_are_those_of_the_formulas(kind: str, steps: int) -> None:
    start, *deltas = vectors(0, steps + 1)
    found = run(make(kind), start, np.array(deltas))
    expected = reference(kind, start, np.array(deltas))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
    assert abs(found - start).max() > 0.05


@given(
    kind=st.sampled_from(SERVER_OPTIMIZERS),
    rate=st.floats(0.01, 1),
    decays=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99), st.floats(0, 0.999)),
    exponent=st.floats(-5, 0),
    scale=st.floats(0.01, 10),
    seed=st.integers(0, 99),
)
def test_any_knobs(
    kind: str,
    rate: float,
    decays: tuple[float, float, float],
    exponent: float,
    scale: float,
    seed: int,
) -> None:
    knobs = {
        "learning_rate": rate,
        "momentum": decays[0],
        "beta1": decays[1],
        "beta2": decays[2],
        "epsilon": 10**exponent,
    }
    start, *deltas = vectors(seed, 6, 9)
    scaled = np.array(deltas) * np.float32(scale)
    found = run(make(kind, 9, **knobs), start, scaled)
    expected = reference(kind, start, scaled, **knobs)
    moved = max(1.0, abs(expected - start).max())
    assert abs(found - expected).max() < 3e-5 * moved


def test_with_a_learning_rate_of_one_sgd_moves_to_the_mean_of_the_clients() -> None:
    before, *clients = vectors(1, 4)
    mean = np.mean([before - client for client in clients], axis=0)
    found = run(make("sgd", learning_rate=1.0), before, mean[None])
    np.testing.assert_allclose(found, np.mean(clients, axis=0), rtol=1e-5, atol=1e-6)


def test_sgd_is_one_rounded_product_and_one_rounded_difference() -> None:
    before, delta = vectors(2, 2)
    found = run(make("sgd"), before, delta[None])
    assert np.array_equal(found, before - np.float32(0.1) * delta)
    assert np.array_equal(run(make("sgd", learning_rate=1.0), before, delta[None]), before - delta)


def test_momentum_of_zero_is_sgd_bitwise() -> None:
    start, *deltas = vectors(3, 6)
    values = np.array(deltas)
    assert np.array_equal(
        run(make("momentum", momentum=0.0), start, values), run(make("sgd"), start, values)
    )


def test_constant_delta_builds_up_momentum_as_a_geometric_series() -> None:
    start, delta = vectors(4, 2)
    found = run(make("momentum", momentum=0.5), start, np.tile(delta, (5, 1)))
    # The velocities are 1, 1.5, 1.75, ... times delta: 2 - 0.5^t.
    factor = sum(2 - 0.5**step for step in range(5))
    np.testing.assert_allclose(found, start - 0.1 * factor * delta, rtol=1e-5, atol=1e-6)


def test_first_step_of_adam_has_its_closed_form() -> None:
    start, delta = vectors(5, 2)
    found = run(make("adam"), start, delta[None])
    moment = np.sqrt(0.99 * 1e-6 + 0.01 * delta.astype(np.float64) ** 2)
    expected = start - 0.1 * 0.1 * delta / (moment + 1e-3)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_constant_delta_leads_adam_to_steps_of_the_learning_rate() -> None:
    delta = np.array([3.0, -0.5, 0.0, 1e-3], np.float32)
    optimizer, model = make("adam", 4, epsilon=1e-6), np.zeros(4, np.float32)
    for _ in range(3000):
        before = model.copy()
        optimizer.step(before, delta, model)
    np.testing.assert_allclose(model - before, [-0.1, 0.1, 0.0, -0.1], rtol=5e-3)


def test_adam_stays_finite_where_squares_underflow_and_where_all_is_zero() -> None:
    delta = np.array([0.0, 1e-30, -1e-30, 1e-10], np.float32)
    optimizer = make("adam", 4, epsilon=1e-30)
    start = np.ones(4, np.float32)
    after = run(optimizer, start, np.tile(delta, (3, 1)))
    assert np.isfinite(after).all()
    assert after[0] == 1


@KINDS
def test_out_may_be_either_input(kind: str) -> None:
    start, delta = vectors(6, 2)
    expected = run(make(kind), start, delta[None])
    model = start.copy()
    make(kind).step(model, delta, model)
    assert np.array_equal(model, expected)
    out = delta.copy()
    make(kind).step(start, out, out)
    assert np.array_equal(out, expected)


@KINDS
def test_inputs_stay_as_they_are(kind: str) -> None:
    start, delta = vectors(7, 2)
    kept = start.copy(), delta.copy()
    optimizer, out = make(kind), np.empty_like(start)
    for _ in range(2):
        optimizer.step(start, delta, out)
    assert np.array_equal(start, kept[0])
    assert np.array_equal(delta, kept[1])


@KINDS
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_restored_optimizer_goes_on_bitwise(kind: str, after: int) -> None:
    start, *deltas = vectors(8, 6)
    values = np.array(deltas)
    expected = run(make(kind), start, values)
    first = make(kind)
    model = run(first, start, values[:after])
    state = first.state()
    # What was saved is not what goes on changing.
    run(first, model, values)
    second = make(kind)
    run(second, start, values[:2])
    second.restore(state)
    assert np.array_equal(run(second, model, values[after:]), expected)


def test_states_have_names_and_single_precision() -> None:
    names: dict[str, set[str]] = {
        "sgd": set(),
        "momentum": {"velocity"},
        "adam": {"first", "second"},
    }
    for kind, expected in names.items():
        state = make(kind).state()
        assert set(state) == expected
        assert all((v.shape, v.dtype) == ((SIZE,), np.float32) for v in state.values())


def test_state_of_another_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="state of another optimiser"):
        make("adam").restore(make("momentum").state())
    with pytest.raises(ValueError, match="state of another optimiser"):
        make("momentum").restore(make("momentum", SIZE - 1).state())
    with pytest.raises(ValueError, match="state of another optimiser"):
        make("sgd").restore(make("adam").state())


@KINDS
def test_vectors_of_another_length_are_refused(kind: str) -> None:
    optimizer, right = make(kind, 5), np.zeros(5, np.float32)
    for place in range(3):
        given_vectors = [right, right, right]
        given_vectors[place] = np.zeros(6, np.float32)
        with pytest.raises(ValueError, match="three vectors of length 5"):
            optimizer.step(*given_vectors)


def test_unknown_kind() -> None:
    with pytest.raises(UserError, match=r"^federation\.server\.optimizer: unknown kind 'adm'; did"):
        make("adm")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("sgd", {"learning_rate": 0.0}, "learning_rate: 0.0"),
        ("sgd", {"learning_rate": float("inf")}, "learning_rate: inf"),
        ("momentum", {"momentum": 1.0}, "momentum: 1.0"),
        ("adam", {"beta1": -0.1}, "beta1: -0.1"),
        ("adam", {"beta2": float("nan")}, "beta2: nan"),
        ("adam", {"epsilon": 0.0}, "epsilon: 0.0"),
        ("adam", {"epsilon": 1e-60}, "epsilon: 1e-60"),
    ],
)
def test_numbers_out_of_range(kind: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}; expected"):
        make(kind, **values)
    assert make("sgd", momentum=5.0, beta1=5.0, epsilon=0.0) is not None
