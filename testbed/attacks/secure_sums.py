"""Single clients' labels from a secure sum (Wang et al., INFOCOM 2024): a malicious server."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray
from typing_extensions import override

from testbed.attacks.base import (
    Adversary,
    Assumption,
    Attack,
    Calibration,
    Head,
    Knowledge,
    LabelCounts,
    Observations,
    Observed,
    Planted,
)
from testbed.attacks.registry import register
from testbed.attacks.rounding import largest_remainder
from testbed.attacks.simulation import softmax

Floats = NDArray[np.float64]


@register
@dataclass(frozen=True)
class BreakingSecureAggregation(Attack):
    """Separates the clients in a secure sum, since every one got features of its own.

    The server zeroes the scale of the BatchNorm before the last layer and plants its shift: all
    samples of client u then have the same features o_u and the same known posterior p_u, so that
    the client's weight gradient is ``g_u o_u^T``. The sum is ``sum_u w_u g_u o_u^T = G O``; its
    product with the pseudo-inverse of O gives every g_u, and ``N_u (p_u - g_u)`` are the client's
    counts, exactly, as long as the o_u are independent: for at most D clients. Beyond that, the
    clients' gradients mix.

    The rows of the observations are the members of one cohort, in the order of what was planted,
    and each has the cohort's sum for a weight gradient.
    """

    name: ClassVar[str] = "breaking_secure_aggregation"
    title: ClassVar[str] = "Breaking secure aggregation"
    knowledge: ClassVar[Knowledge] = Knowledge.MALICIOUS
    source: ClassVar[str] = "Wang et al., INFOCOM 2024 (arXiv 2406.15731)"
    observes: ClassVar = frozenset({Observed.WEIGHT_GRADIENT})
    assumes: ClassVar = frozenset({Assumption.ONE_STEP})
    calibration_arrays: ClassVar = {
        "inverse": (("client", "feature"), "f8"),
        "posterior": (("client", "class"), "f8"),
        "weight": (("client",), "f8"),
    }

    @override
    def calibrate_updates(self, adversary: Adversary, observations: Observations) -> Calibration:
        planted = adversary.planted()
        members = len(observations.keys)
        if len(planted.weights) != members:
            raise ValueError(
                f"models were planted in {len(planted.weights)} clients, but the sum has {members}"
            )
        return {
            "inverse": np.ascontiguousarray(np.linalg.pinv(planted.embeddings).T),
            "posterior": planted.posterior,
            "weight": planted.weights,
        }

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        xp = array_namespace(observations.weight_gradient)
        total = xp.astype(observations.weight_gradient, xp.float64)
        # What is not finite would be no more separable, and costs warnings.
        total = xp.where(xp.isfinite(total), total, xp.zeros_like(total))
        where = device(total)
        inverse = xp.asarray(calibration["inverse"], dtype=xp.float64, device=where)
        posterior = xp.asarray(calibration["posterior"], dtype=xp.float64, device=where)
        weight = xp.asarray(calibration["weight"], dtype=xp.float64, device=where)
        # The sum of the local steps' gradients; N is the number of labels of all of them.
        scale = (weight * observations.local_steps)[:, None]
        gradient = xp.matmul(total, inverse[:, :, None])[:, :, 0]
        gradient = gradient / xp.where(scale == 0, xp.ones_like(scale), scale)
        labels = xp.astype(observations.labels, xp.float64)[:, None]
        scores = labels * (posterior - gradient)
        return LabelCounts(largest_remainder(scores, observations.labels), scores)


def embeddings(clients: int, features: int, rng: np.random.Generator) -> Floats:
    """Return features for each client: what to plant as the shifts of the BatchNorm.

    Orthogonal, where there are enough features: the sum comes in single precision, and what the
    pseudo-inverse makes of its rounding grows with the condition number.

    Parameters
    ----------
    clients, features
        U and D.
    rng
        Decides the directions.

    Returns
    -------
    Floats
        [U, D], every entry of about unit size.
    """
    drawn = rng.standard_normal((clients, features))
    if clients > features:
        return drawn
    q, _ = np.linalg.qr(drawn.T)
    planted: Floats = q.T * np.sqrt(features)
    return planted


def plant(head: Head, shifts: Floats, weights: Floats) -> Planted:
    """Return what a server that plants the given features knows of each client.

    Parameters
    ----------
    head
        The last layer, the same for all clients.
    shifts
        float64 [U, D]: the features of all samples of a client.
    weights
        float64 [U]: of each client in the sum.
    """
    return Planted(shifts, softmax(shifts @ head.weight.T + head.bias), weights)
