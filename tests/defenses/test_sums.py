"""Secure aggregation as a defence: its options, and what follows from them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.defenses import Stage, make_defense
from testbed.defenses.sums import SecureAggregation
from testbed.errors import UserError
from testbed.secure import Aggregator, write_message


def test_defaults_and_options_are_what_an_experiment_file_says() -> None:
    plain = make_defense("secure_aggregation", {})
    assert plain == SecureAggregation()
    assert isinstance(plain, SecureAggregation)
    assert (plain.protocol, plain.modulus_bits, plain.fraction, plain.threshold) == (
        "masks",
        64,
        32,
        2 / 3,
    )
    assert plain.stage == max(Stage)
    assert not plain.accumulates
    narrow = make_defense("secure_aggregation", {"modulus_bits": 32, "protocol": "reduction"})
    assert isinstance(narrow, SecureAggregation)
    assert narrow.fraction == 16
    assert make_defense("secure_aggregation", narrow.options()) == narrow


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modulus_bits": 48}, "option 'modulus_bits': found 48"),
        ({"fraction_bits": 0}, "option 'fraction_bits': found 0"),
        ({"fraction_bits": 63}, "option 'fraction_bits': found 63"),
        (
            {"fraction_bits": 31, "modulus_bits": 32},
            "fraction_bits = 31 does not fit modulus_bits = 32; expected 1 to 30",
        ),
        ({"threshold": 0}, "option 'threshold': found 0"),
        ({"threshold": 1.01}, "option 'threshold': found 1.01"),
        ({"protocol": "mask"}, "option 'protocol': found 'mask'"),
        ({"at": "step"}, "option 'at': found 'step'"),
        ({"scope": "tensor"}, "option 'scope': found 'tensor'"),
        ({"treshold": 0.5}, "did you mean 'threshold'"),
    ],
)
def test_options_out_of_range_are_refused(options, said) -> None:
    with pytest.raises(UserError, match="secure_aggregation") as error:
        make_defense("secure_aggregation", options)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("threshold", "cohort", "needed"),
    [
        (2 / 3, 1, 1),
        (2 / 3, 2, 2),
        (2 / 3, 3, 2),
        (2 / 3, 10, 7),
        (2 / 3, 99, 66),
        (2 / 3, 100, 67),
        (0.55, 100, 55),
        (0.07, 100, 7),
        (1e-9, 100, 2),
        (1.0, 100, 100),
    ],
)
def test_the_threshold_is_a_share_of_the_cohort_rounded_up(threshold, cohort, needed) -> None:
    assert SecureAggregation(threshold=threshold).needed(cohort) == needed


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 300))
def test_the_threshold_never_exceeds_the_cohort(threshold, cohort) -> None:
    needed = SecureAggregation(threshold=threshold).needed(cohort)
    assert min(2, cohort) <= needed <= cohort
    assert needed >= threshold * cohort - 1e-9


@pytest.mark.parametrize("bits", [32, 64])
def test_both_protocols_give_the_same_sum(bits) -> None:
    defence = SecureAggregation(modulus_bits=bits)
    cohort, survivors, size = range(6), (0, 1, 3, 5), 500
    round_, numbers = defence.secure_round(cohort, survivors, size), defence.fixed_point(6 * 10)
    assert (round_.threshold, round_.lost) == (4, False)
    assert defence.secure_round(cohort, survivors[1:], size).lost
    rng = np.random.default_rng(0)
    updates = rng.normal(size=(6, size)).astype(np.float32)
    seeds = list(range(100, 106))
    server, reduced = Aggregator(round_), numbers.zeros(size)
    message = np.zeros(round_.message_bytes, np.uint8)
    for client in survivors:
        encoded = numbers.zeros(size)
        assert numbers.encode(updates[client], 10, encoded) == 0
        write_message(round_, seeds, client, encoded, message)
        server.add(client, message)
        numbers.add(reduced, encoded)
    assert np.array_equal(server.finish(), reduced)
    mean = updates[list(survivors)].astype(np.float64).mean(axis=0)
    unit = 2.0**-defence.fraction
    assert numbers.decode(reduced, 40) == pytest.approx(mean, abs=unit / 2 + 1e-6)
