"""Encoded updates: exact round trips, exact numbers of bytes, and no harm from damaged ones."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from testbed.bit_packing import pack_bits, planes, unpack_bits
from testbed.defenses import Levels, Tensors
from testbed.encoding import Encoding, decoded

SEEDS = st.integers(0, 2**32 - 1)
HEADER = 16


def tensors_of(sizes):
    offsets = np.cumsum([0, *sizes])
    names = tuple(f"t{i}" for i in range(len(sizes)))
    return Tensors(names, offsets, slice(0, int(offsets[1])), None, 1)


def rng_of(seed):
    return np.random.Generator(np.random.PCG64(seed))


def padded(size):
    return -(-size // 4) * 4


def encode(encoding, positions, values, bounds, buffers):
    """Return the encoded bytes; what lies behind them in the buffer has to stay as it was."""
    out = np.full(encoding.capacity + 8, 0xAB, np.uint8)
    used = encoding.encode(out, positions=positions, values=values, bounds=bounds, buffers=buffers)
    assert used % 4 == 0
    assert used <= encoding.capacity
    assert (out[used:] == 0xAB).all()
    return out[:used].copy()


def decode(encoding, data):
    out = np.full(encoding.tensors.size + encoding.buffers, 7, np.float32)
    encoding.decode(data, out)
    return out


@st.composite
def sent(draw):
    """Draw what a client sends: encoding, positions, values, bounds and buffers."""
    rng = rng_of(draw(SEEDS))
    sizes = draw(st.lists(st.integers(0, 70), min_size=1, max_size=5).filter(sum))
    tensors = tensors_of(sizes)
    size = tensors.size
    positions = None
    if draw(st.booleans()):
        number = draw(st.integers(0, size) | st.sampled_from([0, 1, size]))
        number = min(number, size)
        positions = np.sort(rng.choice(size, number, replace=False)).astype(np.int64)
    count = size if positions is None else len(positions)
    whole = draw(st.booleans())
    bounds = tensors.bounds("update" if whole else "tensor")
    if positions is not None:
        bounds = np.searchsorted(positions, bounds)
    kind = draw(st.sampled_from(["float32", "float16", "levels", "signs"]))
    bits = rng.integers(2**32, size=count, dtype=np.uint32)
    if kind == "float32":
        values = bits.view(np.float32)
    elif kind == "float16":
        values = bits.astype(np.uint16).view(np.float16)
    else:
        # Largest magnitudes of which products stay finite, NaN, and 0.
        scales = rng.choice(np.float32([0, 1e-45, 1e-3, 2.5, 1e30, np.nan]), len(bounds) - 1)
        if kind == "signs":
            values = Levels(1, scales, rng.choice(np.int32([-1, 1]), count), signs_only=True)
        else:
            levels = draw(st.integers(1, 300) | st.sampled_from([32767, 1 << 24]))
            codes = rng.integers(-levels, levels, count, dtype=np.int32, endpoint=True)
            values = Levels(levels, scales, codes)
    buffers = rng.normal(size=draw(st.integers(0, 5))).astype(np.float32)
    return Encoding(tensors, len(buffers)), positions, values, bounds, buffers


# What the wire does to values


@given(sent())
def test_what_is_decoded_is_bit_by_bit_what_the_values_stand_for(given_):
    encoding, positions, values, bounds, buffers = given_
    dense = decode(encoding, encode(*given_))
    expected = np.zeros(encoding.tensors.size, np.float32)
    expected[slice(None) if positions is None else positions] = decoded(values, bounds)
    np.testing.assert_array_equal(dense[: len(expected)].view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(dense[len(expected) :], buffers)


def test_levels_stand_for_scale_times_code_by_the_number_of_levels_in_float32():
    scales = np.float32([0.3, 7.1])
    codes = np.int32([3, -2, 0, 1])
    found = decoded(Levels(7, scales, codes), np.array([0, 2, 4]))
    expected = [np.float32(s) * np.float32(c) / np.float32(7) for s, c in
                zip([*scales[[0, 0, 1, 1]]], codes, strict=True)]  # fmt: skip
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_half_precision_arrives_exactly():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    encoding = Encoding(tensors_of([1 << 16]), 0)
    data = encode(encoding, None, every, np.array([0, 1 << 16]), np.zeros(0, np.float32))
    np.testing.assert_array_equal(decode(encoding, data), every.astype(np.float32))


# How many bytes it takes


def values_of(kind, count):
    if kind == "float32":
        return np.ones(count, np.float32)
    if kind == "float16":
        return np.ones(count, np.float16)
    levels = 1 if kind == "signs" else kind
    return Levels(levels, np.ones(1, np.float32), np.ones(count, np.int32), kind == "signs")


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000])
@pytest.mark.parametrize("buffers", [0, 3])
@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        ("float32", 32),
        ("float16", 16),
        ("signs", 1),
        (1, 2),
        (2, 3),
        (3, 3),
        (4, 4),
        (7, 4),
        (8, 5),
        (127, 8),
    ],
)
def test_values_take_their_bits_and_no_more(size, buffers, kind, bits):
    encoding = Encoding(tensors_of([size]), buffers)
    values = values_of(kind, size)
    data = encode(encoding, None, values, np.array([0, size]), np.zeros(buffers, np.float32))
    scale = 0 if str(kind).startswith("float") else 4
    assert len(data) == HEADER + scale + padded(-(-size * bits // 8)) + 4 * buffers
    if not isinstance(kind, str):
        assert bits == int(np.ceil(np.log2(2 * kind + 1)))


@pytest.mark.parametrize(("levels", "high"), [(128, 1), (300, 2), (32767, 8)])
def test_codes_of_more_than_8_bits_take_two_planes(levels, high):
    encoding = Encoding(tensors_of([1001]), 0)
    data = encode(
        encoding, None, values_of(levels, 1001), np.array([0, 1001]), np.zeros(0, np.float32)
    )
    assert len(data) == HEADER + 4 + padded(1001) + padded(-(-1001 * high // 8))


@pytest.mark.parametrize("size", [64, 1000])
def test_positions_are_a_list_or_a_bitmap_whichever_is_shorter(size):
    encoding = Encoding(tensors_of([size]), 0)
    bitmap = padded(-(-size // 8))
    for count in (0, 1, bitmap // 4, bitmap // 4 + 1, size - 1):
        positions = np.arange(count)
        values = np.ones(count, np.float32)
        data = encode(encoding, positions, values, np.array([0, count]), np.zeros(0, np.float32))
        assert len(data) == HEADER + min(4 * count, bitmap) + 4 * count


def test_all_positions_take_nothing():
    encoding = Encoding(tensors_of([50]), 0)
    values, none = np.arange(50, dtype=np.float32), np.zeros(0, np.float32)
    bounds = np.array([0, 50])
    named = encode(encoding, np.arange(50), values, bounds, none)
    assert len(named) == HEADER + 200
    np.testing.assert_array_equal(named, encode(encoding, None, values, bounds, none))


def test_each_tensor_has_a_scale_of_its_own_even_if_nothing_of_it_is_sent():
    tensors = tensors_of([3, 0, 4])
    encoding = Encoding(tensors, 0)
    positions = np.array([1, 2])
    bounds = np.searchsorted(positions, tensors.offsets)
    assert bounds.tolist() == [0, 2, 2, 2]
    values = Levels(1, np.float32([0.5, 1, 2]), np.int32([1, -1]))
    data = encode(encoding, positions, values, bounds, np.zeros(0, np.float32))
    assert len(data) == HEADER + 4 + 3 * 4 + 4
    assert decode(encoding, data).tolist() == [0, 0.5, -0.5, 0, 0, 0, 0]


def test_capacity_is_enough_for_the_longest_and_little_more():
    """A bitmap but for one entry, float32 values, and buffers."""
    tensors = tensors_of([999, 1])
    encoding = Encoding(tensors, 9)
    data = encode(
        encoding,
        np.arange(1, 1000),
        np.ones(999, np.float32),
        np.array([0, 999]),
        np.zeros(9, np.float32),
    )
    assert len(data) <= encoding.capacity <= len(data) + 30


def test_the_layout_of_bytes_is_as_documented():
    encoding = Encoding(tensors_of([40]), 1)
    values = Levels(2, np.float32([1.5]), np.int32([-2, 0, 2]))
    data = encode(encoding, np.array([1, 8, 39]), values, np.array([0, 3]), np.ones(1, np.float32))
    # Bitmap, levels, 3 values, 1 scale, 2 levels; codes 0, 2, 4 in three bits each.
    assert data.tobytes() == b"".join(
        [
            bytes([2, 2, 0, 0]) + (3).to_bytes(4, "little"),
            (1).to_bytes(4, "little") + (2).to_bytes(4, "little"),
            bytes([0b10, 0b1, 0, 0, 0b10000000, 0, 0, 0]),
            np.float32(1.5).tobytes(),
            (0b100_010_000).to_bytes(4, "little"),
            np.float32(1).tobytes(),
        ]
    )


# What does not fit is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": np.array([2, 1])}, "ascend"),
        ({"positions": np.array([1, 1])}, "ascend"),
        ({"positions": np.array([-1, 1])}, "ascend"),
        ({"positions": np.array([1, 10])}, "ascend"),
        ({"positions": np.array([1])}, "positions"),
        ({"positions": None}, "positions"),
        ({"bounds": np.array([0, 1, 2])}, "parts"),
        ({"buffers": np.zeros(2, np.float32)}, "buffers"),
        ({"values": Levels(2, np.ones(1, np.float32), np.int32([1, 3]))}, "codes"),
        ({"values": Levels(0, np.ones(1, np.float32), np.int32([0, 0]))}, "levels"),
        ({"values": Levels(1 << 25, np.ones(1, np.float32), np.int32([0, 0]))}, "levels"),
        ({"values": Levels(1, np.ones(1, np.float32), np.int32([0, 1]), True)}, "signs"),
        ({"values": Levels(2, np.ones(1, np.float32), np.int32([1, 1]), True)}, "levels"),
        ({"values": Levels(1, np.ones(3, np.float32), np.int32([1, 1]))}, "scales"),
        ({"out": np.zeros(27, np.uint8)}, "room"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_not_encoded(change, message):
    encoding = Encoding(tensors_of([4, 6]), 1)
    arguments = {
        "out": np.zeros(100, np.uint8),
        "positions": np.array([1, 2]),
        "values": Levels(2, np.ones(1, np.float32), np.int32([1, -2])),
        "bounds": np.array([0, 2]),
        "buffers": np.zeros(1, np.float32),
    }
    assert encoding.encode(**arguments) == HEADER + 4 + 4 + 4 + 4
    arguments |= change
    with pytest.raises(ValueError, match=message):
        encoding.encode(arguments.pop("out"), **arguments)


@given(sent(), st.data())
def test_damaged_data_are_decoded_to_something_or_refused_and_then_nothing_is_written(given_, data):
    encoding = given_[0]
    damaged = encode(*given_)
    for _ in range(data.draw(st.integers(1, 3))):
        # The header is hit as often as all the rest.
        last = data.draw(st.sampled_from([HEADER, len(damaged)]))
        damaged[data.draw(st.integers(0, last - 1))] = data.draw(st.integers(0, 255))
    out = np.full(encoding.tensors.size + encoding.buffers, 7, np.float32)
    try:
        encoding.decode(damaged, out)
    except ValueError:
        assert (out == 7).all()


@given(sent(), st.data())
def test_data_of_another_length_are_refused(given_, data):
    encoding, encoded = given_[0], encode(*given_)
    length = data.draw(st.integers(0, len(encoded) - 1))
    longer = np.concatenate([encoded, np.zeros(data.draw(st.integers(1, 9)), np.uint8)])
    for other in (encoded[:length], longer):
        with pytest.raises(ValueError, match="encoded update"):
            decode(encoding, other)


@given(st.binary(max_size=80))
@example(bytes(16))
def test_noise_is_decoded_to_something_or_refused(noise):
    encoding = Encoding(tensors_of([3, 5]), 2)
    out = np.full(10, 7, np.float32)
    try:
        encoding.decode(np.frombuffer(noise, np.uint8), out)
    except ValueError:
        assert (out == 7).all()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 3, "positions"),
        (1, 4, "kind"),
        (1, 0, "kind"),
        (2, 1, "header"),
        (4, 41, "header"),
        (4, 2, "positions"),
        (4, 4, "positions"),
        (8, 0, "kind"),
        (8, 2, "scales|ends"),
        (12, 0, "levels"),
        (15, 1, "levels"),
        (16, 0b110, "positions"),
        (28, 0xFF, "codes"),
    ],
)
def test_each_damage_is_found(place, value, message):
    encoding = Encoding(tensors_of([40]), 1)
    values = Levels(2, np.float32([1.5]), np.int32([-2, 0, 2]))
    data = encode(encoding, np.array([1, 8, 39]), values, np.array([0, 3]), np.ones(1, np.float32))
    assert data[place] != value
    data[place] = value
    with pytest.raises(ValueError, match=message):
        decode(encoding, data)


@pytest.mark.parametrize("positions", [[0, 40], [5, 5], [6, 5]])
def test_positions_in_a_list_are_checked(positions):
    encoding = Encoding(tensors_of([100]), 0)
    data = encode(
        encoding,
        np.array([1, 2]),
        np.ones(2, np.float32),
        np.array([0, 2]),
        np.zeros(0, np.float32),
    )
    data[HEADER : HEADER + 8] = np.array(positions, "<u4").view(np.uint8)
    if positions == [0, 40]:
        assert np.flatnonzero(decode(encoding, data)).tolist() == positions
    else:
        with pytest.raises(ValueError, match="positions"):
            decode(encoding, data)


def test_bits_behind_the_last_position_are_checked():
    encoding = Encoding(tensors_of([9]), 0)
    data = encode(
        encoding, np.arange(8), np.ones(8, np.float32), np.array([0, 8]), np.zeros(0, np.float32)
    )
    data[HEADER] = 0b01111111
    data[HEADER + 1] = 0b10
    with pytest.raises(ValueError, match="positions"):
        decode(encoding, data)


def test_room_of_another_size_is_refused():
    encoding = Encoding(tensors_of([4]), 1)
    data = encode(encoding, None, np.ones(4, np.float32), np.array([0, 4]), np.ones(1, np.float32))
    for size in (4, 6):
        with pytest.raises(ValueError, match="room"):
            encoding.decode(data, np.zeros(size, np.float32))


# Packing of bits


@given(st.integers(1, 8), SEEDS, st.integers(0, 40) | st.sampled_from([65_535, 65_537, 131_072]))
def test_bits_are_packed_lowest_first_one_number_after_the_other(width, seed, count):
    numbers = rng_of(seed).integers(1 << width, size=count, dtype=np.int32)
    packed = pack_bits(numbers, width)
    bits = (numbers[:, None] >> np.arange(width)) & 1
    expected = np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(unpack_bits(packed, width, count), numbers)


@given(st.integers(1, 30), SEEDS)
def test_planes_hold_all_bits_between_them(width, seed):
    numbers = rng_of(seed).integers(1 << width, size=19, dtype=np.int32)
    total = np.zeros(19, np.int64)
    for low, part in planes(width):
        assert 1 <= part <= 8
        total |= unpack_bits(pack_bits(numbers, part, low), part, 19).astype(np.int64) << low
    np.testing.assert_array_equal(total, numbers)
