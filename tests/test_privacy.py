"""The budget of DP-SGD: opacus' own, and right where it is known in closed form."""

import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from testbed import privacy
from testbed.errors import UserError
from testbed.privacy import Accountant, describe_budget, epsilon

ACCOUNTANTS: tuple[Accountant, ...] = ("rdp", "prv")


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Return the exact epsilon of one Gaussian mechanism (Balle and Wang, ICML 2018, theorem 8)."""

    def excess(epsilon: float) -> float:
        low, high = 1 / (2 * sigma) - epsilon * sigma, -1 / (2 * sigma) - epsilon * sigma
        return float(norm.cdf(low) - math.exp(epsilon) * norm.cdf(high)) - delta

    return float(brentq(excess, 0, 100))


@pytest.mark.parametrize(
    ("noise", "rate", "steps"), [(1.0, 0.01, 300), (0.7, 0.25, 20), (2.0, 1.0, 7), (5.0, 0.5, 1)]
)
def test_rdp_is_that_of_opacus_after_as_many_steps(noise: float, rate: float, steps: int) -> None:
    keeper = RDPAccountant()
    for _ in range(steps):
        keeper.step(noise_multiplier=noise, sample_rate=rate)
    assert epsilon(noise, rate, steps, 1e-5) == keeper.get_epsilon(delta=1e-5)


def test_prv_is_that_of_opacus_after_as_many_steps_and_tighter() -> None:
    keeper = PRVAccountant()
    for _ in range(100):
        keeper.step(noise_multiplier=1.0, sample_rate=0.02)
    found = epsilon(1.0, 0.02, 100, 1e-5, "prv")
    assert found == keeper.get_epsilon(delta=1e-5)
    assert found < epsilon(1.0, 0.02, 100, 1e-5, "rdp")


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (3.0, 1), (2.0, 8)])
def test_rdp_of_whole_batches_has_its_closed_form(sigma: float, steps: int) -> None:
    # Order alpha costs steps * alpha / (2 sigma^2); converted by Canonne, Kamath and Steinke 2020.
    delta, alphas = 1e-5, np.array(RDPAccountant.DEFAULT_ALPHAS)
    divergence = steps * alphas / (2 * sigma**2)
    converted = (
        divergence + np.log((alphas - 1) / alphas) - (np.log(delta) + np.log(alphas)) / (alphas - 1)
    )
    assert epsilon(sigma, 1.0, steps, delta) == pytest.approx(converted.min())


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (4.0, 1), (6.0, 9)])
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_whole_batches_cost_no_less_than_the_gaussian_mechanism(
    sigma: float, steps: int, accountant: Accountant
) -> None:
    # Gaussian mechanisms compose to one of sigma / sqrt(steps).
    exact = gaussian_epsilon(sigma / math.sqrt(steps), 1e-5)
    found = epsilon(sigma, 1.0, steps, 1e-5, accountant)
    assert exact <= found < exact * (1.03 if accountant == "prv" else 1.3)


@given(
    st.floats(0.3, 10),
    st.sampled_from([1e-3, 0.02, 0.1, 1.0]),
    st.integers(1, 300),
    st.floats(1e-8, 0.1),
    st.data(),
)
@settings(max_examples=20)
def test_more_noise_costs_less_and_more_of_the_rest_costs_more(noise, rate, steps, delta, data):
    found = epsilon(noise, rate, steps, delta)
    assert 0 <= found < math.inf
    slack = 1e-9
    assert epsilon(noise, rate, steps + data.draw(st.integers(1, 50)), delta) >= found - slack
    assert epsilon(noise * data.draw(st.floats(1, 3)), rate, steps, delta) <= found + slack
    assert epsilon(noise, rate, steps, delta / 2) >= found - slack


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_no_noise_promises_nothing_and_no_step_costs_nothing(accountant: Accountant) -> None:
    assert epsilon(0.0, 0.1, 1, 1e-5, accountant) == math.inf
    assert epsilon(0.0, 0.1, 0, 1e-5, accountant) == 0
    assert epsilon(1.0, 0.1, 0, 1e-5, accountant) == 0


def test_where_prv_would_need_gigabytes_the_other_accountant_vouches() -> None:
    found = describe_budget(
        noise_multiplier=1e-3, sampling_rate=0.5, steps=10, delta=1e-5, accountant="prv"
    )
    assert found["accountant"] == "rdp"
    assert 1000 < found["epsilon"] < math.inf
    assert found["epsilon"] == epsilon(1e-3, 0.5, 10, 1e-5, "rdp")


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_a_budget_is_described_by_what_it_rests_on(accountant: Accountant) -> None:
    found = describe_budget(
        noise_multiplier=1.2, sampling_rate=0.05, steps=30, delta=1e-6, accountant=accountant
    )
    assert found.pop("epsilon") == epsilon(1.2, 0.05, 30, 1e-6, accountant)
    assert "Poisson" in found.pop("note")
    assert found == {
        "delta": 1e-6,
        "accountant": accountant,
        "noise_multiplier": 1.2,
        "sampling_rate": 0.05,
        "steps": 30,
        "unit": "sample",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, 0.1, 1, 1e-5), "noise multiplier -1.0"),
        ((math.inf, 0.1, 1, 1e-5), "noise multiplier inf"),
        ((1.0, 0.0, 1, 1e-5), "sampling rate 0.0"),
        ((1.0, 1.1, 1, 1e-5), "sampling rate 1.1"),
        ((1.0, 0.1, -1, 1e-5), "-1 steps"),
        ((1.0, 0.1, 1, 0.0), "delta 0.0"),
        ((1.0, 0.1, 1, 1.0), "delta 1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(
    arguments: tuple[float, float, int, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        epsilon(*arguments)


def test_nothing_is_said_where_opacus_warns(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Orders at either end of the search, and a division by zero at rate 1.
        epsilon(0.01, 1.0, 3, 1e-5)
        epsilon(100.0, 1e-3, 1, 1e-5)
        epsilon(2.0, 1.0, 5, 1e-5, "prv")
    assert not caught
    assert capfd.readouterr() == ("", "")


def test_a_missing_opacus_is_the_users_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(UserError, match=r"found no package opacus .*pip install"):
        epsilon(1.0, 0.1, 1, 1e-5)


def test_opacus_and_torch_are_not_imported_before_they_are_needed() -> None:
    code = (
        "import sys, testbed.privacy, testbed.defenses.samples, testbed.defenses.labels,"
        " testbed.defenses.withholding; print('torch' in sys.modules, 'opacus' in sys.modules)"
    )
    root = Path(privacy.__file__).parents[1]
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert printed == "False False\n"
