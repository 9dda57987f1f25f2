"""The privacy budget of DP-SGD, by opacus' accountants."""

import importlib
import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from testbed.errors import UserError

Accountant = Literal["rdp", "prv"]

# Beyond, the grid of the PRV accountant takes gigabytes, and no guarantee is left to speak of.
_PRV_LIMIT = 100.0

_NOTE = (
    "accounted as if every sample were in a batch with the sampling rate's probability,"
    " independently (Poisson sampling); batches of a fixed size are not drawn so, and where all"
    " clients draw from the same samples, with replacement"
)


@dataclass(frozen=True)
class Spent:
    """A budget, and the accountant that vouches for it."""

    epsilon: float
    accountant: Accountant


def epsilon(
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "rdp",
) -> float:
    """Return for which epsilon the steps of DP-SGD are (epsilon, delta)-differentially private.

    Against whoever sees the gradient of every step; two data sets are neighbours where one has a
    sample more (Abadi et al., CCS 2016).

    Parameters
    ----------
    noise_multiplier
        Standard deviation of the noise on a sum of gradients, in units of the bound on each; not
        negative.
    sampling_rate
        Probability that a sample is in a batch, in (0, 1].
    steps
        How many gradients are shared; not negative.
    delta
        In (0, 1).
    accountant
        ``rdp``: Renyi divergences (Mironov, CSF 2017). ``prv``: numerical composition (Gopi et
        al., NeurIPS 2021), an upper bound as well, and tighter. Where RDP's epsilon is above 100
        or PRV's fails, RDP's is returned.

    Returns
    -------
    float
        0 for no steps, infinity for no noise.

    Raises
    ------
    UserError
        opacus is not installed.
    ValueError
        A number is out of range.
    """
    return _spent(noise_multiplier, sampling_rate, steps, delta, accountant).epsilon


def describe_budget(
    *,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "rdp",
) -> dict[str, Any]:
    """Return what a results file says of a budget; parameters and errors as of `epsilon`.

    Keys: ``epsilon``, ``delta``, ``accountant`` (the one that vouches for epsilon),
    ``noise_multiplier``, ``sampling_rate``, ``steps``, ``unit`` (what is protected: a sample) and
    ``note``.
    """
    spent = _spent(noise_multiplier, sampling_rate, steps, delta, accountant)
    return {
        "epsilon": spent.epsilon,
        "delta": delta,
        "accountant": spent.accountant,
        "noise_multiplier": noise_multiplier,
        "sampling_rate": sampling_rate,
        "steps": steps,
        "unit": "sample",
        "note": _NOTE,
    }


def _spent(
    noise_multiplier: float, sampling_rate: float, steps: int, delta: float, accountant: Accountant
) -> Spent:
    _check(noise_multiplier, sampling_rate, steps, delta)
    if steps == 0 or noise_multiplier == 0:
        return Spent(math.inf if steps else 0.0, accountant)
    history = [(noise_multiplier, sampling_rate, steps)]
    # Both say that a wider search might give a tighter bound, or divide by zero at rate 1.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bound = _opacus("rdp", history, delta)
        if accountant == "prv" and bound <= _PRV_LIMIT:
            try:
                tighter = _opacus("prv", history, delta)
            except (ArithmeticError, MemoryError, RuntimeError, ValueError):
                tighter = math.inf
            if math.isfinite(tighter):
                return Spent(tighter, "prv")
    return Spent(bound, "rdp")


def _opacus(kind: Accountant, history: list[tuple[float, float, int]], delta: float) -> float:
    try:
        accountants = importlib.import_module("opacus.accountants")
    except ImportError as error:
        raise UserError(
            f"defence 'dp_sgd': found no package opacus ({error}), expected it for the privacy"
            " budget: pip install '.[run]'"
        ) from None
    keeper = accountants.create_accountant(kind)
    keeper.history = history
    # For a large delta, its conversion from Renyi divergences goes below zero.
    return max(float(keeper.get_epsilon(delta=delta)), 0.0)


def _check(noise_multiplier: float, sampling_rate: float, steps: int, delta: float) -> None:
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise multiplier {noise_multiplier}: expected at least 0, and finite")
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"sampling rate {sampling_rate}: expected to be in (0, 1]")
    if steps < 0:
        raise ValueError(f"{steps} steps: expected at least 0")
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta}: expected to be in (0, 1)")
