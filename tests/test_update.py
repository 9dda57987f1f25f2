"""The message on the wire, and where the last layer lies in an update."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from testbed.update import Message, UpdateLayout, zeros


@st.composite
def layouts(draw: st.DrawFn) -> UpdateLayout:
    classes, features = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    before, between, after = (draw(st.integers(0, 30)) for _ in range(3))
    has_bias, bias_first = draw(st.booleans()), draw(st.booleans())
    size = classes * features
    weight = before + (classes + between if bias_first else 0)
    bias = before if bias_first else before + size + between
    return UpdateLayout(
        parameters=before + size + between + classes + after,
        buffers=draw(st.integers(0, 30)),
        classes=classes,
        features=features,
        weight=weight,
        bias=bias if has_bias else None,
    )


def parts_of(message: Message) -> list[NDArray[np.uint8]]:
    header = np.frombuffer(message.header.data, np.uint8)
    return [header, *(array.view(np.uint8) for array in fields_of(message))]


def fields_of(message: Message) -> list[NDArray[np.generic]]:
    return [message.counts, message.posterior, message.payload]


def start_of(message: Message, part: NDArray[np.uint8]) -> int:
    return part.__array_interface__["data"][0] - message.buffer.__array_interface__["data"][0]  # type: ignore[no-any-return]


@given(layouts())
def test_parts_are_aligned_and_apart_and_fill_the_message(layout: UpdateLayout) -> None:
    message = Message(layout)
    parts = parts_of(message)
    starts = [start_of(message, part) for part in parts]
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert all(start % 64 == 0 for start in starts)
    ends = [start + part.nbytes for start, part in zip(starts, parts, strict=True)]
    gaps = [
        after - end for end, after in zip(ends, [*starts[1:], message.buffer.nbytes], strict=True)
    ]
    assert all(0 <= gap < 64 for gap in gaps)
    # MPI sends 32-bit items.
    assert message.buffer.nbytes % 4 == 0


@given(layouts())
def test_parts_have_the_shapes_of_the_layout(layout: UpdateLayout) -> None:
    message = Message(layout)
    kinds = [(array.dtype.str, array.shape) for array in fields_of(message)]
    classes = (layout.classes,)
    assert kinds == [("<i4", classes), ("<f4", classes), ("<f4", (layout.size,))]
    assert layout.size == layout.parameters + layout.buffers


@given(layouts(), st.integers(0, 2**32 - 1))
def test_a_message_is_its_bytes(layout: UpdateLayout, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sent, received = Message(layout), Message(layout)
    values: dict[str, float] = {
        "scenario": 1,
        "round": 2**31 - 1,
        "client": 3,
        "identity": 4,
        "rank": 5,
        "steps": 6,
        "labels": 2**40 + 1,
        "clipped": 2**40 + 2,
    }
    values |= {"weight": 7.5, "loss": 0.1, "accuracy": 0.25, "seconds": 1e-9}
    values["payload_bytes"] = 2**40
    for name, value in values.items():
        sent.header[name] = value
    sent.counts[:] = rng.integers(-(2**31), 2**31, size=layout.classes)
    sent.posterior[:] = rng.random(layout.classes)
    sent.payload[:] = rng.normal(size=layout.size)
    received.buffer[:] = np.frombuffer(sent.buffer.tobytes(), np.uint8)
    assert {name: received.header[name].item() for name in values} == values
    for one, other in zip(fields_of(sent), fields_of(received), strict=True):
        np.testing.assert_array_equal(one, other)


def test_memory_is_allocated_once_and_as_asked() -> None:
    asked: list[int] = []

    def allocate(size: int) -> NDArray[np.uint8]:
        asked.append(size)
        return zeros(size)

    layout = UpdateLayout(parameters=10, buffers=3, classes=2, features=4, weight=0, bias=8)
    message = Message(layout, allocate)
    assert asked == [message.buffer.nbytes]
    # header 128 of 80 bytes, counts and posterior 64 of 8 bytes each, payload 64 of 52 bytes.
    assert asked == [320]


@given(layouts(), st.integers(1, 300), st.data())
def test_what_is_sent_ends_with_the_update(
    layout: UpdateLayout, capacity: int, data: st.DataObject
) -> None:
    message = Message(layout, capacity=capacity)
    assert message.body.nbytes == capacity
    taken = data.draw(st.integers(0, capacity))
    message.header["payload_bytes"] = taken
    assert message.used == start_of(message, message.body) + taken
    assert message.used <= message.buffer.nbytes
    message.buffer[: message.used] = 1
    assert (message.body[:taken] == 1).all()
    assert not message.body[taken:].any()


@given(layouts())
def test_a_plain_update_takes_all_of_its_body(layout: UpdateLayout) -> None:
    message = Message(layout)
    message.payload[:] = 1
    np.testing.assert_array_equal(message.body.view(np.float32), np.ones(layout.size))


@given(layouts())
def test_last_layer_is_a_view_of_its_place(layout: UpdateLayout) -> None:
    flat = np.arange(layout.size, dtype=np.float32)
    weight, bias = layout.weight_gradient(flat), layout.bias_gradient(flat)
    assert weight.shape == (layout.classes, layout.features)
    expected = layout.weight + np.arange(layout.classes * layout.features, dtype=np.float32)
    np.testing.assert_array_equal(weight.ravel(), expected)
    assert np.shares_memory(weight, flat)
    if layout.bias is None:
        assert bias is None
    else:
        assert bias is not None
        np.testing.assert_array_equal(bias, layout.bias + np.arange(layout.classes))
        assert np.shares_memory(bias, flat)
        assert not np.shares_memory(bias, weight)
