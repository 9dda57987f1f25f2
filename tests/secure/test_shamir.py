"""Shamir's secret sharing: t shares suffice, and t - 1 leave every secret equally likely."""

from collections import Counter
from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from primes import is_probable_prime

from testbed.secure.shamir import BYTES, PRIME, polynomial, reconstruct, share, weights

SECRETS = st.integers(0, PRIME - 1)


def test_the_field_is_prime_and_its_elements_fit_a_share() -> None:
    assert is_probable_prime(PRIME)
    assert not any(is_probable_prime(odd) for odd in range(PRIME + 2, 2**128, 2))
    assert PRIME < 2 ** (8 * BYTES)


@given(st.data(), SECRETS, st.integers(1, 12))
def test_any_threshold_shares_give_the_secret(data, secret, threshold) -> None:
    length = BYTES * (threshold - 1)
    coefficients = polynomial(
        secret, threshold, data.draw(st.binary(min_size=length, max_size=length))
    )
    points = data.draw(st.sets(st.integers(1, 1000), min_size=threshold, max_size=threshold + 3))
    order = data.draw(st.permutations(sorted(points)))
    for chosen in (order, order[:threshold]):
        shares = [share(coefficients, point) for point in chosen]
        assert reconstruct(shares, weights(chosen)) == secret


@pytest.mark.parametrize("threshold", [2, 3])
def test_fewer_shares_leave_every_secret_equally_likely(threshold) -> None:
    prime, points = 7, range(1, 7)
    for few in combinations(points, threshold - 1):
        seen = Counter(
            (tuple(share(coefficients, point, prime) for point in few), coefficients[0])
            for coefficients in product(range(prime), repeat=threshold)
        )
        assert set(seen.values()) == {1}
        assert len(seen) == prime ** (threshold - 1) * prime


def test_shares_in_a_small_field_are_those_of_the_definition() -> None:
    coefficients, prime = (4, 2, 6), 7
    shares = {x: (4 + 2 * x + 6 * x * x) % prime for x in range(1, 7)}
    assert {x: share(coefficients, x, prime) for x in shares} == shares
    for chosen in combinations(shares, 3):
        assert reconstruct([shares[x] for x in chosen], weights(chosen, prime), prime) == 4


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to PRIME - 1"):
        polynomial(PRIME, 1, b"")
    with pytest.raises(ValueError, match=r"found 15 random bytes for t = 2; expected 16"):
        polynomial(0, 2, bytes(15))
    with pytest.raises(ValueError, match="t = 0"):
        polynomial(0, 0, b"")
