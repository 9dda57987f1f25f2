"""A client's defences one after the other: what is sent, what is kept back, and what that takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from last_layers import BUFFERS, SEEDS, layout, layouts, normal, rng_of

from testbed.defenses import make_defense
from testbed.defenses.pipeline import Draws, Pipeline
from testbed.defenses.quantised import SignSGD
from testbed.defenses.sparse import TopK

Spec = Mapping[str, Any]
THETAS = st.sampled_from([0.0, 0.3, 0.9, 0.99])
SCOPES = st.sampled_from(["update", "tensor"])
SPARSE: Sequence[Spec] = (
    {"name": "top_k"},
    {"name": "random_k"},
    {"name": "dgc"},
)
QUANTISED: Sequence[Spec] = (
    {"name": "signsgd"},
    {"name": "qsgd", "levels": 1},
    {"name": "qsgd", "levels": 300},
    {"name": "terngrad"},
    {"name": "float16"},
)
WITHHOLD: Spec = {"name": "withhold_last_layer"}


def pipeline_of(tensors, *specs: Spec, buffers=BUFFERS):
    made = [
        make_defense(spec["name"], {k: v for k, v in spec.items() if k != "name"}) for spec in specs
    ]
    return Pipeline(made, tensors, buffers)


def draws(round_=0, client=0):
    return Draws(5, (0, round_, client))


def send(pipeline, vector, state, round_=0, buffers=None):
    """Pack a vector; return its bytes, and what the server decodes."""
    buffers = np.zeros(BUFFERS, np.float32) if buffers is None else buffers
    body = np.full(pipeline.capacity, 0xA5, np.uint8)
    vector = vector.copy()
    used = pipeline.pack(vector, buffers, body, draws(round_), state)
    out = np.full(len(vector) + len(buffers), np.nan, np.float32)
    pipeline.unpack(body[:used], out)
    return body[:used], out


def integers(seed, size, largest=50):
    """Return whole numbers, of which sums are exact, many of them equal and many 0."""
    return rng_of(seed).integers(-largest, largest + 1, size).astype(np.float32)


# Error feedback


@settings(max_examples=60)
@given(layouts(), SEEDS, st.sampled_from(SPARSE), THETAS, SCOPES, st.integers(1, 6), st.booleans())
def test_what_was_sent_and_what_is_left_are_all_gradients_to_the_bit(
    tensors, seed, spec, theta, scope, rounds, withheld
):
    own = {**spec, "theta": theta, "scope": scope, "error_feedback": True}
    pipeline = pipeline_of(tensors, *[WITHHOLD] * withheld, own)
    state, total, arrived = {}, np.zeros(tensors.size), np.zeros(tensors.size)
    for number in range(rounds):
        gradient = integers(seed + number, tensors.size)
        total += gradient
        arrived += send(pipeline, gradient, state, number)[1][:-BUFFERS]
        if withheld:
            total[tensors.weight] = 0
            if tensors.bias is not None:
                total[tensors.bias] = 0
        np.testing.assert_array_equal(arrived + state["residual"], total)


@settings(max_examples=60)
@given(
    layouts(),
    SEEDS,
    st.sampled_from(QUANTISED),
    st.none() | st.sampled_from(["top_k", "dgc"]),
    SCOPES,
    st.integers(1, 6),
)
def test_what_quantising_loses_is_left(tensors, seed, spec, sparse, scope, rounds):
    before = [{"name": sparse, "theta": 0.5, "scope": scope}] if sparse else []
    pipeline = pipeline_of(tensors, *before, {**spec, "scope": scope, "error_feedback": True})
    state, total, arrived = {}, np.zeros(tensors.size), np.zeros(tensors.size)
    largest = 0.0
    for number in range(rounds):
        gradient = normal(seed + number, tensors.size)
        total += gradient
        arrived += send(pipeline, gradient, state, number)[1][:-BUFFERS]
        largest = max(largest, float(np.abs(state["residual"]).max()), float(np.abs(arrived).max()))
        np.testing.assert_allclose(
            arrived + state["residual"], total, atol=1e-6 * (number + 1) * (1 + largest)
        )


@settings(max_examples=60)
@given(layouts(), SEEDS, st.sampled_from([0.3, 0.9]), st.sampled_from([0.5, 0.9]), SCOPES)
def test_momentum_is_that_of_deep_gradient_compression(tensors, seed, theta, momentum, scope):
    """Lin et al. 2018, algorithm 1 with momentum correction and factor masking."""
    spec = {"name": "dgc", "theta": theta, "momentum": momentum, "scope": scope}
    pipeline, state = pipeline_of(tensors, spec), {}
    u, v = np.zeros(tensors.size, np.float32), np.zeros(tensors.size, np.float32)
    for number in range(5):
        gradient = normal(seed + number, tensors.size)
        u = np.float32(momentum) * u + gradient
        v = v + u
        chosen = TopK(theta=theta, scope=scope).select(v, tensors, rng_of(0))
        expected = np.zeros_like(v)
        expected[chosen] = v[chosen]
        v[chosen] = 0
        u[chosen] = 0
        sent = send(pipeline, gradient, state, number)[1][:-BUFFERS]
        np.testing.assert_allclose(sent, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state["residual"], v, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state["momentum"], u, rtol=1e-5, atol=1e-5)


def test_a_residual_is_of_use_what_was_small_is_sent_in_the_end():
    tensors = layout()
    gradient = np.linspace(0.5, 1, tensors.size).astype(np.float32)
    plain = pipeline_of(tensors, {"name": "top_k", "theta": 0.9})
    patient = pipeline_of(tensors, {"name": "top_k", "theta": 0.9, "error_feedback": True})
    shown = {}
    for name, pipeline in (("plain", plain), ("patient", patient)):
        state = {}
        rounds = [send(pipeline, gradient, state, n)[1][:-BUFFERS] for n in range(25)]
        shown[name] = np.count_nonzero(np.sum(rounds, axis=0))
    assert shown["plain"] == round(0.1 * tensors.size)
    assert shown["patient"] == tensors.size


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_is_not_finite_spoils_no_memory(value):
    tensors = layout()
    pipeline = pipeline_of(tensors, {"name": "dgc", "theta": 0.9, "momentum": 0.5})
    state = {}
    send(pipeline, normal(1, tensors.size), state)
    before = {name: values.copy() for name, values in state.items()}
    broken = normal(2, tensors.size)
    broken[4] = value
    _, out = send(pipeline, broken, state, 1)
    np.testing.assert_array_equal(out[:-BUFFERS], broken)
    assert state.keys() == before.keys() == {"residual", "momentum"}
    for name, values in before.items():
        np.testing.assert_array_equal(state[name], values)


def test_without_error_feedback_nothing_is_remembered():
    tensors, state = layout(), {}
    for number, specs in enumerate([SPARSE[:1], SPARSE[1:2], QUANTISED[:1], QUANTISED[1:2]]):
        spec = {**specs[0], **({"theta": 0.9} if specs[0] in SPARSE else {})}
        send(pipeline_of(tensors, spec), normal(number, tensors.size), state)
    assert state == {}


# The wire


def coded(kind: Spec, count: int, parts: int) -> int:
    """Return the bytes of the values, by the description of the encoding."""

    def padded(bits):
        return -(-bits // 32) * 4

    if kind["name"] == "float16":
        return padded(16 * count)
    if kind["name"] == "signsgd":
        return 4 * parts + padded(count)
    levels = kind.get("levels", 1)
    width = int(np.ceil(np.log2(2 * levels + 1)))
    planes = [8] * (width // 8) + [width % 8] * bool(width % 8)
    return 4 * parts + sum(padded(plane * count) for plane in planes)


@settings(max_examples=80)
@given(layouts(), SEEDS, st.none() | st.sampled_from(QUANTISED), st.none() | THETAS, SCOPES)
def test_bytes_are_those_that_the_encoding_predicts(tensors, seed, quantiser, theta, scope):
    specs = []
    if theta is not None:
        specs.append({"name": "top_k", "theta": theta})
    if quantiser is not None:
        specs.append({**quantiser, "scope": scope})
    if not specs:
        specs.append({"name": "top_k", "theta": 0.0})
    pipeline = pipeline_of(tensors, *specs)
    assert pipeline.compresses
    body, _ = send(pipeline, normal(seed, tensors.size), {})
    size, count = tensors.size, tensors.size
    places = 0
    if theta is not None:
        count = max(round((1 - theta) * size), 1)
        if count < size:
            places = min(4 * count, -(-size // 32) * 4)
    parts = len(tensors.names) if scope == "tensor" else 1
    values = 4 * count if quantiser is None else coded(quantiser, count, parts)
    assert len(body) == 16 + places + values + 4 * BUFFERS
    assert len(body) <= pipeline.capacity


@settings(max_examples=40)
@given(layouts(), SEEDS, st.sampled_from(QUANTISED), THETAS)
def test_statistics_pass_as_they_are(tensors, seed, quantiser, theta):
    pipeline = pipeline_of(tensors, {"name": "top_k", "theta": theta}, quantiser)
    buffers = normal(seed + 1, BUFFERS)
    _, out = send(pipeline, normal(seed, tensors.size), {}, buffers=buffers)
    np.testing.assert_array_equal(out[-BUFFERS:], buffers)


def test_a_quantiser_behind_a_sparsifier_sees_what_is_sent():
    tensors = layout()
    vector = normal(3, tensors.size)
    pipeline = pipeline_of(tensors, {"name": "top_k", "theta": 0.75}, {"name": "signsgd"})
    _, out = send(pipeline, vector, {})
    chosen = TopK(theta=0.75).select(vector, tensors, rng_of(0))
    levels = SignSGD().quantise(vector[chosen], np.array([0, len(chosen)]), rng_of(0))
    expected = np.zeros_like(vector)
    expected[chosen] = levels.scales[0] * levels.codes
    np.testing.assert_array_equal(out[:-BUFFERS], expected)
    assert levels.scales[0] > 1.2 * np.abs(vector).mean()


def test_two_sparsifiers_send_what_both_choose_of_what_the_first_left():
    tensors = layout()
    vector = normal(4, tensors.size)
    pipeline = pipeline_of(
        tensors, {"name": "threshold", "threshold": 0.5}, {"name": "gradient_dropout", "p": 0.5}
    )
    _, out = send(pipeline, vector, {})
    there = np.flatnonzero(out[:-BUFFERS])
    assert (np.abs(vector[there]) >= 0.5).all()
    assert 0.2 < len(there) / np.count_nonzero(np.abs(vector) >= 0.5) < 0.8
    np.testing.assert_array_equal(out[there], vector[there])


@pytest.mark.parametrize("name", ["random_k", "gradient_dropout"])
def test_rescaled_entries_are_right_on_average(name):
    tensors = layout()
    vector = normal(5, tensors.size)
    option = {"theta": 0.5, "unbiased": True} if name == "random_k" else {"p": 0.5, "rescale": True}
    pipeline = pipeline_of(tensors, {"name": name, **option})
    sent = [send(pipeline, vector, {}, number)[1][:-BUFFERS] for number in range(2000)]
    # Each entry is sent or not, doubled: the deviation is its own magnitude.
    assert (np.abs(np.mean(sent, axis=0) - vector) < 6 * np.abs(vector) / np.sqrt(2000)).all()
    assert set(np.unique(np.abs(np.array(sent) / vector).round(4))) == {0.0, 2.0}


# What is withheld


@settings(max_examples=60)
@given(
    layouts().filter(lambda tensors: len(tensors.names) > 2),
    SEEDS,
    st.none() | st.sampled_from([*QUANTISED, *SPARSE]),
    st.booleans(),
    SCOPES,
)
def test_bytes_do_not_depend_on_a_head_that_is_withheld(tensors, seed, more, feedback, scope):
    specs = [WITHHOLD]
    if more is not None:
        knobs = {"theta": 0.5} if more in SPARSE else {}
        feedback = feedback or more["name"] == "dgc"
        specs.append({**more, **knobs, "scope": scope, "error_feedback": feedback})
    head = np.zeros(tensors.size, bool)
    head[tensors.weight] = True
    if tensors.bias is not None:
        head[tensors.bias] = True
    pipelines = [pipeline_of(tensors, *specs) for _ in range(2)]
    states = [{}, {}]
    for number in range(3):
        one = normal(seed + number, tensors.size)
        other = np.where(head, 100 * normal(seed + 99, tensors.size), one)
        bodies, decoded = zip(
            *(
                send(pipeline, vector, state, number)
                for pipeline, vector, state in zip(pipelines, (one, other), states, strict=True)
            ),
            strict=True,
        )
        np.testing.assert_array_equal(bodies[0], bodies[1])
        assert (decoded[0][:-BUFFERS][head] == 0).all()
        assert np.count_nonzero(decoded[0][:-BUFFERS]) > 0
    if more is None:
        places = min(4 * np.count_nonzero(~head), -(-tensors.size // 32) * 4)
        assert len(bodies[0]) == 16 + places + 4 * np.count_nonzero(~head) + 4 * BUFFERS


# Steps, updates, sums


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "clip", "bound": 0.5},
        {"name": "noise", "sigma": 0.1},
        {"name": "top_k", "theta": 0.9},
        {"name": "qsgd", "levels": 2},
    ],
)
def test_a_defence_works_on_steps_or_on_the_update_and_not_on_both(spec):
    tensors = layout()
    changed = {}
    for at in ("step", "update"):
        pipeline = pipeline_of(tensors, {**spec, "at": at})
        step, update = normal(6, tensors.size), normal(6, tensors.size)
        pipeline.defend_step(step, draws(), 0)
        pipeline.defend_update(update, draws(), {})
        if pipeline.compresses:
            update = send(pipeline, update, {})[1][:-BUFFERS]
        same = [np.array_equal(vector, normal(6, tensors.size)) for vector in (step, update)]
        changed[at] = [not one for one in same]
        assert pipeline.each_step == (at == "step")
    assert changed == {"step": [True, False], "update": [False, True]}


def test_defences_are_applied_in_the_order_of_the_list_with_draws_of_their_own():
    tensors = layout()
    specs = [
        {"name": "clip", "bound": 0.5},
        {"name": "noise", "sigma": 0.1},
        {"name": "noise", "sigma": 0.1},
    ]
    vector = normal(7, tensors.size)
    pipeline_of(tensors, *specs).defend_update(vector, draws(), {})
    expected = normal(7, tensors.size)
    for place, spec in enumerate(specs):
        defense = make_defense(spec["name"], {k: v for k, v in spec.items() if k != "name"})
        defense.apply(expected, tensors, draws().stream(place, -1))
    np.testing.assert_array_equal(vector, expected)
    noise = [draws().stream(place, -1).random(4) for place in (1, 2)]
    assert not np.array_equal(*noise)
    # Neither are those of a step the update's, nor those of another client or round.
    for other in (
        draws().stream(1, 0),
        draws(round_=1).stream(1, -1),
        draws(client=1).stream(1, -1),
    ):
        assert not np.array_equal(other.random(4), noise[0])


def test_label_defences_compose_and_leave_the_labels_alone_where_there_are_none():
    tensors = layout()
    labels = np.array([0, 1, 3, 3])
    none = pipeline_of(tensors, {"name": "clip", "bound": 1.0})
    assert none.targets(labels, np.arange(4), draws(), 0) is None
    specs = [{"name": "label_smoothing", "epsilon": 0.2}, {"name": "mixup", "alpha": 1.0}]
    targets = pipeline_of(tensors, *specs).targets(labels, np.arange(4), draws(), 0)
    smooth = np.full((4, 4), 0.05, np.float32)
    smooth[np.arange(4), labels] = 0.85
    share = targets.share[:, None]
    mixed = share * smooth + (1 - share) * smooth[targets.partner]
    np.testing.assert_allclose(targets.probabilities, mixed, atol=1e-6)
    assert labels.tolist() == [0, 1, 3, 3]


@settings(max_examples=40)
@given(layouts(), SEEDS, st.sampled_from([*SPARSE, *QUANTISED]), st.booleans())
def test_an_update_for_a_sum_is_the_one_that_would_be_sent(tensors, seed, spec, withheld):
    """It is compressed in value, and has all entries."""
    knobs = {"theta": 0.5} if spec in SPARSE else {}
    specs = [*[WITHHOLD] * withheld, {**spec, **knobs, "error_feedback": True}]
    single = pipeline_of(tensors, *specs)
    summed = pipeline_of(tensors, *specs, {"name": "secure_aggregation"})
    assert single.compresses
    assert not summed.compresses
    alone, together = {}, {}
    for number in range(3):
        vector = normal(seed + number, tensors.size)
        expected = send(single, vector, alone, number)[1][:-BUFFERS]
        summed.defend_update(vector, draws(number), together)
        np.testing.assert_array_equal(vector, expected)
        np.testing.assert_array_equal(alone["residual"], together["residual"])
